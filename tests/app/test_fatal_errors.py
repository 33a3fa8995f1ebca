"""What ends a server process, or ought not to. Where it cannot go on everyone is answered, and it is started anew."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.__main__ import DUPLICATE_SIGNAL_S
from tests.app.faulty_server import BREAKS_DEVICE, CANNOT_START, CRASHES_TWICE, HANGS, LONG, RAISES, SLOW, WARM_UP
from tests.app.processes import PATIENCE, ROOT, ServerProcess, environment, run_to_its_end, wait_for
from tests.app.test_faults import ask
from tests.app.test_server import refused

pytestmark = pytest.mark.slow  # each test has a server of its own

FAULTY = "tests.app.faulty_server"
NEIGHBOURS: list[dict[str, Any]] = [{"n": 2, "steps": 40, "seed": seed} for seed in (71, 72)]


def generate(server: ServerProcess, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + "/generate", json=body, timeout=PATIENCE)


def stream(server: ServerProcess, query: dict[str, Any]) -> str:
    return httpx.get(server.url + "/diffusion-sequence", params=query, timeout=PATIENCE).text


def test_a_checkpoint_that_does_not_run_ends_the_start(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--port", "0"]
    ended = run_to_its_end(*argv, module=FAULTY, FAULT=WARM_UP)
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    first, *_, last = [line for line in lines if line["level"] == "critical"]
    assert first["message"] == "the checkpoint cannot be run on cpu"
    assert "no kernel image is available" in first["exception"]
    assert last["message"] == "fatal error, exiting for restart: the warm-up failed"


def test_a_hanging_step_answers_everyone_and_ends_the_process(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--step-timeout-s", "2"]
    with ServerProcess(FAULTY, *argv) as server, ThreadPoolExecutor(4) as pool:
        alone = [generate(server, body).content for body in NEIGHBOURS]
        hung = pool.submit(generate, server, {"n": 2, "steps": 8, "seed": HANGS})
        wait_for(lambda: server.metric("ddpm_current_step_age_seconds") > 0.2, "the hung step")
        others = [pool.submit(generate, server, body) for body in NEIGHBOURS]
        streamed = pool.submit(stream, server, {"steps": 40})
        with server.truthful_readiness() as said:
            wait_for(lambda: 503 in said, "the loss of readiness")
        assert server.metric("ddpm_engine_stalled") == 1
        assert server.client.get("/livez").status_code == 200
        hung.result()
        assert refused(server)
        assert server.exit_code() == 1
        for answer in [hung.result(), *[other.result() for other in others]]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert int(answer.headers["retry-after"]) >= 1
        *_, last, _ = streamed.result().split("\n\n")
        assert last.startswith("event: error\ndata: ")
    said = [line["message"] for line in server.logs() if line["level"] == "critical"]
    assert "engine failed: a denoising step did not return within 2." in said[0]
    with ServerProcess(FAULTY, *argv) as server:  # as its supervisor starts it
        assert [generate(server, body).content for body in NEIGHBOURS] == alone


def test_a_long_step_takes_readiness_away_and_gives_it_back(grey_checkpoint: Path) -> None:
    with ServerProcess(FAULTY, "--checkpoint", str(grey_checkpoint)) as server, ThreadPoolExecutor(3) as pool:
        alone = [generate(server, body).content for body in NEIGHBOURS]
        bodies = [*NEIGHBOURS, {"n": 2, "steps": 8, "seed": LONG}]
        with server.truthful_readiness() as said:
            answers = [pool.submit(generate, server, body) for body in bodies]
            wait_for(lambda: 503 in said, "the loss of readiness")
            assert generate(server, {}).status_code == 503
            assert [answer.result().status_code for answer in answers] == [200] * 3
            assert server.client.get("/readyz").status_code == 200
        assert [answer.result().content for answer in answers[:2]] == alone


def test_a_step_that_never_returns_does_not_outlast_the_drain(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--drain-s", "0"]
    with ServerProcess(FAULTY, *argv) as server, ThreadPoolExecutor(1) as pool:
        hung = pool.submit(generate, server, {"n": 2, "steps": 8, "seed": HANGS})
        wait_for(lambda: server.metric("ddpm_current_step_age_seconds") > 0.2, "the hung step")
        server.terminate()
        wait_for(lambda: refused(server), "the refusal of new work")
        assert (hung.result().status_code, hung.result().json()["error"]["code"]) == (503, "not_ready")
        assert server.exit_code() == 1
    said = [line["message"] for line in server.logs() if line["level"] == "critical"]
    assert said[0] == "engine failed: a denoising step did not return before the drain ended"


@pytest.mark.parametrize(
    ("seed", "why"),
    [
        (BREAKS_DEVICE, "the device does not work any more"),
        (CANNOT_START, "it failed 3 times without finishing an image"),
    ],
)
def test_repeated_failures_answer_everyone_and_end_the_process(grey_checkpoint: Path, seed: int, why: str) -> None:
    with ServerProcess(FAULTY, "--checkpoint", str(grey_checkpoint)) as server, ThreadPoolExecutor(3) as pool:
        others = [pool.submit(generate, server, {"n": 2, "steps": 1000, "seed": SLOW}) for _ in range(2)]
        wait_for(lambda: server.samples_in_flight() == 4, "work")
        assert generate(server, {"n": 2, "steps": 8, "seed": seed}).json()["error"]["code"] == "not_ready"
        assert refused(server)
        assert server.exit_code() == 1
        for answer in [other.result() for other in others]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert server.logs()[-1]["message"] == f"fatal error, exiting for restart: {why}"


def test_a_second_signal_ends_the_process_at_once(grey_checkpoint: Path) -> None:
    with ServerProcess(FAULTY, "--checkpoint", str(grey_checkpoint)) as server:
        connection = ask(server, "GET", f"/diffusion-sequence?n=4&steps=1000&seed={SLOW}")
        wait_for(lambda: server.samples_in_flight() == 4, "work")
        server.terminate()
        server.terminate()  # so soon that it counts as the same
        wait_for(lambda: refused(server), "the refusal of new work")
        time.sleep(DUPLICATE_SIGNAL_S)
        assert server.process.poll() is None
        server.terminate()
        assert server.exit_code() == 128 + signal.SIGTERM
        connection.close()


def test_after_a_kill_it_starts_again_at_once_on_the_same_port(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint)]
    with ServerProcess(FAULTY, *argv) as server:
        before = generate(server, NEIGHBOURS[0]).content
        port = int(server.url.rpartition(":")[2])
        connection = ask(server, "POST", "/generate", {"n": 4, "steps": 1000, "seed": SLOW})
        wait_for(lambda: server.samples_in_flight() == 4, "work")
        server.process.kill()
        assert server.exit_code() == -signal.SIGKILL
    with ServerProcess(FAULTY, *argv, port=port) as server:
        assert server.samples_in_flight() == 0
        assert server.client.get("/readyz").status_code == 200
        assert generate(server, NEIGHBOURS[0]).content == before
    connection.close()


def test_an_overwritten_and_deleted_checkpoint_is_served_on(grey_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "grey.safetensors"
    path.write_bytes(grey_checkpoint.read_bytes())
    with ServerProcess("app", "--checkpoint", str(path)) as server:
        models, image = server.client.get("/models").json(), generate(server, NEIGHBOURS[0]).content
        path.write_bytes(b"\xff" * 100)  # the same file: what is mapped into memory would be cut off
        assert generate(server, NEIGHBOURS[0]).content == image
        path.unlink()
        assert generate(server, NEIGHBOURS[0]).content == image
        assert server.client.get("/models").json() == models
        assert server.client.get("/readyz").status_code == 200


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_logs_that_cannot_be_written_hinder_nothing(grey_checkpoint: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        FAULTY,
        "--checkpoint",
        str(grey_checkpoint),
        "--threads",
        "1",
        "--port",
        str(port),
    ]
    with open("/dev/full", "w") as full:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=full, stderr=full)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:

            def ready() -> bool:
                assert process.poll() is None
                try:
                    return client.get("/readyz").status_code == 200
                except httpx.TransportError:
                    return False

            wait_for(ready, "readiness")
            for seed, status in [(71, 200), (RAISES, 500), (CRASHES_TWICE, 200), (71, 200)]:
                assert client.post("/generate", json={"n": 2, "steps": 8, "seed": seed}).status_code == status
                assert client.get("/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
