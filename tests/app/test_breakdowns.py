"""What a server process cannot mend from inside: everyone is answered, and it ends so that it is started anew."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.app.faulty_server import BREAKS_DEVICE, CANNOT_START, HANGS, LONG, SLOW, WARM_UP
from tests.app.processes import PATIENCE, ServerProcess, run_to_its_end, wait_for
from tests.app.test_server import refused

FAULTY = "tests.app.faulty_server"
NEIGHBOURS: list[dict[str, Any]] = [{"n": 2, "steps": 40, "seed": seed} for seed in (71, 72)]


def generate(server: ServerProcess, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(server.url + "/generate", json=body, timeout=PATIENCE)


def stream(server: ServerProcess, query: dict[str, Any]) -> str:
    return httpx.get(server.url + "/diffusion-sequence", params=query, timeout=PATIENCE).text


def test_a_checkpoint_that_does_not_run_on_the_device_ends_the_start(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--port", "0"]
    ended = run_to_its_end(*argv, module=FAULTY, FAULT=WARM_UP)
    assert ended.returncode == 1
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    first, *_, last = [line for line in lines if line["level"] == "critical"]
    assert first["message"] == "the checkpoint cannot be run on cpu"
    assert "no kernel image is available" in first["exception"]
    assert last["message"] == "ending, to be started anew: the warm-up failed"


def test_a_step_that_never_returns_answers_everyone_and_ends_the_process(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--step-timeout-s", "2"]
    with ServerProcess(FAULTY, *argv) as server, ThreadPoolExecutor(4) as pool:
        alone = [generate(server, body).content for body in NEIGHBOURS]
        hung = pool.submit(generate, server, {"n": 2, "steps": 8, "seed": HANGS})
        wait_for(lambda: server.metric("ddpm_heartbeat_age_seconds") > 0.2, "the hung step")
        others = [pool.submit(generate, server, body) for body in NEIGHBOURS]
        streamed = pool.submit(stream, server, {"steps": 40})
        wait_for(lambda: server.client.get("/readyz").status_code == 503, "the loss of readiness")
        assert server.metric("ddpm_engine_stalled") == 1
        assert server.client.get("/livez").status_code == 200
        assert server.exit_code() == 1
        for answer in [hung.result(), *[other.result() for other in others]]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert int(answer.headers["retry-after"]) >= 1
        *_, last, _ = streamed.result().split("\n\n")
        assert last.startswith("event: error\ndata: ")
    said = [line["message"] for line in server.logs() if line["level"] == "critical"]
    assert "the engine gives up: a denoising step did not return within 2." in said[0]
    with ServerProcess(FAULTY, *argv) as server:  # as its supervisor starts it
        assert [generate(server, body).content for body in NEIGHBOURS] == alone


def test_a_long_step_takes_readiness_away_and_gives_it_back(grey_checkpoint: Path) -> None:
    with ServerProcess(FAULTY, "--checkpoint", str(grey_checkpoint)) as server, ThreadPoolExecutor(3) as pool:
        alone = [generate(server, body).content for body in NEIGHBOURS]
        answers = [pool.submit(generate, server, body) for body in [*NEIGHBOURS, {"n": 2, "steps": 8, "seed": LONG}]]
        wait_for(lambda: server.client.get("/readyz").status_code == 503, "the loss of readiness")
        assert generate(server, {}).status_code == 503
        wait_for(lambda: server.client.get("/readyz").status_code == 200, "readiness")
        assert [answer.result().status_code for answer in answers] == [200] * 3
        assert [answer.result().content for answer in answers[:2]] == alone


def test_a_step_that_never_returns_does_not_outlast_the_drain(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--drain-s", "0"]
    with ServerProcess(FAULTY, *argv) as server, ThreadPoolExecutor(1) as pool:
        hung = pool.submit(generate, server, {"n": 2, "steps": 8, "seed": HANGS})
        wait_for(lambda: server.metric("ddpm_heartbeat_age_seconds") > 0.2, "the hung step")
        server.terminate()
        wait_for(lambda: refused(server), "the refusal of new work")
        assert (hung.result().status_code, hung.result().json()["error"]["code"]) == (503, "not_ready")
        assert server.exit_code() == 1
    said = [line["message"] for line in server.logs() if line["level"] == "critical"]
    assert said[0] == "the engine gives up: a denoising step did not return before the drain ended"


@pytest.mark.parametrize(
    ("seed", "why"),
    [
        (BREAKS_DEVICE, "the device does not work any more"),
        (CANNOT_START, "it failed 3 times without making a picture"),
    ],
)
def test_what_fails_again_and_again_answers_everyone_and_ends_the_process(
    grey_checkpoint: Path, seed: int, why: str
) -> None:
    with ServerProcess(FAULTY, "--checkpoint", str(grey_checkpoint)) as server, ThreadPoolExecutor(3) as pool:
        others = [pool.submit(generate, server, {"n": 2, "steps": 1000, "seed": SLOW}) for _ in range(2)]
        wait_for(lambda: server.rows() == 4, "work")
        others.append(pool.submit(generate, server, {"n": 2, "steps": 8, "seed": seed}))
        assert server.exit_code() == 1
        for answer in [other.result() for other in others]:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert server.logs()[-1]["message"] == f"ending, to be started anew: {why}"
