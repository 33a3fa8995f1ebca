"""Losses and skipped steps, summed on the device, so that nobody waits for it until they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.loop.distributed import DistributedContext

MAX_CONSECUTIVE_SKIPS = 100  # in a row, when looked at


@dataclass(frozen=True)
class Count:
    """What a tally has seen: the mean loss since it was last cleared, None where no step counted."""

    loss: float | None
    skipped: int


class LossMeter:
    """`numbers`, float64 [4]: sum of losses and steps since the last clearing; steps skipped in all, and in a row."""

    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, finite: Tensor) -> None:
        """A step: its loss [] and whether its gradient was finite, bool []. A skipped one's loss does not count."""
        counted = torch.where(finite, loss.double(), 0)
        taken, skipped = finite.double(), (~finite).double()
        total, steps, all_skipped, in_a_row = self.numbers.unbind()
        self.numbers = torch.stack([total + counted, steps + taken, all_skipped + skipped, (in_a_row + 1) * skipped])

    def read(self, ranks: DistributedContext, iteration: int) -> Count:
        """Waits for the device. All processes call it. Raises FloatingPointError where nothing but skips is left."""
        total, steps, skipped, in_a_row = ranks.mean(self.numbers).tolist()
        if in_a_row >= MAX_CONSECUTIVE_SKIPS:
            raise FloatingPointError(
                f"the gradient was not finite in the last {in_a_row:.0f} steps, at iteration {iteration}; what was "
                "saved before is good. Try a lower --learning_rate, --warmup, --grad_clip 1, or --precision fp32"
            )
        return Count(total / steps if steps else None, int(skipped))

    def clear(self) -> None:
        """Begins a new mean."""
        self.numbers = torch.cat([torch.zeros_like(self.numbers[:2]), self.numbers[2:]])
