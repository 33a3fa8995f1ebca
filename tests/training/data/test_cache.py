import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.data.conftest import Draw
from training import data
from training.data import DataError, LoadOptions, memory, picture, reader
from training.data.cache import PixelCache, beside

Capsys = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes long enough to be kept."""
    monkeypatch.setattr(reader, "KEEP_ABOVE_S", 0.0)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[picture.Encoded]:
    """What is decoded while the test runs."""
    found: list[picture.Encoded] = []
    pixels = picture.pixels
    monkeypatch.setattr(picture, "pixels", lambda encoded, *rest: found.append(encoded) or pixels(encoded, *rest))
    return found


def load(dataset: Path, folder: Path, size: tuple[int, ...] = (), **options: Any) -> tuple[data.Images, data.Images]:
    return data.load(str(dataset), size, LoadOptions(**options), cache=folder)


def equal(a: tuple[data.Images, ...], b: tuple[data.Images, ...]) -> bool:
    return all(
        torch.equal(x.images, y.images) and torch.equal(x.labels, y.labels)  # type: ignore[arg-type]
        for x, y in zip(a, b, strict=True)
    )


def test_images_are_decoded_once(draw: Draw, tmp_path: Path, decoded: list[picture.Encoded], capsys: Capsys) -> None:
    draw("cat")
    dataset = draw("dog")
    runs = tmp_path / "runs"
    before = load(dataset, runs)
    assert len(decoded) == 24
    (kept,) = runs.iterdir()
    assert f"are kept in {kept}; it may be deleted" in capsys.readouterr().err
    assert equal(load(dataset, runs), before)
    assert len(decoded) == 24
    assert equal(load(dataset, runs, (4, 4)), load(dataset, runs, (4, 4)))
    assert len(decoded) == 48
    assert len(list(runs.iterdir())) == 2


@pytest.mark.parametrize("change", ["contents", "another", "fewer", "renamed"])
def test_other_files_are_decoded_again(change: str, draw: Draw, tmp_path: Path, decoded: list[picture.Encoded]) -> None:
    dataset = draw("cat", 24)
    load(dataset, tmp_path / "runs")
    path = dataset / "cat" / "003.png"
    if change == "contents":
        Image.new("RGB", (8, 8), (9, 9, 9)).save(path)
        os.utime(path, (time.time() + 5,) * 2)
    elif change == "another":
        Image.new("RGB", (8, 8), (9, 9, 9)).save(dataset / "cat" / "zzz.png")
    elif change == "fewer":
        path.unlink()
    else:
        path.rename(dataset / "cat" / "zzz.png")
    decoded.clear()
    plain = data.load(str(dataset))
    decoded.clear()
    assert equal(load(dataset, tmp_path / "runs"), plain)
    assert len(decoded) > 20
    assert len(list((tmp_path / "runs").iterdir())) == 1  # the old one can never be of use again


def test_what_is_cut_or_strange_is_decoded_again(draw: Draw, tmp_path: Path, decoded: list[picture.Encoded]) -> None:
    dataset = draw("cat", 24)
    before = load(dataset, tmp_path)
    (kept,) = tmp_path.glob("*.pixels")
    for contents in (b"", b"x" * 5000, kept.read_bytes()[:-9], kept.read_bytes()[9:]):
        kept.write_bytes(contents)
        decoded.clear()
        assert equal(load(dataset, tmp_path), before)
        assert len(decoded) == 24


def test_broken_images_stay_left_out(draw: Draw, tmp_path: Path, decoded: list[picture.Encoded]) -> None:
    dataset = draw("cat", 30)
    (dataset / "cat" / "003.png").write_bytes(b"x")
    before = load(dataset, tmp_path, skip_broken=True)
    assert len(before[0]) == 28
    decoded.clear()
    assert equal(load(dataset, tmp_path, skip_broken=True), before)
    assert not decoded
    with pytest.raises(DataError):
        load(dataset, tmp_path)


def test_a_cache_that_cannot_be_written_is_told(draw: Draw, tmp_path: Path, capsys: Capsys) -> None:
    (tmp_path / "file").write_text("")
    train, _ = load(draw("cat", 24), tmp_path / "file" / "runs")
    assert len(train) == 23
    assert "decoded images are not kept in" in capsys.readouterr().err


def test_little_is_not_kept(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    load(draw("cat", 24), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_into_memory_is_mapped(
    draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[picture.Encoded], capsys: Capsys
) -> None:
    dataset = draw("cat", 24)
    (dataset / "cat" / "003.png").write_bytes(b"x")
    plain = data.load(str(dataset), (), LoadOptions(skip_broken=True))
    monkeypatch.setattr(memory, "free_bytes", lambda: 5000)
    decoded.clear()
    for times in (1, 2):
        found = load(dataset, tmp_path / "runs", skip_broken=True)
        assert equal(found, plain)
        assert len(decoded) == 23
        (kept,) = (tmp_path / "runs").iterdir()
        assert str(kept) in Path("/proc/self/maps").read_text()
        err = capsys.readouterr().err
        said = "24 images of 8×8 in colours need 0.00 GB, more than is free: they stay on the disk"
        assert (said in err) == (times == 1)
        assert ("do not fit into memory: mapped from" in err) == (times == 2)
        del found


@pytest.mark.parametrize(
    ("name", "folder", "why"),
    [
        ("free_bytes", None, "24 images of 8×8 in colours need 0.00 GB, and 0.00 GB are free"),
        ("free_bytes", "file/runs", "more than is free, and .*: not a directory"),
        ("free_addresses", "runs", "more than `ulimit -v` leaves for them: choose a smaller --image_size"),
    ],
)
def test_what_fits_nowhere_is_told_beforehand(
    name: str,
    folder: str | None,
    why: str,
    draw: Draw,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoded: list[picture.Encoded],
) -> None:
    (tmp_path / "file").write_text("")
    dataset = draw("cat", 24)
    monkeypatch.setattr(memory, name, lambda: 5000)  # the images are 4608, and need not be all there is
    with pytest.raises(DataError, match=why):
        data.load(str(dataset), cache=tmp_path / folder if folder else None)
    assert not decoded


def test_a_failure_leaves_nothing_behind(draw: Draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = draw("cat", 24)
    (dataset / "cat" / "003.png").write_bytes(b"x")
    for free in (5000, 10**9):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        with pytest.raises(DataError):
            load(dataset, tmp_path / "runs")
        assert not list((tmp_path / "runs").iterdir())


def test_memory_is_read_from_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.free_bytes()
    assert 2**20 < machine < 2**50
    for name, text in {"max": "9000000", "current": "5000000", "stat": "anon 1\ninactive_file 1000000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free_bytes() == 5_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > 2**20
    assert memory.free_addresses() > 2**30


def test_a_result_in_the_folder_of_a_run_shares_its_cache(tmp_path: Path) -> None:
    assert beside(tmp_path / "extractor.safetensors") == tmp_path
    (tmp_path / "config.json").write_text("{}")
    assert beside(tmp_path / "quality.json") == tmp_path.parent


def test_parquet_is_kept_too(tmp_path: Path, decoded: list[picture.Encoded]) -> None:
    import datasets

    (tmp_path / "d").mkdir()

    def write(shade: int) -> None:
        pictures = [Image.new("L", (8, 8), i + shade) for i in range(24)]
        table = datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()}))
        table.to_parquet(tmp_path / "d" / "train.parquet")

    write(0)
    load(tmp_path / "d", tmp_path)
    load(tmp_path / "d", tmp_path)
    assert len(decoded) == 24
    write(100)
    os.utime(tmp_path / "d" / "train.parquet", (time.time() + 5,) * 2)
    assert load(tmp_path / "d", tmp_path)[0].images.min() == 100


def test_pages_are_the_pixels(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path, "birds / v2", {"size": 1}, "stamp")
    array = np.arange(48, dtype=np.uint8).reshape(4, 3, 2, 2)
    cache.keep(array, (7,))
    found = cache.find()
    assert found is not None
    assert (found.array == array).all()
    assert found.left_out == (7,)
    assert PixelCache(tmp_path, "birds / v2", {"size": 1}, "other").find() is None
    assert PixelCache(tmp_path, "birds / v2", {"size": 2}, "stamp").find() is None
