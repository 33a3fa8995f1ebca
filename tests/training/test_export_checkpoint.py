from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.config import UNetConfig
from model.sampling.fitted import FittedTable, weights_digest
from model.sampling.schedule import FITTED, SamplingParams, make_schedule
from tests.networks import randomised
from training import export_checkpoint
from training.run import load_weights
from training.run.config import TrainConfig
from training.train import train

UNET = UNetConfig(
    image_channels=1,
    image_size=(8, 8),
    base_channels=4,
    channel_mults=(1,),
    attention_levels=(),
    num_classes=2,
    null_class=True,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.safetensors"
    config = CheckpointConfig(
        UNET,
        DiffusionConfig(),
        ("a", "b"),
        SamplingParams("ddim", 7, guidance_scale=2.0),
        {"notes": "old", "seed": 3},
    )
    checkpoint.save(path, randomised(UNET).state_dict(), config)
    return path


def test_everything_but_what_is_said_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert export_checkpoint.main([str(source), str(out), "--steps", "9", "--guidance_scale", "1.5"]) == 0
    before, after = checkpoint.load(source), checkpoint.load(out)
    sampling = SamplingParams("ddim", 9, guidance_scale=1.5)
    assert after.config == replace(before.config, sampling=sampling)
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(after.network.state_dict()[name], tensor)


def test_half_is_rounded_to_bfloat16_and_half_as_large(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert export_checkpoint.main([str(source), str(out), "--half", "--notes", "rounded"]) == 0
    before, after = checkpoint.load(source), checkpoint.load(out)
    assert after.config == replace(before.config, provenance={"notes": "rounded", "seed": 3})
    for name, tensor in before.network.state_dict().items():
        assert torch.equal(after.network.state_dict()[name], tensor.to(torch.bfloat16).float())
    assert source.stat().st_size - out.stat().st_size > 2 * sum(p.numel() for p in before.network.parameters()) - 100


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 0", "--steps must be between 1 and 1000"),
        ("--eta 0.5 --sampler ddpm", "--eta belongs to the ddim sampler"),
        ("nowhere/out.safetensors", "there is no folder"),
        ("out.pth", "ends with .safetensors"),
        ("missing", "neither a file nor bundled"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence(
    source: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(source), str(tmp_path / "out.safetensors")]
    if words == "missing":
        paths[0], words = "missing", ""
    elif not words.startswith("--"):
        paths[1], words = str(tmp_path / words), ""
    assert export_checkpoint.main([*paths, *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


@pytest.mark.slow
def test_an_average_is_chosen_by_its_name(tiny_options: dict[str, Any], tmp_path: Path) -> None:
    run, out = train(TrainConfig(**tiny_options | {"ema_power": (0.1,)})), tmp_path / "out.safetensors"
    assert export_checkpoint.main([str(run), str(out), "--weights", "power-0.1"]) == 0
    published = checkpoint.load(out)
    average = torch.load(run / "state-0000008.pt", weights_only=True)["ema"]["averages"]["power-0.1"]
    for name, tensor in published.network.state_dict().items():
        assert torch.equal(tensor, average[name])
    assert published.config.provenance["weights"] == "ema power-0.1"
    assert load_weights.load(str(out), "ema", {}, torch.device("cpu"))[1] == "ema power-0.1"


def fitted(path: Path, weights: dict[str, torch.Tensor], config: CheckpointConfig) -> CheckpointConfig:
    """Saves it with a table of two steps as its default."""
    schedule = make_schedule(GaussianDiffusion(config.diffusion), "ddim", 2)
    timesteps, rows = tuple(map(float, schedule.timesteps)), tuple(map(tuple, schedule.table.tolist()))
    table = FittedTable(2, 1.0, (0.0, 1.0), "clamp", timesteps, rows, (1, 2), weights_digest(weights))
    config = replace(config, sampling=SamplingParams(FITTED, 2), fitted=(table,))
    checkpoint.save(path, weights, config)
    return config


@pytest.mark.parametrize("how", [["--half"], []])
def test_fitted_tables_go_with_the_weights(
    source: Path, tmp_path: Path, how: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, before = tmp_path / "out.safetensors", checkpoint.load(source)
    config = fitted(source, before.network.state_dict(), before.config)
    assert export_checkpoint.main([str(source), str(out), *how]) == 0
    assert capsys.readouterr().out.endswith(", 1 fitted tables kept\n")
    after = checkpoint.load(out).config
    assert (after.sampling, after.fitted[0].rows) == (config.sampling, config.fitted[0].rows)
    assert (after.fitted[0].weights == config.fitted[0].weights) == (not how), "which are rounded"


def test_tables_of_other_weights_are_left_out_and_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out, served = tmp_path / "run", tmp_path / "out.safetensors", checkpoint.load(source)
    run.mkdir()
    fitted(run / "best.safetensors", served.network.state_dict(), served.config)
    torch.save({"network": randomised(UNET, seed=1).state_dict(), "iteration": 1}, run / "state-0000001.pt")
    assert export_checkpoint.main([str(run), str(out), "--weights", "raw"]) == 0
    said = capsys.readouterr()
    assert said.err == "state-0000001.pt: fitted tables are of other weights: they are left out\n"
    after = checkpoint.load(out).config
    assert (after.fitted, after.sampling.sampler, after.sampling.steps) == ((), "dpmpp_2m", 20)
