"""Writes safetensors files, says what tensors they are, and reads them where somebody may write meanwhile."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.atomic_write import atomic_write


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically: a reader sees the old file or the new. Raises OSError, on a full disk too."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as part:
        try:
            save_file(on_host, part, metadata)
        except SafetensorError as error:  # its word for a full disk
            raise OSError(f"cannot write {path}: {error}") from error


def hash_tensors(digest: Any, tensors: Mapping[str, Tensor]) -> None:
    """Feeds a hashlib digest with the tensors by name: of each [name, type, shape] as JSON, then its bytes."""
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, kind, list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


@contextmanager
def private_copy(path: Path) -> Iterator[tuple[Path, str]]:
    """Where to read what is in the file now, and its SHA-256 in hexadecimal.

    A mapped file that `cp` cuts while it is read ends the process (SIGBUS), so the copy is in memory, where nobody can
    cut it. Where the system has no such copies it is the file itself. Raises OSError.
    """
    with path.open("rb") as content:
        if not hasattr(os, "memfd_create"):
            yield path, hashlib.file_digest(content, "sha256").hexdigest()
            return
        with open(os.memfd_create("checkpoint"), "w+b") as copy:
            shutil.copyfileobj(content, copy, 1 << 20)
            copy.seek(0)
            yield Path(f"/proc/self/fd/{copy.fileno()}"), hashlib.file_digest(copy, "sha256").hexdigest()


def not_data(path: Path) -> str | None:
    """What `path` is instead of a file with data in it, as the end of "it is …", and what to do; None for any file."""
    if path.is_dir():
        return "a folder, not a file"
    if not path.is_file():
        return "not a file" if path.exists() else "not there"
    try:
        with path.open("rb") as content:
            start = content.read(512)
    except OSError as error:
        return f"not readable: {(error.strerror or 'no reason is known').lower()}"
    if not start:
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file that it stands for: fetch that with `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not a file of weights: download it again"
    return None
