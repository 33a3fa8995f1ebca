from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.distilled import Distilled
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.fitted import FittedTable, weights_digest
from model.sampling.schedule import SamplingParams, make_schedule
from training import model_card

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
        UNET, DiffusionConfig(), ("left", "right"), SamplingParams("ddim", 2), provenance=PROVENANCE
    )
    path = tmp_path / "blobs.safetensors"
    checkpoint.save(path, UNet(UNET).state_dict(), config)
    return path


def test_a_card_has_provenance_and_samples(file: Path) -> None:
    assert model_card.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    for fact in (checkpoint.load(file).sha256, "left, right", PROVENANCE["command"], "0.25000", "Stopped once.", "56"):
        assert str(fact) in text
    assert "{" not in text
    with Image.open(file.with_suffix(".png")) as picture:
        assert picture.size == (8 * 8, 2 * 8)


def test_the_card_of_a_checkpoint_from_before_the_first_loss_has_no_line_of_it(file: Path) -> None:
    loaded = checkpoint.load(file)
    provenance = PROVENANCE | {"metrics": {"train_loss": None, "validation_loss": 0.25}}
    checkpoint.save(file, loaded.network.state_dict(), replace(loaded.config, provenance=provenance))
    assert model_card.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    assert "| validation loss | 0.25000 " in text
    assert "training loss" not in text


def test_the_card_of_a_student_names_its_teacher(file: Path) -> None:
    loaded = checkpoint.load(file)
    told = {
        "teacher": {"name": "big", "sha256": "ab" * 32},
        "metrics": {"train_loss": 0.5, "distance_to_teacher": 0.125},
    }
    inside = Distilled(1.0, 2, "guidance", "ab" * 32)
    config = replace(loaded.config, distilled=inside, provenance=PROVENANCE | told)
    checkpoint.save(file, loaded.network.state_dict(), config)
    assert model_card.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    assert f"| distilled from | `big`, SHA-256 `{'ab' * 32}`, by method guidance |" in text
    assert "| distance to its teacher | 0.12500 " in text
    assert "| inside its weights | guidance_scale 1, " in text
    assert checkpoint.load(file).sha256 in text
    assert "validation" not in text
    checkpoint.save(file, loaded.network.state_dict(), replace(config, distilled=None))
    assert model_card.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    assert "by method end_to_end |\n| anchored |" in text
    assert "inside its weights" not in text


def evaluation(file: Path, **changes: object) -> dict[str, Any]:
    numbers = {"accuracy": 0.5, "frechet_distance": 1.25, "precision": 0.75, "recall": 0.125}
    sampling = {"sampler": "ddim", "steps": 2, "guidance_scale": 1.0, "weights": "ema", "seed": 0, "precision": "fp32"}
    return {
        "command": "python -m training.evaluate",
        "checkpoint": {"sha256": checkpoint.load(file).sha256},
        "features": {"sha256": "f" * 64, "accuracy": 0.99},
        "sampling": sampling,
        "num_images": 2000,
        "compared_images": 1500,
        "generated": numbers | {"frechet_distance": 2.5},
        "test": numbers,
        **changes,
    }


def test_a_card_shows_what_an_evaluation_found(file: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(evaluation(file)))
    assert model_card.main([str(file), "--evaluation", str(tmp_path / "a.json")]) == 0
    text = file.with_suffix(".md").read_text()
    assert "| 50.00% | 50.00% |" in text
    assert "| Fréchet distance | 2.5000 | 1.2500 |" in text
    assert "compare 1,500 samples, and as many held-out images" in text
    assert "By sampler" not in text


def test_a_card_has_bits_per_dimension_and_neighbours(file: Path, tmp_path: Path) -> None:
    row = {"minimum": 1.5, "1_percent": 2.0, "5_percent": 3.0, "median": 4.0}
    space = {"generated": row, "held_out": row | {"median": 5.0, "minimum": 1.25}, "ratio": 0.8}
    space |= {"nearer_than_1_percent": 0.0125, "nearer_than_5_percent": 0.05}
    bits = {"bits_per_dim": 1.23456, "standard_error": 0.01, "images": 300, "prior": 0.0, "decoder": 0.1}
    nearest = {"images": 500, "train_images": 6000, "pixels": space, "features": space}
    found = evaluation(file, bits_per_dim=bits, neighbours=nearest)
    (tmp_path / "a.json").write_text(json.dumps(found))
    assert model_card.main([str(file), "--evaluation", str(tmp_path / "a.json")]) == 0
    assert "neighbours.png" not in file.with_suffix(".md").read_text()
    (tmp_path / "a-neighbours.png").write_bytes(b"a picture")
    assert model_card.main([str(file), "--evaluation", str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "blobs-neighbours.png").read_bytes() == b"a picture"
    text = file.with_suffix(".md").read_text()
    assert "(blobs-neighbours.png)" in text
    assert "1.2346 ± 0.0100 bits per dimension on 300 held-out images" in text
    assert "500 samples are from the nearest of 6,000 training images" in text
    for name in ("pixels", "features"):
        assert f"| {name} | 4 | 5 | 0.8 | 1.5 | 1.25 | 1.25% |" in text
    assert "not tested" not in text
    assert "{" not in text
    assert "memorised was not tested" in model_card.card(checkpoint.load(file), file)
    alone = model_card.evaluation_text([evaluation(file)], checkpoint.load(file))
    assert "bits per dimension" not in alone
    assert "nearest of" not in alone


def test_a_card_lists_the_classes_one_by_one_if_they_are_few(file: Path) -> None:
    loaded = checkpoint.load(file)

    def text(by_class: dict[str, float]) -> str:
        generated = evaluation(file)["generated"] | {"accuracy_by_class": by_class}
        return model_card.evaluation_text([evaluation(file, generated=generated)], loaded)

    assert "\nClassified as asked, by class: cat 12.5%, frog 100.0%.\n" in text({"cat": 0.125, "frog": 1.0})
    assert "by class" not in text({str(i): 0.5 for i in range(21)})


def test_several_evaluations_make_a_table_with_a_row_for_each(file: Path, tmp_path: Path) -> None:
    other = evaluation(file)
    other["sampling"] = {**other["sampling"], "sampler": "ddpm", "steps": 1000, "weights": "raw"}
    other["checkpoint"] = {"name": "state-0000007", "sha256": "1" * 64}
    for name, result in (("a.json", evaluation(file)), ("b.json", other)):
        (tmp_path / name).write_text(json.dumps(result))
    assert model_card.main([str(file), "--evaluation", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    text = file.with_suffix(".md").read_text()
    assert "| ddim | 2 | 1.0 | ema | 2,000 | 50.00% | 2.5000 | 1.2500 | 2.0 | 0.750 | 0.125 |" in text
    assert "| ddpm | 1000 | 1.0 | raw | 2,000 |" in text


def test_evaluations_that_do_not_belong_are_refused(file: Path) -> None:
    loaded = checkpoint.load(file)
    with pytest.raises(ValueError, match="another checkpoint"):
        model_card.evaluation_text([evaluation(file), evaluation(file, checkpoint={"sha256": "0" * 64})], loaded)
    raw = evaluation(file)["sampling"] | {"weights": "raw"}
    with pytest.raises(ValueError, match="another checkpoint"):
        model_card.evaluation_text([evaluation(file, sampling=raw, checkpoint={"name": "state-0000008"})], loaded)
    of_state = evaluation(file, sampling=raw, checkpoint={"name": "state-0000007", "sha256": "1" * 64})
    with pytest.raises(ValueError, match="the first evaluation is of the weights raw, where the checkpoint has ema"):
        model_card.evaluation_text([of_state, evaluation(file)], loaded)
    with pytest.raises(ValueError, match="different classifiers"):
        model_card.evaluation_text([evaluation(file), evaluation(file, features={"sha256": "e" * 64})], loaded)
    with pytest.raises(ValueError, match="not by a classifier"):
        model_card.evaluation_text([evaluation(file, generated={"frechet_distance": 1.0})], loaded)


def test_a_card_of_a_checkpoint_without_provenance_is_refused(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(checkpoint.load(file).config, provenance={})
    torch.manual_seed(0)
    checkpoint.save(file, UNet(UNET).state_dict(), config)
    assert model_card.main([str(file)]) == 2
    assert "not made by training.train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("raw", "The weights are the last of the training, not an average."),
        ("ema power-0.1", "The weights are the moving average power-0.1 (EMA)."),
    ],
)
def test_a_card_tells_other_weights_and_no_loss_of_the_first_average(weights: str, words: str, file: Path) -> None:
    source = checkpoint.load(file)
    told = source.config.provenance | {"weights": weights, "metrics": {"train_loss": 0.5}}
    checkpoint.save(file, source.network.state_dict(), replace(source.config, provenance=told))
    assert model_card.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    assert words in text
    assert "validation loss" not in text
    assert "| training loss | 0.50000 (mean since the last line of the log) |\n| trained on |" in text


def test_a_card_lists_fitted_tables_with_their_cost(file: Path) -> None:
    source = checkpoint.load(file)
    weights, steps = source.network.state_dict(), 3
    schedule = make_schedule(source.diffusion, "dpmpp_2m", steps)
    told = {
        "teacher": "dpmpp_2m, 20 steps",
        "distance_before": 0.5,
        "distance_after": 0.25,
        "command": "ddpm-serve fit",
    }
    settings = (steps, 1.0, (0.0, 1.0), "clamp", schedule.timesteps.tolist(), schedule.table.tolist(), [0] * steps)
    table = FittedTable(*settings, weights_digest(weights), told)
    checkpoint.save(file, weights, replace(source.config, fitted=(table,)))
    assert model_card.main([str(file)]) == 0
    text = file.with_suffix(".md").read_text()
    assert "| 3 | 3 | dpmpp_2m, 20 steps | 0.5000 | 0.2500 |\n" in text
    assert "    ddpm-serve fit\n" in text
    checkpoint.save(file, weights, replace(source.config, fitted=(replace(table, provenance={}),)))
    assert model_card.main([str(file)]) == 0
    assert "fitted to" not in file.with_suffix(".md").read_text()
