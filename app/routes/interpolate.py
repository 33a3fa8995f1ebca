"""GET /interpolate: images on the way from one seed to another."""

from __future__ import annotations

import asyncio
import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from app import encoders
from app.errors import InvalidRequest, NotReady
from app.request_context import context_of
from app.request_params import LARGEST_JSON_INTEGER, build_request
from app.routes.state import ERRORS, StateDep, in_flight
from app.schemas import InterpolateQuery
from app.streaming import nothing
from app.validation import refuse_repeated
from model.images import Image, grid
from model.sampling.edit import Edit
from model.sampling.noise import between, draw_class
from model.sampling.schedule import COEFFICIENTS, FITTED

router = APIRouter(tags=["images"])

MEDIA_TYPES = {"png": "image/png", "gif": "image/gif", "webp": "image/webp"}
BINARY = {"schema": {"type": "string", "format": "binary"}}
CONTENT: dict[str, Any] = dict.fromkeys(MEDIA_TYPES.values(), BINARY)
ALTERNATIVES = "take dpmpp_2m, dpmpp_3m, or ddim with eta 0"


@router.get(
    "/interpolate",
    summary="Images between two seeds",
    response_class=Response,
    openapi_extra={"x-example": {"seed": 1, "to_seed": 2}, "x-output": ["-o", "between.png"]},
    responses={**ERRORS, 200: {"content": CONTENT, "description": "a strip, or an animation"}},
)
async def interpolate(query: Annotated[InterpolateQuery, Query()], http: Request, service: StateDep) -> Response:
    """Image `index` of `seed`, that of `to_seed`, and between them what comes of the noise between theirs, all of one
    class. Samplers that add noise on their way are refused."""
    refuse_repeated(name for name, _ in http.query_params.multi_items() if name != "guidance_interval")
    query.check(service.settings)
    served = service.models.find(query.model)
    seed, to_seed = (secrets.randbelow(LARGEST_JSON_INTEGER) if s is None else s for s in (query.seed, query.to_seed))
    if seed == to_seed:
        raise InvalidRequest("to_seed must be another than seed", param="to_seed")
    if query.overrides()["sampler"] == FITTED:
        raise InvalidRequest(f"sampler {FITTED} begins from the noise of one seed: {ALTERNATIVES}", param="sampler")
    unet = served.config.unet
    query.seed = seed
    if query.class_label is None and unet.num_classes is not None and not query.each_class:
        query.class_label = served.config.class_names[draw_class(seed, query.index, unet.num_classes)]
    latents = await asyncio.to_thread(between, (seed, to_seed), query.index, query.n, unet.image_shape)
    job = build_request(query, served, service.settings, edit=Edit(latents))
    if job.request.schedule.table[:, COEFFICIENTS.index("s")].any():
        raise InvalidRequest(f"sampler {job.sampling.sampler} adds noise on its way: {ALTERNATIVES}", param="sampler")
    provenance = {**job.provenance, "to_seed": str(to_seed)}
    extra = {**job.headers(to_seed=str(to_seed)), "Cache-Control": "no-store"}
    if context_of(http.scope).is_head:
        if reason := service.engine.unready_reason:
            raise NotReady(reason, retry_after=5)
        return StreamingResponse(nothing(), media_type=MEDIA_TYPES[query.format], headers=extra)
    async with in_flight(service, http, job):
        pictures = await job.request.output.images()
    content = await service.encode(job, _encode, pictures, query.format, query.columns, provenance)
    return Response(content, media_type=MEDIA_TYPES[query.format], headers=extra)


def _encode(pictures: Image, format: str, columns: int | None, provenance: dict[str, str]) -> bytes:
    if format == "png":
        return encoders.png(grid(pictures, columns or len(pictures)), provenance)
    return encoders.animation([grid(pictures[i : i + 1]) for i in range(len(pictures))], format)
