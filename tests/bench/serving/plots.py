"""Two pictures: how latency is distributed at 75 % load, and what overload does to goodput."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from tests.bench.serving.numbers import goodput, latencies, slowdowns, turns
from tests.bench.serving.servers import SERVERS
from tests.bench.serving.workloads import Arrival

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLES = {name: {"color": f"C{i}", "linewidth": 2.5 if name == "ours" else 1.2} for i, name in enumerate(SERVERS)}


def latency(results: dict[str, Any], traces: dict[str, list[Arrival]], path: Path) -> None:
    """Latency and slowdown of both mixed workloads, all rounds: the share of requests that took longer."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharey=True, layout="constrained")
    for row, kind in zip(axes, ("mixed steps", "mixed n"), strict=True):
        for name in SERVERS:
            ran = [turn[kind] for turn in turns(results, name, kind)]
            if not ran:
                continue
            times = np.concatenate([latencies(records) for records in ran])
            slow = np.concatenate([slowdowns(traces[kind], records, results["baseline"]["alone_s"]) for records in ran])
            for axis, values in zip(row, (times, slow), strict=True):
                values = np.sort(values)
                share = 1 - np.arange(len(values)) / len(values)
                axis.plot(values, share, drawstyle="steps-post", label=SERVERS[name].title, **STYLES[name])
        for axis, what in zip(row, ("latency, s", "slowdown"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel=what, title=f"{kind}, 75 % of capacity")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("share of requests that took longer")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def overload(results: dict[str, Any], traces: dict[str, list[Arrival]], path: Path) -> None:
    """Goodput over offered load, both as fractions of the baseline loop's capacity."""
    where, capacity = results["circumstances"], results["baseline"]["capacity"]
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name in SERVERS:
        offered, shares = [], []
        for level in (trace for trace in traces if trace.startswith("overload")):
            ran = turns(results, name, level)
            good = [goodput(traces[level], turn[level], where["deadline_s"], where["overload_s"]) for turn in ran]
            if good:
                offered.append(float(level.split()[1]))
                shares.append(statistics.median(good) / capacity)
        if offered:
            axis.plot(offered, shares, marker="o", label=SERVERS[name].title, **STYLES[name])
    axis.plot([0.5, 1, 3], [0.5, 1, 1], color="grey", linestyle=":", label="as much as there is")
    axis.set(xlabel="offered load, of capacity", ylabel="goodput, of capacity", ylim=(0, None))
    axis.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=100)
    plt.close(figure)
