"""POST /v1/images/generations and GET /v1/models, asked by the openai package."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image as Pillow

from app.openai.answer import ImagesAnswer
from model.images import Image
from tests.app.conftest import BEETLE, SlowRunner, serving
from tests.app.processes import PATIENCE, ServerProcess, metric, wait_for

SEED = {"seed": 5}


@pytest.fixture(scope="module")
def ai(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def picture(text: str | None) -> Pillow.Image:
    return Pillow.open(io.BytesIO(base64.b64decode(text or "")))


def pixels(text: str | None) -> Image:
    return np.array(picture(text))


def by_generate(server: ServerProcess, **body: Any) -> list[bytes]:
    """The PNG files of POST /generate."""
    listed = server.client.post("/generate", json=body, headers={"Accept": "application/json"}).json()["images"]
    return [base64.b64decode(image["png"]) for image in listed]


def test_images_are_those_of_generate_byte_for_byte(ai: OpenAI, server: ServerProcess) -> None:
    made = ai.images.generate(prompt="a plain picture", n=3, extra_body={**SEED, "index": 2, "steps": 4})
    assert abs(made.created - time.time()) < PATIENCE
    assert (made.size, made.output_format, made.background) == ("12x8", "png", "opaque")
    assert made.quality is None, "the request chose the steps"
    expected = by_generate(server, class_label="plain", n=3, seed=5, index=2, steps=4)
    assert [base64.b64decode(image.b64_json or "") for image in made.data or []] == expected
    assert [image.revised_prompt for image in made.data or []] == ["plain"] * 3
    assert [image.model_extra for image in made.data or []] == [{"seed": 5, "index": i} for i in (2, 3, 4)]
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens, made.usage.total_tokens) == (0, 12, 12)


def test_async_clients_get_the_same(ai: OpenAI, server: ServerProcess) -> None:
    async def ask() -> str | None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            made = await client.images.generate(prompt=BEETLE, extra_body=SEED)
            return (made.data or [])[0].b64_json

    made = ai.images.generate(prompt=BEETLE, extra_body=SEED)
    assert asyncio.run(ask()) == (made.data or [])[0].b64_json


def test_a_stream_has_partial_images_and_the_final_one(ai: OpenAI, server: ServerProcess) -> None:
    events = list(ai.images.generate(prompt="plain", stream=True, partial_images=2, extra_body=SEED))
    assert [event.type for event in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    first, second, last = events
    assert (first.partial_image_index, second.partial_image_index) == (0, 1)
    assert last.usage.output_tokens == 6
    assert {(event.size, event.quality, event.output_format, event.background) for event in events} == {
        ("12x8", "medium", "png", "opaque")
    }
    query = {"class_label": "plain", "seed": 5, "view": "x0", "frames": 6, "format": "webp"}
    animation = Pillow.open(io.BytesIO(server.client.get("/diffusion-sequence", params=query).content))
    for event, step in ((first, 2), (second, 4)):
        animation.seek(step - 1)
        np.testing.assert_array_equal(pixels(event.b64_json), np.array(animation.convert("L")))
    assert base64.b64decode(last.b64_json) == by_generate(server, class_label="plain", seed=5)[0]


@pytest.mark.parametrize(("steps", "partials", "sent"), [(6, 0, 0), (6, 3, 3), (2, 3, 1), (1, 3, 0)])
def test_fewer_partials_only_where_there_are_fewer_steps(ai: OpenAI, steps: int, partials: int, sent: int) -> None:
    events = list(ai.images.generate(prompt="", stream=True, partial_images=partials, n=2, extra_body={"steps": steps}))
    partial = [event for event in events if event.type == "image_generation.partial_image"]
    assert [(event.partial_image_index, event.image_index) for event in partial] == [
        (index, image) for index in range(sent) for image in (0, 1)
    ]
    assert [event.image_index for event in events[len(partial) :]] == [0, 1]


def test_partials_wait_for_a_slow_reader(grey_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = ImagesAnswer.encode

    def slowly(answer: ImagesAnswer, pictures: Image) -> list[str]:
        wait_for(lambda: answer.job.request.status.is_final, "the end of the work")
        return encode(answer, pictures)

    monkeypatch.setattr(ImagesAnswer, "encode", slowly)
    with serving(grey_checkpoint) as client:
        body = {"prompt": "", "stream": True, "partial_images": 3}
        text = client.post("/v1/images/generations", json=body).text
        assert [line for line in text.splitlines() if line.startswith("event: ")] == [
            *["event: image_generation.partial_image"] * 3,
            "event: image_generation.completed",
        ]
        scraped = client.get("/metrics").text
        assert metric(scraped, "ddpm_frames_sent_total") == 3
        assert metric(scraped, "ddpm_frames_dropped_total") == 0


@pytest.mark.slow
def test_a_reader_that_leaves_a_stream_stops_its_work(server: ServerProcess, ai: OpenAI) -> None:
    extra = {"steps": 400, "sampler": "ddpm"}
    stream = ai.images.generate(prompt="", n=16, stream=True, partial_images=3, user="leaver", extra_body=extra)
    next(iter(stream))
    stream.close()
    wait_for(lambda: server.samples_in_flight() == 0, "the end of its work")
    wait_for(lambda: [line["outcome"] for line in server.logs() if line.get("user") == "leaver"] == ["cancelled"])


def test_a_url_is_an_address_that_makes_the_same_image(ai: OpenAI, server: ServerProcess) -> None:
    asked: dict[str, Any] = {"prompt": "random", "n": 2, "size": "24x16", "extra_body": SEED}
    linked = ai.images.generate(**asked, response_format="url", output_format="webp")
    assert linked.usage is None
    made = ai.images.generate(**asked, output_format="webp")
    for link, image in zip(linked.data or [], made.data or [], strict=True):
        assert link.b64_json is None
        answer = server.client.get(link.url or "")
        assert answer.status_code == 200, "the address is in full"
        assert answer.content == base64.b64decode(image.b64_json or "")


@pytest.mark.parametrize(
    ("size", "made"), [("auto", (12, 8)), ("12x8", (12, 8)), ("24x16", (24, 16)), ("100x67", (100, 67))]
)
def test_larger_sizes_are_enlarged_and_say_so(ai: OpenAI, size: str, made: tuple[int, int]) -> None:
    answer = ai.images.with_raw_response.generate(prompt="plain", size=size, extra_body=SEED)
    response = answer.parse()
    file = picture((response.data or [])[0].b64_json)
    native = "12x8" if made != (12, 8) else None
    assert file.size == made
    assert response.size == f"{made[0]}x{made[1]}"
    assert (response.model_extra or {}).get("enlarged_from") == native
    assert answer.headers.get("x-ddpm-enlarged-from") == native
    assert file.text.get("enlarged_from") == native


def test_formats_and_their_compression(ai: OpenAI) -> None:
    def data(**more: Any) -> bytes:
        made = ai.images.generate(prompt="plain", size="240x160", extra_body=SEED, **more)
        return base64.b64decode((made.data or [])[0].b64_json or "")

    files = {format: data(output_format=format) for format in ("png", "webp", "jpeg")}
    assert [Pillow.open(io.BytesIO(file)).format for file in files.values()] == ["PNG", "WEBP", "JPEG"]
    exact = [np.array(Pillow.open(io.BytesIO(files[name])).convert("L")) for name in ("png", "webp")]
    np.testing.assert_array_equal(*exact)
    for format in ("webp", "jpeg"):
        assert len(data(output_format=format, output_compression=10)) < len(files[format]) / 2


@pytest.mark.parametrize(
    ("quality", "steps", "level"), [("low", 3, "low"), ("auto", 6, "medium"), ("hd", 12, "high"), ("high", 12, "high")]
)
def test_quality_chooses_the_steps(ai: OpenAI, quality: Any, steps: int, level: str) -> None:
    answer = ai.images.with_raw_response.generate(prompt="plain", quality=quality)
    assert answer.headers["x-ddpm-steps"] == str(steps)
    assert answer.parse().quality == level


def test_null_is_the_default_of_every_field(ai: OpenAI) -> None:
    names = "model n size quality response_format output_format output_compression background moderation stream"
    more = "partial_images user safety_identifier seed index timeout_s steps sampler guidance_scale"
    made = ai.images.generate(prompt="plain", extra_body=dict.fromkeys([*names.split(), *more.split()]))
    assert len(made.data or []) == 1


@pytest.mark.parametrize("fields", [{"steps": 3}, {"size": "24x16"}, {"response_format": "url"}])
def test_answers_have_what_the_schema_requires(server: ServerProcess, fields: dict[str, Any]) -> None:
    schema = server.client.get("/openapi.json").json()["components"]["schemas"]["ImagesResponse"]
    answer = server.client.post("/v1/images/generations", json={"prompt": "plain", **fields}).json()
    assert set(schema["required"]) <= set(answer) <= set(schema["properties"])


def test_openais_own_models_are_the_default(ai: OpenAI) -> None:
    for name in ("dall-e-3", "gpt-image-1.5", "chatgpt-image-latest"):
        made = ai.images.generate(prompt="plain", model=name, moderation="low", background="opaque")
        assert (made.model_extra or {})["model"] == "grey"


def test_the_user_is_in_the_log_and_the_identifier_returned(ai: OpenAI, server: ServerProcess) -> None:
    made = ai.images.generate(prompt="plain", user="u-17", safety_identifier="s-18")
    assert made.safety_identifier == "s-18"
    made = ai.images.generate(prompt="plain", user="u-17")
    assert made.safety_identifier == "u-17"
    wait_for(
        lambda: [line["user"] for line in server.logs() if line.get("user", "leaver") != "leaver"] == ["s-18", "u-17"],
        "the lines",
    )


def test_models_are_listed_as_openai_does(ai: OpenAI) -> None:
    (only,) = ai.models.list().data
    assert (only.id, only.object, only.owned_by) == ("grey", "model", "ddpm-serve")
    assert abs(only.created - time.time()) < 3600
    assert ai.models.retrieve("grey") == only
    with pytest.raises(openai.NotFoundError, match="no model 'x'; there are grey"):
        ai.models.retrieve("x")


def test_links_wait_for_readiness(held: SlowRunner, grey_checkpoint: Path) -> None:
    held.warm.clear()
    with serving(grey_checkpoint, held, cold=True) as client:
        for more in ({}, {"response_format": "url"}, {"stream": True}):
            answer = client.post("/v1/images/generations", json={"prompt": "", **more})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
            assert answer.headers["retry-after"]
            assert answer.headers["x-should-retry"] == "true"
        held.warm.set()
