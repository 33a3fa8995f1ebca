"""A folder of pictures as splits: which part each picture belongs to, and which class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from training.data import table
from training.data.images import DataError
from training.data.labels import Unclear, column_of_labels, from_filename, from_folder, from_values, printable
from training.data.options import LoadOptions
from training.data.splits import Split, split_of
from training.data.table import Table, key
from training.data.walk import Listing, counted, examples, walk

Say = Callable[[str], None]
HINT = "tell it by folders, by a metadata.csv with the columns file_name and label, or by --label_from filename"


def image_folder(path: Path, options: LoadOptions, say: Say) -> dict[str, Split] | None:
    """The splits of a folder of pictures, or None where it has none that is not packed.

    A picture's class is the first folder below its split's, at any depth. Folders called train, test and validation,
    in any case and in their usual forms, are splits if there are no others at the top. `datasets` is not asked: it
    would take a class called "train" or "a-dev" for a split and leave the other classes out.
    """
    listing = walk(path)
    if not listing.pictures:
        return None
    if listing.packed and not any(os.sep in picture for picture in listing.pictures):
        raise DataError(
            f"{printable(str(path))} has images, such as {printable(listing.pictures[0])}, and "
            f"{printable(listing.packed[0])}, which may hold images as well: move one of them away"
        )
    listing.others += listing.packed
    roots = _roots(listing, options)
    members = {split: [p for p in listing.pictures if not root or _top(p) == root] for split, root in roots.items()}
    if outside := [p for p in listing.pictures if not any(root in ("", _top(p)) for root in roots.values())]:
        say(f"{counted(len(outside), 'image')} passed over beside the splits {', '.join(roots)}: {examples(outside)}")
    tables = _tables(listing, options, say)
    for line in listing.passed_over():
        say(line)
    readers = {split: _Labels(path, roots[split], members[split], tables, options, say) for split in roots}
    splits = {split: _split(path, members[split], reader) for split, reader in readers.items()}
    if any(reader.by_folder for reader in readers.values()):
        _tell_of_folders(listing, roots, say)
    return splits


def _top(picture: str) -> str:
    """The first folder of a path; "" of a file at the top."""
    first, _, rest = picture.partition(os.sep)
    return first if rest else ""


def _roots(listing: Listing, options: LoadOptions) -> dict[str, str]:
    """The folder of each split: {"train": ""} where there are none. Raises DataError where that is not clear."""
    inner: dict[str, set[str]] = defaultdict(set)  # folders of the second level that have pictures, by their first
    for picture in listing.pictures:
        if top := _top(picture):
            inner[top].add(_top(picture[len(top) + 1 :]))
    splits = [top for top in inner if split_of(top)]
    trains = [top for top in splits if split_of(top) == "train"]
    others = [top for top in inner if top not in splits]
    place = printable(str(listing.root))
    if options.label_from == "folder" and others:
        return {"train": ""}
    if trains and not others:
        return {top: top for top in splits}
    if trains and (len(splits) > 1 or any(inner[top] - {""} for top in trains)):
        raise DataError(
            f"{place} has the folders {' and '.join(splits)}, which look like splits, and beside them "
            f"{examples(others)}: move those away, or say that all are classes by --label_from folder"
        )
    folders = [folder for inside in inner.values() for folder in inside]
    if folders and all(map(split_of, folders)) and "train" in map(split_of, folders):
        top = next(iter(inner))
        advice = f"give --dataset {place}{os.sep}{printable(top)}" if len(inner) == 1 else "put the splits at the top"
        raise DataError(f"{place} has splits within its folders, such as {printable(top)}/{min(inner[top])}: {advice}")
    return {"train": ""}


def _tables(listing: Listing, options: LoadOptions, say: Say) -> list[Table]:
    """Those that name pictures which are there. Beside class folders the others are passed over, else refused."""
    has_folders = any(_top(picture) for picture in listing.pictures) and not options.label_column
    there, found = {key(picture) for picture in listing.pictures}, []
    for path in listing.tables:
        try:
            read = table.read(listing.root, path)
        except DataError as error:
            if not has_folders:
                raise
            say(f"passed over: {error}")
            continue
        if there.isdisjoint(read.rows):
            say(f"{printable(path)} is passed over: it names none of the images")
        else:
            found.append(read)
    if options.label_column and not found:
        raise DataError(
            f"--label_column {options.label_column}, but {printable(str(listing.root))} has no metadata.csv or "
            f"metadata.jsonl with a column file_name that names its images"
        )
    return found


class _Labels:
    """The class of each member of a split, and where it was told: `by_folder`, or else."""

    def __init__(
        self, path: Path, root: str, members: list[str], tables: list[Table], options: LoadOptions, say: Say
    ) -> None:
        self._path, self._members, self._options, self._say = path, members, options, say
        below = [member[len(root) + 1 :] if root else member for member in members]
        self._folders = [
            from_folder(top, str(path / root / top)) if (top := _top(member)) else None for member in below
        ]
        self._files = below
        there = {key(member) for member in members}
        self._tables = [table for table in tables if not there.isdisjoint(table.rows)]
        self.by_folder, self.unclear = False, ""
        try:
            self.values = self._told()
        except Unclear as error:
            self.values, self.unclear = [None] * len(members), str(error)

    def _told(self) -> Sequence[str | None]:
        options, has_folders = self._options, any(self._folders)
        if options.label_from in ("filename", "prefix"):
            return self._by_filename()
        by_table: Sequence[str | None] = []
        if options.label_from != "folder" and self._tables:
            try:
                by_table = self._by_table()
            except Unclear as error:
                if not has_folders:
                    raise
                self._say(f"passed over: {error}")
        if by_table and has_folders and not options.label_column and list(by_table) != self._folders:
            raise Unclear(
                f"both its folders and {printable(self._tables[0].path)} name classes: choose by "
                f"--label_from folder or --label_column {self._column}"
            )
        if by_table:
            return by_table
        if not has_folders:
            raise Unclear(HINT)
        self.by_folder = True
        return self._folders

    def _by_filename(self) -> list[str | None]:
        found = [from_filename(file, self._options.label_from) for file in self._files]
        if self._options.label_from == "filename":
            for file, label in zip(self._files, found, strict=True):
                other = from_filename(file, "prefix")
                if other not in (label, None):
                    self._say(f"{printable(file)} is of the class {label}; by --label_from prefix it would be {other}")
                    break
        return found

    def _by_table(self) -> list[str | None]:
        names = " and ".join(printable(table.path) for table in self._tables)
        columns = list(dict.fromkeys(column for table in self._tables for column in table.columns))
        self._column = column_of_labels(columns, (), self._options.label_column, names)
        rows = {file: row for table in self._tables for file, row in table.rows.items()}
        if gone := [file for file in rows if file not in {key(member) for member in self._members}]:
            self._missing(gone, names)
        return from_values((rows.get(key(member), {}).get(self._column) for member in self._members), self._column)

    def _missing(self, files: list[str], table: str) -> None:
        gone = [file for file in files if not (self._path / file).exists()]
        if gone and not self._options.skip_broken:
            raise DataError(
                f"{table} names {counted(len(gone), 'image')} that {'is' if len(gone) == 1 else 'are'} not there: "
                f"{examples(gone)}; --skip_broken leaves such rows out"
            )
        if gone:
            self._say(f"{table} names {counted(len(gone), 'image')} not there, left out: {examples(gone)}")


def _split(path: Path, members: list[str], reader: _Labels) -> Split:
    def stamp() -> str:
        digest = hashlib.sha256()
        for member in members:
            try:
                state = os.stat(path / member)
                digest.update(f"{member!r} {state.st_size} {state.st_mtime_ns}\n".encode())
            except OSError:
                digest.update(f"{member!r} gone\n".encode())
        return digest.hexdigest()

    return Split(
        count=len(members),
        read=lambda which: [path / members[i] for i in which],
        where=lambda i: printable(str(path / members[i])),
        labels=reader.values,
        stamp=stamp,
        unclear=reader.unclear,
    )


def _tell_of_folders(listing: Listing, roots: dict[str, str], say: Say) -> None:
    """Class folders without images, two of one name, and a folder that may be one too many."""
    inner: dict[str, set[str]] = defaultdict(set)  # folders within a class's, by the folder of the class
    for root in roots.values():
        for picture in listing.pictures:
            below = picture[len(root) + 1 :] if root else picture
            if (not root or _top(picture) == root) and (top := _top(below)):
                inner[top].add(_top(below[len(top) + 1 :]))
    forms = Counter(from_folder(top, top) for top in inner)
    for name in (name for name, count in forms.items() if count > 1):
        say(f"{forms[name]} folders are called {name}, in several forms of Unicode: they are one class")
    places = [folder for folder in listing.folders if os.path.dirname(folder) in roots.values() and folder]
    empty = [folder for folder in places if os.path.basename(folder) not in {*inner, *roots.values()}]
    inside = [*listing.folders, *(folder for folders in listing.not_entered.values() for folder in folders)]
    if told := [folder for folder in empty if _within(folder, listing.others) or not _within(folder, inside)]:
        say(f"no class for {examples(told)}: no images in there")
    if len(inner) == 1 and len(folders := next(iter(inner.values()))) > 1 and "" not in folders:
        only = listing.root / next(iter(roots.values())) / next(iter(inner))
        say(
            f"all images are of one class, {printable(only.name)}: if its folders, such as {printable(min(folders))}, "
            f"are the classes, give --dataset {printable(str(only))}"
        )


def _within(folder: str, paths: list[str]) -> bool:
    return any(path.startswith(folder + os.sep) for path in paths)
