"""The server of `python -m app` with a runner that fails where a request's seed, or the variable FAULT, says so."""

from __future__ import annotations

import os
import sys
import time

import torch

from app.__main__ import read_settings, serve
from app.engine.request import Sample
from app.engine.runner import Runner
from model import checkpoint

RAISES, RAISES_ONCE, NOT_FINITE, SLOW = 9001, 9002, 9003, 9004  # seeds
HANGS, LONG = 9005, 9006
FAULTY_STEP = 3
SLOW_STEP_S = 0.02
LONG_STEP_S = 4.0  # so long that the server is not ready meanwhile
WARM_UP = "warm_up"  # for FAULT


class FaultyRunner(Runner):
    """Raises for a sample of seed RAISES at its third step, every time, and for one of RAISES_ONCE the first time;
    poisons one of NOT_FINITE; never comes back from one of HANGS, and after long from one of LONG. Only image 1 of a
    request is affected. Takes its time over one of SLOW. With FAULT=warm_up it cannot even begin."""

    raised = False

    def warm_up(self, rows: int) -> None:
        if os.environ.get("FAULT") == WARM_UP:
            raise RuntimeError("no kernel image is available, said a test")
        super().warm_up(rows)

    def step(self, samples: list[Sample]) -> list[Sample]:
        if any(sample.request.seed == SLOW for sample in samples):
            time.sleep(SLOW_STEP_S)
        for sample in samples:
            if sample.i != 1 or sample.step != FAULTY_STEP:
                continue
            seed = sample.request.seed
            if seed == RAISES:
                raise RuntimeError("a fault that a test asked for")
            if seed == RAISES_ONCE and not self.raised:
                self.raised = True
                raise RuntimeError("a fault that a test asked for once")
            while seed == HANGS:
                time.sleep(1)
            if seed == LONG:
                time.sleep(LONG_STEP_S)
            if seed == NOT_FINITE:
                sample.x = torch.full_like(sample.x, torch.nan)
        return super().step(samples)


if __name__ == "__main__":
    settings = read_settings(sys.argv[1:])
    serve(settings, FaultyRunner(checkpoint.load(settings.checkpoint), torch.device("cpu"), chunk=4))
