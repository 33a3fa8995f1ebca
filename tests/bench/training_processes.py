"""python -m tests.bench.training_processes: training on a CPU's cores, as threads of one process or as processes.

Each contender is a real `training.train`, kept in memory and stopped but in its turns. A process of several has a
thread and a core of its own, and their gradients are averaged, as under torchrun. Not a test: pytest does not collect
it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.bench.timing import circumstances
from training.cli import command

CORES = sorted(os.sched_getaffinity(0))
CONTENDERS = {"a process, 1 thread": (1, 1)}
CONTENDERS[f"a process, {len(CORES)} threads"] = (1, len(CORES))
CONTENDERS[f"{len(CORES)} processes, 1 thread each"] = (len(CORES), 1)
NEVER = "1000000"
OWN = {"device", "run_name", "log_rate", "iterations", "checkpoint_rate", "log_dir"}


class Contender:
    """A run of training, in `processes` of so many `threads`."""

    def __init__(self, processes: int, threads: int, folder: Path, options: list[str], batch: int) -> None:
        self.log, self.batch, self.rates = folder / "run/log.jsonl", batch, list[float]()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        every = f"--device cpu --run_name run --batch_size {batch} --log_rate 1 --iterations {NEVER}"
        words = [sys.executable, "-m", "training.train", *options, *every.split(), "--checkpoint_rate", NEVER]
        words += ["--log_dir", str(folder)]
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = []
        with (folder / "output").open("w") as output:
            for rank in range(processes):
                cores = ",".join(map(str, CORES[rank : rank + threads]))
                ranked = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
                env = {**os.environ, "OMP_NUM_THREADS": str(threads), **ranked}
                pinned = ["taskset", "-c", cores, *words]
                self.processes.append(subprocess.Popen(pinned, env=env, stdout=output, stderr=output))

    def steps(self) -> int:
        """How many are in the log."""
        return self.log.read_text().count("train_loss") if self.log.exists() else 0

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def wait(self, steps: int) -> None:
        """Until it has made so many."""
        while self.steps() < steps:
            if any(process.poll() is not None for process in self.processes):
                sys.exit(f"training ended: {(self.log.parents[1] / 'output').read_text()[-2000:]}")
            time.sleep(0.02)

    def turn(self, seconds: float) -> None:
        """Goes on alone for so long, from the end of one step to the end of another; adds images/s to `rates`."""
        self.signal(signal.SIGCONT)
        self.wait(self.steps() + 2)
        first, begun = self.steps(), time.perf_counter()
        time.sleep(seconds)
        self.wait(self.steps() + 1)
        self.rates.append(self.batch * (self.steps() - first) / (time.perf_counter() - begun))
        self.signal(signal.SIGSTOP)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Its own options, and those of training.train, which it refuses as that would."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.training_processes",
        description="Times threads against processes. Other options go to training.train.",
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", type=float, default=20, help="seconds (default: 20)")
    args, options = parser.parse_known_args(argv)
    if own := OWN & {option.partition("=")[0].removeprefix("--") for option in options}:
        parser.error(f"--{', --'.join(sorted(own))}: this has its own")
    command.parse([*options, "--batch_size", str(args.batch_size)])
    return args, options


def main(argv: list[str]) -> None:
    args, options = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it takes its processes along
    contenders: dict[str, Contender] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, (processes, threads) in CONTENDERS.items():
                (place := Path(folder) / name).mkdir()
                contenders[name] = Contender(processes, threads, place, options, args.batch_size)
            for contender in contenders.values():  # all compile at once
                contender.wait(4)
                contender.signal(signal.SIGSTOP)
            for i in range(args.rounds):
                order = list(contenders.values())
                for contender in order[i % len(order) :] + order[: i % len(order)]:
                    contender.turn(args.turn)
        finally:
            for contender in contenders.values():
                contender.signal(signal.SIGKILL)
                for process in contender.processes:
                    process.wait()
    baseline = contenders[next(iter(contenders))]
    print(f"`{shlex.join(['python', '-m', 'tests.bench.training_processes', *argv])}`")
    print(f"{circumstances(torch.device('cpu'))}; median of {args.rounds} rounds\n")
    print("| | images/s | times the first (range) |\n|---|---:|---:|")
    for name, contender in contenders.items():
        times = [mine / first for mine, first in zip(contender.rates, baseline.rates, strict=True)]
        spread = f"{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})"
        print(f"| {name} | {statistics.median(contender.rates):.1f} | {spread} |")


if __name__ == "__main__":
    main(sys.argv[1:])
