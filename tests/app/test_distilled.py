"""A distilled checkpoint behind the API, beside its teacher."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image as Pillow

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.distilled import Distilled
from model.images import to_uint8
from model.sampling.fitted import FittedTable, weights_digest
from model.sampling.schedule import FITTED, SamplingParams, make_schedule
from model.sampling.step import sample
from tests.app.conftest import CLASSES, GREY, serving
from tests.networks import randomised

G = 2.5


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("students") / "student.safetensors"
    weights = randomised(GREY, 0.3, 1).state_dict()
    diffusion = DiffusionConfig(prediction="v")
    schedule = make_schedule(GaussianDiffusion(diffusion), "ddim", 2)
    timesteps, rows = tuple(map(float, schedule.timesteps)), tuple(map(tuple, schedule.table.tolist()))
    table = FittedTable(2, G, (0.0, 1.0), "clamp", timesteps, rows, (1, 2), weights_digest(weights))
    sampling, inside = SamplingParams(FITTED, 2, 0.0, G), Distilled(G, 2, "sfd", "ab" * 32)
    config = CheckpointConfig(GREY, diffusion, CLASSES, sampling, {}, (table,), inside)
    checkpoint.save(path, weights, config)
    return path


@pytest.fixture(scope="module")
def both(student: Path, grey_checkpoint: Path) -> Iterator[TestClient]:
    with serving(Path(f"{grey_checkpoint},{student}")) as client:
        yield client


def test_models_tells_what_is_inside(both: TestClient) -> None:
    teacher, student = both.get("/models").json()["models"]
    assert teacher["distilled"] is None
    assert (teacher["guidance"], student["guidance"]) == (True, False)
    assert student["distilled"] == {"guidance_scale": G, "steps": 2, "method": "sfd", "teacher": "ab" * 32}
    assert (student["samplers"], student["default_steps"], student["fitted_steps"]) == ([FITTED], {FITTED: 2}, [2])


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"guidance_scale": 1}, "guidance_scale must be 2.5 or left out: it is inside the checkpoint's weights"),
        ({"steps": 4}, "steps must be 2 or left out: the checkpoint was distilled to it"),
    ],
)
def test_another_guidance_is_refused_by_name(both: TestClient, asked: dict[str, Any], sentence: str) -> None:
    for answer in (
        both.post("/generate", json={"model": "student"} | asked),
        both.get("/diffusion-sequence", params={"model": "student"} | asked),
    ):
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert (error["message"], error["param"]) == (sentence, next(iter(asked)))


def test_its_own_guidance_may_be_sent_back(both: TestClient) -> None:
    first = both.post("/generate", json={"model": "student", "seed": 3})
    assert first.headers["X-DDPM-Guidance-Scale"] == "2.5"
    assert first.headers["X-DDPM-NFE"] == "2"
    settings = {"guidance_scale": G, "steps": 2, "sampler": FITTED}
    assert both.post("/generate", json={"model": "student", "seed": 3} | settings).content == first.content


def test_student_and_teacher_at_once_equal_the_naive_loop(both: TestClient, student: Path) -> None:
    asks = [{"model": "student", "seed": 7, "n": 3, "columns": 3, "class_label": "plain"}] * 2
    asks += [{"model": "grey", "seed": 7, "n": 3, "columns": 3, "guidance_scale": 2, "class_label": "plain"}]
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda body: both.post("/generate", json=body), asks))
    loaded = checkpoint.load(student)
    schedule = loaded.config.schedule(loaded.config.sampling)
    x = sample(loaded.network, schedule, GREY.image_shape, [7] * 3, [0, 1, 2], [0] * 3)
    expected = to_uint8(x).numpy()[:, 0].transpose(1, 0, 2).reshape(8, -1)
    for answer in answers[:2]:
        found = np.array(Pillow.open(io.BytesIO(answer.content)))
        assert np.abs(found.astype(int) - expected).max() <= 1
    assert answers[2].content != answers[0].content


def test_an_answer_says_what_an_image_cost(both: TestClient) -> None:
    body = {"model": "grey", "steps": 4, "sampler": "dpmpp_2m", "guidance_scale": 2, "guidance_interval": [0.0, 0.5]}
    answer = both.post("/generate", json=body, headers={"Accept": "application/json"})
    assert answer.json()["nfe"] == 6  # two rows in the two steps of the interval
    assert answer.headers["X-DDPM-NFE"] == "6"
    frames = both.get("/diffusion-sequence", params={"model": "student"}, headers={"Accept": "text/event-stream"})
    assert frames.headers["X-DDPM-NFE"] == "2"
    assert '"nfe":2' in frames.text.replace(" ", "")
