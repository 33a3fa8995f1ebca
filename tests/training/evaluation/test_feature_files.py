import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.sampling.step import sample
from training import evaluate
from training.classifier.network import Classifier
from training.data import Images
from training.evaluation import feature_extractor
from training.evaluation.feature_files import FeatureFile, real_features

Evaluated = Callable[..., dict[str, Any]]


class Counter:
    """`sample`, interrupted after some calls."""

    def __init__(self, calls: int) -> None:
        self.left, self.done = calls, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.left:
            raise KeyboardInterrupt
        self.left, self.done = self.left - 1, self.done + 1
        return sample(*args, **kwargs)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_bits(
    evaluation: list[str],
    evaluated: Evaluated,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    unbroken = evaluated(evaluation)
    whole = next(tmp_path.glob("*.features")).read_bytes()
    again = [*evaluation, "--out", str(tmp_path / "again.json")]
    monkeypatch.setattr(evaluate, "sample", Counter(2))
    assert evaluate.main(again) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "again.json").exists()
    (kept,) = tmp_path.glob("again-*.features")
    kept.write_bytes(kept.read_bytes() + b"half a row")  # what a crash may leave
    monkeypatch.setattr(evaluate, "sample", counter := Counter(9))
    assert evaluated(again) == unbroken
    assert counter.done == 1  # the third batch of five
    assert kept.read_bytes() == whole
    assert evaluated(again) == unbroken
    assert counter.done == 1
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_more_images_begin_with_those_that_are_there(
    evaluation: list[str], evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = evaluated([*evaluation, "--num_images", "21", "--out", str(tmp_path / "unbroken.json")])
    evaluated([*evaluation, "--num_images", "9"])
    monkeypatch.setattr(evaluate, "sample", counter := Counter(9))
    assert evaluated([*evaluation, "--num_images", "21"]) == unbroken
    assert counter.done == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        ["--seed", "1"],
        ["--steps", "3"],
        ["--eta", "0"],
        ["--sampler", "ddpm", "--steps", "2"],
        ["--guidance_scale", "2"],
        ["--batch_size", "4"],
        ["--precision", "bf16"],
        ["--features"],
        ["--checkpoint"],
    ],
)
def test_other_settings_begin_anew(
    other: list[str], evaluation: list[str], evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated(evaluation)
    if other == ["--features"]:
        feature_extractor.save(
            Path(evaluation[3]), feature_extractor.load(evaluation[3]).network, ("cat", "dog", "emu"), {"accuracy": 0}
        )
        other = []
    elif other == ["--checkpoint"]:
        loaded = checkpoint.load(evaluation[1])
        checkpoint.save(
            evaluation[1], loaded.network.state_dict(), replace(loaded.config, provenance={"note": "another"})
        )
        other = []
    monkeypatch.setattr(evaluate, "sample", counter := Counter(9))
    evaluated([*evaluation, *other])
    assert counter.done == 3
    assert len(list(tmp_path.glob("result-*.features"))) == 2


@pytest.mark.slow
def test_two_runs_do_not_write_into_one_file(
    evaluation: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def twice(*args: Any, **kwargs: Any) -> Tensor:
        for path in tmp_path.glob("*.features"):
            path.write_bytes(path.read_bytes() + b"another run's")
        return sample(*args, **kwargs)

    monkeypatch.setattr(evaluate, "sample", twice)
    assert evaluate.main(evaluation) == 2


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "x.json", {"seed": 1}, columns=3, batch_size=2)
    assert (file.count, file.read().shape) == (0, (0, 3))
    rows = torch.randn(4, 3)
    file.append(rows[:2])
    file.append(rows[2:])
    again = FeatureFile(tmp_path / "x.json", {"seed": 1}, columns=3, batch_size=2)
    assert again.path == file.path
    assert again.count == 4
    assert torch.equal(again.read(), rows)
    assert FeatureFile(tmp_path / "x.json", {"seed": 2}, columns=3, batch_size=2).count == 0
    assert FeatureFile(tmp_path / "x.json", {"seed": 1}, columns=4, batch_size=2).count == 0


def test_another_file_of_that_name_is_left_alone(tmp_path: Path) -> None:
    path = FeatureFile(tmp_path / "x.json", {}, columns=3, batch_size=2).path
    path.write_text("something of great value, longer than the header")
    with pytest.raises(FileExistsError, match="something else"):
        FeatureFile(tmp_path / "x.json", {}, columns=3, batch_size=2)
    assert path.read_text().startswith("something of great value")


def split(images: int = 12, seed: int = 0) -> Images:
    draw = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (images, 1, 8, 8), dtype=torch.uint8, generator=draw), None, (), "x")


class Reads:
    """An extractor that counts the images it sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images, extract = 0, Classifier.extract

        def counted(network: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
            self.images += len(images)
            return extract(network, images)

        monkeypatch.setattr(Classifier, "extract", counted)


def test_the_extractor_sees_real_images_once(
    evaluation: list[str], evaluated: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    first = evaluated(evaluation)
    assert reads.images == 60 + 12 + 15  # both splits, and three batches of samples
    again = evaluated([*evaluation, "--out", str(tmp_path / "again.json")])
    assert reads.images == 60 + 12 + 30
    assert again == first
    assert len(list(tmp_path.glob("extractor-*.real"))) == 2
    assert sum(p.stat().st_size for p in tmp_path.glob("*.real")) < 4 * (60 + 12) * 15 + 1000  # 12 features, 3 logits


def test_real_features_are_those_of_every_image_in_order(save_extractor: Callable[..., str], tmp_path: Path) -> None:
    who, images = feature_extractor.load(save_extractor()), split()
    expected = torch.cat(who.network.extract(images.images), dim=1)
    for _ in range(2):  # made, and read
        torch.testing.assert_close(real_features(who, images), expected)
    assert [p.name[:10] for p in tmp_path.glob("*.real*")] == ["extractor-"]


@pytest.mark.parametrize("what", ["extractor", "images", "shape", "cut", "empty"])
def test_real_features_of_something_else_are_made_anew(
    what: str, save_extractor: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who, images = feature_extractor.load(save_extractor()), split()
    real_features(who, images)
    (kept,) = tmp_path.glob("*.real")
    match what:
        case "extractor":
            network = who.network
            network.head.weight.mul_(2)
            feature_extractor.save(who.path, network, ("cat", "dog", "emu"), {"accuracy": 0})
            who = feature_extractor.load(who.path)
        case "images":
            images = split(seed=1)
        case "shape":
            images = Images(images.images.reshape(24, 1, 4, 8), None, (), "x")
        case "cut":
            kept.write_bytes(kept.read_bytes()[:-4])
        case "empty":
            kept.write_bytes(b"")
    reads = Reads(monkeypatch)
    expected = torch.cat(who.network.extract(images.images), dim=1)
    reads.images = 0
    torch.testing.assert_close(real_features(who, images), expected)
    assert reads.images == len(images)
    assert len(list(tmp_path.glob("*.real"))) == (2 if what in ("images", "shape") else 1)


def test_real_features_are_made_where_they_cannot_be_kept(
    save_extractor: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    who, images = feature_extractor.load(save_extractor()), split()
    expected = real_features(who, images)
    (kept,) = tmp_path.glob("*.real")
    kept.unlink()

    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert torch.equal(real_features(who, images), expected)
    assert "not kept" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.real*"))


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    file = FeatureFile(tmp_path / "x.json", {}, columns=3, batch_size=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.begin + 5, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            file.append(torch.zeros(2, 3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(file.path)
    assert FeatureFile(tmp_path / "x.json", {}, columns=3, batch_size=2).count == 0
