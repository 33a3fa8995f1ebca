"""Fast, balanced and exact: what to ask a checkpoint with fitted tables for, by name."""

from __future__ import annotations

from typing import Any

from model.checkpoint import SOLVER, CheckpointConfig
from model.sampling.fitted import FITTED_TO
from model.sampling.schedule import FITTED


def plans(config: CheckpointConfig, max_steps: int) -> dict[str, dict[str, Any]]:
    """What to ask for, by name: the fewest and the most fitted steps, and what they were fitted to come near to.

    Empty where there are no fitted tables, or of a student. `nfe` is the network rows of an image.
    """
    if config.distilled or not any(table.steps <= max_steps for table in config.fitted):
        return {}
    usual = config.sampling_params(max_steps, sampler=FITTED)
    fitted_to = {name: getattr(usual, name) for name in FITTED_TO}
    tables = [table for table in config.fitted if table.fitted_to == fitted_to and table.steps <= max_steps]
    tables.sort(key=lambda table: table.nfe)
    found = [config.sampling_params(sampler=FITTED, steps=table.steps) for table in tables[:1] + tables[1:][-1:]]
    names = ("fast", "balanced")[: len(found)]
    exact = config.sampling_params(max_steps, sampler=SOLVER, guidance_scale=usual.guidance_scale)
    chosen = dict(zip(names, found, strict=True)) | {"exact": exact}
    return {
        name: {
            **{setting: getattr(params, setting) for setting in ("sampler", "steps", "guidance_scale")},
            "nfe": int(config.schedule(params).nfe.sum()),
        }
        for name, params in chosen.items()
    }
