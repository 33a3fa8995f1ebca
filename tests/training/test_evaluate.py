import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.convert.importer import main as import_main
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.images import from_uint8, to_uint8
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.fixtures import theirs
from training import data, evaluate
from training.classifier import train
from training.classifier.network import Classifier, ClassifierConfig
from training.data import Images
from training.evaluation import feature_extractor, metrics
from training.evaluation.likelihood import bits_per_dim
from training.evaluation.statistics import Moments, kernel_distance

Evaluated = Callable[..., dict[str, Any]]
NAMES = ("cat", "dog", "emu")


def shade(images: Tensor, classes: Sequence[int]) -> Tensor:
    """Images as those of the folder: [-1, 1] of bytes 200·k/2 and a little noise."""
    noise = torch.rand(images, generator=torch.Generator().manual_seed(0)) * 9
    return (noise + 100 * torch.tensor(classes).reshape(-1, 1, 1, 1)) / 127.5 - 1


def test_the_result_is_complete(
    evaluation: list[str], evaluated: Evaluated, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluated([*evaluation, "--seed", "7", "--guidance_scale", "1.5"], everything=True)
    assert result["command"] == f"python -m training.evaluate {' '.join(evaluation)} --seed 7 --guidance_scale 1.5"
    assert result["checkpoint"] == {"name": "tiny", "sha256": checkpoint.load(evaluation[1]).sha256}
    assert result["features"]["sha256"] == feature_extractor.load(evaluation[3]).sha256
    assert (result["features"]["accuracy"], result["features"]["size"]) == (0.625, 12)
    sampling = result["sampling"]
    assert sampling | {"sampler": "ddim", "steps": 2, "eta": 0.5, "guidance_scale": 1.5, "seed": 7} == sampling
    assert sampling | {"precision": "fp32", "batch_size": 5, "device": "cpu", "torch": torch.__version__} == sampling
    assert (result["num_images"], result["compared_images"], result["train_images"]) == (12, 12, 60)
    assert (result["dataset"], result["class_balanced"]) == ("pictures", True)
    assert {"git_revision", "time"} <= result.keys()
    assert result["time"]["images_sampled"] == 12
    numbers = {"frechet_distance", "frechet_distance_all_train", "kernel_distance", "kernel_distance_std"}
    numbers |= {"precision", "recall", "accuracy", "accuracy_by_class"}
    for row in ("generated", "test"):
        assert result[row].keys() == numbers
        assert tuple(result[row]["accuracy_by_class"]) == NAMES
    ratio = result["generated"]["frechet_distance"] / result["test"]["frechet_distance"]
    assert result["frechet_ratio"] == pytest.approx(ratio)
    printed = capsys.readouterr().out
    assert "extractor (accuracy 62.50%)" in printed
    assert f"{result['test']['frechet_distance']:.4g}" in printed


def test_no_distance_is_called_by_the_name_of_inceptions(
    evaluation: list[str], evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated(evaluation)
    captured = capsys.readouterr()
    text = (tmp_path / "result.json").read_text() + captured.out + captured.err
    assert not re.findall(r"\b(fid|kid|inception)", text.replace(str(tmp_path), "").lower())


@pytest.mark.slow
def test_the_samples_are_those_of_the_naive_loop(evaluation: list[str], evaluated: Evaluated, tmp_path: Path) -> None:
    evaluated([*evaluation, "--seed", "3", "--guidance_scale", "2"])
    source, who = checkpoint.load(evaluation[1]), feature_extractor.load(evaluation[3])
    schedule = make_schedule(source.diffusion, "ddim", 2, eta=0.5, guidance_scale=2)
    expected = []
    for part in (range(5), range(5, 10), range(10, 15)):
        x = sample(source.network, schedule, (1, 8, 8), [3] * 5, part, [i % 3 for i in part], null_class=3)
        expected.append(torch.cat(who.network.extract(to_uint8(x)), dim=1))
    (path,) = tmp_path.glob("*.features")
    rows = torch.frombuffer(bytearray(path.read_bytes()[-15 * 15 * 4 :]), dtype=torch.float32).reshape(15, 15)
    torch.testing.assert_close(rows, torch.cat(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_accuracy_counts_the_classes_that_were_asked_for(
    evaluation: list[str], evaluated: Evaluated, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for an emu gets a cat, every second time."""
    trained = [
        "--dataset",
        str(pictures),
        "--out",
        evaluation[3],
        "--epochs",
        "15",
        "--batch_size",
        "20",
        "--width",
        "4",
    ]
    assert train.main([*trained, "--device", "cpu"]) == 0
    asked: list[int] = []

    def fake(network: object, schedule: object, shape: tuple[int, ...], **kwargs: Any) -> Tensor:
        classes = kwargs["classes"]
        asked.extend(classes)
        shown = [0 if k == 2 and i % 2 else k for i, k in zip(kwargs["indices"], classes, strict=True)]
        return shade(torch.Size((len(classes), *shape)), shown)

    monkeypatch.setattr(evaluate, "sample", fake)
    result = evaluated([*evaluation, "--num_images", "24"])
    assert asked == [0, 1, 2] * 8 + [0]  # the last batch is whole, what is too many is not counted
    assert result["generated"]["accuracy"] == pytest.approx(20 / 24)
    assert result["generated"]["accuracy_by_class"] == {"cat": 1, "dog": 1, "emu": 0.5}
    assert result["test"]["accuracy_by_class"] == {"cat": 1, "dog": 1, "emu": 1}


def test_as_many_samples_as_held_out_images_are_compared(
    evaluation: list[str], evaluated: Evaluated, tmp_path: Path
) -> None:
    all_compared, more = evaluated(evaluation), evaluated([*evaluation, "--num_images", "24"])
    assert (more["num_images"], more["compared_images"], all_compared["compared_images"]) == (24, 12, 12)
    assert more["test"] == all_compared["test"]
    for name in ("frechet_distance", "frechet_distance_all_train", "kernel_distance", "precision", "recall"):
        assert more["generated"][name] == all_compared["generated"][name]


def test_the_row_of_real_images_does_not_depend_on_the_samples(
    evaluation: list[str], evaluated: Evaluated, tmp_path: Path
) -> None:
    first, second = evaluated(evaluation), evaluated([*evaluation, "--seed", "1"])
    assert first["test"] == second["test"]
    assert first["generated"] != second["generated"]


def test_both_rows_are_compared_with_the_same_train_images() -> None:
    torch.manual_seed(0)
    train, features = torch.rand(30, 4), torch.rand(30, 4) + 0.1
    everything = Moments(4).add(torch.rand(90, 4))
    row = metrics.compare(train, everything, features, 3)
    assert 0 < row["frechet_distance"] != row["frechet_distance_all_train"] > 0
    assert row["kernel_distance"] == kernel_distance(train, features, 3)[0] != kernel_distance(train, features)[0]
    same = metrics.compare(train, Moments(4).add(train), train, None)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-9)
    assert same["frechet_distance_all_train"] == pytest.approx(0, abs=1e-9)
    assert (same["precision"], same["recall"]) == (1, 1)


def test_balanced_sets_have_equally_many_of_each_class_in_turn() -> None:
    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 20)
    images = Images(torch.zeros(77, 1, 1, 1, dtype=torch.uint8), labels, NAMES, "x")
    every = metrics.balanced(images, 3)
    assert labels[every].tolist() == [0, 1, 2] * 7
    assert len(set(every.tolist())) == 21
    assert metrics.balanced(images, 3, 9).tolist() == every[:9].tolist()
    assert every[0::3].tolist() != sorted(every[0::3].tolist())  # from everywhere, not the first ones
    assert sorted(metrics.balanced(images, None).tolist()) == list(range(77))


def test_an_unconditional_network_is_compared_without_balancing(
    evaluation: list[str], evaluated: Evaluated, save_checkpoint: Callable[..., str], tiny_config: UNetConfig
) -> None:
    save_checkpoint(replace(tiny_config, num_classes=None, null_class=False))
    result = evaluated([*evaluation, "--num_images", "10"])
    assert result["class_balanced"] is False
    assert "accuracy" not in result["generated"]
    assert result["generated"].keys() == result["test"].keys()


def test_the_precision_asked_for_reaches_the_network(
    evaluation: list[str], evaluated: Evaluated, save_checkpoint: Callable[..., str], tiny_config: UNetConfig
) -> None:
    exact = evaluated([*evaluation, "--precision", "fp32"])
    half = evaluated([*evaluation, "--precision", "bf16"])
    assert (exact["sampling"]["precision"], half["sampling"]["precision"]) == ("fp32", "bf16")
    assert exact["generated"] != half["generated"]


@pytest.mark.slow
def test_bits_per_dimension_are_those_of_held_out_images(
    evaluation: list[str], evaluated: Evaluated, pictures: Path, tiny: UNet, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "bits_per_dim" not in evaluated(evaluation)
    assert "bits" not in capsys.readouterr().out
    loaded = checkpoint.load(evaluation[1])
    config = replace(loaded.config, diffusion=DiffusionConfig(10, "cosine"))
    checkpoint.save(evaluation[1], loaded.network.state_dict(), config)
    found = evaluated([*evaluation, "--bits_images", "6"])["bits_per_dim"]
    _, test = data.load(str(pictures))
    which = metrics.balanced(test, 3, 6)
    x0, y = from_uint8(test.images[which]), test.labels[which] if test.labels is not None else None
    bound = bits_per_dim(GaussianDiffusion(config.diffusion), tiny, x0, y, [0] * 6, which.tolist())
    assert found["bits_per_dim"] == pytest.approx(float(bound.total.mean()), rel=1e-4)
    assert found["standard_error"] == pytest.approx(float(bound.total.std()) / 6**0.5, rel=1e-3)
    assert found["prior"] == pytest.approx(float(bound.prior.mean()), rel=1e-4)
    assert found["decoder"] == pytest.approx(float(bound.terms[:, 0].mean()), rel=1e-3)
    assert found["images"] == 6
    assert f"6 held-out images: {found['bits_per_dim']:.4g}" in capsys.readouterr().out


@pytest.mark.slow
def test_raw_weights_come_from_the_state_beside_the_checkpoint(
    evaluation: list[str], evaluated: Evaluated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = evaluated(evaluation)
    raw = [*evaluation, "--weights", "raw", "--checkpoint", str(tmp_path / "checkpoint-0000005.safetensors")]
    Path(evaluation[1]).rename(raw[-1])
    assert evaluate.main(raw) == 2
    assert "only the first average is in it" in capsys.readouterr().err
    network = checkpoint.load(raw[-1]).network
    torch.save({"network": network.state_dict(), "iteration": 5}, tmp_path / "state-0000005.pt")
    assert evaluated(raw)["generated"] == averaged["generated"]
    state = {name: weight * 0.9 for name, weight in network.state_dict().items()}
    torch.save({"network": state, "iteration": 5}, tmp_path / "state-0000005.pt")
    second = evaluated([*raw, "--out", str(tmp_path / "second.json")])
    assert second["generated"] != averaged["generated"]
    assert (averaged["sampling"]["weights"], second["sampling"]["weights"]) == ("ema", "raw")
    state_sha256 = hashlib.sha256((tmp_path / "state-0000005.pt").read_bytes()).hexdigest()
    assert second["checkpoint"] == {"name": "state-0000005", "sha256": state_sha256}


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--num_images", "13"], "multiple of 3"),
        (["--num_images", "3"], "more than 3"),
        (["--sampler", "ddpm", "--eta", "0.5"], "--eta belongs to"),
        (["--steps", "0"], "steps must be between"),
        (["--batch_size", "0"], "at least 1"),
        (["--bits_images", "-1"], "must not be negative"),
        (["--seed", "-1"], "--seed must"),
        (["--checkpoint", "nobody"], "no checkpoint 'nobody'"),
        (["--dataset", "/nowhere"], "no folder"),
        (["--out", "/nowhere/at/all"], "no folder"),
        (["--device", "abacus"], "--device abacus"),
        (["--num_image", "6"], "no option --num_image; did you mean --num_images?"),
        (["--weights", "rw"], "must be one of ema, raw, not 'rw'; did you mean raw?"),
    ],
)
def test_what_cannot_be_is_said(
    more: list[str], why: str, evaluation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = evaluate.main([*evaluation, *more])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_levels_of_noise_have_no_bits(
    evaluation: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "edm.safetensors")
    assert import_main([str(theirs("edm/adm.pt")), path]) == 0
    assert evaluate.main([*evaluation, "--checkpoint", path, "--bits_images", "2"]) == 2
    assert "--bits_images: the checkpoint has EDM's levels of noise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "channels", "why"), [(("cat", "dog", "eel"), 1, "classes cat, dog, emu"), (NAMES, 3, "(1, 8, 8)")]
)
def test_an_extractor_of_other_images_is_refused(
    names: tuple[str, ...],
    channels: int,
    why: str,
    evaluation: list[str],
    save_extractor: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_extractor(names, channels)
    assert evaluate.main(evaluation) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("held_out", ["1", "2"])
def test_too_few_held_out_images_are_refused_before_sampling(
    held_out: str, evaluation: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (pictures / "test" / "emu").glob("*.png"):
        if path.stem >= f"00{held_out}":
            path.unlink()
    code = evaluate.main(evaluation)
    if held_out == "2":
        assert code == 0
        return
    assert code == 2
    assert "at least 6 samples and 6 held-out images are needed, equally many of each class" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.features"))


def test_guidance_needs_a_null_class(
    evaluation: list[str],
    save_checkpoint: Callable[..., str],
    tiny_config: UNetConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_checkpoint(replace(tiny_config, null_class=False))
    assert evaluate.main([*evaluation, "--guidance_scale", "2"]) == 2
    assert "no null class" in capsys.readouterr().err


def test_features_are_of_the_bytes_that_clients_get() -> None:
    x = torch.linspace(-1.5, 1.5, 64).reshape(1, 1, 8, 8)
    network = Classifier(ClassifierConfig(1, (8, 8), 2, width=3)).eval()
    torch.testing.assert_close(network.extract(to_uint8(x))[1], network(from_uint8(to_uint8(x))))
