"""What the sampling endpoints share: the service they find on the app, and the watch on a client that may leave."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ParamSpec, TypeVar

from fastapi import Depends, Request

from app import encoders
from app.engine.engine import Engine
from app.errors import Cancelled
from app.metrics import Metrics
from app.model_registry import ModelRegistry
from app.request_context import context_of
from app.request_params import GenerationJob
from app.schemas import ErrorResponse
from app.settings import Settings
from app.signing import ImageAccess
from model.images import Image

P = ParamSpec("P")
R = TypeVar("R")

MAX_DECODERS = 2
MAX_ENCODERS = min(4, os.cpu_count() or 1)
WATCH_AFTER_S = 0.02  # after which a client that leaves is noticed
INLINE_PIXELS = encoders.SMALL  # values of images that the event loop encodes itself

STATUSES = {
    401: "API keys are configured, and the request has no valid one",
    404: "unknown path or model",
    406: "no acceptable format",
    408: "the body took too long",
    413: "body too large",
    415: "the body is not declared as JSON, or it is compressed",
    422: "malformed, beyond a limit, or an unknown class",
    429: "the queue is full, or the key is over its limit; see Retry-After",
    500: "a step failed",
    503: "loading or draining",
    504: "the timeout passed, or cannot be met",
    507: "not enough device memory for a single image",
}
ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in STATUSES.items()
}


@dataclass(frozen=True)
class AppState:
    """What handlers work with; made once by `create_app`."""

    settings: Settings
    models: ModelRegistry
    engine: Engine
    metrics: Metrics
    images: ImageAccess
    # Few threads: the C library keeps for each what its largest image once took, up to a hundred megabytes.
    decoders: Executor = field(default_factory=lambda: ThreadPoolExecutor(MAX_DECODERS, "decoder"))
    encoders: Executor = field(default_factory=lambda: ThreadPoolExecutor(MAX_ENCODERS, "encoder"))

    async def decode(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs a decoder, which may take a second, in a thread for them alone."""
        return await asyncio.get_running_loop().run_in_executor(self.decoders, partial(function, *args, **kwargs))

    async def encode(self, job: GenerationJob, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Runs an encoder in a thread, so that neither the event loop nor the engine waits for it."""
        with self._timed(job):
            return await asyncio.get_running_loop().run_in_executor(self.encoders, partial(function, *args, **kwargs))

    async def encode_pictures(
        self, pictures: Image, job: GenerationJob, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """The same, but here where the pictures are so small that it takes less time than to ask another thread."""
        if pictures.size > INLINE_PIXELS:
            return await self.encode(job, function, *args, **kwargs)
        with self._timed(job):
            return function(*args, **kwargs)

    @contextmanager
    def _timed(self, job: GenerationJob) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            end = time.monotonic()
            self.metrics.encode_seconds.observe(end - begin)
            job.encodings.append((begin, end))


async def service(request: Request) -> AppState:
    """What this application serves with; a dependency of the handlers. Async, or FastAPI would ask a thread for it."""
    found: AppState = request.app.state.service
    return found


StateDep = Annotated[AppState, Depends(service)]


@asynccontextmanager
async def in_flight(service: AppState, http: Request, job: GenerationJob) -> AsyncIterator[None]:
    """Submits the job, and cancels it as soon as its client leaves or the block ends without an answer."""
    context = context_of(http.scope)
    context.job = job
    service.engine.submit(job.checkpoint, job.request)
    context.admitted = True
    watches: list[asyncio.Task[None]] = []
    # Most answers are there before it would pay to look for who leaves.
    later = asyncio.get_running_loop().call_later(
        WATCH_AFTER_S, lambda: watches.append(asyncio.create_task(_cancel_on_disconnect(service, http, job)))
    )
    try:
        yield
    finally:
        later.cancel()
        for watch in watches:
            watch.cancel()
        service.engine.cancel(job.request)


async def _cancel_on_disconnect(service: AppState, http: Request, job: GenerationJob) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
    if service.engine.cancel(job.request):
        context_of(http.scope).outcome = Cancelled.code  # a stream ends here and never sees the answer
