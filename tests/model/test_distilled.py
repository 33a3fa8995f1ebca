"""A student's checkpoint: guidance is inside, a step is one network row, and what is not inside is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model import checkpoint
from model.checkpoint import CheckpointConfig, CheckpointError
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.distilled import Distilled
from model.nn.unet import UNet
from model.sampling.fitted import FittedTable, weights_digest
from model.sampling.schedule import FITTED, InvalidSamplingParams, SamplingParams, make_schedule

DIFFUSION = DiffusionConfig(schedule="cosine", prediction="v")
G = 2.5


@pytest.fixture
def student(tiny: UNet) -> CheckpointConfig:
    """Of three steps, as `training.distill` makes it."""
    schedule = make_schedule(GaussianDiffusion(DIFFUSION), "ddim", 3)
    timesteps, rows = tuple(map(float, schedule.timesteps)), tuple(map(tuple, schedule.table.tolist()))
    weights = weights_digest(tiny.state_dict())
    table = FittedTable(3, G, (0.0, 1.0), "clamp", timesteps, rows, (1, 2, 3), weights)
    sampling = SamplingParams(FITTED, 3, 0.0, G)
    inside = Distilled(G, 3, "sfd", "ab" * 32)
    return CheckpointConfig(tiny.config, DIFFUSION, ("a", "b", "c"), sampling, fitted=(table,), distilled=inside)


@pytest.fixture
def any_steps(student: CheckpointConfig) -> CheckpointConfig:
    """One of --method guidance, which every sampler runs."""
    sampling = SamplingParams("dpmpp_2m", 8, 0.0, G)
    return replace(student, sampling=sampling, fitted=(), distilled=Distilled(G, 8, "guidance", "ab" * 32))


def test_what_is_inside_comes_back(tiny: UNet, student: CheckpointConfig, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "student.safetensors", tiny.state_dict(), student)
    assert checkpoint.load(tmp_path / "student.safetensors").config == student
    assert "distilled" not in json.loads(replace(student, distilled=None).to_json())


def test_a_step_is_one_row(student: CheckpointConfig, any_steps: CheckpointConfig) -> None:
    for config, steps in ((student, 3), (any_steps, 8)):
        params = config.sampling_params()
        assert params.guidance_scale == G
        assert config.schedule(params).nfe.tolist() == [1] * steps
    assert any_steps.schedule(any_steps.sampling_params(sampler="ddim", steps=30)).nfe.sum() == 30


@pytest.mark.parametrize("given", [{}, {"guidance_scale": G}, {"steps": 3, "sampler": FITTED, "limit": "clamp"}])
def test_what_is_inside_may_be_asked_for(student: CheckpointConfig, given: dict[str, Any]) -> None:
    assert student.sampling_params(**given) == student.sampling


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"guidance_scale": 1.0}, "guidance_scale must be 2.5 or left out: it is inside the checkpoint's weights"),
        ({"guidance_scale": 4.0, "steps": 3}, "guidance_scale must be 2.5"),
        ({"guidance_interval": (0.2, 0.8)}, "guidance_interval must be 0,1 or left out"),
        ({"steps": 20}, "steps must be 3 or left out: the checkpoint was distilled to it"),
        ({"sampler": "ddim"}, "sampler must be fitted"),
        ({"limit": "none"}, "limit must be clamp"),
    ],
)
def test_what_is_not_inside_is_refused(student: CheckpointConfig, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSamplingParams, match=f"^{sentence}") as caught:
        student.sampling_params(**given)
    assert caught.value.field == sentence.split()[0]


def test_only_the_guidance_is_inside_one_of_all_timesteps(any_steps: CheckpointConfig) -> None:
    assert any_steps.sampling_params(sampler="ddim").steps == 50
    with pytest.raises(InvalidSamplingParams, match="guidance_scale must be"):
        any_steps.sampling_params(sampler="ddim", guidance_scale=1.0)


@pytest.mark.parametrize(
    "damage",
    [{"steps": "3"}, {"guidance_scale": None}, {"teacher": 7}, {"guidance_scale": 3.0}, {"steps": 99}, {"more": 1}],
)
def test_a_damaged_record_is_refused_in_a_sentence(
    tiny: UNet, student: CheckpointConfig, tmp_path: Path, damage: dict[str, Any]
) -> None:
    data = json.loads(student.to_json())
    data["distilled"] |= damage
    path = tmp_path / "damaged.safetensors"
    checkpoint.write_tensors(path, tiny.state_dict(), {"ddpm": json.dumps(data)})
    with pytest.raises(CheckpointError, match="configuration that cannot be used"):
        checkpoint.load(path)
