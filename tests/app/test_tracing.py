"""Spans of a real server, as a collector receives them."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from app.__main__ import DUPLICATE_SIGNAL_S
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import SlowRunner
from tests.app.faulty_server import HANGS, SLOW
from tests.app.processes import ServerProcess, wait_for
from tests.app.test_faults import ask
from tests.app.test_ray import replica_of

FAULTY = "tests.app.faulty_server"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP, and keeps the spans."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.server.services |= {
                    a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
                }
                for scope in resource.scope_spans:
                    self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@pytest.mark.slow
def test_a_request_is_a_span_of_queue_steps_and_encodings(grey_checkpoint: Path, collector: Collector) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--otlp-endpoint", collector.url]
    with ServerProcess("app", *argv, OTEL_SERVICE_NAME="a-name", OTEL_BSP_SCHEDULE_DELAY="100") as server:
        of_a_client = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
        body = {"n": 2, "steps": 3, "sampler": "ddim"}
        server.client.post("/generate", json=body, headers=of_a_client).raise_for_status()
        server.client.post("/generate", json={"n": 0})
        stream = server.client.get("/diffusion-sequence", params={"steps": 3, "frames": 3, "format": "sse"}).text
        server.client.get("/metrics")
        server.terminate()  # it sends what is left before it ends
        assert server.exit_code() == 0
    assert collector.services == {"a-name"}
    roots = {span.name: span for span in collector.spans if attributes(span).get("ddpm.request_id") == "mine"}
    assert list(roots) == ["POST /generate"]
    root = roots["POST /generate"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert (
        attributes(root).items()
        >= {
            "http.route": "/generate",
            "http.response.status_code": 200,
            "ddpm.model": "grey",
            "ddpm.n": 2,
            "ddpm.steps": 3,
            "ddpm.sampler": "ddim",
            "ddpm.outcome": "ok",
        }.items()
    )
    children = [span for span in collector.spans if span.parent_span_id == root.span_id]
    assert [child.name for child in children] == ["queue", "steps", "encode"]
    times = [root.start_time_unix_nano]
    for child in children:
        assert child.trace_id == root.trace_id
        times += [child.start_time_unix_nano, child.end_time_unix_nano]
    times.append(root.end_time_unix_nano)
    assert times == sorted(times)
    assert times[3] < times[4], "steps take time"

    failed = [span for span in collector.spans if attributes(span).get("ddpm.outcome") == "invalid_request"]
    assert [attributes(span)["http.response.status_code"] for span in failed] == [422]
    assert not [span for span in collector.spans if span.parent_span_id == failed[0].span_id], (
        "it never was in the queue"
    )
    (sequence,) = [span for span in collector.spans if span.name == "GET /diffusion-sequence"]
    names = [span.name for span in collector.spans if span.parent_span_id == sequence.span_id]
    assert names == ["queue", "steps"] + ["encode"] * (stream.count("event: frame") + 1)
    assert len(collector.spans) == 3 + 3 + len(names), "and probes and scrapes have none"


@pytest.mark.slow
def test_what_ends_at_once_sends_its_spans_before(grey_checkpoint: Path, collector: Collector) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--otlp-endpoint", collector.url]
    never = {"OTEL_BSP_SCHEDULE_DELAY": "600000"}  # by itself, within this test

    with ServerProcess(FAULTY, *argv, **never) as server:
        server.client.post("/generate", json={"steps": 1}).raise_for_status()
        connection = ask(server, "POST", "/generate", {"n": 4, "steps": 1000, "seed": SLOW})
        wait_for(lambda: server.samples_in_flight() == 4, "work")
        server.terminate()
        time.sleep(DUPLICATE_SIGNAL_S + 0.1)
        assert not collector.spans
        server.terminate()
        assert server.exit_code() == 128 + signal.SIGTERM
        connection.close()
    assert [attributes(span)["ddpm.outcome"] for span in roots(collector)] == ["ok"]

    with ServerProcess(FAULTY, *argv, "--step-timeout-s", "1", **never) as server:
        hung = server.client.post("/generate", json={"n": 2, "steps": 8, "seed": HANGS})
        assert hung.status_code == 503
        assert server.exit_code() == 1
    assert [attributes(span)["ddpm.outcome"] for span in roots(collector)] == ["ok", "not_ready"]


def roots(collector: Collector) -> list[Any]:
    """Of the requests for images."""
    return [span for span in collector.spans if span.name == "POST /generate"]


def test_a_ray_replica_sends_its_spans_before_it_ends(
    grey_checkpoint: Path, held: SlowRunner, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exit(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    monkeypatch.setattr("os._exit", exit)
    held.warm_up = lambda rows: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    settings = Settings(checkpoint=str(grey_checkpoint), device="cpu", threads=1, otlp_endpoint=collector.url)
    with TestClient(create_app(settings, lambda *how: held)) as client:
        replica = replica_of(client)
        wait_for(lambda: replica.app.state.service.engine.failure, "the failure")
        assert client.post("/generate", json={}).status_code == 503
        assert not collector.spans
        with pytest.raises(SystemExit, match="1"):
            asyncio.run(replica.check_health())
        assert len(roots(collector)) == 1


@pytest.mark.slow
def test_a_collector_that_is_not_there_costs_no_answer(grey_checkpoint: Path) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra `otel` is not installed")
    argv = ["--checkpoint", str(grey_checkpoint), "--otlp-endpoint", "http://127.0.0.1:9"]
    with ServerProcess("app", *argv, OTEL_BSP_SCHEDULE_DELAY="10") as server:
        for _ in range(5):
            server.client.post("/generate", json={"steps": 1}).raise_for_status()
        server.terminate()
        assert server.exit_code() == 0


def test_tracing_without_its_package_is_refused(grey_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ValueError, match=r"pip install 'ddpm-serve\[otel\]'"):
        create_app(Settings(checkpoint=str(grey_checkpoint), device="cpu", otlp_endpoint="http://localhost:4318"))
