"""GET /images/…: an image by its address, which caches may keep for ever, since it says all that decides it."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import RedirectResponse

from app import images
from app.addresses import CLASSLESS, RANDOM, ImageAddress, find_version, matches
from app.engine.instance import ModelInstance
from app.errors import InvalidRequest, NotReady
from app.picture_format import PictureFormat, enlargement, size_text
from app.request_params import GenerationJob, build_request, headers
from app.routes.state import ERRORS, AppState, StateDep, in_flight, is_head
from app.schemas import ErrorResponse, ImageQuery, Sampling, SequenceQuery
from app.signing import encoded, is_signed
from app.validation import refuse_repeated
from model.images import grid

router = APIRouter(tags=["images"])

YEAR_S = 31_536_000
LINK_S = 3600  # for which an address in an answer is signed, as OpenAI's are
ANIMATED = {"frames", "view"}
BINARY = {"schema": {"type": "string", "format": "binary"}}
MEDIA_TYPES = ("image/png", "image/webp", "image/jpeg", "image/gif")
STATUSES: dict[int | str, dict[str, object]] = {
    **{status: told for status, told in ERRORS.items() if status in (401, 404, 422, 429, 500, 503, 504, 507)},
    304: {"description": "the client has it"},
    307: {"description": "the address in full: with the checkpoint's hash and every parameter"},
    403: {"model": ErrorResponse, "description": "the signature has expired, or fits another address"},
    410: {"model": ErrorResponse, "description": "this checkpoint is not served any more; the message says which are"},
}


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
    extension: Annotated[Literal["png", "webp", "jpg", "jpeg", "gif"], Path(description="gif animates")],
    query: Annotated[ImageQuery, Query()],
) -> Response:
    """A short address leads to the full one, whose answer never changes: `Cache-Control` and `ETag` let caches keep
    it. `.gif`, and `.webp` with `frames`, are the denoising as an animation."""
    given = http.query_params.multi_items()
    refuse_repeated(name for name, _ in given)
    if is_signed(given):
        _check_signature(service, http.scope["path"], given)
    asked = Asked(find_version(service.models, model), class_label, seed, index, FORMATS.get(extension, extension))
    address, picture = resolve(service, asked, query)
    signed = [pair for pair in given if pair[0] in SIGNING]
    wanted = (model, class_label, str(seed), f"{index}.{extension}")
    if wanted != address.segments or dict(given) != dict(address.query + signed):
        return _redirect(service, http, address, dict(signed))
    caching = {"ETag": address.etag, **_caching(service, dict(signed))}
    known = http.headers.get("if-none-match")
    if known is not None and matches(known, address.etag):
        return Response(status_code=304, headers=caching)
    extra = {**headers(address.job.provenance()), **caching}
    if is_head(http):
        if reason := service.engine.unready_reason:
            raise NotReady(reason, retry_after=5)
        return Stream(media_type=f"image/{asked.extension}", headers=extra)
    job = address.job
    async with in_flight(service, http, job):
        frames = [frame.images async for frame in job.request.output.frames()]
        pictures = await job.request.output.images()
    if frames:
        service.metrics.frames_sent.labels(job.request.model).inc(len(frames))
        content = await service.encode(job, _animation, frames, asked.extension, picture.size)
    else:
        content = await service.encode(job, picture.encode, grid(pictures), job.provenance_of(0))
    return Response(content, media_type=f"image/{asked.extension}", headers=extra)


@dataclass(frozen=True)
class Asked:
    """The path of an address, read. `extension` is one of png, webp, jpeg, gif."""

    checkpoint: ModelInstance
    class_label: str
    seed: int
    index: int
    extension: str


def resolve(service: AppState, asked: Asked, query: ImageQuery) -> tuple[ImageAddress, PictureFormat]:
    """The full address, with a job that was not submitted, and how its image becomes a file. Raises InvalidRequest or
    InvalidClassLabel."""
    served, is_animated = asked.checkpoint, asked.extension == "gif" or query.frames is not None
    names = served.config.class_names
    label = None if asked.class_label == (RANDOM if names else CLASSLESS) not in names else asked.class_label
    fields = {name: value for name, value in query if name in OPTIONAL}
    fields |= {"class_label": label, "seed": asked.seed, "index": asked.index}
    if not is_animated and (query.frames, query.view) != (None, None) or query.frames and asked.extension not in PLAY:
        raise InvalidRequest("frames and view are of .gif, and of .webp with frames", param="frames")
    if query.output_compression is not None and (is_animated or asked.extension == "png"):
        raise InvalidRequest("output_compression is of .jpeg and .webp", param="output_compression")
    options: dict[str, object] = {}
    if is_animated:
        options = {"frames": 20 if query.frames is None else query.frames, "view": query.view or "xt"}
        job = build_request(SequenceQuery(**fields, **options, format=asked.extension), served, service.settings)
    else:
        job = build_request(Sampling(**fields), served, service.settings)
    unet, count = served.config.unet, max(1, len(job.request.frame_steps))
    size = enlargement(query.size, unet.image_shape, count, service.settings.max_enlarged_bytes)
    compression = 100 if query.output_compression is None else query.output_compression
    if not is_animated and asked.extension != "png":
        options["output_compression"] = compression
    if size:
        options["size"] = size_text(size)
    picture = PictureFormat("png" if is_animated else asked.extension, compression, size)
    return ImageAddress(job, 0, asked.extension, tuple((name, str(value)) for name, value in options.items())), picture


def link(service: AppState, http: Request, job: GenerationJob, i: int, picture: PictureFormat) -> str:
    """Scheme, host and full address of a job's image i; signed for an hour where it needs a key otherwise."""
    options = {} if picture.format == "png" else {"output_compression": str(picture.compression)}
    if picture.size:
        options["size"] = size_text(picture.size)
    address = ImageAddress(job, i, picture.format, tuple(options.items()))
    whole = f"{http.base_url}images/{address}"
    if not service.keys_required or service.settings.public_images or service.signer is None:
        return whole
    return service.signer.sign(whole, LINK_S)
