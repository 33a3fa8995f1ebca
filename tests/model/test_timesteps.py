from __future__ import annotations

import numpy as np
import pytest
import torch

from model.timesteps import TIMESTEP_SAMPLERS, LossSecondMoment

T = 20


def u(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
def test_every_timestep_is_as_likely_as_any_other(name: str) -> None:
    t = torch.cat([TIMESTEP_SAMPLERS[name](u(25, seed), T) for seed in range(2000)])
    assert t.dtype == torch.int64
    assert torch.bincount(t, minlength=T).double().div(len(t)).sub(1 / T).abs().max() < 0.004
    edge = TIMESTEP_SAMPLERS[name](torch.full((5,), 1 - 2**-24), T)
    assert edge.max() == T - 1


def test_antithetic_draws_mirror_and_stratified_ones_spread() -> None:
    t = TIMESTEP_SAMPLERS["antithetic"](u(7), T)
    assert torch.equal(t[4:], T - 1 - t[:3])
    assert TIMESTEP_SAMPLERS["stratified"](u(T), T).tolist() == list(range(T))


def filled() -> LossSecondMoment:
    sampler = LossSecondMoment(T, history=3)
    t = torch.arange(T).repeat(5)
    sampler.update(t, torch.arange(5 * T).double())
    return sampler


def test_importance_follows_the_last_losses_of_each_timestep() -> None:
    sampler = LossSecondMoment(T, history=3)
    assert torch.equal(sampler.draw(u(50))[0], TIMESTEP_SAMPLERS["uniform"](u(50), T))
    assert torch.equal(sampler.draw(u(50))[1], torch.ones(50))
    sampler = filled()  # five losses came in one batch for each t, of which the last three count
    second = np.sqrt(np.mean([(np.arange(T) + k * T) ** 2.0 for k in (2, 3, 4)], axis=0))
    expected = 0.999 * second / second.sum() + 0.001 / T
    np.testing.assert_allclose(sampler.probabilities(), expected, rtol=1e-12)
    sampler.update(torch.tensor([4, 4]), torch.tensor([1.0, 2.0]))
    second[4] = np.sqrt((84.0**2 + 1 + 4) / 3)
    np.testing.assert_allclose(sampler.probabilities(), 0.999 * second / second.sum() + 0.001 / T, rtol=1e-12)


def test_importance_weights_keep_the_mean() -> None:
    sampler = filled()
    t, weights = sampler.draw(u(200_000))
    value = torch.arange(T).float() ** 2
    assert float((weights * value[t]).mean()) == pytest.approx(float(value.mean()), rel=0.01)


def test_importance_resumes_exactly() -> None:
    sampler, resumed = filled(), LossSecondMoment(T, history=3)
    resumed.load_state_dict(sampler.state_dict())
    for one in (sampler, resumed):
        one.update(torch.tensor([1, 7]), torch.tensor([0.5, 9.0]))
    assert torch.equal(sampler.probabilities(), resumed.probabilities())
