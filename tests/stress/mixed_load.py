"""Every kind of client and of recoverable failure at once, and then ten times too much work."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from tests.app.processes import ServerProcess, metric, wait_for
from tests.stress.checkpoint_changes import ServedFile
from tests.stress.http_client import PATIENCE, ask, message
from tests.stress.load_generator import CANARY, LoadGenerator
from tests.stress.overload import IN_TIME, overload
from tests.stress.resources import Findings, ResourceSnapshot, loggable, quantiles, told

FAULTY = "tests.app.faulty_server"
QUEUE = 8_000  # U-Net rows
LONGEST_S = PATIENCE - 30  # for a request; a client that waits longer than that has found a lost one
WORKERS = 16


def arguments(checkpoint: Path) -> list[str]:
    """For every server of a load: equal ones make equal bytes."""
    limits = ["--max-pending-nfe", str(QUEUE), "--read-timeout-s", "3", "--write-timeout-s", "30"]
    limits += ["--max-timeout-s", str(LONGEST_S)]
    return ["--checkpoint", str(checkpoint), "--step-timeout-s", "10", *limits]


def run_mixed_load(
    checkpoints: list[Path], seconds: float, overload_s: float, seed: int, in_time: float = IN_TIME
) -> Findings:
    """Mixed load for `seconds`, ten times too much for `overload_s`, then the accounts. The first checkpoint is served;
    while it is, the others take its place and give it back. One server process, and a quiet one for each of them.
    `in_time` is the part of what an overload gets admitted that has to be answered within its time-out."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as folder:
        served = ServedFile(Path(folder), checkpoints)
        with ServerProcess(FAULTY, *arguments(served.path), fresh=True) as server:
            load = LoadGenerator(port_of(server), random.Random(seed), findings.outcomes, findings.wrong)
            server.client.post("/generate", json=CANARY)
            snapshot = ResourceSnapshot(server)
            asyncio.run(_mixed_load(load, served, server, snapshot, seconds))
            if overload_s:
                findings.numbers |= asyncio.run(overload(load, server, overload_s, QUEUE, in_time))
            snapshot.compare(findings)
            asyncio.run(load.check_canary("in the end"))
            _account_for_requests(server, load, findings)
        for version in served.versions:
            with ServerProcess(FAULTY, *arguments(version), fresh=True) as quiet:
                asyncio.run(_compare(load, served.hashes[version], port_of(quiet), findings))
    return findings


def port_of(server: ServerProcess) -> int:
    """Where it listens."""
    return int(server.url.rpartition(":")[2])


async def _mixed_load(
    load: LoadGenerator, served: ServedFile, server: ServerProcess, snapshot: ResourceSnapshot, seconds: float
) -> None:
    async def change() -> None:
        await served.change(load, server.process.pid)

    clients: dict[Callable[[], Awaitable[None]], float] = {
        load.generate: 8,
        load.stream: 4,
        load.slow_reader: 1,
        load.disconnect: 6,
        load.malformed: 8,
        load.fault: 1,
        load.burst: 0.15,
        change: 0.15,
    }
    until = time.monotonic() + seconds

    async def work() -> None:
        while time.monotonic() < until:
            (client,) = load.rng.choices(list(clients), list(clients.values()))
            await client()

    async def probe() -> None:
        while time.monotonic() < until:
            answer = await ask(load.port, message("GET", "/livez"))
            load.outcomes["/livez", answer.code] += 1
            if answer.status != 200:
                load.wrong.append(f"/livez: {answer}")
            ready = await ask(load.port, message("GET", "/readyz"))
            load.outcomes["/readyz", ready.code] += 1
            snapshot.sample_memory()
            await asyncio.sleep(0.5)

    await asyncio.gather(probe(), *(work() for _ in range(WORKERS)))


def _account_for_requests(server: ServerProcess, load: LoadGenerator, findings: Findings) -> None:
    """What clients saw, what the log says, and what the metrics count must be the same."""
    known = {id for id, (status, _) in load.ledger.items() if status}

    def logged() -> dict[str, tuple[int, str]]:
        lines = [line for line in server.logs() if line.get("logger") == "ddpm.request"]
        return {line["request_id"]: (line["status"], line["outcome"]) for line in lines if line["request_id"] in known}

    lost = {id for id, (status, _) in load.ledger.items() if not status}
    for line in server.logs():
        if line.get("request_id") in lost:
            findings.wrong.append(f"of one that got no answer the log says: {line}")
    with suppress(AssertionError):
        wait_for(lambda: logged().keys() == known, "a line for every request")
    found = logged()
    different = {id: (load.ledger[id], found.get(id)) for id in known if found.get(id) != load.ledger[id]}
    for id, (seen, said) in list(different.items())[:5]:
        findings.wrong.append(f"{id}: the client saw {seen}, the log says {said}")
    time.sleep(0.5)  # for the line of the last probe
    text = server.client.get("/metrics").text
    lines = [line for line in server.logs() if line.get("logger") == "ddpm.request"]
    by_log = Counter(line["outcome"] for line in lines)
    for outcome, count in by_log.items():
        counted = loggable(text, outcome)
        if outcome == "ok":  # this very scrape is in the log, and was not yet in what it said
            count = counted if 0 <= count - counted <= 1 else count
        if counted != count:
            findings.wrong.append(f"{counted:.0f} requests are counted as {outcome}, {count} are in the log")
    findings.numbers |= {
        "requests that reached the log": len(lines),
        "answers that the log confirms": len(known) - len(different),
        "unanswered": sum(count for (_, outcome), count in findings.outcomes.items() if outcome == "unanswered"),
        "clients that disconnected": load.disconnected,
        "cancels": int(metric(text, "ddpm_cancellation_latency_seconds_count")),
        "cancel latency: half, 99 %, all within (s)": told(quantiles(text, "ddpm_cancellation_latency_seconds")),
        "step: half, 99 %, all within (s)": told(quantiles(text, "ddpm_step_seconds")),
        "images": int(metric(text, "ddpm_images_total")),
        "image-steps": int(metric(text, "ddpm_image_steps_total")),
        "of these for clients that left": int(metric(text, "ddpm_wasted_image_steps_total", outcome="cancelled")),
        "engine restarts": int(metric(text, "ddpm_engine_restarts_total")),
        "failed steps": int(metric(text, "ddpm_failed_steps_total")),
        "weights: loaded, unchanged, refused": ", ".join(
            f"{metric(text, 'ddpm_model_loads_total', outcome=outcome):.0f}"
            for outcome in ("loaded", "unchanged", "invalid_checkpoint")
        ),
    }


async def _compare(load: LoadGenerator, checkpoint: str, port: int, findings: Findings) -> None:
    """What was answered from this checkpoint again, of a server that nobody else asks: equal to the byte."""
    kept = [(request, content) for request, made_by, content in load.kept if made_by == checkpoint]
    canary = load.canaries.get(checkpoint)
    different = 0
    for request, content in [*kept, *([(message("POST", "/generate", CANARY), canary)] if canary else [])]:
        if (await ask(port, request)).body != content:
            different += 1
            findings.wrong.append(f"another image from a quiet server: {request!r}")
    findings.numbers |= {
        f"answers of {checkpoint[:8]} made again in a quiet process, of these different": f"{len(kept)}, {different}"
    }
