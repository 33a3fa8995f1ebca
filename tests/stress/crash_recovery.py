"""What ends a process, under load: everyone is answered, and the one started anew makes the same images."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx

from tests.app.faulty_server import BREAKS_DEVICE, CANNOT_START, HANGS, SLOW
from tests.app.processes import ServerProcess, wait_for
from tests.stress.http_client import Answer, ask, message
from tests.stress.load_generator import CANARY, SEQUENCE, query
from tests.stress.mixed_load import FAULTY, arguments, port_of
from tests.stress.resources import Findings

FATAL = {"device lost": BREAKS_DEVICE, "noise cannot be drawn": CANNOT_START, "step that never returns": HANGS}
KILL = "kill -9"
DRAINS = {"SIGTERM, 30 s to drain": 30.0, "SIGTERM, 1 s to drain": 1.0}


def run_crashes(checkpoint: Path) -> Findings:
    """One server process after another, on the same port: each is the restart of the one before."""
    findings = Findings()
    canary, port = b"", 0
    for name in (*FATAL, KILL, *DRAINS, "the last one"):
        argv = [*arguments(checkpoint), "--drain-s", str(DRAINS.get(name, 30.0))]
        started = time.monotonic()
        with ServerProcess(FAULTY, *argv, port=port, fresh=True) as server:
            ready = time.monotonic() - started
            port = port_of(server)
            image = server.client.post("/generate", json=CANARY).content
            if canary not in (b"", image):
                findings.wrong.append(f"before {name}: the canary is another image than in the process before")
            canary = image
            if name == "the last one":
                break
            answers, seconds = asyncio.run(_last_words(port, server, name, findings))
            code = server.exit_code()
        seen = Counter(answer.code for answer in answers)
        findings.outcomes.update({(name, outcome): count for outcome, count in seen.items()})
        findings.numbers[f"{name}: exit code, seconds until everyone knew, seconds of the start before"] = (
            f"{code}, {seconds:.1f}, {ready:.1f}"
        )
        _check(name, code, seen, server, findings)
    return findings


def _check(name: str, code: int, seen: Counter[str], server: ServerProcess, findings: Findings) -> None:
    expected = -9 if name == KILL else 0 if name in DRAINS else 1
    if code != expected:
        findings.wrong.append(f"{name}: exit code {code}")
    allowed = {"ok", "not_ready"} | ({"unanswered"} if name == KILL else set())
    if DRAINS.get(name, 0) > 10:
        allowed = {"ok"}
    if seen.keys() - allowed:
        findings.wrong.append(f"{name}: {dict(seen)}")
    if DRAINS.get(name) == 1 and not seen["not_ready"]:
        findings.wrong.append(f"{name}: it had time enough for everyone, so that nothing was tried")
    if name in DRAINS and [line for line in server.logs() if line["level"] in ("error", "critical")]:
        findings.wrong.append(f"{name}: there are errors in the log")


async def _last_words(port: int, server: ServerProcess, name: str, findings: Findings) -> tuple[list[Answer], float]:
    """Six clients of /generate and four streams, and then what ends the process."""
    bodies: list[dict[str, Any]] = [{"n": 4, "steps": 60, "seed": SLOW, "index": i} for i in range(10)]
    if name in DRAINS:
        bodies[0] |= {"steps": 200 if DRAINS[name] > 10 else 400}  # 4 or 8 s, and all within QUEUE
    tasks = [asyncio.create_task(ask(port, message("POST", "/generate", body))) for body in bodies[:6]]
    for body in bodies[6:]:
        path = f"{SEQUENCE}?{query(body)}&frames=20&format=sse"
        tasks.append(asyncio.create_task(ask(port, message("GET", path))))
    await asyncio.to_thread(wait_for, lambda: server.samples_in_flight() == 40, "the work of all")
    started = time.monotonic()
    if name in FATAL:
        body = {"n": 2, "steps": 8, "seed": FATAL[name]}
        tasks.append(asyncio.create_task(ask(port, message("POST", "/generate", body))))
    elif name == KILL:
        server.process.kill()
    else:
        server.terminate()
        await asyncio.to_thread(wait_for, lambda: _refused(port), "the refusal of new work")
        findings.numbers[f"{name}: new work was refused after (s)"] = round(time.monotonic() - started, 2)
        if not any(not task.done() for task in tasks):
            findings.wrong.append(f"{name}: all work was done before")
    return list(await asyncio.gather(*tasks)), time.monotonic() - started


def _refused(port: int) -> bool:
    """Whether /readyz says no, or nobody listens any more; then new work must be refused, too."""
    address = f"http://127.0.0.1:{port}"
    try:
        if httpx.get(address + "/readyz", timeout=10).status_code != 503:
            return False
        assert httpx.post(address + "/generate", json={}, timeout=10).status_code == 503
    except httpx.TransportError:
        return True
    return True
