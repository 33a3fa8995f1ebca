"""/v1: OpenAI's images API, so that its clients are clients of this service."""

from __future__ import annotations

import re
from typing import Any

from fastapi import APIRouter, Request, Response

from app.body import JSONRoute
from app.engine.instance import ModelInstance
from app.errors import InvalidRequest, ModelNotFound, NotReady
from app.openai import answer
from app.openai.answer import Event, ImagesAnswer
from app.openai.prompt import class_of_prompt
from app.openai.quality import level_of, plan
from app.openai.schemas import GenerationsBody, ImagesRequest, ImagesResponse, ModelObject, ModelObjects
from app.picture_format import PictureFormat, enlargement
from app.request_context import context_of
from app.request_params import build_request, editing_config
from app.routes.image import link
from app.routes.state import ERRORS, AppState, StateDep
from app.schemas import ErrorResponse
from model.sampling.edit import Edit
from model.sampling.schedule import InvalidSamplingParams

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=JSONRoute)

FOREIGN = re.compile(r"(dall-e|gpt-image|chatgpt-image)-[\w.-]+")
"""OpenAI's models, which clients name that let nobody choose."""
STATUSES: dict[int | str, dict[str, object]] = {
    **{status: told for status, told in ERRORS.items() if status not in (406, 422)},
    400: {"model": ErrorResponse, "description": "malformed, out of limits, or not one class in the prompt"},
}
CONTENT: dict[str, Any] = {"text/event-stream": {}}


def _of(*statuses: int) -> dict[int | str, dict[str, object]]:
    return {status: ERRORS[status] for status in statuses}


@router.post(
    "/images/generations",
    summary="Generate images as OpenAI's API does",
    response_model=ImagesResponse,
    responses={**STATUSES, 200: {"content": CONTENT, "description": "images, or events with `stream`"}},
)
async def generations(http: Request, service: StateDep, body: GenerationsBody) -> Response:
    """For clients of OpenAI's images API: `base_url` is this server's address with `/v1`. The events of a stream are
    `image_generation.partial_image`, `image_generation.completed` and `error`."""
    context_of(http.scope).user = body.logged_user
    images = prepare(service, find_model(service, body.model), body, "image_generation")
    if body.response_format != "url":
        return await answer.send(service, http, images, bool(body.stream))
    if reason := service.engine.unready_reason:
        raise NotReady(reason, retry_after=5)
    job = images.job
    data = [images.image(i, url=link(service, http, job, i, images.picture)) for i in range(job.request.n)]
    return answer.json_response(images.response(data, None), images)


@router.get("/models", summary="The checkpoints that are served, as OpenAI lists models", responses=_of(401))
async def models(service: StateDep) -> ModelObjects:
    """`GET /models` says more about them."""
    return ModelObjects(data=[_object(served) for served in service.models])


@router.get("/models/{name}", summary="One of them", responses=_of(401, 404))
async def model(name: str, service: StateDep) -> ModelObject:
    """By its name."""
    return _object(service.models.find(name))


def prepare(
    service: AppState,
    served: ModelInstance,
    body: ImagesRequest,
    event: Event,
    edit: Edit | None = None,
    strength: float | None = None,
    note: str | None = None,
) -> ImagesAnswer:
    """The job that a request wants, and the shape of its answer. Raises ServiceError."""
    body.check_fields()
    settings, names, unet = service.settings, served.config.class_names, served.config.unet
    label = class_of_prompt(body.prompt, names)
    asked = body.sampling(None if label is None else names[label])
    asked.check(settings)
    size = enlargement(body.size, unet.image_shape, asked.n, settings.max_enlarged_bytes)
    config = served.config if edit is None else editing_config(served.config)
    try:
        asked = asked.model_copy(update=plan(body, config, settings.max_steps))
    except InvalidSamplingParams as error:
        raise InvalidRequest(str(error), param=error.field) from error
    job = build_request(asked, served, settings, edit=edit, strength=strength)
    picture = PictureFormat(body.picture_format, body.compression, size)
    return ImagesAnswer(job, picture, level_of(body), event, body.logged_user or None, note)


def find_model(service: AppState, name: str | None) -> ModelInstance:
    """The checkpoint of that name; the default where it is none or one of OpenAI's. Raises ModelNotFound."""
    try:
        return service.models.find(name)
    except ModelNotFound:
        if not FOREIGN.fullmatch(name or ""):
            raise
        return service.models.default


def _object(served: ModelInstance) -> ModelObject:
    return ModelObject(id=served.name, created=served.loaded_at)
