"""Every row of the error table in design.md, and that no input, however odd, is the server's fault."""

import asyncio
import gzip
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from app.body import JSONRequest
from app.errors import Cancelled, ServiceError
from tests.app.conftest import SlowRunner, serving
from tests.app.processes import metric, wait_for

SEQUENCE = "/diffusion-sequence"
LABEL = "invalid_class_label"
JSON = {"Content-Type": "application/json"}


def error(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks the one shape of all errors, and returns what is in it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert list(answer.json()) == ["error"]
    detail: dict[str, Any] = answer.json()["error"]
    assert list(detail) == ["type", "code", "message", "param"]
    assert detail["code"] == code
    assert detail["type"] == ("invalid_request_error" if status < 500 and status != 429 else "server_error")
    assert detail["message"]
    return detail


def test_status_and_code_belong_to_the_class() -> None:
    assert {kind.code: kind.status for kind in ServiceError.__subclasses__()} == {
        "unauthorized": 401,
        "bad_request": 400,
        "request_timeout": 408,
        "headers_too_large": 431,
        "invalid_request": 422,
        "invalid_class_label": 422,
        "not_found": 404,
        "method_not_allowed": 405,
        "not_acceptable": 406,
        "body_too_large": 413,
        "unsupported_media_type": 415,
        "overloaded": 429,
        "not_ready": 503,
        "deadline_exceeded": 504,
        "step_failed": 500,
        "out_of_memory": 507,
        "forbidden": 403,
        "gone": 410,
        "model_not_found": 404,
        "model_conflict": 409,
        "invalid_checkpoint": 422,
        "load_failed": 500,
        "cancelled": 499,
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"n": -1}, "n"),
        ({"n": None}, "n"),
        ({"n": "1"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"n": 10**400}, "n"),
        ({"class_label": True}, "class_label"),
        ({"class_label": [1]}, "class_label"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": 10**400}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"seed": False}, "seed"),
        ({"index": -1}, "index"),
        ({"index": 2**31}, "index"),
        ({"columns": 0}, "columns"),
        ({"eta": 1.1}, "eta"),
        ({"eta": -0.1}, "eta"),
        ({"eta": True}, "eta"),
        ({"eta": 0.5, "sampler": "dpmpp_2m"}, "eta"),
        ({"guidance_scale": 21}, "guidance_scale"),
        ({"guidance_scale": "2"}, "guidance_scale"),
        ({"sampler": "euler"}, "sampler"),
        ({"sampler": "../ddim"}, "sampler"),
        ({"sampler": 3}, "sampler"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": 301}, "timeout_s"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"unheard": 1}, "unheard"),
        ({"model": 1}, "model"),
        ({"modell": "grey"}, "modell"),
        ({"checkpoint": "/etc/passwd"}, "checkpoint"),
    ],
)
def test_a_body_out_of_limits_is_refused_and_the_field_named(
    client: TestClient, body: dict[str, Any], param: str
) -> None:
    detail = error(client.post("/generate", json=body), 422, "invalid_request")
    assert detail["param"] == param
    assert param in detail["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("n=0", "n"),
        ("n=65", "n"),
        ("n=", "n"),
        ("n=true", "n"),
        ("n=1.5", "n"),
        ("n=1" + "0" * 400, "n"),
        ("n=1" + "0" * 5000, "n"),
        ("frames=0", "frames"),
        ("frames=101", "frames"),
        ("frames=1" + "0" * 400, "frames"),
        ("steps=1001", "steps"),
        ("view=eps", "view"),
        ("format=mp4", "format"),
        ("seed=1e3", "seed"),
        ("seed=18446744073709551616", "seed"),
        ("eta=nan", "eta"),
        ("guidance_scale=inf", "guidance_scale"),
        ("timeout_s=inf", "timeout_s"),
        ("sampler=", "sampler"),
        ("unheard=1", "unheard"),
        ("checkpoint=..%2f..%2fetc%2fpasswd", "checkpoint"),
    ],
)
def test_a_query_out_of_limits_is_refused_and_the_field_named(client: TestClient, query: str, param: str) -> None:
    assert error(client.get(f"{SEQUENCE}?{query}"), 422, "invalid_request")["param"] == param


@pytest.mark.parametrize("label", [3, -1, "dog", "", "3", "\x00", "\ud800", 10**400, "x" * 60_000])
def test_an_unknown_class_is_told_the_valid_ones(client: TestClient, label: int | str) -> None:
    detail = error(client.post("/generate", content=json.dumps({"class_label": label}), headers=JSON), 422, LABEL)
    assert detail["param"] == "class_label"
    assert "plain, Käfer → 虫, 0" in detail["message"]
    assert len(detail["message"]) < 250


def test_a_class_for_an_unconditional_checkpoint_is_refused(colour_client: TestClient) -> None:
    for label in (0, "0", "dog"):
        error(colour_client.post("/generate", json={"class_label": label}), 422, LABEL)
        error(colour_client.get(SEQUENCE, params={"class_label": label}), 422, LABEL)


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"n": 1}{',
        b"{'n': 1}",
        b"null",
        b"7",
        b'"n"',
        b"[]",
        b'[{"n": 1}]',
        b'{"eta": NaN}',
        b'{"timeout_s": Infinity}',
        b'{"timeout_s": -Infinity}',
        b'{"guidance_scale": 1e999}',
        b'{"n": 1' + b"0" * 5000 + b"}",
        b'{"class_label": "\xff"}',
        b'\xff\xfe{"n": 1}',
        b'{"\\ud800": 1}',
        b'{"n\x00": 1}',
        b"[" * 30_000,
        b'{"n":' * 10_000 + b"1" + b"}" * 10_000,
        b"\x00" * 100,
        b"<n>1</n>",
    ],
)
def test_a_malformed_body_is_the_clients_fault(client: TestClient, body: bytes) -> None:
    error(client.post("/generate", content=body, headers=JSON), 422, "invalid_request")


@pytest.mark.parametrize(
    "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_a_body_must_be_declared_json(client: TestClient, content_type: str | None) -> None:
    declared = {} if content_type is None else {"Content-Type": content_type}
    answer = client.post("/generate", content=b'{"n": 1}', headers=declared)
    assert "send Content-Type: application/json" in error(answer, 415, "unsupported_media_type")["message"]
    assert answer.headers["accept"] == "application/json"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"class_label": "caf\xe9"}', "is not UTF-8: byte 0xe9 at line 1, column 21"),
        (b'{"n": 1,}', "line 1, column 9 (where it says '}'): a comma too many before }"),
        (b'{"columns":\n[1, 2,],\n"n": 1}', "line 2, column 7 (where it says '],"),
        (b"{'n': 1}", "line 1, column 2 (where it says \"'n': 1}\"): names and texts stand in double quotes"),
        (b'{"n": 1 "seed": 2}', "line 1, column 9 (where it says '\"seed\": 2}'): a comma is expected"),
        (b'{"n" 1}', "a colon is expected after the name"),
        (b'{"n": True}', "line 1, column 7 (where it says 'True}'): JSON writes true, false and null"),
        (b'{"n":\n\n', "line 3, column 1 (where it ends): a value is expected"),
        (b'{"n": 1}{', "the JSON has ended before"),
        (b'{"model": "a', "has no closing quote"),
        (b'{"model": "a\n"}', "a control character in a text is written as an escape"),
        (b'{"model": "\\q"}', "a backslash is written as two"),
        (b'{"eta": NaN}', "NaN is not JSON"),
        (b'{"n": 1, "n": 2}', "'n' is given twice"),
        (b"[" * 30_000, "nested too deeply"),
        (b'{"n": 1' + b"0" * 5000 + b"}", "too many digits"),
        (b'[{"n": 1}]', 'the body must be a JSON object, such as {"n": 4}, not a list'),
        (b"null", "must be a JSON object"),
    ],
)
def test_a_body_that_is_not_json_is_told_where(client: TestClient, body: bytes, said: str) -> None:
    message = error(client.post("/generate", content=body, headers=JSON), 422, "invalid_request")["message"]
    assert said in message
    assert len(message) < 220


@pytest.mark.parametrize("body", [b"", b" \r\n", b"{}"])
def test_an_empty_body_asks_for_the_defaults(client: TestClient, body: bytes) -> None:
    for declared in ({}, JSON, {"Content-Type": "application/json; charset=utf-8"}):
        status = 415 if body == b"{}" and not declared else 200
        assert client.post("/generate", content=body, headers=declared).status_code == status


def test_a_body_in_utf_8_with_its_mark_or_in_utf_16_is_read(client: TestClient) -> None:
    for encoding in ("utf-8-sig", "utf-16"):  # as PowerShell writes files
        answer = client.post(
            "/generate", content=json.dumps({"class_label": "Käfer → 虫"}).encode(encoding), headers=JSON
        )
        assert answer.status_code == 200


def test_a_compressed_body_is_415(client: TestClient) -> None:
    for encoding in ("gzip", "br", "gzip, identity"):
        answer = client.post("/generate", content=gzip.compress(b"{}"), headers=JSON | {"Content-Encoding": encoding})
        assert "without Content-Encoding" in error(answer, 415, "unsupported_media_type")["message"]
        assert answer.headers["accept-encoding"] == "identity"
    assert client.post("/generate", content=b"{}", headers=JSON | {"Content-Encoding": "identity"}).status_code == 200


def test_a_form_is_told_to_be_json(client: TestClient) -> None:
    for sent in ({"data": {"n": "1"}}, {"files": {"n": b"1"}}):
        detail = error(client.post("/generate", **sent), 415, "unsupported_media_type")
        assert "send Content-Type: application/json, not " in detail["message"]
    assert client.post("/generate", content=b"{}", headers={"Content-Type": "application/x+json"}).status_code == 200


@pytest.mark.parametrize("body", [{"n": 2.0, "steps": 2.0, "seed": 3.0, "index": 4.0, "columns": 1.0}, {"n": 1e0}])
def test_a_whole_float_is_an_integer(client: TestClient, body: dict[str, float]) -> None:
    same = {name: int(value) for name, value in body.items()} | {"seed": 3}
    floats = client.post("/generate", json={"seed": 3} | body)
    assert floats.status_code == 200
    assert floats.content == client.post("/generate", json=same).content
    assert client.get(SEQUENCE, params={"steps": "2.0", "frames": "2.0"}).status_code == 200


def test_a_float_that_cannot_be_exact_is_no_integer(client: TestClient) -> None:
    assert error(client.post("/generate", json={"seed": 2.0**60}), 422, "invalid_request")["param"] == "seed"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"num_images": 1}, "there is no field 'num_images'; did you mean n?"),
        ({"label": 1}, "did you mean class_label?"),
        ({"prompt": "a cat"}, "did you mean class_label?"),
        ({"num_inference_steps": 9}, "did you mean steps?"),
        ({"CFG_scale": 9}, "did you mean guidance_scale?"),
        ({"thresholding": True}, "did you mean limit?"),
        ({"smapler": "ddim"}, "did you mean sampler?"),
        ({"width": 64}, "the checkpoint decides on the size"),
        ({"frames": 3}, "a field of GET /diffusion-sequence"),
        ({"xyz": 3}, "; there are model, class_label, each_class, n, seed"),
        ({"n": 0}, "n must be a whole number from 1 to 64, not 0"),
        ({"n": 1.5}, "n must be a whole number from 1 to 64, not 1.5"),
        ({"n": [1, 2]}, "n must be a whole number from 1 to 64, not a list"),
        ({"n": {}}, "not an object"),
        ({"seed": -1}, "seed must be a whole number from 0 to 18446744073709551615, not -1"),
        ({"class_label": ["plain", "0"]}, "not a list; send one request for each"),
        ({"class_label": True}, "class_label must be a whole number or a text, not true"),
        ({"eta": "x" * 500}, 'eta must be a number from 0 to 1, not "xxx'),
        ({"guidance_interval": [0.2]}, "guidance_interval must be 2 numbers, not"),
        ({"guidance_interval": ["a", "b"]}, "guidance_interval must be 2 numbers, not"),
        ({"timeout_s": 0}, "timeout_s must be a number above 0 and of at most 300, not 0"),
        ({"sampler": 3}, "sampler must be one of ddpm, ddim"),
    ],
)
def test_a_wrong_field_is_told_what_it_takes(client: TestClient, body: dict[str, Any], said: str) -> None:
    message = error(client.post("/generate", json=body), 422, "invalid_request")["message"]
    assert said in message
    assert len(message) < 220
    assert not re.search("Input|valid |permitted|Field required|JSON decode", message)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("view=eps", 'view must be one of xt, x0, not "eps"'),
        ("num_images=3", "did you mean n?"),
        ("n=1&n=2", "'n' is given 2 times"),
        ("frames=0", "frames must be a whole number from 1 to 100"),
    ],
)
def test_a_wrong_query_is_told_what_it_takes(client: TestClient, query: str, said: str) -> None:
    assert said in error(client.get(f"{SEQUENCE}?{query}"), 422, "invalid_request")["message"]


def test_a_client_that_leaves_amid_its_body_is_no_bug() -> None:
    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(Cancelled):
        asyncio.run(JSONRequest(scope, receive).load())


def test_an_unknown_path_is_told_the_nearest_one(client: TestClient) -> None:
    assert "'/nothing'; the API is described at /docs" in error(client.get("/nothing"), 404, "not_found")["message"]
    assert "did you mean /generate?" in error(client.post("/generat"), 404, "not_found")["message"]
    assert "/generate takes POST, not GET; see /docs" in client.get("/generate").json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["/nothing", "/generate/7", "/models/mnist/x", "/static/../app/main.py", "/%2e%2e/etc"]
)
def test_an_unknown_path_is_404(client: TestClient, path: str) -> None:
    error(client.get(path), 404, "not_found")


def test_a_wrong_method_is_405_and_told_the_right_one(client: TestClient) -> None:
    answer = client.get("/generate")
    error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("accept", ["text/html", "image/jpeg", "image/png;q=0"])
def test_no_acceptable_format_is_406(client: TestClient, accept: str) -> None:
    detail = error(client.post("/generate", json={}, headers={"Accept": accept}), 406, "not_acceptable")
    assert "image/png, application/json, application/zip" in detail["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_more_than_the_limit_is_413(client: TestClient, chunked: bool) -> None:
    def chunks(size: int) -> Iterator[bytes]:
        yield b'{"n": 1}'
        yield b" " * (size - 8)

    def send(size: int) -> httpx.Response:
        content = chunks(size) if chunked else b"".join(chunks(size))
        return client.post("/generate", content=content, headers=JSON)

    assert send(65_536).status_code == 200
    error(send(65_537), 413, "body_too_large")


def busy(client: TestClient, **body: Any) -> threading.Thread:
    """A request that is being worked on."""
    thread = threading.Thread(target=lambda: client.post("/generate", json=body))
    thread.start()
    wait_for(lambda: metric(client.get("/metrics").text, "ddpm_num_samples_running") > 0, "work")
    return thread


def test_a_full_queue_is_429_and_an_empty_one_takes_anything(held: SlowRunner, grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, held, max_pending_nfe=100) as client:
        thread = busy(client, n=2, steps=50)
        for answer in (
            client.post("/generate", json={"n": 64, "steps": 1000}),
            client.get(SEQUENCE, params={"n": 64, "steps": 1000, "frames": 2}),
        ):
            detail = error(answer, 429, "overloaded")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.headers["retry-after"] in detail["message"]
        held.released.set()
        thread.join()
        assert client.post("/generate", json={"n": 16, "steps": 7}).status_code == 200  # 112 rows


def test_a_time_out_that_cannot_be_kept_is_504_at_once(client: TestClient) -> None:
    steps = metric(client.get("/metrics").text, "ddpm_image_steps_total")
    answer = client.post("/generate", json={"n": 64, "steps": 1000, "timeout_s": 0.001})
    assert "this would take about" in error(answer, 504, "deadline_exceeded")["message"]
    assert metric(client.get("/metrics").text, "ddpm_image_steps_total") == steps


@pytest.mark.slow
def test_a_time_out_that_passes_is_504_and_frees_the_place(held: SlowRunner, grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, held) as client:
        answer = client.post("/generate", json={"steps": 100, "timeout_s": 1})
        assert "passed" in error(answer, 504, "deadline_exceeded")["message"]
        text = client.get("/metrics").text
        assert metric(text, "ddpm_num_samples_running") + metric(text, "ddpm_num_samples_waiting") == 0
        assert 0 < metric(text, "ddpm_wasted_image_steps_total") < 100
