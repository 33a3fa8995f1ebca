"""Schedules that are learned begin as a solver's, come nearer to their teacher, and stay with their checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.distilled import Distilled
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import COEFFICIENTS, SamplingParams, make_schedule
from model.sampling.step import sample
from model.sigmas import Sigmas
from tests.networks import randomised
from training import fit_sampler
from training.fitting import fit as fitting
from training.fitting.solver import LearnedSolver, Target, guided_rows
from training.fitting.tables import chosen_default

PREDICTIONS = ("eps", "v", "x0")
FEW = ["--images", "16", "--held_out", "8", "--batch_size", "4", "--learning_rate", "0.005", "--precision", "fp32"]
FEW += ["--teacher_steps", "12"]


def solver_for(diffusion: GaussianDiffusion, steps: int, g: float = 2.0, guided: tuple[int, ...] = ()) -> LearnedSolver:
    timesteps = make_schedule(diffusion, "dpmpp_3m", steps, spacing="leading").timesteps + 7
    params = SamplingParams("dpmpp_2m", 50, guidance_scale=g)
    return LearnedSolver(diffusion, Target(params, guided_rows(steps, guided)), timesteps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [2, 3, 5, 16])
def test_a_fit_begins_as_dpmpp_3m(steps: int, prediction: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(schedule="cosine", prediction=prediction))
    solver = solver_for(diffusion, steps, guided=tuple(range(steps)))
    plain = make_schedule(diffusion, "dpmpp_3m", steps, spacing="leading", guidance_scale=2.0)
    shifted = replace(plain, timesteps=plain.timesteps + 7)
    expected = make_schedule_at(diffusion, shifted.timesteps)
    found = solver.rows().detach().numpy()
    assert np.allclose(solver.told().detach(), shifted.timesteps)
    for name in ("a", "b", "c", "d", "p", "q", "s"):
        column = COEFFICIENTS.index(name)
        assert np.allclose(found[:, column], expected[name], rtol=1e-6, atol=1e-9), name
    assert (found[:, COEFFICIENTS.index("g")] == 2).all()


def make_schedule_at(diffusion: GaussianDiffusion, timesteps: np.ndarray) -> dict[str, Any]:
    """By `model.sampling.solvers`."""
    from model.sampling.solvers import SAMPLERS

    p, q = diffusion.x0_coefficients(timesteps)
    return {"p": p, "q": q, "s": 0.0} | SAMPLERS["dpmpp_3m"](diffusion, timesteps, 0.0, "fixed_small")


def test_a_table_is_carried_out_as_its_solver_was(tiny: UNet) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=400, prediction="v"))
    solver = solver_for(diffusion, 5, guided=(1, 2))
    generator = torch.Generator().manual_seed(0)
    for parameter in solver.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    x_T, y = normals([3, 3], [0, 1], [0, 0], (1, 8, 8)), torch.tensor([0, 2])
    expected = solver(tiny, x_T, y, 3).detach()
    assert torch.equal(solver(tiny, x_T, y, 3, recompute=True).detach(), expected)
    table = solver.table("0" * 64, {})
    assert table.nfe == solver.target.nfe == 7
    got = sample(tiny, table.schedule(), (1, 8, 8), [3, 3], [0, 1], [0, 2], null_class=3)
    assert torch.allclose(got, expected, atol=1e-5)
    assert sum(g != 1 for g in table.schedule().table[:, 0]) == 2


def test_every_number_of_a_schedule_learns(tiny: UNet) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=400, prediction="v"))
    solver = solver_for(diffusion, 4, guided=(1,))
    x_T, y = normals([3] * 4, range(4), [0] * 4, (1, 8, 8)), torch.tensor([0, 2, 1, 1])
    solver(tiny, x_T, y, 3).square().mean().backward()
    for parameter in solver.parameters():
        assert parameter.grad is not None
    assert (solver.theta.grad != 0).all()
    assert (solver.offset.grad != 0).all()
    assert (solver.guidance.grad != 0).tolist() == [False, True, False, False]
    names = ("a", "b", "c", "d", "s")  # of states that are not there in the first rows nothing is learned
    missing = {(0, "c"), (0, "d"), (0, "s"), (1, "d")}
    learned = {(i, name): bool(solver.corrections.grad[i, k] != 0) for i in range(4) for k, name in enumerate(names)}
    assert {place for place, is_learned in learned.items() if not is_learned} == missing


def fitted(path: str, *words: str, **kinds: Any) -> dict[str, Any]:
    """Runs the command and returns its report."""
    assert fit_sampler.main([path, *FEW, *words]) == 0
    report: dict[str, Any] = json.loads(Path(path).with_suffix(".fit.json").read_text())
    return report


@pytest.mark.slow
def test_fitted_tables_are_nearer_to_the_teacher_and_the_default(
    save_checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint()
    weights = checkpoint.load(path).network.state_dict()
    report = fitted(path, "--steps", "3,4", "--guidance_scale", "1.5", "--iterations", "25")
    found = checkpoint.load(path)
    assert all(torch.equal(weights[name], tensor) for name, tensor in found.network.state_dict().items())
    assert [(t.steps, t.nfe, t.guidance_scale) for t in found.config.fitted] == [(3, 6, 1.5), (4, 8, 1.5)]
    for result, table in zip(report["fits"], found.config.fitted, strict=True):
        assert result["after"] < min(result["before"].values())
        assert table.provenance["distance_after"] == result["after"]
    assert found.config.sampling == SamplingParams("fitted", 4, 0.0, 1.5)
    printed = capsys.readouterr()
    assert "default: fitted, 4 steps" in printed.out
    assert "4 steps, 8 rows an image" in printed.err
    again = fitted(path, "--steps", "5", "--guidance_scale", "1.5", "--iterations", "1", "--guided", "1")
    assert [(t.steps, t.nfe) for t in checkpoint.load(path).config.fitted] == [(3, 6), (4, 8), (5, 6)]
    assert again["teacher"]["sampler"] == "dpmpp_2m", "and not a table"
    begun = ["--steps", "3", "--guidance_scale", "1.5", "--start", str(Path(path).with_suffix(".fit"))]
    more = fitted(path, *begun, "--iterations", "1", "--learning_rate", "1e-9")
    assert more["fits"][0]["after"] == pytest.approx(report["fits"][0]["after"], rel=1e-3)
    assert fit_sampler.main([path, *FEW, *begun[:-1], "no/such"]) == 2
    assert "--start no/such has no fit of 3 steps: no 3-….pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], SamplingParams("fitted", 6, 0.0, 2.0)),
        (["--default", "4"], SamplingParams("ddim", 2, 0.5, 1.0)),  # no better than dpmpp_2m
        (["--default", "0", "--set_spacing"], SamplingParams("ddim", 2, 0.5, 1.0, spacing="logsnr")),
        (["--set_spacing"], SamplingParams("fitted", 6, 0.0, 2.0, spacing="logsnr")),
    ],
)
def test_the_default_is_what_measures_better(
    save_checkpoint: Callable[..., str], words: list[str], expected: SamplingParams
) -> None:
    results = [
        {"steps": 4, "before": {"trailing": 0.2, "logsnr": 0.3}, "spacing": "trailing", "after": 0.2},
        {"steps": 6, "before": {"trailing": 0.2, "logsnr": 0.1}, "spacing": "logsnr", "after": 0.09},
    ]
    args = fit_sampler.parse(["some", "--steps", "4,6", *words])
    teacher = SamplingParams("dpmpp_2m", 20, guidance_scale=2.0)
    assert chosen_default(checkpoint.load(save_checkpoint()).config.sampling, results, teacher, args) == expected


@pytest.mark.slow
def test_with_many_steps_a_fit_is_no_worse_than_its_teacher(save_checkpoint: Callable[..., str]) -> None:
    report = fitted(save_checkpoint(), "--steps", "20", "--teacher_steps", "40", "--iterations", "2")
    fit = report["fits"][0]
    assert fit["after"] <= fit["start"] < 4 * min(fit["before"].values())


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_table(
    save_checkpoint: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, words = save_checkpoint(), ["--steps", "3", "--iterations", "6"]
    monkeypatch.setattr(fitting, "SAVE_S", 0)
    steps, step = [], fitting.Fit.step

    def dies(self: fitting.Fit, pairs: fitting.Pairs) -> float:
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(self.iteration)
        return step(self, pairs)

    def run(name: str) -> int:
        return fit_sampler.main([path, *FEW, *words, "--out", str(tmp_path / f"{name}.safetensors")])

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Fit, "step", dies)
        assert run("killed") == 130
    assert not (tmp_path / "killed.safetensors").exists()
    assert steps == [0, 1, 2, 3]
    assert run("killed") == run("whole") == 0
    one, other = (checkpoint.load(tmp_path / f"{name}.safetensors").config.fitted[0] for name in ("whole", "killed"))
    assert (one.rows, one.timesteps) == (other.rows, other.timesteps)


@pytest.mark.slow
def test_a_fit_by_features_uses_the_classifier(
    save_checkpoint: Callable[..., str], save_extractor: Callable[..., str]
) -> None:
    path, judge = save_checkpoint(), save_extractor()
    report = fitted(path, "--steps", "3", "--iterations", "2", "--features", judge)
    pixels = fitted(path, "--steps", "3", "--iterations", "2")
    assert report["features"] == Path(judge).name
    assert report["fits"][0]["before"] != pixels["fits"][0]["before"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "1"], "--steps must be from 2 to 999, not 1"),
        (["--steps", "1000"], "--steps must be from 2 to 999, not 1000"),
        (["--steps", "12"], "--steps 12 is not fewer than the teacher's 12: give --teacher_steps"),
        (["--steps", "3", "--guided", "1"], "--guided says how many rows are guided: it needs a --guidance_scale"),
        (["--steps", "3", "--out", "no/such.safetensors"], "there is no folder no"),
        (["--steps", "3", "--out", "x.pt"], "ends with .safetensors"),
        (["--steps", "3", "--features", "none.safetensors"], "none.safetensors"),
        (["--steps", "3", "--guidance_interval", "0.5,0.2"], "guidance_interval"),
        (["--steps", "3", "--teacher_steps", "2000"], "--teacher_steps must be between 1 and 1000, not 2000"),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_a_sentence(
    save_checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    path = Path(save_checkpoint())
    before = path.read_bytes()
    assert fit_sampler.main([str(path), *FEW, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("training.fit_sampler: ")
    assert sentence in error
    assert error.count("\n") == 1
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]


def test_a_network_without_a_null_class_is_not_guided(
    save_checkpoint: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(UNetConfig(1, (8, 8), 12, (1,), 1, (), 16))
    assert fit_sampler.main([path, *FEW, "--steps", "3", "--guidance_scale", "2"]) == 2
    assert "guidance_scale must be 1: the checkpoint has no null class" in capsys.readouterr().err


def test_a_bundled_checkpoint_needs_another_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit_sampler.main(["mnist", *FEW, "--steps", "3"]) == 2
    assert "is bundled, and SHA256SUMS has its hash: give --out FILE" in capsys.readouterr().err


def test_a_student_is_not_fitted(
    save_checkpoint: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint.load(save_checkpoint())
    config = replace(source.config, distilled=Distilled(1.0, 2, "sfd", "0" * 64))
    checkpoint.save(tmp_path / "student.safetensors", source.network.state_dict(), config)
    assert fit_sampler.main([str(tmp_path / "student.safetensors"), *FEW, "--steps", "3"]) == 2
    assert "student is distilled, and has its own few steps: fit its teacher" in capsys.readouterr().err


def test_levels_of_noise_are_not_fitted(
    save_checkpoint: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint.load(save_checkpoint())
    diffusion = DiffusionConfig(schedule="karras", prediction="edm", sigmas=Sigmas())
    checkpoint.save(
        tmp_path / "edm.safetensors", source.network.state_dict(), replace(source.config, diffusion=diffusion)
    )
    assert fit_sampler.main([str(tmp_path / "edm.safetensors"), *FEW, "--steps", "3"]) == 2
    assert "edm has EDM's levels of noise, to which no table can be fitted here" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("how", ["unlimited eps", "zero terminal SNR", "learned variance", "unconditional", "dynamic"])
def test_every_kind_of_checkpoint_can_be_fitted(tiny_config: UNetConfig, tmp_path: Path, how: str) -> None:
    diffusion, unet, limit = DiffusionConfig(schedule="cosine", prediction="v"), tiny_config, "clamp"
    if how == "unlimited eps":
        diffusion, limit = DiffusionConfig(schedule="cosine"), "none"
    elif how == "zero terminal SNR":
        diffusion = replace(diffusion, zero_terminal_snr=True)
    elif how == "learned variance":
        diffusion, unet = replace(diffusion, variance="learned_range"), replace(unet, learned_variance=True)
    elif how == "unconditional":
        unet = replace(unet, num_classes=None, null_class=False)
    else:
        limit = "dynamic"
    names = ("a", "b", "c")[: unet.num_classes or 0]
    config = CheckpointConfig(unet, diffusion, names, SamplingParams("dpmpp_2m", 12, limit=limit))
    path = tmp_path / "some.safetensors"
    checkpoint.save(path, randomised(unet, std=0.05).state_dict(), config)
    report = fitted(str(path), "--steps", "3", "--iterations", "2", "--images", "4", "--held_out", "4")
    assert np.isfinite(report["fits"][0]["after"])
    found = checkpoint.load(path)
    assert found.config.fitted[0].limit == limit
    y = None if unet.num_classes is None else [0]
    schedule = found.config.fitted[0].schedule()
    assert torch.isfinite(sample(found.network, schedule, unet.image_shape, [1], [0], y, null_class=3)).all()
