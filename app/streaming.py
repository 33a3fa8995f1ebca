"""Streams: their events, their heartbeats, and the place in the engine that they give up."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class JobStream(StreamingResponse):
    """A streaming response that gives up its place in the engine however it ends. `in_flight` ends it for a client that
    leaves.

    It sends `heartbeat` after every `seconds` without a piece: proxies cut what is silent.
    """

    def __init__(
        self, place: AsyncExitStack, pieces: AsyncIterator[bytes], heartbeat: bytes, seconds: float, **options: Any
    ):
        super().__init__(pieces, **options)
        self._place, self._heartbeat, self._seconds = place, heartbeat, seconds
        self._silent_since = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._place:
            await self.stream_response(send)

    async def stream_response(self, send: Send) -> None:
        """As Starlette's."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        beat = asyncio.create_task(self._beat(send))
        try:
            self._silent_since = time.monotonic()
            async for piece in self.body_iterator:
                self._silent_since = math.inf  # until it is sent
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                self._silent_since = time.monotonic()
        finally:
            beat.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _beat(self, send: Send) -> None:
        while True:
            left = min(self._seconds, self._silent_since + self._seconds - time.monotonic())
            if left > 0:
                await asyncio.sleep(left)
            else:
                await send({"type": "http.response.body", "body": self._heartbeat, "more_body": True})
                self._silent_since = max(self._silent_since, time.monotonic())


async def nothing() -> AsyncIterator[bytes]:
    """The body of an answer to HEAD."""
    pieces: tuple[bytes, ...] = ()
    for piece in pieces:
        yield piece


def sse_event(name: str, data: object, id: int | None = None) -> bytes:
    """A server-sent event whose data is JSON."""
    line = "" if id is None else f"id: {id}\n"
    return f"event: {name}\n{line}data: {json.dumps(data)}\n\n".encode()
