"""The metrics against what a run really did: a real server, and clients that count for themselves."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from app.engine import memory
from app.event_loop_monitor import TICK_S
from tests.app.conftest import SlowRunner, serving
from tests.app.processes import ServerProcess, metric, wait_for

SEQUENCE = "/diffusion-sequence"
MAX_ROWS = 4


@pytest.fixture(scope="module")
def fresh(grey_checkpoint: Path) -> ServerProcess:
    with ServerProcess("app", "--checkpoint", str(grey_checkpoint), "--max-batch-size", str(MAX_ROWS)) as server:
        yield server


def test_every_count_is_what_the_clients_saw(fresh: ServerProcess) -> None:
    started = fresh.client.get("/metrics").text
    assert metric(started, "ddpm_image_steps_total") == metric(started, "ddpm_step_seconds_count") == 0
    for name in ("ddpm_images_total", "ddpm_step_seconds_count", "ddpm_frames_sent_total"):
        assert f'{name}{{model="grey"}} 0.0' in started  # a rate needs the 0 before the first event

    for n, steps in ((3, 5), (6, 2)):
        fresh.client.post("/generate", json={"n": n, "steps": steps}).raise_for_status()
    assert fresh.client.post("/generate", json={"n": 0}).status_code == 422
    assert fresh.client.post("/generate", json={"class_label": "no such class"}).status_code == 422
    stream = fresh.client.get(SEQUENCE, params={"n": 2, "steps": 4, "frames": 3, "format": "sse"}).text
    events = [line.removeprefix("event: ") for line in stream.splitlines() if line.startswith("event: ")]
    assert events[0] == "start"
    assert events[-1] == "completed"
    fresh.client.get(SEQUENCE, params={"steps": 4, "frames": 3, "format": "gif"}).raise_for_status()

    wait_for(lambda: fresh.metric("ddpm_requests_total", endpoint=SEQUENCE) == 2, "the last request's line")
    text = fresh.client.get("/metrics").text
    assert metric(text, "ddpm_images_total", model="grey") == 3 + 6 + 2 + 1
    assert metric(text, "ddpm_image_steps_total", model="grey") == 3 * 5 + 6 * 2 + 2 * 4 + 1 * 4
    assert metric(text, "ddpm_requests_total", endpoint="/generate", model="grey", outcome="ok") == 2
    assert metric(text, "ddpm_requests_total", endpoint="/generate", model="", outcome="invalid_request") == 1
    assert metric(text, "ddpm_requests_total", endpoint="/generate", model="", outcome="invalid_class_label") == 1
    for outcome, count in (("ok", 2), ("invalid_request", 1)):
        labels = {"endpoint": "/generate", "outcome": outcome}
        assert metric(text, "ddpm_e2e_request_latency_seconds_count", **labels) == count
    assert metric(text, "ddpm_request_queue_time_seconds_count", model="grey") == 4
    assert metric(text, "ddpm_frames_sent_total", model="grey") == events.count("frame") + 3
    assert metric(text, "ddpm_frames_dropped_total", model="grey") == 3 - events.count("frame")
    assert metric(text, "ddpm_time_to_first_frame_seconds_count", model="grey") == 1  # a file's frames come all at once
    assert metric(text, "ddpm_encode_seconds_count") == 2 + events.count("frame") + 1 + 1  # and the final picture; gif
    assert metric(text, "ddpm_wasted_image_steps_total") == metric(text, "ddpm_cancellation_latency_seconds_count") == 0
    # No guidance: a row is an image's step, and a batch's fill is its rows over those it had room for.
    assert metric(text, "ddpm_batch_size_sum", model="grey") == metric(text, "ddpm_image_steps_total")
    assert metric(text, "ddpm_batch_size_count") == metric(text, "ddpm_step_seconds_count")
    assert metric(text, "ddpm_max_batch_size", model="grey") == MAX_ROWS
    assert metric(text, "ddpm_batch_utilization_sum") * MAX_ROWS == metric(text, "ddpm_batch_size_sum")
    assert metric(text, "ddpm_step_seconds_sum") < metric(text, "ddpm_e2e_request_latency_seconds_sum", outcome="ok")


def test_the_limit_of_a_batch_is_measured_and_changes_no_image(fresh: ServerProcess, server: ServerProcess) -> None:
    (told,) = [line for line in server.logs() if line["message"] == "batches measured"]
    assert told["rows"] <= told["most"]
    # Of calls of one thread; the largest batch has two for each worker.
    assert set(told["milliseconds_per_row"]) == {"1", "2", "4", "8"} >= {str(told["rows"]), str(told["most"] // 2)}
    assert server.metric("ddpm_max_batch_size", model="grey") == told["most"]
    caps = [process.client.get("/models").json()["models"][0]["batch_rows"] for process in (server, fresh)]
    assert caps == [told["most"], MAX_ROWS]
    body = {"n": 11, "steps": 3, "seed": 5, "guidance_scale": 2}
    limited, measured = (process.client.post("/generate", json=body).content for process in (fresh, server))
    assert limited == measured
    assert fresh.metric("ddpm_max_batch_size", model="grey") == MAX_ROWS
    assert not [line for line in fresh.logs() if line["message"] == "batches measured"]


def test_guidance_counts_two_rows_for_one_image(fresh: ServerProcess) -> None:
    before = fresh.client.get("/metrics").text
    fresh.client.post("/generate", json={"n": 1, "steps": 3, "guidance_scale": 2}).raise_for_status()
    after = fresh.client.get("/metrics").text
    expected = {"ddpm_batch_size_sum": 6, "ddpm_nfe_total": 6, "ddpm_image_steps_total": 3, "ddpm_images_total": 1}
    for name, more in expected.items():
        assert metric(after, name) - metric(before, name) == more


def test_a_leaving_client_counts_as_a_cancel_and_wasted_steps(fresh: ServerProcess) -> None:
    before = fresh.client.get("/metrics").text
    params = {"n": 8, "steps": 1000, "frames": 100, "format": "sse"}
    with fresh.client.stream("GET", SEQUENCE, params=params) as stream:
        for line in stream.iter_lines():
            if line.startswith("event: frame"):
                break
    wait_for(lambda: fresh.metric("ddpm_cancellation_latency_seconds_count", model="grey") == 1, "the cancel")
    wait_for(lambda: fresh.metric("ddpm_requests_total", endpoint=SEQUENCE, outcome="cancelled") == 1, "the outcome")
    after = fresh.client.get("/metrics").text
    steps = metric(after, "ddpm_image_steps_total") - metric(before, "ddpm_image_steps_total")
    assert metric(after, "ddpm_wasted_image_steps_total", model="grey", outcome="cancelled") == steps
    assert 0 < steps < 8000
    assert metric(after, "ddpm_images_total") == metric(before, "ddpm_images_total")


@pytest.mark.slow
def test_gauges_show_the_work_while_it_is_there(held: SlowRunner, grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, held, max_batch_size=2, max_pending_nfe=500) as client:

        def now(name: str, **labels: str) -> float:
            return metric(client.get("/metrics").text, name, **labels)

        assert (
            now("ddpm_pending_nfe")
            == now("ddpm_current_step_age_seconds")
            == now("ddpm_oldest_queued_request_age_seconds")
            == 0
        )
        assert now("ddpm_pending_nfe_limit") == 500
        # Every other step is for those with the least to do: with two of them the third waits its turn.
        works = [{"n": 2, "steps": 30}, {"n": 2, "steps": 40}]
        workers = [threading.Thread(target=client.post, args=("/generate",), kwargs={"json": work}) for work in works]
        for worker in workers:
            worker.start()
        wait_for(
            lambda: (
                now("ddpm_num_samples_running", model="grey") == 2
                and now("ddpm_num_samples_waiting", model="grey") == 2
            )
        )
        assert 0 < now("ddpm_pending_nfe") <= 2 * 30 + 2 * 40
        wait_for(lambda: now("ddpm_current_step_age_seconds") > 0, "a step")
        assert now("ddpm_engine_stalled") == 0
        assert now("ddpm_estimated_nfe_per_second") > 0
        held.released.set()
        for worker in workers:
            worker.join()
        wait_for(
            lambda: now("ddpm_pending_nfe") == now("ddpm_num_samples_running") == now("ddpm_num_samples_waiting") == 0
        )


def test_the_oldest_wait_grows_until_the_first_step(held: SlowRunner, grey_checkpoint: Path) -> None:
    entered, leave = threading.Event(), threading.Event()
    start = held.init_latents

    def slow_start(samples: list[object]) -> None:
        entered.set()
        assert leave.wait(30)
        start(samples)

    held.init_latents = slow_start
    with serving(grey_checkpoint, held) as client:
        worker = threading.Thread(target=client.post, args=("/generate",), kwargs={"json": {}})
        worker.start()
        assert entered.wait(30)
        first = metric(client.get("/metrics").text, "ddpm_oldest_queued_request_age_seconds")
        wait_for(
            lambda: metric(client.get("/metrics").text, "ddpm_oldest_queued_request_age_seconds") > first > 0,
            "a longer wait",
        )
        leave.set()
        held.released.set()
        worker.join()
        assert metric(client.get("/metrics").text, "ddpm_oldest_queued_request_age_seconds") == 0


@pytest.mark.slow
def test_a_pause_of_the_event_loop_is_as_long_as_it_was(grey_checkpoint: Path) -> None:
    name = "ddpm_event_loop_lag_seconds"
    with serving(grey_checkpoint) as client:
        asked, before = time.monotonic(), client.get("/metrics").text
        client.portal.call(time.sleep, 0.4)  # on the event loop
        looks = metric(before, f"{name}_count") + 100
        wait_for(lambda: metric(client.get("/metrics").text, f"{name}_count") > looks, "some looks")
        after = client.get("/metrics").text
        seconds = time.monotonic() - asked
    longest = metric(after, "ddpm_event_loop_max_lag_seconds")
    assert longest >= 0.4 - TICK_S
    count, late, short = (
        metric(after, f"{name}_{part}", **label) - metric(before, f"{name}_{part}", **label)
        for part, label in (("count", {}), ("sum", {}), ("bucket", {"le": "0.2"}))
    )
    assert count > short
    # It slept and was late, one after the other and nothing else; only the first may have begun before.
    assert 0.4 - TICK_S <= late <= seconds - TICK_S * count + TICK_S + longest


def test_versions_checkpoint_and_memory_are_told(fresh: ServerProcess) -> None:
    card = fresh.client.get("/models").json()["models"][0]
    version = fresh.client.get("/openapi.json").json()["info"]["version"]
    text = fresh.client.get("/metrics").text
    assert metric(text, "ddpm_model_info", model="grey", sha256=card["checkpoint"], **card["runs_on"]) == 1
    assert metric(text, "ddpm_build_info", version=version, torch=torch.__version__) == 1
    used = metric(text, "ddpm_device_memory_bytes", device="cpu", kind="used")
    assert 2**26 < used < metric(text, "ddpm_device_memory_bytes", device="cpu", kind="total")


def test_a_container_has_the_memory_of_its_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CGROUP_LIMIT", tmp_path / "memory.max")
    machine = memory.available_bytes()
    for content, expected in (("1073741824\n", 2**30), ("max\n", machine), (f"{machine * 2}\n", machine)):
        (tmp_path / "memory.max").write_text(content)
        assert memory.available_bytes() == expected


def test_clients_cannot_make_new_label_values(fresh: ServerProcess) -> None:
    for path in ("/a", "/b", "/c?model=x"):
        assert httpx.get(fresh.url + path).status_code == 404
    fresh.client.post("/generate", content=json.dumps({"model": "zzz"}), headers={"content-type": "application/json"})
    families = text_string_to_metric_families(fresh.client.get("/metrics").text)
    labels = [sample.labels for family in families if family.name == "ddpm_requests" for sample in family.samples]
    known = {"other", "/generate", SEQUENCE, "/metrics", "/models", "/readyz", "/openapi.json"}
    assert {label["endpoint"] for label in labels} <= known
    assert {label["model"] for label in labels} == {"", "grey"}
