"""Clients that leave and steps that fail, in a server process: only whose fault it is notices."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.app.faulty_server import (
    CRASHES,
    CRASHES_TWICE,
    NOT_FINITE,
    RAISES,
    RAISES_ONCE,
    ROOM,
    SLOW,
    TOO_LARGE,
    TOO_MANY,
)
from tests.app.processes import PATIENCE, ServerProcess, metric, wait_for

SEQUENCE = "/diffusion-sequence"


@pytest.fixture(autouse=True)
def _idle_at_first_and_ready_in_the_end(faulty: ServerProcess) -> Iterator[None]:
    wait_for(lambda: faulty.samples_in_flight() == 0, "an idle server")
    with faulty.truthful_readiness():
        yield
    assert faulty.client.get("/readyz").status_code == 200


def ask(
    server: ServerProcess, method: str, path: str, body: dict[str, Any] | None = None
) -> http.client.HTTPConnection:
    """Sends a request and does not wait for its answer."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE)
    sent = None if body is None else json.dumps(body)
    connection.request(method, path, sent, {"Content-Type": "application/json"})
    return connection


@contextmanager
def slow_company(server: ServerProcess) -> Iterator[http.client.HTTPResponse]:
    """A stream that goes on for long, so that whatever comes shares its batches; it must outlive them."""
    connection = ask(server, "GET", f"{SEQUENCE}?steps=1000&frames=100&seed={SLOW}")
    stream = connection.getresponse()
    wait_for(lambda: server.samples_in_flight() == 1, "the stream")
    yield stream
    assert server.samples_in_flight() == 1
    while stream.readline() != b"event: frame\n":
        pass
    stream.close()
    connection.close()


def generate(server: ServerProcess, **body: Any) -> httpx.Response:
    return server.client.post("/generate", json=body)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/generate", {"n": 20, "steps": 1000, "seed": SLOW}),
        ("GET", f"{SEQUENCE}?n=20&steps=1000&frames=100&seed={SLOW}&format=sse", None),
        ("GET", f"{SEQUENCE}?n=20&steps=1000&frames=100&seed={SLOW}&format=multipart", None),
        ("GET", f"{SEQUENCE}?n=20&steps=1000&frames=9&seed={SLOW}&format=gif", None),
    ],
)
def test_a_client_that_leaves_frees_its_places_at_the_next_step(
    faulty: ServerProcess, method: str, path: str, body: dict[str, Any] | None
) -> None:
    endpoint = path.partition("?")[0]
    before = faulty.client.get("/metrics").text
    connection = ask(faulty, method, path, body)
    if "sse" in path or "multipart" in path:
        connection.getresponse().read(1000)  # it has begun
    wait_for(lambda: faulty.metric("ddpm_num_samples_running") == 16, "a full batch")
    assert faulty.metric("ddpm_num_samples_waiting") == 4
    wait_for(lambda: faulty.metric("ddpm_image_steps_total") > metric(before, "ddpm_image_steps_total"), "a step")
    connection.close()
    wait_for(lambda: faulty.samples_in_flight() == 0, "free places")
    labels = {"endpoint": endpoint, "outcome": "cancelled"}
    counted = metric(before, "ddpm_requests_total", **labels)
    wait_for(lambda: faulty.metric("ddpm_requests_total", **labels) == counted + 1, "the outcome")
    after = faulty.client.get("/metrics").text

    def grown(name: str, **labels: str) -> float:
        return metric(after, name, **labels) - metric(before, name, **labels)

    assert 0 < grown("ddpm_wasted_image_steps_total") < 20 * 1000 / 2
    assert grown("ddpm_wasted_image_steps_total") == grown("ddpm_image_steps_total")
    assert grown("ddpm_images_total") == 0
    assert grown("ddpm_cancellation_latency_seconds_count") == 1
    assert grown("ddpm_cancellation_latency_seconds_bucket", le="2.5") == 1
    assert grown("ddpm_requests_total", endpoint=endpoint) == 1


def test_a_client_that_leaves_a_pipeline_frees_its_place(faulty: ServerProcess) -> None:
    body = json.dumps({"n": 20, "steps": 1000, "seed": SLOW})
    head = "POST /generate HTTP/1.1\r\nHost: here\r\nContent-Type: application/json"
    message = f"{head}\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    images = faulty.metric("ddpm_images_total")
    host, port = faulty.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        client.sendall(message.encode())
        wait_for(lambda: faulty.samples_in_flight() == 20, "the work")
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n" * 100)
    wait_for(lambda: faulty.samples_in_flight() == 0, "free places")
    assert faulty.metric("ddpm_images_total") == images
    assert not [line for line in faulty.logs() if line.get("outcome") == "internal_error"]


@pytest.mark.slow
def test_half_of_the_clients_leave_and_the_other_half_is_served(faulty: ServerProcess) -> None:
    bodies = [{"n": 2, "steps": 30, "seed": SLOW, "index": 10 * i, "class_label": i % 3} for i in range(8)]
    alone = [generate(faulty, **body).content for body in bodies[1::2]]
    before = faulty.client.get("/metrics").text
    connections = [ask(faulty, "POST", "/generate", body) for body in bodies]
    wait_for(lambda: faulty.samples_in_flight() == 16, "all of them")
    for connection in connections[::2]:
        connection.close()
    assert [connection.getresponse().read() for connection in connections[1::2]] == alone
    wait_for(lambda: faulty.samples_in_flight() == 0, "an empty queue")
    after = faulty.client.get("/metrics").text
    for outcome in ("ok", "cancelled"):
        labels = {"endpoint": "/generate", "outcome": outcome}
        assert metric(after, "ddpm_requests_total", **labels) == metric(before, "ddpm_requests_total", **labels) + 4
    assert metric(after, "ddpm_images_total") == metric(before, "ddpm_images_total") + 8
    for connection in connections:
        connection.close()


STRANGERS: list[dict[str, Any]] = [{"n": 2, "steps": 8, "seed": 70 + i, "class_label": i % 3} for i in range(3)]


def together(server: ServerProcess, *bodies: dict[str, Any]) -> list[httpx.Response]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: generate(server, **body), bodies))


def test_a_step_that_raises_once_is_replayed_and_nobody_notices(faulty: ServerProcess) -> None:
    body = {"n": 3, "steps": 8, "seed": RAISES_ONCE}
    failed = faulty.metric("ddpm_failed_steps_total")
    with slow_company(faulty):
        answers = together(faulty, *STRANGERS, body)
    assert faulty.metric("ddpm_failed_steps_total") == failed + 1
    for answer, alone in zip(answers, [*STRANGERS, body], strict=True):
        assert answer.status_code == 200
        assert answer.content == generate(faulty, **alone).content
    assert any("a fault that a test asked for once" in line.get("exception", "") for line in faulty.logs())


@pytest.mark.parametrize("seed", [RAISES, NOT_FINITE])
def test_a_failing_sample_fails_only_its_own_request(faulty: ServerProcess, seed: int) -> None:
    alone = [generate(faulty, **body).content for body in STRANGERS]
    with slow_company(faulty):
        *answers, failed = together(faulty, *STRANGERS, {"n": 3, "steps": 8, "seed": seed})
    assert failed.status_code == 500
    assert failed.json()["error"].items() >= {"type": "server_error", "code": "step_failed", "param": None}.items()
    assert "asked for" not in failed.text  # what was raised is for the log
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.content for answer in answers] == alone


@pytest.mark.parametrize("seed", [RAISES, NOT_FINITE])
def test_a_stream_whose_step_fails_ends_with_an_error_event(faulty: ServerProcess, seed: int) -> None:
    query = {"n": 2, "steps": 20, "frames": 20, "seed": seed}
    text = faulty.client.get(SEQUENCE, params=query).text
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    assert (names[0], names[-1]) == ("start", "error")
    assert "completed" not in names
    assert json.loads(text.rpartition("data: ")[2])["error"]["code"] == "step_failed"
    gif = faulty.client.get(SEQUENCE, params=query | {"format": "gif"})
    assert (gif.status_code, gif.json()["error"]["code"]) == (500, "step_failed")


def test_a_failure_outside_a_step_is_a_delay_and_nothing_else(faulty: ServerProcess) -> None:
    body = {"n": 3, "steps": 8, "seed": CRASHES_TWICE}
    restarts = faulty.metric("ddpm_engine_restarts_total")
    with slow_company(faulty):
        answers = together(faulty, *STRANGERS, body)
    assert faulty.metric("ddpm_engine_restarts_total") == restarts + 2
    for answer, alone in zip(answers, [*STRANGERS, body], strict=True):
        assert answer.status_code == 200
        assert answer.content == generate(faulty, **alone).content


@pytest.mark.parametrize(
    ("seed", "status", "code"),
    [
        pytest.param(CRASHES, 500, "step_failed", id="cannot be read"),
        pytest.param(TOO_LARGE, 507, "out_of_memory", id="does not fit alone"),
    ],
)
def test_a_failing_image_fails_only_its_own_request(faulty: ServerProcess, seed: int, status: int, code: str) -> None:
    alone = [generate(faulty, **body).content for body in STRANGERS]
    with slow_company(faulty):
        *answers, failed = together(faulty, *STRANGERS, {"n": 3, "steps": 8, "seed": seed})
    assert (failed.status_code, failed.json()["error"]["code"]) == (status, code)
    assert [answer.content for answer in answers] == alone


@pytest.mark.slow
def test_out_of_memory_shrinks_the_batch_for_a_while(faulty: ServerProcess) -> None:
    body = {"n": 8, "steps": 8, "seed": TOO_MANY}
    alone = [generate(faulty, **stranger).content for stranger in STRANGERS]
    with slow_company(faulty):
        *answers, crowded = together(faulty, *STRANGERS, body)
        assert faulty.metric("ddpm_max_batch_size") <= ROOM
    assert [answer.content for answer in answers] == alone
    assert crowded.status_code == 200
    parts = [generate(faulty, **body | {"n": 1, "index": i}, columns=1) for i in range(8)]
    assert generate(faulty, **body).content == crowded.content
    assert [part.status_code for part in parts] == [200] * 8
    generate(faulty, n=16, steps=400)
    assert faulty.metric("ddpm_max_batch_size") == 16


def test_frames_arrive_while_the_work_goes_on(faulty: ServerProcess) -> None:
    with slow_company(faulty) as stream:
        head = [stream.readline() for _ in range(5)]
        assert head[0] == b"event: start\n"
        assert head[4] == b"event: frame\n"


@pytest.mark.slow
def test_retry_after_is_the_work_over_the_measured_rate(faulty: ServerProcess) -> None:
    before = faulty.client.get("/metrics").text
    connection = ask(faulty, "POST", "/generate", {"n": 16, "steps": 1000, "seed": SLOW})
    done = metric(before, "ddpm_image_steps_total") + 30 * 16
    wait_for(lambda: faulty.metric("ddpm_image_steps_total") >= done, "a measured rate")
    refused = generate(faulty, n=64, steps=1000)
    after = faulty.client.get("/metrics").text
    connection.close()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
    rows, seconds = (
        metric(after, name) - metric(before, name) for name in ("ddpm_batch_size_sum", "ddpm_step_seconds_sum")
    )
    # 16 times 1000 rows wait for 64 times 1000, and both are more than the queue holds.
    expected = (16 * 1000 - rows) / (rows / seconds)
    assert expected / 2 < int(refused.headers["retry-after"]) < 2 * expected
