"""/models: what is served, and for those with the right to it, what shall be."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, Request

from app.body import JSONRoute
from app.engine.instance import ModelInstance
from app.errors import Forbidden
from app.plans import plans
from app.request_context import context_of
from app.routes.state import ERRORS, AppState, StateDep
from app.schemas import ErrorResponse, LoadBody, LoadedModel, ModelCard, ModelList
from model.sampling.schedule import FITTED
from model.sampling.solvers import SAMPLERS

router = APIRouter(tags=["models"], route_class=JSONRoute)


def administrator(http: Request) -> None:
    """A dependency of what changes the service for everybody. Raises Forbidden."""
    key = context_of(http.scope).key
    if key is None or not key.admin:
        raise Forbidden("only an API key that has admin = true in --api-keys-file may load and remove models")


Administrator = Depends(administrator)
STATUSES = {
    403: "the key is not an admin key",
    404: "no such model",
    409: "another checkpoint is loading, or this is the default",
    422: "malformed, or the file is not a usable checkpoint",
    500: "the device cannot run it",
    507: "not enough device memory beside the served checkpoints",
}
CHANGES: dict[int | str, dict[str, object]] = {
    **{status: ERRORS[status] for status in (401, 408, 413, 415, 503)},
    **{status: {"model": ErrorResponse, "description": text} for status, text in STATUSES.items()},
}


@router.get("/models", summary="The checkpoints that are served")
async def models(service: StateDep) -> ModelList:
    """Class names, samplers, defaults, limits, and where each checkpoint comes from. The default is the first."""
    cards = [ModelCard(**model_card(service, served)) for served in service.models]
    return ModelList(models=cards, loading=service.models.loading)


@router.post(
    "/models",
    summary="Load a checkpoint, or its changed file",
    dependencies=[Administrator],
    responses=CHANGES,
)
async def load(body: LoadBody, service: StateDep) -> LoadedModel:
    """Answers when new requests get it. Those that are under way end on the weights that they began with. Where it
    cannot be served nothing changes. Needs an API key with `admin = true`."""
    served, replaced = await service.models.load(body.name)
    return LoadedModel(**model_card(service, served), replaced=replaced)


@router.delete("/models/{name}", summary="Serve a checkpoint no more", dependencies=[Administrator], responses=CHANGES)
async def remove(name: str, service: StateDep) -> ModelList:
    """Requests that are under way are done; then its memory is free. The default stays. Needs an API key with
    `admin = true`."""
    service.models.remove(name)
    return await models(service)


def model_card(service: AppState, served: ModelInstance) -> dict[str, Any]:
    """The fields of a ModelCard."""
    settings, config = service.settings, served.config
    fitted_steps = sorted({table.steps for table in config.fitted if table.steps <= settings.max_steps})
    samplers = [*SAMPLERS, *([FITTED] if fitted_steps else [])]
    default_steps = {config.sampling.sampler: config.sampling.steps}  # all that a distilled checkpoint may know
    if config.distilled and config.distilled.has_fixed_steps:
        samplers = list(default_steps)
    else:
        default_steps = {
            sampler: config.sampling_params(settings.max_steps, sampler=sampler).steps for sampler in samplers
        }
    timesteps = config.diffusion.num_timesteps
    state = "starting" if not served.warm else "loading" if service.models.loading == served.name else "ready"
    return {
        "name": served.name,
        "default": served is service.models.default,
        "state": state,
        "checkpoint": served.sha256,
        "runs_on": served.runs_on,
        "batch_rows": served.batch_limits.max or None,
        "image_shape": config.unet.image_shape,
        "class_names": list(config.class_names),
        "num_timesteps": timesteps,
        "samplers": samplers,
        "defaults": vars(config.sampling if config.distilled else config.sampling_params(settings.max_steps)),
        "default_steps": default_steps,
        "distilled": asdict(config.distilled) if config.distilled else None,
        "fitted_steps": fitted_steps,
        "plans": plans(config, settings.max_steps),
        "guidance": config.unet.null_class and not config.distilled,
        "limits": {
            "n": settings.max_n,
            "steps": min(settings.max_steps, timesteps),
            "frames": settings.max_frames,
            "timeout_s": settings.max_timeout_s,
        },
        "provenance": config.provenance,
    }
