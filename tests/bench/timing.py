"""Interleaved timing: every round runs each candidate once, so that what else the machine does meets all of them."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version

import torch


@dataclass
class Candidate:
    """`run()` does the work once. `times`, in seconds, fill up round by round."""

    name: str
    run: Callable[[], object]
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def finish(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    run: Callable[[], object], device: torch.device, repeat: int = 1, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What one call takes, the mean of `repeat` calls in a row; the device's work is waited for."""
    finish(device)
    started = clock()
    for _ in range(repeat):
        run()
    finish(device)
    return (clock() - started) / repeat


def interleave(candidates: list[Candidate], args: argparse.Namespace, warmup: int, clock: Callable[[], float]) -> int:
    """Fills in `times`, one number a round, until all are done or `--seconds` over. Returns their number.

    Each round begins with another candidate.
    """
    device, started = torch.device(args.device), time.perf_counter()
    for candidate in candidates:
        seconds(candidate.run, device, warmup)
    for i in range(args.rounds):
        first = i % len(candidates)
        for candidate in candidates[first:] + candidates[:first]:
            candidate.times.append(seconds(candidate.run, device, clock=clock))
        if time.perf_counter() - started > args.seconds:
            return i + 1
    return args.rounds


def ratio(slow: Candidate, fast: Candidate) -> tuple[float, float, float]:
    """How many times as fast: the median of the rounds' ratios, the lowest, the highest."""
    ratios = [a / b for a, b in zip(slow.times, fast.times, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def matrix_peak(device: torch.device, clock: Callable[[], float]) -> float:
    """FLOP/s of a large bfloat16 matrix product, the best of several: what the machine could do at most."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16)
    seconds(lambda: a @ b, device, 3)
    return 2 * n**3 / min(seconds(lambda: a @ b, device, 5, clock) for _ in range(5))


def report(command: str, candidates: list[Candidate], args: argparse.Namespace, warmup: int, flops: float) -> None:
    """Times the candidates, the first of which is the baseline, and prints a table. One call is `flops`."""
    device = torch.device(args.device)
    clock = time.process_time if args.cpu_time else time.perf_counter
    peak = matrix_peak(device, clock)
    rounds = interleave(candidates, args, warmup, clock)
    print(f"`{command}`\n{circumstances(device)}")
    print(f"{flops / 1e9:.4g} GFLOP a call; bf16 matrix peak {peak / 1e12:.3g} TFLOP/s; median of {rounds} rounds\n")
    print(table(candidates, candidates[0], flops, peak, args.batch_size, args.cpu_time))


def add_options(parser: argparse.ArgumentParser, batch_size: int, candidates: str) -> None:
    """What both scripts take."""
    add = parser.add_argument
    add("--batch_size", type=int, default=batch_size)
    add("--rounds", type=int, default=7, help="each runs every candidate once (default: 7)")
    add("--seconds", type=float, default=1e9, help="begin no round after so long")
    add(
        "--cpu_time",
        action="store_true",
        help="count seconds of CPU, not of the clock: for one thread on a busy machine",
    )
    add("--candidates", default=candidates, help=f"the first is the baseline (default: {candidates})")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def table(candidates: list[Candidate], baseline: Candidate, flops: float, peak: float, images: int, cpu: bool) -> str:
    """Markdown: median time, images a second, how many times as fast as the baseline, share of the matrix peak."""
    lines = [
        f"| | ms{' of CPU' if cpu else ''} | images/s | times {baseline.name} (range) | of the peak |",
        "|---|---:|---:|---:|---:|",
    ]
    for c in candidates:
        middle, low, high = ratio(baseline, c)
        times = "1" if c is baseline else f"{middle:.2f} ({low:.2f}–{high:.2f})"
        cells = [c.name, f"{c.median * 1e3:.4g}", f"{images / c.median:.4g}", times, f"{flops / c.median / peak:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def circumstances(device: torch.device) -> str:
    """Machine, versions and date, in a sentence."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores of {processor()}, no GPU"
    return f"{machine}; torch {torch.__version__}, diffusers {version('diffusers')}; {date.today().isoformat()}"


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
