"""How long an arrival and a turn of the engine take with many requests waiting, without a network.

    python -m tests.bench.queue_scaling [--waiting 10,1000,5000]

A turn is what the engine does around a step: it picks the batch, counts what the batch has done, and looks for requests
whose time-out has passed. Medians in microseconds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from app.engine.admission import AdmissionController
from app.engine.instance import ModelInstance
from app.engine.request import Request
from app.engine.runner import ModelRunner
from app.engine.scheduler import ModelScheduler
from model import checkpoint
from model.sampling.schedule import make_schedule

TURNS = 200


def median_us(run: Callable[[], None], repeats: int = TURNS) -> float:
    """Of one call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def measure(waiting: int) -> tuple[float, float]:
    """An arrival and a turn, with so many requests waiting."""
    rng = random.Random(0)
    loaded = checkpoint.load("mnist")
    model = ModelInstance(loaded, ModelRunner(loaded, torch.device("cpu"), 32), 32)
    model.batch_limits.set(16, 32)
    model.throughput.initialize(16, 1e-9)
    schedules = {steps: make_schedule(loaded.diffusion, "ddim", steps) for steps in (4, 8, 20, 50, 100)}
    admission, scheduler = AdmissionController(10**12), ModelScheduler()
    scheduler.add_model(model)

    def request() -> Request:
        schedule = schedules[rng.choice(list(schedules))]
        deadline = time.monotonic() + 3600
        return Request(schedule, 0, 0, rng.choice((1, 1, 1, 4, 16, 64)), None, deadline, None, "mnist")  # type: ignore[arg-type]

    for _ in range(waiting):
        new = request()
        admission.admit(model, new)
        scheduler.add(model, new)

    def arrive() -> None:
        new = request()
        admission.admit(model, new)
        admission.release(new)

    def turn() -> None:
        batch = scheduler.schedule()
        assert batch is not None
        stepped = {sample.request for sample in batch.samples}
        for sample in batch.samples:
            sample.request.remaining_nfe = max(1, sample.request.remaining_nfe - 1)
        admission.progress(stepped)

    arrival = median_us(arrive)
    return arrival, median_us(turn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", default="10,1000,5000", help="numbers of requests")
    print("| waiting | arrival, µs | turn, µs |\n|---:|---:|---:|")
    for waiting in map(int, parser.parse_args().waiting.split(",")):
        arrival, turn = measure(waiting)
        print(f"| {waiting:,} | {arrival:.0f} | {turn:.0f} |")


if __name__ == "__main__":
    main()
