"""GET /images/…: an image by its address. Caches may keep it for ever, since the address has all that decides it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import StreamingResponse

from app import encoders
from app.addresses import ImageAddress, class_label, find_version, matches
from app.engine.instance import ModelInstance
from app.errors import InvalidRequest, NotReady
from app.picture_format import PictureFormat, Size, enlargement
from app.request_context import context_of
from app.request_params import GenerationJob, build_request
from app.routes.state import ERRORS, AppState, StateDep, in_flight
from app.schemas import OPTIONAL, ErrorResponse, ImageQuery, Sampling, SequenceQuery
from app.signing import EXPIRES, SIGNATURE, encoded
from app.streaming import nothing
from app.validation import refuse_repeated
from model.images import Image, grid

router = APIRouter(tags=["images"])

FRAMES = 20  # of an animation that does not say
BINARY = {"schema": {"type": "string", "format": "binary"}}
MEDIA_TYPES = ("image/png", "image/webp", "image/jpeg", "image/gif")
STATUSES: dict[int | str, dict[str, object]] = {
    **{status: told for status, told in ERRORS.items() if status not in (406, 408, 413, 415)},
    304: {"description": "the client has it"},
    307: {"description": "the address in full: with the checkpoint's hash and every parameter"},
    403: {"model": ErrorResponse, "description": "the signature has expired, or fits another address"},
    410: {"model": ErrorResponse, "description": "this checkpoint is not served any more; the message says which are"},
}


@dataclass(frozen=True)
class Asked:
    """The path of an address, read. `extension` is png, webp, jpeg or gif."""

    checkpoint: ModelInstance
    class_label: str
    seed: int
    index: int
    extension: Any


@router.get(
    "/images/{model}/{class_label:path}/{seed}/{index}.{extension}",
    summary="An image by its address",
    response_class=Response,
    openapi_extra={"x-output": ["-L", "-o", "image.png"]},
    responses={**STATUSES, 200: {"content": dict.fromkeys(MEDIA_TYPES, BINARY), "description": "the image"}},
)
async def image(
    http: Request,
    service: StateDep,
    model: Annotated[str, Path(description="its name, or NAME@HASH")],
    class_label: Annotated[str, Path(description="its name or index, or random")],
    seed: Annotated[int, Path(ge=0, lt=2**64)],
    index: Annotated[int, Path(ge=0, lt=2**31, description="place in the seed's sequence")],
    extension: Annotated[Literal["png", "webp", "jpg", "jpeg", "gif"], Path(description="gif is an animation")],
    query: Annotated[ImageQuery, Query()],
) -> Response:
    """A short address leads to the full one, whose answer never changes: `Cache-Control` and `ETag` let caches keep
    it. `.gif`, and `.webp` with `frames`, are the denoising as an animation."""
    given = http.query_params.multi_items()
    refuse_repeated(name for name, _ in given)
    caching = _caching(service, http)
    asked = Asked(
        find_version(service.models, model), class_label, seed, index, "jpeg" if extension == "jpg" else extension
    )
    address, picture = resolve(service, asked, query)
    signing = [pair for pair in given if pair[0] in (EXPIRES, SIGNATURE)]
    path = (model, class_label, str(seed), f"{index}.{extension}")
    if path != address.segments or dict(given) != dict(address.query + signing):
        return _redirect(service, http, address, dict(signing).get(EXPIRES), caching)
    caching["ETag"] = address.etag
    if matches(",".join(http.headers.getlist("if-none-match")), address.etag):
        return Response(status_code=304, headers=caching)
    media_type, job = f"image/{asked.extension}", address.job
    extra = {**job.headers(), **caching}
    if context_of(http.scope).is_head:
        if reason := service.engine.unready_reason:
            raise NotReady(reason, retry_after=5)
        return StreamingResponse(nothing(), media_type=media_type, headers=extra)
    async with in_flight(service, http, job):
        frames = [frame.images async for frame in job.request.output.frames()]
        pictures = await job.request.output.images()
    if frames:
        service.metrics.frames_sent.labels(job.request.model).inc(len(frames))
        content = await service.encode(job, _animation, frames, asked.extension, picture.size)
    else:
        content = await service.encode(job, picture.encode, grid(pictures), job.provenance_of(0))
    return Response(content, media_type=media_type, headers=extra)


def resolve(service: AppState, asked: Asked, query: ImageQuery) -> tuple[ImageAddress, PictureFormat]:
    """The full address, whose job is not submitted, and how its image becomes a file. Raises InvalidRequest or
    InvalidClassLabel."""
    served, settings, extension = asked.checkpoint, service.settings, asked.extension
    is_animated = extension == "gif" or query.frames is not None
    if query.signature is None and query.expires is not None:
        raise InvalidRequest("expires needs a signature", param=EXPIRES)
    if (query.frames is not None and extension not in ("gif", "webp")) or (query.view and not is_animated):
        raise InvalidRequest("frames and view are of .gif, and of .webp with frames", param="frames")
    if query.output_compression is not None and (is_animated or extension == "png"):
        raise InvalidRequest("output_compression is of .jpeg, and of .webp without frames", param="output_compression")
    fields: dict[str, Any] = {name: getattr(query, name) for name in OPTIONAL}
    fields["class_label"] = class_label(asked.class_label, served.config.class_names)
    fields |= {"seed": asked.seed, "index": asked.index}
    options: dict[str, Any] = {}
    if is_animated:
        options = {"frames": FRAMES if query.frames is None else query.frames, "view": query.view or "xt"}
        job = build_request(SequenceQuery(**fields, **options, format=extension), served, settings)
    else:
        job = build_request(Sampling(**fields), served, settings)
    pictures = max(1, len(job.request.frame_steps))
    size = enlargement(query.size, served.config.unet.image_shape, pictures, settings.max_enlarged_bytes)
    compression = 100 if query.output_compression is None else query.output_compression
    picture = PictureFormat("png" if is_animated else extension, compression, size)
    return ImageAddress(job, 0, extension, tuple({**options, **picture.options()}.items())), picture


def link(service: AppState, http: Request, job: GenerationJob, i: int, picture: PictureFormat) -> str:
    """The full address of a job's image i, with scheme and host; signed where it would need a key."""
    address = ImageAddress(job, i, picture.format, tuple(picture.options().items()))
    return service.images.link(f"{http.base_url}images/{address}")


def _caching(service: AppState, http: Request) -> dict[str, str]:
    """Raises Forbidden where the address has a signature that is not good."""
    control = service.images.cache_control(http.scope["path"], http.scope["query_string"])
    # An image that all may see may stand on any page; one that needs a key is only for those of this server.
    anywhere = {"Cross-Origin-Resource-Policy": "cross-origin"} if control.startswith("public") else {}
    return {"Cache-Control": control, **anywhere}


def _redirect(
    service: AppState, http: Request, address: ImageAddress, expires: str | None, caching: dict[str, str]
) -> Response:
    """To the address in full, relative, so that it works behind a proxy that adds a prefix; signed if this one was."""
    query = address.query
    if expires is not None and service.images.signer:
        query = service.images.signer.signed("/images/" + "/".join(address.segments), query, int(expires))
    after = http.scope["raw_path"].partition(b"/images/")[2]
    location = "../" * after.count(b"/") + f"{address.path}?{encoded(query)}"
    return Response(status_code=307, headers={**caching, "Location": location, "Cache-Control": "no-cache"})


def _animation(frames: Sequence[Image], format: str, size: Size | None) -> bytes:
    grids = [grid(frame) for frame in frames]
    return encoders.animation([encoders.enlarged(one, size) for one in grids] if size else grids, format)
