"""What a server process is left with: memory, descriptors, threads, and the quantiles of its histograms."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from app.middleware import PROBED
from tests.app.processes import ServerProcess, metric, wait_for

EXECUTORS = min(32, (os.cpu_count() or 1) + 4) + 1  # threads of asyncio's pool and the loader of weights, when needed
SLACK = 24 * 2**20  # bytes that a process's memory may grow by in a run, beside a twentieth of it
WORK = (
    "ddpm_pending_nfe",
    "ddpm_num_samples_running",
    "ddpm_num_samples_waiting",
    "ddpm_oldest_queued_request_age_seconds",
)


@dataclass
class Findings:
    """What a part found; `wrong` has a sentence for everything that must not be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)  # by kind of client and outcome
    numbers: dict[str, float | str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class ResourceSnapshot:
    """What a process uses when this is made. `compare` looks what it uses later; call `sample_memory` in between."""

    def __init__(self, server: ServerProcess) -> None:
        self._server = server
        self._samples: list[tuple[float, int]] = []
        self._before = self._state()

    def sample_memory(self) -> None:
        """Notes the memory of this moment."""
        self._samples.append((time.monotonic(), resident(self._server.process.pid)))

    def compare(self, findings: Findings) -> None:
        """To be called when all clients are gone. The first third of the looks is warm-up: caches, pools and the
        allocator fill."""
        with suppress(AssertionError):
            wait_for(lambda: self._server.samples_in_flight() == 0, "free places")
            wait_for(lambda: self._state()["descriptors"] <= self._before["descriptors"], "closed descriptors")
        before, after = self._before, self._state()
        late = self._samples[len(self._samples) // 3 :] or [(time.monotonic(), before["resident"])]
        slope = statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 2 else 0.0
        growth = max(slope * (late[-1][0] - late[0][0]), after["resident"] - late[0][1])
        findings.numbers |= {
            "memory after warm-up, at most, and at the end (MiB)": ", ".join(
                f"{size / 2**20:.0f}" for size in (late[0][1], max(size for _, size in late), after["resident"])
            ),
            "memory slope (MB/h)": round(slope * 3600 / 1e6, 1)
            if late[-1][0] - late[0][0] > 60
            else "too short to tell",
            "descriptors before and after": f"{before['descriptors']}, {after['descriptors']}",
            "threads before and after": f"{before['threads']}, {after['threads']}",
        }
        if growth > SLACK + late[0][1] / 20:
            findings.wrong.append(f"memory grew by {growth / 2**20:.0f} MiB")
        if after["descriptors"] > before["descriptors"]:
            findings.wrong.append("descriptors are still open")
        if after["threads"] > before["threads"] + EXECUTORS:
            findings.wrong.append("threads are still there")
        text = self._server.client.get("/metrics").text
        for gauge in WORK:
            if metric(text, gauge):
                findings.wrong.append(f"{gauge} is {metric(text, gauge)} in the end")
        lines = [line for line in self._server.logs() if line.get("outcome") == "internal_error"]
        findings.wrong += [f"internal error: {line}" for line in lines[:5]]

    def _state(self) -> dict[str, int]:
        process = Path(f"/proc/{self._server.process.pid}")
        return {
            "descriptors": len(list((process / "fd").iterdir())),
            "threads": len(list((process / "task").iterdir())),
            "resident": resident(self._server.process.pid),
        }


def loggable(text: str, outcome: str) -> float:
    """Requests that ended so, by the metrics; probes that went well are not in the log."""
    probes = sum(metric(text, "ddpm_requests_total", outcome=outcome, endpoint=path) for path in PROBED)
    quiet = probes if outcome in ("ok", "not_ready") else 0
    return metric(text, "ddpm_requests_total", outcome=outcome) - quiet


def resident(pid: int) -> int:
    """A process's memory, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def quantiles(text: str, name: str, parts: tuple[float, ...] = (0.5, 0.99, 1.0)) -> list[float]:
    """Upper bounds of a histogram's quantiles, over all of its labels; none where nothing was counted."""
    buckets: Counter[float] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{name}_bucket":
                buckets[float(sample.labels["le"])] += int(sample.value)
    total = max(buckets.values(), default=0)
    return [min(le for le, n in buckets.items() if n >= part * total) for part in parts] if total else []


def told(numbers: list[float]) -> str:
    """For a report."""
    return ", ".join(f"{number:g}" for number in numbers) or "none"


def percentiles(seconds: list[float], parts: tuple[float, ...] = (0.5, 0.99, 1)) -> str:
    """Of what was measured, in seconds; 1 is the longest."""
    ordered = sorted(seconds)
    if not ordered:
        return "none"
    return told([round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 3) for part in parts])
