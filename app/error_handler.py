"""The one error handler: whatever went wrong, the client sees the same shape."""

from __future__ import annotations

import difflib

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from app.error_response import error_response
from app.errors import (
    BadRequest,
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    RequestTimeout,
    ServiceError,
)
from app.openapi import fields
from app.request_context import context_of
from app.validation import explain

HTTP_ERRORS: dict[int, type[ServiceError]] = {400: BadRequest, 408: RequestTimeout, 413: BodyTooLarge}


def handle_errors(app: FastAPI) -> None:
    """From here on the application answers them."""
    for kind in (ServiceError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, exception: Exception) -> JSONResponse:
    error, extra = _service_error(request, exception)
    context = context_of(request.scope)
    context.outcome = error.code
    if type(error) is ServiceError:  # an unforeseen exception is answered outside of all middleware
        extra |= {"X-Request-Id": context.request_id, **request.app.state.headers}
    return error_response(error, request.url.path, extra)


def _service_error(request: Request, exception: Exception) -> tuple[ServiceError, dict[str, str]]:
    if isinstance(exception, ServiceError):
        return exception, {}
    if isinstance(exception, RequestValidationError):
        return _invalid(request, exception), {}
    if isinstance(exception, HTTPException):
        headers = dict(exception.headers or {})
        if exception.status_code == 404:
            return _not_found(request), headers
        if exception.status_code == 405:
            return _wrong_method(request, headers)
        kind = HTTP_ERRORS.get(exception.status_code, InvalidRequest)
        return kind(str(exception.detail)), headers
    return ServiceError("internal error"), {}


def _invalid(request: Request, exception: RequestValidationError) -> InvalidRequest:
    schema = request.app.openapi()
    operation = schema["paths"][request.scope["route"].path_format][request.method.lower()]
    return explain(exception.errors()[0], fields(schema, operation))


def _not_found(request: Request) -> NotFound:
    paths = [path for path in request.app.openapi()["paths"] if "{" not in path]
    near = difflib.get_close_matches(request.url.path[:80], paths, n=1)
    meant = f"; did you mean {near[0]}?" if near else ";"
    described = "the API is described at /docs" if request.app.openapi_url else f"there are {', '.join(paths)}"
    return NotFound(f"there is nothing at {request.url.path!r:.80}{meant} {described}")


def _wrong_method(request: Request, headers: dict[str, str]) -> tuple[MethodNotAllowed, dict[str, str]]:
    """Starlette names the methods of one route, and a path may have several."""
    path = getattr(request.scope.get("route"), "path_format", "")
    methods = {method.upper() for method in request.app.openapi()["paths"].get(path, {})}
    methods = methods or set(headers.get("Allow", "").split(", "))
    if "GET" in methods:
        methods.add("HEAD")
    allowed = ", ".join(sorted(methods))
    error = MethodNotAllowed(f"{request.url.path[:80]} takes {allowed}, not {request.method:.20}; see /docs")
    return error, headers | {"Allow": allowed}
