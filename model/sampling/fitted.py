"""Fitted tables: sampling schedules that were learned for one checkpoint, and are kept in it.

`training.fit_sampler` makes them; `sampler: "fitted"` asks for one. A table is good for the weights, the guidance and
the limit that it was fitted to, and for nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from model.safetensors_io import hash_tensors
from model.sampling.schedule import (
    COEFFICIENTS,
    FITTED,
    THRESHOLDING,
    InvalidSamplingParams,
    SamplingParams,
    SamplingSchedule,
)

G = COEFFICIENTS.index("g")
LIMIT = COEFFICIENTS.index("limit")
FITTED_TO = ("guidance_scale", "guidance_interval", "limit")  # settings that a table has in it


class FittedTableError(ValueError):
    """The table cannot be used; the message says why."""


@dataclass(frozen=True)
class FittedTable:
    """One table of a checkpoint: how it is sampled in `steps` steps.

    `timesteps` [steps] are what the network is told; whole numbers where it has a table of them. `rows` [steps][10] are
    the `COEFFICIENTS` of each, `draws` [steps] the number of its noise (0 is x_T, drawn again). The guidance and its
    interval are the teacher's: the column g may act on fewer rows. `weights` is the `weights_digest` of the network,
    `provenance` for people: method, seed, distances.
    """

    steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float]
    limit: str
    timesteps: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    draws: tuple[int, ...]
    weights: str
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            for name in ("guidance_interval", "timesteps", "draws"):
                object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
            object.__setattr__(self, "rows", tuple(map(tuple, self.rows)))
            SamplingParams(FITTED, self.steps, 0.0, **self.fitted_to).check()
            table, timesteps = np.array(self.rows), np.array(self.timesteps)
        except (TypeError, ValueError) as error:
            raise FittedTableError(f"a fitted table is damaged: {error}") from error
        whole = isinstance(self.steps, int) and all(isinstance(draw, int) for draw in self.draws)
        whole = whole and {table.dtype.kind, timesteps.dtype.kind} <= {"i", "f"}
        if not whole or self.steps < 1 or not isinstance(self.weights, str) or not isinstance(self.provenance, dict):
            raise FittedTableError("a fitted table is damaged: its fields are not of their types")
        name = f"the fitted table of {self.steps} steps"
        if table.shape != (self.steps, len(COEFFICIENTS)) or {len(timesteps), len(self.draws)} != {self.steps}:
            raise FittedTableError(f"{name} is damaged: it has not as many timesteps, rows and draws")
        largest = np.finfo(np.float32).max  # a step is computed in it
        if not ((np.abs(table) <= largest).all() and (np.abs(timesteps) <= largest).all()):
            raise FittedTableError(f"{name} is damaged: its numbers are not all finite")
        if (timesteps < 0).any():
            raise FittedTableError(f"{name} is damaged: it has timesteps below 0")
        if (table[:, LIMIT] != THRESHOLDING.index(self.limit)).any():
            raise FittedTableError(f"{name} is damaged: its rows have another limit than {self.limit}")
        if not all(draw in (0, step) for step, draw in enumerate(self.draws, start=1)):
            raise FittedTableError(f"{name} is damaged: a row's noise is its own (1, 2, …) or x_T (0)")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FittedTable:
        """What `asdict` gave. Raises FittedTableError on anything else."""
        try:
            return cls(**data)
        except TypeError as error:  # a field that is missing or not known
            raise FittedTableError(f"a fitted table is damaged: {error}") from error

    @property
    def fitted_to(self) -> dict[str, Any]:
        """The settings that it is good for."""
        return {name: getattr(self, name) for name in FITTED_TO}

    @property
    def nfe(self) -> int:
        """Network rows of an image."""
        return int(self.schedule().nfe.sum())

    def schedule(self) -> SamplingSchedule:
        """The table, as every sampler has one."""
        draws = np.array(self.draws, np.int64)
        return SamplingSchedule(FITTED, np.array(self.timesteps, np.float64), np.array(self.rows, np.float64), draws)

    def check(self, num_timesteps: int, has_null_class: bool, has_time_table: bool) -> None:
        """Raises FittedTableError where a network of T = `num_timesteps` timesteps cannot run it."""
        name = f"the fitted table of {self.steps} steps"
        if (most := max(self.timesteps)) > num_timesteps - 1:
            raise FittedTableError(f"{name} has timestep {most:g}: the last is {num_timesteps - 1}")
        if has_time_table and not all(float(t).is_integer() for t in self.timesteps):
            raise FittedTableError(f"{name} has timesteps between whole numbers, which this network has no rows for")
        if not has_null_class and any(row[G] != 1 for row in self.rows):
            raise FittedTableError(f"{name} is guided: this network has no null class")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a network's tensors by name (see `hash_tensors`)."""
    digest = hashlib.sha256()
    hash_tensors(digest, weights)
    return digest.hexdigest()


def resolve(tables: Sequence[FittedTable], own: SamplingParams, given: Mapping[str, Any]) -> SamplingParams:
    """The settings of the table that is meant: `own` are the checkpoint's, `given` what somebody asked for.

    What is not given is as in `own` where a table has it; steps else are the most that there are. Raises
    InvalidSamplingParams, which lists what is there, where no table is for what was asked.
    """
    if not tables:
        raise InvalidSamplingParams(
            "sampler", "fitted needs fitted tables, which this checkpoint has none of: ddpm-serve fit makes them"
        )
    if given.get("eta"):
        raise InvalidSamplingParams("eta", f"belongs to the ddim sampler; {FITTED} takes none")
    if given.get("spacing", own.spacing) != own.spacing:
        raise InvalidSamplingParams("spacing", f"belongs to other samplers; {FITTED} has timesteps of its own")
    left = list(tables)
    for name in (*FITTED_TO, "steps"):
        wanted = given.get(name)
        if name == "guidance_interval" and wanted is not None:
            wanted = tuple(wanted)
        there = [table for table in left if getattr(table, name) == wanted]
        if wanted is not None and not there:
            stored = listed(sorted({getattr(table, name) for table in left}))
            raise InvalidSamplingParams(name, f"must be {stored} with sampler {FITTED}, not {shown(wanted)}")
        usual = [table for table in left if getattr(table, name) == getattr(own, name)]
        left = there or (usual if name != "steps" or own.sampler == FITTED else []) or left
    table = max(left, key=lambda table: table.steps)
    return SamplingParams(FITTED, table.steps, spacing=own.spacing, **table.fitted_to)


def table_of(tables: Sequence[FittedTable], params: SamplingParams) -> FittedTable:
    """The table of these settings. Raises InvalidSamplingParams where there is none."""
    for table in tables:
        if table.steps == params.steps and all(getattr(params, k) == v for k, v in table.fitted_to.items()):
            return table
    resolve(tables, params, {name: getattr(params, name) for name in (*FITTED_TO, "steps", "eta")})
    raise InvalidSamplingParams("sampler", "fitted has no table of these settings")


def with_table(tables: Sequence[FittedTable], table: FittedTable) -> tuple[FittedTable, ...]:
    """These and that one, in the place of one for the same settings; in ascending order of steps."""
    others = [old for old in tables if (old.steps, old.fitted_to) != (table.steps, table.fitted_to)]
    return tuple(sorted([*others, table], key=lambda table: (table.steps, table.guidance_scale)))


def shown(value: Any) -> str:
    """A setting in words."""
    return ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else str(value)


def listed(values: Sequence[Any]) -> str:
    """Values as "4, 5 or 8"."""
    words = [shown(value) for value in values]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
