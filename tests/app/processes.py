"""Real server processes on real ports, and what a test asks of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.forked import Forked

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds; only a broken server needs them, or a very busy machine


def wait_for(condition: Callable[[], object], what: str = "the condition") -> None:
    """Polls until the condition holds. Fails when patience ends."""
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, f"{what} did not come true"
        time.sleep(0.005)


def environment(**extra: str) -> dict[str, str]:
    """This process's, without DDPM_* variables and with one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}
    return kept | {"OMP_NUM_THREADS": "1"} | extra


def run_to_its_end(
    *argv: str, module: str = "app", fresh: bool = False, **extra: str
) -> subprocess.CompletedProcess[str]:
    """`python -m module` that is expected to stop by itself; forked, unless it is to be `fresh`."""
    command = [sys.executable, "-m", module, *argv]
    if fresh:
        told = {"env": environment(**extra), "capture_output": True, "text": True, "timeout": PATIENCE}
        return subprocess.run(command, cwd=ROOT, **told)
    with Forked(module, argv, environment(**extra)) as process:
        out, err = process.communicate(PATIENCE)
        return subprocess.CompletedProcess(command, process.wait(), out, err)


def metric(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of that name that have these labels; 0 where there are none."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )


class ServerProcess:
    """A server by `python -m module --port …`: ready when entered, gone when left.

    It is forked (see tests/forked.py), unless it is to be `fresh`: then Python is started for it.
    """

    def __init__(self, module: str, *argv: str, port: int = 0, fresh: bool = False, **extra: str) -> None:
        self._module, self._argv = module, ["--port", str(port), "--threads", "1", *argv]
        self._is_fresh = fresh
        self._environment = environment(**extra)
        self.lines: list[str] = []

    def __enter__(self) -> ServerProcess:
        self.process: subprocess.Popen[str] | Forked
        if self._is_fresh:
            command = [sys.executable, "-m", self._module, *self._argv]
            self.process = subprocess.Popen(command, cwd=ROOT, env=self._environment, stderr=subprocess.PIPE, text=True)
        else:
            self.process = Forked(self._module, self._argv, self._environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            wait_for(self._listening, "listening")
            self.client = httpx.Client(base_url=self.url, timeout=PATIENCE)
            wait_for(lambda: self.client.get("/readyz").status_code == 200, "readiness")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        if hasattr(self, "client"):
            self.client.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def _listening(self) -> bool:
        assert self.process.poll() is None, "".join(self.lines)
        found = re.search(r"running on (http://[\d.]+:\d+)", "".join(self.lines))
        self.url = found[1] if found else ""
        return bool(found)

    def logs(self) -> list[dict[str, Any]]:
        """What was logged until now; every line is a JSON object."""
        return [json.loads(line) for line in list(self.lines)]

    def metric(self, name: str, **labels: str) -> float:
        return metric(self.client.get("/metrics").text, name, **labels)

    def samples_in_flight(self) -> float:
        """Images that are admitted and not answered."""
        text = self.client.get("/metrics").text
        return metric(text, "ddpm_num_samples_running") + metric(text, "ddpm_num_samples_waiting")

    @contextmanager
    def truthful_readiness(self) -> Iterator[list[int]]:
        """Meanwhile /readyz is asked again and again; what it said. It must have said no a second after a step was late
        (which it is after one second), and yes while none was. For a server that neither starts nor drains."""
        said: list[int] = []
        lies: list[tuple[float, int, float]] = []
        stop = threading.Event()
        client = httpx.Client(base_url=self.url, timeout=PATIENCE)

        def age() -> float:
            return metric(client.get("/metrics").text, "ddpm_current_step_age_seconds")

        def look() -> None:
            before, status, after = age(), client.get("/readyz").status_code, age()
            said.append(status)
            truth = 503 if before > 2 else 200 if after <= 1 else status
            if before <= after and status != truth:  # or else the step that was asked about has ended
                lies.append((before, status, after))

        def watch() -> None:
            with suppress(httpx.TransportError):  # the process has ended
                while not stop.wait(0.1):
                    look()

        with client:
            look()
            thread = threading.Thread(target=watch)
            thread.start()
            try:
                yield said
            finally:
                stop.set()
                thread.join()
        assert not lies

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code
