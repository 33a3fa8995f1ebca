"""Fitted tables over HTTP: by default, by name, and refused where a request asks for what no table has."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from app.plans import plans
from model import checkpoint
from model.images import to_uint8
from model.sampling.schedule import SamplingParams
from model.sampling.step import sample
from tests.app.conftest import serving, wait_for

JSON = {"accept": "application/json"}


@pytest.fixture(scope="module")
def fitted(fitted_checkpoint: Path) -> Iterator[TestClient]:
    with serving(fitted_checkpoint) as client:
        yield client


def test_a_request_that_says_nothing_gets_the_fitted_default(fitted: TestClient, fitted_checkpoint: Path) -> None:
    answer = fitted.post("/generate", json={"class_label": 1, "seed": 4}, headers={"accept": "image/png"})
    assert (answer.headers["x-ddpm-sampler"], answer.headers["x-ddpm-steps"]) == ("fitted", "3")
    source = checkpoint.load(fitted_checkpoint)
    schedule = source.config.schedule(source.config.sampling)
    x = sample(source.network, schedule, source.config.unet.image_shape, [4], [0], [1], null_class=3)
    found = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert np.abs(found.astype(int) - to_uint8(x)[0, 0].numpy()).max() <= 1


def test_what_was_used_gives_the_same_images_again(fitted: TestClient) -> None:
    first = fitted.post("/generate", json={"seed": 9, "n": 2, "steps": 5}, headers=JSON).json()
    names = [*vars(SamplingParams()), "model"]
    back = {name: first[name] for name in names}
    again = fitted.post("/generate", json={"seed": 9, "n": 2} | back, headers=JSON).json()
    assert first["sampler"] == "fitted"
    assert again["images"] == first["images"]


def test_what_no_table_has_is_refused_by_name_only(fitted: TestClient) -> None:
    for field, value, listed in (("steps", 4, "3 or 5"), ("guidance_scale", 2, "1.5"), ("limit", "none", "clamp")):
        refused = fitted.post("/generate", json={"sampler": "fitted", field: value})
        assert refused.status_code == 422
        assert refused.json()["error"]["param"] == field
        assert f"{field} must be {listed} with sampler fitted, not {value}" in refused.json()["error"]["message"]
        taken = fitted.post("/generate", json={field: value}, headers=JSON)
        assert (taken.status_code, taken.json()["sampler"]) == (200, "dpmpp_2m")


def test_a_checkpoint_without_tables_has_no_fitted_sampler(client: TestClient) -> None:
    refused = client.post("/generate", json={"sampler": "fitted"})
    assert refused.status_code == 422
    assert "this checkpoint has none of: ddpm-serve fit makes them" in refused.json()["error"]["message"]
    (card,) = client.get("/models").json()["models"]
    assert (card["fitted_steps"], card["plans"]) == ([], {})


def test_models_offers_step_counts_by_name(fitted: TestClient) -> None:
    (card,) = fitted.get("/models").json()["models"]
    assert "fitted" in card["samplers"]
    assert card["fitted_steps"] == [3, 5]
    assert (card["defaults"]["sampler"], card["default_steps"]["fitted"]) == ("fitted", 3)
    assert card["plans"] == {
        "fast": {"sampler": "fitted", "steps": 3, "guidance_scale": 1.5, "nfe": 5},
        "balanced": {"sampler": "fitted", "steps": 5, "guidance_scale": 1.5, "nfe": 5},
        "exact": {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 1.5, "nfe": 40},
    }


def test_a_server_of_few_steps_takes_the_tables_that_fit(fitted_checkpoint: Path) -> None:
    with serving(fitted_checkpoint, max_steps=2) as client:
        assert client.post("/generate", json={}, headers=JSON).json()["sampler"] == "dpmpp_2m"
        (card,) = client.get("/models").json()["models"]
        assert (card["defaults"]["sampler"], card["defaults"]["steps"], card["plans"]) == ("dpmpp_2m", 2, {})


def test_frames_of_a_fitted_sequence_are_its_steps(fitted: TestClient) -> None:
    answer = fitted.get("/diffusion-sequence", params={"frames": 4, "seed": 1, "format": "gif"})
    assert Image.open(io.BytesIO(answer.content)).n_frames == 4


def test_plans_are_of_one_guidance_and_limit(fitted_checkpoint: Path) -> None:
    config = checkpoint.load(fitted_checkpoint).config
    three, five = config.fitted
    for change in ({"guidance_interval": (0.0, 0.5)}, {"guidance_scale": 2.0}):
        several = replace(config, fitted=(three, replace(five, **change), five))
        assert plans(several, 1000) == plans(config, 1000)
        alone = plans(replace(config, fitted=(three, replace(five, **change))), 1000)
        assert {name: plan["steps"] for name, plan in alone.items()} == {"fast": 3, "exact": 20}


def test_exact_is_of_the_guidance_that_was_fitted(fitted_checkpoint: Path) -> None:
    config = checkpoint.load(fitted_checkpoint).config
    plain = replace(config, sampling=SamplingParams("ddim", 10, 0.0, 1.0))
    assert {plan["guidance_scale"] for plan in plans(plain, 1000).values()} == {1.5}


@pytest.mark.parametrize(
    ("path", "nfe"),
    [
        ("/generate", 5),
        ("/diffusion-sequence?format=gif", 5),
        ("/diffusion-sequence", 5),
        ("/interpolate?seed=1&to_seed=2", 40),
        ("/images/grey/0/1/2.png", 5),
        ("/images/grey/0/1/2.gif?frames=3&steps=5", 5),
        ("/v1/images/generations", 5),
        ("/v1/images/generations?stream", 5),
        ("/v1/images/edits", 24),
    ],
)
def test_every_answer_says_what_an_image_cost(fitted: TestClient, path: str, nfe: int) -> None:
    picture = fitted.get("/images/grey/0/1/2.png").content
    counted = _counted(fitted)
    if path == "/v1/images/edits":
        answer = fitted.post(path, data={"prompt": "plain"}, files={"image": ("one.png", picture)})
    elif path.startswith(("/v1", "/generate")):
        body = {"prompt": "plain", "stream": "stream" in path} if "v1" in path else {"n": 1}
        answer = fitted.post(path.partition("?")[0], json=body)
    else:
        answer = fitted.get(path)
        assert fitted.head(path).headers["x-ddpm-nfe"] == str(nfe)
    assert (answer.status_code, answer.headers["x-ddpm-nfe"]) == (200, str(nfe)), answer.text
    images = 8 if "interpolate" in path else 1
    wait_for(lambda: _counted(fitted) == counted + images * nfe, "the counter")


def _counted(client: TestClient) -> float:
    """ddpm_nfe_total of the model."""
    found: float = client.app.state.service.metrics.engine.nfe.labels("grey")._value.get()  # type: ignore[attr-defined]
    return found
