"""A run goes on with what it was trained on, or says in what that differs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from training.data import Images
from training.data_record import DataRecord, fingerprint
from training.run.config import TrainConfig
from training.train import main, train

pytestmark = pytest.mark.usefixtures("quick")

Options = dict[str, Any]
ImageFolder = Callable[..., Path]


@pytest.fixture
def run(tiny_options: Options) -> Path:
    """Of the classes cat and dog, in the folder `pictures`, at iteration 2."""
    return train(TrainConfig(**tiny_options | {"iterations": 2, "use_labels": True}))


def go_on(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said on stderr when it is resumed and takes one more step."""
    capsys.readouterr()
    iterations = max(int(path.stem[-7:]) for path in run.glob("state-*")) + 1
    assert main(["--resume", str(run), "--iterations", str(iterations), *words]) == 0
    return said(capsys)


def refused(run: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    capsys.readouterr()
    assert main(["--resume", str(run), "--iterations", "9", *words]) == 2
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    return said(capsys)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return "\n".join(line for line in capsys.readouterr().err.splitlines() if line.startswith("training.train: "))


def classes(run: Path) -> tuple[str, ...]:
    return checkpoint.load(max(run.glob("checkpoint-*"))).config.class_names


def test_other_classes_are_refused(run: Path, image_folder: ImageFolder, capsys: pytest.CaptureFixture[str]) -> None:
    other = image_folder("others", ("ant", "cat"))
    expected = f"'{other}' has the classes ant, cat, and the run was trained on cat, dog"
    assert expected in refused(run, capsys, "--dataset", str(other))
    assert expected in refused(run, capsys, "--dataset", str(other), "--changed_data")


def test_other_sizes_and_channels_are_refused(
    run: Path, image_folder: ImageFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, colour = image_folder("wide", size=(8, 16)), image_folder("colour", mode="RGB")
    assert "images of 8×16 pixels, and the run was trained on 8×12" in refused(run, capsys, "--dataset", str(wide))
    assert "images of 3 channels, and the run was trained on 1" in refused(run, capsys, "--dataset", str(colour))


@pytest.mark.slow
def test_other_images_are_refused_unless_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "pictures" / "cat" / "000.png"
    old = picture.read_bytes()
    Image.fromarray(255 - np.asarray(Image.open(picture))).save(picture)
    assert "the run was trained on 29 images, and here are other ones" in refused(run, capsys)
    picture.unlink()
    assert "the run was trained on 29 images, and here are 28; --changed_data goes on" in refused(run, capsys)
    assert "going on with changed data" in go_on(run, capsys, "--changed_data")
    assert go_on(run, capsys) == "", "what it goes on with is its own from now on"
    picture.write_bytes(old)
    assert "28 images, and here are 29" in refused(run, capsys)


@pytest.mark.slow
def test_a_class_may_be_called_otherwise_and_keeps_its_number(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures" / "cat").rename(tmp_path / "pictures" / "wildcat")  # which sorts behind dog
    assert "--rename_classes OLD=NEW" in refused(run, capsys)
    assert "classes are cat, dog" in refused(run, capsys, "--rename_classes", "emu=wildcat")
    assert "two classes of one name" in refused(run, capsys, "--rename_classes", "cat=dog")
    go_on(run, capsys, "--rename_classes", "cat=wildcat", "--changed_data")  # since others are held out by then
    assert classes(run) == ("wildcat", "dog")
    go_on(run, capsys)
    assert classes(run) == ("wildcat", "dog")


def test_numbers_of_classes_follow_their_names() -> None:
    images = Images(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2]), ("2", "10", "é"), "x")
    record = DataRecord("x", "", "", (1, 2, 2), ("10", "2", "e\u0301"))
    ordered = record.in_order(images)
    assert ordered.labels is not None
    assert ordered.labels.tolist() == [1, 0, 2]
    assert ordered.class_names == record.class_names
    assert record.in_order(replace(images, class_names=("2", "10", "f"))).class_names == ("2", "10", "f")


def test_a_fingerprint_is_of_pixels_and_labels_in_any_order() -> None:
    pixels = torch.arange(48, dtype=torch.uint8).reshape(3, 1, 4, 4)
    images = Images(pixels, torch.tensor([0, 1, 1]), ("a", "b"), "x")
    taken = fingerprint(images)
    assert taken == fingerprint(images.select(torch.tensor([2, 0, 1])))
    others = [
        replace(images, labels=torch.tensor([0, 1, 0])),
        replace(images, labels=None),
        replace(images, images=pixels.reshape(3, 1, 2, 8)),
        replace(images, images=pixels.clone().index_fill_(3, torch.tensor([3]), 0)),
        images.select(torch.tensor([0, 1, 2, 2])),
    ]
    assert len({taken, *map(fingerprint, others)}) == 6


@pytest.mark.slow
def test_a_run_without_a_record_goes_on_with_a_word(
    run: Path, tmp_path: Path, image_folder: ImageFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(run / "state-0000002.pt", weights_only=True)
    torch.save({k: v for k, v in state.items() if k not in ("data", "images_seen")}, run / "state-0000002.pt")
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["fingerprint"] == state["data"]["fingerprint"]
    del config["data"]
    (run / "config.json").write_text(json.dumps(config))
    other = image_folder("others", ("ant", "cat"))
    assert "has the classes ant, cat" in refused(run, capsys, "--dataset", str(other))  # as its checkpoint knows
    assert "the run does not tell which images it was trained on" in go_on(run, capsys)
    assert go_on(run, capsys) == ""


def test_a_run_that_had_no_checkpoint_yet_knows_its_data_too(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (*run.glob("state-*"), *run.glob("*.safetensors")):
        path.unlink()
    (tmp_path / "pictures" / "cat" / "000.png").unlink()
    assert "29 images, and here are 28" in refused(run, capsys)


@pytest.mark.slow
def test_a_relative_folder_is_found_from_elsewhere(
    tiny_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run = train(TrainConfig(**tiny_options | {"dataset": "pictures", "iterations": 2}))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert go_on(run, capsys) == ""
    assert "--dataset pictures" in checkpoint.load(max(run.glob("checkpoint-*"))).config.provenance["command"]


def test_data_that_moved_along_with_the_run_are_found(
    tiny_options: Options, tmp_path: Path, image_folder: ImageFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    project = tmp_path / "project"
    data = image_folder("project/data")
    run = train(TrainConfig(**tiny_options | {"dataset": str(data), "log_dir": str(project / "runs"), "iterations": 2}))
    project.rename(tmp_path / "moved")
    moved = tmp_path / "moved" / "runs" / run.name
    found = tmp_path / "moved" / "data"
    assert go_on(moved, capsys) == f"training.train: {data} is gone; the data set is read from {found}"
    assert go_on(moved, capsys) == ""


def test_a_run_that_moved_alone_finds_its_data(
    tiny_options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(TrainConfig(**tiny_options | {"dataset": "pictures", "iterations": 2}))
    monkeypatch.chdir("/")
    moved = tmp_path / "archive" / "2026" / run.name
    moved.parent.mkdir(parents=True)
    run.rename(moved)
    assert go_on(moved, capsys) == ""


def test_data_that_are_gone_are_told_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_: pytest.fail("asks the hub for a folder"))
    (tmp_path / "pictures").rename(tmp_path / "photos")
    said = f"the run was trained on the folder {tmp_path}/pictures, which is gone: say where by --dataset"
    assert said in refused(run, capsys)
    assert go_on(run, capsys, "--dataset", str(tmp_path / "photos")) == ""
    assert go_on(run, capsys) == ""


@pytest.mark.slow
def test_images_seen_are_counted(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go_on(run, capsys, "--batch_size", "16")
    go_on(run, capsys, "--batch_size", "4")
    seen = checkpoint.load(run / "checkpoint-0000004.safetensors").config.provenance["images_seen"]
    assert seen == 2 * 8 + 16 + 4


def test_a_class_whose_name_is_no_text_is_refused_at_the_start(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pictures" / "cat").rename(tmp_path / "pictures" / "caf\udce9")
    assert main([*command_line, "--iterations", "1"]) == 2
    assert "not UTF-8" in said(capsys)
    assert not (tmp_path / "runs" / "run" / "config.json").exists()


def test_a_run_in_a_folder_that_is_no_text_works(tiny_options: Options, tmp_path: Path) -> None:
    place = tmp_path / "caf\udce9"
    place.mkdir()
    run = train(TrainConfig(**tiny_options | {"log_dir": str(place), "iterations": 2}))
    assert sorted(path.name for path in run.glob("*.safetensors")) == [
        "best.safetensors",
        "checkpoint-0000002.safetensors",
    ]
    shutil.rmtree(place)
