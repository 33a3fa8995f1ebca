"""The application: `create_app` wires settings, checkpoint, engine and routes together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import torch
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware

from app.auth import APIKeyStore
from app.engine.batch_invariance import default_micro_batch_size
from app.engine.engine import Engine
from app.engine.instance import ModelInstance
from app.engine.runner import ModelRunner
from app.engine.workers import usable_cores
from app.error_handler import handle_errors
from app.event_loop_monitor import EventLoopMonitor
from app.metrics import Metrics
from app.middleware import (
    SECURITY_HEADERS,
    AuthMiddleware,
    BodyLimitMiddleware,
    HeadAsGetMiddleware,
    RequestLogMiddleware,
    SecurityHeadersMiddleware,
    TrailingSlashMiddleware,
)
from app.model_registry import ModelRegistry
from app.openapi import DescribedApp
from app.routes import docs, edits, generate, health, image, interpolate, models, openai, sequence, ui
from app.routes.state import AppState
from app.settings import Settings
from app.signing import image_access
from app.tracing import Tracer, TracingMiddleware
from model.backends.compile import best_precision
from model.checkpoint import Checkpoint
from model.malloc import tune_malloc
from model.nn.config import UNetConfig

VERSION = "0.1.0"
WATCH_S = 0.25
PROGRESS_S = 5.0  # between lines that say that it still warms up


log = logging.getLogger("ddpm.start")

MakeRunner = Callable[[Checkpoint, torch.device, int, int, str, str], ModelRunner]


def create_app(settings: Settings, make_runner: MakeRunner = ModelRunner) -> FastAPI:
    """The ASGI application. Its lifespan starts the engine, and drains it at the end.

    `make_runner` is for tests. Raises CheckpointError or ValueError where the settings cannot be served.
    """
    keys = APIKeyStore(settings)
    access = image_access(settings, keys.required)
    tracer = Tracer(settings.otlp_endpoint, VERSION) if settings.otlp_endpoint else None
    # OpenMP keeps a team of threads for every thread that used it, and all of them would want the same cores. So this
    # thread gets none, as those that come, and the engine shares out its work itself: see `app.engine.workers`.
    threads = settings.threads or usable_cores()
    torch.set_num_threads(1)
    device = settings.torch_device()
    if device.type == "cpu":
        tune_malloc()
    runtime = "torch" if settings.runtime == "auto" else settings.runtime

    def make(checkpoint: Checkpoint) -> ModelInstance:
        precision: str = settings.precision
        if precision == "auto":
            unet = checkpoint.config.unet
            precision = best_precision(device, unet.base_channels if isinstance(unet, UNetConfig) else unet.dim)
        micro_batch_size = settings.micro_batch_size or default_micro_batch_size(checkpoint.network, device, runtime)
        runner = make_runner(checkpoint, device, micro_batch_size, threads, runtime, precision)
        return ModelInstance(checkpoint, runner, settings.max_batch_size)

    metrics = Metrics()
    engine = Engine(metrics.engine, max_pending_nfe=settings.max_pending_nfe, step_timeout_s=settings.step_timeout_s)
    served = ModelRegistry(settings, metrics, engine, make)
    metrics.bind_engine(engine.status)
    loop_monitor = EventLoopMonitor(metrics)
    metrics.pending_nfe_limit.set(settings.max_pending_nfe)
    metrics.declare_build(VERSION)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log_device(settings.device, device, runtime, threads)
        engine.start()
        tasks = [
            asyncio.create_task(watch)
            for watch in (keys.watch(), served.watch(), _watch(engine), _tell_progress(served), loop_monitor.run())
        ]
        yield
        for task in tasks:
            task.cancel()
        served.close()
        engine.drain(0)
        if engine.failure is None:
            await asyncio.to_thread(engine.join, 10)
        if tracer:
            await asyncio.to_thread(tracer.close)

    app = DescribedApp(
        title="ddpm-serve",
        summary="Class-conditional diffusion images, batched at every denoising step.",
        version=VERSION,
        lifespan=lifespan,
        docs_url=None,  # FastAPI's load their scripts from another host; app/routes/docs.py does not
        redoc_url=None,
        redirect_slashes=False,  # middleware.TrailingSlash
    )
    app.state.service, app.state.keys = AppState(settings, served, engine, metrics, access), keys
    app.state.tracer, app.settings = tracer, settings
    pages = generate, sequence, interpolate, image, openai, edits, models, ui, docs
    routers = [module.router for module in pages] + [health.health]
    if settings.metrics_port < 0:
        routers.append(health.operations)
    for router in routers:
        app.router.routes += router.routes  # FastAPI looks for a route twice in a router that is included
    handle_errors(app)
    app.add_middleware(HeadAsGetMiddleware)
    app.add_middleware(
        BodyLimitMiddleware,
        limit=settings.max_body_bytes,
        seconds=settings.read_timeout_s,
        limits={edits.PATH: settings.max_upload_bytes},
    )
    if keys.required:
        app.add_middleware(AuthMiddleware, keys=keys, images=access)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins.split(","),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends a dozen of its own
            expose_headers=["*"],  # credentials, with which this would not do, are never allowed
        )
    app.state.headers = SECURITY_HEADERS | (
        {"Cross-Origin-Resource-Policy": "cross-origin"} if settings.cors_origins else {}
    )
    app.add_middleware(SecurityHeadersMiddleware, headers=app.state.headers)
    app.add_middleware(RequestLogMiddleware, metrics=metrics, paths=_paths(*routers))
    if tracer:
        app.add_middleware(TracingMiddleware, tracer=tracer)
    app.add_middleware(TrailingSlashMiddleware)
    return app


def create_operations_app(service: AppState) -> FastAPI:
    """What --metrics-port serves: metrics and health, without keys, for those who can reach the port."""
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.state.service, app.state.headers = service, SECURITY_HEADERS
    app.include_router(health.health)
    app.include_router(health.operations)
    handle_errors(app)
    app.add_middleware(HeadAsGetMiddleware)
    app.add_middleware(SecurityHeadersMiddleware, headers=app.state.headers)
    app.add_middleware(RequestLogMiddleware, metrics=service.metrics, paths=_paths(health.health, health.operations))
    app.add_middleware(TrailingSlashMiddleware)
    return app


def _paths(*routers: APIRouter) -> frozenset[str]:
    return frozenset(route.path for router in routers for route in router.routes if isinstance(route, APIRoute))


async def _tell_progress(models: ModelRegistry) -> None:
    """What happens between "running" and "ready", when it begins, now and then, and when it has ended."""
    started = time.monotonic()
    names = ", ".join(served.name for served in models)
    log.info("warming up %s: measuring batch sizes; requests get 503 until that ends", names)
    told = started
    while cold := next((served for served in models if not served.warm), None):
        await asyncio.sleep(WATCH_S)
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            log.info("still warming up %s after %.0f s", cold.name, told - started)
    log.info("ready for requests after %.1f s of warm-up", time.monotonic() - started)


def log_device(asked: str, device: torch.device, runtime: str, threads: int) -> None:
    """Says what the networks run on. Warns where a torch that is built for GPUs finds none, unasked."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "the CPU"
    level = logging.WARNING if torch.version.cuda and not on_gpu and asked != "cpu" else logging.INFO
    extra = {"device": str(device), "runtime": runtime, "threads": threads, "torch": torch.__version__}
    log.log(level, "the network runs on %s", name, extra=extra)


async def _watch(engine: Engine) -> None:
    """By a clock: the engine's thread would have to tell the event loop of every step, and cannot while one hangs."""
    while engine.failure is None:
        engine.watch()
        await asyncio.sleep(WATCH_S)
