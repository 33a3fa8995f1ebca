"""POST /v1/images/edits: an image painted anew, in part or as a whole."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Request, Response

from app.form import FormRoute
from app.openai import answer
from app.openai.edits import EditsForm
from app.openai.schemas import ImagesResponse
from app.reference_image import decode_edit
from app.request_context import context_of
from app.routes.openai import CONTENT, STATUSES, find_model, prepare
from app.routes.state import StateDep

PATH = "/v1/images/edits"

router = APIRouter(tags=["OpenAI"], route_class=FormRoute)


@router.post(
    PATH,
    summary="Edit an image as OpenAI's API does",
    response_model=ImagesResponse,
    responses={**STATUSES, 200: {"content": CONTENT, "description": "images, or events with `stream`"}},
)
async def edits(
    http: Request, service: StateDep, form: Annotated[EditsForm, Form(media_type="multipart/form-data")]
) -> Response:
    """Without a mask the image is noised as far as `strength` says and denoised as the prompt's class. With one, only
    what is transparent in it is painted. The events of a stream are `image_edit.partial_image`, `image_edit.completed`
    and `error`."""
    context_of(http.scope).user = form.logged_user
    served = find_model(service, form.model)
    form, note = form.unfitted(served.config)
    form.check_fields()
    image, mask = await form.image.read(), None if form.mask is None else await form.mask.read()
    edit = await service.decode(decode_edit, image, mask, served.config.unet.image_shape)
    images = prepare(service, served, form, "image_edit", edit, form.strength_of(edit), note)
    return await answer.send(service, http, images, bool(form.stream))
