"""What the bench tells the servers that it starts, in an environment variable. Imports nothing heavy."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass

VARIABLE = "SERVING_BENCH"
SAMPLER = {
    "sampler": "ddim",
    "eta": 0.0,
    "guidance_scale": 1.0,
}  # one row per image-step


@dataclass(frozen=True)
class Settings:
    """What the bench tells a server. `rows` images run together; `batch` requests at most are taken together, after
    waiting `wait_ms` for them. Where a peer can refuse work or give it up, it holds at most `queue` requests, each for
    `deadline_s`. `counter` is a file that gets the image-steps computed so far. `step_ms`, if any, are
    [rows, milliseconds] that calls of the network take (see `tests.bench.serving.fixed_latency`)."""

    port: int
    checkpoint: str
    threads: int
    rows: int
    batch: int
    wait_ms: float
    queue: int
    deadline_s: float
    counter: str
    step_ms: tuple[tuple[float, float], ...] = ()

    def variables(self) -> dict[str, str]:
        """For the environment of a server process."""
        return {VARIABLE: json.dumps(asdict(self)), "OMP_NUM_THREADS": str(self.threads)}


def settings() -> Settings:
    """Those in the environment."""
    return Settings(**json.loads(os.environ[VARIABLE]))
