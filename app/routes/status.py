"""What is served and how it is: /models, /livez, /readyz, /health, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.errors import NotReady
from app.routes.common import ERRORS, TheService
from app.schemas import Health, ModelCard, ModelList
from model.samplers import SAMPLERS

router = APIRouter(tags=["status"])
health = APIRouter(tags=["status"])
operations = APIRouter(tags=["status"])
"""What may have a port of its own."""


@router.get("/models", summary="The checkpoints that are served")
async def models(service: TheService) -> ModelList:
    """Class names, samplers, defaults, limits, and where the checkpoint comes from."""
    checkpoint, settings = service.checkpoint, service.settings
    config = checkpoint.config
    limits = {
        "n": settings.max_n,
        "steps": min(settings.max_steps, config.diffusion.num_timesteps),
        "frames": settings.max_frames,
        "timeout_s": settings.max_timeout_s,
    }
    card = ModelCard(
        name=checkpoint.name,
        checkpoint=checkpoint.sha256,
        runs_on=service.runs_on,
        image_shape=config.unet.image_shape,
        class_names=list(config.class_names),
        num_timesteps=config.diffusion.num_timesteps,
        samplers=list(SAMPLERS),
        defaults=vars(config.sampling),
        default_steps={
            sampler: min(
                config.sampling.instead(config.diffusion.num_timesteps, sampler=sampler).steps, settings.max_steps
            )
            for sampler in SAMPLERS
        },
        limits=limits,
        provenance=config.provenance,
    )
    return ModelList(models=[card])


@health.get("/livez", summary="Is the process alive?")
async def livez() -> Health:
    """Answers as long as the event loop does; never asks the device."""
    return Health(status="ok")


@health.get("/readyz", summary="Does it take requests?", responses={503: ERRORS[503]})
@health.get("/health", summary="Alias of /readyz", responses={503: ERRORS[503]})
async def readyz(service: TheService) -> Health:
    """Weights loaded and warm, no step overdue, not draining."""
    if trouble := service.engine.trouble:
        raise NotReady(trouble, retry_after=5)
    return Health(status="ok")


@operations.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(service: TheService) -> Response:
    """In the text format of Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
