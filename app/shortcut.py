"""The short way to a handler: FastAPI takes ten times as long, and only says what is wrong with a request."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, get_args, get_origin, get_type_hints

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

Answer = Coroutine[Any, Any, Response]
Handler = Callable[[Request], Answer]


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
    """A route whose only parameters are a model of its query."""

    def get_route_handler(self) -> Handler:
        """As FastAPI's."""
        handle, shortcut = super().get_route_handler(), shortcut_to(self.endpoint, "query")
        if shortcut is None:
            return handle
        model: type[BaseModel] = get_type_hints(self.endpoint)["query"]
        lists = {name for name, field in model.model_fields.items() if _is_list(field.annotation)}

        async def handle_query(request: Request) -> Response:
            pairs = request.query_params.multi_items()
            values = {name: [value] if name in lists else value for name, value in pairs}
            answer = shortcut(request, values) if len(values) == len(pairs) else None  # a name may be given twice
            return await (answer or handle(request))

        return handle_query


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is list or any(map(_is_list, get_args(kind)))
