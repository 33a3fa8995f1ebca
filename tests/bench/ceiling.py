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
import statistics
from pathlib import Path

from tests.bench.tree_server import TreeServer, get, post, trees

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


def free_server(tree: Path) -> TreeServer:
    """A server of a tree whose network costs nothing."""
    return TreeServer(tree, "-c", FREE, "--threads", "1", OMP_NUM_THREADS="1")


def turn(server: TreeServer, args: argparse.Namespace, path: str, body: dict[str, object]) -> tuple[float, ...]:
    """Requests a second, milliseconds of latency (median), milliseconds of the processor for a request."""
    path, _, accept = path.partition(" ")
    request = post(path, body | {"sampler": "ddim", "guidance_scale": 1}, accept) if body else get(path)
    load = server.load(args.clients, args.seconds, request)
    count = len(load.latencies)
    return count / load.seconds, 1e3 * statistics.median(load.latencies), 1e3 * load.cpu_s / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="", help="another tree of this repository; none: this one alone")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    servers = {name: free_server(tree) for name, tree in trees(args.baseline).items()}
    print(f"{args.clients} clients\n\n| | tree | requests/s | images/s | median ms | processor ms |")
    print("|---|---|---|---|---|---|")
    try:
        for load, (path, body) in LOADS.items():
            turns: dict[str, list[tuple[float, ...]]] = {name: [] for name in servers}
            for _ in range(args.rounds):
                for name, server in servers.items():
                    turns[name].append(turn(server, args, path, body))
            for name, values in turns.items():
                rate, latency, cpu = (statistics.median(column) for column in zip(*values, strict=True))
                images = rate * int(load.split()[1].strip(","))
                print(f"| {load} | {name} | {rate:.0f} | {images:.0f} | {latency:.1f} | {cpu:.2f} |", flush=True)
    finally:
        for server in servers.values():
            server.close()


if __name__ == "__main__":
    main()
