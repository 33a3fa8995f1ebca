"""Streams: their events, their heartbeats, and the place in the engine that they give up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi.responses import StreamingResponse


class JobStream(StreamingResponse):
    """A streaming response that gives up its place in the engine however it ends."""

    def __init__(self, place: AsyncExitStack, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._place = place

    async def __call__(self, *args: Any) -> None:
        async with self._place:
            await super().__call__(*args)


async def nothing() -> AsyncIterator[bytes]:
    """The body of an answer to HEAD."""
    pieces: tuple[bytes, ...] = ()
    for piece in pieces:
        yield piece


def sse_event(name: str, data: object, id: int | None = None) -> bytes:
    """A server-sent event whose data is JSON."""
    line = "" if id is None else f"id: {id}\n"
    return f"event: {name}\n{line}data: {json.dumps(data)}\n\n".encode()


async def with_heartbeats(pieces: AsyncIterator[bytes], seconds: float, heartbeat: bytes) -> AsyncIterator[bytes]:
    """The pieces as they come, and `heartbeat` after every `seconds` without one: proxies cut what is silent."""
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
