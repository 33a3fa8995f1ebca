"""How it is: /livez, /readyz, /health, /metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from app.errors import NotReady
from app.routes.state import ERRORS, StateDep
from app.schemas import Health

health = APIRouter(tags=["status"])
operations = APIRouter(tags=["status"])
"""What may have a port of its own."""


@health.get("/livez", summary="Is the process alive?")
async def livez() -> Health:
    """Answers as long as the event loop does; never asks the device."""
    return Health(status="ok")


@health.get("/readyz", summary="Does it take requests?", responses={503: ERRORS[503]})
@health.get("/health", summary="Alias of /readyz", responses={503: ERRORS[503]})
async def readyz(service: StateDep) -> Health:
    """Weights loaded and warm, no step overdue, not draining."""
    if reason := service.engine.unready_reason:
        raise NotReady(reason, retry_after=5)
    return Health(status="ok")


@operations.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def metrics(service: StateDep) -> Response:
    """In the text format of Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)
