"""Images between two seeds: the ends are those of /generate, the others what the naive loop makes of mixed noise."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image as Pillow

from model import checkpoint
from model.images import to_uint8
from model.sampling.edit import Edit
from model.sampling.noise import between, normal
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.app.conftest import BEETLE
from tests.app.processes import metric

ASKED: dict[str, Any] = {"seed": 1, "to_seed": 2, "class_label": BEETLE, "n": 5}


def ask(client: TestClient, **fields: Any) -> httpx.Response:
    answer = client.get("/interpolate", params=ASKED | fields)
    assert answer.status_code == 200, answer.text
    return answer


def strip(answer: httpx.Response) -> np.ndarray[Any, Any]:
    """The images [n, 8, 12]."""
    pixels = np.array(Pillow.open(io.BytesIO(answer.content)))
    return pixels.reshape(8, -1, 12).transpose(1, 0, 2)


def generated(client: TestClient, **body: Any) -> np.ndarray[Any, Any]:
    answer = client.post("/generate", json={"class_label": BEETLE} | body, headers={"Accept": "application/x-npy"})
    images: np.ndarray[Any, Any] = np.load(io.BytesIO(answer.content))[0]
    return images


def test_it_begins_and_ends_with_the_images_of_the_seeds(client: TestClient) -> None:
    images = strip(ask(client, index=3))
    assert len(images) == 5
    assert np.array_equal(images[0], generated(client, seed=1, index=3))
    assert np.array_equal(images[-1], generated(client, seed=2, index=3))
    assert len(np.unique(images, axis=0)) == 5


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "dpmpp_3m"])
def test_what_is_between_is_what_the_naive_loop_makes(client: TestClient, grey_checkpoint: Path, sampler: str) -> None:
    loaded = checkpoint.load(grey_checkpoint)
    shape = loaded.config.unet.image_shape
    schedule = make_schedule(loaded.diffusion, sampler, 6).from_latents()
    edit = Edit(between((1, 2), 0, 5, shape))
    made = sample(loaded.network, schedule, shape, [1] * 5, range(5), [1] * 5, null_class=3, edit=edit)
    found = strip(ask(client, sampler=sampler, steps=6)).astype(int)
    assert np.abs(found - to_uint8(made)[:, 0].numpy()).max() <= 1


def test_noise_between_two_seeds_is_standard_normal() -> None:
    shape = (3, 64, 64)
    noise = between((5, 6), 7, 4, shape)
    assert torch.equal(noise[0], normal(5, 7, 0, shape))
    assert torch.equal(noise[-1], normal(6, 7, 0, shape))
    assert noise.flatten(1).std(1).tolist() == pytest.approx([1] * 4, abs=0.03)
    similar = [float((noise[0] * x).mean()) for x in noise]
    assert similar == pytest.approx([1, 3**0.5 / 2, 0.5, 0], abs=0.05), "equal angles"


@pytest.mark.parametrize(("format", "kind"), [("gif", "GIF"), ("webp", "WEBP")])
def test_an_animation_has_a_frame_for_each(client: TestClient, format: str, kind: str) -> None:
    answer = ask(client, format=format)
    file = Pillow.open(io.BytesIO(answer.content))
    assert (file.format, file.n_frames, answer.headers["content-type"]) == (kind, 5, f"image/{format}")  # type: ignore[attr-defined]


def test_what_was_drawn_is_told_and_makes_the_same_again(client: TestClient) -> None:
    answer = client.get("/interpolate")
    told = {name: answer.headers[f"x-ddpm-{name.replace('_', '-')}"] for name in ("seed", "to_seed")}
    text = Pillow.open(io.BytesIO(answer.content)).info
    assert {name: text[name] for name in told} == told
    again = client.get("/interpolate", params=told)
    assert again.content == answer.content
    assert "x-ddpm-class-label" in answer.headers, "all are of one class"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"to_seed": 1}, "to_seed must be another than seed"),
    ({"n": 1}, "n must be a whole number from 2 to 64"),
    ({"sampler": "ddpm"}, "sampler ddpm adds noise on its way: take dpmpp_2m"),
    ({"eta": 0.5}, "sampler ddim adds noise on its way"),
    ({"sampler": "fitted"}, "sampler fitted begins from the noise of one seed"),
    ({"format": "svg"}, "format must be"),
    ({"from_seed": 1}, "there is no field 'from_seed'"),
]


@pytest.mark.parametrize(("fields", "sentence"), WRONG)
def test_what_cannot_be_is_refused(client: TestClient, fields: dict[str, Any], sentence: str) -> None:
    answer = client.get("/interpolate", params=ASKED | fields)
    assert answer.status_code == 422, answer.text
    assert sentence in answer.json()["error"]["message"]


def test_head_takes_no_step(client: TestClient) -> None:
    steps = metric(client.get("/metrics").text, "ddpm_image_steps_total")
    head = client.head("/interpolate", params=ASKED)
    assert (head.status_code, head.content, head.headers["x-ddpm-to-seed"]) == (200, b"", "2")
    assert "content-length" not in head.headers  # nobody knows it
    assert metric(client.get("/metrics").text, "ddpm_image_steps_total") == steps


def test_an_unconditional_checkpoint_has_it_too(colour_client: TestClient) -> None:
    answer = colour_client.get("/interpolate", params={"seed": 1, "to_seed": 2, "n": 3})
    assert Pillow.open(io.BytesIO(answer.content)).size == (24, 8)
