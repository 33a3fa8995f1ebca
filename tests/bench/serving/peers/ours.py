"""Our own server, its steps as long as the settings say (see `tests.bench.serving.fixed_latency`).

A step is held as a whole: its calls run side by side, and a machine that takes a call's time for each of them at once
would be a larger one than the peers have.
"""

from __future__ import annotations

import sys

from torch import Tensor

from app.__main__ import read_settings, serve
from app.engine.runner import ModelRunner
from model.diffusion import Network
from tests.bench.serving.fixed_latency import held
from tests.bench.serving.settings import settings


def hold() -> None:
    """From now on, where the settings ask for it."""
    forward, calls = ModelRunner.forward, dict[ModelRunner, Network]()

    def held_forward(self: ModelRunner, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if self not in calls:
            calls[self] = held(lambda *rows: forward(self, *rows), settings())
        return calls[self](x, t, y)

    ModelRunner.forward = held_forward  # type: ignore[method-assign]


if __name__ == "__main__":
    hold()
    serve(read_settings(sys.argv[1:]))
