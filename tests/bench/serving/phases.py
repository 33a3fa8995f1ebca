"""What each server goes through: the workloads in turn; for overload on a server that is told to shed."""

from __future__ import annotations

import base64
import io
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from tests.bench.serving.numbers import summary
from tests.bench.serving.server import Server, Unavailable, serving
from tests.bench.serving.servers import ServerSpec
from tests.bench.serving.settings import Settings
from tests.bench.serving.workloads import KINDS, Arrival, backlog, bursts, impatient, poisson, replace_time

LOAD = 0.75
LEVELS = (0.5, 1.0, 2.0, 3.0)
PATIENCE_S = 60.0
MEAN_LEVELS, FAR_LEVELS, FAR_SHARE = 0.5, 2, 0.01  # tolerance of pictures: bf16 rounds by the batch that it is in

WASTED = "ddpm_wasted_image_steps_total"

Say = Callable[[str], None]
Task = Callable[[Server], bool]
"""Uses a server; whether it has come to rest."""


@dataclass
class Plan:
    """Of a run: capacity (image-steps a second), what requests take alone, and the traces of every workload. `loads`,
    fractions of capacity, are more of them for mixed n, up to four times as long where few come."""

    baseline: dict[str, Any]
    seconds: float
    levels: Sequence[float] = LEVELS
    loads: Sequence[float] = ()
    traces: dict[str, list[Arrival]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        c, s = self.baseline["capacity"], self.seconds
        mixed = ("mixed steps", "mixed n")
        self.deadline_s = round(max(1.0, 10 * self.baseline["alone_s"]["1x20"]), 1)
        self.queue = max(4, round(self.deadline_s * c / 20))  # uniform requests that can be done within the deadline
        self.traces = {f"backlog {kind}": backlog(kind, c * s / 2.5, 1) for kind in KINDS}
        self.traces["uniform"] = poisson("uniform", LOAD * c, s / 3, 2)
        for i, kind in enumerate(mixed):
            self.traces[kind] = poisson(kind, LOAD * c, s, 3 + i)
            self.traces[f"own {kind}"] = poisson(kind, LOAD * c, s / 3, 5 + i)  # to be stretched by who is slower
            self.traces[f"sweep {kind}"] = poisson(kind, LOAD * c, s / 5, 7 + i)
        self.traces["bursts"] = bursts(c, s / 3, s / 15, 9)
        self.traces["frames"] = poisson("uniform", 0.5 * c, s / 5, 10)
        for i, level in enumerate(self.levels):
            over = poisson("uniform", level * c, self.overload_s, 20 + i)
            self.traces[f"overload {level:g}"] = over + poisson("uniform", 0.5 * c, s / 9, 40 + i, self.overload_s)
        for i, load in enumerate(self.loads):
            self.traces[f"mixed n at {load:g}"] = poisson("mixed n", load * c, s / min(max(load, 0.25), 1), 60 + i)
        self.traces["cancels"] = impatient(poisson("mixed steps", 0.5 * c, s / 4, 11), 0.02, self.deadline_s / 2, 12)

    @property
    def overload_s(self) -> float:
        """Three deadlines at least, so that a queue without end shows."""
        return max(self.seconds / 4, 3 * self.deadline_s)


@dataclass
class Course:
    """One server's way through the plan. `result` fills up as it goes."""

    spec: ServerSpec
    python: str
    told: Settings
    plan: Plan
    say: Say
    result: dict[str, Any] = field(default_factory=dict)

    def run(self, quick: bool, only: Sequence[str] | None = None) -> dict[str, Any]:
        """All of it, or those workloads; where the server cannot be had, or breaks down, `unavailable` says why."""
        shed = replace(self.told, queue=self.plan.queue, deadline_s=self.plan.deadline_s)
        try:
            if quick:
                self.go(self.told, [self.verify, self.of("mixed steps")])
                return self.result
            late = self.plan.deadline_s
            loads = {"idle": self.idle} | {f"backlog {kind}": self.capacity(kind) for kind in KINDS}
            loads |= {name: self.of(name) for name in ("uniform", "mixed steps", "mixed n", "bursts")}
            loads |= {name: self.of(name) for name in self.plan.traces if name.startswith("mixed n at ")}
            loads |= {"frames": self.of("frames", streamed=True)}
            loads |= {f"own {kind}": self.own(kind) for kind in ("mixed steps", "mixed n")}
            levels = [f"overload {x:g}" for x in self.plan.levels]
            over = {name: self.of(name, patience_s=late, timeout_s=late) for name in levels} | {"cancels": self.cancels}
            for told, tasks in ((self.told, loads), (shed, over)):
                if chosen := [task for name, task in tasks.items() if only is None or name in only]:
                    self.go(told, [self.verify, *chosen])
        except (Unavailable, subprocess.CalledProcessError, OSError, ValueError) as error:
            self.result["unavailable"] = str(error)
            self.say(f"  {error}")
        return self.result

    def go(self, told: Settings, tasks: list[Task]) -> None:
        """One after the other. A server that does not come to rest after a load is started anew before the next."""
        left = list(tasks)
        while left:
            with serving(self.spec, self.python, told) as server:
                before = server.calls() if told.step_ms else []
                while left:
                    if not left.pop(0)(server):
                        self.say("  it goes on computing; a new one is started")
                        break
                if told.step_ms:
                    since = [now - then for now, then in zip(server.calls(), before, strict=True)]
                    self.result["calls"] = [
                        a + b for a, b in zip(self.result.get("calls", [0] * 4), since, strict=True)
                    ]

    def verify(self, server: Server) -> bool:
        """The right pictures, before anything is measured."""
        self.result["pictures"] = verify(server, self.plan.baseline)
        return True

    def idle(self, server: Server) -> bool:
        """What it takes alone."""
        self.result["idle_s"] = idle(server)
        return server.settle()

    def of(
        self, name: str, patience_s: float = PATIENCE_S, streamed: bool = False, timeout_s: float | None = None
    ) -> Task:
        """A trace."""

        def task(server: Server) -> bool:
            started = time.monotonic()
            records = server.run(self.plan.traces[name], patience_s, streamed=streamed, timeout_s=timeout_s)
            return self.keep(server, name, records, started)

        return task

    def own(self, kind: str) -> Task:
        """The trace of 75 %, slower or faster, so that it is 75 % of its own capacity."""

        def task(server: Server) -> bool:
            started = time.monotonic()
            capacity = self.result["capacity"][kind]
            stretch = self.plan.baseline["capacity"] / capacity if capacity else 1.0
            name = f"own {kind}"
            records = server.run([replace_time(a, a.at * stretch) for a in self.plan.traces[name]], PATIENCE_S)
            return self.keep(server, name, records, started)

        return task

    def keep(self, server: Server, name: str, records: list[dict[str, Any]], started: float) -> bool:
        """Whether the server came to rest soon after it."""
        self.result[name] = [compact(record) for record in records]
        rested = server.settle()
        ok = sum(record["status"] == 200 for record in records)
        self.say(f"  {name}: {ok} of {len(records)} answered, {time.monotonic() - started:.0f} s")
        return rested

    def capacity(self, kind: str) -> Task:
        """Image-steps a second of a backlog."""

        def task(server: Server) -> bool:
            trace = self.plan.traces[f"backlog {kind}"]
            if self.spec.one_by_one:  # a fraction shows it as well, and takes long enough
                trace = trace[: max(6, len(trace) // 8)]
            records = server.run(trace, 10 * PATIENCE_S)
            done = [(a.work, r["done"]) for a, r in zip(trace, records, strict=True) if r["status"] == 200]
            rate = sum(work for work, _ in done) / max(at for _, at in done) if done else 0.0
            self.result.setdefault("capacity", {})[kind] = rate
            share = rate / self.plan.baseline["capacity"]
            self.say(
                f"  capacity, {kind}: {rate:.0f} image-steps/s, {share:.2f} of the baseline "
                f"({len(done)} of {len(trace)})"
            )
            return server.settle()

        return task

    def cancels(self, server: Server) -> bool:
        """How much is computed for nobody."""
        server.settle()
        before, trace = server.image_steps(), self.plan.traces["cancels"]
        wasted = server.metric(WASTED) if self.spec.ours else 0.0
        records = server.run(trace, PATIENCE_S)
        server.settle()
        wanted = sum(a.work for a, r in zip(trace, records, strict=True) if r["status"] == 200)
        self.result["cancels"] = {
            "left": sum(record["error"] == "left" for record in records),
            "asked_of_those": sum(a.work for a, r in zip(trace, records, strict=True) if r["error"] == "left"),
            "wanted": wanted,
            "computed": server.image_steps() - before,  # with the probes of `settle`, a handful
        }
        if self.spec.ours:
            self.result["cancels"]["metric"] = server.metric(WASTED) - wasted
        self.say(f"  cancels: {self.result['cancels']}")
        return True


def compact(record: dict[str, Any]) -> list[Any]:
    """[status, first, done, late, error]; seconds since the intended arrival."""
    times = [None if record[key] is None else round(record[key], 3) for key in ("first", "done", "late")]
    return [record["status"], *times, record["error"]]


def idle(server: Server) -> dict[str, float]:
    """Seconds that a request takes alone, by kind: the median of three."""
    found = {}
    for n, steps in sorted({pair for kinds in KINDS.values() for pair in kinds}):
        times = []
        for seed in range(3):
            started = time.monotonic()
            status, _ = server.ask(Arrival(0, n, steps, seed, 0), PATIENCE_S)
            assert status == 200, f"{server.spec.title} answered {status}"
            times.append(time.monotonic() - started)
        found[f"{n}x{steps}"] = sorted(times)[1]
    return found


def verify(server: Server, baseline: dict[str, Any]) -> dict[str, float]:
    """Asks at once for the pictures that the baseline loop made. Raises Unavailable where they are others."""
    requests = baseline["requests"]
    arrivals = [Arrival(0, r["n"], r["steps"], r["seed"], r["class_label"]) for r in requests]
    mean, far = 0.0, 0.0
    for record, expected in zip(server.run(arrivals, PATIENCE_S, keep=True), baseline["pictures"], strict=True):
        body = base64.b64decode(record.get("body", ""))
        if record["status"] != 200:
            raise Unavailable(f"{server.spec.title} answered {record['status']}: {record['error'] or body[:300]!r}")
        theirs, right = pixels(server.spec.picture(body)), pixels(base64.b64decode(expected))
        if theirs.shape != right.shape:
            raise Unavailable(f"{server.spec.title} gave a picture of {theirs.shape}, not {right.shape}")
        distance = np.abs(theirs.astype(int) - right)
        mean, far = max(mean, float(distance.mean())), max(far, float((distance > FAR_LEVELS).mean()))
    if mean > MEAN_LEVELS or far > FAR_SHARE:
        raise Unavailable(
            f"{server.spec.title} gives other pictures: {mean:.2f} levels off, {far:.1%} by more than {FAR_LEVELS}"
        )
    return {"mean_levels": mean, "far_share": far}


def pixels(png: bytes) -> np.ndarray:
    """uint8 [H, W] or [H, W, C]."""
    return np.asarray(Image.open(io.BytesIO(png)))


def sweep(spec: ServerSpec, python: str, told: Settings, plan: Plan, batches: Sequence[int], say: Say) -> list[Any]:
    """A row for each batch size × wait: both mixed workloads at 75 % of the baseline loop's capacity."""
    rows = []
    for batch in batches:
        for wait in spec.waits_ms:
            row: dict[str, Any] = {"batch": batch, "wait_ms": wait}
            try:
                with serving(spec, python, replace(told, batch=batch, wait_ms=wait)) as server:
                    for kind in ("mixed steps", "mixed n"):
                        trace = plan.traces[f"sweep {kind}"]
                        records = [compact(record) for record in server.run(trace, PATIENCE_S)]
                        row[kind] = summary(trace, records, plan.baseline["alone_s"])
                        server.settle()
            except Unavailable as error:
                row["unavailable"] = str(error)
            say(f"  {spec.name} {row}")
            rows.append(row)
            if "unavailable" in row:
                return rows
    return rows
