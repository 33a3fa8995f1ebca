"""Pure ASGI middleware: request ids, one log line and the metrics of every request, and the limit on bodies."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.metrics import Metrics

log = logging.getLogger("ddpm.request")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """Gives every request an id (a client's own X-Request-Id, if it is a plain one), logs it, and counts it.

    Handlers leave an error's code in `scope["state"]["outcome"]`; a stream may do so after its status was sent. They
    leave the checkpoint's name in `scope["state"]["model"]`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        offered = Headers(scope=scope).get("x-request-id", "")
        request_id = offered if _REQUEST_ID.fullmatch(offered) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["outcome"], state["model"] = request_id, "ok", ""
        status = 0
        sent = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except BaseException:
            state["outcome"] = "internal_error" if state["outcome"] == "ok" else state["outcome"]
            status = status or 500  # which Starlette sends, outside of this
            raise
        finally:
            endpoint = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - started
            labels = endpoint, state["model"], state["outcome"]
            self.metrics.requests.labels(*labels).inc()
            self.metrics.request_seconds.labels(*labels).observe(seconds)
            log.info(
                "request",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "outcome": state["outcome"],
                    "seconds": round(seconds, 4),
                    "bytes": sent,
                    "client": (scope.get("client") or ["-"])[0],
                    **state.get("log", {}),
                },
            )


class BodyLimit:
    """Refuses bodies of more than `limit` bytes with 413, without holding more than that. Nobody holds a GET's."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "GET":
            await self.app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > self.limit:
                    raise HTTPException(413, f"the body is larger than {self.limit} bytes")
            return message

        await self.app(scope, counted, send)
