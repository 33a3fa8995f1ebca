"""The yardstick: `model.sampling.sample` in a loop, without a server. Its rate at the knee batch is "capacity".

    python -m tests.bench.serving.baseline RESULT
    python -m tests.bench.serving.baseline RESULT --pace

The settings come from the environment, as those of the servers do. RESULT is JSON: seconds of a step by batch, knee,
image-steps a second there, what single requests take alone, and the pictures that every server must give. With
--pace only `pace`, image-steps a second at the knee that the settings tell: it is taken between the servers.
"""

from __future__ import annotations

import base64
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from tests.bench.serving.backend import Backend
from tests.bench.serving.settings import settings
from tests.bench.serving.workloads import KINDS
from tests.bench.timing import processor

BATCHES = (1, 2, 4, 8, 16, 32)
TURNS = 5  # of all batches, so that a slow moment of the machine does not meet one of them alone
ENOUGH = 0.95  # of the best rate: the knee is the smallest batch that gives it
CHECKED = [{"class_label": i % 10, "n": 1 + 3 * (i % 2), "seed": 100 + i, "steps": (10, 20)[i % 2]} for i in range(6)]


def step_seconds(backend: Backend, rows: int, seconds: float) -> float:
    """Of the loop at a batch: the mean of so many seconds, since a server too has a machine's slow moments."""
    runs = 0
    backend.run([(0, i) for i in range(rows)], [0] * rows, 10)
    started = time.perf_counter()
    while (taken := time.perf_counter() - started) < seconds or not runs:
        backend.run([(0, i) for i in range(rows)], [0] * rows, 10)
        runs += 1
    return taken / runs / 10


def main(result: Path, pace: bool) -> None:
    """Measures each batch for `wait_ms`, in turns, or only one."""
    told = settings()
    backend = Backend(told)
    seconds = told.wait_ms / 1e3
    if pace:
        result.write_text(json.dumps({"pace": told.rows / step_seconds(backend, told.rows, seconds)}))
        return
    turns = [{rows: step_seconds(backend, rows, seconds / TURNS) for rows in BATCHES} for _ in range(TURNS)]
    steps = {rows: statistics.median(turn[rows] for turn in turns) for rows in BATCHES}
    rates = {rows: rows / taken for rows, taken in steps.items()}
    knee = min(rows for rows in BATCHES if rates[rows] >= ENOUGH * max(rates.values()))
    alone = {}
    for n, count in sorted({pair for kinds in KINDS.values() for pair in kinds}):
        rows = min(n, knee)
        alone[f"{n}x{count}"] = count * steps[rows] * n / rows
    found = {
        "step_s": steps,
        "knee": knee,
        "capacity": rates[knee],
        "alone_s": alone,
        "precision": backend.precision,
        "checkpoint": backend.checkpoint.sha256,
        "processor": processor(),
        "torch": torch.__version__,
        "pictures": [base64.b64encode(backend.generate([request])[0]).decode() for request in CHECKED],
        "requests": CHECKED,
    }
    result.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--pace" in sys.argv)
