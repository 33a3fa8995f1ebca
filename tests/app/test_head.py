"""HEAD is answered wherever GET is, as GET is, without a body and without work."""

from __future__ import annotations

import http.client
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from app.main import create_operations_app
from tests.app.conftest import SlowRunner, serving
from tests.app.processes import PATIENCE, ServerProcess, metric

CHEAP = ["/livez", "/readyz", "/health", "/", "/models", "/metrics", "/docs", "/openapi.json"]
SEQUENCE = "/diffusion-sequence?n=64&steps=1000&seed=1"


@pytest.mark.parametrize("path", CHEAP)
def test_head_is_get_without_the_body(client: TestClient, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    own = {"x-request-id", *(["content-length"] if path == "/metrics" else [])}  # numbers change
    assert {k: v for k, v in head.headers.items() if k not in own} == {
        k: v for k, v in get.headers.items() if k not in own
    }


@pytest.mark.parametrize("format", ["sse", "multipart", "gif", "webp"])
def test_head_of_a_sequence_takes_no_step(client: TestClient, format: str) -> None:
    steps = metric(client.get("/metrics").text, "ddpm_image_steps_total")
    head = client.head(f"{SEQUENCE}&format={format}")
    assert (head.status_code, head.content) == (200, b"")
    assert "content-length" not in head.headers  # nobody knows it
    assert head.headers["x-ddpm-seed"] == "1"
    assert metric(client.get("/metrics").text, "ddpm_image_steps_total") == steps


def test_head_tells_of_errors_as_get_does(client: TestClient) -> None:
    for path, status in (("/nothing", 404), ("/generate", 405), ("/diffusion-sequence?n=0", 422)):
        head = client.head(path)
        assert (head.status_code, head.content) == (status, b"")
    assert client.head("/generate").headers["allow"] == "POST"


def test_head_says_no_while_the_server_warms_up(held: SlowRunner, grey_checkpoint: Path) -> None:
    held.warm.clear()
    with serving(grey_checkpoint, held, cold=True) as client:
        assert [client.head(path).status_code for path in ("/livez", "/readyz", SEQUENCE)] == [200, 503, 503]
        held.warm.set()


def test_head_works_on_the_port_of_metrics(client: TestClient) -> None:
    operations = TestClient(create_operations_app(client.app.state.service))
    for path in ("/metrics", "/livez", "/health/"):
        assert (operations.head(path).status_code, operations.head(path).content) == (200, b"")
    assert "/metrics" in operations.get("/metric").json()["error"]["message"]


def test_head_is_logged_and_counted_by_its_path(client: TestClient) -> None:
    def counted() -> float:
        return metric(client.get("/metrics").text, "ddpm_requests_total", endpoint="/models")

    before = counted()
    client.head("/models/")
    assert counted() == before + 1


def test_a_connection_goes_on_after_head(server: ServerProcess) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    connection.connect()
    socket = connection.sock
    for method, path in [("HEAD", path) for path in [*CHEAP, SEQUENCE, "/nothing"]] + [("GET", "/livez")]:
        connection.request(method, path)
        answer = connection.getresponse()
        assert (answer.status == 200) == (path != "/nothing")
        assert (answer.read() == b"") == (method == "HEAD")
        assert connection.sock is socket
    connection.close()
