import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from tests.training.data.conftest import Counts
from training import data

Counting = Callable[..., Counts]
Refusal = Callable[..., str]


def png(level: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(out, "PNG")
    return out.getvalue()


CELLS = [{"bytes": png(i * 9), "path": None} for i in range(24)]
TWO = [i % 2 for i in range(24)]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes a parquet file of 24 pictures; `features` as `datasets` has them, without them as any other writer."""

    def write(columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
        import datasets

        folder = tmp_path / f"d{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if features is None:
            pyarrow.parquet.write_table(pa.table(columns), folder / "train.parquet")
        else:
            made = datasets.Dataset.from_dict(columns, datasets.Features(features))
            made.to_parquet(str(folder / "train.parquet"))
        return folder

    return write


def test_labels_of_text_and_whole_numbers(save: Callable[..., Path], counts: Counting) -> None:
    import datasets

    image, value = datasets.Image(), datasets.Value
    text = save({"image": CELLS, "label": ["dog", "cat"] * 12}, {"image": image, "label": value("string")})
    assert counts(text) == {"cat": (11, 1), "dog": (12, 0)}
    numbers = save({"image": CELLS, "breed": [2, 10] * 12}, {"image": image, "breed": value("int64")})
    assert list(counts(numbers, label_column="breed")) == ["2", "10"]


@pytest.mark.parametrize(
    "pictures",
    [
        pa.array(CELLS),
        pa.array([cell["bytes"] for cell in CELLS]),
        pa.array([c["bytes"] for c in CELLS], "large_binary"),
    ],
    ids=["struct", "binary", "large binary"],
)
@pytest.mark.parametrize(
    "labels",
    [
        pa.array(TWO, "uint8"),
        pa.array([float(i) for i in TWO]),
        pa.array([str(i) for i in TWO], "large_string"),
        pa.array([str(i) for i in TWO]).dictionary_encode(),
    ],
    ids=["uint8", "float", "large string", "dictionary"],
)
def test_parquet_of_any_writer(
    pictures: pa.Array, labels: pa.Array, save: Callable[..., Path], counts: Counting
) -> None:
    dataset = save({"image": pictures, "label": labels})
    assert counts(dataset) == {"0": (12, 0), "1": (11, 1)}
    train, _ = data.load(str(dataset))
    assert train.images[:5, 0, 0, 0].tolist() == [0, 9, 18, 27, 36]


def test_two_columns_of_classes_are_a_question(save: Callable[..., Path], counts: Counting, refusal: Refusal) -> None:
    import datasets

    coarse, fine = datasets.ClassLabel(names=["a"]), datasets.ClassLabel(names=["cat", "dog"])
    columns = {"image": CELLS, "coarse": [0] * 24, "fine": TWO}
    dataset = save(columns, {"image": datasets.Image(), "coarse": coarse, "fine": fine})
    assert "has the columns coarse and fine: choose one with --label_column" in refusal(dataset)
    assert data.load(str(dataset))[0].labels is None
    assert set(counts(dataset, label_column="fine")) == {"cat", "dog"}


def test_a_column_of_captions_is_not_guessed(save: Callable[..., Path], refusal: Refusal) -> None:
    dataset = save({"image": CELLS, "label": [f"a picture, number {i}" for i in range(24)]})
    assert "has 24 values for 24 rows" in refusal(dataset)


def test_a_class_that_no_row_has_is_refused(save: Callable[..., Path], refusal: Refusal) -> None:
    import datasets

    names = datasets.ClassLabel(names=["cat", "dog", "emu"])
    dataset = save({"image": CELLS, "label": TWO}, {"image": datasets.Image(), "label": names})
    assert "has no image to train on of the class emu" in refusal(dataset)


def test_rows_without_a_picture_are_named(save: Callable[..., Path], counts: Counting, refusal: Refusal) -> None:
    import datasets

    cells = [*CELLS[:22], {"bytes": CELLS[22]["bytes"][:45], "path": None}, None]
    dataset = save({"image": cells, "label": TWO}, {"image": datasets.Image(), "label": datasets.Value("int64")})
    why = refusal(dataset)
    assert f"row 22 of the train split of '{dataset}' is not a readable image: image file is truncated" in why
    assert f"row 23 of the train split of '{dataset}' has no image" in why
    assert counts(dataset, skip_broken=True) == {"0": (11, 0), "1": (10, 1)}


def test_several_columns_of_images_are_told(save: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    train, _ = data.load(str(save({"mask": CELLS[:1] * 24, "image": CELLS})))
    assert train.images[5, 0, 0, 0] == 45
    assert "images are those of the column image, not of mask" in capsys.readouterr().err


def test_a_data_set_that_is_nowhere_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    """As without a network: `datasets` itself asks six times, with longer and longer waits."""
    import datasets
    import huggingface_hub

    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    started = time.perf_counter()
    why = refusal("photo")
    assert time.perf_counter() - started < 5
    assert "there is no such folder (did you mean photos?), and the Hugging Face hub does not give it" in why
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_name_that_the_hub_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch, refusal: Refusal) -> None:
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_: object, **__: object) -> None:
        raise RepositoryNotFoundError("404", response=httpx.Response(404, request=httpx.Request("GET", "http://x")))  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unknown)
    assert "no such data set on the Hugging Face hub, unless it is private" in refusal("nobody/nothing")


def unreachable(*_: object, **__: object) -> None:
    raise OSError("Name or service not known")
