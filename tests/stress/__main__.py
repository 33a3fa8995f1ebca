"""Loads server processes, part by part, and says what became of them. Exit code 1 if anything is wrong.

make stress                                 all parts; the mixed load lasts ten minutes
make stress ARGS="--minutes 60"
make stress ARGS="disconnects malformed"        only these; the report keeps what it has of the others
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.app.conftest import CLASSES, GREY, write_checkpoint
from tests.app.processes import ServerProcess
from tests.bench.timing import circumstances
from tests.stress import report
from tests.stress.client_disconnects import run_disconnects
from tests.stress.corrupt_checkpoints import fuzz_checkpoints, settings
from tests.stress.crash_recovery import run_crashes
from tests.stress.flood import run_malformed_requests
from tests.stress.mixed_load import FAULTY, run_mixed_load
from tests.stress.resources import Findings
from tests.stress.schema import fuzz
from tests.stress.slow_readers import SEND_BUFFER, run_slow_readers


def parse(argv: list[str]) -> argparse.Namespace:
    """What to run, and how much of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description="loads servers, and says what broke")
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    add("--minutes", type=float, default=10, help="of mixed load with recoverable faults (default: 10)")
    add("--overload-s", type=float, default=60, help="seconds of ten times too much work after it (default: 60)")
    add("--clients", type=int, default=1000, help="clients that disconnect (default: 1000)")
    add("--requests", type=int, default=100_000, help="malformed requests (default: 100000)")
    add("--files", type=int, default=1000, help="corrupt checkpoints (default: 1000)")
    add("--examples", type=int, default=200, help="of each operation, for schemathesis (default: 200)")
    add("--readers", type=int, default=16, help="that read slowly (default: 16)")
    add("--slow-s", type=float, default=60, help="seconds for which they do (default: 60)")
    add("--seed", type=int, default=0, help="of the clients' choices")
    add("--note", default="", help="about the machine, for the report")
    add("--results", type=Path, default=Path("build/stress.json"), help="file for the results of all parts")
    add("--report", type=Path, default=Path("build/stress.md"), help="file for the page")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and not without ending the servers
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of every byte written to a server that hung up
    parts = report.read(args.results) if args.parts else {}
    for name in args.parts or PARTS:
        what, run = PARTS[name]
        with tempfile.TemporaryDirectory() as folder:
            checkpoints = [
                write_checkpoint(Path(folder) / f"grey-{seed}.safetensors", GREY, CLASSES, seed) for seed in (0, 1)
            ]
            sha256 = hashlib.sha256(checkpoints[0].read_bytes()).hexdigest()
            started = time.monotonic()
            findings = run(args, Path(folder), checkpoints)
            seconds = time.monotonic() - started
        about = [circumstances(torch.device("cpu")), args.note, f"checkpoint {sha256[:8]} (random weights)"]
        command = shlex.join(["python", "-m", "tests.stress", name, *OPTIONS[name](args)])
        parts[name] = report.part_of(
            name, what.format(**vars(args)), command, "; ".join(filter(None, about)), seconds, findings
        )
        report.write(args.results, parts)
        print(report.render([parts[name]]), flush=True)
    ordered = [parts[name] for name in PARTS if name in parts]
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(report.render(ordered))
    return 1 if any(part.wrong for part in ordered) else 0


def _disconnects(args: argparse.Namespace, folder: Path, checkpoints: list[Path]) -> Findings:
    argv = ["--checkpoint", str(checkpoints[0]), "--max-batch-size", "16", "--read-timeout-s", "3"]
    with ServerProcess(FAULTY, *argv, fresh=True) as server:
        return run_disconnects(server, args.clients, args.seed)


def _malformed(args: argparse.Namespace, folder: Path, checkpoints: list[Path]) -> Findings:
    with ServerProcess("app", "--checkpoint", str(checkpoints[0]), "--read-timeout-s", "3", fresh=True) as server:
        return run_malformed_requests(server, args.requests, args.seed)


def _schema(args: argparse.Namespace, folder: Path, checkpoints: list[Path]) -> Findings:
    with ServerProcess("app", "--checkpoint", str(checkpoints[0]), *settings(folder), fresh=True) as server:
        return fuzz(server.url, folder, args.examples)


def _corrupt(args: argparse.Namespace, folder: Path, checkpoints: list[Path]) -> Findings:
    argv = ["--checkpoint", str(checkpoints[0]), "--max-batch-size", "8", *settings(folder)]
    with ServerProcess("app", *argv, fresh=True) as server:
        return fuzz_checkpoints(server, folder, checkpoints[0], args.files, args.seed)


def _slow(args: argparse.Namespace, folder: Path, checkpoints: list[Path]) -> Findings:
    argv = ["--checkpoint", str(checkpoints[0]), "--write-timeout-s", "3600"]
    with ServerProcess(FAULTY, *argv, SEND_BUFFER=SEND_BUFFER, fresh=True) as server:
        return run_slow_readers(server, args.readers, args.slow_s)


def _mixed(args: argparse.Namespace, folder: Path, checkpoints: list[Path]) -> Findings:
    return run_mixed_load(checkpoints, 60 * args.minutes, args.overload_s, args.seed)


def _crashes(args: argparse.Namespace, folder: Path, checkpoints: list[Path]) -> Findings:
    return run_crashes(checkpoints[0])


PARTS: dict[str, tuple[str, Callable[[argparse.Namespace, Path, list[Path]], Findings]]] = {
    "disconnects": ("{clients:,} clients that disconnect, at six moments alike", _disconnects),
    "malformed": ("{requests:,} malformed requests", _malformed),
    "schema": ("/openapi.json by schemathesis, all checks, edges of all fields, {examples} examples", _schema),
    "corrupt": ("{files:,} corrupt checkpoints, loaded beside one that is served", _corrupt),
    "slow": ("{readers} readers of streams at a byte a second for {slow_s:g} s", _slow),
    "mixed": ("{minutes:g} minutes of all clients and faults, and {overload_s:g} s of ten times too much work", _mixed),
    "crashes": (
        "fatal faults, kill -9 and SIGTERM under load; each process is the restart of the one before",
        _crashes,
    ),
}
OPTIONS: dict[str, Callable[[argparse.Namespace], list[str]]] = {
    "disconnects": lambda args: ["--clients", str(args.clients), "--seed", str(args.seed)],
    "malformed": lambda args: ["--requests", str(args.requests), "--seed", str(args.seed)],
    "schema": lambda args: ["--examples", str(args.examples)],
    "corrupt": lambda args: ["--files", str(args.files), "--seed", str(args.seed)],
    "slow": lambda args: ["--readers", str(args.readers), "--slow-s", f"{args.slow_s:g}"],
    "mixed": lambda args: [
        *("--minutes", f"{args.minutes:g}", "--overload-s", f"{args.overload_s:g}", "--seed", str(args.seed))
    ],
    "crashes": lambda args: [],
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
