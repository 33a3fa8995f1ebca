import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="loss.png needs matplotlib, of the extra `train`")

from training.run.config import TrainConfig
from training.run.plot import save_plot
from training.train import train


@pytest.mark.slow
def test_every_run_has_a_plot_of_its_losses(tiny_options: dict[str, Any]) -> None:
    with Image.open(train(TrainConfig(**tiny_options)) / "loss.png") as picture:
        assert picture.size == (900, 500)


def colours(tmp_path: Path, *lines: dict[str, Any]) -> np.ndarray:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_plot(tmp_path / "loss.png", tmp_path / "log.jsonl")
    assert not list(tmp_path.glob("*.part"))
    return np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)


@pytest.mark.slow
def test_a_plot_shows_what_is_in_the_log(tmp_path: Path) -> None:
    trained = [{"iteration": i, "train_loss": 1 / (i + 1)} for i in range(1, 40)] + [
        {"iteration": 41, "train_loss": None}
    ]
    validated = [
        {"iteration": i, "validation_loss": 0.5, "validation_loss_by_t_quartile": [0.8, 0.4, 0.2, 0.1]}
        for i in (20, 40)
    ]
    without, whole = colours(tmp_path, *trained), colours(tmp_path, *trained, *validated)
    red = (214, 39, 40)  # matplotlib's C3, the last quartile
    assert not (without == red).all(axis=2).any()
    assert (whole == red).all(axis=2).any()
    assert np.array_equal(whole, colours(tmp_path, *trained, *validated))


def test_a_plot_of_nothing_is_one(tmp_path: Path) -> None:
    assert colours(tmp_path, {"iteration": 1, "train_loss": None}).shape == (500, 900, 3)
