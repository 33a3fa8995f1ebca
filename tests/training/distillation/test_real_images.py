"""python -m training.distill --real_images: a student whose images, as a set, are more like real ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from tests.training.distillation.conftest import log
from training import distill
from training.distillation import matching, trainer


@pytest.fixture
def real_images(image_folder: Callable[..., Path], save_extractor: Callable[..., str]) -> list[str]:
    """Words that make a student's images, as a set, be like others."""
    photos = image_folder("photos", ("cat", "dog", "emu"), 30, (8, 8))
    return ["--features", save_extractor(), "--real_images", str(photos)]


@pytest.mark.slow
def test_a_student_of_real_images_is_nearer_to_them(
    words: list[str], real_images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "SHOWN", 64)
    monkeypatch.setattr(matching, "REMEMBERED", 64)
    words = [*words, *real_images, "--batch_size", "32", "--iterations", "24", "--checkpoint_rate", "12"]
    ends = {}
    for weight in ("0", "10"):
        assert distill.main([*words, "--real_weight", weight, "--run_name", weight]) == 0
        run = tmp_path / "runs" / weight
        ends[weight] = [line["distance_to_real"] for line in log(run) if "train_loss" in line]
    assert ends["10"][-1] < 0.5 * ends["0"][-1]
    judged = {line["validation_real"]: line["iteration"] for line in log(run) if "validation_real" in line}
    assert len(judged) == 2
    assert checkpoint.load(str(run / "best.safetensors")).config.provenance["iterations"] == judged[min(judged)]
    assert not set(judged) & set(ends["10"])  # of the average's images, which it has not learned from
    monkeypatch.setattr(trainer, "learning_rate", lambda config, iteration: 1e-3)  # not that of a shorter run
    for name in ("whole", "half"):
        assert distill.main([*words, "--run_name", name, "--iterations", "4" if name == "half" else "8"]) == 0
    assert distill.main(["--resume", str(tmp_path / "runs/half"), "--iterations", "8"]) == 0
    states = [torch.load(tmp_path / f"runs/{name}/state-0000008.pt", weights_only=True) for name in ("whole", "half")]
    for name in ("network", "matching"):
        assert states[0][name].keys() == states[1][name].keys()
    assert all(torch.equal(states[0]["network"][name], states[1]["network"][name]) for name in states[0]["network"])
    assert states[0]["matching"]["seen"] == states[1]["matching"]["seen"] == 64 + 8 * 32


def test_real_images_are_of_the_teachers_size(
    words: list[str], real_images: list[str], image_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    others = str(image_folder("colour", ("cat", "dog", "emu"), 10, (8, 8), "RGB"))
    assert distill.main([*words, *real_images, "--real_images", others]) == 2
    assert "are of (channels, height, width) (3, 8, 8), the teacher makes (1, 8, 8)" in capsys.readouterr().err
    fewer = str(image_folder("fewer", ("cat", "dog"), 10, (8, 8)))
    assert distill.main([*words, *real_images, "--real_images", fewer]) == 2
    assert "its classes are cat, dog, the teacher's cat, dog, emu" in capsys.readouterr().err


def test_classes_are_the_teachers_by_name(
    words: list[str],
    real_images: list[str],
    image_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In whatever order the data set has them."""
    others = str(image_folder("others", ("ape", "bee", "cow"), 10, (8, 8)))
    assert distill.main([*words, *real_images, "--real_images", others]) == 2
    assert "its classes are ape, bee, cow, the teacher's cat, dog, emu" in capsys.readouterr().err
    given = []
    monkeypatch.setattr(distill, "FeatureMatching", lambda judges, images, *more: given.append(images) or stop())
    load = distill.data.load
    emus = torch.tensor([2, 0, 1])  # which number a class has here, by the teacher's

    def shuffled(*args: Any, **options: Any) -> Any:
        train, held_out = load(*args, **options)
        assert train.labels is not None
        names = ("dog", "emu", "cat")
        return [replace(part, labels=emus[part.labels], class_names=names) for part in (train, held_out)]

    def stop() -> None:
        raise ValueError("enough")

    monkeypatch.setattr(distill.data, "load", shuffled)
    assert distill.main([*words, *real_images]) == 2
    (images,) = given
    assert images.class_names == ("cat", "dog", "emu")
    shades = [images.images[images.labels == k].float().mean().item() for k in range(3)]
    assert shades == sorted(shades)


def test_what_is_compared_is_said(
    words: list[str],
    real_images: list[str],
    image_folder: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, count in {"cat": 4, "dog": 30, "emu": 30}.items():
        photos = image_folder("unequal", (name,), count, (9, 9))
    monkeypatch.setattr(trainer, "SHOWN", 16)
    assert distill.main([*words, *real_images, "--real_images", str(photos), "--iterations", "1"]) == 0
    told = capsys.readouterr().err
    assert "12 of 61 train images are compared, equally many of each class" in told
    assert "so few, beside 64 features of a layer, teach little" in told


def test_real_images_that_do_not_differ_are_refused(
    words: list[str], real_images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flat ones, a shade for each class, have no grain."""
    for k, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for i in range(20):
            shade = np.full((8, 8), 50 * k + i, np.uint8)
            Image.fromarray(shade).save(tmp_path / "flat" / name / f"{i}.png")
    assert distill.main([*words, *real_images, "--real_images", str(tmp_path / "flat")]) == 2
    assert "the real images are too alike" in capsys.readouterr().err
    assert not (tmp_path / "runs/run").exists()


def test_a_batch_that_is_not_finite_is_one_skipped_step(
    words: list[str], real_images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, calls = trainer.LOSSES["end_to_end"], []

    def broken(network: Any, batch: Any, lesson: Any) -> Any:
        calls.append(batch)
        return walk(network, replace(batch, x_T=batch.x_T * torch.nan) if len(calls) == 2 else batch, lesson)

    monkeypatch.setattr(trainer, "SHOWN", 16)
    monkeypatch.setitem(trainer.LOSSES, "end_to_end", broken)
    assert distill.main([*words, *real_images, "--iterations", "4"]) == 0
    lines = log(tmp_path / "runs/run")
    assert [line["skipped_steps"] for line in lines if "skipped_steps" in line] == [1, 1]  # in all
    assert all(line["distance_to_real"] > 0 for line in lines if "distance_to_real" in line)


def test_a_run_goes_on_with_the_same_real_images(
    words: list[str],
    real_images: list[str],
    image_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer, "SHOWN", 16)
    assert distill.main([*words, *real_images, "--iterations", "2"]) == 0
    state = tmp_path / "runs/run/state-0000002.pt"
    saved, whole = torch.load(state, weights_only=True), state.read_bytes()
    torch.save({name: value for name, value in saved.items() if name != "matching"}, state)
    again = ["--resume", str(tmp_path / "runs/run"), "--iterations", "3"]
    capsys.readouterr()
    assert distill.main(again) == 2
    assert "compares no real images as now: begin anew" in capsys.readouterr().err
    state.write_bytes(whole)
    image_folder("photos", ("cat",), 31, (8, 8))
    assert distill.main(again) == 2
    assert "photos has changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--real_images", "photos"], "--real_images needs --features to compare by"),
        (["--real_images", "p", "--features", "f", "--method", "sfd"], "--real_images is for --method end_to_end, not"),
        (["--real_images", "photos", "--features", ","], "--features ,: a name is missing"),
        (["--real_weight", "-1"], "--real_weight must not be negative"),
        (["--real_weight", "inf"], "--real_weight must not be negative or infinite"),
        (["--real_weight", "3"], "--real_weight 3 is of --real_images: name a data set"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    words: list[str], more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        distill.main([*words, *more])
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
