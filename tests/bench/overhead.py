"""What the server costs: images a second through HTTP at saturation, beside the naive loop on the same weights.

    python -m tests.bench.overhead [--rounds N] [--seconds S] [--threads N] [--clients N]

Both run the same plan in batches of 8 rows; the loop makes no pictures, HTTP makes PNGs. They take turns, and the ratio
is the median of the rounds'. Meanwhile somebody asks for /livez: the event loop's pauses. Not a test.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time

import httpx
import torch

from model import checkpoint
from model.inference import best_precision, compile_for_inference
from model.plan import make_plan
from model.sampling import sample
from tests.app.processes import ServerProcess, wait_for

CPU = torch.device("cpu")
ROWS = 8
BODY = {"n": ROWS, "class_label": 3, "guidance_scale": 1, "sampler": "ddim"}


def through_http(server: ServerProcess, clients: int, steps: int, seconds: float) -> tuple[float, list[float]]:
    """Images a second, by the server's count of image-steps while all clients wait, and what /livez took meanwhile."""
    stop = threading.Event()

    def work() -> None:
        with httpx.Client(base_url=server.url, timeout=600) as client:
            while not stop.is_set():
                client.post("/generate", json={**BODY, "steps": steps}).raise_for_status()

    workers = [threading.Thread(target=work) for _ in range(clients)]
    for worker in workers:
        worker.start()
    wait_for(lambda: server.rows() > ROWS * (clients - 2), "all clients")
    pauses = []
    before, started = server.metric("ddpm_image_steps_total"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        asked = time.perf_counter()
        server.client.get("/livez").raise_for_status()
        pauses.append(time.perf_counter() - asked)
        time.sleep(0.05)
    rate = (server.metric("ddpm_image_steps_total") - before) / steps / (time.perf_counter() - started)
    stop.set()
    for worker in workers:
        worker.join()
    return rate, pauses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = checkpoint.load("mnist")
    precision = best_precision(CPU)
    network = compile_for_inference(loaded.network, CPU, precision)
    plan = make_plan(loaded.diffusion, "ddim", args.steps)
    shape = loaded.config.unet.image_shape

    def naive() -> float:
        """Images a second."""
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < args.seconds:
            sample(network, plan, shape, [count] * ROWS, range(ROWS), [3] * ROWS, null_class=10)
            count += 1
        return ROWS * count / (time.perf_counter() - started)

    argv = ["--checkpoint", "mnist", "--max-batch-rows", str(ROWS), "--threads", str(args.threads)]
    rates: list[tuple[float, float]] = []
    pauses: list[float] = []
    with ServerProcess("app", *argv) as server:
        naive()
        for _ in range(args.rounds):
            loop = naive()
            http, asked = through_http(server, args.clients, args.steps, args.seconds)
            rates.append((loop, http))
            pauses += asked
            print(f"loop {loop:.2f} images/s, HTTP {http:.2f}: {http / loop:.3f}", flush=True)
    ratio = statistics.median(http / loop for loop, http in rates)
    print(f"{precision}, {args.threads} threads, {args.steps} steps, {args.clients} clients: HTTP gives {ratio:.1%}")
    print(f"/livez: median {1e3 * statistics.median(pauses):.1f} ms, longest {1e3 * max(pauses):.1f} of {len(pauses)}")


if __name__ == "__main__":
    main()
