from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from training.loop.timestep_sampler import TIMESTEP_SAMPLERS, LossSecondMoment

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


def test_importance_waits_until_every_timestep_has_its_history() -> None:
    sampler = LossSecondMoment(T, history=2)
    sampler.update(torch.arange(T).repeat(2)[:-1], torch.arange(2 * T - 1).double())
    assert (sampler.probabilities() == 1 / T).all()
    sampler.update(torch.tensor([T - 1]), torch.tensor([9.0]))
    assert (sampler.probabilities() != 1 / T).any()


def test_a_draw_at_the_edge_of_a_timestep_is_that_timestep() -> None:
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-24])
    for draw in (lambda u: LossSecondMoment(4).draw(u)[0], lambda u: TIMESTEP_SAMPLERS["uniform"](u, 4)):
        assert draw(edges).tolist() == [0, 1, 2, 3, 3]


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


def test_a_loss_that_is_not_finite_is_left_out() -> None:
    sampler, other = filled(), filled()
    sampler.update(torch.tensor([3, 4, 3]), torch.tensor([torch.nan, 2.0, torch.inf]))
    other.update(torch.tensor([4]), torch.tensor([2.0]))
    assert torch.equal(sampler.probabilities(), other.probabilities())
    assert torch.equal(sampler.state_dict()["counts"][:T], other.state_dict()["counts"][:T])


def rank(number: int, store: str, out: str) -> None:
    """One of two processes: its half of every batch."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=2)
    sampler = LossSecondMoment(T, history=3)
    for t, losses in batches():
        half = slice(number * len(t) // 2, (number + 1) * len(t) // 2)
        sampler.update(t[half], losses[half])
    torch.save(sampler.state_dict(), f"{out}/{number}.pt")
    dist.destroy_process_group()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(TIMESTEP_SAMPLERS["uniform"](u(40, i), T), u(40, 100 + i)) for i in range(6)]


@pytest.mark.slow
def test_two_ranks_remember_what_one_process_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(rank, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    alone = LossSecondMoment(T, history=3)
    for t, losses in batches():
        alone.update(t, losses)
    assert (alone.probabilities() != 1 / T).any()
    for number in range(2):
        resumed = LossSecondMoment(T, history=3)
        resumed.load_state_dict(torch.load(tmp_path / f"{number}.pt", weights_only=True))
        assert torch.equal(resumed.probabilities(), alone.probabilities())
