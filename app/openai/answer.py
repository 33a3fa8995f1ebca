"""The answer to a request for images under /v1: one JSON object, or events out of the shared batch."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request, Response

from app.errors import ServiceError
from app.openai.errors import body_of
from app.openai.schemas import ImageData, ImagesResponse, TokensDetails, Usage
from app.picture_format import PictureFormat, size_text
from app.request_context import context_of
from app.request_params import GenerationJob
from app.routes.state import AppState, in_flight
from app.streaming import JobStream, sse_event
from model.images import Image, grid

HEARTBEAT = b": keepalive\n\n"
Event = Literal["image_generation", "image_edit"]


@dataclass(frozen=True)
class ImagesAnswer:
    """Everything about an answer but its pixels. `event` begins the names of a stream's events; `note` says what was
    done otherwise than asked."""

    job: GenerationJob
    picture: PictureFormat
    quality: str | None
    event: Event
    safety_identifier: str | None = None
    note: str | None = None

    @property
    def native_size(self) -> str:
        """Of the checkpoint's images."""
        _, height, width = self.job.checkpoint.config.unet.image_shape
        return size_text((width, height))

    @property
    def size(self) -> str:
        """Of the images that are sent."""
        return size_text(self.picture.size) if self.picture.size else self.native_size

    def headers(self) -> dict[str, str]:
        """X-DDPM-…, with the size that an image was enlarged from."""
        enlarged = {"enlarged_from": self.native_size} if self.picture.size else {}
        note = {"note": self.note} if self.note else {}
        return self.job.headers(**enlarged, **note)

    def encode(self, pictures: Image) -> list[str]:
        """Each image's file in base64."""
        files = [
            self.picture.encode(grid(pictures[i : i + 1]), self.job.provenance_of(i)) for i in range(len(pictures))
        ]
        return [base64.b64encode(file).decode() for file in files]

    def usage(self, n: int) -> Usage:
        """Of n images."""
        steps = n * len(self.job.request.schedule)
        nothing = TokensDetails(image_tokens=0, text_tokens=0)
        return Usage(
            input_tokens=0,
            output_tokens=steps,
            total_tokens=steps,
            input_tokens_details=nothing,
            output_tokens_details=TokensDetails(image_tokens=steps, text_tokens=0),
        )

    def image(self, i: int, **content: str) -> ImageData:
        """Image i as b64_json or url."""
        request = self.job.request
        revised = self.job.class_of(i)[1] or "random"
        return ImageData(revised_prompt=revised, seed=request.seed, index=request.index + i, **content)

    def response(self, data: list[ImageData], usage: Usage | None) -> ImagesResponse:
        """The object around the images."""
        return ImagesResponse(
            created=int(time.time()),
            model=self.job.checkpoint.name,
            background="opaque",
            output_format=self.picture.format,
            quality=self.quality,
            size=self.size,
            enlarged_from=self.native_size if self.picture.size else None,
            safety_identifier=self.safety_identifier,
            note=self.note,
            data=data,
            usage=usage,
        )


async def send(service: AppState, http: Request, answer: ImagesAnswer, stream: bool) -> Response:
    """Submits the job, waits for its images, and answers. Raises ServiceError before anything is sent."""
    job = answer.job
    if not stream:
        async with in_flight(service, http, job):
            pictures = await job.request.output.images()
        encoded = await service.encode(job, answer.encode, pictures)
        data = [answer.image(i, b64_json=text) for i, text in enumerate(encoded)]
        return json_response(answer.response(data, answer.usage(len(data))), answer)
    stack = AsyncExitStack()
    await stack.enter_async_context(in_flight(service, http, job))  # errors of admission are ordinary responses
    extra = {**answer.headers(), "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    pieces, seconds = _events(service, http, answer), service.settings.stream_heartbeat_s
    return JobStream(stack, pieces, HEARTBEAT, seconds, media_type="text/event-stream", headers=extra)


def json_response(response: ImagesResponse, answer: ImagesAnswer) -> Response:
    """The object as JSON, without fields that are not there."""
    text = response.model_dump_json(exclude_none=True)
    return Response(text, media_type="application/json", headers=answer.headers())


async def _events(service: AppState, http: Request, answer: ImagesAnswer) -> AsyncIterator[bytes]:
    job, sent = answer.job, 0
    shared = {
        "size": answer.size,
        "quality": answer.quality or "auto",
        "background": "opaque",
        "output_format": answer.picture.format,
    }

    def event(name: str, text: str, i: int, **more: object) -> bytes:
        kind = f"{answer.event}.{name}"
        own: dict[str, Any] = {"type": kind, "b64_json": text, "created_at": int(time.time()), **shared, **more}
        place = answer.image(i).model_dump(exclude_none=True) | {"image_index": i}
        return sse_event(kind, own | place)

    try:
        async for frame in job.request.output.frames():
            for i, text in enumerate(await service.encode(job, answer.encode, frame.images)):
                yield event("partial_image", text, i, partial_image_index=sent)
            service.metrics.count_frame(job.request.model, job.request.arrival_time, first=sent == 0)
            sent += 1
        for i, text in enumerate(await service.encode(job, answer.encode, await job.request.output.images())):
            extra = {} if answer.safety_identifier is None else {"safety_identifier": answer.safety_identifier}
            yield event("completed", text, i, usage=answer.usage(1).model_dump(), **extra)
    except ServiceError as error:
        context_of(http.scope).outcome = error.code
        yield sse_event("error", {"type": "error", **body_of(error)})
