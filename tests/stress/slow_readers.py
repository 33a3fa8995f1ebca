"""Readers of a byte a second, through small buffers on both sides."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from contextlib import suppress

from tests.app.processes import ServerProcess
from tests.stress.http_client import PATIENCE, ask, connect, message, parse
from tests.stress.load_generator import SEQUENCE
from tests.stress.resources import Findings, ResourceSnapshot, percentiles

SEND_BUFFER = "4096"  # of the server's side
FRAMES = 100
ASIDE = 0.2  # of the time that the engine may spend outside of steps more than it does for quick readers


def run_slow_readers(server: ServerProcess, readers: int, seconds: float) -> Findings:
    """The same streams, read at once and then at a byte a second for so many seconds, and then to their end."""
    findings = Findings()
    snapshot = ResourceSnapshot(server)
    asyncio.run(_run_slow_readers(server, readers, seconds, snapshot, findings))
    snapshot.compare(findings)
    sent, dropped = (int(server.metric(f"ddpm_frames_{name}_total")) for name in ("sent", "dropped"))
    findings.numbers |= {"frames sent and dropped, of all": f"{sent}, {dropped}"}
    if sent + dropped != 2 * readers * FRAMES:
        findings.wrong.append(f"{sent} frames sent and {dropped} dropped, of {2 * readers * FRAMES}")
    return findings


async def _run_slow_readers(
    server: ServerProcess, readers: int, seconds: float, snapshot: ResourceSnapshot, findings: Findings
) -> None:
    port = int(server.url.rpartition(":")[2])
    bodies = [{"n": 64, "steps": 100, "seed": i} for i in range(readers)]
    expected = [(await ask(port, message("POST", "/generate", body))).body for body in bodies]

    def request(i: int) -> bytes:
        return message("GET", f"{SEQUENCE}?n=64&steps=100&seed={i}&frames={FRAMES}&format=sse")

    async def step_seconds() -> float:
        return await asyncio.to_thread(server.metric, "ddpm_step_seconds_sum")

    steps, started = await step_seconds(), time.monotonic()
    quick = await asyncio.gather(*(ask(port, request(i)) for i in range(readers)))
    alone, in_steps = time.monotonic() - started, await step_seconds() - steps
    for i, answer in enumerate(quick):
        _check(i, answer.body.decode(), expected[i], findings)

    idle = asyncio.Event()

    async def slow(i: int) -> bytes:
        reader, writer = await connect(port, holding=2048)
        writer.write(request(i))
        data = b""
        until = time.monotonic() + seconds
        while time.monotonic() < until or not idle.is_set():
            data += await reader.read(1)
            await asyncio.sleep(1)
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(PATIENCE):
                data += await reader.read()
        writer.close()
        return data

    steps, started = await step_seconds(), time.monotonic()
    tasks = [asyncio.create_task(slow(i)) for i in range(readers)]
    await asyncio.sleep(0.5)
    while await asyncio.to_thread(server.samples_in_flight):
        snapshot.sample_memory()
        await asyncio.sleep(0.1)
    beside, in_steps_beside = time.monotonic() - started, await step_seconds() - steps
    idle.set()
    asked = []
    while not all(task.done() for task in tasks):
        at = time.monotonic()
        answer = await ask(port, message("POST", "/generate", bodies[0] | {"n": 1}))
        asked.append(time.monotonic() - at)
        if answer.status != 200:
            findings.wrong.append(f"beside slow readers: {answer}")
        snapshot.sample_memory()
        await asyncio.sleep(0.5)
    for i, task in enumerate(tasks):
        answer = parse(task.result())
        findings.outcomes["slow reader", answer.code] += 1
        _check(i, answer.body.decode(), expected[i], findings)
        frames = answer.body.count(b"event: frame\n")
        if answer.code == "ok" and frames > FRAMES / 2:
            findings.wrong.append(f"reader {i} had {frames} frames: its stream did not back up")
    findings.numbers |= {
        "all work done for quick readers after (s), of which steps": f"{alone:.2f}, {in_steps / alone:.0%}",
        "and for readers of a byte a second (s)": f"{beside:.2f}, {in_steps_beside / beside:.0%}",
        "1 image of 100 steps meanwhile: half, 99 %, all within (s)": percentiles(asked),
    }
    if in_steps_beside / beside < in_steps / alone - ASIDE:  # the steps themselves depend on who else uses the machine
        findings.wrong.append(f"slow readers held up the engine: steps were {in_steps_beside / beside:.0%} of the time")


def _check(i: int, text: str, expected: bytes, findings: Findings) -> None:
    """The newest frame waited for the client, and the final image is that of /generate."""
    *_, frame, last, end = ["", "", *text.split("\n\n")]
    whole = frame.startswith(f"event: frame\nid: {100}\n") and last.startswith("event: completed\n") and not end
    if not whole or base64.b64decode(json.loads(last.partition("data: ")[2])["png"]) != expected:
        findings.wrong.append(f"stream {i} ended with {text[-100:]!r}, or another image")
