"""Who asks for what, and when: arrival traces, the same for every server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

STEPS = (10, 20, 50, 200)
KINDS: dict[str, tuple[tuple[int, int], ...]] = {  # (images, steps), each as often as the others
    "uniform": ((1, 20),),
    "mixed steps": tuple((1, steps) for steps in STEPS),
    "mixed n": ((1, 20), (16, 20)),
}
CLASSES = 10


@dataclass(frozen=True)
class Arrival:
    """A request at `at` seconds, for n images. A client that loses its patience leaves `leaves` seconds later."""

    at: float
    n: int
    steps: int
    seed: int
    class_label: int
    leaves: float | None = None

    @property
    def work(self) -> int:
        """Image-steps."""
        return self.n * self.steps


def mean_work(kind: str) -> float:
    """Image-steps of a request."""
    return float(np.mean([n * steps for n, steps in KINDS[kind]]))


def poisson(kind: str, rate: float, seconds: float, seed: int, start: float = 0.0) -> list[Arrival]:
    """A Poisson process of `rate` image-steps a second, given that exactly so much work arrives.

    Given their number, the times of a Poisson process are uniform. The kinds of a workload come equally often, in
    random order, so that a short trace is as heavy as a long one.
    """
    rng = np.random.default_rng(seed)
    classes = KINDS[kind]
    count = max(1, round(rate * seconds / mean_work(kind) / len(classes))) * len(classes)
    times = start + np.sort(rng.uniform(0, seconds, count))
    return _requests(rng, times, rng.permutation(np.arange(count) % len(classes)), classes)


def bursts(rate: float, seconds: float, every: float, seed: int) -> list[Arrival]:
    """Half of `rate` (image-steps a second) as uniform requests, all those of `every` seconds at one moment."""
    rng = np.random.default_rng(seed)
    size = max(1, round(rate * every / 2 / mean_work("uniform")))
    times = np.repeat(np.arange(0, seconds, every), size)
    return _requests(rng, times, np.zeros(len(times), int), KINDS["uniform"])


def backlog(kind: str, work: float, seed: int) -> list[Arrival]:
    """About `work` image-steps at one moment."""
    return [replace_time(arrival, 0.0) for arrival in poisson(kind, work, 1.0, seed)]


def impatient(arrivals: Sequence[Arrival], low: float, high: float, seed: int) -> list[Arrival]:
    """Every other client leaves, between `low` and `high` seconds after it asked."""
    rng = np.random.default_rng(seed)
    leaving = rng.permutation(np.arange(len(arrivals)) % 2 == 0)
    return [
        Arrival(**{**asdict(arrival), "leaves": float(rng.uniform(low, high))}) if leaves else arrival
        for arrival, leaves in zip(arrivals, leaving, strict=True)
    ]


def replace_time(arrival: Arrival, at: float) -> Arrival:
    """The same request at another time."""
    return Arrival(**{**asdict(arrival), "at": at})


def _requests(
    rng: np.random.Generator, times: np.ndarray, kinds: np.ndarray, classes: Sequence[tuple[int, int]]
) -> list[Arrival]:
    seeds, labels = rng.integers(0, 2**31, len(times)), rng.integers(0, CLASSES, len(times))
    return [
        Arrival(float(at), *classes[kind], int(seed), int(label))
        for at, kind, seed, label in zip(times, kinds, seeds, labels, strict=True)
    ]


def save(traces: dict[str, list[Arrival]], path: Path) -> None:
    """One line per request: [at, n, steps, seed, class, leaves]."""
    lines = {name: [list(asdict(arrival).values()) for arrival in trace] for name, trace in traces.items()}
    path.write_text(json.dumps(lines, separators=(",", ":")).replace('],"', '],\n"') + "\n")


def load(path: Path) -> dict[str, list[Arrival]]:
    """What `save` wrote."""
    return {name: [Arrival(*line) for line in trace] for name, trace in json.loads(path.read_text()).items()}
