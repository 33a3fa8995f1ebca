"""What the server can do beside the network: requests and images a second where the network costs nothing.

    git worktree add build/baseline COMMIT
    python -m tests.bench.ceiling [--baseline build/baseline] [--clients 16] [--seconds 3] [--rounds 3]

Servers of this tree and of the baseline, in turns. A network call returns zeros. The client is the same for both:
connections that are kept, each of which asks again as soon as it has its answer. Milliseconds of the processor are the
server's own for each request, which a busy machine changes least. Medians of the rounds. Not a test: pytest does not
collect it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

HERE = Path(__file__).parents[2]
LOADS = {
    f"n {n}, {steps} steps, {kind}": (f"/generate {kind}", {"n": n, "steps": steps, "class_label": 7})
    for n, steps, kind in ((1, 1, "image/png"), (1, 4, "image/png"), (16, 4, "image/png"), (16, 4, "application/json"))
}
LOADS["n 1, 4 steps, event stream"] = ("/diffusion-sequence?n=1&steps=4&frames=4&format=sse&class_label=7", {})
FREE = """
import sys, torch
from app.engine import runner
runner.compile_for_inference = lambda network, device, precision: lambda x, t, y: torch.zeros_like(x)
from app.__main__ import read_settings, serve
serve(read_settings(sys.argv[1:]))
"""


class FreeServer:
    """A server of a tree whose network costs nothing."""

    def __init__(self, tree: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}
        command = [sys.executable, "-c", FREE, "--port", "0", "--threads", "1"]
        environment = kept | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        found = next(filter(None, (re.search(r"running on http://([\d.]+):(\d+)", s) for s in self.process.stderr)))
        self.host, self.port = found[1], int(found[2])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        while httpx.get(f"http://{self.host}:{self.port}/readyz").status_code != 200:
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """Of its processor time so far, user's and system's."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def load(self, clients: int, seconds: float, path: str, body: dict[str, object]) -> tuple[float, float, float]:
        """Requests a second, milliseconds of latency (median), milliseconds of the processor for a request."""
        path, _, accept = path.partition(" ")
        request = f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode()
        if body:
            data = json.dumps(body | {"sampler": "ddim", "guidance_scale": 1}).encode()
            head = (
                f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nAccept: {accept}\r\nContent-Type: application/json\r\n"
            )
            request = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        before = self.cpu_seconds()
        latencies = asyncio.run(self._ask(clients, time.perf_counter() + seconds, request))
        cpu = self.cpu_seconds() - before
        count = len(latencies)
        return count / seconds, 1e3 * statistics.median(latencies), 1e3 * cpu / count

    async def _ask(self, clients: int, until: float, request: bytes) -> list[float]:
        latencies: list[float] = []

        async def client() -> None:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            while time.perf_counter() < until:
                begun = time.perf_counter()
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 200"):
                    raise SystemExit(head.decode())
                if length := re.search(rb"(?i)content-length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
                else:
                    await reader.readuntil(b"\r\n0\r\n\r\n")
                latencies.append(time.perf_counter() - begun)
            writer.close()

        await asyncio.gather(*(client() for _ in range(clients)))
        return latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="", help="another tree of this repository; none: this one alone")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    trees = {"this": HERE} | ({"baseline": Path(args.baseline).resolve()} if args.baseline else {})
    servers = {name: FreeServer(tree) for name, tree in trees.items()}
    print(f"{args.clients} clients\n\n| | tree | requests/s | images/s | median ms | processor ms |")
    print("|---|---|---|---|---|---|")
    try:
        for load, (path, body) in LOADS.items():
            turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in servers}
            for _ in range(args.rounds):
                for name, server in servers.items():
                    turns[name].append(server.load(args.clients, args.seconds, path, body))
            for name, values in turns.items():
                rate, latency, cpu = (statistics.median(column) for column in zip(*values, strict=True))
                images = rate * int(load.split()[1].strip(","))
                print(f"| {load} | {name} | {rate:.0f} | {images:.0f} | {latency:.1f} | {cpu:.2f} |", flush=True)
    finally:
        for server in servers.values():
            server.process.kill()
            server.process.wait()


if __name__ == "__main__":
    main()
