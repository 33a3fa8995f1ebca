"""OpenAI's `quality` as a plan: a sampler and its steps."""

from __future__ import annotations

from typing import Any

from app.openai.schemas import ImagesRequest
from app.plans import plans
from model.checkpoint import SOLVER, CheckpointConfig
from model.sampling.schedule import FITTED, InvalidSamplingParams

LEVELS = {"auto": "medium", "standard": "medium", "hd": "high"}
PLANS = {"low": "fast", "medium": "balanced", "high": "exact"}
"""Of `app.plans`, where the checkpoint has them and the request leaves the sampler open."""
FACTORS = {"low": 0.5, "high": 2.0}
"""Of a sampler's steps, everywhere else."""


def level_of(body: ImagesRequest) -> str | None:
    """low, medium or high; None where the request chose the steps itself."""
    if body.sampler_settings["steps"] is not None:
        return None
    quality = body.quality or "auto"
    return LEVELS.get(quality, quality)


def plan(body: ImagesRequest, config: CheckpointConfig, max_steps: int) -> dict[str, Any]:
    """Sampler and steps, where the quality decides on them.

    Where the checkpoint has plans and the request no settings of its own, they are fast, balanced and exact. Else low
    is the shortest fitted table that there is for the other settings, or half of the sampler's steps; high is twice the
    steps, and no fitted table unless the request names them. Without a quality, and for a student with steps of its
    own, it is the checkpoint's choice. Raises InvalidSamplingParams.
    """
    level, settings = level_of(body), body.sampler_settings
    if body.quality in (None, "auto") or level is None or (config.distilled and config.distilled.has_fixed_steps):
        return {}
    named = plans(config, max_steps)
    if named and all(value is None for value in settings.values()):
        chosen = named.get(PLANS[level], named["exact"])
        return {setting: chosen[setting] for setting in ("sampler", "steps", "guidance_scale")}
    if level not in FACTORS:
        return {}
    params = config.sampling_params(max_steps, **settings)
    if level == "low" and settings["sampler"] in (None, FITTED):
        for steps in sorted({table.steps for table in config.fitted}):
            try:
                config.sampling_params(max_steps, **settings | {"sampler": FITTED, "steps": steps})
            except InvalidSamplingParams:
                continue
            return {"sampler": FITTED, "steps": steps}
    if params.sampler == FITTED:
        if settings["sampler"] == FITTED:
            return {}
        params = config.sampling_params(max_steps, **settings | {"sampler": SOLVER})
    most = min(max_steps, config.diffusion.num_timesteps)
    return {"sampler": params.sampler, "steps": max(1, min(round(FACTORS[level] * params.steps), most))}
