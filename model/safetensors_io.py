"""Writes safetensors files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Atomically: a reader sees the old file or the new. Raises OSError, on a full disk too."""
    part = path.with_name(path.name + ".part")
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        part.touch()
        mode = part.stat().st_mode  # what the umask says; safetensors lets nobody but the owner read
        save_file(on_host, part, metadata)
        part.chmod(mode)
        os.replace(part, path)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)
