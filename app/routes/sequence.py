"""GET /diffusion-sequence: the denoising while it happens, as a stream or as a finished animation."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from app import images
from app.errors import ServiceError
from app.negotiation import negotiate
from app.request_params import Job, headers, make_job
from app.routes.state import ERRORS, Service, TheService, admitted
from app.schemas import Format, SequenceQuery
from model.images import Image, grid

router = APIRouter(tags=["images"])

BOUNDARY = "ddpm-frame"
MEDIA_TYPES: dict[Format, str] = {
    "sse": "text/event-stream",
    "multipart": "multipart/x-mixed-replace",
    "gif": "image/gif",
    "webp": "image/webp",
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
CONTENT: dict[str, Any] = dict.fromkeys(MEDIA_TYPES.values(), BINARY) | {MEDIA_TYPES["sse"]: {}}  # events, no string


@router.get(
    "/diffusion-sequence",
    summary="Watch images being denoised",
    response_class=StreamingResponse,
    responses={
        **ERRORS,
        200: {"content": CONTENT, "description": "frames"},
        204: {"description": "an EventSource that reconnects is told not to"},
    },
)
async def diffusion_sequence(query: Annotated[SequenceQuery, Query()], http: Request, service: TheService) -> Response:
    """`format=sse` sends the events `start`, `frame`, `completed` and `error` (pictures as base64 PNG), `multipart`
    plays in an `<img>` tag, `gif` and `webp` are files. Streams skip frames for slow readers, files hold them all."""
    if "last-event-id" in http.headers:
        return Response(status_code=204)
    if query.format is None:
        chosen = negotiate(http.headers.get("accept"), list(MEDIA_TYPES.values()))
        query.format = next(name for name, media_type in MEDIA_TYPES.items() if media_type == chosen)
    served = service.models.find(query.model)
    job = make_job(query, served, service.settings, service.metrics.frames_dropped.labels(served.name).inc)
    extra = {**headers(job.provenance()), "Cache-Control": "no-store", "Vary": "Accept"}
    if query.format in ("gif", "webp"):
        async with admitted(service, http, job):
            frames = [frame async for frame in job.request.mailbox.frames()]
            await job.request.mailbox.answer()
        grids = [grid(frame.images, query.columns) for frame in frames]
        service.metrics.frames_sent.labels(job.request.model).inc(len(grids))
        return Response(
            await service.encode(job, images.animation, grids, query.format),
            media_type=MEDIA_TYPES[query.format],
            headers=extra,
        )
    stack = AsyncExitStack()
    await stack.enter_async_context(admitted(service, http, job))  # errors of admission are ordinary responses
    events = _sse if query.format == "sse" else _multipart
    media_type = MEDIA_TYPES[query.format or "sse"]
    if query.format == "multipart":
        media_type += f"; boundary={BOUNDARY}"
    extra["X-Accel-Buffering"] = "no"  # proxies must pass frames on as they come
    return Stream(stack, events(service, http, job, query.columns), media_type=media_type, headers=extra)


class Stream(StreamingResponse):
    """A streaming response that gives up its place in the engine however it ends."""

    def __init__(self, place: AsyncExitStack, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._place = place

    async def __call__(self, *args: Any) -> None:
        async with self._place:
            await super().__call__(*args)


async def _sse(service: Service, http: Request, job: Job, columns: int | None) -> AsyncIterator[bytes]:
    start = {
        "class_label": None,  # a mix, unless there is one
        **job.provenance(),
        "seed": job.request.seed,
        "index": job.request.index,
        "n": job.request.n,
        **vars(job.sampling),
        "frames": len(job.request.frame_steps),
        "view": job.request.view,
    }
    yield _event("start", start)
    try:
        async for step, png in _frames(service, job, columns):
            picture = base64.b64encode(png).decode()
            yield _event("frame", {"step": step, "steps": len(job.request.plan), "png": picture}, id=step)
        final = await _png(service, job, await job.request.mailbox.answer(), columns)
        yield _event("completed", {**start, "png": base64.b64encode(final).decode()}, id=len(job.request.plan))
    except ServiceError as error:
        http.state.outcome = error.code
        yield _event("error", error.body())


async def _multipart(service: Service, http: Request, job: Job, columns: int | None) -> AsyncIterator[bytes]:
    def part(media_type: str, data: bytes) -> bytes:
        head = f"--{BOUNDARY}\r\nContent-Type: {media_type}\r\nContent-Length: {len(data)}\r\n\r\n"
        return head.encode() + data + b"\r\n"

    try:
        async for _, png in _frames(service, job, columns):
            yield part("image/png", png)
        yield part("image/png", await _png(service, job, await job.request.mailbox.answer(), columns))
    except ServiceError as error:
        http.state.outcome = error.code
        yield part("application/json", json.dumps(error.body()).encode())
    yield f"--{BOUNDARY}--\r\n".encode()


async def _frames(service: Service, job: Job, columns: int | None) -> AsyncIterator[tuple[int, bytes]]:
    """Step and PNG of each frame that the client is in time for. The first is counted by how long it took, too."""
    model, first = job.request.model, True
    async for frame in job.request.mailbox.frames():
        png = await _png(service, job, frame.images, columns)
        if first:
            service.metrics.first_frame_seconds.labels(model).observe(time.monotonic() - job.request.submitted)
            first = False
        service.metrics.frames_sent.labels(model).inc()
        yield frame.step, png


async def _png(service: Service, job: Job, pictures: Image, columns: int | None) -> bytes:
    return await service.encode(job, images.png, grid(pictures, columns), job.provenance())


def _event(name: str, data: object, id: int | None = None) -> bytes:
    line = "" if id is None else f"id: {id}\n"
    return f"event: {name}\n{line}data: {json.dumps(data)}\n\n".encode()
