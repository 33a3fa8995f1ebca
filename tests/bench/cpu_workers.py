"""Servers on a CPU, in turns: this tree against another one's, on a machine that is quiet, or busy beside it.

    git worktree add build/baseline COMMIT
    python -m tests.bench.cpu_workers --baseline build/baseline [--checkpoints mnist,cifar10,ho2020] [--rows 1,2,8,32]
        [--rounds 5] [--seconds 60] [--neighbours 1]

Each contender is a server process with its defaults, or with `--threads 1`. In each round each one answers a request
of as many images as there are rows, without guidance, and a guided one of a single image (row "guided"). Milliseconds
of a step are medians over the rounds. `--neighbours` processes spin meanwhile. `ho2020` is a network of 35.7 million
parameters with random weights. Ready is from the process's start to the first 200 of /readyz, one server at a time,
beside the neighbours. Not a test: pytest does not collect it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from tests.bench.timing import circumstances
from tests.bench.tree_server import TreeServer, trees

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]


class Contender:
    """A server of a tree, with its flags."""

    def __init__(self, name: str, tree: Path, source: str, *flags: str) -> None:
        self.name, self.times = name, dict[str, list[float]]()
        self.server = TreeServer(tree, "-m", "app", "--checkpoint", source, *flags)

    def step_ms(self, rows: str, steps: int) -> None:
        """One request; adds the milliseconds of a step to its times."""
        body = {"n": 1, "steps": steps, "sampler": "ddim", "seed": 1, "guidance_scale": 2}
        if rows != "guided":
            body |= {"n": int(rows), "guidance_scale": 1}
        begun = time.perf_counter()
        self.server.client.post("/generate", json=body).raise_for_status()
        self.times.setdefault(rows, []).append(1e3 * (time.perf_counter() - begun) / steps)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that spin."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


LARGE = """
import sys
from model import checkpoint
from model.diffusion import DiffusionConfig
try:
    from model.unet import UNet, UNetConfig
except ImportError:  # it moved; asked for first, the new place would be found in an installed tree
    from model.nn.unet import UNet, UNetConfig
config = checkpoint.CheckpointConfig(UNetConfig(), DiffusionConfig(), ())
checkpoint.save(sys.argv[1], UNet(config.unet).state_dict(), config)
"""


def large(folder: Path, tree: Path) -> str:
    """A checkpoint of Ho et al.'s network, whose weights are random, by a tree's own code: it reads no later format."""
    made = str(folder / "ho2020.safetensors")
    subprocess.run([sys.executable, "-c", LARGE, made], cwd=tree, env={**os.environ, "PYTHONPATH": "."}, check=True)
    return made


def measure(name: str, source: str, args: argparse.Namespace) -> None:
    """Prints a table for one checkpoint."""
    with ExitStack() as stack:
        stack.enter_context(neighbours(args.neighbours))
        contenders = []
        for tree, path in trees(args.baseline).items():
            for flags in ((), ("--threads", "1")):
                contenders.append(Contender(" ".join([tree, *flags]), path, source, *flags))
                stack.callback(contenders[-1].server.close)
        rows = [row for row in args.rows.split(",") if name != "ho2020" or row != "guided"]
        for row in rows:
            until = time.perf_counter() + args.seconds
            for i in range(args.rounds + 1):
                for contender in contenders[i % len(contenders) :] + contenders[: i % len(contenders)]:
                    contender.step_ms(row, args.steps)
                if time.perf_counter() > until:
                    break
        print(f"\n{name}: ms a step, {args.neighbours} neighbours\n")
        print("| | ready s | " + " | ".join(rows) + " |\n|---|" + "---:|" * (len(rows) + 1))
        for c in contenders:
            cells = [f"{statistics.median(c.times[row][1:] or c.times[row]):.1f}" for row in rows]
            print(f"| {c.name} | {c.server.ready_s:.1f} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", default="", help="another tree of this repository; none: this one alone")
    parser.add_argument("--checkpoints", default="mnist,cifar10,ho2020")
    parser.add_argument("--rows", default="1,guided,4,8,16,32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20, help="begin no round of a number of rows after so long")
    parser.add_argument("--neighbours", type=int, default=0)
    args = parser.parse_args()
    print(circumstances(CPU))
    with tempfile.TemporaryDirectory() as folder:
        for name in args.checkpoints.split(","):
            oldest = Path(args.baseline or ROOT)
            measure(name, large(Path(folder), oldest) if name == "ho2020" else name, args)


if __name__ == "__main__":
    main()
