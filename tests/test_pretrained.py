"""The checkpoints that ship: each served by its name, with a card that is about this very file."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from model import checkpoint
from model.checkpoint import CHECKSUMS_FILE, PRETRAINED
from tests.app.processes import ServerProcess

NAMES = sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))
CLASS = {"cifar10": "horse", "cifar10-teacher": "horse", "mnist": "7", "mnist-fast": "7", "mnist-teacher": "7"}
LARGEST = 16_000_000  # bytes of a checkpoint
REPOSITORY = 60 * 2**20  # bytes of all tracked files


@pytest.mark.parametrize("name", NAMES)
def test_a_card_a_picture_and_a_checksum_lie_beside_it(name: str) -> None:
    loaded = checkpoint.load(name)
    card = (PRETRAINED / f"{name}.md").read_text()
    for fact in (loaded.sha256, loaded.config.provenance["command"], ", ".join(loaded.config.class_names)):
        assert fact in card
    assert f"{loaded.sha256}  {name}.safetensors" in (PRETRAINED / CHECKSUMS_FILE).read_text().splitlines()
    assert (PRETRAINED / f"{name}.safetensors").stat().st_size <= LARGEST
    with Image.open(PRETRAINED / f"{name}.png") as picture:
        assert picture.size[1] == len(loaded.config.class_names) * loaded.config.unet.image_size[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_is_served_by_its_name(name: str) -> None:
    unet = checkpoint.load(name).config.unet
    with ServerProcess("app", "--checkpoint", name, "--max-batch-size", "2") as server:
        inside = checkpoint.load(name).config.distilled
        steps = inside.steps if inside else 2
        answer = server.client.post("/generate", json={"class_label": CLASS[name], "n": 4, "steps": steps, "seed": 1})
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-DDPM-Class-Label"] == CLASS[name]
        picture = Image.open(io.BytesIO(answer.content))
        height, width = unet.image_size
        assert (picture.mode, picture.size) == ("L" if unet.image_channels == 1 else "RGB", (2 * width, 2 * height))


def test_the_repository_stays_small() -> None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True).stdout.split(b"\0")
    files = [root / name.decode() for name in names if name]
    assert sum(path.stat().st_size for path in files if path.is_file()) <= REPOSITORY
