import asyncio
import json
import logging
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from app import logs, main
from app.logs import JsonFormatter, TextFormatter
from app.main import create_app
from app.middleware import BodyLimitMiddleware
from app.settings import Settings
from tests.app.conftest import SlowRunner, serving
from tests.app.processes import metric, wait_for


def requests(client: TestClient, **labels: str) -> float:
    return metric(client.get("/metrics").text, "ddpm_requests_total", **labels)


@pytest.mark.parametrize("offered", ["abc", "9f-3_.Z", "x" * 64])
def test_a_plain_request_id_is_kept(client: TestClient, offered: str) -> None:
    assert client.get("/livez", headers={"X-Request-Id": offered}).headers["x-request-id"] == offered


@pytest.mark.parametrize("hostile", ["", "x" * 65, "a b", "a\tb", '{"level":"error"}', "Käfer".encode(), "a;b", "a\n"])
def test_any_other_request_id_is_replaced(client: TestClient, hostile: str | bytes) -> None:
    given = client.get("/livez", headers={"X-Request-Id": hostile}).headers["x-request-id"]
    assert len(given) == 32
    assert int(given, 16)


def test_every_request_has_an_id_of_its_own(client: TestClient) -> None:
    ids = {client.get(path).headers["x-request-id"] for path in ("/livez", "/livez", "/nothing", "/docs", "/generate")}
    assert len(ids) == 5


def test_one_log_line_a_request_says_what_happened(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ddpm.request")
    client.post("/generate", json={"n": 2, "steps": 3, "sampler": "ddpm"}, headers={"X-Request-Id": "me"})
    client.get("/nothing?key=secret")
    first, second = (json.loads(JsonFormatter().format(record)) for record in caplog.records)
    assert first.items() >= {"request_id": "me", "method": "POST", "path": "/generate", "status": 200}.items()
    assert first.items() >= {"outcome": "ok", "n": 2, "steps": 3, "sampler": "ddpm", "logger": "ddpm.request"}.items()
    assert first["bytes"] > 100
    assert first["seconds"] > 0
    assert second.items() >= {"path": "/nothing", "status": 404, "outcome": "not_found"}.items()
    assert "secret" not in json.dumps(second)


def test_a_log_line_is_one_json_object_whatever_is_in_it() -> None:
    record = logging.makeLogRecord({"msg": "two\nlines %s", "args": ("→",), "path": "/\u2028\x00", "value": object()})
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line).items() >= {"message": "two\nlines →", "path": "/\u2028\x00"}.items()
    assert "ValueError: a\nb" in json.loads(line)["exception"]


def test_metrics_count_requests_by_route_and_outcome(client: TestClient) -> None:
    before = requests(client, endpoint="/generate", outcome="invalid_request")
    for _ in range(3):
        client.post("/generate", json={"n": 0})
    assert requests(client, endpoint="/generate", outcome="invalid_request") == before + 3


def test_unknown_paths_share_one_label(client: TestClient) -> None:
    before = requests(client, endpoint="other", outcome="not_found")
    for path in ("/a", "/b/c", "/generate/9", "/.env"):
        client.get(path)
    assert requests(client, endpoint="other", outcome="not_found") == before + 4
    assert "/.env" not in client.get("/metrics").text


def test_an_unforeseen_exception_is_an_error_with_its_id(
    grey_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def boom() -> None:
        raise RuntimeError("secret detail")

    caplog.set_level(logging.INFO, "ddpm.request")
    app = create_app(Settings(checkpoint=str(grey_checkpoint)))
    app.add_api_route("/boom", boom)
    client = TestClient(app, raise_server_exceptions=False)
    answer = client.get("/boom", headers={"X-Request-Id": "me"})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "me"
    logged = vars(caplog.records[0])
    assert (logged["status"], logged["outcome"], logged["request_id"]) == (500, "internal_error", "me")
    assert requests(client, endpoint="/boom", outcome="internal_error") == 1


async def swallow_body(scope: object, receive: object, send: object) -> None:
    while (await receive())["more_body"]:
        pass


@pytest.mark.parametrize(("method", "chunks", "refused"), [("POST", 10, False), ("POST", 11, True), ("GET", 99, False)])
def test_no_body_of_more_than_the_limit_is_read(method: str, chunks: int, refused: bool) -> None:
    left = chunks

    async def receive() -> dict[str, object]:
        nonlocal left
        left -= 1
        return {"type": "http.request", "body": b"1234567890", "more_body": left > 0}

    async def limited() -> None:
        await BodyLimitMiddleware(swallow_body, limit=100, seconds=60)(
            {"type": "http", "method": method}, receive, None
        )

    if refused:
        with pytest.raises(HTTPException, match="larger than 100 bytes"):
            asyncio.run(limited())
    else:
        asyncio.run(limited())
        assert left == 0


@pytest.mark.parametrize(
    ("format", "terminal", "text"),
    [("auto", True, True), ("auto", False, False), ("json", True, False), ("text", False, True)],
)
def test_a_terminal_gets_text_and_a_pipe_json(
    monkeypatch: pytest.MonkeyPatch, format: str, terminal: bool, text: bool
) -> None:
    reader, writer = pty.openpty() if terminal else os.pipe()
    with open(reader, "rb", buffering=0) as shown, open(writer, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(logging.root, "handlers", [])
        monkeypatch.setattr(logging.root, "level", logging.INFO)
        logs.configure("info", format)
        logging.getLogger("ddpm.start").warning("two\nlines \x1b[2J of %s", "Käfer", extra={"seconds": 3})
        line = shown.read(1000).decode().rstrip()
    if text:
        assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING two\\nlines \\x1b\[2J of Käfer seconds=3", line)
    else:
        assert json.loads(line).items() >= {"level": "warning", "logger": "ddpm.start", "seconds": 3}.items()


def test_a_traceback_is_readable_at_a_terminal() -> None:
    record = logging.makeLogRecord({"msg": "failed"})
    try:
        raise ValueError("a")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    first, *_, last = TextFormatter().format(record).splitlines()
    assert first.endswith(" failed")
    assert last == "ValueError: a"


@pytest.mark.slow
def test_a_long_warm_up_is_told_again_and_again(
    held: SlowRunner, grey_checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "ddpm.start")
    monkeypatch.setattr(main, "PROGRESS_S", 0.0)
    held.warm.clear()
    with serving(grey_checkpoint, held, cold=True):
        wait_for(lambda: sum("still warming up grey after " in message for message in caplog.messages) >= 2)
        assert any(message.startswith("warming up grey: ") for message in caplog.messages)
        held.warm.set()
        wait_for(lambda: caplog.messages[-1].startswith("ready for requests after "))
