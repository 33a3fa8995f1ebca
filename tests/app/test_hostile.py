"""Requests that nobody should send, against a real server: none of them is its fault, and none of them costs others."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from tests.app.processes import ServerProcess, wait_for
from tests.soak.clients import CANARY, Siege
from tests.soak.run import port_of

AT_ONCE = 32


def test_hostile_requests_get_no_5xx_and_leave_nothing_behind(
    faulty: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """As many as the variable HOSTILE_REQUESTS says."""
    caplog.set_level("ERROR", "asyncio")  # it warns of every byte written to a server that hung up
    number = int(os.environ.get("HOSTILE_REQUESTS", "300"))
    siege = Siege(port_of(faulty), random.Random(0))
    canary = faulty.client.post("/generate", json=CANARY).content
    left = iter(range(number))

    async def work() -> None:
        for _ in left:
            await siege.hostile()

    async def all_of_them() -> None:
        await asyncio.gather(*(work() for _ in range(AT_ONCE)))

    descriptors, memory = (faulty.metric(f"process_{name}") for name in ("open_fds", "resident_memory_bytes"))
    asyncio.run(all_of_them())
    assert not siege.wrong
    assert sum(siege.outcomes.values()) == number
    assert siege.outcomes["hostile", "answered"] > number / 2
    wait_for(lambda: faulty.rows() == 0, "free places")
    wait_for(lambda: faulty.metric("process_open_fds") <= descriptors, "closed descriptors")
    assert faulty.metric("process_resident_memory_bytes") < memory + 64 * 2**20
    assert faulty.client.post("/generate", json=CANARY).content == canary
    assert not [line for line in faulty.logs() if line.get("outcome") == "internal_error"]
