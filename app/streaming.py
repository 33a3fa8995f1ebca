"""A stream that is never silent for long: proxies cut what sends nothing for a minute."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator


async def with_heartbeats(pieces: AsyncIterator[bytes], seconds: float, heartbeat: bytes) -> AsyncIterator[bytes]:
    """The pieces as they come, and `heartbeat` after every `seconds` without one."""
    upcoming = asyncio.ensure_future(anext(pieces))
    try:
        while True:
            done, _ = await asyncio.wait([upcoming], timeout=seconds)
            if not done:
                yield heartbeat
                continue
            try:
                piece = upcoming.result()
            except StopAsyncIteration:
                return
            yield piece
            upcoming = asyncio.ensure_future(anext(pieces))
    finally:
        upcoming.cancel()
        await asyncio.wait([upcoming])  # or its last words would be lost
