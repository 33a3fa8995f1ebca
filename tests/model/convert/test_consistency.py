"""Consistency models give openai/consistency_models' own images in one and two steps, and what they denoise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline
from torch import Tensor

from model import checkpoint
from model.checkpoint import Checkpoint
from model.convert.conversion import config_of
from model.convert.exporter import export
from model.convert.exporter import main as export_main
from model.convert.importer import import_path, main
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import COEFFICIENTS, InvalidSamplingParams, SamplingParams, make_schedule
from model.sampling.step import sample
from model.sigmas import Sigmas
from tests.fixtures import expected, theirs
from tests.model.convert.test_edm import relative_error

FILE = "consistency/small.pt"
FLAGS: dict[str, Any] = {"head_channels": 16, "image_size": (8, 8), "prediction": "consistency"}
WORDS = ["--head_channels", "16", "--image_size", "8,8", "--prediction", "consistency"]
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
    assert main([str(theirs(FILE)), str(path), *WORDS]) == 0
    assert "prediction consistency, x0 clamped to ±1 (their KarrasDenoiser)" in capsys.readouterr().err
    config = checkpoint.load(path).config
    assert config.diffusion == imported().diffusion
    assert (config.sampling.sampler, config.sampling.steps) == ("consistency", 1)
    assert config.sampling_params(steps=2).steps == 2


def test_diffusers_gets_it_and_gives_it_back(tmp_path: Path) -> None:
    main([str(theirs(FILE)), str(tmp_path / "mine.safetensors"), *WORDS])
    assert export_main([str(tmp_path / "mine.safetensors"), str(tmp_path / "folder")]) == 0
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "folder")
    pipeline.set_progress_bar_config(disable=True)
    noise = normals([5, 5], [0, 1], [0, 0], (3, 8, 8))
    images = pipeline(2, LABELS, num_inference_steps=1, latents=noise, output_type="np").images
    made = 2 * torch.from_numpy(images).permute(0, 3, 1, 2) - 1
    assert relative_error(made, theirs_out("steps_1")) <= 1e-5
    back, here = import_path(tmp_path / "folder", Flags()), imported()
    assert (back.diffusion, back.limit, back.sampling) == (here.diffusion, here.limit, here.sampling)
    assert all(torch.equal(back.weights[name], tensor) for name, tensor in here.weights.items())


def test_its_own_levels_go_out_and_come_back(tmp_path: Path) -> None:
    own = replace(imported().diffusion, sigmas=Sigmas(0.01, 40.0, 5.0, 0.6, 1000.0))
    found = replace(imported(), diffusion=own, limit="none")
    export(Checkpoint("it", "", config_of(found, Flags(), "x"), network_of(found)), tmp_path)
    back = import_path(tmp_path, Flags())
    assert (back.diffusion, back.limit) == (own, "none")


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"s_noise": 1.1}, "its scheduler's s_noise is 1.1"),
        ({"sigma_max": -1}, "its scheduler's sigma_max is -1"),
        ({"clip_denoised": "yes"}, "its scheduler's clip_denoised is 'yes'"),
        ({"sigma_min": 100}, "sigmas are out of range"),
    ],
)
def test_a_scheduler_that_makes_no_sense_is_refused(fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    export(Checkpoint("it", "", config_of(found := imported(), Flags(), "x"), network_of(found)), tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(UnsupportedCheckpointError, match=why):
        import_path(tmp_path, Flags())


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
