"""Which scheduling policy? Arrivals replayed through the engine's real scheduler, and through others, in virtual time.

    python -m tests.bench.policies [--threads 2] [--caps 4,8,16,16-32] [--out build]

No network runs but to measure how long a step of 1 … 32 images takes (by the real runner). Then a step of so many rows
takes that long in virtual time, and nothing else takes any. Loads are fractions of the best rate among the step times.
The traces are the workloads of `tests.bench.serving`, long enough that p95 is steady.
"""

from __future__ import annotations

import argparse
import heapq
import shlex
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from app.engine.batch_invariance import default_micro_batch_size
from app.engine.instance import BatchLimits
from app.engine.request import Request, Sample
from app.engine.runner import ModelRunner
from app.engine.scheduler import Scheduler
from model import checkpoint
from model.backends.compile import best_precision
from model.sampling.schedule import SamplingSchedule, make_schedule
from tests.bench.serving.numbers import percentile
from tests.bench.serving.workloads import KINDS, Arrival, poisson
from tests.bench.timing import processor

CPU = torch.device("cpu")
LOADS = (0.75, 0.95)
QUANTUM = 20  # of deficit round robin, in rows: the work of the usual request


class RoundRobin(Scheduler):
    """Every request in turn gives one image."""

    def schedule(self) -> list[Sample]:
        self.budget = self.limits.budget(self.demand)
        return self._round_robin()


class LeastWork(Scheduler):
    """Those with the least left to do."""

    def schedule(self) -> list[Sample]:
        self.budget = self.limits.budget(self.demand)
        return self._shortest_first()


class HalfAndHalf(Scheduler):
    """As the engine's, but every second step is round robin and not every eighth."""

    every = 2

    def schedule(self) -> list[Sample]:
        self._steps += 1
        self.budget = self.limits.budget(self.demand)
        return self._shortest_first() if self._steps % self.every else self._round_robin()


class EveryFourth(HalfAndHalf):
    """The same with every fourth."""

    every = 4


class InOrder(Scheduler):
    """Those that came first, as engines for language models do (continuous batching)."""

    def key(self, request: Request) -> tuple[float, ...]:
        return (request.number,)

    def schedule(self) -> list[Sample]:
        batch: list[Sample] = []
        for request in sorted(self, key=self.key):
            batch += request.samples[: self.limits.max - len(batch)]
        return batch


class LeastProduct(InOrder):
    """What is left to do, times all that there was: the least of it first keeps the mean slowdown low."""

    def key(self, request: Request) -> tuple[float, ...]:
        return (request.remaining_nfe * request.n * len(request.schedule), request.number)


class LeastServed(InOrder):
    """Those that have had the least so far: what one can do who does not know how long a request is."""

    def key(self, request: Request) -> tuple[float, ...]:
        return (request.image_steps, request.number)


class Deficit(InOrder):
    """Deficit round robin by work: in turn each request may run `QUANTUM` rows, all its images at once."""

    def __init__(self, limits: BatchLimits) -> None:
        super().__init__(limits)
        self._rounds: dict[Request, tuple[int, int]] = {}  # when its turn is, and what it may still run

    def schedule(self) -> list[Sample]:
        there = list(self)
        last = max((turn for turn, _ in self._rounds.values()), default=0)
        self._rounds = {r: self._rounds.get(r, (last, QUANTUM)) for r in there}
        batch: list[Sample] = []
        for request in sorted(there, key=lambda r: (self._rounds[r][0], r.number)):
            samples = request.samples[: self.limits.max - len(batch)]
            if samples:
                turn, left = self._rounds[request]
                left -= len(samples)
                self._rounds[request] = (turn, left) if left > 0 else (turn + 1, left + QUANTUM)
                batch += samples
        return batch


class WholeRequests(InOrder):
    """Not of steps: requests of one schedule that are there when the batch before is done, each until its end."""

    _batch: tuple[Sample, ...] = ()

    def schedule(self) -> list[Sample]:
        batch = [sample for sample in self._batch if not sample.finished]
        first = min(self, key=lambda r: r.number)
        for request in [] if batch else sorted(self, key=lambda r: r.number):
            fresh = [sample for sample in request.samples if sample.step == 0]
            if len(request.schedule) == len(first.schedule) and (
                not batch or len(batch) + len(fresh) <= self.limits.max
            ):
                batch += fresh[: self.limits.max]
        self._batch = tuple(batch)
        return batch


POLICIES: dict[str, type[Scheduler]] = {
    "the engine's: least work, every 8th step round robin": Scheduler,
    "every 4th step round robin": EveryFourth,
    "half and half": HalfAndHalf,
    "round robin": RoundRobin,
    "least work first": LeastWork,
    "least left × whole first": LeastProduct,
    "deficit round robin, by work": Deficit,
    "least served first": LeastServed,
    "in order of arrival": InOrder,
    "whole requests, in order": WholeRequests,
}


@dataclass
class Outcome:
    """Of every request: its latency, that over what it takes alone, and the longest time in which it got no step."""

    latency: np.ndarray
    slowdown: np.ndarray
    starved: np.ndarray


def step_times(threads: int, most: int, seconds: float) -> list[float]:
    """Seconds of a step with 0 … `most` rows: medians of several rounds over all of them, by the real runner."""
    torch.set_num_threads(threads)
    loaded = checkpoint.load("mnist")
    runner = ModelRunner(
        loaded, CPU, default_micro_batch_size(loaded.network, CPU), threads, "torch", best_precision(CPU)
    )
    runner.warm_up(most)
    schedule = make_schedule(loaded.diffusion, "ddim", 1000)
    times: list[list[float]] = [[0.0], *([] for _ in range(most))]
    request = Request(schedule, 0, 0, most, (0,) * most, 0.0, None, "")  # type: ignore[arg-type]
    runner.init_latents(request.samples)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times[most]) < 5:
        for rows in range(1, most + 1):
            started = time.perf_counter()
            runner.step(request.samples[:rows])
            times[rows].append(time.perf_counter() - started)
            for sample in request.samples:
                sample.step = 0
    return [statistics.median(values) for values in times]


def replay(
    scheduler: Scheduler, trace: list[Arrival], schedules: dict[int, SamplingSchedule], step_s: list[float]
) -> Outcome:
    """The engine's loop without an engine."""
    now, done = 0.0, 0
    waiting = [(a.at, i) for i, a in enumerate(trace)]
    heapq.heapify(waiting)
    number: dict[Request, int] = {}
    ended, seen, gap = (np.zeros(len(trace)) for _ in range(3))
    while done < len(trace):
        if not len(scheduler):
            now = max(now, waiting[0][0])
        while waiting and waiting[0][0] <= now:
            at, i = heapq.heappop(waiting)
            asked = trace[i]
            request = Request(schedules[asked.steps], 0, 0, asked.n, None, 0.0, None, "")  # type: ignore[arg-type]
            number[request], seen[i] = i, at
            scheduler.add(request)
        batch = scheduler.schedule()
        assert 0 < len(batch) <= scheduler.limits.max, "a policy gave no batch, or too large a one"
        requests = {sample.request for sample in batch}
        for request in requests:
            i = number[request]
            gap[i] = max(gap[i], now - seen[i])
        now += step_s[len(batch)]
        for sample in batch:
            sample.step += 1
            sample.request.remaining_nfe -= 1
            sample.request.image_steps += 1
        for request in requests:
            i = number[request]
            seen[i] = now
            request.samples = [sample for sample in request.samples if not sample.finished]
            if not request.samples:
                scheduler.remove(request)
                ended[i], done = now, done + 1
    latency = ended - np.array([a.at for a in trace])
    cap = scheduler.limits.target
    alone = np.array([a.steps * (a.n // cap * step_s[cap] + step_s[a.n % cap]) for a in trace])
    return Outcome(latency, latency / alone, gap)


def table(step_s: list[float], caps: list[str], requests: int) -> str:
    """Markdown: one table for each workload and load. A cap of two numbers, usual and most, is the engine's only."""
    diffusion = checkpoint.load("mnist").diffusion
    schedules = {steps: make_schedule(diffusion, "ddim", steps) for kinds in KINDS.values() for _, steps in kinds}
    capacity = max(rows / step_s[rows] for rows in range(1, len(step_s)))
    parts = []
    for kind in KINDS:
        for load in LOADS:
            rate = load * capacity
            work = sum(n * steps for n, steps in KINDS[kind]) / len(KINDS[kind])
            trace = poisson(kind, rate, requests * work / rate, seed=1)
            lines = [
                f"| {kind}, {load:.0%} of capacity | cap | p50 s | p95 s | p50 slowdown | p95 slowdown | starved s |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
            for cap in caps:
                usual, *most = (int(rows) for rows in cap.split("-"))
                for name, policy in list(POLICIES.items())[: 1 if most else None]:
                    limits = BatchLimits(usual)
                    limits.set(usual, *most or [usual])
                    scheduler = policy(limits)
                    found = replay(scheduler, trace, schedules, step_s)
                    cells = [percentile(v, p) for v in (found.latency, found.slowdown) for p in (50, 95)]
                    cells.append(float(found.starved.max()))
                    lines.append(f"| {name} | {cap} | {' | '.join(f'{cell:.3g}' for cell in cells)} |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def step_options(doc: str | None) -> argparse.ArgumentParser:
    """What scripts in virtual time are told: where step times come from, and where the page goes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--threads", type=int, default=2)
    add("--seconds", type=float, default=10.0, help="for the step times")
    add(
        "--simulated-step-ms",
        help="step times instead of measuring them: of 1, 2, … images, or IMAGES:TIME,… and even between",
    )
    add("--out", type=Path, default=Path("build"), help="folder that gets the page (default: build)")
    return parser


def steps_of(args: argparse.Namespace, most: int) -> tuple[list[float], str]:
    """Seconds of a step with 0 … `most` images, as given or measured; and the same in words."""
    if args.simulated_step_ms:
        told = [pair.rpartition(":")[::2] for pair in args.simulated_step_ms.split(",")]
        images = [int(number or place) for place, (number, _) in enumerate(told, 1)]
        if images[-1] < most:
            raise SystemExit(f"--simulated-step-ms ends at {images[-1]} images; {most} are needed")
        times_ms = np.interp(range(most + 1), [0, *images], [0.0, *(float(ms) for _, ms in told)])
        step_s = [float(ms) / 1e3 for ms in times_ms]
    else:
        step_s = step_times(args.threads, most, args.seconds)
    times = ", ".join(f"{1e3 * s:.3g}" for s in step_s[1:])
    where = f"{args.threads} thread{'s' * (args.threads != 1)} of an {processor()}"
    return step_s, f"Milliseconds of a step with 1, 2, … images, on {where}:\n{times}."


def publish(text: str, folder: Path, name: str) -> None:
    """To the terminal, and to a file in `folder`."""
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def main() -> None:
    parser = step_options(__doc__)
    parser.add_argument("--caps", default="4,8,16,16-32", help="batch caps (default: 4,8,16,16-32)")
    parser.add_argument("--requests", type=int, default=2000, help="in each trace")
    args = parser.parse_args()
    caps = args.caps.split(",")
    step_s, times = steps_of(args, max(int(rows) for cap in caps for rows in cap.split("-")))
    text = f"""# Scheduling policies, compared

`{shlex.join(["python", "-m", "tests.bench.policies", *sys.argv[1:]])}`, in virtual time.
{times}
Traces of {args.requests} requests, the same for all; slowdown is latency over what the request takes alone, starved is
the longest time in which a request got no step. The cap is that of a step's images; 16-32 is 16, and up to 32 for a
crowd of as many requests, or where each request there has 16 images or more.

{table(step_s, caps, args.requests)}
"""
    publish(text, args.out, "policies.md")


if __name__ == "__main__":
    main()
