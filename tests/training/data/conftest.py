"""Pictures of 8 × 8 in whatever folders a test names, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training import data
from training.data import DataError

Draw = Callable[..., Path]
Counts = dict[str, tuple[int, int]]


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    """Saves `count` pictures of one level as `folder`/000.png …, below the data set's folder d; returns that."""

    def save(folder: str = "", count: int = 12, level: int = 128, suffix: str = ".png", stem: str = "") -> Path:
        (tmp_path / "d" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = np.full((8, 8, 3), min(255, level + i), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "d" / folder / f"{stem}{i:03d}{suffix}")
        return tmp_path / "d"

    return save


@pytest.fixture
def counts() -> Callable[..., Counts]:
    """How many images of each class are (trained on, held out)."""

    def load(dataset: Path, size: tuple[int, ...] = (), **options: Any) -> Counts:
        train, held_out = data.load(str(dataset), size, data.LoadOptions(**options), use_labels=True)
        assert train.class_names == held_out.class_names
        assert train.labels is not None
        assert held_out.labels is not None
        bins = [part.labels.bincount(minlength=len(train.class_names)).tolist() for part in (train, held_out)]  # type: ignore[union-attr]
        return {name: (bins[0][i], bins[1][i]) for i, name in enumerate(train.class_names)}

    return load


@pytest.fixture
def refusal() -> Callable[..., str]:
    """The sentence with which a data set that needs classes is refused."""

    def load(dataset: Path | str, size: tuple[int, ...] = (), **options: Any) -> str:
        with pytest.raises(DataError) as error:
            data.load(str(dataset), size, data.LoadOptions(**options), use_labels=True)
        return str(error.value)

    return load
