"""python -m app.ray: the application on Ray Serve, one replica a GPU or a share of the CPUs, as many as work asks for.

Ray's HAProxy is the ingress: it hands a connection to a replica, which answers it itself. So frames come one by one, a
client that leaves is noticed, and a request whose replica died before it answered goes to another one.
"""

from __future__ import annotations

from app.interruption import end_in_one_line

if __name__ == "__main__":
    end_in_one_line("python -m app.ray")  # importing the rest takes seconds

import asyncio
import json
import logging
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fastapi import FastAPI
from prometheus_client import start_http_server
from pydantic import Field
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import checkpoints, logs
from app.__main__ import SHUTDOWN_GRACE_S, exit_now, read_settings
from app.engine.engine import Engine
from app.main import create_app
from app.settings import Settings, default_variables

# Ray is imported in functions: `ray.serve` reads its variables when it is imported, after they are set.
log = logging.getLogger("ddpm.ray")

APPLICATION_NAME = "ddpm"  # of the Serve application
WARM_UP_S = 300
HEALTH_PERIOD_S = 5.0  # Ray replaces a replica that fails three times in a row
DEREGISTER_S = 5.0  # for the ingress to forget a replica that stops
VARIABLES = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # As in docker/haproxy: a request whose replica died before it answered is asked again. HAProxy can do so only if
    # it has the body, for which Ray has no variable; the second line stands in HAProxy's `defaults` after the first.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response 503\n    option http-buffer-request",
    "RAY_SERVE_HAPROXY_RETRIES": "3",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",  # Ray's own 5 s are too few for a busy host
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DEREGISTER_S),
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "2",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RaySettings(Settings):
    """Those of the server, which every replica gets, and these."""

    ray_address: str = Field(
        "", description="Ray cluster to use; auto is this machine's; unset means RAY_ADDRESS, or else starts Ray"
    )
    replica_cpus: float = Field(1, ge=0, description="CPUs per replica; without a GPU also the network's threads")
    replica_gpus: float | None = Field(
        None, ge=0, description="GPUs per replica; unset means 1 if Ray has one and the device is not cpu"
    )
    min_replicas: int = Field(1, ge=1, description="minimum number of replicas")
    max_replicas: int = Field(0, ge=0, description="maximum number of replicas; 0 means as many as fit at the start")
    target_backlog_s: float = Field(10, gt=0, description="pending work per replica to aim for, in seconds")
    upscale_delay_s: float = Field(10, ge=0, description="how long the load must be high before replicas are added")
    downscale_delay_s: float = Field(300, ge=0, description="how long the load must be low before replicas are removed")
    discovery_port: int = Field(8001, ge=0, le=65535, description="port on which Prometheus discovers the replicas")


class BacklogAutoscalingPolicy:
    """Ray's autoscaling policy: so many replicas that each has `target_s` seconds of admitted work.

    Work is the mean of Ray's look-back period, in network rows, as `ddpm_pending_nfe`; the rate is what the
    engines expect of full batches. Ray rounds up, and applies the limits and the delays.
    """

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:
        reported = context.aggregated_metrics or {}
        rates = [rate for rate in reported.get("nfe_per_second", {}).values() if rate > 0]
        if not rates:
            return context.target_num_replicas, {}
        pending = sum(reported.get("pending_nfe", {}).values())
        return pending / statistics.mean(rates) / self._target_s, {}


class DropRequestIdMiddleware:
    """No X-Request-Id of ours: Ray adds the same one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        await self.app(scope, receive, send_without_id)


class Replica:
    """One engine and its HTTP server. Ray adds `app`, what `build` of `application` returned."""

    app: FastAPI
    _was_ready = _draining = False

    async def check_health(self) -> None:
        """Raises RuntimeError where /readyz would say no. The first call, a part of the start, waits to be warm."""
        if failure := self._engine.failure:
            log.critical("fatal error, exiting for restart: %s", failure)
            exit_now(self.app.state.tracer, 1)  # Ray has a new one sooner than after three such checks
        until = time.monotonic() + (0 if self._was_ready else WARM_UP_S)
        while (reason := self._engine.unready_reason) and time.monotonic() < until:  # noqa: ASYNC110  it is a thread
            await asyncio.sleep(0.05)
        if reason and not self._draining:
            raise RuntimeError(reason)
        self._was_ready = True

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray asks for and gives `BacklogAutoscalingPolicy`."""
        status = self._engine.status()
        return {"pending_nfe": status.pending_nfe, "nfe_per_second": status.estimated_nfe_per_second}

    def metrics_address(self) -> str:
        """host:port of this replica's own /metrics."""
        address: str = self.app.state.metrics_address
        return address

    async def drain(self, seconds: float) -> None:
        """Takes no more work, and returns when the admitted work is answered."""
        self._draining = True
        self._engine.drain(seconds)
        await asyncio.to_thread(self._engine.join, seconds + SHUTDOWN_GRACE_S)

    @property
    def _engine(self) -> Engine:
        engine: Engine = self.app.state.service.engine
        return engine


def application(settings: RaySettings, gpus: float, max_replicas: int) -> Any:
    """The Serve application. Its settings travel with it: replicas read no environment."""
    import ray
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    def build() -> FastAPI:
        logs.configure(settings.log_level, settings.log_format)
        # Through the ingress a question for /metrics would reach another replica each time: each has a port for them.
        app = create_app(settings.model_copy(update={"metrics_port": 0}))
        app.add_middleware(DropRequestIdMiddleware)
        host = ray.util.get_node_ip_address()
        server, _ = start_http_server(0, host, app.state.service.metrics.registry)
        app.state.metrics_address = f"{host}:{server.server_port}"
        return app

    deployment = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": gpus},
        max_ongoing_requests=10_000,  # the engine decides what is too much, by its work
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=10,
        # A replica that autoscaling takes away may finish everything it has.
        graceful_shutdown_timeout_s=settings.max_timeout_s + DEREGISTER_S + SHUTDOWN_GRACE_S,
        graceful_shutdown_wait_loop_s=0.5,
        autoscaling_config=AutoscalingConfig(
            min_replicas=settings.min_replicas,
            max_replicas=max_replicas,
            look_back_period_s=15,
            upscale_delay_s=settings.upscale_delay_s,
            downscale_delay_s=settings.downscale_delay_s,
            policy=AutoscalingPolicy(
                policy_function="app.ray:BacklogAutoscalingPolicy",
                policy_kwargs={"target_s": settings.target_backlog_s},
            ),
        ),
    )
    return deployment(serve.ingress(build)(Replica)).bind()


def plan_replicas(settings: RaySettings, resources: dict[str, float]) -> tuple[float, int]:
    """GPUs of a replica, and how many replicas there may be. Raises ValueError where not even the least fit."""
    gpus = settings.replica_gpus
    if gpus is None:
        gpus = 1.0 if settings.device != "cpu" and resources.get("GPU", 0) >= 1 else 0.0
    if settings.device == "cuda" and not gpus:
        raise ValueError("device cuda was asked for, but Ray has no GPU for the replicas")
    needs = {"GPU": gpus, "CPU": settings.replica_cpus}
    fit = min((int(resources.get(name, 0) / need) for name, need in needs.items() if need), default=1)
    if settings.max_replicas and settings.max_replicas < settings.min_replicas:
        raise ValueError(f"max_replicas is {settings.max_replicas}, less than min_replicas, {settings.min_replicas}")
    if fit < settings.min_replicas and not settings.max_replicas:  # who names a maximum may have a cluster that grows
        raise ValueError(
            f"{settings.min_replicas} replicas of {settings.replica_cpus:g} CPUs and {gpus:g} GPUs do not fit: "
            f"Ray has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"
        )
    return gpus, settings.max_replicas or fit


def discovery(host: str, port: int, addresses: Callable[[], list[str]]) -> ThreadingHTTPServer:
    """A server of GET /targets, for Prometheus's http_sd_configs: where every replica's own /metrics is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/targets":
                return self.send_error(404)
            try:
                body = json.dumps([{"targets": addresses(), "labels": {}}]).encode()
            except Exception as error:  # Prometheus keeps the targets that it knows
                log.warning("replicas do not answer", exc_info=error)
                return self.send_error(503)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug(format, *args)

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="discovery", daemon=True).start()
    return server


def parse(argv: list[str]) -> RaySettings:
    """Settings from flags and environment. Exits with a message where one is wrong."""
    settings = read_settings(argv, RaySettings, "python -m app.ray")
    assert isinstance(settings, RaySettings)
    return settings


def main(argv: list[str]) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    settings = parse(argv)
    logs.configure(settings.log_level, settings.log_format)
    variables = default_variables(VARIABLES)
    try:
        import ray
        from ray import serve
    except ModuleNotFoundError as error:
        sys.exit(f"python -m app.ray: {error}; it is in the extra ray: pip install '.[ray]'")
    try:
        if settings.port == 0:
            raise ValueError("Ray Serve must be told a port; 0 is none")
        for source in checkpoints.parse(settings.checkpoint):  # a wrong one is told here, and not by every replica
            checkpoints.load(source)
        ray.init(settings.ray_address or None, runtime_env={"env_vars": variables}, include_dashboard=False)
        gpus, most = plan_replicas(settings, ray.cluster_resources())
    except (ValueError, ConnectionError) as error:
        sys.exit(f"python -m app.ray: {error}")

    stop = threading.Event()
    try:
        serve.start(http_options={"host": settings.host, "port": settings.port})
        quiet = {"enable_access_log": False}  # the application has a line for every request, and a better one
        handle = serve.run(application(settings, gpus, most), name=APPLICATION_NAME, logging_config=quiet)
        found = discovery(settings.host, settings.discovery_port, lambda: broadcast(handle, "metrics_address"))
        places = {
            "url": f"http://{settings.host}:{settings.port}",
            "targets": f"http://{settings.host}:{found.server_port}/targets",
        }
        for number in (signal.SIGTERM, signal.SIGINT):  # until now they end the start, by Ray's handlers and Python's
            signal.signal(number, lambda *_: stop.set())
        log.info("serving", extra={**places, "replicas": f"{settings.min_replicas} to {most}"})
        stop.wait()
        log.info("draining")
        broadcast(handle, "drain", settings.drain_s, patience_s=settings.drain_s + 2 * SHUTDOWN_GRACE_S)
        found.shutdown()
    except Exception as error:
        log.exception("Ray Serve failed")
        sys.exit(f"python -m app.ray: {error}")
    finally:
        serve.shutdown()
        ray.shutdown()


def broadcast(handle: Any, method: str, *args: object, patience_s: float = 5) -> list[Any]:
    """What each replica answers, but for those that cannot just now: one may have died a moment ago."""
    answers = handle.broadcast(method, *args).results(timeout_s=patience_s, return_exceptions=True)
    return [answer for answer in answers if not isinstance(answer, BaseException)]


if __name__ == "__main__":
    # As `app.ray` and not as `__main__`, which the replicas could not import.
    from app.ray import main as run

    run(sys.argv[1:])
