"""`python -m app.ray`: its parts without Ray, and the whole where Ray is installed."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError

from app.main import create_app
from app.ray import BacklogAutoscalingPolicy, DropRequestIdMiddleware, RaySettings, Replica, discovery, plan_replicas
from app.settings import Settings
from tests.app.conftest import SlowRunner
from tests.app.processes import PATIENCE, ROOT, environment, metric, wait_for

RAY = find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not RAY, reason="Ray is not installed; it is in the extra ray")


def wanted(pending: list[float], rates: list[float], target_s: float = 10) -> float:
    """Replicas that the policy asks for, now that there are three."""
    reported = {"pending_nfe": dict(enumerate(pending)), "nfe_per_second": dict(enumerate(rates))}
    context = SimpleNamespace(aggregated_metrics=reported, target_num_replicas=3)
    return BacklogAutoscalingPolicy(target_s)(context)[0]


def test_wanted_replicas_follow_the_seconds_of_pending_work() -> None:
    assert wanted([0, 0], [50, 50]) == 0  # Ray knows the least
    assert wanted([1000, 0], [50, 50]) == 2  # 20 s of work, 10 s each
    assert wanted([1000, 500], [50, 50], target_s=5) == 6
    assert wanted([1000, 0], [50, 150]) == 1  # they differ in speed
    assert wanted([1000, 0], [50, 0]) == 2, "a replica that is not warm has no rate yet"


def test_without_a_report_nothing_changes() -> None:
    assert wanted([], []) == 3
    assert wanted([100], [0]) == 3
    assert BacklogAutoscalingPolicy(10)(SimpleNamespace(aggregated_metrics=None, target_num_replicas=3))[0] == 3


@pytest.mark.parametrize(
    ("settings", "resources", "expected"),
    [
        ({}, {"CPU": 8.0}, (0.0, 8)),
        ({"replica_cpus": 3}, {"CPU": 8.0}, (0.0, 2)),
        ({}, {"CPU": 64.0, "GPU": 4.0}, (1.0, 4)),
        ({"replica_gpus": 0.5}, {"CPU": 64.0, "GPU": 4.0}, (0.5, 8)),
        ({"replica_cpus": 8}, {"CPU": 16.0, "GPU": 4.0}, (1.0, 2)),
        ({"device": "cpu"}, {"CPU": 4.0, "GPU": 4.0}, (0.0, 4)),
        ({"max_replicas": 32, "min_replicas": 9}, {"CPU": 8.0}, (0.0, 32)),  # a cluster that grows
    ],
)
def test_a_replica_is_a_gpu_or_a_share_of_the_cpus(
    settings: dict[str, float], resources: dict[str, float], expected: tuple[float, int]
) -> None:
    assert plan_replicas(RaySettings(**settings), resources) == expected


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda"}, "Ray has no GPU"),
        ({"min_replicas": 9}, "9 replicas of 1 CPUs and 0 GPUs do not fit: Ray has 8 CPUs and 0 GPUs"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas is 2, less than min_replicas, 3"),
        ({"replica_gpus": 1}, "do not fit"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(settings: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_replicas(RaySettings(**settings), {"CPU": 8.0})


def test_the_settings_are_the_servers_and_more() -> None:
    assert set(Settings.model_fields) < set(RaySettings.model_fields)
    with pytest.raises(ValidationError, match="target_backlog_s"):
        RaySettings(target_backlog_s=0)


def replica_of(client: TestClient) -> Replica:
    replica = Replica()
    replica.app = client.app  # type: ignore[assignment]
    return replica


def test_a_replica_is_healthy_while_it_is_warm_and_running(grey_checkpoint: Path, held: SlowRunner) -> None:
    held.warm.clear()
    settings = Settings(checkpoint=str(grey_checkpoint), device="cpu", threads=1)
    with TestClient(create_app(settings, lambda *how: held)) as client:
        replica = replica_of(client)

        async def started() -> bool:
            check = asyncio.create_task(replica.check_health())
            await asyncio.sleep(0.2)
            early = check.done()
            held.warm.set()
            await check
            return early

        assert not asyncio.run(started())
        assert replica.record_autoscaling_stats()["nfe_per_second"] > 0
        assert replica.record_autoscaling_stats()["pending_nfe"] == 0
        client.app.state.service.engine.drain(0)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="shutting down"):
            asyncio.run(replica.check_health())


def test_a_draining_replica_finishes_and_is_not_replaced(grey_checkpoint: Path, held: SlowRunner) -> None:
    settings = Settings(checkpoint=str(grey_checkpoint), device="cpu", threads=1)
    with TestClient(create_app(settings, lambda *how: held)) as client:
        replica = replica_of(client)
        asyncio.run(replica.check_health())
        asyncio.run(replica.drain(5))
        asyncio.run(replica.check_health())
        assert client.post("/generate", json={}).status_code == 503


def test_a_replica_whose_engine_failed_for_good_ends_its_process(
    grey_checkpoint: Path, held: SlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    held.warm_up = lambda rows: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    with TestClient(
        create_app(Settings(checkpoint=str(grey_checkpoint), device="cpu", threads=1), lambda *how: held)
    ) as client:
        replica = replica_of(client)
        wait_for(lambda: replica.app.state.service.engine.failure, "the failure")

        def exit(code: int) -> None:
            raise SystemExit(code)

        monkeypatch.setattr("os._exit", exit)
        with pytest.raises(SystemExit, match="1"):
            asyncio.run(replica.check_health())


def test_behind_the_ingress_ray_gives_the_id(grey_checkpoint: Path) -> None:
    app = create_app(Settings(checkpoint=str(grey_checkpoint), device="cpu", threads=1))
    app.add_middleware(DropRequestIdMiddleware)
    with TestClient(app) as client:
        assert client.get("/livez").status_code == 200
        assert "x-request-id" not in client.get("/livez").headers


def test_discovery_lists_the_replicas_or_answers_503() -> None:
    answers: list[list[str]] = [["10.0.0.1:1", "10.0.0.2:2"]]
    server = discovery("127.0.0.1", 0, lambda: answers.pop())
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        found = httpx.get(f"{url}/targets")
        assert found.json() == [{"targets": ["10.0.0.1:1", "10.0.0.2:2"], "labels": {}}]
        assert found.headers["content-type"] == "application/json"
        assert httpx.get(f"{url}/targets").status_code == 503, "an empty list would be believed"
        assert httpx.get(f"{url}/else").status_code == 404
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.skipif(RAY, reason="Ray is installed")
def test_without_ray_the_start_says_what_is_missing() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app.ray"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )
    assert ended.returncode == 1
    assert "the extra ray" in ended.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def ray_server(grey_checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, str]]:
    """Process, URL and list of targets of two replicas."""
    port, targets = free_port(), free_port()
    flags = {"--port": port, "--discovery-port": targets, "--min-replicas": 2, "--replica-cpus": 0.25, "--threads": 1}
    command = [sys.executable, "-m", "app.ray", "--checkpoint", str(grey_checkpoint), "--device", "cpu"]
    command += [str(part) for pair in flags.items() for part in pair]
    own = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("METRICS", "STATS")}
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**own, RAY_worker_niceness="0"), stdout=output, stderr=output
        )

    def up() -> bool:
        assert process.poll() is None, log.read_text()
        return '"serving"' in log.read_text()

    try:
        wait_for(up, "the start")
        yield process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{targets}/targets"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE)


@needs_ray
@pytest.mark.slow
def test_two_replicas_answer_stream_and_end(
    ray_server: tuple[subprocess.Popen[bytes], str, str], client: TestClient
) -> None:
    process, url, targets = ray_server
    with httpx.Client(base_url=url, timeout=PATIENCE) as http:
        wait_for(lambda: http.get("/readyz").status_code == 200, "readiness")
        body = {"n": 2, "seed": 5, "class_label": 1}
        for _ in range(4):  # each replica gives the images of the server without Ray
            assert http.post("/generate", json=body).content == client.post("/generate", json=body).content
        assert http.get("/metrics").json()["error"]["code"] == "not_found"
        assert http.post("/generate", json={"n": 0}).json()["error"]["param"] == "n"
        with http.stream("GET", "/diffusion-sequence", params={"format": "sse", "frames": 3, "seed": 1}) as stream:
            events = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event:")]
        assert events == ["start", "frame", "frame", "frame", "completed"]
        assert len(http.get("/livez").headers.get_list("x-request-id")) == 1
        wait_for(lambda: len(httpx.get(targets).json()[0]["targets"]) == 2, "both targets")
        texts = [httpx.get(f"http://{address}/metrics").text for address in httpx.get(targets).json()[0]["targets"]]
        assert sum(metric(text, "ddpm_images_total") for text in texts) == 9
        assert all(metric(text, "ddpm_ready") == 1 for text in texts)
        # A client that leaves is noticed at the engine.
        with http.stream("GET", "/diffusion-sequence", params={"format": "sse", "steps": 1000, "n": 16}) as stream:
            next(stream.iter_lines())

        def cancelled() -> float:
            found = json.loads(httpx.get(targets).text)[0]["targets"]
            labels = {"outcome": "cancelled"}
            return sum(
                metric(httpx.get(f"http://{address}/metrics").text, "ddpm_requests_total", **labels)
                for address in found
            )

        wait_for(lambda: cancelled() == 1, "the cancellation")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
