"""Malformed requests by the thousand, and what another client notices of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tests.app.processes import ServerProcess, wait_for
from tests.stress.http_client import ask, message
from tests.stress.load_generator import LoadGenerator
from tests.stress.resources import Findings, ResourceSnapshot, loggable, percentiles

AT_ONCE = 200


def run_malformed_requests(server: ServerProcess, number: int, seed: int = 0) -> Findings:
    """`number` requests that no client should send."""
    findings = Findings()
    port = int(server.url.rpartition(":")[2])
    load = LoadGenerator(port, random.Random(seed), findings.outcomes, findings.wrong)
    left = iter(range(number))

    async def work() -> None:
        for _ in left:
            await load.malformed()

    asyncio.run(load.check_canary("at first"))
    snapshot = ResourceSnapshot(server)
    asyncio.run(busy(work, AT_ONCE, witness(load, snapshot, findings)))
    asyncio.run(load.check_canary("in the end"))
    snapshot.compare(findings)
    if load.outcomes["malformed", "no answer"] > number / 2:
        findings.wrong.append("most got no answer, so that little was tried")
    _compare_log_and_metrics(server, findings)
    return findings


async def busy(work: Callable[[], Awaitable[None]], at_once: int, watch: Awaitable[None]) -> None:
    """So many workers until they are done, and a watch until then."""
    watching = asyncio.ensure_future(watch)
    await asyncio.gather(*(work() for _ in range(at_once)))
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching


async def witness(load: LoadGenerator, snapshot: ResourceSnapshot, findings: Findings) -> None:
    """A client that asks for the canary and for /livez and /readyz all the time. Only load may delay it."""
    seconds, probes = [], []
    try:
        while True:
            started = time.monotonic()
            await load.check_canary("beside others")
            seconds.append(time.monotonic() - started)
            for path in ("/livez", "/readyz"):
                started = time.monotonic()
                answer = await ask(load.port, message("GET", path))
                probes.append(time.monotonic() - started)
                load.outcomes[path, answer.code] += 1
                if answer.status != 200:
                    load.wrong.append(f"{path}: {answer}")
            snapshot.sample_memory()
            await asyncio.sleep(0.3)
    finally:
        findings.numbers |= {
            "a client beside them, 3 images of 8 steps: half, 99 %, all within (s)": percentiles(seconds),
            "/livez and /readyz: half, 99 %, all within (s)": percentiles(probes),
        }


def _compare_log_and_metrics(server: ServerProcess, findings: Findings) -> None:
    def numbers() -> tuple[Counter[str], dict[str, float]]:
        by_log = Counter(line["outcome"] for line in server.logs() if line.get("logger") == "ddpm.request")
        text = server.client.get("/metrics").text
        return by_log, {outcome: loggable(text, outcome) for outcome in by_log}

    def equal() -> bool:
        by_log, counted = numbers()
        return all(0 <= counted[outcome] - count <= (outcome == "ok") for outcome, count in by_log.items())

    with suppress(AssertionError):
        wait_for(equal, "a line for every request")
    by_log, counted = numbers()
    findings.numbers["requests in log and metrics"] = by_log.total()
    if not equal():
        findings.wrong.append(f"the log has {dict(by_log)}, the metrics {counted}")
