"""Writes the image's lock files: `python docker/lock.py [WHEELS]` resolves pyproject.toml's dependencies with uv.

    requirements.txt   everything but torch; the same in both images
    torch-cpu.txt      torch's CPU build, from PyTorch's CPU index, or from WHEELS, a folder or page with its wheel
    torch-cuda.txt     torch from PyPI with the CUDA libraries it brings

Every line has its hashes, so that nothing else can be installed, wherever it comes from. For Python 3.11 on Linux
x86-64.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCH = "2.13.0"  # the newest that pyproject.toml admits
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
HEAD = "# Made by docker/lock.py for Python 3.11 on Linux x86-64. Do not edit.\n"


def resolve(requirements: list[str], *options: str) -> dict[str, str]:
    """Package name → its requirement with hashes."""
    with tempfile.NamedTemporaryFile("w", suffix=".in") as file:
        file.write("\n".join(requirements))
        file.flush()
        command = ["uv", "pip", "compile", "-q", file.name, "--generate-hashes", "--no-annotate", "--no-header"]
        platform = ["--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"]
        done = subprocess.run([*command, *platform, *options], check=True, capture_output=True, text=True)
    blocks = re.findall(r"^[A-Za-z0-9].*(?:\n +.*)*", done.stdout, re.M)
    return {re.split(r"[=\[ ]", block)[0]: block for block in blocks}


def write(name: str, locked: dict[str, str]) -> None:
    (ROOT / "docker" / name).write_text(HEAD + "".join(f"{locked[key]}\n" for key in sorted(locked)))


def main(wheels: str | None) -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    others = [line for line in wanted if not line.startswith("torch")]
    source = ["--find-links", wheels] if wheels else ["--index", CPU_INDEX, "--index-strategy", "unsafe-best-match"]
    cpu = resolve([*others, f"torch=={TORCH}+cpu"], *source)
    torch_cpu = {"torch": cpu.pop("torch")}
    cuda = resolve([*others, f"torch=={TORCH}"])
    for name, requirement in cpu.items():
        if cuda.pop(name) != requirement:
            sys.exit(f"{name} differs between the CPU's and the GPU's image; constrain it in pyproject.toml")
    write("requirements.txt", cpu)
    write("torch-cpu.txt", torch_cpu)
    write("torch-cuda.txt", cuda)


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
