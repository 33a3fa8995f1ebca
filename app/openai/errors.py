"""Errors under /v1 as OpenAI's clients know them: its statuses, its codes, and whether to try again."""

from __future__ import annotations

from app.errors import InvalidRequest, ServiceError

PREFIX = "/v1/"
CODES = {
    "unauthorized": "invalid_api_key",
    "overloaded": "rate_limit_exceeded",
    "not_found": "unknown_url",
    "internal_error": "server_error",
}
"""OpenAI's names where ours differ."""
TRY_AGAIN = {429: "true", 503: "true", 504: "false", 507: "false"}
"""By status, for openai's clients; left to them elsewhere. The same request is too late or too large again."""


def status_of(error: ServiceError) -> int:
    """OpenAI has 400 where the other endpoints have 422."""
    return 400 if error.status == 422 else error.status


def body_of(error: ServiceError) -> dict[str, dict[str, str | None]]:
    """{"error": {message, type, param, code}}."""
    code = error.openai_code if isinstance(error, InvalidRequest) else CODES.get(error.code, error.code)
    kind = "rate_limit_error" if error.status == 429 else error.type
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def headers_of(error: ServiceError) -> dict[str, str]:
    """The error's own, and `x-should-retry`."""
    again = TRY_AGAIN.get(error.status)
    return error.headers() | ({} if again is None else {"X-Should-Retry": again})
