"""`python -m app.ray` with two replicas beside `python -m app`: overhead, streaming, a replica killed under load.

    python -m tests.bench.ray --rounds 15

Both run at once with one thread a replica; rounds alternate, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import httpx
import torch

from tests.bench.timing import circumstances

ROOT = Path(__file__).parents[2]
PORT, RAY_PORT, DISCOVERY = 18440, 18441, 18442
PATIENCE = 240.0


@contextmanager
def server(url: str, log: Path, *argv: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that is ready; it is drained in the end."""
    # Ray's workers would run at niceness 15, and lose every core to whatever else runs.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    command = [sys.executable, "-m", *argv]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        try:
            wait_for(lambda: process.poll() is not None or ready(url))
            assert process.poll() is None, log.read_text()
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            code = process.wait(PATIENCE)
            print(f"{argv[0]}: exit code {code}, {time.monotonic() - started:.1f} s after SIGTERM")


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def wait_for(condition: Callable[[], object]) -> float:
    """Polls until it holds. Returns the seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < PATIENCE, "it did not come true"
        time.sleep(0.1)
    return time.monotonic() - started


def targets() -> list[str]:
    try:
        found = httpx.get(f"http://127.0.0.1:{DISCOVERY}/targets", timeout=10)
    except httpx.HTTPError:  # not yet
        return []
    return list(found.json()[0]["targets"]) if found.status_code == 200 else []


def listener(port: int) -> int:
    """The process that listens on a port."""
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = [row[9] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"]
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it was closed
            if os.readlink(link) == f"socket:[{inodes[0]}]":
                return int(link.parts[2])
    raise LookupError(f"nobody listens on {port}")


def generate(client: httpx.Client, **body: object) -> float:
    started = time.perf_counter()
    client.post("/generate", json=body).raise_for_status()
    return time.perf_counter() - started


def burst(client: httpx.Client, clients: int, **body: object) -> float:
    """Images a second of so many requests at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda seed: generate(client, seed=seed, **body), range(clients)))
    return clients * int(str(body["n"])) / (time.perf_counter() - started)


def stream(client: httpx.Client, steps: int) -> tuple[float, list[float]]:
    """Seconds to the first frame, and between the others."""
    started, times = time.perf_counter(), []
    query = {"format": "sse", "n": 4, "steps": steps, "frames": steps, "seed": 1}
    with client.stream("GET", "/diffusion-sequence", params=query) as answer:
        for line in answer.iter_lines():
            if line == "event: frame":
                times.append(time.perf_counter() - started)
    return times[0], [after - before for before, after in pairwise(times)]


def overhead(direct: httpx.Client, ray: httpx.Client, rounds: int) -> None:
    measures: dict[str, tuple[str, Callable[[httpx.Client], float]]] = {
        "GET /livez": ("ms", lambda c: 1e3 * timed(lambda: c.get("/livez"))),
        "1 image, 10 steps": ("ms", lambda c: 1e3 * generate(c, n=1, steps=10, seed=1)),
        "8 clients, 2 images, 5 steps": ("images/s", lambda c: burst(c, 8, n=2, steps=5)),
        "stream of 4 images: first frame": ("ms", lambda c: 1e3 * stream(c, 10)[0]),
        "stream of 4 images: between frames": ("ms", lambda c: 1e3 * statistics.median(stream(c, 10)[1])),
    }
    for client in (direct, ray, ray, ray, ray):
        generate(client, n=4, steps=4)
    print("\n| | python -m app | app.ray, two replicas | ratio (lowest–highest of the rounds) |\n|---|---:|---:|---:|")
    for name, (unit, measure) in measures.items():
        pairs = []
        for i in range(rounds):
            order = (direct, ray) if i % 2 else (ray, direct)
            found = {id(client): measure(client) for client in order}
            pairs.append((found[id(direct)], found[id(ray)]))
        a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(theirs / ours for ours, theirs in pairs)
        span = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
        print(f"| {name}, {unit} | {a:.3g} | {b:.3g} | {span} |", flush=True)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def kill(url: str) -> None:
    """SIGKILL to one of two replicas while clients send requests and read streams."""
    outcomes: list[tuple[float, str]] = []
    over = threading.Event()

    def images(seed: int) -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            while not over.is_set():
                body = {"n": 2, "steps": 20, "seed": seed}
                try:
                    answer = client.post("/generate", json=body)
                    clear = answer.status_code == 200 or "error" in json.loads(answer.content)
                    outcome = f"{answer.status_code}" + ("" if clear else f" {answer.text[:60]!r}")
                except (httpx.HTTPError, json.JSONDecodeError) as error:
                    outcome = repr(error)
                outcomes.append((time.monotonic(), outcome))

    def streams() -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            while not over.is_set():
                try:
                    with client.stream("GET", "/diffusion-sequence", params={"format": "sse", "steps": 40}) as answer:
                        last = [line for line in answer.iter_lines() if line.startswith("event:")][-1]
                    outcomes.append((time.monotonic(), f"stream ends with {last}"))
                except httpx.HTTPError as error:
                    outcomes.append((time.monotonic(), f"stream cut: {type(error).__name__}"))

    threads = [threading.Thread(target=images, args=(seed,)) for seed in range(6)]
    threads += [threading.Thread(target=streams) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(8)
    before = set(targets())
    victim = listener(int(min(before).rpartition(":")[2]))
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    back = wait_for(lambda: len(set(targets()) - before) == 1 and len(targets()) == 2)
    time.sleep(8)
    over.set()
    for thread in threads:
        thread.join()
    print(f"\nKilled one of two replicas under load; Prometheus' list had two again after {back:.0f} s.")
    print("before the kill:", dict(Counter(what for when, what in outcomes if when < killed)))
    print("after it:       ", dict(Counter(what for when, what in outcomes if when >= killed)))
    gap = max(b - a for (a, _), (b, _) in pairwise(outcomes) if b >= killed)
    print(f"longest time without any answer after the kill: {gap:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["overhead", "kill"])
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{circumstances(torch.device('cpu'))}; {len(os.sched_getaffinity(0))} of the cores used")
    direct, through = f"http://127.0.0.1:{PORT}", f"http://127.0.0.1:{RAY_PORT}"
    common = ["--threads", "1"]
    share = ["--replica-cpus", "0.5", "--min-replicas", "2", "--max-replicas", "2"]
    ports = ["--port", str(RAY_PORT), "--discovery-port", str(DISCOVERY)]
    with server(through, args.logs / "bench-ray.log", "app.ray", *ports, *share, *common):
        wait_for(lambda: len(targets()) == 2)
        if args.only != "kill":
            with server(direct, args.logs / "bench-app.log", "app", "--port", str(PORT), *common):
                clients = [httpx.Client(base_url=url, timeout=PATIENCE) for url in (direct, through)]
                overhead(*clients, args.rounds)
                for client in clients:
                    client.close()
        if args.only != "overhead":
            kill(through)


if __name__ == "__main__":
    main()
