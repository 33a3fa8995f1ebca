"""From records to numbers. An answer that never came took infinitely long: it counts in every percentile."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.bench.serving.workloads import Arrival

Records = Sequence[Sequence[Any]]  # [status, first, done, late, error] each


def latencies(records: Records) -> np.ndarray:
    """Seconds since the intended arrival."""
    return np.array([done if status == 200 else math.inf for status, _, done, _, _ in records])


def percentile(values: np.ndarray, percent: float) -> float:
    """The smallest value that so many percent are not above."""
    return float(np.sort(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)])


def slowdowns(trace: Sequence[Arrival], records: Records, alone_s: dict[str, float]) -> np.ndarray:
    """Latency over what the baseline loop, with nothing else to do and no server around it, takes for the request."""
    return latencies(records) / np.array([alone_s[f"{a.n}x{a.steps}"] for a in trace])


def summary(trace: Sequence[Arrival], records: Records, alone_s: dict[str, float]) -> dict[str, float]:
    """Of one workload."""
    times, slow = latencies(records), slowdowns(trace, records, alone_s)
    whole = np.isfinite(times)
    last = max((a.at + t for a, t in zip(trace, times, strict=True) if math.isfinite(t)), default=math.inf)
    images = sum(a.n for a, ok in zip(trace, whole, strict=True) if ok)
    return {
        "images_s": images / last,
        "p50": percentile(times, 50),
        "p95": percentile(times, 95),
        "p99": percentile(times, 99),
        "slow50": percentile(slow, 50),
        "slow95": percentile(slow, 95),
        "failed": int((~whole).sum()),
        "requests": len(trace),
    }


def middle(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The summaries of several rounds: the median of each number, but the sum of what is counted."""
    columns = {key: [one[key] for one in found] for key in found[0]}
    counted = ("failed", "requests")
    return {key: sum(column) if key in counted else statistics.median(column) for key, column in columns.items()}


def turns(results: dict[str, Any], name: str, key: str) -> list[dict[str, Any]]:
    """What a server measured in each round that it got as far as `key` in."""
    return [found[name] for found in results["rounds"] if key in found.get(name, {})]


def first_pictures(records: Records) -> np.ndarray:
    """Seconds to the first frame, or to the answer of those that do not stream."""
    return np.array([first if status == 200 and first is not None else math.inf for status, first, *_ in records])


def goodput(trace: Sequence[Arrival], records: Records, deadline_s: float, until: float) -> float:
    """Image-steps a second whose images came within the deadline: those that came in [deadline, until], when the
    queue is as full as it gets."""
    ends = [
        (a.work, a.at + done)
        for a, (status, _, done, *_) in zip(trace, records, strict=True)
        if status == 200 and done <= deadline_s
    ]
    return sum(work for work, end in ends if deadline_s <= end <= until) / (until - deadline_s)


def recovery(trace: Sequence[Arrival], records: Records, deadline_s: float, until: float) -> float:
    """Seconds after the overload, of arrivals, until every request is answered in time again; inf: not in the trace."""
    late = [
        a.at - until
        for a, (status, _, done, *_) in zip(trace, records, strict=True)
        if a.at >= until and not (status == 200 and done <= deadline_s)
    ]
    last = max(a.at for a in trace) - until
    if not late:
        return 0.0
    return math.inf if max(late) >= last else max(late)


def outcomes(records: Records) -> tuple[float, float]:
    """Shares that were refused by an answer, and that nobody answered in time."""
    refused = sum(status not in (0, 200) for status, *_ in records)
    return refused / len(records), sum(status == 0 for status, *_ in records) / len(records)


def score(row: dict[str, Any]) -> float:
    """Of a sweep's setting, the less the better: the geometric mean of p50 and p95 of both mixed workloads."""
    if "unavailable" in row:
        return math.inf
    values = [row[kind][key] for kind in ("mixed steps", "mixed n") for key in ("p50", "p95")]
    return math.prod(values) ** (1 / len(values))
