"""POST /v1/images/edits, asked by the openai package, and by clients that mean no good."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai import AsyncOpenAI, OpenAI
from PIL import Image as Pillow

from app.form import MAX_FIELDS, MAX_FILES, MAX_TEXT
from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.distilled import Distilled
from model.images import from_uint8, to_uint8
from model.sampling.edit import Edit
from model.sampling.fitted import weights_digest
from model.sampling.schedule import FITTED, SamplingParams, make_schedule
from model.sampling.solvers import SAMPLERS
from model.sampling.step import sample
from tests.app.conftest import CLASSES, GREY, serving
from tests.app.processes import PATIENCE, ServerProcess
from tests.model.sampling.test_fitted import DIFFUSION, table_like
from tests.networks import randomised

WIDTH, HEIGHT = 12, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH), np.uint8)
SEED = {"seed": 5}
PATH = "/v1/images/edits"


def png(pixels: np.ndarray[Any, Any] | Pillow.Image) -> bytes:
    out = io.BytesIO()
    (pixels if isinstance(pixels, Pillow.Image) else Pillow.fromarray(pixels)).save(out, "PNG")
    return out.getvalue()


def transparent_left(size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    """A mask by which the left half is painted anew."""
    mask = Pillow.new("RGBA", size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))
    return png(mask)


IMAGE, MASK = png(PIXELS), transparent_left()


@pytest.fixture(scope="module")
def ai(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE) as client:
        yield client


def pixels(text: str | None) -> np.ndarray[Any, Any]:
    return np.array(Pillow.open(io.BytesIO(base64.b64decode(text or ""))))


def images(made: Any) -> list[np.ndarray[Any, Any]]:
    return [pixels(image.b64_json) for image in made.data]


def naive(path: Path, sampler: str, edit: Edit, strength: float, n: int = 1) -> np.ndarray[Any, Any]:
    loaded = checkpoint.load(path)
    schedule = make_schedule(loaded.diffusion, sampler, 6, strength=strength)
    shape = loaded.config.unet.image_shape
    made = sample(loaded.network, schedule, shape, [5] * n, range(n), [0] * n, null_class=3, edit=edit)
    return to_uint8(made)[:, 0].numpy()


@pytest.mark.parametrize("masked", [False, True])
def test_an_edit_is_that_of_the_naive_loop(ai: OpenAI, grey_checkpoint: Path, masked: bool) -> None:
    more: dict[str, Any] = {"mask": MASK} if masked else {}
    mask = torch.tensor([1.0] * 6 + [0.0] * 6).expand(1, HEIGHT, WIDTH) if masked else None
    edit = Edit(from_uint8(torch.from_numpy(PIXELS))[None], mask)
    made = ai.images.edit(image=IMAGE, prompt="plain", n=2, extra_body=SEED, **more)
    expected = naive(grey_checkpoint, "ddim", edit, 1.0 if masked else 0.6, 2)
    assert np.abs(np.stack(images(made)).astype(int) - expected).max() <= 1
    assert made.usage is not None
    assert made.usage.output_tokens == 2 * (6 if masked else 4), "of the steps that were run"
    assert [image.revised_prompt for image in made.data or []] == ["plain"] * 2
    assert (made.size, made.output_format, made.quality) == ("12x8", "png", "medium")


def test_what_a_mask_keeps_comes_back_byte_for_byte(ai: OpenAI) -> None:
    (one,) = images(ai.images.edit(image=IMAGE, mask=MASK, prompt="plain", extra_body={**SEED, "strength": 0.5}))
    assert np.array_equal(one[:, 6:], PIXELS[:, 6:])
    assert not np.array_equal(one[:, :6], PIXELS[:, :6])


def test_transparency_of_the_image_is_a_mask(ai: OpenAI) -> None:
    picture = Pillow.fromarray(PIXELS).convert("RGBA")
    picture.paste((0, 0, 0, 0), (0, 0, 6, HEIGHT))
    (one,) = images(ai.images.edit(image=png(picture), prompt="plain", extra_body=SEED))
    assert np.array_equal(one[:, 6:], PIXELS[:, 6:])


def test_alone_and_among_strangers_the_bytes_are_the_same(server: ServerProcess) -> None:
    def ask(place: int) -> bytes:
        sampler = list(SAMPLERS)[place % len(SAMPLERS)]
        fields = {"prompt": "plain", "seed": place, "sampler": sampler, "steps": 7, "strength": 0.4 + 0.1 * (place % 7)}
        files = {"image": IMAGE} | ({"mask": MASK} if place % 2 else {})
        if place % 4 == 3:
            fields |= {"guidance_scale": 2}
        answer = server.client.post(PATH, data=fields, files=files)
        assert answer.status_code == 200, answer.text
        return json.dumps(answer.json()["data"]).encode()

    alone = [ask(place) for place in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(12))) == alone
    assert len(set(alone)) == 12


def test_a_list_of_one_image_is_that_image(ai: OpenAI) -> None:
    asked: dict[str, Any] = {"prompt": "plain", "extra_body": SEED}
    assert (
        images(ai.images.edit(image=[IMAGE], **asked))[0].tolist()
        == images(ai.images.edit(image=IMAGE, **asked))[0].tolist()
    )
    with pytest.raises(openai.BadRequestError, match="'image' is given 2 times"):
        ai.images.edit(image=[IMAGE, IMAGE], **asked)


def test_a_stream_shows_the_edit_on_its_way(ai: OpenAI) -> None:
    asked: dict[str, Any] = {"image": IMAGE, "mask": MASK, "prompt": "plain", "extra_body": SEED}
    events = list(ai.images.edit(stream=True, partial_images=2, **asked))
    assert [event.type for event in events] == [*["image_edit.partial_image"] * 2, "image_edit.completed"]
    assert all(np.array_equal(pixels(event.b64_json)[:, 6:], PIXELS[:, 6:]) for event in events)
    assert np.array_equal(pixels(events[-1].b64_json), images(ai.images.edit(**asked))[0])


def test_a_short_plan_has_fewer_partial_images(ai: OpenAI) -> None:
    more = {**SEED, "strength": 0.3}
    events = list(ai.images.edit(image=IMAGE, prompt="plain", stream=True, partial_images=3, extra_body=more))
    assert len(events) == 2, "two steps are run, and after the second comes the image"
    assert events[0].b64_json != events[1].b64_json


def test_async_clients_get_the_same(ai: OpenAI, server: ServerProcess) -> None:
    async def ask() -> Any:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await client.images.edit(image=IMAGE, prompt="plain", extra_body=SEED)

    assert (
        images(asyncio.run(ask()))[0].tolist()
        == images(ai.images.edit(image=IMAGE, prompt="plain", extra_body=SEED))[0].tolist()
    )


def test_strength_and_fidelity_say_how_much_may_change(ai: OpenAI) -> None:
    def distance(**more: Any) -> float:
        fields = {name: value for name, value in more.items() if name == "strength"}
        named = {name: value for name, value in more.items() if name != "strength"}
        made = ai.images.edit(image=IMAGE, prompt="plain", extra_body={**SEED, **fields, "steps": 50}, **named)
        return float(np.abs(images(made)[0].astype(float) - PIXELS).mean())

    assert distance(strength=0.05) < distance(input_fidelity="high") < distance(strength=1)
    assert distance(input_fidelity="high") == distance(strength=0.35)
    assert distance(input_fidelity="low") == distance() == distance(strength=0.6)


def test_headers_say_how_it_was_made(ai: OpenAI) -> None:
    made = ai.images.with_raw_response.edit(image=IMAGE, prompt="0", size="24x16", extra_body={**SEED, "strength": 0.5})
    assert {name: made.headers[f"x-ddpm-{name}"] for name in ("strength", "steps", "class-label", "enlarged-from")} == {
        "strength": "0.5",
        "steps": "6",
        "class-label": "0",
        "enlarged-from": "12x8",
    }
    assert "x-ddpm-note" not in made.headers
    assert images(made.parse())[0].shape == (16, 24)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
WRONG: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "svg": ({"image": SVG}, "image is not a PNG, JPEG or WebP file", "image"),
    "wide": ({"image": png(Pillow.new("L", (30_000, 1)))}, "image is 30000x1 pixels", "image"),
    "cut": ({"image": IMAGE[:-30]}, "image is damaged, or cut short", "image"),
    "other size": ({"mask": transparent_left((6, 8))}, "mask is 6x8 pixels and image 12x8", "mask"),
    "opaque black": ({"mask": png(Pillow.new("L", (WIDTH, HEIGHT)))}, "mask keeps everything", "mask"),
    "no class": ({"prompt": "a zebra"}, "no class 'a zebra'", "prompt"),
    "partials": ({"stream": True, "partial_images": 99}, "partial_images must be a whole number from 0 to 3", None),
    "address": ({"response_format": "url"}, "an edit has no address", "response_format"),
    "strength": ({"extra_body": {"strength": 1.5}}, "strength must be a number above 0 and of at most 1", "strength"),
    "both": ({"input_fidelity": "high", "extra_body": {"strength": 1}}, "input_fidelity chooses", "input_fidelity"),
    "unknown": ({"extra_body": {"strenght": 1}}, "did you mean strength?", "strenght"),
    "text": ({"image": None, "extra_body": {"image": "me.png"}}, "image must be a file", "image"),
    "none": ({"image": None}, "image is missing", "image"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_told_in_openais_shape(ai: OpenAI, kind: str) -> None:
    fields, sentence, param = WRONG[kind]
    asked = {"image": IMAGE, "prompt": "plain"} | fields
    if asked["image"] is None:
        asked["image"] = openai.omit
    with pytest.raises(openai.BadRequestError) as refusal:
        ai.images.edit(**asked)
    assert sentence in refusal.value.message
    assert refusal.value.type == "invalid_request_error"
    assert param is None or refusal.value.param == param


def test_an_unknown_model_is_not_found(ai: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        ai.images.edit(image=IMAGE, prompt="plain", model="other")
    assert ai.images.edit(image=IMAGE, prompt="plain", model="gpt-image-1.5").data


BOUNDARY = "x" * 20
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, content: bytes = b"1", more: str = "") -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"


WHOLE = part("image", IMAGE, '; filename="a.png"') + part("prompt", b"plain")
END = f"--{BOUNDARY}--\r\n".encode()
HOSTILE: dict[str, tuple[bytes, dict[str, str], int, str]] = {
    "without an end": (WHOLE, FORM, 400, "the form does not end with its boundary"),
    "cut in a file": (WHOLE[:200], FORM, 400, "the form does not end with its boundary"),
    "no boundary": (WHOLE + END, {"Content-Type": "multipart/form-data"}, 400, "names no boundary"),
    "another boundary": (WHOLE.replace(b"xx", b"yy") + END, FORM, 400, "no form with the boundary"),
    "many fields": (part("n") * (MAX_FIELDS + 1) + END, FORM, 400, f"more than {MAX_FIELDS} fields"),
    "many files": (
        part("image", b"", '; filename="a"') * (MAX_FILES + 1) + END,
        FORM,
        400,
        f"more than {MAX_FILES} files",
    ),
    "a long field": (part("prompt", b"a" * (MAX_TEXT + 1)) + END, FORM, 400, "longer than 65536 bytes"),
    "twice": (WHOLE + part("seed") * 2 + END, FORM, 400, "'seed' is given 2 times"),
    "nameless": (WHOLE + part("n").replace(b' name="n"', b"") + END, FORM, 400, "a part of the form has no name"),
    "a file as text": (part("prompt", IMAGE, '; filename="a.png"') + END, FORM, 400, "characters, not a file"),
    "empty": (b"", FORM, 400, "the form does not end"),
    "json": (b"{}", {"Content-Type": "application/json"}, 415, "send Content-Type: multipart/form-data"),
    "compressed": (b"", FORM | {"Content-Encoding": "gzip"}, 415, "the body is compressed (gzip)"),
    "too large": (part("image", bytes(9 * 2**20), '; filename="a"') + END, FORM, 413, "larger than 8388608 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_forms_that_nobody_should_send_are_refused(server: ServerProcess, kind: str) -> None:
    content, headers, status, sentence = HOSTILE[kind]
    answer = httpx.post(server.url + PATH, content=content, headers=headers, timeout=PATIENCE)
    assert answer.status_code == status, answer.text
    assert sentence in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_whole_form_is_taken(server: ServerProcess) -> None:
    answer = httpx.post(server.url + PATH, content=WHOLE + END, headers=FORM, timeout=PATIENCE)
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def fitted_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its default is a fitted table of 4 steps."""
    network = randomised(replace(GREY, time_table=0), 0.3)
    tables = (table_like(network.config, weights_digest(network.state_dict()), g=1.0),)
    config = CheckpointConfig(network.config, DIFFUSION, CLASSES, SamplingParams(FITTED, 4), fitted=tables)
    path = tmp_path_factory.mktemp("checkpoints") / "fitted.safetensors"
    checkpoint.save(path, network.state_dict(), config)
    return path


def test_an_edit_takes_a_plan_that_is_not_fitted_and_says_so(fitted_checkpoint: Path) -> None:
    files = {"image": IMAGE, "mask": MASK}
    with serving(fitted_checkpoint) as client:
        for more in ({}, {"sampler": "fitted", "steps": "4"}, {"quality": "medium"}):
            answer = client.post(PATH, data={"prompt": "plain", "seed": "1"} | more, files=files)
            assert answer.status_code == 200, answer.text
            assert answer.json()["note"].startswith("sampler dpmpp_2m instead of fitted")
            assert answer.headers["x-ddpm-note"] == answer.json()["note"]
            assert (answer.headers["x-ddpm-sampler"], answer.headers["x-ddpm-steps"]) == ("dpmpp_2m", "20")
        low = client.post(PATH, data={"prompt": "plain", "quality": "low"}, files=files)
        assert (low.headers["x-ddpm-sampler"], low.headers["x-ddpm-steps"]) == ("dpmpp_2m", "10")
        named = client.post(PATH, data={"prompt": "plain", "sampler": "ddim"}, files=files)
        assert "note" not in named.json()
        made = client.post("/v1/images/generations", json={"prompt": "plain"})
        assert made.headers["x-ddpm-sampler"] == "fitted"


@pytest.mark.parametrize(("method", "status"), [("guidance", 200), ("trajectory", 400)])
def test_only_students_of_fixed_steps_refuse_edits(tmp_path: Path, method: str, status: int) -> None:
    network = randomised(GREY, 0.3)
    inside = Distilled(2.0, 6, method, "0" * 64)
    config = CheckpointConfig(GREY, DIFFUSION, CLASSES, SamplingParams("ddim", 6, 0.0, 2.0), distilled=inside)
    path = tmp_path / "student.safetensors"
    checkpoint.save(path, network.state_dict(), config)
    with serving(path) as client:
        answer = client.post(PATH, data={"prompt": "plain"}, files={"image": IMAGE})
    assert answer.status_code == status, answer.text
    if status == 400:
        assert "its steps were distilled, from noise" in answer.json()["error"]["message"]
    else:
        assert answer.json()["usage"]["output_tokens"] == 4


def test_an_unconditional_checkpoint_edits_in_colour(colour_client: TestClient) -> None:
    colours = np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)
    files = {"image": png(colours), "mask": transparent_left((8, 8))}
    answer = colour_client.post(PATH, data={"prompt": "", "seed": "1"}, files=files)
    assert answer.status_code == 200, answer.text
    assert np.array_equal(pixels(answer.json()["data"][0]["b64_json"])[:, 4:], colours[:, 4:])
