import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.nn.unet import UNet
from training.loop.optimizer import load_state, make_optimizer, step
from training.loop.rollback import rollback
from training.run.config import TrainConfig


def with_gradient(network: UNet, seed: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def snapshot(network: UNet, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return [tensor.detach().clone() for tensor in (*network.parameters(), *state)]


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("largest_norm", [0.0, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(
    poison: float, largest_norm: float, name: str, tiny: UNet
) -> None:
    optimizer = make_optimizer(tiny, TrainConfig(optimizer=name, weight_decay=0.1 * (name == "adamw")))
    with_gradient(tiny)
    assert step(optimizer, 1e-3, largest_norm)
    before = snapshot(tiny, optimizer)
    with_gradient(tiny, 1)
    assert tiny.out_conv.bias.grad is not None
    tiny.out_conv.bias.grad[0] = poison
    assert not step(optimizer, 1e-3, largest_norm)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(tiny, optimizer), strict=True))
    with_gradient(tiny, 2)
    assert step(optimizer, 1e-3, largest_norm)
    assert not any(torch.equal(a, b) for a, b in zip(before, snapshot(tiny, optimizer), strict=True))


@pytest.mark.parametrize("scale", [1e-6, 1.0])  # below the limit; far beyond it
@pytest.mark.parametrize("largest_norm", [0.0, 0.5])
def test_a_step_is_that_of_torch_with_its_clipping(largest_norm: float, scale: float, tiny: UNet) -> None:
    other = copy.deepcopy(tiny)
    optimizer = make_optimizer(tiny, TrainConfig())
    reference = torch.optim.Adam(other.parameters(), lr=0.123)
    for seed in range(3):
        with_gradient(tiny, seed, scale)
        with_gradient(other, seed, scale)
        step(optimizer, 1e-3, largest_norm)
        if largest_norm:
            nn.utils.clip_grad_norm_(other.parameters(), largest_norm)
        for group in reference.param_groups:
            group["lr"] = 1e-3
        reference.step()
    assert all(parameter.grad is None for parameter in tiny.parameters())
    for a, b in zip(tiny.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_weights_decay_but_biases_norms_and_embeddings_do_not(tiny: UNet) -> None:
    optimizer = make_optimizer(tiny, TrainConfig(optimizer="adamw", weight_decay=0.5))
    before = {name: parameter.detach().clone() for name, parameter in tiny.named_parameters()}
    for parameter in tiny.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(optimizer, 0.1)
    for name, parameter in tiny.named_parameters():
        is_weight = name.endswith("weight") and "norm" not in name and "class" not in name
        expected = before[name] * (0.95 if is_weight else 1)
        torch.testing.assert_close(parameter.detach(), expected, msg=name)
    (decaying, others) = optimizer.param_groups
    assert decaying["params"]
    assert others["params"]


def test_one_group_without_decay_so_that_old_states_load(tiny: UNet) -> None:
    old: dict[str, Any] = torch.optim.Adam(tiny.parameters(), fused=True).state_dict()
    for name in ("adam", "adamw"):
        make_optimizer(tiny, TrainConfig(optimizer=name)).load_state_dict(old)


def test_what_a_skipped_step_changed_is_put_back() -> None:
    tensors = [torch.ones(2), torch.ones(3, dtype=torch.int64)]
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.add_(1)
    tensors[0][0] = torch.nan
    rollback(tensors, before, torch.tensor(False))
    assert all(torch.equal(tensor, old) for tensor, old in zip(tensors, before, strict=True))
    tensors[0].add_(1)
    rollback(tensors, before, torch.tensor(True))
    assert tensors[0].tolist() == [2, 2]


def test_moments_lie_in_memory_as_their_parameters_do(tiny: UNet) -> None:
    """A state that a GPU saved with its channels last goes on elsewhere as one that was saved there."""
    other = copy.deepcopy(tiny).to(memory_format=torch.channels_last)
    optimizers = [make_optimizer(network, TrainConfig()) for network in (tiny, other)]
    with_gradient(tiny)
    step(optimizers[0], 1e-3)
    other.load_state_dict(tiny.state_dict())
    load_state(optimizers[1], copy.deepcopy(optimizers[0].state_dict()))
    for a, b in zip(tiny.parameters(), other.parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            moments = [optimizers[0].state[a][name], optimizers[1].state[b][name]]
            assert torch.equal(*moments)
            assert moments[1].stride() == b.stride()
    third = make_optimizer(tiny, TrainConfig())
    load_state(third, copy.deepcopy(optimizers[1].state_dict()))
    for network, optimizer in ((tiny, third), (other, optimizers[1])):
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        step(optimizer, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), other.parameters(), strict=True))
