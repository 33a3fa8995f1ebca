"""Consistency models give openai/consistency_models' own images in one and two steps, and what they denoise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.convert.importer import import_path, main
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import COEFFICIENTS, InvalidSamplingParams, SamplingParams, make_schedule
from model.sampling.step import sample
from tests.fixtures import expected, theirs
from tests.model.convert.test_edm import relative_error

FILE = "consistency/small.pt"
FLAGS: dict[str, Any] = {"head_channels": 16, "image_size": (8, 8), "prediction": "consistency"}
LABELS = [1, 4]


def imported(**flags: Any) -> Imported:
    return import_path(theirs(FILE), Flags(**FLAGS | flags))


def network_of(found: Imported) -> UNet:
    assert isinstance(found.unet, UNetConfig)
    network = UNet(found.unet).eval().requires_grad_(False)
    network.load_state_dict(found.weights)
    return network


def theirs_out(name: str) -> Tensor:
    return torch.from_numpy(expected(FILE)[name])


def x0_errors(prediction: str) -> list[float]:
    """At two levels of noise, of a consistency model or of what it is made from."""
    errors = []
    found = imported(prediction=prediction)
    sigmas, network = found.diffusion.sigmas, network_of(found)
    assert sigmas is not None
    noise, x0 = normals([5, 5], [0, 1], [0, 0], (3, 8, 8)), theirs_out(f"{prediction}_x0")
    for i, sigma in enumerate(expected(FILE)["sigma"].astype(np.float64)):
        p, q = sigmas.x0_coefficients(sigma, prediction == "consistency")
        state = noise[i : i + 1] * float(sigma / np.hypot(sigma, 0.5))
        t = torch.tensor([float(sigmas.timesteps(sigma))])
        ours = p * state - q * network(state, t, torch.tensor(LABELS[i : i + 1]))
        errors.append(relative_error(ours[0], x0[i]))
    return errors


def image_error(steps: int) -> float:
    """Of the images of one or two steps, from the same noise."""
    found = imported()
    schedule = make_schedule(GaussianDiffusion(found.diffusion), "consistency", steps)
    ours = sample(network_of(found), schedule, (3, 8, 8), [5, 5], [0, 1], LABELS)
    return relative_error(ours, theirs_out(f"steps_{steps}"))


@pytest.mark.parametrize("prediction", ["consistency", "edm"])
def test_what_they_denoise_is_reproduced(prediction: str) -> None:
    assert max(x0_errors(prediction)) <= 1e-5


@pytest.mark.parametrize("steps", [1, 2])
def test_their_images_are_reproduced(steps: int) -> None:
    assert image_error(steps) <= 1e-5


def test_levels_between_are_halves_of_the_ramp() -> None:
    schedule = make_schedule(GaussianDiffusion(imported().diffusion), "consistency", 2)
    halfway = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert schedule.timesteps == pytest.approx([250 * np.log(80), 250 * np.log(halfway)])
    s = schedule.table[:, COEFFICIENTS.index("s")]
    assert s == pytest.approx([np.sqrt((halfway**2 - 0.002**2) / (halfway**2 + 0.25)), 0])


def test_no_other_sampler_belongs_to_them() -> None:
    models, others = GaussianDiffusion(imported().diffusion), GaussianDiffusion(DiffusionConfig())
    with pytest.raises(InvalidSamplingParams, match="sampler must be consistency, not ddim"):
        make_schedule(models, "ddim", 2)
    with pytest.raises(InvalidSamplingParams, match="sampler belongs to consistency models"):
        make_schedule(others, "consistency", 2)
    assert SamplingParams().with_overrides(1000, sampler="consistency").steps == 1


def test_a_checkpoint_of_one_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.safetensors"
    flags = ["--head_channels", "16", "--image_size", "8,8", "--prediction", "consistency"]
    assert main([str(theirs(FILE)), str(path), *flags]) == 0
    assert "prediction consistency, x0 clamped to ±1 (their KarrasDenoiser)" in capsys.readouterr().err
    config = checkpoint.load(path).config
    assert config.diffusion == imported().diffusion
    assert (config.sampling.sampler, config.sampling.steps) == ("consistency", 1)
    assert config.sampling_params(steps=2).steps == 2


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"prediction": None}, "add --prediction consistency"),
        ({"image_size": None}, "add --image_size 64,64"),
        ({"head_channels": None}, "add --head_channels 64"),
        ({"num_heads": 2}, "leave out --num_heads"),
        ({"prediction": "eps"}, "prediction must be one of edm, consistency"),
        ({"schedule": "linear"}, "--schedule linear contradicts the file, which has karras"),
        ({"time_scale": 1.0}, "--time_scale means nothing for levels of noise"),
        ({"new_attention_order": True}, "--new_attention_order means nothing"),
    ],
)
def test_flags_that_are_missing_or_wrong_are_told(flags: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedCheckpointError) as refused:
        imported(**flags)
    assert why in str(refused.value)
