"""A siege of a real server: every kind of client and of failure at once, and then what is left of it."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.app.faulty_server import BREAKS_DEVICE, CANNOT_START, HANGS
from tests.app.processes import ServerProcess, metric, wait_for
from tests.soak.clients import CANARY, REFUSALS, Siege
from tests.soak.exchange import Answer, ask, message

FAULTY = "tests.app.faulty_server"
QUEUE = 8_000  # U-Net rows
WORKERS = 16
FATAL = {"device lost": BREAKS_DEVICE, "noise cannot be drawn": CANNOT_START, "step that never returns": HANGS}
OVERLOAD = {"n": 4, "steps": 20, "timeout_s": 10}
EXECUTORS = min(32, (os.cpu_count() or 1) + 4)  # threads of asyncio's pool, which come when they are needed
SLACK = 24 * 2**20  # bytes that a process's memory may grow by in a run, beside a twentieth of it


@dataclass
class Findings:
    """What a siege found; `wrong` has a sentence for everything that must not be."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    numbers: dict[str, float | str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def arguments(checkpoint: Path) -> list[str]:
    """For every server of a siege: equal ones make equal bytes."""
    limits = ["--max-queue-rows", str(QUEUE), "--read-timeout-s", "3", "--write-timeout-s", "30"]
    return ["--checkpoint", str(checkpoint), "--step-timeout-s", "10", *limits]


def lay_siege(checkpoint: Path, seconds: float, overload_s: float, seed: int) -> Findings:
    """Mixed load for `seconds`, ten times too much for `overload_s`, then the accounts. Two server processes."""
    findings = Findings()
    argv = arguments(checkpoint)
    with ServerProcess(FAULTY, *argv) as server:
        siege = Siege(port_of(server), random.Random(seed), findings.outcomes, findings.wrong)
        siege.canary = server.client.post("/generate", json=CANARY).content
        before = _state(server)
        samples = asyncio.run(_mixed_load(siege, server.process.pid, seconds))
        if overload_s:
            asyncio.run(_overload(siege, server, overload_s, findings))
        wait_for(lambda: server.rows() == 0, "free places")
        with suppress(AssertionError):
            wait_for(lambda: _state(server)["descriptors"] <= before["descriptors"], "closed descriptors")
        after = _state(server)
        if server.client.post("/generate", json=CANARY).content != siege.canary:
            findings.wrong.append("the canary is another image in the end")
        _account_for_memory(samples, before, after, findings)
        _account_for_requests(server, siege, findings)
    with ServerProcess(FAULTY, *argv) as quiet:
        asyncio.run(_compare(siege, port_of(quiet), findings))
    return findings


def port_of(server: ServerProcess) -> int:
    """Where it listens."""
    return int(server.url.rpartition(":")[2])


async def _mixed_load(siege: Siege, pid: int, seconds: float) -> list[tuple[float, int]]:
    """Returns samples of time and resident bytes."""
    clients: dict[Callable[[], Awaitable[None]], float] = {
        siege.generate: 8,
        siege.stream: 4,
        siege.slow_reader: 1,
        siege.vanish: 6,
        siege.hostile: 8,
        siege.fault: 1,
        siege.burst: 0.15,
    }
    until = time.monotonic() + seconds
    samples: list[tuple[float, int]] = []

    async def work() -> None:
        while time.monotonic() < until:
            (client,) = siege.rng.choices(list(clients), list(clients.values()))
            await client()

    async def probe() -> None:
        while time.monotonic() < until:
            answer = await ask(siege.port, message("GET", "/livez"))
            siege.outcomes["/livez", answer.code] += 1
            if answer.status != 200:
                siege.wrong.append(f"/livez: {answer}")
            ready = await ask(siege.port, message("GET", "/readyz"))
            siege.outcomes["/readyz", ready.code] += 1
            samples.append((time.monotonic(), _resident(pid)))
            await asyncio.sleep(0.5)

    await asyncio.gather(probe(), *(work() for _ in range(WORKERS)))
    return samples


async def _overload(siege: Siege, server: ServerProcess, seconds: float, findings: Findings) -> None:
    """Requests by the clock, ten times as many as the server's own measured rate would do."""
    rate = server.metric("ddpm_expected_rows_per_second")
    wanted = 10 * rate / (OVERLOAD["n"] * OVERLOAD["steps"])
    sent, latencies, answers = 0, [], Counter[str]()
    waits: list[int] = []
    tasks = set()
    started = time.monotonic()

    async def one(number: int) -> None:
        id, at = siege.id(), time.monotonic()
        body = OVERLOAD | {"seed": 10**7 + number}
        answer = await ask(siege.port, message("POST", "/generate", body, X_Request_Id=id))
        siege.note("overload", answer, id, {"ok"} | REFUSALS)
        answers[answer.code] += 1
        if answer.status == 200:
            latencies.append(time.monotonic() - at)
        elif answer.status == 429:
            waits.append(int(answer.headers["retry-after"]))

    while (now := time.monotonic() - started) < seconds:
        while sent < wanted * now and len(tasks) < 400:  # no more connections than the server takes
            task = asyncio.create_task(one(sent))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.01)
    offered = sent / (time.monotonic() - started)
    resident = _resident(server.process.pid)
    ended = time.monotonic()
    small = message("POST", "/generate", {"n": 1, "steps": 2, "timeout_s": 2})
    while (await ask(siege.port, small)).status != 200:  # noqa: ASYNC110 - no event tells of another process
        await asyncio.sleep(0.05)
    recovered = time.monotonic() - ended
    if tasks:
        await asyncio.wait(tasks)
    findings.numbers |= {
        "overload: offered, as a multiple of the measured rate": round(offered / wanted * 10, 1),
        "overload: answers": ", ".join(f"{count} {code}" for code, count in sorted(answers.items())),
        "overload: latency of the served, median and longest (s)": ", ".join(
            f"{function(latencies):.2f}" for function in (statistics.median, max) if latencies
        ),
        "overload: Retry-After, least and most (s)": f"{min(waits)}, {max(waits)}" if waits else "nobody told",
        "overload: memory (MiB)": round(resident / 2**20),
        "overload: recovered after (s)": round(recovered, 2),
    }
    if not answers["ok"]:
        findings.wrong.append("overload: nobody was served")


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _state(server: ServerProcess) -> dict[str, int]:
    process = Path(f"/proc/{server.process.pid}")
    return {
        "descriptors": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
        "resident": _resident(server.process.pid),
    }


def _account_for_memory(
    samples: list[tuple[float, int]], before: dict[str, int], after: dict[str, int], findings: Findings
) -> None:
    """The first third of a run is its warm-up: caches, pools and the allocator fill."""
    late = samples[len(samples) // 3 :]
    slope = statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 2 else 0.0
    growth = slope * (late[-1][0] - late[0][0]) if late else 0.0
    findings.numbers |= {
        "memory after warm-up and at the end (MiB)": f"{late[0][1] / 2**20:.0f}, {after['resident'] / 2**20:.0f}",
        "memory slope (MB/h)": round(slope * 3600 / 1e6, 1),
        "descriptors before and after": f"{before['descriptors']}, {after['descriptors']}",
        "threads before and after": f"{before['threads']}, {after['threads']}",
    }
    if growth > SLACK + late[0][1] / 20:
        findings.wrong.append(f"memory grew by {growth / 2**20:.0f} MiB")
    if after["descriptors"] > before["descriptors"]:
        findings.wrong.append("descriptors are still open")
    if after["threads"] > before["threads"] + EXECUTORS:
        findings.wrong.append("threads are still there")


def _account_for_requests(server: ServerProcess, siege: Siege, findings: Findings) -> None:
    """What clients saw, what the log says, and what the metrics count must be the same."""
    known = {id for id, (status, _) in siege.ledger.items() if status}

    def logged() -> dict[str, tuple[int, str]]:
        lines = [line for line in server.logs() if line.get("logger") == "ddpm.request"]
        return {line["request_id"]: (line["status"], line["outcome"]) for line in lines if line["request_id"] in known}

    with suppress(AssertionError):
        wait_for(lambda: logged().keys() == known, "a line for every request")
    found = logged()
    different = {id: (siege.ledger[id], found.get(id)) for id in known if found.get(id) != siege.ledger[id]}
    for id, (seen, said) in list(different.items())[:5]:
        findings.wrong.append(f"{id}: the client saw {seen}, the log says {said}")
    time.sleep(0.5)  # for the line of the last probe
    text = server.client.get("/metrics").text
    lines = [line for line in server.logs() if line.get("logger") == "ddpm.request"]
    by_log = Counter(line["outcome"] for line in lines)
    for outcome, count in by_log.items():
        counted = metric(text, "ddpm_requests_total", outcome=outcome)
        if outcome == "ok":  # this very scrape is in the log, and was not yet in what it said
            count = counted if 0 <= count - counted <= 1 else count
        if counted != count:
            findings.wrong.append(f"{counted:.0f} requests are counted as {outcome}, {count} are in the log")
    traces = [line for line in lines if line["outcome"] == "internal_error"]
    findings.wrong += [f"internal error: {line}" for line in traces[:5]]
    for gauge in ("ddpm_pending_work_rows", "ddpm_rows_running", "ddpm_rows_waiting", "ddpm_oldest_wait_seconds"):
        if metric(text, gauge):
            findings.wrong.append(f"{gauge} is {metric(text, gauge)} in the end")
    findings.numbers |= {
        "requests that reached the log": len(lines),
        "answers that the log confirms": len(known) - len(different),
        "unanswered": sum(count for (_, outcome), count in findings.outcomes.items() if outcome == "unanswered"),
        "clients that vanished": siege.vanished,
        "cancels": int(metric(text, "ddpm_cancel_seconds_count")),
        "cancel latency: half, 99 % within (s)": quantiles(text, "ddpm_cancel_seconds"),
        "step: half, 99 % within (s)": quantiles(text, "ddpm_step_seconds"),
        "images": int(metric(text, "ddpm_images_total")),
        "image-steps": int(metric(text, "ddpm_image_steps_total")),
        "of these for clients that left": int(metric(text, "ddpm_wasted_image_steps_total", outcome="cancelled")),
        "engine restarts": int(metric(text, "ddpm_engine_restarts_total")),
        "failed steps": int(metric(text, "ddpm_failed_steps_total")),
    }


def quantiles(text: str, name: str) -> str:
    """Upper bounds of a histogram's median and 99th percentile."""
    buckets: Counter[float] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{name}_bucket":
                buckets[float(sample.labels["le"])] += int(sample.value)
    total = max(buckets.values(), default=0)
    if not total:
        return "none"
    return ", ".join(str(min(le for le, n in buckets.items() if n >= part * total)) for part in (0.5, 0.99))


async def _compare(siege: Siege, port: int, findings: Findings) -> None:
    """Some of the answers again, of a server that nobody else asks: equal to the byte."""
    different = 0
    for body, accept, content in siege.kept:
        answer = await ask(port, message("POST", "/generate", body, Accept=accept))
        if answer.body != content:
            different += 1
            findings.wrong.append(f"another image from a quiet server: {body}, {accept}")
    if (await ask(port, message("POST", "/generate", CANARY))).body != siege.canary:
        findings.wrong.append("the canary is another image in another process")
    findings.numbers |= {"answers made again in a quiet process": len(siege.kept), "of these different": different}


def break_down(checkpoint: Path) -> Findings:
    """What ends a process, under load: all are answered, and the one started anew makes the same images."""
    findings = Findings()
    argv = arguments(checkpoint)
    canary, port = b"", 0
    for name, seed in [*FATAL.items(), ("kill -9", None)]:
        with ServerProcess(FAULTY, *argv, port=port) as server:
            port = port_of(server)
            image = server.client.post("/generate", json=CANARY).content
            if canary not in (b"", image):
                findings.wrong.append(f"before {name}: the canary is another image than in the process before")
            canary = image
            answers, seconds = asyncio.run(_last_words(port, server, seed))
            code = server.exit_code()
        seen = Counter(answer.code for answer in answers)
        findings.outcomes.update({(name, outcome): count for outcome, count in seen.items()})
        findings.numbers[f"{name}: exit code, seconds until everyone knew"] = f"{code}, {seconds:.1f}"
        if code != (1 if seed else -9):
            findings.wrong.append(f"{name}: exit code {code}")
        if seed and seen.keys() - {"ok", "not_ready"}:
            findings.wrong.append(f"{name}: {dict(seen)}")
    with ServerProcess(FAULTY, *argv, port=port) as server:
        if server.client.post("/generate", json=CANARY).content != canary:
            findings.wrong.append("after all the canary is another image")
    return findings


async def _last_words(port: int, server: ServerProcess, seed: int | None) -> tuple[list[Answer], float]:
    bodies: list[dict[str, Any]] = [{"n": 4, "steps": 300, "seed": i} for i in range(6)]  # within QUEUE
    tasks = [asyncio.create_task(ask(port, message("POST", "/generate", body))) for body in bodies]
    await asyncio.to_thread(wait_for, lambda: server.rows() > 4, "work")
    started = time.monotonic()
    if seed is None:
        server.process.kill()
    else:
        tasks.append(asyncio.create_task(ask(port, message("POST", "/generate", {"n": 2, "steps": 8, "seed": seed}))))
    return list(await asyncio.gather(*tasks)), time.monotonic() - started
