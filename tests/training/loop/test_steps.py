"""Single steps of a run: their gradient, however the batch is divided, and steps that must not count."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.unet import UNet
from training.data.batches import Batch, Batches
from training.loop.backward import backward
from training.loop.state import TrainState
from training.loop.timestep_sampler import LossSecondMoment
from training.run.config import TrainConfig
from training.train import main, train

pytestmark = pytest.mark.usefixtures("quick")

Options = dict[str, Any]
ReadLog = Callable[[Path], list[dict[str, Any]]]


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(variance: str, tiny: UNet) -> None:
    torch.manual_seed(0)
    network = UNet(replace(tiny.config, dropout=0.0, learned_variance=variance == "learned_range"))
    torch.nn.init.normal_(network.out_conv.weight, std=0.1)
    diffusion = GaussianDiffusion(DiffusionConfig(variance=variance))
    batch = Batch(torch.rand(8, 1, 8, 8), torch.arange(8) % 3, torch.randn(8, 1, 8, 8), torch.rand(8))
    t, weights = (batch.u * 1000).long(), torch.linspace(0.5, 2, 8)

    def gradient(accumulate: int) -> tuple[Tensor, list[Tensor]]:
        network.zero_grad()
        losses = backward(network, diffusion, batch, t, weights, TrainConfig(batch_size=8, accumulate=accumulate))
        return losses, [p.grad.clone() for p in network.parameters() if p.grad is not None]

    losses, whole = gradient(1)
    reference = copy.deepcopy(network)
    reference.zero_grad()
    (diffusion.loss(reference, batch.x0, batch.y, t, batch.noise) * weights).mean().backward()
    for a, b in zip(whole, reference.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad)
    for parts in (2, 4, 8):
        again, divided = gradient(parts)
        torch.testing.assert_close(again, losses)
        for a, b in zip(divided, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_weights_of_importance_sampling_reach_the_gradient(tiny: UNet) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    batch = Batch(torch.rand(2, 1, 8, 8), torch.zeros(2).long(), torch.randn(2, 1, 8, 8), torch.rand(2))

    def gradient(weights: list[float]) -> Tensor:
        tiny.zero_grad()
        backward(tiny, diffusion, batch, torch.tensor([3, 700]), torch.tensor(weights), TrainConfig(batch_size=2))
        assert tiny.out_conv.weight.grad is not None
        return tiny.out_conv.weight.grad.clone()

    torch.testing.assert_close(gradient([3.0, 0.5]), 3 * gradient([1.0, 0.0]) + 0.5 * gradient([0.0, 1.0]))


def test_bf16_is_computed_in_bfloat16_and_nearly_the_same(tiny: UNet) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig())
    batch = Batch(torch.rand(2, 1, 8, 8), torch.zeros(2).long(), torch.randn(2, 1, 8, 8), torch.rand(2))
    seen: list[torch.dtype] = []

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        out: Tensor = tiny(x, t, y)
        seen.append(out.dtype)
        return out

    losses = [
        backward(network, diffusion, batch, torch.tensor([3, 700]), torch.ones(2), TrainConfig(precision=precision))
        for precision in ("fp32", "bf16")
    ]
    assert seen == [torch.float32, torch.bfloat16]
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)


def test_accumulated_parts_are_as_small_as_asked_for(tiny: UNet) -> None:
    sizes: list[int] = []

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        sizes.append(len(x))
        out: Tensor = tiny(x, t, y)
        return out

    batch = Batch(torch.rand(8, 1, 8, 8), torch.zeros(8).long(), torch.randn(8, 1, 8, 8), torch.rand(8))
    config = TrainConfig(batch_size=8, accumulate=4)
    backward(network, GaussianDiffusion(DiffusionConfig()), batch, torch.arange(8), torch.ones(8), config)
    assert sizes == [2, 2, 2, 2]


def test_the_seed_makes_the_first_weights(tiny_options: Options) -> None:
    def weights(seed: int) -> Tensor:
        config = TrainConfig(**tiny_options | {"seed": seed})
        return TrainState(config, (1, 8, 12), 2, torch.device("cpu")).network.init_conv.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_timesteps_drawn_by_importance_have_its_weights(tiny_options: Options) -> None:
    config = TrainConfig(
        **tiny_options | {"timestep_sampler": "loss_second_moment", "schedule": "cosine", "num_timesteps": 4}
    )
    state = TrainState(config, (1, 8, 12), 2, torch.device("cpu"))
    assert state.importance is not None
    for _ in range(10):
        state.importance.update(torch.arange(4), torch.tensor([8.0, 4.0, 2.0, 1.0]))
    t, weights = state.timesteps(torch.linspace(0, 0.999, 400))
    assert t.bincount(minlength=4).argmax() == 0
    assert float(weights.mean()) == pytest.approx(1, abs=0.02)  # so that the loss stays what it is
    assert weights[t == 0].max() < weights[t == 3].min()


def test_importance_remembers_unweighted_losses(
    tiny_options: Options, monkeypatch: pytest.MonkeyPatch, read_log: ReadLog
) -> None:
    losses: list[Tensor] = []
    remembered: list[Tensor] = []
    loss = GaussianDiffusion.loss

    def spy(self: GaussianDiffusion, *arguments: Any) -> Tensor:
        found = loss(self, *arguments)
        if found.requires_grad:
            losses.append(found.detach())
        return found

    monkeypatch.setattr(GaussianDiffusion, "loss", spy)
    monkeypatch.setattr(LossSecondMoment, "draw", lambda self, u: ((u * 1000).long(), torch.full_like(u, 7.0)))
    monkeypatch.setattr(LossSecondMoment, "update", lambda self, t, losses: remembered.append(losses))
    run = train(TrainConfig(**tiny_options | {"timestep_sampler": "loss_second_moment", "iterations": 2}))
    assert len(losses) == 2
    assert read_log(run)[0]["train_loss"] == pytest.approx(7 * float(torch.stack(losses).mean()))
    assert all(torch.equal(a, b) for a, b in zip(losses, remembered, strict=True))


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the batches of these iterations such that losses and gradients are not finite."""
    clean = Batches.__getitem__

    def spoil(*iterations: int, value: float = float("nan")) -> None:
        def batch(self: Batches, iteration: int) -> Batch:
            found = clean(self, iteration)
            if iteration in iterations:
                found.x0[0, 0, 0, 0] = value
            return found

        monkeypatch.setattr(Batches, "__getitem__", batch)

    return spoil


EVERY_STATE: Options = {
    "norm": "bn",
    "schedule": "cosine",
    "num_timesteps": 4,
    "timestep_sampler": "loss_second_moment",
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "ema_decay": (0.9, 0.5),
    "accumulate": 2,
}


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_batch_changes_nothing_and_is_counted(
    value: float, poison: Callable[..., None], tiny_options: Options, read_log: ReadLog
) -> None:
    options = tiny_options | EVERY_STATE | {"checkpoint_rate": 1, "keep": 20, "log_rate": 4}
    poison(3, value=value)
    run = train(TrainConfig(**options))
    before, after, later = (torch.load(run / f"state-000000{i}.pt", weights_only=True) for i in (3, 4, 5))

    def flat(x: Any) -> list[Tensor]:
        if isinstance(x, Tensor):
            return [x]
        return [t for value in (x.values() if isinstance(x, dict) else ()) for t in flat(value)]

    for part in ("network", "ema", "importance"):
        assert all(torch.equal(a, b) for a, b in zip(flat(before[part]), flat(after[part]), strict=True)), part
        assert not all(torch.equal(a, b) for a, b in zip(flat(after[part]), flat(later[part]), strict=True)), part
    moments = [flat(state["optimizer"]["state"]) for state in (before, after, later)]
    assert all(torch.equal(a, b) for a, b in zip(moments[0], moments[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(moments[1], moments[2], strict=True))
    assert before["ema"]["updates"] == after["ema"]["updates"] == later["ema"]["updates"] - 1
    assert [line["skipped_steps"] for line in read_log(run) if "skipped_steps" in line] == [1, 1]
    assert all(line.get("train_loss", 1.0) > 0 for line in read_log(run))


@pytest.mark.slow
def test_steps_that_are_all_skipped_end_the_run(
    poison: Callable[..., None], command_line: list[str], tiny_options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(*range(5, 1000))
    words = ["--iterations", "1000", "--checkpoint_rate", "1000", "--log_rate", "35"]
    assert main([*command_line, *words]) == 2
    err = capsys.readouterr().err
    assert "training.train: the gradient was not finite in the last 100 steps, at iteration 105" in err
    assert not list(TrainConfig(**tiny_options).run_dir.glob("state-*"))


@pytest.mark.slow
def test_an_interval_without_a_step_that_counts_has_no_loss(
    poison: Callable[..., None], tiny_options: Options, read_log: ReadLog
) -> None:
    poison(2, 3)
    lines = read_log(train(TrainConfig(**tiny_options)))
    found = [(line["train_loss"] is None, line["skipped_steps"]) for line in lines if "train_loss" in line]
    assert found == [(False, 0), (True, 2), (False, 2), (False, 2)]


@pytest.mark.slow
def test_averages_keep_their_horizon_whatever_the_update_rate(tiny_options: Options) -> None:
    config = TrainConfig(**tiny_options | {"ema_decay": (0.9, 0.5), "ema_update_rate": 3})
    state = TrainState(config, (1, 8, 12), 2, torch.device("cpu"))
    assert list(state.ema.averages) == [0.9**3, 0.5**3]
    run = train(config)
    assert torch.load(run / "state-0000008.pt", weights_only=True)["ema"]["updates"] == 2


@pytest.mark.parametrize("sampler", ["uniform", "antithetic", "stratified"])
def test_timesteps_are_those_of_the_sampler_and_weigh_the_same(sampler: str, tiny_options: Options) -> None:
    config = TrainConfig(**tiny_options | {"timestep_sampler": sampler})
    t, weights = TrainState(config, (1, 8, 12), 2, torch.device("cpu")).timesteps(torch.full((4,), 0.2))
    expected = {"uniform": [200] * 4, "antithetic": [200, 200, 799, 799], "stratified": [50, 300, 550, 800]}
    assert t.tolist() == expected[sampler]
    assert weights.tolist() == [1] * 4
