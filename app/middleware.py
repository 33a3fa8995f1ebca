"""Pure ASGI middleware: request ids, one log line and the metrics of every request, keys, headers, limits on bodies."""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.auth import APIKeyStore
from app.error_response import error_response
from app.errors import ServiceError
from app.metrics import Metrics
from app.request_context import context_of
from app.signing import ImageAccess

log = logging.getLogger("ddpm.request")

PROBED = frozenset({"/livez", "/readyz", "/health", "/metrics"})  # every few seconds, by programs
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLogMiddleware:
    """Gives every request an id (a client's own X-Request-Id, if it is a plain one), logs it, and counts it.

    What it says about the request stands in its `RequestContext`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if _REQUEST_ID.fullmatch(offered) else f"{random.getrandbits(128):032x}"
        context = context_of(scope)
        context.request_id = request_id
        own_header = [(b"x-request-id", request_id.encode())]
        status = 0
        sent = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                _add_headers(message, own_header)
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except BaseException:
            context.outcome = "internal_error" if context.outcome == "ok" else context.outcome
            status = status or 500  # which Starlette sends, outside of this
            raise
        finally:
            path = scope["path"] if scope["path"] in self.paths else "other"  # where it was refused before its route
            endpoint = str(getattr(scope.get("route"), "path", path))
            seconds = time.perf_counter() - started
            self.metrics.count_request(endpoint, context.model, context.outcome, seconds=seconds)
            if context.key:
                self.metrics.key_requests.labels(context.key.name, context.outcome).inc()
            quiet = scope["path"] in PROBED and context.outcome in ("ok", "not_ready")
            log.log(
                logging.DEBUG if quiet else logging.INFO,
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "outcome": context.outcome,
                    "seconds": round(seconds, 4),
                    "bytes": sent,
                    "client": (scope.get("client") or ["-"])[0],
                    **({"key": context.key.name} if context.key else {}),
                    **context.job_fields(),
                },
            )


PUBLIC_PATHS = frozenset({"/", "/docs", "/openapi.json", "/livez", "/readyz", "/health"})
"""Paths that need no key: what tells nothing that is not in the sources, and what probes ask."""


class AuthMiddleware:
    """Lets nobody without a key beyond PUBLIC_PATHS and `images`, and no key beyond its limits. No handler sees what
    it refuses."""

    def __init__(self, app: ASGIApp, keys: APIKeyStore, images: ImageAccess) -> None:
        self.app, self.keys, self.images = app, keys, images

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in PUBLIC_PATHS:
            await self.app(scope, receive, send)
            return
        context = context_of(scope)
        usage = None
        try:
            read = scope["method"] in ("GET", "HEAD")  # other methods are a 405, whatever the signature
            if not (read and self.images.is_open(scope["path"], scope["query_string"])):
                context.key = key = self.keys.authenticate(scope["headers"])
                usage = self.keys.admit(key)
        except ServiceError as error:
            context.outcome = error.code
            await error_response(error, scope["path"])(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            if usage:
                usage.running -= 1


SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=(), payment=(), usb=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What every answer tells a browser to refuse. Pages that need more have a policy of their own."""


class SecurityHeadersMiddleware:
    """Adds `headers` to every answer that does not have them."""

    def __init__(self, app: ASGIApp, headers: dict[str, str]) -> None:
        self.app = app
        self.headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(message, self.headers)
            await send(message)

        await self.app(scope, receive, send_with_headers)


def _add_headers(message: Message, headers: list[tuple[bytes, bytes]]) -> None:
    """Those of `headers` (names in small letters) that the start of an answer does not have."""
    raw = message["headers"] = list(message.get("headers", ()))
    names = {name for name, _ in raw}
    raw += [header for header in headers if header[0] not in names]


class TrailingSlashMiddleware:
    """/health/ is /health. A redirect would lead around a proxy, which hides scheme and path, and lose some clients."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and len(scope["path"]) > 1 and scope["path"].endswith("/"):
            scope = {**scope, "path": scope["path"][:-1]}
        await self.app(scope, receive, send)


class HeadAsGetMiddleware:
    """Answers HEAD as GET without the body (RFC 9110, 9.3.2). A handler that would work for it asks
    `RequestContext.is_head`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        context_of(scope).is_head = True
        as_get = {**scope, "method": "GET"}

        async def send_head(message: Message) -> None:
            await send({**message, "body": b""} if "body" in message else message)

        try:
            await self.app(as_get, receive, send_head)
        finally:
            scope["route"] = as_get.get("route")  # which log, metrics and traces look for


class BodyLimitMiddleware:
    """Refuses bodies of more than `limit` bytes with 413, without holding more than that, and those that take longer
    than `seconds` with 408. Nobody holds a GET's or a HEAD's. `limits` are those of paths with another one."""

    def __init__(self, app: ASGIApp, limit: int, seconds: float, limits: Mapping[str, int] = {}) -> None:
        self.app, self.limit, self.seconds, self.limits = app, limit, seconds, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        received, complete = 0, False
        limit = self.limits.get(scope.get("path", ""), self.limit)
        until = asyncio.get_running_loop().time() + self.seconds

        async def counted() -> Message:
            nonlocal received, complete
            if complete:  # what comes now is the client's leaving, which may take as long as the answer
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self.seconds:g} s") from None
            if message["type"] == "http.request":
                complete = not message.get("more_body", False)
                received += len(message.get("body", b""))
                if received > limit:
                    raise HTTPException(413, f"the body is larger than {limit} bytes")
            return message

        await self.app(scope, counted, send)
