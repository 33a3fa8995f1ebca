from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.plan import SamplingDefaults
from model.unet import UNet, UNetConfig
from training import card

UNET = UNetConfig(
    image_channels=1, image_size=(8, 8), base_channels=4, channel_mults=(1,), attention_levels=(), num_classes=2
)
PROVENANCE = {
    "dataset": "blobs",
    "iterations": 7,
    "images_seen": 56,
    "metrics": {"train_loss": 0.5, "validation_loss": 0.25},
    "command": "python -m training.train --dataset blobs",
    "seed": 3,
    "git_revision": "abc",
    "machine": "a machine",
    "notes": "Stopped once.",
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    config = CheckpointConfig(
        UNET, DiffusionConfig(), ("left", "right"), SamplingDefaults("ddim", 2), provenance=PROVENANCE
    )
    path = tmp_path / "blobs.safetensors"
    checkpoint.save(path, UNet(UNET).state_dict(), config)
    return path


def test_a_card_says_where_the_checkpoint_comes_from_and_shows_samples(file: Path) -> None:
    assert card.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    for fact in (checkpoint.load(file).sha256, "left, right", PROVENANCE["command"], "0.25000", "Stopped once.", "56"):
        assert str(fact) in text
    assert "{" not in text
    with Image.open(file.with_suffix(".png")) as picture:
        assert picture.size == (8 * 8, 2 * 8)


def test_an_evaluation_of_another_checkpoint_is_refused(file: Path) -> None:
    numbers = {"accuracy": 0.5, "frechet_distance": 1.25, "precision": 0.75, "recall": 0.125}
    result = {
        "command": "python -m training.evaluate",
        "checkpoint": {"sha256": checkpoint.load(file).sha256},
        "features": {"sha256": "f" * 64, "accuracy": 0.99},
        "sampling": {"sampler": "ddim", "steps": 2, "guidance_scale": 1.0, "seed": 0, "precision": "fp32"},
        "num_images": 20,
        "generated": numbers,
        "test": numbers,
    }
    sha256 = checkpoint.load(file).sha256
    assert "| 50.00% | 50.00% |" in card.evaluation_table(result, sha256)
    with pytest.raises(ValueError, match="another checkpoint"):
        card.evaluation_table(result, "0" * 64)


def test_a_checkpoint_without_provenance_is_refused_with_a_sentence(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(checkpoint.load(file).config, provenance={})
    torch.manual_seed(0)
    checkpoint.save(file, UNet(UNET).state_dict(), config)
    assert card.main([str(file)]) == 2
    assert "not made by training.train" in capsys.readouterr().err
