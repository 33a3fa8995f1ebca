"""The body of a request: JSON, or a sentence that says where it is not, and what is expected there."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from app.errors import Cancelled, InvalidRequest, UnsupportedMediaType
from app.shortcut import shortcut_to

JSON_TYPE = re.compile(r"application/([^/\s,]+\+)?json")
# What json says, and what a person is told. The first that the message begins with holds.
EXPECTED = {
    "Expecting property name": 'a name in double quotes is expected, as in {"n": 4}',
    "Illegal trailing comma": "a comma too many",
    "Expecting value": 'a value is expected: a number, "text" in double quotes, true, false, null, a list or an object',
    "Expecting ':'": "a colon is expected after the name",
    "Expecting ','": "a comma is expected, or the end of the object or list",
    "Extra data": "the JSON has ended before",
    "Unterminated string": "the text that begins here has no closing quote",
    "Invalid control character": "a control character in a text is written as an escape, such as \\n",
    "Invalid \\": "there is no such escape; a backslash is written as two",
}


class JSONRoute(APIRoute):
    """A route whose body is read here, and not by FastAPI, which says less about one that is wrong.

    Where the handler takes no body, nobody reads one: of a GET it could be endless.
    """

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        if self.body_field is None:
            return
        app, shortcut = self.app, shortcut_to(endpoint, "body")

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            read = JSONRequest(scope, receive)
            await read.load()
            found = shortcut(read, read.value) if shortcut and isinstance(read.value, dict) else None
            if found is None:
                await app(scope, read.again, send)
            else:
                await (await found)(scope, receive, send)

        self.app = answer

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's, for a request whose body is JSON."""
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def handle_json(request: Request) -> Response:
            read = JSONRequest(request.scope, request.receive)
            await read.load()
            return await handle(read)

        return handle_json


class JSONRequest(Request):
    """Its body is empty, or JSON."""

    _data: bytes = b""
    _is_repeated = False
    value: Any = None

    async def load(self) -> None:
        """Reads the body. Raises UnsupportedMediaType, InvalidRequest, or Cancelled where the client leaves."""
        refuse_compressed(self)
        try:
            data = await super().body()
        except ClientDisconnect:
            raise Cancelled("the client left before its body was read") from None
        if not data.strip():
            return
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not JSON_TYPE.fullmatch(media_type):
            found = f"not {media_type:.80}" if media_type else "which is missing"
            raise UnsupportedMediaType(f"the body must be JSON: send Content-Type: application/json, {found}")
        self._data, self.value = data, parse(data)

    async def again(self) -> Message:
        """`receive` of one who reads the body another time."""
        if self._is_repeated:
            return await self.receive()
        self._is_repeated = True
        return {"type": "http.request", "body": self._data, "more_body": False}

    async def body(self) -> bytes:
        """What was sent; nothing where that is blank."""
        return self._data

    async def json(self) -> Any:
        """What the body says."""
        return self.value


def refuse_compressed(request: Request) -> None:
    """Raises UnsupportedMediaType where the body is."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise UnsupportedMediaType(f"the body is compressed ({encoding:.40}): send it without Content-Encoding")


def parse(data: bytes) -> Any:
    """The value of a JSON text. Raises InvalidRequest, which names line and column."""
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8", "replace")
        raise InvalidRequest(
            f"the body is not UTF-8: byte 0x{data[error.start]:02x} at {_place(before)}; send the JSON as UTF-8"
        ) from None
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise InvalidRequest(_complaint(error)) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError:  # of int(), which refuses thousands of digits
        raise InvalidRequest("a number in the body has too many digits") from None


def _complaint(error: json.JSONDecodeError) -> str:
    found = error.doc[error.pos : error.pos + 12]
    expected = next((text for said, text in EXPECTED.items() if error.msg.startswith(said)), "this is not JSON")
    if found[:1] in ("}", "]") and error.doc[: error.pos].rstrip().endswith(","):
        expected = f"a comma too many before {found[:1]}"
    elif found.startswith("'"):
        expected = "names and texts stand in double quotes"
    elif found.startswith(("True", "False", "None")):
        expected = "JSON writes true, false and null"
    where = f"at {_place(error.doc[: error.pos])}"
    return f"the body is not JSON {where} ({f'where it says {found!r}' if found else 'where it ends'}): {expected}"


def _place(before: str) -> str:
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequest(f"{name!r:.80} is given twice")
        found[name] = value
    return found


def _refuse_constant(name: str) -> None:
    raise InvalidRequest(f"{name} is not JSON: send a number, or leave the field out")
