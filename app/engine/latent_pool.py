"""Where the states of samples lie on a GPU: in two tables, since graphs know their addresses by heart."""

from __future__ import annotations

import math
import weakref
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.request import Sample

MAX_SLOTS = 1024  # as many rows as a batch is given on a GPU where nobody says how many; see `app.engine.autotune`
POOL_BYTES = 2**29  # of both tables, where that is room for a call of the network

Number = TypeVar("Number", int, NDArray[np.int64])


def x_row(slot: Number, step: Number) -> Number:
    """Where x lies after `step` steps."""
    return 2 * slot + step % 2


def x0_row(slot: Number, step: Number) -> Number:
    """Where the x_0 lies that step number `step` (from 0) predicted; -1 and -2 are those before the first, zeros."""
    return 3 * slot + step % 3


def pool_size(shape: tuple[int, ...], micro_batch_size: int) -> int:
    """How many samples of such images [C, H, W] have a slot, at least one `micro_batch_size`."""
    return max(micro_batch_size, min(MAX_SLOTS, POOL_BYTES // (5 * 4 * math.prod(shape)) - 1))


class LatentPool:
    """The states of at most `count` samples: x float32 [2·(count + 1), C, H, W] and x0 [3·(count + 1), C, H, W].

    A step writes beside what it reads, and which row is which follows from the sample's step. So a step is committed
    by counting it (`sample.step += 1`), and one that failed has changed nothing. The last slot is the
    `null_slot`, which no sample has.

    There are never more: growing would mean new addresses, and new graphs in the middle of the work. A sample that
    finds none free gets that of the one that has waited longest, whose state moves into tensors of its own
    (`Sample.x`) until its turn comes. Nobody has to say that a sample left: its slot is free once it is gone or its
    request has its answer, which is looked at when slots are needed.
    """

    def __init__(self, count: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.count = self.null_slot = count
        self.x = torch.zeros(2 * (count + 1), *shape, device=device)
        self.x0 = torch.zeros(3 * (count + 1), *shape, device=device)
        self._holders: list[weakref.ref[Sample] | None] = [None] * count
        self._used, self._clock = [0] * count, 0  # when each was stepped last, in calls of `load`

    def x_of(self, sample: Sample) -> Tensor:
        """Its x [C, H, W]: of its slot, and no copy, or its own."""
        state = sample.x if sample.slot is None else self.x[x_row(sample.slot, sample.step)]
        assert state is not None
        return state

    def x0_of(self, sample: Sample, ago: int = 0) -> Tensor:
        """Its last x_0, or the one before that (`ago` 1)."""
        if sample.slot is not None:
            return self.x0[x0_row(sample.slot, sample.step - 1 - ago)]
        state = sample.x0_prev if ago else sample.x0
        assert state is not None
        return state

    def free(self) -> list[int]:
        """Those that no sample needs any more."""
        holders = [holder() if holder else None for holder in self._holders]
        return [slot for slot, sample in enumerate(holders) if sample is None or sample.request.status.is_final]

    def allocate(self, n: int, stay: list[Sample]) -> list[int]:
        """n slots that may be given away. Samples make room where it has to be, but not those that `stay`."""
        kept = {sample.slot for sample in stay}
        free, others = [], []
        for slot, holder in enumerate(self._holders):
            sample = holder() if holder else None
            if sample is None or sample.request.status.is_final:
                if slot not in kept:
                    free.append(slot)
            elif slot not in kept:
                others.append(sample)
        if len(free) < n:
            others.sort(key=lambda sample: self._used[sample.slot or 0])
            leaving = others[: n - len(free)]
            free += [sample.slot for sample in leaving if sample.slot is not None]
            self.evict(leaving)
        assert len(free) >= n
        return free[:n]

    def assign(self, samples: list[Sample], slots: list[int]) -> None:
        """Their states are in these slots now."""
        for sample, slot in zip(samples, slots, strict=True):
            holder = self._holders[slot]
            if holder is not None and (before := holder()) is not None:
                before.slot = None
            self._holders[slot] = weakref.ref(sample)
            sample.slot, sample.x, sample.x0, sample.x0_prev = slot, None, None, None

    def load(self, samples: list[Sample]) -> None:
        """All of them have a slot after it. At most `count`."""
        outside = [sample for sample in samples if sample.slot is None]
        if outside:
            slots = self.allocate(len(outside), samples)
            pairs = list(zip(slots, outside, strict=True))
            rows = [[x_row(slot, s.step), x0_row(slot, s.step - 1), x0_row(slot, s.step - 2)] for slot, s in pairs]
            x_rows, x0_rows, x0_prev_rows = torch.tensor(rows, device=self.x.device).unbind(1)
            self.x.index_copy_(0, x_rows, torch.stack([self.x_of(s) for s in outside]))
            self.x0.index_copy_(0, x0_rows, torch.stack([self.x0_of(s) for s in outside]))
            self.x0.index_copy_(0, x0_prev_rows, torch.stack([self.x0_of(s, 1) for s in outside]))
            self.assign(outside, slots)
        self._clock += 1
        for sample in samples:
            assert sample.slot is not None
            self._used[sample.slot] = self._clock

    def scale(self, slots: NDArray[np.int64], scales: NDArray[np.float64]) -> None:
        """Multiplies x_T in these slots; a GPU has work only where a scale isn't 1."""
        if len(others := np.flatnonzero(scales != 1)):
            rows = torch.from_numpy(x_row(slots[others], 0 * others)).to(self.x.device)
            by = torch.from_numpy(scales[others].astype(np.float32)).to(self.x.device)
            self.x[rows] *= by.reshape(-1, 1, 1, 1)

    def evict(self, samples: list[Sample]) -> None:
        """Their states are tensors of their own after it."""
        inside = [sample for sample in samples if sample.slot is not None]
        if not inside:
            return
        x = torch.stack([self.x_of(sample) for sample in inside]).unbind()
        x0 = torch.stack([self.x0_of(sample) for sample in inside]).unbind()
        x0_prev = torch.stack([self.x0_of(sample, 1) for sample in inside]).unbind()
        for sample, *state in zip(inside, x, x0, x0_prev, strict=True):
            assert sample.slot is not None
            self._holders[sample.slot] = None
            sample.slot, (sample.x, sample.x0, sample.x0_prev) = None, state
