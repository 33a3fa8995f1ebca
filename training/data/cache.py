"""Decoded pixels on the disk, so that photos are decoded once: beside the runs, one file for a data set and a size.

A file is the pixels, then one JSON line that describes them, then the length of that line. It appears whole or not at
all, and may be deleted at any time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.atomic_write import put_in_place

VERSION = 1
LENGTH = 8  # bytes at the end


def beside(out: Path) -> Path:
    """The folder for the cache of what is written to the file `out`: beside the run, where that is in its folder."""
    return out.parent.parent if (out.parent / "config.json").exists() else out.parent


@dataclass(frozen=True)
class Pixels:
    """uint8 [N, C, H, W] of the pictures that could be read; `left_out` are the places of the others."""

    array: np.ndarray[Any, Any]
    left_out: tuple[int, ...]
    file: Path | None = None  # what it is mapped from


class PixelCache:
    """The file of one data set: `request` is what is asked for, `stamp` changes when the pictures do."""

    def __init__(self, folder: Path, name: str, request: dict[str, Any], stamp: str) -> None:
        self._request = json.dumps({"version": VERSION, **request}, sort_keys=True)
        digest = hashlib.sha256(f"{self._request}\n{stamp}".encode()).hexdigest()
        self._stem = re.sub(r"\W", "-", name)[:40]
        self._folder, self.path = folder, folder / f"{self._stem}-{digest[:16]}.pixels"

    def find(self) -> Pixels | None:
        """The pixels, mapped from the file, if it is there and whole."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            told = _told(self.path)
            shape = tuple(told["shape"])
            array = np.memmap(self.path, np.uint8, "r", shape=shape)
            return Pixels(array, tuple(told["left_out"]), self.path)
        return None

    @contextmanager
    def only_one(self) -> Iterator[None]:
        """One process at a time is within, where the file system can see to it: the others then find its file."""
        lock = self.path.with_suffix(".lock")
        try:
            import fcntl

            self._folder.mkdir(parents=True, exist_ok=True)
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except (OSError, ImportError):
            yield
            return
        try:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(file)

    def reserve(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        """Room for the pixels in a file that is not the cache's yet. Raises OSError where there is none."""
        self._folder.mkdir(parents=True, exist_ok=True)
        size = int(np.prod(shape))
        with self._part.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # else a full disk kills who writes to a mapped page
            file.truncate(size)
        return np.memmap(self._part, np.uint8, "r+", shape=shape)

    def keep(self, array: np.ndarray[Any, Any], left_out: tuple[int, ...]) -> Pixels:
        """Gives a file its name that has these pixels, [N, C, H, W], at its beginning. Raises OSError if it cannot.

        `array` is what `reserve` gave, or the first N of it, or any other in memory. Files of the same request whose
        pictures have changed go.
        """
        try:
            if isinstance(array, np.memmap):
                array.flush()
                with self._part.open("r+b") as file:
                    file.truncate(array.nbytes)
            else:
                self._folder.mkdir(parents=True, exist_ok=True)
                array.tofile(self._part)
            told = json.dumps({"request": self._request, "shape": array.shape, "left_out": left_out}).encode()
            with self._part.open("ab") as file:
                file.write(told + len(told).to_bytes(LENGTH, "little"))
            put_in_place(self._part, self.path)
        except OSError:
            self.discard()
            raise
        for other in self._folder.glob(f"{self._stem}-*.pixels"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                if other != self.path and _told(other)["request"] == self._request:
                    other.unlink()
        found = self.find()
        if found is None:
            raise OSError(errno.EIO, "what was written cannot be read")
        return found

    def discard(self) -> None:
        """Removes what `reserve` made."""
        with suppress(OSError):
            self._part.unlink()

    @property
    def _part(self) -> Path:
        return self.path.with_suffix(f".{os.getpid()}.part")


def _told(path: Path) -> dict[str, Any]:
    """The description at a file's end. Raises OSError or ValueError where the file is not whole."""
    with path.open("rb") as file:
        end = file.seek(-LENGTH, os.SEEK_END)
        length = int.from_bytes(file.read(LENGTH), "little")
        if length > end:
            raise ValueError(f"{path} is no file of pixels")
        file.seek(end - length)
        told: dict[str, Any] = json.loads(file.read(length))
    if int(np.prod(told["shape"])) + length != end:
        raise ValueError(f"{path} is not whole")
    return told
