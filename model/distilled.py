"""What a distilled checkpoint has inside: guidance that costs no second network row, and maybe its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from model.sampling.schedule import InvalidSamplingParams, SamplingParams, SamplingSchedule

GUIDANCE = ("guidance_scale", "guidance_interval")
ANY_STEPS = "guidance"  # the method whose students run with every sampler; the others' only in the steps they learned


@dataclass(frozen=True)
class Distilled:
    """A student of `training.distill`. Every step of it is one network row, with `guidance_scale` in its weights.

    `steps` is its own number of them, `method` that of training, `teacher` the SHA-256 of the teacher's file. Raises
    ValueError where these are of other types.
    """

    guidance_scale: float
    steps: int
    method: str
    teacher: str

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"guidance_scale": (int, float), "steps": int, "method": str, "teacher": str}
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind) or isinstance(getattr(self, name), bool):
                raise ValueError(f"what it was distilled from is damaged: {name} is {getattr(self, name)!r}")

    @property
    def has_fixed_steps(self) -> bool:
        """Whether it runs in its own steps alone."""
        return self.method != ANY_STEPS

    def check(self, own: SamplingParams, given: Mapping[str, Any]) -> None:
        """Raises InvalidSamplingParams where what somebody asked for is not what is inside: `own` are its settings."""
        for name in (
            GUIDANCE if not self.has_fixed_steps else (*GUIDANCE, "sampler", "steps", "eta", "spacing", "limit")
        ):
            inside = getattr(own, name)
            wanted = given.get(name, inside)
            if (tuple(wanted) if isinstance(inside, tuple) else wanted) != inside:
                shown = ",".join(f"{x:g}" for x in inside) if isinstance(inside, tuple) else inside
                why = (
                    "it is inside the checkpoint's weights"
                    if name in GUIDANCE
                    else "the checkpoint was distilled to it"
                )
                raise InvalidSamplingParams(name, f"must be {shown} or left out: {why}")

    def schedule(self, schedule: SamplingSchedule) -> SamplingSchedule:
        """The same with one network row a step."""
        table = schedule.table.copy()
        table[:, 0] = 1
        return replace(schedule, table=table)
