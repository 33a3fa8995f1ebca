"""Files that appear whole or not at all, and are on the disk before whatever follows them."""

from __future__ import annotations

import errno
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DISK_FAILED = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # errors of fsync that say that the data is lost

_warned: set[Path] = set()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """The temporary file to write, beside `path`: it takes that name when the block ends, and goes if the block raises.

    Readers find the old file or the new one, and so does a power failure. The mode is what the umask says, whatever
    the block's library sets. Where two processes write the same path, the last one wins. Raises OSError.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    part.touch(exist_ok=False)
    mode = part.stat().st_mode
    try:
        with naming(path):
            yield part
        if part.stat().st_mode != mode:
            part.chmod(mode)
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it an OSError that names no file names this one: what writes to a full disk does not say where."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def put_in_place(part: Path, path: Path) -> None:
    """Gives a whole file, or a folder of files, its name: contents on the disk first, then the name. Raises OSError."""
    _sync(part, path.parent)
    os.replace(part, path)
    _sync(path.parent, path.parent)


def warn_once(folder: Path, lack: str, error: OSError, consequence: str) -> None:
    """Says what the file system of a folder cannot do. Once: where it lacks one thing, it often lacks another."""
    if folder not in _warned:
        _warned.add(folder)
        print(f"{folder}: its file system {lack} ({error.strerror or error}): {consequence}", file=sys.stderr)


def _sync(path: Path, folder: Path) -> None:
    """Waits until a file's contents, or a folder's names, are on the disk, where the file system can tell."""
    try:
        file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno in DISK_FAILED:
            raise
        warn_once(folder, "does not tell when a file is on the disk", error, "a power failure may lose files")
