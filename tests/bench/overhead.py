"""What the server costs: images a second through HTTP at saturation, beside the baseline loop on the same weights.

    python -m tests.bench.overhead [--rounds N] [--seconds S] [--threads N] [--clients N]
    python -m tests.bench.overhead --pngs     # only: what a step takes while pictures are encoded

Both run the same schedule in batches of 16 rows; the loop makes no pictures, HTTP makes PNGs. They take turns, and the
ratio is the median of the rounds'. For half as long again somebody asks for /livez, twenty times a second, and the
server's own metric tells of the event loop's pauses. The clients need the same cores: how much of them they took is
told, and the ratio of what they left.

With --pngs a step's duration is the median over tenths of a second, by the server's metric. Clients ask for PNGs of
many steps, for PNGs of few steps, and for zips of PNGs of few steps; batches are of 16 rows in all three. Not a test.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import torch
from prometheus_client.parser import text_string_to_metric_families

from model import checkpoint
from model.backends.compile import best_precision, compile_for_inference
from model.malloc import tune_malloc
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.app.processes import ServerProcess, metric, wait_for

CPU = torch.device("cpu")
ROWS = 16
BODY = {"n": ROWS, "class_label": 3, "guidance_scale": 1, "sampler": "ddim"}
LOADS: dict[str, tuple[dict[str, Any], str]] = {
    "PNGs of 16 images, 40 steps": ({"steps": 40}, "image/png"),
    "PNGs of 16 images, 2 steps": ({"steps": 2}, "image/png"),
    "zips of 16 PNGs, 2 steps": ({"steps": 2}, "application/zip"),
}
WINDOW_S = 0.1


@contextmanager
def load(server: ServerProcess, clients: int, body: dict[str, Any], accept: str) -> Iterator[None]:
    """So many clients ask again and again; the block begins when nearly all of them wait."""
    stop = threading.Event()

    def work() -> None:
        with httpx.Client(base_url=server.url, timeout=600, headers={"Accept": accept}) as client:
            while not stop.is_set():
                client.post("/generate", json=BODY | body).raise_for_status()

    workers = [threading.Thread(target=work) for _ in range(clients)]
    for worker in workers:
        worker.start()
    wait_for(lambda: server.samples_in_flight() > ROWS * (clients - 2), "all clients")
    yield
    stop.set()
    for worker in workers:
        worker.join()


class Turn:
    """One turn of HTTP: images a second, the part of a core that the clients took, and how others fared meanwhile."""

    def __init__(self, server: ServerProcess, clients: int, steps: int, seconds: float) -> None:
        self.livez: list[float] = []
        with load(server, clients, {"steps": steps}, "image/png"):
            before, started, own = server.client.get("/metrics").text, time.perf_counter(), time.process_time()
            time.sleep(seconds)
            after, took = server.client.get("/metrics").text, time.perf_counter() - started
            self.clients = (time.process_time() - own) / took
            asking = time.perf_counter()
            while time.perf_counter() - asking < seconds / 2:
                asked = time.perf_counter()
                server.client.get("/livez").raise_for_status()
                self.livez.append(time.perf_counter() - asked)
                time.sleep(0.05)
            last = server.client.get("/metrics").text
        self.rate = grown("ddpm_image_steps_total", before, after) / steps / took
        earlier, later = pauses(before), pauses(last)
        self.pauses = {bound: later[bound] - earlier[bound] for bound in later}
        self.longest = metric(last, "ddpm_event_loop_max_lag_seconds")


def grown(name: str, before: str, after: str) -> float:
    """By how much a counter did."""
    return metric(after, name) - metric(before, name)


def pauses(text: str) -> dict[float, float]:
    """How many of the event loop's pauses were at most so long."""
    return {
        float(sample.labels["le"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "ddpm_event_loop_lag_seconds_bucket"
    }


def compare_rates(server: ServerProcess, baseline: Callable[[], float], args: argparse.Namespace) -> None:
    """Prints images a second of both, and what became of the event loop."""
    ratios, turns = [], []
    baseline()
    for _ in range(args.rounds):
        loop, turn = baseline(), Turn(server, args.clients, args.steps, args.seconds)
        turns.append(turn)
        ratios.append((turn.rate / loop, turn.rate / loop / (1 - turn.clients / args.cores)))
        both = f"loop {loop:.2f} images/s, HTTP {turn.rate:.2f}: {ratios[-1][0]:.3f}"
        print(f"{both}; the clients took {turn.clients:.1%} of a core", flush=True)
    plain, left = (statistics.median(column) for column in zip(*ratios, strict=True))
    how = f"{args.precision}, {args.threads} threads, {args.steps} steps, {args.clients} clients"
    print(f"{how}: HTTP gives {plain:.1%}, and {left:.1%} of what the clients left of {args.cores} cores")
    livez = [seconds for turn in turns for seconds in turn.livez]
    print(f"/livez: median {1e3 * statistics.median(livez):.1f} ms, longest {1e3 * max(livez):.1f} of {len(livez)}")
    below = {bound: sum(turn.pauses[bound] for turn in turns) for bound in turns[0].pauses}
    most = max(below.values())
    p99, all_of_them = (1e3 * min(b for b, count in below.items() if count >= part * most) for part in (0.99, 1))
    longest = 1e3 * max(turn.longest for turn in turns)
    print(f"event loop: of {most:.0f} pauses 99 % at most {p99:g} ms and all at most {all_of_them:g} ms")
    print(f"event loop: longest pause of any minute {longest:.1f} ms, turns of the baseline loop among them")


def compare_steps(server: ServerProcess, baseline: Callable[[], float], args: argparse.Namespace) -> None:
    """Prints a step's duration under each load, and in the baseline loop."""
    loops: list[float] = []
    steps: dict[str, list[float]] = {name: [] for name in LOADS}
    totals: dict[str, list[tuple[float, ...]]] = {name: [] for name in LOADS}
    baseline()
    for _ in range(args.rounds):
        loops.append(ROWS / baseline() / args.steps)
        for name, (body, accept) in LOADS.items():
            with load(server, args.clients, body, accept):
                first = last = server.client.get("/metrics").text
                started = time.perf_counter()
                while time.perf_counter() - started < args.seconds:
                    time.sleep(WINDOW_S)
                    text = server.client.get("/metrics").text
                    if count := grown("ddpm_step_seconds_count", last, text):
                        steps[name].append(grown("ddpm_step_seconds_sum", last, text) / count)
                    last = text
                took = time.perf_counter() - started
            names = ("ddpm_batch_size_sum", "ddpm_batch_size_count", "ddpm_encode_seconds_count")
            totals[name].append((*(grown(each, first, last) for each in names), took))
    base = statistics.median(loops)
    how = f"{args.precision}, {args.threads} threads, {args.clients} clients"
    print(f"{how}; the baseline loop: {1e3 * base:.2f} ms a step")
    for name in LOADS:
        rows, count, encoded, took = (sum(column) for column in zip(*totals[name], strict=True))
        took_by_step = statistics.median(steps[name])
        each = ROWS if "zip" in LOADS[name][1] else 1
        print(
            f"{name}: {1e3 * took_by_step:.2f} ms a step ({took_by_step / base:.3f} of the loop's), "
            f"{rows / count:.2f} rows in the mean batch, {each * encoded / took:.1f} PNGs a second"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pngs", action="store_true", help="a step's duration while pictures are encoded, or not")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tune_malloc()  # as the server does
    loaded = checkpoint.load("mnist")
    args.precision, args.cores = best_precision(CPU), len(os.sched_getaffinity(0))
    network = compile_for_inference(loaded.network, CPU, args.precision)
    schedule = make_schedule(loaded.diffusion, "ddim", args.steps)
    shape = loaded.config.unet.image_shape

    def baseline() -> float:
        """Images a second."""
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < args.seconds:
            sample(network, schedule, shape, [count] * ROWS, range(ROWS), [3] * ROWS, null_class=10)
            count += 1
        return ROWS * count / (time.perf_counter() - started)

    argv = ["--checkpoint", "mnist", "--max-batch-size", str(ROWS), "--threads", str(args.threads)]
    with ServerProcess("app", *argv, fresh=True) as server:
        (compare_steps if args.pngs else compare_rates)(server, baseline, args)


if __name__ == "__main__":
    main()
