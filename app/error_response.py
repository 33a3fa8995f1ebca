"""An error as its client knows errors: in the one shape of this service, or in OpenAI's under /v1."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse

from app.errors import ServiceError
from app.openai import errors


def error_response(error: ServiceError, path: str, extra: Mapping[str, str] = {}) -> JSONResponse:
    """The answer to a request for `path`, with its headers. No cache keeps it."""
    headers = {"Cache-Control": "no-store", **extra}
    if f"{path}/".startswith(errors.PREFIX):
        return JSONResponse(errors.body_of(error), errors.status_of(error), headers | errors.headers_of(error))
    return JSONResponse(error.body(), error.status, headers | error.headers())
