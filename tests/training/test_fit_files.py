"""What a fit finds beside its checkpoint is used where it is its own, else a line says so; nothing there is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.config import UNetConfig
from model.sampling.noise import normals
from model.sampling.schedule import SamplingParams, make_schedule
from tests.networks import randomised
from training import fit_sampler
from training.fitting import tables, teacher
from training.fitting.distance import pixel_distance
from training.fitting.fit import Fit, FitOptions, Pairs, read_state
from training.fitting.solver import LearnedSolver, Target, guided_rows

FEW = ["--images", "8", "--held_out", "4", "--batch_size", "4", "--iterations", "2", "--teacher_steps", "8"]
FEW += ["--precision", "fp32", "--steps", "3"]


@pytest.fixture
def fit(save_checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command; returns what it said on stderr."""
    path = save_checkpoint()

    def run(*words: str, status: int = 0, source: str = path) -> str:
        assert fit_sampler.main([source, *FEW, *words]) == status
        return capsys.readouterr().err

    return run


@pytest.fixture
def path(save_checkpoint: Callable[..., str]) -> Path:
    """The checkpoint that `fit` is of."""
    return Path(save_checkpoint())


def steps_of(path: Path) -> list[int]:
    return [table.steps for table in checkpoint.load(path).config.fitted]


def damaged(path: Path, how: str) -> None:
    if how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "words":
        path.write_text("no state")
    else:
        others: dict[str, Any] = {"list": [1, 2], "empty": {}, "average": {"solver": {}, "average": torch.zeros(3)}}
        torch.save(others[how], path)


def fit_of(steps: int, iterations: int = 1, rate: float = 1e-3) -> Fit:
    """One whose network says that there is no noise."""
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=40))
    timesteps = make_schedule(diffusion, "dpmpp_3m", steps).timesteps
    solver = LearnedSolver(diffusion, Target(SamplingParams("dpmpp_2m", 20), guided_rows(steps, ())), timesteps)
    return Fit(solver, lambda x, t, y: 0 * x, None, pixel_distance, FitOptions(iterations, rate, 2, 0), False)


def run(fit: Fit, path: Path, key: str = "key") -> None:
    noise = normals([1] * 4, range(4), [0] * 4, (1, 4, 4))
    fit.run(Pairs(noise, torch.zeros_like(noise), None), path, key, lambda *_: None)


@pytest.mark.parametrize("how", ["half", "words", "list", "empty", "average"])
def test_a_damaged_state_is_said_and_made_anew(tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    whole, again, state = fit_of(3), fit_of(3), tmp_path / "3-0.pt"
    run(whole, state)
    damaged(state, how)
    run(again, state)
    assert f"{state} is not the state of a fit of 3 steps: this fit begins anew\n" in capsys.readouterr().err
    assert torch.equal(again.average.rows(), whole.average.rows())
    assert read_state(state, whole.solver)["done"][0] == 1
    damaged(state, how)
    with pytest.raises(ValueError, match=r"3-0\.pt is not the state of a fit of 3 steps$"):
        read_state(state, whole.solver)


def test_a_state_of_other_steps_or_options_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "3-0.pt"
    run(fit_of(3), state)
    run(fit_of(3), state)
    assert capsys.readouterr().err == ""
    run(fit_of(3), state, "another")
    assert capsys.readouterr().err == f"{state} is of other options: this fit begins anew\n"
    run(fit_of(4), state, "another")
    assert "is not the state of a fit of 4 steps: this fit begins anew" in capsys.readouterr().err


def test_a_full_disk_is_said_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"^cannot save .*3-0\.pt \(is the disk full\?\)"):
        run(fit_of(3), tmp_path / "3-0.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_fit_on_other_images_begins_anew(fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SPACINGS", ("trailing",))  # or the best may be another, of other held-out images
    fit()
    assert "3-0.pt is of other options: this fit begins anew" in fit("--images", "6")


@pytest.mark.slow
def test_teachers_images_stay_where_tables_came_in(
    fit: Callable[..., str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit()
    made: list[int] = []
    monkeypatch.setattr(teacher, "draw", lambda *args: made.append(1))
    assert "anew" not in fit()
    assert not made
    monkeypatch.undo()
    said = fit("--seed", "1")
    assert "teacher.safetensors is of another teacher: its images are made anew" in said
    (path.with_suffix(".fit") / "teacher.safetensors").write_text("no images")
    assert "teacher.safetensors cannot be read: its images are made anew" in fit("--seed", "1")


@pytest.mark.slow
def test_tables_join_those_that_are_in_the_output(fit: Callable[..., str], path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    fit("--out", str(out))
    fit("--out", str(out), "--steps", "4", "--default", "0")
    assert steps_of(out) == [3, 4]
    assert steps_of(path) == []


@pytest.mark.slow
def test_tables_of_a_fit_that_ended_meanwhile_stay(
    fit: Callable[..., str], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_one, begun = fit_sampler.fit_one, []

    def while_another_ends(*args: Any) -> Any:
        if not begun:
            begun.append(1)
            assert fit_sampler.main([str(path), *FEW, "--steps", "4"]) == 0
        return fit_one(*args)

    monkeypatch.setattr(fit_sampler, "fit_one", while_another_ends)
    fit()
    assert steps_of(path) == [3, 4]


def test_an_output_of_other_weights_is_refused(
    fit: Callable[..., str], path: Path, tmp_path: Path, tiny_config: UNetConfig
) -> None:
    other, weights = tmp_path / "other.safetensors", checkpoint.load(path)
    names, sampling = ("a", "b", "c"), SamplingParams("ddim", 8)
    for network, prediction in ((randomised(tiny_config, seed=7), "eps"), (weights.network, "x0")):
        config = CheckpointConfig(network.config, DiffusionConfig(prediction=prediction), names, sampling)
        checkpoint.save(other, network.state_dict(), config)
        before = other.read_bytes()
        said = fit("--out", str(other), status=2)
        assert (
            said
            == f"training.fit_sampler: {other} is there, with other weights than {path.stem}: choose another --out\n"
        )
        assert other.read_bytes() == before
    other.write_text("my diary")
    assert fit("--out", str(other), status=2).endswith("; choose another --out\n")
    assert other.read_text() == "my diary"
    assert not other.with_suffix(".fit").exists()


def test_a_teacher_that_diverges_is_refused(fit: Callable[..., str], tmp_path: Path, tiny_config: UNetConfig) -> None:
    wild, sampling = tmp_path / "wild.safetensors", SamplingParams("dpmpp_2m", 8, limit="none")
    config = CheckpointConfig(tiny_config, DiffusionConfig(prediction="x0"), ("a", "b", "c"), sampling)
    network = randomised(tiny_config)
    network.out_conv.weight.data *= 1e38
    checkpoint.save(wild, network.state_dict(), config)
    said = fit(source=str(wild), status=2).splitlines()
    assert said[-1] == "training.fit_sampler: the teacher's images are not finite: give --limit clamp"


@pytest.mark.parametrize("rate", ["inf", "nan", "0", "-1", "2"])
def test_a_learning_rate_is_between_0_and_1(rate: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit_sampler.parse(["some", *FEW, "--learning_rate", rate])
    assert "--learning_rate must be between 0 and 1, not " in capsys.readouterr().err


def test_a_classifier_of_other_images_is_refused(fit: Callable[..., str], save_extractor: Callable[..., str]) -> None:
    said = fit("--features", save_extractor(channels=3), status=2)
    assert said.endswith("has images of (channels, height, width) (3, 8, 8), the checkpoint (1, 8, 8)\n")
