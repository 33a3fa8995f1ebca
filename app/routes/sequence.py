"""GET /diffusion-sequence: the denoising while it happens, as a stream or as a finished animation."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from app import encoders
from app.errors import NotReady, ServiceError
from app.negotiation import negotiate
from app.request_context import context_of
from app.request_params import GenerationJob, build_request
from app.routes.state import ERRORS, AppState, StateDep, in_flight
from app.schemas import Format, SequenceQuery
from app.shortcut import QueryRoute
from app.streaming import JobStream, nothing, sse_event
from app.validation import refuse_repeated
from model.images import Image, grid

router = APIRouter(tags=["images"], route_class=QueryRoute)

BOUNDARY = "ddpm-frame"
MEDIA_TYPES: dict[Format, str] = {
    "sse": "text/event-stream",
    "multipart": "multipart/x-mixed-replace",
    "gif": "image/gif",
    "webp": "image/webp",
}
HEARTBEATS: dict[Format, bytes] = {
    "sse": b": waiting\n\n",  # a comment
    "multipart": b"X-Waiting: yes\r\n",  # in the head of the next part, of which readers heed Content-… only
}
BINARY = {"schema": {"type": "string", "format": "binary"}}
CONTENT: dict[str, Any] = dict.fromkeys(MEDIA_TYPES.values(), BINARY) | {MEDIA_TYPES["sse"]: {}}  # events, no string


@router.get(
    "/diffusion-sequence",
    summary="Watch images being denoised",
    response_class=StreamingResponse,
    openapi_extra={"x-example": {"n": 4, "steps": 20, "format": "gif"}, "x-output": ["-o", "denoising.gif"]},
    responses={
        **ERRORS,
        200: {"content": CONTENT, "description": "frames"},
        204: {"description": "an EventSource that reconnects is told not to"},
    },
)
async def diffusion_sequence(query: Annotated[SequenceQuery, Query()], http: Request, service: StateDep) -> Response:
    """`format=sse` sends the events `start`, `frame`, `completed` and `error` (pictures as base64 PNG), `multipart`
    plays in an `<img>` tag, `gif` and `webp` are files. Streams skip frames for slow readers, files hold them all."""
    if "last-event-id" in http.headers:
        return Response(status_code=204)
    refuse_repeated(name for name, _ in http.query_params.multi_items() if name != "guidance_interval")
    format = query.format or _accepted(http)
    query.format = format
    served = service.models.find(query.model)
    job = build_request(query, served, service.settings, service.metrics.frames_dropped.labels(served.name).inc)
    extra = {**job.headers(), "Cache-Control": "no-store", "Vary": "Accept"}
    if context_of(http.scope).is_head:
        if reason := service.engine.unready_reason:
            raise NotReady(reason, retry_after=5)
        return StreamingResponse(nothing(), media_type=_media_type(format), headers=extra)
    if format in ("gif", "webp"):
        async with in_flight(service, http, job):
            frames = [frame async for frame in job.request.output.frames()]
            await job.request.output.images()
        grids = [grid(frame.images, query.columns) for frame in frames]
        service.metrics.frames_sent.labels(job.request.model).inc(len(grids))
        return Response(
            await service.encode(job, encoders.animation, grids, format),
            media_type=MEDIA_TYPES[format],
            headers=extra,
        )
    stack = AsyncExitStack()
    await stack.enter_async_context(in_flight(service, http, job))  # errors of admission are ordinary responses
    events = _sse if format == "sse" else _multipart
    extra["X-Accel-Buffering"] = "no"  # proxies must pass frames on as they come
    pieces, seconds = events(service, http, job, query.columns), service.settings.stream_heartbeat_s
    return JobStream(stack, pieces, HEARTBEATS[format], seconds, media_type=_media_type(format), headers=extra)


def _accepted(http: Request) -> Format:
    chosen = negotiate(http.headers.getlist("accept"), list(MEDIA_TYPES.values()))
    return next(format for format, media_type in MEDIA_TYPES.items() if media_type == chosen)


def _media_type(format: Format) -> str:
    return MEDIA_TYPES[format] + (f"; boundary={BOUNDARY}" if format == "multipart" else "")


async def _sse(service: AppState, http: Request, job: GenerationJob, columns: int | None) -> AsyncIterator[bytes]:
    start = {
        "class_label": None,  # a mix, unless there is one
        **job.provenance,
        "seed": job.request.seed,
        "index": job.request.index,
        "n": job.request.n,
        **vars(job.sampling),
        "nfe": job.nfe,
        "frames": len(job.request.frame_steps),
        "view": job.request.view,
    }
    yield sse_event("start", start, id=0)  # an EventSource that is cut before the first frame says so, too
    try:
        async for step, png in _frames(service, job, columns):
            picture = base64.b64encode(png).decode()
            yield sse_event("frame", {"step": step, "steps": len(job.request.schedule), "png": picture}, id=step)
        final = await _png(service, job, await job.request.output.images(), columns)
        yield sse_event("completed", {**start, "png": base64.b64encode(final).decode()}, id=len(job.request.schedule))
    except ServiceError as error:
        context_of(http.scope).outcome = error.code
        yield sse_event("error", error.body())


async def _multipart(service: AppState, http: Request, job: GenerationJob, columns: int | None) -> AsyncIterator[bytes]:
    def part(media_type: str, data: bytes) -> bytes:
        return f"Content-Type: {media_type}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data + b"\r\n"

    # The next part begins at once after one: browsers show a frame when it does.
    begin = f"--{BOUNDARY}\r\n".encode()
    yield begin
    try:
        async for _, png in _frames(service, job, columns):
            yield part("image/png", png) + begin
        yield part("image/png", await _png(service, job, await job.request.output.images(), columns))
    except ServiceError as error:
        context_of(http.scope).outcome = error.code
        yield part("application/json", json.dumps(error.body()).encode())
    yield f"--{BOUNDARY}--\r\n".encode()


async def _frames(service: AppState, job: GenerationJob, columns: int | None) -> AsyncIterator[tuple[int, bytes]]:
    """Step and PNG of each frame that the client is in time for. The first is counted by how long it took, too."""
    first = True
    async for frame in job.request.output.frames():
        png = await _png(service, job, frame.images, columns)
        service.metrics.count_frame(job.request.model, job.request.arrival_time, first)
        first = False
        yield frame.step, png


async def _png(service: AppState, job: GenerationJob, pictures: Image, columns: int | None) -> bytes:
    return await service.encode_pictures(pictures, job, encoders.png, grid(pictures, columns), job.provenance)
