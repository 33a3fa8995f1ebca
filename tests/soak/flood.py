"""Hostile requests by the thousand, and what another client notices of them."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

from tests.app.processes import ServerProcess, wait_for
from tests.soak.accounts import Balance, Findings, loggable, percentiles
from tests.soak.clients import Siege
from tests.soak.exchange import ask, message

AT_ONCE = 200


def flood(server: ServerProcess, number: int, seed: int = 0) -> Findings:
    """So many requests that nobody should send."""
    findings = Findings()
    port = int(server.url.rpartition(":")[2])
    siege = Siege(port, random.Random(seed), findings.outcomes, findings.wrong)
    left = iter(range(number))

    async def work() -> None:
        for _ in left:
            await siege.hostile()

    asyncio.run(siege.look_at_canary("at first"))
    balance = Balance(server)
    asyncio.run(busy(work, AT_ONCE, witness(siege, balance, findings)))
    asyncio.run(siege.look_at_canary("in the end"))
    balance.close(findings)
    if siege.outcomes["hostile", "no answer"] > number / 2:
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


async def witness(siege: Siege, balance: Balance, findings: Findings) -> None:
    """A client that asks for the canary and for /livez and /readyz all the time. Only load may delay it."""
    seconds, probes = [], []
    try:
        while True:
            started = time.monotonic()
            await siege.look_at_canary("beside others")
            seconds.append(time.monotonic() - started)
            for path in ("/livez", "/readyz"):
                started = time.monotonic()
                answer = await ask(siege.port, message("GET", path))
                probes.append(time.monotonic() - started)
                siege.outcomes[path, answer.code] += 1
                if answer.status != 200:
                    siege.wrong.append(f"{path}: {answer}")
            balance.look()
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
