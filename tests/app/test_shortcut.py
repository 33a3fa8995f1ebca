"""The shortcut answers as FastAPI does, to the byte: the same requests with it and without."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import fastapi.routing
import pytest
from fastapi.routing import request_response
from fastapi.testclient import TestClient
from starlette.types import Message

from app.body import JSONRoute
from app.openai.schemas import GenerationsBody
from app.routes import generate, openai, sequence
from app.schemas import GenerateBody, SequenceQuery
from app.shortcut import QueryRoute
from tests.app.conftest import BEETLE

GENERATE, OPENAI, SEQUENCE = "/generate", "/v1/images/generations", "/diffusion-sequence"
NEEDED = {GENERATE: {"steps": "1", "guidance_scale": "2"}, OPENAI: {"prompt": '"0"', "steps": "1"}}
"""Fields of a body that is valid, and soon answered, as JSON."""
QUERY = {"steps": "1", "guidance_scale": "2", "frames": "1", "format": "gif"}

NUMBERS = ["0", "-0", "-1", "9", "9.0", "9.5", "9e0", "1e400", "-1e400", "9007199254740993.0", str(2**64), "9" * 5000]
TEXTS = ["", "9", " 9 ", "nonsense", "plain", "0", BEETLE, "grey", "ddpm", "fast", "png", "gif", "x0", "url", "24x16"]
IN_JSON = [
    *["null", "true", "false", "[]", "[9]", '["9"]', "[0.2, 0.8]", "[0.2, null]", "[true, 1]", '["0.2,0.8"]', "{}"],
    *NUMBERS,
    *[f'"{text}"' for text in TEXTS],
    *[r'"\ud800"', r'"\u0000"', r'"K\u00e4fer \u2192 \u866b"', '"' + "x" * 600 + '"'],
]
IN_QUERY = [
    *["+9", "%209", "0x9", "true", "True", "yes", "1", "null", "nan", "inf", "%FF", "%00", "%ED%A0%80", "%D9%A3"],
    *[
        "0.2,0.8",
        "0.2,0.8,1",
        "[0.2,0.8]",
        "0.2",
        "0.2;0.8",
        "a&b=c",
        "9&{0}=9",
        "0.2&{0}=0.8",
        "1&{0}=0.2,0.8",
        "&{0}",
        "%2",
    ],
    *NUMBERS,
    *map(quote, TEXTS),
]
BODIES = [
    *["", " \n", "null", "[]", '"x"', "9", "true", "{}", "{", '{"n": 1, "n": 2}', '{"n": NaN}', '{"prompt": "0"}'],
    *['{"prompt": "0", "N": 1}', '{"name": "grey"}', "\ufeff{}", '{"n": 1}\0', "[" * 9999, "{'n': 1}", '{"": 1}'],
]
CONTENT_TYPES = [
    *["", "application/json; charset=utf-8", "application/json;charset=latin-1", "APPLICATION/JSON ; x", "text/json"],
    *["application/vnd.x+json", "application/x/y+json", "application/+json", "application/json, text/plain", "json"],
    *[
        "application/ json",
        'application/json; a="',
        "application/x-www-form-urlencoded",
        "application/jsonx",
        "a/b+json",
    ],
]


@dataclass(frozen=True)
class Asked:
    """A request, as uvicorn hands it on."""

    method: str
    target: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


@dataclass(frozen=True)
class Answered:
    """Its answer, but for the time of it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def ask(app: Any, asked: Asked) -> Answered:
    path, _, query = asked.target.partition("?")
    scope: dict[str, object] = {"type": "http", "method": asked.method, "path": unquote(path)}
    scope |= {
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
    }
    scope |= {"headers": [(k.encode(), v.encode("latin-1")) for k, v in asked.headers.items()], "client": ("me", 1)}
    to_come = [{"type": "http.request", "body": asked.body, "more_body": False}]
    came: list[Message] = []

    async def receive() -> Message:
        return to_come.pop() if to_come else await asyncio.Future()

    async def send(message: Message) -> None:
        came.append(message)

    random.seed(7)  # ids and seeds that are left out
    await app(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in came[1:])
    body = re.sub(rb'("created(_at)?": ?)\d+', rb"\1", body)
    return Answered(came[0]["status"], list(came[0]["headers"]), body)


async def ask_all(app: Any, requests: Sequence[Asked]) -> list[Answered]:
    return [await ask(app, asked) for asked in requests]


def assert_alike(client: TestClient, monkeypatch: pytest.MonkeyPatch, requests: list[Asked]) -> set[int]:
    """The statuses that came."""
    assert client.portal is not None
    short = client.portal.call(ask_all, client.app, requests)
    with monkeypatch.context() as patch:
        for module in (generate, openai, sequence):
            for route in module.router.routes:
                assert isinstance(route, JSONRoute | QueryRoute)
                patch.setattr(route, "app", request_response(route.get_route_handler()))
        long = client.portal.call(ask_all, client.app, requests)
    for asked, ours, theirs in zip(requests, short, long, strict=True):
        assert ours == theirs, asked
    return {answered.status for answered in short}


def body_of(fields: dict[str, str]) -> bytes:
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}").encode()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (path, name)
        for path, kind in ((GENERATE, GenerateBody), (OPENAI, GenerationsBody))
        for name in [*kind.model_fields, "x"]
    ],
)
def test_a_field_of_a_body(client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, name: str) -> None:
    requests = [Asked("POST", path, body_of({**NEEDED[path], name: value})) for value in IN_JSON]
    assert_alike(client, monkeypatch, requests)


@pytest.mark.parametrize("name", [*SequenceQuery.model_fields, "x"])
def test_a_field_of_a_query(client: TestClient, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    requests = []
    for value in IN_QUERY:
        fields = {**QUERY, name: value.format(name)}
        requests.append(Asked("GET", f"{SEQUENCE}?" + "&".join(f"{key}={text}" for key, text in fields.items())))
    assert_alike(client, monkeypatch, requests)


@pytest.mark.parametrize("path", [GENERATE, OPENAI, SEQUENCE, "/models", "/v1/models"])
def test_methods_bodies_and_media_types(client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    good = body_of(NEEDED.get(path, {}))
    own, query = "POST", "&".join(f"{key}={text}" for key, text in QUERY.items())
    usual = path
    if path == SEQUENCE:
        own, usual = "GET", f"{path}?{query}"  # which frames a stream skips is a matter of time
    requests = [
        Asked(method, target, good)
        for method in ("GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE", "get")
        for target in (
            usual,
            f"{path}/?{query}",
            f"{path}//",
            f"{path}?{query}&n=0",
            f"{path}?x",
            f"{quote(path, safe='')}?{query}",
        )
    ]
    requests += [Asked(own, usual, body.encode()) for body in BODIES]
    requests += [Asked(own, usual, good.decode().encode(encoding)) for encoding in ("utf-16", "utf-32-le", "utf-8-sig")]
    requests += [Asked(own, usual, data) for data in (good + b"\xff", b"\xff", b"\x00", good * 2, b"[" * 9999)]
    requests += [Asked(own, usual, good, {"content-type": kind}) for kind in CONTENT_TYPES]
    requests += [Asked(own, usual, good, {})]
    requests += [
        Asked(own, usual, good, {"content-type": "application/json", **more})
        for more in (
            {"content-encoding": "gzip"},
            {"content-encoding": "identity"},
            {"accept": "text/nothing"},
            {"accept": "application/json"},
            {"accept": "application/zip;q=0.5, image/png;q=0"},
            {"last-event-id": "1"},
            {"x-request-id": "mine"},
        )
    ]
    assert assert_alike(client, monkeypatch, requests) >= {200, 404, 405}


def test_valid_requests_do_without_fastapi(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(**_: object) -> None:
        raise AssertionError("FastAPI was asked")

    monkeypatch.setattr(fastapi.routing, "solve_dependencies", fails)
    query = "&".join(f"{key}={text}" for key, text in QUERY.items())
    requests = [Asked("POST", path, body_of(fields)) for path, fields in NEEDED.items()]
    requests.append(Asked("GET", f"{SEQUENCE}?{query}&guidance_interval=0.2,0.8"))
    assert client.portal is not None
    answers = client.portal.call(ask_all, client.app, requests)
    assert [answered.status for answered in answers] == [200] * 3


@pytest.mark.parametrize("path", ["/models", "/v1/models", "/v1/models/grey"])
def test_nobody_reads_the_body_of_a_get(client: TestClient, path: str) -> None:
    """It may be endless."""

    async def bytes_read() -> int:
        read = 0

        async def receive() -> Message:
            nonlocal read
            read += 1000
            return {"type": "http.request", "body": b" " * 1000, "more_body": read < 10_000}

        async def send(_: Message) -> None:
            pass

        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": []}
        await client.app(scope, receive, send)
        return read

    assert client.portal is not None
    assert client.portal.call(bytes_read) == 0
