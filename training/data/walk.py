"""Every file below a folder, by what it is. Nothing is read twice, and nothing that a run has written."""

from __future__ import annotations

import json
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from training.data import picture, table
from training.data.images import DataError
from training.data.labels import printable

OURS = {".pixels", ".lock", ".part"}  # what training.data.cache leaves
PACKED = {".parquet", ".arrow"}
NOT_DATA = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
OF_A_RUN = {"dataset", "num_timesteps", "base_channels"}  # keys of its config.json
EXAMPLES = 3


@dataclass
class Listing:
    """Paths below `root`, in order: of each folder its files, then its folders."""

    root: Path
    folders: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    packed: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    not_entered: dict[str, list[str]] = field(default_factory=dict)  # why → folders

    def passed_over(self) -> list[str]:
        """What is no part of the data set, in one sentence for each kind, with examples."""
        told = []
        if self.others:
            kinds = Counter(_suffix(path) or "without an ending" for path in self.others)
            shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(EXAMPLES))
            told.append(f"{counted(len(self.others), 'file')} passed over that {_are(self.others)} no images ({shown})")
            told[-1] += f", such as {examples(self.others)}"
        for why, folders in self.not_entered.items():
            told.append(f"{counted(len(folders), 'folder')} passed over, {why}: {examples(folders)}")
        return told


def walk(root: Path) -> Listing:
    """Looks into every folder once. Raises DataError where it may not look, or `root` is the folder of a run.

    Links are followed, after all folders that are there themselves; one that leads above `root` is not. Hidden
    folders and those of file systems and archivers are no data, nor is the folder of a run.
    """
    listing, seen, links = Listing(root), set(), deque[str]()
    above = {_identity(folder) for folder in root.resolve().parents}
    if _is_run(root):
        raise DataError(f"{printable(str(root))} is the folder of a training run, not of images")
    pending = deque([""])
    while pending or links:
        folder = pending.popleft() if pending else links.popleft()
        identity = _identity(root / folder)
        if identity in seen or identity in above:
            listing.not_entered.setdefault("links that lead round", []).append(folder)
            continue
        seen.add(identity)
        if folder and _is_run(root / folder):
            listing.not_entered.setdefault("written by a training run", []).append(folder)
            continue
        listing.folders.append(folder)
        for entry in _entries(root / folder):
            path = os.path.join(folder, entry.name)
            is_hidden = entry.name.startswith(".") or entry.name.casefold() in NOT_DATA
            if is_hidden and not entry.is_dir():
                continue
            if is_hidden:
                listing.not_entered.setdefault("hidden", []).append(path)
            elif entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif _is_folder(entry):
                links.append(path)
            elif _suffix(path) not in OURS:
                _kind(listing, path, entry).append(path)
    for paths in (listing.folders, listing.pictures, listing.tables, listing.packed, listing.others):
        paths.sort(key=_place)
    return listing


def _kind(listing: Listing, path: str, entry: os.DirEntry[str]) -> list[str]:
    """The list that a file belongs to."""
    suffix = _suffix(path)
    if not _is_file(entry):
        return listing.pictures if suffix in picture.suffixes() and entry.is_symlink() else listing.others
    if entry.name.casefold() in table.NAMES:
        return listing.tables
    if suffix in PACKED:
        return listing.packed
    if suffix in picture.suffixes() or picture.is_picture(listing.root / path):
        return listing.pictures
    return listing.others


def counted(count: int, noun: str) -> str:
    """ "1 file", "1,200 files"."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def examples(paths: Iterable[str]) -> str:
    """The first few, and how many more."""
    shown = [printable(path) for path in paths]
    more = f" and {len(shown) - EXAMPLES:,} more" if len(shown) > EXAMPLES else ""
    return ", ".join(shown[:EXAMPLES]) + more


def _are(paths: list[str]) -> str:
    return "is" if len(paths) == 1 else "are"


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _place(path: str) -> tuple[tuple[bool, str], ...]:
    """Sorts a folder's files before its folders."""
    *folders, name = path.split(os.sep)
    return *((True, folder) for folder in folders), (False, name)


def _identity(folder: Path) -> tuple[int, int]:
    try:
        found = os.stat(folder)
    except OSError as error:
        raise DataError(f"cannot look into {printable(str(folder))}: {error.strerror}") from error
    return found.st_dev, found.st_ino


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot look into {printable(str(folder))}: {error.strerror}") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Not a pipe, which would never end, nor a link that leads nowhere."""
    try:
        return stat.S_ISREG(entry.stat().st_mode)
    except OSError:
        return False


def _is_run(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.keys() >= OF_A_RUN
