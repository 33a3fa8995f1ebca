"""OpenTelemetry spans of requests (extra `otel`): what they waited for, what was computed, what was encoded.

Nothing is traced while a request runs. Its spans are made when it has ended, of times that were taken anyway, and a
thread of the library sends them. The library reads the OTEL_* variables that it knows, a sampler's among them.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.middleware import PROBED
from app.request_context import context_of
from app.request_params import GenerationJob

SEND_S = 3.0  # in which a collector has to take what is sent
LAST_S = 1.0  # the same where the process is about to end


class Tracer:
    """Sends spans to a collector, as OTLP over HTTP."""

    def __init__(self, endpoint: str, version: str) -> None:
        """`endpoint` is the collector's, without /v1/traces. Raises ValueError where the packages are not installed."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import OTELResourceDetector, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ValueError("otlp_endpoint needs packages: pip install 'ddpm-serve[otel]'") from error
        own = Resource({"service.name": "ddpm-serve", "service.version": version})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()))
        exporter = OTLPSpanExporter(endpoint.rstrip("/") + "/v1/traces", timeout=SEND_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._trace, self._parent = trace, TraceContextTextMapPropagator()
        self._tracer = self._provider.get_tracer("ddpm")

    def record(self, scope: Scope, started: float, status: int) -> None:
        """The spans of a request that has just ended. `started` is in seconds of `time.monotonic`."""
        trace, ended = self._trace, time.monotonic()
        offset = time.time_ns() - time.monotonic_ns()
        context = context_of(scope)
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        route = getattr(scope.get("route"), "path", None)
        attributes: dict[str, Any] = {
            "http.request.method": scope["method"],
            "http.response.status_code": status,
            "ddpm.outcome": context.outcome,
            "ddpm.request_id": context.request_id,
        }
        if route:
            attributes["http.route"] = route
        job = context.job if context.admitted else None
        if job is not None:
            attributes |= {"ddpm.model": job.request.model} | {f"ddpm.{k}": v for k, v in context.job_fields().items()}

        def ns(seconds: float) -> int:
            return offset + int(seconds * 1e9)

        root = self._tracer.start_span(
            f"{scope['method']} {route}" if route else scope["method"],
            context=self._parent.extract(carrier),
            kind=trace.SpanKind.SERVER,
            start_time=ns(started),
            attributes=attributes,
        )
        if status >= 500 or (status == 200 and context.outcome != "ok"):  # a stream fails after its status
            root.set_status(trace.StatusCode.ERROR, context.outcome)
        inside = trace.set_span_in_context(root)
        for name, begin, end in [] if job is None else _parts(job, ended):
            self._tracer.start_span(name, context=inside, start_time=ns(begin)).end(ns(end))
        root.end(ns(ended))

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()

    def flush(self) -> None:
        """Sends what is there, in LAST_S or never: for a process that ends at once.

        By a thread, because a signal handler may have interrupted this one in the library, with a lock held.
        """
        sender = threading.Thread(target=self._provider.force_flush, name="spans", daemon=True)
        sender.start()
        sender.join(LAST_S)


def _parts(job: GenerationJob, ended: float) -> list[tuple[str, float, float]]:
    """Name, begin and end. What a refused request never came to is not there."""
    request = job.request
    answered = request.finish_time or ended
    parts = [("queue", request.arrival_time, request.first_step_time or answered)]
    if request.first_step_time is not None:
        parts.append(("steps", request.first_step_time, answered))
    return parts + [("encode", *times) for times in job.encodings]


class TracingMiddleware:
    """Records every request but those of probes."""

    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self.app, self.tracer = app, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBED:
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def send_and_look(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_look)
        finally:
            self.tracer.record(scope, started, status)
