"""The server of `python -m app` with a runner that fails where a request's seed, or the variable FAULT, says so."""

from __future__ import annotations

import os
import socket
import sys
import time

import torch

import app.__main__ as command
from app.engine.request import Sample, View
from app.engine.runner import ModelRunner
from model.checkpoint import Checkpoint
from model.images import Image

RAISES, RAISES_ONCE, NOT_FINITE, SLOW = 9001, 9002, 9003, 9004  # seeds
HANGS, LONG, BREAKS_DEVICE = 9005, 9006, 9007
TOO_MANY, TOO_LARGE = 9008, 9009  # out of memory: in a batch of more than ROOM images, or always
CRASHES_TWICE, CRASHES, CANNOT_START = 9010, 9011, 9012  # outside of a step
ROOM = 3
FAULTY_STEP = 3
SLOW_STEP_S = 0.02
LONG_STEP_S = 4.0  # so long that the server is not ready meanwhile
WARM_UP = "warm_up"  # for FAULT
REFUSED = "refused"  # the last class of a checkpoint that does not run


class FaultyRunner(ModelRunner):
    """Raises for a sample of seed RAISES at its third step, every time, and for one of RAISES_ONCE the first time;
    poisons one of NOT_FINITE; never comes back from one of HANGS, and after long from one of LONG. Only image 1 of a
    request is affected. Takes its time over one of SLOW. With FAULT=warm_up it cannot even begin.

    Cannot draw the noise of CANNOT_START, nor read the finished image of CRASHES, nor twice that of CRASHES_TWICE."""

    raised = False
    crashes = 2
    broken = refused = False

    def init_latents(self, samples: list[Sample]) -> None:
        if any(sample.request.seed == CANNOT_START for sample in samples):
            raise RuntimeError("no noise, said a test")
        super().init_latents(samples)

    def to_images(self, samples: list[Sample], view: View) -> Image:
        for sample in samples:
            if sample.i == 1 and sample.finished and sample.request.seed in (CRASHES, CRASHES_TWICE):
                if sample.request.seed == CRASHES:
                    raise RuntimeError("an image that cannot be read, said a test")
                if self.crashes:
                    self.crashes -= 1
                    raise RuntimeError("an image that cannot be read at first, said a test")
        return super().to_images(samples, view)

    def warm_up(self, rows: int) -> None:
        if os.environ.get("FAULT") == WARM_UP or self.broken or self.refused:
            raise RuntimeError("no kernel image is available, said a test")
        super().warm_up(rows)

    def step(self, samples: list[Sample]) -> list[Sample]:
        if any(sample.request.seed == SLOW for sample in samples):
            time.sleep(SLOW_STEP_S)
        seeds = {sample.request.seed for sample in samples}
        if TOO_MANY in seeds and len(samples) > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB, said a test")
        if TOO_LARGE in seeds:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        if self.broken or (BREAKS_DEVICE in seeds and any(sample.step == FAULTY_STEP for sample in samples)):
            self.broken = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered, said a test")
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


def make_runner(
    checkpoint: Checkpoint, device: torch.device, micro_batch_size: int, threads: int, runtime: str, precision: str
) -> FaultyRunner:
    """By the server's settings."""
    runner = FaultyRunner(checkpoint, device, micro_batch_size, threads, runtime, precision)
    runner.refused = checkpoint.config.class_names[-1:] == (REFUSED,)
    return runner


class NarrowServer(command.Server):
    """Its connections have small send buffers, of SEND_BUFFER bytes, so that slow readers hold it up early."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, int(os.environ["SEND_BUFFER"]))


if __name__ == "__main__":
    if "SEND_BUFFER" in os.environ:
        command.Server = NarrowServer  # type: ignore[misc]
    settings = command.read_settings(sys.argv[1:])
    command.serve(settings, make_runner)
