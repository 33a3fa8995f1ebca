import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from model import checkpoint
from model.diffusion import DiffusionConfig, GaussianDiffusion
from training import data
from training import train as module
from training.data import Images
from training.data.batches import Batches
from training.loop.distributed import DistributedContext
from training.loop.optimizer import learning_rate, step
from training.loop.validation import chosen, validation_loss
from training.run.config import TrainConfig
from training.run.git import git_revision
from training.run.norm_groups import single_channel_groups
from training.train import main, train

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).parents[2]

Options = dict[str, Any]
ReadLog = Callable[[Path], list[dict[str, Any]]]


@pytest.mark.slow
def test_the_loss_falls_on_toy_images(read_log: ReadLog, tiny_options: Options) -> None:
    options = {"iterations": 60, "learning_rate": 5e-3, "log_rate": 10, "checkpoint_rate": 30, "ema_decay": (0.9,)}
    lines = read_log(train(TrainConfig(**tiny_options | options)))
    losses = [line["train_loss"] for line in lines if "train_loss" in line]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[0] > 0.2
    assert losses[-1] < 0.3 * losses[0]
    assert validation[-1] < 0.7 * validation[0]


@pytest.mark.slow
def test_every_line_of_the_log_is_json_and_finite(tiny_options: Options) -> None:
    run = train(TrainConfig(**tiny_options | {"iterations": 9}))
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train_loss" in line]
    validated = [line for line in lines if "validation_loss" in line]
    assert [line["iteration"] for line in trained] == [2, 4, 6, 8, 9]
    assert [line["iteration"] for line in validated] == [4, 8, 9]
    assert all(line["images_per_second"] > 0 for line in trained)
    for line in validated:
        assert len(line["validation_loss_by_t_quartile"]) == 4
        assert line["validation_loss"] == pytest.approx(sum(line["validation_loss_by_t_quartile"]) / 4)


@pytest.mark.slow
def test_a_checkpoint_knows_what_it_is(read_log: ReadLog, tiny_options: Options) -> None:
    options = {"label_dropout": 0.1, "schedule": "cosine", "sampler": "ddim", "guidance_scale": 1.5, "keep": 1}
    options |= {"seed": 5}
    config = TrainConfig(**tiny_options | options)
    run = train(config)
    assert len(list(run.glob("checkpoint-*"))) == len(list(run.glob("state-*"))) == 1
    loaded = checkpoint.load(run / "checkpoint-0000008.safetensors")
    assert loaded.config.class_names == ("cat", "dog")
    assert (loaded.config.unet.image_shape, loaded.config.unet.null_class) == ((1, 8, 12), True)
    assert loaded.config.diffusion.schedule == "cosine"
    assert (loaded.config.sampling.sampler, loaded.config.sampling.steps) == ("ddim", 2)
    assert loaded.config.sampling.guidance_scale == 1.5
    provenance = loaded.config.provenance
    assert (provenance["dataset"], provenance["iterations"], provenance["images_seen"]) == ("pictures", 8, 64)
    assert provenance["command"].startswith("python -m training.train --dataset ")
    assert (provenance["seed"], provenance["git_revision"]) == (5, "0123")
    assert provenance["machine"].startswith("cpu, ")
    assert provenance["machine"].endswith(f"torch {torch.__version__}")
    assert provenance["metrics"]["train_loss"] == read_log(run)[-2]["train_loss"]
    assert provenance["metrics"]["validation_loss"] == read_log(run)[-1]["validation_loss"]


@pytest.mark.slow
def test_a_checkpoint_has_the_average_and_the_state_the_weights(tiny_options: Options) -> None:
    run = train(TrainConfig(**tiny_options))
    state = torch.load(run / "state-0000008.pt", weights_only=True)
    served = checkpoint.load(run / "checkpoint-0000008.safetensors").network.state_dict()
    (averages,) = state["ema"]["averages"].values()
    for name, average in averages.items():
        assert torch.equal(served[name], average), name
    assert not torch.equal(served["out_conv.bias"], state["network"]["out_conv.bias"])


@pytest.mark.slow
def test_what_is_validated_and_shown_is_the_average_in_eval_mode(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool, Tensor]] = []
    told: dict[str, tuple[Any, ...]] = {}

    def spied(name: str) -> None:
        original = getattr(module, name)

        def spy(network: torch.nn.Module, *arguments: Any) -> Any:
            seen.append((name, network.training, network.state_dict()["out_conv.bias"].clone()))
            told[name] = arguments
            return original(network, *arguments)

        monkeypatch.setattr(module, name, spy)

    for name in ("validation_loss", "sample_grid", "sequence"):
        spied(name)
    config = TrainConfig(**tiny_options | {"dropout": 0.3, "precision": "bf16"})
    run = train(config)
    assert [name for name, _, _ in seen] == 2 * ["validation_loss", "sample_grid", "sequence"]
    assert not any(training for _, training, _ in seen)
    for at, some in (("0000004", seen[:3]), ("0000008", seen[3:])):
        served = checkpoint.load(run / f"checkpoint-{at}.safetensors").network.state_dict()["out_conv.bias"]
        raw = torch.load(run / f"state-{at}.pt", weights_only=True)["network"]["out_conv.bias"]
        assert not torch.equal(served, raw)
        assert all(torch.equal(bias, served) for _, _, bias in some)
    _, images, precision = told["validation_loss"]
    _, held_out = data.load(config.dataset)
    assert (len(held_out), precision) == (1, "bf16")
    assert (images.images == held_out.images).all()
    schedule, indices, classes = told["sequence"]
    assert (schedule.sampler, len(schedule)) == (config.sampling().sampler, config.sampling().steps)
    assert (list(indices), list(classes)) == ([0, 1], [0, 1])  # an image of either class


@pytest.mark.slow
def test_the_best_checkpoint_has_the_lowest_validation_loss(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.3, 0.4, 0.35, 0.32, 0.2])  # at 3, 6, 8; 9, 10; 11
    monkeypatch.setattr(module, "validation_loss", lambda *_: [next(losses)] * 4)
    config = TrainConfig(**tiny_options | {"checkpoint_rate": 3})

    def best(iterations: int) -> int:
        run = train(replace(config, iterations=iterations), resume=iterations > 8)
        return checkpoint.load(run / "best.safetensors").config.provenance["iterations"]

    assert best(8) == 6
    assert best(10) == 6  # a resumed run knows it
    assert best(11) == 11


@pytest.mark.slow
@pytest.mark.parametrize(("use_labels", "size"), [(True, (96, 16)), (False, (96, 64))])
def test_grids_show_a_row_a_class_or_a_square(use_labels: bool, size: tuple[int, int], tiny_options: Options) -> None:
    run = train(TrainConfig(**tiny_options | {"use_labels": use_labels}))
    names = sorted(path.name for path in run.glob("samples-*"))
    assert names == ["samples-0000004.png", "samples-0000008.png"]
    with Image.open(run / names[-1]) as picture:
        assert picture.size == size


@pytest.mark.slow
def test_steps_see_mirrored_and_unlabelled_images_when_asked(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tiny_options["dataset"])
    for path in folder.glob("*/*.png"):
        pixels = np.zeros((8, 12), np.uint8)
        pixels[:, 0] = 255  # bright at the left
        Image.fromarray(pixels).save(path)
    seen: list[tuple[Tensor, Tensor]] = []
    loss = GaussianDiffusion.loss

    def spy(self: GaussianDiffusion, network: Any, x0: Tensor, y: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append((x0, y))
        return loss(self, network, x0, y, t, noise)

    monkeypatch.setattr(GaussianDiffusion, "loss", spy)

    def shares(**options: Any) -> tuple[float, float]:
        seen.clear()
        train(TrainConfig(**tiny_options | {"iterations": 10, "run_name": str(options), **options}))
        x0, y = (torch.cat(part) for part in zip(*seen, strict=True))
        return float((x0[:, 0, 0, -1] == 1).float().mean()), float((y == 2).float().mean())

    assert shares() == (0.0, 0.0)
    mirrored, unlabelled = shares(flip=True, label_dropout=0.25)
    assert 0.35 < mirrored < 0.65
    assert 0.1 < unlabelled < 0.4


def many(count: int = 100) -> Images:
    """Image i is of shade i; the first half is of class 0, the second of class 1."""
    images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return Images(images, (torch.arange(count) >= count // 2).long(), ("a", "b"), "many")


def test_an_epoch_shows_every_image_once_in_its_own_order() -> None:
    batches = Batches(many(), TrainConfig(batch_size=20, use_labels=True), DistributedContext(), torch.device("cpu"))

    def epoch(number: int) -> list[int]:
        shown = []
        for i in range(5):
            x0, y = batches[5 * number + i].x0, batches[5 * number + i].y
            shades = ((x0[:, 0, 0, 0] + 1) * 127.5).round().long()
            assert y is not None
            assert torch.equal(y, (shades >= 50).long())
            shown += shades.tolist()
        return shown

    first, second = epoch(0), epoch(1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert epoch(0) == first


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(learning_rate=1e-3, warmup=10, iterations=100, lr_schedule="cosine")
    rates = [learning_rate(config, i) for i in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9]
    assert rates[50] == pytest.approx(5e-4)
    assert 0 < rates[99] < 1e-6
    assert learning_rate(replace(config, warmup=0, lr_schedule="constant"), 99) == 1e-3


class Listener(torch.nn.Module):
    """Answers zero, and remembers what it was asked."""

    class config:
        num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.classes: list[int] = []
        self.t: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.classes += y.tolist()
        self.t += t.tolist()
        return torch.zeros_like(x)


@pytest.mark.parametrize("count", [100, 6])
def test_validation_covers_all_classes_and_t_and_is_repeatable(count: int) -> None:
    network, diffusion = Listener(), GaussianDiffusion(DiffusionConfig())
    images = chosen(many(count), torch.device("cpu"))
    first = validation_loss(network, diffusion, images, "fp32")
    torch.manual_seed(1)
    assert validation_loss(network, diffusion, images, "fp32") == first
    assert first == pytest.approx([1.0] * 4, abs=0.2)  # the mean square of eps
    assert network.classes.count(0) == network.classes.count(1) == 64
    assert [np.histogram(network.t, 4, (0, 1000))[0].tolist()] == [[32] * 4]
    first_class = [t for t, y in zip(network.t, network.classes, strict=True) if y == 0]
    assert min(np.histogram(first_class, 4, (0, 1000))[0]) >= 8  # t does not go with the class


def test_validation_is_by_quartile_of_t_in_the_runs_precision() -> None:
    """A network that answers 10·t/T to noise of variance 1 has a loss of 1 + (10·t/T)²."""
    autocast: list[bool] = []

    class Later(Listener):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            autocast.append(torch.is_autocast_enabled("cpu"))
            return (t / 100).reshape(-1, 1, 1, 1).expand_as(x)

    images, diffusion = chosen(many(100), torch.device("cpu")), GaussianDiffusion(DiffusionConfig())
    found = validation_loss(Later(), diffusion, images, "fp32")
    expected = [1 + ((2.5 * (i + 1)) ** 3 - (2.5 * i) ** 3) / 7.5 for i in range(4)]
    assert found == pytest.approx(expected, rel=0.15)
    assert not any(autocast)
    autocast.clear()
    validation_loss(Later(), diffusion, images, "bf16")
    assert all(autocast)


@pytest.mark.parametrize("log_rate", ["1", "100"])  # found by the log; found by the last checkpoint
def test_weights_that_are_no_numbers_are_not_saved(
    log_rate: str,
    command_line: list[str],
    tiny_options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "learning_rate", lambda _, iteration: math.inf if iteration == 5 else 1e-3)
    assert main([*command_line, "--log_rate", log_rate]) == 2
    assert "training.train: the validation loss is nan at iteration 8" in capsys.readouterr().err
    run = TrainConfig(**tiny_options).run_dir
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-0000004.safetensors"]
    checkpoint.load(run / "best.safetensors")
    assert "NaN" not in (run / "log.jsonl").read_text()


def test_each_step_has_its_learning_rate_and_gradient_limit(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    def spy(optimizer: torch.optim.Optimizer, rate: float, largest_norm: float) -> Tensor:
        seen.append((rate, largest_norm))
        return step(optimizer, rate, largest_norm)

    monkeypatch.setattr(module, "step", spy)
    config = TrainConfig(**tiny_options | {"grad_clip": 0.25, "warmup": 4, "iterations": 3})
    train(config)
    assert seen == [(learning_rate(config, i), 0.25) for i in range(3)]


def test_groups_of_a_single_channel_are_warned_of_once(
    command_line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*words: str) -> list[str]:
        assert main([*command_line, "--iterations", "2", *words]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if "norm_groups" in line]

    sentence = "at 16 channels each group of the norm is a single channel, where the biases of time and class cancel"
    found = warned("--base_channels", "16", "--run_name", "a")
    assert found == [f"training.train: {sentence}: --norm_groups 8 lets the network see them"]
    assert not warned("--base_channels", "16", "--norm_groups", "8", "--run_name", "b")


@pytest.mark.parametrize(
    ("more", "groups"),
    [
        ({"channel_mults": (4, 1)}, 8),  # a level further down
        ({"base_channels": 8}, 4),
        ({"base_channels": 2}, 1),
        ({"norm": "bn"}, None),
        ({"scale_shift_norm": True}, None),  # after the norm
        ({"norm_groups": 8}, None),
        ({"base_channels": 48}, None),
    ],
    ids=str,
)
def test_the_warning_names_groups_that_help(more: Options, groups: int | None) -> None:
    config = TrainConfig(**{"base_channels": 16, "channel_mults": (1,), "attention_resolutions": ()} | more)
    text = single_channel_groups(config.unet((1, 8, 8), 2))
    assert (text is None) if groups is None else (text is not None and f"--norm_groups {groups} " in text)
    if groups:
        assert single_channel_groups(replace(config, norm_groups=groups).unet((1, 8, 8), 2)) is None


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the command ends."""
    capsys.readouterr()
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("training.train: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.slow
def test_what_cannot_be_trained_is_refused_and_leaves_no_run(
    command_line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no folder './nowhere'" in refusal([*command_line, "--dataset", "./nowhere"], capsys)
    assert "only 29 images" in refusal([*command_line, "--batch_size", "30"], capsys)
    assert "--device cuda:99" in refusal([*command_line, "--device", "cuda:99"], capsys)
    Image.new("L", (12, 8)).save(tmp_path / "pictures" / "outside.png")
    assert "the class of every image" in refusal(command_line, capsys)
    (tmp_path / "pictures" / "outside.png").unlink()
    assert main(command_line) == 0
    assert "holds a run already" in refusal(command_line, capsys)
    (tmp_path / "pictures" / "emu").mkdir()
    for name in ("000.png", "001.png"):
        shutil.copyfile(tmp_path / "pictures" / "cat" / name, tmp_path / "pictures" / "emu" / name)
    more = ["--resume", str(tmp_path / "runs" / "run"), "--iterations", "10"]
    assert "has the classes cat, dog, emu, and the run was trained on cat, dog" in refusal(more, capsys)


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="not a git checkout")
def test_the_revision_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}\+?", git_revision() or "")
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
