"""Ten times as much work as a server can do. What it admits it must do in time, and refuse the rest at once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from tests.app.processes import ServerProcess
from tests.stress.http_client import ask, message
from tests.stress.load_generator import REFUSALS, LoadGenerator
from tests.stress.resources import percentiles, resident

BODY = {"n": 16, "steps": 50}  # work for the engine; to say no to many small ones is work for the event loop
TIME_OUTS = (10.0, 4.0)  # in turn; a full queue took 2.1 s on the slowest machine seen, whose speed changed by half
IN_TIME = 0.99  # of what is admitted, but for that of the first LEARNING_S, has to be answered within its time-out
LEARNING_S = 2.0  # in which the server sees how slow its steps become
CONNECTIONS = 400  # no more than the server takes
GROWTH = 48 * 2**20  # bytes that its memory may grow by meanwhile
PARTS = (0.5, 0.95, 0.99, 1.0)
RECOVERY_S = 5.0  # after which it has to serve a small request as ever


async def overload(
    load: LoadGenerator, server: ServerProcess, seconds: float, queue: int, in_time: float = IN_TIME
) -> dict[str, float | str]:
    """What it measured, for the report; what must not be is written down with the load. `queue` is the most U-Net rows
    that the server admits."""
    rate = server.metric("ddpm_estimated_nfe_per_second")
    wanted = 10 * rate / (BODY["n"] * BODY["steps"])
    calm = most = resident(server.process.pid)
    latencies: list[float] = []
    refusals: list[float] = []
    waits: list[int] = []
    answers = Counter[str]()
    kept: dict[bool, list[bool]] = {False: [], True: []}  # of what was admitted, by whether it had learnt
    tasks: set[asyncio.Task[None]] = set()
    sent, started = 0, time.monotonic()

    async def one(number: int) -> None:
        id, at = load.id(), time.monotonic()
        timeout_s = TIME_OUTS[number % len(TIME_OUTS)]
        body = BODY | {"seed": 10**7 + number, "timeout_s": timeout_s}
        answer = await ask(load.port, message("POST", "/generate", body, X_Request_Id=id))
        load.note("overload", answer, id, {"ok"} | REFUSALS)
        answers[answer.code] += 1
        seconds = time.monotonic() - at
        late = b"the time-out passed" in answer.body  # it was admitted; other 504s are refusals
        if late or answer.status == 200:
            kept[at > started + LEARNING_S].append(not late and seconds <= timeout_s)
        if answer.status == 200:
            latencies.append(seconds)
        elif not late:
            refusals.append(seconds)
        if answer.status == 429:
            waits.append(int(answer.headers["retry-after"]))

    while (now := time.monotonic() - started) < seconds:
        while sent < wanted * now and len(tasks) < CONNECTIONS:
            task = asyncio.create_task(one(sent))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            sent += 1
        await asyncio.sleep(0.01)
        most = max(most, resident(server.process.pid))
    ended = time.monotonic()
    small = message("POST", "/generate", {"n": 1, "steps": 2, "timeout_s": 2})
    while (await ask(load.port, small)).status != 200:  # noqa: ASYNC110 - no event tells of another process
        await asyncio.sleep(0.05)
    recovered = time.monotonic() - ended
    if tasks:
        await asyncio.wait(tasks)

    full_s = queue / min(rate, server.metric("ddpm_estimated_nfe_per_second"))
    for wrong, sentence in [
        (not latencies, "nobody was served"),
        (
            sent < 0.9 * wanted * (ended - started),
            f"only {sent} requests of {wanted * (ended - started):.0f} were sent",
        ),
        (
            sum(kept[True]) < in_time * len(kept[True]),
            f"{kept[True].count(False)} of {len(kept[True])} were answered late",
        ),
        (not refusals, "nobody was refused"),
        (
            max(waits, default=0) > 3 * full_s + 1,
            f"Retry-After {max(waits, default=0)} s, a full queue takes {full_s:.1f} s",
        ),
        (most > calm + GROWTH, f"memory grew from {calm >> 20} to {most >> 20} MiB"),
        (recovered > RECOVERY_S, f"a small request was served only {recovered:.1f} s after its end"),
    ]:
        if wrong:
            load.wrong.append(f"overload: {sentence}")
    return {
        "overload: offered, as a multiple of the measured rate": round(10 * sent / (ended - started) / wanted, 1),
        "overload: answers": ", ".join(f"{count} {code}" for code, count in sorted(answers.items())),
        "overload: admitted, and of these late": f"{len(kept[True])}, {kept[True].count(False)}",
        f"overload: the same in the first {LEARNING_S:g} s": f"{len(kept[False])}, {kept[False].count(False)}",
        "overload: latency of the served, p50, p95, p99, longest (s)": percentiles(latencies, PARTS),
        "overload: latency of refusals, p50, p95, p99, longest (s)": percentiles(refusals, PARTS),
        "overload: Retry-After, least and most (s)": f"{min(waits)}, {max(waits)}" if waits else "nobody told",
        "overload: memory before and at most (MiB)": f"{calm >> 20}, {most >> 20}",
        "overload: recovered after (s)": round(recovered, 2),
    }
