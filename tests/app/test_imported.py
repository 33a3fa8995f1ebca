"""Other projects' networks are served beside ours, in one process, and make the images of the naive loop."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image

from model import checkpoint
from model.convert.exporter import export
from model.convert.importer import main
from model.images import to_uint8
from model.sampling.schedule import usable_variance
from model.sampling.step import sample
from tests.app.conftest import serving
from tests.fixtures import theirs

HO = ["--image_size", "8,8", "--num_timesteps", "1000", "--schedule", "linear", "--variance", "fixed_large"]
EPS = ["--prediction", "eps"]
BARE = ["--num_timesteps", "1000", "--schedule", "cosine", "--image_size", "8,8", *EPS]
FILES = {
    "abarankab": ["original/labels-linear-model.pth", "--image_size", "8,8"],
    "w86": [
        "w86763777/small.pt",
        "--variance",
        "fixed_large",
        "--schedule_low",
        "2e-5",
        "--schedule_high",
        "4e-3",
        *EPS,
    ],
    "improved": ["improved-diffusion/cifar-like.pt", "--num_heads", "4", "--num_heads_upsample", "2", *BARE],
    "guided": ["guided-diffusion/imagenet-like.pt", "--head_channels", "16", "--new_attention_order", *BARE],
    "tqch": ["ddpm-torch/small_3.pt", *HO, *EPS],
    "ddim": ["ddim/small.pth", *HO],
    "ho": ["pytorch_diffusion/model-790000.ckpt", *HO],
    "lucid": ["lucidrains/small.pt", "--image_size", "8,12"],
    "classes": ["lucidrains/classes.pt", "--image_size", "8,8", "--num_heads", "2"],
    "edm": ["edm/adm.pt"],
    "consistency": [
        "consistency/small.pt",
        "--head_channels",
        "16",
        "--image_size",
        "8,8",
        "--prediction",
        "consistency",
    ],
}
NAMES = [*FILES, "folder"]  # the last is diffusers'
ASKED: dict[str, dict[str, Any]] = {
    "mnist": {"steps": 4, "class_label": "7", "guidance_scale": 2},
    "abarankab": {"steps": 3, "class_label": "7", "sampler": "ddpm"},
    "w86": {"steps": 4, "sampler": "dpmpp_2m"},
    "improved": {"steps": 3, "sampler": "ddpm"},
    "guided": {"steps": 3, "class_label": "2"},
    "tqch": {"steps": 5, "sampler": "ddim"},
    "ddim": {"steps": 3, "sampler": "ddim", "spacing": "leading"},
    "ho": {"steps": 4, "sampler": "ddpm"},
    "folder": {"steps": 3, "sampler": "ddim", "eta": 0.5},
    "lucid": {"steps": 5, "sampler": "dpmpp_2m"},
    "classes": {"steps": 3, "class_label": "4", "guidance_scale": 3, "sampler": "ddpm"},
    "edm": {"steps": 4, "class_label": "3"},
    "consistency": {"steps": 2, "class_label": "1"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    for name, (file, *flags) in FILES.items():
        assert main([str(theirs(file)), str(folder / f"{name}.safetensors"), *flags]) == 0
    export(checkpoint.load("mnist"), folder / "diffusers", class_label=3)
    assert main([str(folder / "diffusers"), str(folder / "folder.safetensors")]) == 0
    return folder


@pytest.fixture(scope="module")
def mixed(folder: Path) -> Iterator[TestClient]:
    names = ["mnist", *(f"{name}={folder / name}.safetensors" for name in NAMES)]
    with serving(",".join(names), max_batch_size=4, precision="fp32") as client:  # type: ignore[arg-type]
        yield client


def images(client: TestClient, model: str) -> list[bytes]:
    asked = {"model": model, "n": 2, "seed": 5, **ASKED[model]}
    answer = client.post("/generate", json=asked, headers={"Accept": "application/json"})
    assert answer.status_code == 200, answer.text
    return [base64.b64decode(image["png"]) for image in answer.json()["images"]]


@pytest.mark.slow
def test_imported_networks_are_served_beside_ours(mixed: TestClient) -> None:
    alone = {model: images(mixed, model) for model in ASKED}
    models = [*ASKED, *ASKED]
    with ThreadPoolExecutor(len(models)) as pool:
        together = list(pool.map(lambda model: images(mixed, model), models))
    assert together == [alone[model] for model in models]


@pytest.mark.slow
@pytest.mark.parametrize("model", NAMES)
def test_served_images_are_those_of_the_naive_loop(mixed: TestClient, folder: Path, model: str) -> None:
    loaded = checkpoint.load(folder / f"{model}.safetensors")
    config, asked = loaded.config, dict(ASKED[model])
    label = asked.pop("class_label", None)
    params = config.sampling_params(**asked)
    x = sample(
        loaded.network,
        config.schedule(params, usable_variance(loaded.diffusion, params.steps) if params.sampler == "ddpm" else None),
        config.unet.image_shape,
        seeds=[5, 5],
        indices=[0, 1],
        classes=None if label is None else [int(label)] * 2,
        null_class=config.unet.num_classes,
    )
    expected = to_uint8(x).permute(0, 2, 3, 1)
    got = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in images(mixed, model)])
    assert (torch.from_numpy(got).reshape(expected.shape).int() - expected.int()).abs().max() <= 1
