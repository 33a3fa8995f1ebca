"""Noise levels with a normal logarithm, and the timesteps that are nearest to them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion
from training.loop.lognormal import LogNormal
from training.loop.state import TrainState
from training.run.config import TrainConfig

COSINE = GaussianDiffusion(DiffusionConfig(schedule="cosine")).alphas_cumprod
LOGS = 0.5 * np.log((1 - COSINE) / COSINE)


def u(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.5, 0.3)])
def test_the_logarithms_of_the_noise_levels_are_normal(mean: float, std: float) -> None:
    logs = LOGS[LogNormal(COSINE, mean, std).draw(u(100_000)).numpy()]
    assert logs.mean() == pytest.approx(mean, abs=0.01)
    assert logs.std() == pytest.approx(std, rel=0.01)
    assert (logs < mean - std).mean() == pytest.approx(0.1587, abs=0.005)


def test_each_is_the_nearest_timestep_to_its_draw() -> None:
    places = (np.arange(5000) + 0.5) / 5000
    wanted = -1.2 + 1.2 * torch.special.ndtri(torch.from_numpy(places)).numpy()
    nearest = np.abs(LOGS[None] - wanted[:, None]).argmin(1)
    assert LogNormal(COSINE, -1.2, 1.2).draw(torch.full((5000,), 0.5)).tolist() == nearest.tolist()


def test_a_batch_is_stratified() -> None:
    draws = LogNormal(COSINE, -1.2, 1.2)
    for seed in range(5):
        t = draws.draw(u(64, seed))
        assert t.dtype == torch.int64
        assert (t.diff() >= 0).all()
        middle = int(draws.draw(torch.full((1,), 0.5)))
        assert (t <= middle).sum() in (32, 33)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_ends_of_the_draws_are_timesteps(zero_snr: bool) -> None:
    config = DiffusionConfig(num_timesteps=50, schedule="cosine", prediction="v", zero_terminal_snr=zero_snr)
    draws = LogNormal(GaussianDiffusion(config).alphas_cumprod, 3.0, 4.0)
    assert draws.draw(torch.zeros(1)).tolist() == [0]
    assert draws.draw(torch.full((1,), 1 - 2**-24)).tolist() == [48 if zero_snr else 49]


def test_the_option_reaches_the_steps(tiny_options: dict[str, Any]) -> None:
    options = tiny_options | {"timestep_sampler": "lognormal", "schedule": "cosine", "noise_mean": 0.0}
    state = TrainState(TrainConfig(**options), (1, 8, 12), 2, torch.device("cpu"))
    t, weights = state.timesteps(torch.full((1001,), 0.5))
    assert weights.tolist() == [1] * 1001
    assert math.isclose(LOGS[t[500]], 0, abs_tol=0.01)  # the median
