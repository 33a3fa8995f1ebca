"""Clients that disconnect, and what is left of them: no place, no descriptor, no memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

from tests.app.processes import ServerProcess, wait_for
from tests.stress.flood import busy, witness
from tests.stress.load_generator import MOMENTS, LoadGenerator
from tests.stress.resources import Findings, ResourceSnapshot, quantiles, told

AT_ONCE = 32
HELD_UP_S = 0.25  # a thread, by a machine that has more to do than cores


def run_disconnects(server: ServerProcess, number: int, seed: int = 0) -> Findings:
    """`number` clients, at all moments alike, beside one that stays and must notice nothing."""
    findings = Findings()
    port = int(server.url.rpartition(":")[2])
    load = LoadGenerator(port, random.Random(seed), findings.outcomes, findings.wrong)
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(number)]
    load.rng.shuffle(moments)
    left = iter(moments)

    async def work() -> None:
        for moment in left:
            await load.disconnect(moment)

    asyncio.run(load.check_canary("at first"))
    snapshot = ResourceSnapshot(server)
    asyncio.run(busy(work, AT_ONCE, witness(load, snapshot, findings)))
    gone = time.monotonic()
    wait_for(lambda: server.samples_in_flight() == 0, "free places")
    findings.numbers["seconds from the last leaving until all places were free"] = round(time.monotonic() - gone, 3)
    asyncio.run(load.check_canary("in the end"))
    snapshot.compare(findings)

    text = server.client.get("/metrics").text
    cancels, steps = (quantiles(text, f"ddpm_{name}_seconds") for name in ("cancellation_latency", "step"))
    findings.numbers |= {
        "cancels": int(server.metric("ddpm_cancellation_latency_seconds_count")),
        "cancel latency: half, 99 %, all within (s)": told(cancels),
        "step: half, 99 %, all within (s)": told(steps),
    }
    # A cancel waits for the end of the present step. Bounds of buckets are 2.5 times apart at most. What else runs on
    # the machine may hold the engine's thread up between two steps, now and then, but not half of the time.
    if cancels:
        for share, took, besides in (("half", cancels[0], 0.0), ("99 %", cancels[1], HELD_UP_S)):
            if took > 2.5 * steps[2] + besides:
                findings.wrong.append(f"{share} of the cancels took up to {took} s, and no step more than {steps[2]} s")
    ended: dict[str, Counter[str]] = {moment: Counter() for moment in MOMENTS}
    for line in server.logs():
        moment = line.get("request_id", "").partition("-")[0]
        if moment in ended:
            ended[moment][line["outcome"]] += 1
    for moment, outcomes in ended.items():
        outcomes["no request"] = moments.count(moment) - outcomes.total()
        findings.numbers[f"{moment}: how the log says that they ended"] = ", ".join(
            f"{count} {outcome}" for outcome, count in outcomes.most_common() if count
        )
    if restarts := server.metric("ddpm_engine_restarts_total"):
        findings.wrong.append(f"the engine failed {restarts:.0f} times")
    return findings
