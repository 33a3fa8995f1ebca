"""Which source made a result, on which machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from training.loop.distributed import DistributedContext


def git_revision() -> str | None:
    """The commit of this source tree, "+" behind it where files differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine(device: torch.device, ranks: DistributedContext) -> str:
    """For provenance."""
    devices = f"{ranks.size} × {device.type}" if ranks.size > 1 else device.type
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        devices += ", TF32"
    return f"{devices}, {os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"
