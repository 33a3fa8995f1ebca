"""A server of this tree or of another one, as a process, and clients that ask again as soon as they are answered.

The clients are the same for all trees: connections that are kept, without a library between.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.app.processes import metric

HERE = Path(__file__).parents[2]


def trees(baseline: str) -> dict[str, Path]:
    """This tree, and the baseline's if there is one, by their names in tables."""
    return {"this": HERE} | ({"baseline": Path(baseline).resolve()} if baseline else {})


def post(path: str, body: dict[str, Any], accept: str = "image/png") -> bytes:
    """The bytes of a request."""
    data = json.dumps(body).encode()
    fields = ["Host: localhost", f"Accept: {accept}", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode() + data


def get(path: str) -> bytes:
    """The bytes of a request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


@dataclass(frozen=True)
class Load:
    """What a server did under a load: seconds of the window, latencies (in seconds) of the answers that came in it,
    and the server's processor seconds. `scrapes` are its metrics before and after, and when they were read."""

    seconds: float
    latencies: list[float]
    cpu_s: float
    scrapes: tuple[tuple[float, str], tuple[float, str]]

    def rate(self, counter: str, **labels: str) -> float:
        """By how much a counter grew in a second."""
        (begun, before), (ended, after) = self.scrapes
        return (metric(after, counter, **labels) - metric(before, counter, **labels)) / (ended - begun)


class TreeServer:
    """A server of a tree, ready. `ready_s` is from the start of its process to the first 200 of /readyz."""

    def __init__(self, tree: Path, *command: str, **environment: str) -> None:
        """`command` is what Python runs: `-m app` and flags. Its environment has no settings but `environment`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DDPM_", "OMP_", "MKL_"))}
        begun = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *command, "--port", "0"],
            cwd=tree,
            env=kept | {"PYTHONPATH": str(tree)} | environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"running on http://([\d.]+):(\d+)", line):
                break
        else:
            raise SystemExit(f"the server of {tree} did not start")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.host, self.port = found[1], int(found[2])
        self.client = httpx.Client(base_url=f"http://{self.host}:{self.port}", timeout=600)
        while self.client.get("/readyz").status_code != 200:
            time.sleep(0.02)
        self.ready_s = time.perf_counter() - begun

    def cpu_seconds(self) -> float:
        """Of its processor time so far, user's and system's."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def load(self, clients: int, seconds: float, request: bytes, lead_s: float = 0, fewest: int = 1) -> Load:
        """So many clients send the request again and again. The window begins after `lead_s`; at its end they leave.

        It is longer than `seconds` where there would be fewer than `fewest` answers. Raises SystemExit with an answer
        that is not 200.
        """
        return asyncio.run(self._load(clients, seconds, request, lead_s, fewest))

    async def _load(self, clients: int, seconds: float, request: bytes, lead_s: float, fewest: int) -> Load:
        latencies: list[float] = []
        tasks = [asyncio.create_task(self._ask(request, latencies)) for _ in range(clients)]
        await asyncio.wait(tasks, timeout=lead_s, return_when=asyncio.FIRST_EXCEPTION)
        before, cpu, already = self._scrape(), self.cpu_seconds(), len(latencies)
        begun = time.perf_counter()
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        while len(latencies) < already + fewest and not any(task.done() for task in tasks):
            await asyncio.wait(tasks, timeout=0.01, return_when=asyncio.FIRST_EXCEPTION)
        took, until = time.perf_counter() - begun, len(latencies)
        cpu = self.cpu_seconds() - cpu
        after = self._scrape()
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                raise SystemExit(str(outcome))
        return Load(took, latencies[already:until], cpu, (before, after))

    def _scrape(self) -> tuple[float, str]:
        text = self.client.get("/metrics").text
        return time.perf_counter(), text

    async def _ask(self, request: bytes, latencies: list[float]) -> None:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            while True:
                begun = time.perf_counter()
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                if not head.startswith(b"HTTP/1.1 200"):
                    raise OSError(head.decode())
                if length := re.search(rb"(?i)content-length: (\d+)", head):
                    await reader.readexactly(int(length[1]))
                else:
                    await reader.readuntil(b"\r\n0\r\n\r\n")
                latencies.append(time.perf_counter() - begun)
        finally:
            writer.close()

    def close(self) -> None:
        """Ends the process."""
        self.client.close()
        self.process.kill()
        self.process.wait()
