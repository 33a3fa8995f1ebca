"""A network whose calls take the times that they are told, on a machine whose speed nobody can tell in advance.

A host that is shared gives one server twice what it gives the next. So every call of the network, whoever makes it,
is held until its time is over: the real network, the real images, and a machine as fast for everybody, as long as the
times are longer than what the call itself takes. How often they were not is counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from model.diffusion import Network
from tests.bench.serving.settings import Settings

Times = Sequence[Sequence[float]]  # [rows, milliseconds] each, ascending


def read(text: str) -> list[list[float]]:
    """ROWS:MS,ROWS:MS,… as times. Raises ValueError where it is something else, or rows do not ascend."""
    times = [[float(number) for number in pair.split(":")] for pair in text.split(",")]
    if any(len(pair) != 2 or min(pair) <= 0 for pair in times) or times != sorted(times):
        raise ValueError(f"{text!r} is not ROWS:MS,ROWS:MS,… with more rows each time")
    return times


class Steady:
    """`network`, each call as long as `times` say for its rows, evenly between them. `tally` is a file that gets the
    number of calls, the number of those that took longer by themselves, and by how many seconds, and the seconds that
    they all should have taken."""

    def __init__(self, network: Network, times: Times, tally: str) -> None:
        self.network, self.tally = network, Path(tally)
        self.rows, self.ms = zip(*times, strict=True)
        self.calls, self.late, self.lost_s, self.told_s = 0, 0, 0.0, 0.0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network's output, when its time is over."""
        started = time.perf_counter()
        told = float(np.interp(len(x), self.rows, self.ms)) / 1e3
        out = self.network(x, t, y)
        left = started + told - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self.calls, self.told_s = self.calls + 1, self.told_s + told
        self.late, self.lost_s = self.late + (left < 0), self.lost_s + max(0.0, -left)
        self.tally.write_text(f"{self.calls} {self.late} {self.lost_s} {self.told_s}")
        return out


def tally_of(told: Settings) -> str:
    """The file beside the counter."""
    return told.counter + ".calls"


def held(network: Network, told: Settings) -> Network:
    """With the times of the settings, if they have any."""
    return Steady(network, told.step_ms, tally_of(told)) if told.step_ms else network
