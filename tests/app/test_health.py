import html
import io
import itertools
import json
import re
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.schemas import GenerateBody
from app.settings import Settings
from model import checkpoint
from model.sampling.schedule import DEFAULT_STEPS
from tests.app.conftest import BEETLE, CLASSES, SlowRunner, serving
from tests.app.processes import metric, wait_for

HOLE = io.BytesIO()
Image.new("RGBA", (12, 8)).save(HOLE, "PNG")
ENDPOINTS = ("/generate", "/diffusion-sequence", "/models", "/livez", "/readyz", "/health", "/metrics")


def test_models_tells_what_a_client_needs(client: TestClient, grey_checkpoint: Path) -> None:
    (card,) = client.get("/models").json()["models"]
    assert card["name"] == "grey"
    assert card["checkpoint"] == checkpoint.load(grey_checkpoint).sha256
    assert card["class_names"] == list(CLASSES)
    assert card["image_shape"] == [1, 8, 12]
    assert card["samplers"] == ["ddpm", "ddim", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"]
    own = {"sampler": "ddim", "steps": 6, "eta": 0, "guidance_scale": 1}
    assert card["defaults"] == own | {"guidance_interval": [0, 1], "spacing": "trailing", "limit": "clamp"}
    assert card["default_steps"] == DEFAULT_STEPS | {"ddim": 6}
    assert card["limits"] == {"n": 64, "steps": 1000, "frames": 100, "timeout_s": 300}
    assert card["provenance"] == {"data": "none"}
    assert str(grey_checkpoint.parent) not in client.get("/models").text


def test_the_limits_that_models_tells_are_those_that_hold(grey_checkpoint: Path) -> None:
    configured = {"max_n": 3, "max_steps": 4, "max_frames": 5, "max_timeout_s": 60.5}
    with serving(grey_checkpoint, **configured) as client:
        limits = client.get("/models").json()["models"][0]["limits"]
        assert limits == {name.removeprefix("max_"): limit for name, limit in configured.items()}
        for name in ("n", "steps", "timeout_s"):
            assert client.post("/generate", json={name: limits[name]}).status_code == 200
            assert client.post("/generate", json={name: limits[name] + 1}).json()["error"]["param"] == name
        for frames, status in ((limits["frames"], 200), (limits["frames"] + 1, 422)):
            assert client.get("/diffusion-sequence", params={"frames": frames}).status_code == status


def test_it_lives_while_loading_and_is_ready_when_warm(held: SlowRunner, grey_checkpoint: Path) -> None:
    held.warm.clear()
    with serving(grey_checkpoint, held, cold=True) as client:
        assert client.get("/livez").json() == {"status": "ok"}
        assert client.get("/models").json()["models"][0]["batch_rows"] is None
        for path in ("/readyz", "/health"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert "warmed up" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
        assert metric(client.get("/metrics").text, "ddpm_ready") == 0
        for answer in (client.post("/generate", json={}), client.get("/diffusion-sequence")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert int(answer.headers["retry-after"]) >= 1
        held.warm.set()
        wait_for(lambda: client.get("/readyz").json() == {"status": "ok"})
        assert client.get("/health").json() == {"status": "ok"}
        assert metric(client.get("/metrics").text, "ddpm_ready") == 1
        assert client.post("/generate", json={}).status_code == 200
        limit = metric(client.get("/metrics").text, "ddpm_max_batch_size", model="grey")
        assert client.get("/models").json()["models"][0]["batch_rows"] == limit > 0


def test_a_draining_server_refuses_new_work_and_finishes_old(held: SlowRunner, grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, held) as client:
        answers: list[Any] = []
        worker = threading.Thread(target=lambda: answers.append(client.post("/generate", json={"n": 2, "steps": 40})))
        worker.start()
        wait_for(lambda: metric(client.get("/metrics").text, "ddpm_num_samples_running") == 2)
        client.app.state.service.engine.drain(30)
        assert client.get("/livez").status_code == 200
        for answer in (client.get("/readyz"), client.post("/generate", json={}), client.get("/diffusion-sequence")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert "shutting down" in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) >= 1
        held.released.set()
        worker.join()
    assert answers[0].status_code == 200


CONTRACT = {
    "ddpm_num_samples_running": "gauge",
    "ddpm_num_samples_waiting": "gauge",
    "ddpm_ready": "gauge",
    "ddpm_model_info": "gauge",
    "ddpm_model_loads": "counter",
    "ddpm_images": "counter",
    "ddpm_image_steps": "counter",
    "ddpm_nfe": "counter",
    "ddpm_wasted_image_steps": "counter",
    "ddpm_failed_steps": "counter",
    "ddpm_engine_restarts": "counter",
    "ddpm_requests": "counter",
    "ddpm_key_requests": "counter",
    "ddpm_frames_sent": "counter",
    "ddpm_frames_dropped": "counter",
    "ddpm_e2e_request_latency_seconds": "histogram",
    "ddpm_request_queue_time_seconds": "histogram",
    "ddpm_step_seconds": "histogram",
    "ddpm_cancellation_latency_seconds": "histogram",
    "ddpm_encode_seconds": "histogram",
    "ddpm_batch_size": "histogram",
    "ddpm_batch_utilization": "histogram",
    "ddpm_max_batch_size": "gauge",
    "ddpm_time_to_first_frame_seconds": "histogram",
    "ddpm_device_memory_bytes": "gauge",
    "ddpm_event_loop_lag_seconds": "histogram",
    "ddpm_event_loop_max_lag_seconds": "gauge",
    "ddpm_engine_stalled": "gauge",
    "ddpm_current_step_age_seconds": "gauge",
    "ddpm_oldest_queued_request_age_seconds": "gauge",
    "ddpm_pending_nfe": "gauge",
    "ddpm_pending_nfe_limit": "gauge",
    "ddpm_estimated_nfe_per_second": "gauge",
    "ddpm_build_info": "gauge",
}
LABELS: dict[str, set[str] | frozenset[str]] = {
    "ddpm_requests": {"endpoint", "model", "outcome"},
    "ddpm_e2e_request_latency_seconds": {"endpoint", "model", "outcome"},
    "ddpm_model_loads": {"model", "outcome"},
    "ddpm_wasted_image_steps": {"model", "outcome"},
    "ddpm_device_memory_bytes": {"device", "kind"},
    "ddpm_build_info": {"version", "python", "torch"},
    "ddpm_model_info": {"model", "sha256", "device", "runtime", "precision"},
    **dict.fromkeys(
        (
            *(
                "ddpm_num_samples_running",
                "ddpm_num_samples_waiting",
                "ddpm_images",
                "ddpm_image_steps",
                "ddpm_nfe",
                "ddpm_failed_steps",
            ),
            *(
                "ddpm_frames_sent",
                "ddpm_frames_dropped",
                "ddpm_time_to_first_frame_seconds",
                "ddpm_request_queue_time_seconds",
            ),
            *("ddpm_step_seconds", "ddpm_cancellation_latency_seconds", "ddpm_batch_size", "ddpm_max_batch_size"),
            "ddpm_batch_utilization",
        ),
        frozenset({"model"}),
    ),
}


def test_metrics_have_the_names_types_and_labels_of_the_contract(client: TestClient) -> None:
    client.post("/generate", json={})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    assert {name: family.type for name, family in families.items() if name.startswith("ddpm_")} == CONTRACT
    assert {name for name in families if not name.startswith("ddpm_")} >= {"process_resident_memory_bytes"}
    for name in CONTRACT:
        assert families[name].documentation.endswith(".")
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == LABELS.get(name, set())


def test_every_endpoint_is_documented_with_its_errors(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) >= set(ENDPOINTS)
    for path, operations in paths.items():
        for operation in operations.values():
            assert operation["summary"], path
    for path, method in (("/generate", "post"), ("/diffusion-sequence", "get")):
        responses = paths[path][method]["responses"]
        assert set(responses) >= {"200", "404", "406", "413", "422", "429", "500", "503", "504"}
        for status, response in responses.items():
            if int(status) >= 400:
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
        assert "image/png" in responses["200"]["content"] or "text/event-stream" in responses["200"]["content"]
    described = {field["name"]: field for field in paths["/diffusion-sequence"]["get"]["parameters"]}
    assert set(described) >= {"class_label", "n", "frames", "view", "seed", "sampler", "steps", "format"}
    assert client.get("/docs").status_code == 200


def rows(page: str) -> dict[str, str]:
    """What each parameter takes, as the page of the API says, that of the first endpoint that has it."""
    cells = re.findall(r"<tr><td>(\w+)</td><td>(.*?)</td>", page)
    return {name: html.unescape(takes) for name, takes in reversed(cells)}


def test_the_page_of_the_api_shows_values_and_limits(grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, max_n=7, max_steps=90, max_frames=11, max_timeout_s=12.5) as client:
        page, schema = client.get("/docs").text, client.get("/openapi.json").json()
    told = rows(page)
    assert told["sampler"] == "one of ddpm, ddim, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, consistency, fitted"
    assert told["spacing"] == "one of leading, trailing, linspace, quadratic, logsnr"
    assert told["limit"] == "one of none, clamp, dynamic"
    assert told["view"].startswith("one of xt, x0")
    assert told["format"] == "one of sse, multipart, gif, webp"
    assert told["n"] == "a whole number from 1 to 7; left out, 1"
    assert told["steps"] == "a whole number from 1 to 90"
    assert told["frames"] == "a whole number from 1 to 11; left out, 20"
    assert told["timeout_s"] == "a number above 0 and of at most 12.5"
    assert told["seed"] == "a whole number from 0 to 18446744073709551615"
    assert told["eta"] == "a number from 0 to 1"
    assert "`" not in page
    assert schema["components"]["schemas"]["GenerateBody"]["properties"]["n"]["maximum"] == 7


def test_the_commands_on_the_page_of_the_api_work(client: TestClient) -> None:
    commands = [html.unescape(text) for text in re.findall("<pre>(.*?)</pre>", client.get("/docs").text)]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "curl"
        path = next(word for word in words if word.startswith("http://")).removeprefix("http://testserver")
        if "-d" in words and path == "/generate":
            body = json.loads(words[words.index("-d") + 1])
            answer = client.post(path, json=body | {"class_label": None})  # its classes are the bundled checkpoint's
        elif "-d" in words and path == "/v1/images/generations":
            answer = client.post(path, json=json.loads(words[words.index("-d") + 1]) | {"prompt": "plain"})
        elif "-F" in words:
            form = dict(word.split("=") for flag, word in itertools.pairwise(words) if flag == "-F")
            files = {name: HOLE.getvalue() for name in form if form[name].startswith("@")}
            form = {name: value for name, value in form.items() if name not in files}
            answer = client.post(path, data=form | {"prompt": "plain"}, files=files)
        elif "-X" not in words and "-d" not in words:
            answer = client.get(path)
        else:
            continue  # of models, which needs a key
        assert answer.status_code == 200, command


def test_the_examples_in_the_documentation_work(client: TestClient) -> None:
    examples = client.get("/openapi.json").json()["components"]["schemas"]["GenerateBody"]["examples"]
    assert len(examples) >= 3
    for example in examples:
        GenerateBody.model_validate(example).check(Settings())
        # Their classes are the bundled checkpoint's, which has others than this one.
        label = example.get("class_label") and BEETLE
        assert client.post("/generate", json=example | {"class_label": label}).status_code == 200


@pytest.mark.parametrize("path", ENDPOINTS)
def test_options_and_wrong_methods_are_told_what_is_allowed(client: TestClient, path: str) -> None:
    allowed = {"/generate": "POST", "/models": "GET, HEAD, POST"}.get(path, "GET, HEAD")
    for method in {"OPTIONS", "DELETE", "PUT", "PATCH", "POST", "GET"} - set(allowed.split(", ")):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert answer.json()["error"]["code"] == "method_not_allowed"
