"""The short way to a handler: FastAPI takes several times as long, and only says what is wrong with a request."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, get_args, get_origin, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

Answer = Awaitable[Response]


def shortcut_to(handler: Callable[..., Any], given: str) -> Callable[[Request, dict[str, Any]], Answer | None] | None:
    """What answers a request of such values without FastAPI, or None where they are not valid.

    There is one for handlers (http, service, `given`) that return a response; None for others.
    """
    kinds = get_type_hints(handler)
    if kinds.pop("return", None) is not Response or kinds.keys() != {"http", "service", given}:
        return None
    model: type[BaseModel] = kinds[given]

    def answer(request: Request, values: dict[str, Any]) -> Answer | None:
        try:
            found = model.model_validate(values)
        except ValidationError:
            return None
        wanted: Answer = handler(http=request, service=request.app.state.service, **{given: found})
        return wanted

    return answer


class QueryRoute(APIRoute):
    """A route whose handler may take a model of the query."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        shortcut = shortcut_to(endpoint, "query")
        if shortcut is not None:
            fields = get_type_hints(endpoint)["query"].model_fields
            lists = {name for name, field in fields.items() if _is_list(field.annotation)}
            self.app = _query_app(self.app, shortcut, lists)


def _query_app(app: ASGIApp, shortcut: Callable[[Request, dict[str, Any]], Answer | None], lists: set[str]) -> ASGIApp:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        pairs = request.query_params.multi_items()
        values = {name: [value] if name in lists else value for name, value in pairs}
        found = shortcut(request, values) if len(values) == len(pairs) else None  # a name may be given twice
        await (app if found is None else await found)(scope, receive, send)

    return answer


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(map(_is_list, get_args(kind)))
