"""Errors under /v1 as the openai package raises them, and what it tries again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from tests.app.faulty_server import RAISES
from tests.app.processes import PATIENCE, ServerProcess

KEY = "alice-0123456789abcdef"
PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def ai(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


@pytest.mark.parametrize(
    ("asked", "code", "param", "said"),
    [
        ({"prompt": "a unicorn"}, "invalid_class_label", "prompt", "there are plain"),
        ({"prompt": "plain and 0"}, "invalid_class_label", "prompt", "a request for each"),
        ({"prompt": 7}, "invalid_type", "prompt", "must be a text of at most 4000 characters, not 7"),
        ({"prompt": "x" * 4001}, "invalid_value", "prompt", "4000"),
        ({}, "missing_required_parameter", "prompt", "prompt is missing"),
        ({"width": 64}, "unknown_parameter", "width", "did you mean size?"),
        ({"format": "png"}, "unknown_parameter", "format", "did you mean output_format?"),
        ({"strength": 0.5}, "unknown_parameter", "strength", "POST /v1/images/edits takes an image"),
        ({"n": 65}, "invalid_value", "n", "n must not be more than 64"),
        ({"n": 0}, "invalid_value", "n", "n must be a whole number from 1 to 64"),
        ({"partial_images": 99, "stream": True}, "invalid_value", "partial_images", "from 0 to 3"),
        ({"partial_images": 1}, "invalid_value", "partial_images", "needs stream: true"),
        ({"stream": True, "response_format": "url"}, "invalid_value", "response_format", "must be b64_json"),
        ({"size": "8x12"}, "invalid_value", "size", "images are 12x8"),
        ({"size": "24x24"}, "invalid_value", "size", "must have that shape, such as 516x344"),
        ({"size": "big"}, "invalid_value", "size", "must be auto or WIDTHxHEIGHT, such as 12x8"),
        (
            {"size": "99999x66666"},
            "invalid_value",
            "size",
            "1 image of 99999x66666 would be 6666533334 bytes of pixels",
        ),
        ({"size": "1200x800", "n": 64}, "invalid_value", "size", "64 images of 1200x800 would be 61440000 bytes"),
        ({"quality": "xhigh"}, "invalid_value", "quality", "one of low, medium, high, auto, standard, hd"),
        ({"quality": "low", "steps": 3}, "invalid_value", "quality", "send one of the two"),
        ({"output_format": "gif"}, "invalid_value", "output_format", "one of png, webp, jpeg"),
        ({"output_compression": 50}, "invalid_value", "output_compression", "webp and jpeg"),
        ({"output_compression": 101}, "invalid_value", "output_compression", "from 0 to 100"),
        ({"background": "transparent"}, "invalid_value", "background", "one of auto, opaque"),
        ({"moderation": "none"}, "invalid_value", "moderation", "one of auto, low"),
        ({"style": "vivid"}, "unknown_parameter", "style", "the prompt is a class"),
        ({"negative_prompt": "x"}, "unknown_parameter", "negative_prompt", "the prompt is a class"),
        ({"frame_count": 9}, "unknown_parameter", "frame_count", "/diffusion-sequence?format=gif"),
        ({"num_inference_steps": 9}, "unknown_parameter", "num_inference_steps", "did you mean steps?"),
        ({"sampler": "euler"}, "invalid_value", "sampler", "must be one of ddpm"),
        ({"sampler": "euler", "quality": "low"}, "invalid_value", "sampler", "must be one of ddpm"),
        ({"steps": 1001}, "invalid_value", "steps", "1000"),
        ({"guidance_scale": 21}, "invalid_value", "guidance_scale", "from 0 to 20"),
        ({"seed": -1}, "invalid_value", "seed", "seed must be"),
        ({"stream": "yes"}, "invalid_type", "stream", "true or false"),
    ],
)
def test_what_cannot_be_done_is_a_bad_request(
    ai: OpenAI, asked: dict[str, Any], code: str, param: str, said: str
) -> None:
    body = {**({"prompt": "plain"} if asked else {}), **asked}
    with pytest.raises(openai.BadRequestError) as refused:
        ai.post("/images/generations", body=body, cast_to=object)
    error = refused.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert said in error.message
    assert "\n" not in error.message
    assert error.request_id


def test_unknown_models_and_addresses_are_not_found(ai: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        ai.images.generate(prompt="plain", model="sd-turbo")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError) as refused:
        ai.chat.completions.create(model="grey", messages=[])
    assert refused.value.code == "unknown_url"


@pytest.mark.parametrize(
    ("content", "headers", "status", "code"),
    [
        (b"{", {}, 400, "invalid_value"),
        (b"", {}, 400, "missing_required_parameter"),
        (b"[]", {}, 400, "invalid_type"),
        (b'{"prompt": "' + b"x" * 70_000 + b'"}', {}, 413, "body_too_large"),
        (b"prompt=plain", {"Content-Type": "application/x-www-form-urlencoded"}, 415, "unsupported_media_type"),
        (b"{}", {"Content-Encoding": "gzip"}, 415, "unsupported_media_type"),
    ],
)
def test_bodies_that_are_none_are_refused(
    server: ServerProcess, content: bytes, headers: dict[str, str], status: int, code: str
) -> None:
    answer = server.client.post(PATH, content=content, headers={"Content-Type": "application/json", **headers})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert list(answer.json()["error"]) == ["message", "type", "param", "code"]
    assert answer.headers["cache-control"] == "no-store"


def test_the_other_endpoints_keep_their_errors(server: ServerProcess) -> None:
    answer = server.client.post("/generate", json={"n": 0})
    assert answer.status_code == 422
    assert list(answer.json()["error"]) == ["type", "code", "message", "param"]
    assert answer.json()["error"]["code"] == "invalid_request"


def test_a_step_that_fails_is_an_api_error_in_the_stream(faulty: ServerProcess) -> None:
    with OpenAI(base_url=f"{faulty.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.images.generate(
            prompt="plain", n=2, stream=True, partial_images=3, extra_body={"seed": RAISES, "steps": 6}
        )
        with pytest.raises(openai.APIError) as failed:
            list(stream)
        assert failed.value.code == "step_failed"
        with pytest.raises(openai.InternalServerError, match="500") as failed:
            client.images.generate(prompt="plain", n=2, extra_body={"seed": RAISES, "steps": 6})
        assert failed.value.code == "step_failed"
    outcomes = [line["outcome"] for line in faulty.logs() if line.get("path") == PATH]
    assert outcomes[:1] == ["step_failed"]


def test_too_late_is_not_tried_again(server: ServerProcess) -> None:
    def refused() -> float:
        return server.metric("ddpm_requests_total", endpoint=PATH, outcome="deadline_exceeded")

    before = refused()
    with (
        OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3) as client,
        pytest.raises(openai.InternalServerError) as late,
    ):
        client.images.generate(prompt="plain", extra_body={"timeout_s": 1e-9})
    assert late.value.code == "deadline_exceeded"
    assert refused() == before + 1


@pytest.mark.slow
def test_keys_and_limits_are_as_openai_has_them(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--key-requests-per-minute", "60"]
    with ServerProcess("app", *argv, DDPM_API_KEYS=f"alice:{KEY}") as server:

        def client(key: str, retries: int = 0) -> OpenAI:
            return OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=retries)

        with client("wrong-0123456789abcdef") as stranger, pytest.raises(openai.AuthenticationError) as refused:
            stranger.models.list()
        assert refused.value.code == "invalid_api_key"
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=server.url, headers=headers) as spender:
            while spender.get("/v1/models").status_code == 200:
                pass
        with client(KEY) as alice, pytest.raises(openai.RateLimitError) as limited:
            alice.models.list()
        assert (limited.value.code, limited.value.type) == ("rate_limit_exceeded", "rate_limit_error")
        assert limited.value.response.headers["retry-after"] == "1"
        with client(KEY, retries=2) as alice:
            assert alice.models.list().data[0].id == "grey", "it waits as Retry-After says, and tries again"


def test_the_root_of_v1_has_the_shape_of_v1(server: ServerProcess) -> None:
    for path in ("/v1", "/v1/"):
        assert server.client.get(path).json()["error"]["code"] == "unknown_url"
