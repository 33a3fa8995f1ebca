"""POST /generate: images, as one grid, as JSON, as a zip, or as an array."""

from __future__ import annotations

import base64
import re
from typing import Any

from fastapi import APIRouter, Request, Response

from app import encoders
from app.body import JSONRoute
from app.negotiation import negotiate
from app.request_params import GenerationJob, build_request
from app.routes.state import ERRORS, StateDep, in_flight
from app.schemas import GenerateBody, GeneratedImage, GenerateResponse
from model.images import Image, grid

router = APIRouter(tags=["images"], route_class=JSONRoute)

PNG, JSON, ZIP, NPY = "image/png", "application/json", "application/zip", "application/x-npy"
CONTENT: dict[str, Any] = {PNG: {"schema": {"type": "string", "format": "binary"}}}
CONTENT[ZIP] = CONTENT[NPY] = CONTENT[PNG]
EMPTY = GenerateBody()  # what a request without a body asks for; FastAPI copies it


@router.post(
    "/generate",
    summary="Generate images of one class",
    response_model=GenerateResponse,
    openapi_extra={"x-output": ["-o", "encoders.png"]},
    responses={
        **ERRORS,
        200: {"content": CONTENT, "description": "a grid, the images as JSON, a zip, or an array, as Accept says"},
    },
)
async def generate(http: Request, service: StateDep, body: GenerateBody = EMPTY) -> Response:
    """`Accept` chooses `image/png` (a grid, the default), `application/json`, `application/zip` or `application/x-npy`
    (for `numpy.load`). Seed, sampler, steps, class and checkpoint come back in `X-DDPM-…` headers and in the PNG's
    text; sending them again gives the same images."""
    media_type = negotiate(http.headers.getlist("accept"), (PNG, JSON, ZIP, NPY))
    job = build_request(body, service.models.find(body.model), service.settings)
    async with in_flight(service, http, job):
        pictures = await job.request.output.images()
    content = await service.encode_pictures(pictures, job, _encode, media_type, job, pictures, body.columns)
    return Response(content, media_type=media_type, headers={**job.headers(), "Vary": "Accept"})


def _encode(media_type: str, job: GenerationJob, pictures: Image, columns: int | None) -> bytes:
    if media_type == PNG:
        return encoders.png(grid(pictures, columns), job.provenance)
    if media_type == NPY:
        return encoders.array(pictures)
    singles = [encoders.png(grid(pictures[i : i + 1]), job.provenance_of(i)) for i in range(len(pictures))]
    if media_type == ZIP:
        names = [_file_name(job, i) for i in range(len(singles))]
        return encoders.archive(dict(zip(names, singles, strict=True)))
    listed = []
    for i, data in enumerate(singles):
        label, name = job.class_of(i)
        place = {
            "seed": job.request.seed,
            "index": job.request.index + i,
            "class_label": label,
            "class_name": name,
        }
        listed.append(GeneratedImage(png=base64.b64encode(data).decode(), **place))
    response = GenerateResponse(
        model=job.checkpoint.name,
        checkpoint=job.checkpoint.sha256,
        **vars(job.sampling),
        nfe=job.nfe,
        images=listed,
    )
    return response.model_dump_json().encode()


def _file_name(job: GenerationJob, i: int) -> str:
    label, _ = job.class_of(i)
    prefix = "" if label is None else re.sub(r"[^\w.-]", "_", f"{label}-")
    return f"{prefix}{job.request.index + i}.png"
