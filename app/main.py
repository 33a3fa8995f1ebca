"""The application: `create_app` wires settings, checkpoint, engine and routes together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from app.access import Keys
from app.engine.engine import Engine
from app.engine.memory import keep_freed_memory
from app.engine.runner import Runner, best_chunk
from app.engine.served import Served
from app.errors import BodyTooLarge, InvalidRequest, MethodNotAllowed, NotFound, RequestTimeout, ServiceError
from app.event_loop_monitor import Pulse
from app.metrics import Metrics
from app.middleware import SECURITY_HEADERS, Access, BodyLimit, RequestLog, SecurityHeaders
from app.model_registry import Models
from app.routes import docs, generate, health, models, sequence, ui
from app.routes.state import Service
from app.settings import Settings
from app.tracing import Tracer, Traces
from model.backends.cpu import best_precision
from model.checkpoint import Checkpoint

VERSION = "0.1.0"
WATCH_S = 0.25
HTTP_ERRORS: dict[int, type[ServiceError]] = {
    404: NotFound,
    405: MethodNotAllowed,
    408: RequestTimeout,
    413: BodyTooLarge,
}


log = logging.getLogger("ddpm.start")

MakeRunner = Callable[[Checkpoint, torch.device, int, int, str, str], Runner]


def create_app(settings: Settings, make_runner: MakeRunner = Runner) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine, and drains it at the end.

    `make_runner` is for tests. Raises CheckpointError or ValueError where the settings cannot be served.
    """
    keys = Keys(settings)
    tracer = Tracer(settings.otlp_endpoint, VERSION) if settings.otlp_endpoint else None
    # OpenMP keeps a team of threads for every thread that used it, and two teams on the same cores hinder each other:
    # the network's steps took 1.6 times as long. So this thread gets none, and the engine's gets all.
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(1)
    device = settings.torch_device()
    if device.type == "cpu":
        keep_freed_memory()
    runtime = "torch" if settings.runtime == "auto" else settings.runtime
    precision = best_precision(device) if settings.precision == "auto" else settings.precision

    def make(checkpoint: Checkpoint) -> Served:
        chunk = settings.chunk_rows or best_chunk(checkpoint.network, device)
        runner = make_runner(checkpoint, device, chunk, threads, runtime, precision)
        return Served(checkpoint, runner, settings.max_batch_rows)

    metrics = Metrics()
    engine = Engine(metrics.engine, max_work=settings.max_queue_rows, step_timeout_s=settings.step_timeout_s)
    served = Models(settings, metrics, engine, make)
    metrics.ask(engine)
    pulse = Pulse(metrics)
    metrics.pending_rows_limit.set(settings.max_queue_rows)
    metrics.declare_build(VERSION)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log_device(settings.device, device, runtime, precision)
        engine.start()
        tasks = [asyncio.create_task(watch) for watch in (keys.watch(), served.watch(), _watch(engine), pulse.beat())]
        yield
        for task in tasks:
            task.cancel()
        served.close()
        engine.drain(0)
        if engine.failure is None:
            await asyncio.to_thread(engine.join, 10)
        if tracer:
            await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="ddpm-serve",
        summary="Class-conditional diffusion images, batched at every denoising step.",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's load their scripts from another host; app/routes/docs.py does not
        redoc_url=None,
    )
    app.state.service, app.state.keys = Service(settings, served, engine, metrics), keys
    app.state.tracer = tracer
    routers = [module.router for module in (generate, sequence, models, ui, docs)] + [health.health]
    if settings.metrics_port < 0:
        routers.append(health.operations)
    for router in routers:
        app.include_router(router)
    _handle_errors(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes, seconds=settings.read_timeout_s)
    if keys.required:
        app.add_middleware(Access, keys=keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins.split(","),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["*"],  # credentials, with which this would not do, are never allowed
        )
    app.state.headers = SECURITY_HEADERS | (
        {"Cross-Origin-Resource-Policy": "cross-origin"} if settings.cors_origins else {}
    )
    app.add_middleware(SecurityHeaders, headers=app.state.headers)
    app.add_middleware(RequestLog, metrics=metrics, paths=_paths(*routers))
    if tracer:
        app.add_middleware(Traces, tracer=tracer)
    return app


def create_operations_app(service: Service) -> FastAPI:
    """What --metrics-port serves: metrics and health, without keys, for those who can reach the port."""
    app = FastAPI(openapi_url=None)
    app.state.service, app.state.headers = service, SECURITY_HEADERS
    app.include_router(health.health)
    app.include_router(health.operations)
    _handle_errors(app)
    app.add_middleware(SecurityHeaders, headers=app.state.headers)
    app.add_middleware(RequestLog, metrics=service.metrics, paths=_paths(health.health, health.operations))
    return app


def _paths(*routers: APIRouter) -> frozenset[str]:
    return frozenset(route.path for router in routers for route in router.routes if isinstance(route, APIRoute))


def log_device(asked: str, device: torch.device, runtime: str, precision: str) -> None:
    """Says what the networks run on. Warns where a torch that is built for GPUs finds none, unasked."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
    level = logging.WARNING if torch.version.cuda and not on_gpu and asked != "cpu" else logging.INFO
    extra = {"device": str(device), "runtime": runtime, "precision": precision, "torch": torch.__version__}
    log.log(level, "the network runs on %s", name, extra=extra)


def _handle_errors(app: FastAPI) -> None:
    for kind in (ServiceError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)


async def _watch(engine: Engine) -> None:
    while engine.failure is None:
        engine.watch()
        await asyncio.sleep(WATCH_S)


async def _answer(request: Request, exception: Exception) -> JSONResponse:
    """The one error handler: whatever went wrong, the client sees the same shape."""
    error, extra = _service_error(exception)
    request.state.outcome = error.code
    extra |= error.headers()
    if type(error) is MethodNotAllowed and (methods := _methods(request)):
        extra["Allow"] = methods
    if type(error) is ServiceError:  # an unforeseen exception is answered outside of all middleware
        extra |= {"X-Request-Id": request.state.request_id, **request.app.state.headers}
    return JSONResponse(error.body(), error.status, headers=extra)


def _methods(request: Request) -> str:
    """Of a path: Starlette names those of one route, and a path may have several."""
    path = getattr(request.scope.get("route"), "path", "")
    return ", ".join(sorted(method.upper() for method in request.app.openapi()["paths"].get(path, {})))


def _service_error(exception: Exception) -> tuple[ServiceError, dict[str, str]]:
    if isinstance(exception, ServiceError):
        return exception, {}
    if isinstance(exception, RequestValidationError):
        first = exception.errors()[0]
        where = [str(part) for part in first["loc"][1:2] if first["type"] != "json_invalid"]
        param = where[0] if where else None
        return InvalidRequest(f"{param}: {first['msg']}" if param else first["msg"], param=param), {}
    if isinstance(exception, HTTPException):
        kind = HTTP_ERRORS.get(exception.status_code, InvalidRequest)
        return kind(str(exception.detail)), dict(exception.headers or {})
    return ServiceError("internal error"), {}
