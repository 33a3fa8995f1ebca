"""A server as a real process: started, waited for, asked, and ended with all that it started."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.serving.fixed_latency import tally_of
from tests.bench.serving.generator import parse
from tests.bench.serving.servers import ServerSpec
from tests.bench.serving.settings import Settings
from tests.bench.serving.workloads import Arrival

ROOT = Path(__file__).parents[3]
MARK = "SERVING_BENCH_RUN"  # an environment variable by which a server's processes are known, whatever they did
PR_SET_PDEATHSIG = 1
START_S, END_S, SETTLE_S = 180.0, 10.0, 20.0


class Unavailable(Exception):
    """It does not run here; the message is the reason."""


def free_port() -> int:
    """One that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Server:
    """A server that is ready."""

    spec: ServerSpec
    told: Settings
    folder: Path

    def run(
        self,
        arrivals: Sequence[Arrival],
        patience_s: float,
        *,
        streamed: bool = False,
        timeout_s: float | None = None,
        keep: bool = False,
    ) -> list[dict[str, Any]]:
        """The generator's record of each arrival. Clients wait for `patience_s`."""
        requests = [
            {
                "at": arrival.at,
                "raw": self.spec.request(arrival, streamed and bool(self.spec.stream), timeout_s),
                "patience": patience_s,
                "leaves": arrival.leaves,
                "keep": keep,
            }
            for arrival in arrivals
        ]
        job, result = self.folder / "job.json", self.folder / "result.json"
        job.write_text(json.dumps({"host": "127.0.0.1", "port": self.told.port, "requests": requests}))
        subprocess.run([sys.executable, "-m", "tests.bench.serving.generator", job, result], cwd=ROOT, check=True)
        found: list[dict[str, Any]] = json.loads(result.read_text())["records"]
        return found

    def settle(self) -> bool:
        """Waits until it has nothing left to do; whether that was soon enough."""
        until = time.monotonic() + SETTLE_S
        before = -1
        while time.monotonic() < until:
            with suppress(OSError, ValueError):
                if self.ask(Arrival(0, 1, 1, 0, 0), until - time.monotonic())[0] == 200:
                    done = self.image_steps()
                    if done == before + 1:  # nothing but the last probe was computed since
                        return True
                    before = done
            time.sleep(0.05)
        return False

    def ask(self, arrival: Arrival, patience_s: float) -> tuple[int, bytes]:
        """Status and body. Raises OSError or ValueError where there is no answer."""
        return exchange(self.told.port, self.spec.request(arrival), patience_s)

    def image_steps(self) -> int:
        """Those that it has computed."""
        if not self.spec.ours:
            return int(Path(self.told.counter).read_text())
        return round(self.metric("ddpm_image_steps_total"))

    def calls(self) -> list[float]:
        """Calls of the network so far, and what else `tests.bench.serving.fixed_latency` counts."""
        return [float(number) for number in Path(tally_of(self.told)).read_text().split()]

    def metric(self, name: str) -> float:
        """The sum over the series of one of our metrics."""
        text = exchange(self.told.port, "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 10)[1]
        return sum(float(line.split()[-1]) for line in text.decode().splitlines() if line.startswith(name + "{"))


def exchange(port: int, raw: str, patience_s: float) -> tuple[int, bytes]:
    """Status and body. Raises OSError or ValueError where there is no answer."""
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=max(0.1, patience_s)) as connection:
        connection.sendall(raw.encode())
        while data := connection.recv(65536):
            answer += data
    return parse(bytes(answer))


@contextmanager
def serving(spec: ServerSpec, python: str, told: Settings) -> Iterator[Server]:
    """The server, ready. Raises Unavailable."""
    if spec.package:
        found = subprocess.run([python, "-c", f"import {spec.package}"], capture_output=True, text=True)
        if found.returncode:
            raise Unavailable(f"{spec.package} cannot be imported: {found.stderr.strip().splitlines()[-1]}")
    mark = uuid.uuid4().hex
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told = replace(told, port=free_port(), counter=str(folder / "counter"))
        Path(told.counter).write_text("0")
        # Ray's workers would run at niceness 15, and lose the cores to whatever else runs.
        environment = (
            os.environ | told.variables() | {MARK: mark, "RAY_worker_niceness": "0", "BENTOML_DO_NOT_TRACK": "1"}
        )
        log = folder / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [python, *spec.argv(told)],
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_end_with_the_bench,
            )
        try:
            server = Server(spec, told, folder)
            _wait(server, process, log)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            kill(mark)
            process.wait()


def _end_with_the_bench() -> None:
    """The server gets SIGTERM where the bench itself is killed and cannot end it any more. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_S:
        if process.poll() is not None:
            break
        with suppress(OSError, ValueError):
            if server.ask(Arrival(0, 1, 1, 0, 0), 30)[0] == 200:
                return
        time.sleep(0.2)
    last = log.read_text(errors="replace").strip().splitlines()[-8:]
    raise Unavailable(f"{server.spec.title} did not start: {' / '.join(last) or process.poll()}")


def kill(mark: str) -> None:
    """Ends every process that was born with the mark, until there is none."""
    needle = f"{MARK}={mark}".encode()
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if needle in path.read_bytes().split(b"\0") and b") Z" not in (path.parent / "stat").read_bytes():
                    found.append(int(path.parent.name))
        if not found:
            return
        for number in found:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.05)
