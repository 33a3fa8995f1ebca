"""EDM's networks give EDM's own denoised images, and end where its samplers do; what is none of them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.convert.exporter import main as export_main
from model.convert.importer import import_path, load_weights, main
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import COEFFICIENTS, InvalidSamplingParams, SamplingSchedule, make_schedule
from model.sampling.step import sample
from model.sigmas import Sigmas
from tests.fixtures import expected, theirs

ADM = "edm/adm.pt"
LABELS = [1, 3]


@pytest.fixture(scope="module")
def found() -> Imported:
    return import_path(theirs(ADM), Flags())


@pytest.fixture(scope="module")
def network(found: Imported) -> UNet:
    assert isinstance(found.unet, UNetConfig)
    network = UNet(found.unet).eval().requires_grad_(False)
    network.load_state_dict(found.weights)
    return network


def column(schedule: SamplingSchedule, name: str) -> Any:
    return schedule.table[:, COEFFICIENTS.index(name)]


def sampled(network: UNet, found: Imported, sampler: str, steps: int) -> Tensor:
    schedule = make_schedule(GaussianDiffusion(found.diffusion), sampler, steps, limit="none")
    return sample(network, schedule, (3, 8, 8), [5, 5], [0, 1], LABELS, dtype=torch.float32)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def x0_errors(found: Imported, network: UNet) -> list[float]:
    """At every state of their trajectory."""
    errors = []
    theirs_ = {name: torch.from_numpy(array) for name, array in expected(ADM).items()}
    schedule = make_schedule(GaussianDiffusion(found.diffusion), "ddim", 18, limit="none")
    levels = Sigmas().levels(18)[::-1]
    places = [int(np.abs(np.log(levels / sigma)).argmin()) for sigma in theirs_["sigma"].flatten().tolist()]
    assert len(places) == 35
    assert sorted(set(places)) == list(range(18))
    for x, out, place in zip(theirs_["x"], theirs_["out"], places, strict=True):
        state = x / float(np.sqrt(levels[place] ** 2 + 0.25))
        t = torch.full((2,), schedule.timesteps[place].item())
        x0 = column(schedule, "p")[place] * state - column(schedule, "q")[place] * network(
            state, t, torch.tensor(LABELS)
        )
        errors.append(relative_error(x0, out))
    return errors


def euler_error(found: Imported, network: UNet) -> float:
    """Of the images of 18 steps, from the same noise."""
    return relative_error(sampled(network, found, "ddim", 18), torch.from_numpy(expected(ADM)["euler"]))


@pytest.mark.slow
def test_x0_is_theirs_at_every_state_of_their_trajectory(found: Imported, network: UNet) -> None:
    assert max(x0_errors(found, network)) <= 1e-5


def test_euler_ends_where_theirs_does(found: Imported, network: UNet) -> None:
    assert euler_error(found, network) <= 2e-6


@pytest.mark.slow
def test_the_multistep_solver_ends_near_heun(found: Imported, network: UNet) -> None:
    heun = torch.from_numpy(expected(ADM)["heun"])
    off = {s: float((sampled(network, found, s, 18) - heun).abs().max()) for s in ("ddim", "dpmpp_2m")}
    assert off["dpmpp_2m"] <= 0.02 * heun.abs().max()
    assert off["dpmpp_2m"] < off["ddim"]


def test_one_step_is_the_denoised_start(found: Imported, network: UNet) -> None:
    total = float(np.hypot(80, 0.5))
    noise = 80 / total * normals([5, 5], [0, 1], [0, 0], (3, 8, 8))
    f = network(noise, torch.full((2,), float(np.log(80) / 4)), torch.tensor(LABELS))
    d = 0.25 / total * noise + 80 * 0.5 / total * f
    assert torch.allclose(sampled(network, found, "ddim", 1), d, atol=1e-6)


def test_the_schedule_is_theirs(found: Imported) -> None:
    schedule = make_schedule(GaussianDiffusion(found.diffusion), "dpmpp_3m", 5)
    sigmas = [80.0, 80.0, 0.002]
    assert schedule.timesteps[[0, 0, -1]] == pytest.approx([np.log(sigma) / 4 for sigma in sigmas])
    assert column(schedule, "a")[-1] == 0
    assert column(schedule, "b")[-1] == pytest.approx(1)
    with pytest.raises(InvalidSamplingParams, match="spacing means nothing here"):
        make_schedule(GaussianDiffusion(found.diffusion), "ddim", 5, spacing="leading")


def test_a_checkpoint_of_it_loads_again(found: Imported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.safetensors"
    assert main([str(theirs(ADM)), str(path), "--class_names", "a,b,c,d"]) == 0
    said = capsys.readouterr().err
    assert "levels of noise from 0.002 to 80, prediction edm, no limit of x0 (EDM's preconditioning)" in said
    assert "sigma_data 0.5: EDMPrecond's own, no augmentation" in said
    loaded = checkpoint.load(path)
    assert loaded.config.diffusion == found.diffusion
    assert (loaded.config.sampling.sampler, loaded.config.sampling.steps) == ("dpmpp_2m", 18)
    assert export_main([str(path), str(tmp_path / "folder")]) == 2
    assert "EDM's levels of noise" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "flags", "why"),
    [
        (lambda s: {k: v for k, v in s.items() if "out_conv" not in k}, {}, "a SongUNet of NVlabs/edm (DDPM++"),
        (lambda s: s | {"u": torch.zeros(3)}, {}, "an iDDPMPrecond"),
        (lambda s: {k: v for k, v in s.items() if "4x4_in0.qkv" not in k}, {}, "in0.qkv.weight' is missing"),
        (lambda s: {k: v for k, v in s.items() if "enc.8x8_block" not in k}, {}, "equal numbers of residual blocks"),
        (lambda s: {k: s[k] for k in s if "map" in k or "out_conv" in k}, {}, "is missing"),
        (None, {"schedule": "linear"}, "--schedule linear contradicts the file, which has karras"),
        (None, {"image_size": (16, 16)}, "--image_size 16,16 contradicts"),
        (None, {"num_heads": 2}, "--num_heads 2 contradicts"),
        (None, {"weights": "raw"}, "--weights means nothing"),
        (None, {"num_timesteps": 1000}, "--num_timesteps means nothing for levels of noise"),
        (None, {"variance": "fixed_small"}, "--variance means nothing for levels of noise"),
        (None, {"trained_betas": (0.1, 0.2)}, "--trained_betas means nothing for levels of noise"),
    ],
)
def test_other_files_are_refused_by_name(change: Any, flags: dict[str, Any], why: str, tmp_path: Path) -> None:
    state = load_weights(theirs(ADM))
    torch.save(change(state) if change else state, tmp_path / "x.pt")
    with pytest.raises(UnsupportedCheckpointError) as refused:
        import_path(tmp_path / "x.pt", Flags(**flags))
    assert why in str(refused.value)


def test_pickles_with_code_are_told_how_to_be_converted(tmp_path: Path) -> None:
    (tmp_path / "edm.pkl").write_bytes(b"\x80\x03ctorch_utils.persistence\n_reconstruct_persistent_obj\nq\x00.")
    with pytest.raises(UnsupportedCheckpointError, match=r"torch\.save\(net\.state_dict\(\), 'network\.pt'\)"):
        import_path(tmp_path / "edm.pkl", Flags())


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"prediction": "edm"}, "prediction must be one of eps, x0, v"),
        ({"schedule": "karras", "prediction": "v"}, "schedule must be one of"),
        ({"schedule": "karras", "prediction": "v", "sigmas": {}}, "prediction must be one of edm"),
        ({"schedule": "linear", "prediction": "edm", "sigmas": {}}, "schedule must be one of karras"),
        ({"schedule": "karras", "prediction": "edm", "sigmas": {"sigma_min": 0}}, "must be positive numbers"),
        ({"schedule": "karras", "prediction": "edm", "sigmas": {"sigma_min": 99}}, "out of range"),
        ({"schedule": "karras", "prediction": "edm", "sigmas": {"rho": float("nan")}}, "must be positive numbers"),
        ({"schedule": "karras", "prediction": "edm", "sigmas": {}, "zero_terminal_snr": True}, "zero_terminal_snr"),
    ],
)
def test_levels_of_noise_that_make_no_sense_are_refused(fields: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        DiffusionConfig(**fields)


def test_levels_of_noise_are_not_trained(found: Imported) -> None:
    diffusion, x, t = GaussianDiffusion(found.diffusion), torch.zeros(1, 3, 8, 8), torch.tensor([5])
    for act in (lambda: diffusion.target(x, t, x), lambda: diffusion.predicted_x0(x, x, t)):
        with pytest.raises(ValueError, match="sampled here, not trained"):
            act()
