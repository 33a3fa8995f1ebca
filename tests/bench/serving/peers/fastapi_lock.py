"""A plain FastAPI application: one request at a time, under a lock. So it can stream what it computes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from tests.bench.serving.backend import Backend
from tests.bench.serving.settings import settings


def create_app(backend: Backend) -> FastAPI:
    """POST /generate for a picture, POST /stream for its making."""
    app, lock = FastAPI(), asyncio.Lock()

    @app.post("/generate")
    async def generate(body: dict[str, Any]) -> Response:
        async with lock:
            (picture,) = await asyncio.to_thread(backend.generate, [body])
        return Response(picture, media_type="image/png")

    @app.post("/stream")
    async def stream(body: dict[str, Any]) -> StreamingResponse:
        return StreamingResponse(events(body), media_type="text/event-stream")

    async def events(body: dict[str, Any]) -> AsyncIterator[bytes]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()
        async with lock:
            work = asyncio.create_task(
                asyncio.to_thread(backend.stream, body, lambda e: loop.call_soon_threadsafe(queue.put_nowait, e))
            )
            work.add_done_callback(lambda _: queue.put_nowait(None))
            while (item := await queue.get()) is not None:
                yield item
            await work

    return app


if __name__ == "__main__":
    told = settings()
    uvicorn.run(create_app(Backend(told)), host="127.0.0.1", port=told.port, log_level="warning", access_log=False)
