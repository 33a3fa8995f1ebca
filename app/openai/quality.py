"""OpenAI's `quality` as a number of steps."""

from __future__ import annotations

from app.openai.schemas import ImagesRequest
from model.sampling.schedule import SamplingParams

LEVELS = {"auto": "medium", "standard": "medium", "hd": "high"}
FACTORS = {"low": 0.5, "medium": 1.0, "high": 2.0}
"""Of the steps of a sampler: fast, balanced, exact."""


def level_of(body: ImagesRequest) -> str | None:
    """low, medium or high; None where the request chose the steps itself."""
    if body.sampler_settings["steps"] is not None:
        return None
    quality = body.quality or "auto"
    return LEVELS.get(quality, quality)


def steps_of(body: ImagesRequest, sampling: SamplingParams, most: int) -> int:
    """How many steps a request wants of its sampler, whose own number `sampling` has; at most `most` by quality."""
    level = level_of(body)
    if level is None or FACTORS[level] == 1:
        return sampling.steps
    return max(1, min(round(FACTORS[level] * sampling.steps), most))
