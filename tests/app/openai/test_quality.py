"""Which plan a quality is: with fitted tables, and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.openai.quality import level_of, plan
from app.openai.schemas import GenerationsBody
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.distilled import Distilled
from model.sampling.schedule import SamplingParams
from tests.app.conftest import CLASSES, GREY
from tests.model.sampling.test_fitted import table_like

PLAIN = CheckpointConfig(GREY, DiffusionConfig(prediction="v"), CLASSES, SamplingParams("ddim", 6), {})
TABLES = tuple(table_like(GREY, "none", steps) for steps in (4, 8))
STUDENT = replace(PLAIN, distilled=Distilled(1.0, 6, "sfd", "ab" * 32))
FITTED = replace(PLAIN, sampling=SamplingParams("fitted", 8, 0.0, 2.5), fitted=TABLES)


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        (PLAIN, {"quality": "low"}, {"sampler": "ddim", "steps": 3}),
        (PLAIN, {"quality": "medium"}, {}),
        (PLAIN, {"quality": "hd"}, {"sampler": "ddim", "steps": 12}),
        (PLAIN, {"quality": "high", "sampler": "dpmpp_2m"}, {"sampler": "dpmpp_2m", "steps": 40}),
        (PLAIN, {"quality": "high", "sampler": "ddpm"}, {"sampler": "ddpm", "steps": 300}),
        (PLAIN, {}, {}),
        (FITTED, {"quality": "low"}, {"sampler": "fitted", "steps": 4, "guidance_scale": 2.5}),
        (FITTED, {"quality": "medium"}, {"sampler": "fitted", "steps": 8, "guidance_scale": 2.5}),
        (FITTED, {"quality": "auto"}, {}),
        (FITTED, {"quality": "high"}, {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 2.5}),
        (FITTED, {"quality": "high", "sampler": "fitted"}, {}),
        (FITTED, {"quality": "low", "guidance_scale": 7.0}, {"sampler": "dpmpp_2m", "steps": 10}),
        (STUDENT, {"quality": "low"}, {}),
        (STUDENT, {"quality": "high"}, {}),
        (FITTED, {"quality": "low", "sampler": "ddim"}, {"sampler": "ddim", "steps": 25}),
    ],
)
def test_quality_is_a_sampler_and_steps(
    config: CheckpointConfig, asked: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert plan(GenerationsBody(prompt="", **asked), config, max_steps=300) == expected


@pytest.mark.parametrize(
    ("asked", "level"),
    [({}, "medium"), ({"quality": "standard"}, "medium"), ({"quality": "hd"}, "high"), ({"steps": 3}, None)],
)
def test_the_level_is_low_medium_or_high(asked: dict[str, Any], level: str | None) -> None:
    assert level_of(GenerationsBody(prompt="", **asked)) == level
