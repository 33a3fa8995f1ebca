"""A stranger's photos, in class folders, become a checkpoint that `python -m app` serves."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.app.processes import ServerProcess
from training import train
from training.cli.command import parse

CLASSES = ("Süße Hunde", "cats")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Landscape and portrait, PNG and JPEG, grey, colour and with transparency: 24 photos of two classes."""
    rng = np.random.default_rng(0)
    for k, name in enumerate(CLASSES):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            mode = ("RGB", "L", "RGB", "RGBA")[i % 4]
            channels = len(Image.new(mode, (1, 1)).getbands())
            height, width = ((18, 26), (30, 22), (12, 16))[i % 3]
            pixels = rng.integers(60 * k, 60 * k + 130, (height, width, channels), dtype=np.uint8).squeeze()
            suffix = "png" if mode == "RGBA" or i % 2 else "jpg"
            Image.fromarray(pixels, mode).save(tmp_path / "photos" / name / f"{i}.{suffix}")
    (tmp_path / "photos" / "cats" / ".DS_Store").write_bytes(b"what a Mac leaves")
    return tmp_path / "photos"


@pytest.mark.slow
def test_a_folder_of_photos_trains_and_serves(photos: Path, tmp_path: Path) -> None:
    options = "--preset smoke --image_size 9,14 --use_labels --label_dropout 0.1 --iterations 2 --device cpu"
    config, *_ = parse([*options.split(), "--dataset", str(photos), "--log_dir", str(tmp_path), "--run_name", "run"])
    best = train.train(config) / "best.safetensors"

    with ServerProcess("app", "--checkpoint", str(best), "--device", "cpu") as server:
        pictures = []
        for name in CLASSES:
            wish = {"class_label": name, "n": 2, "columns": 2, "seed": 3, "guidance_scale": 2}
            answer = server.client.post("/generate", json=wish)
            assert answer.status_code == 200, answer.text
            picture = Image.open(io.BytesIO(answer.content))
            assert (picture.mode, picture.size) == ("RGB", (28, 9))
            pictures.append(picture.tobytes())
        assert pictures[0] != pictures[1]
        refused = server.client.post("/generate", json={"class_label": "dogs"})
        assert refused.status_code == 422
        assert all(name in refused.json()["error"]["message"] for name in CLASSES)
