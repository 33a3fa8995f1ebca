"""Muon for inner kernels, AdamW for the rest: the same rules as for the other optimizers."""

import copy
import io
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.nn.unet import UNet
from training.loop.muon import MuonAdamW
from training.loop.optimizer import load_state, make_optimizer, step
from training.run.config import TrainConfig


def with_gradient(network: UNet, seed: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def muon(network: UNet, weight_decay: float = 0.0) -> MuonAdamW:
    optimizer = make_optimizer(network, TrainConfig(optimizer="muon", weight_decay=weight_decay))
    assert isinstance(optimizer, MuonAdamW)
    return optimizer


def tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x.detach().clone()]
    return [t for value in (x.values() if isinstance(x, dict) else ()) for t in tensors(value)]


def snapshot(network: UNet, optimizer: MuonAdamW) -> list[Tensor]:
    state = optimizer.state_dict()
    return [*tensors(network.state_dict()), *tensors(state["adamw"]["state"]), *tensors(state["muon"]["state"])]


def is_inner(name: str) -> bool:
    return name.endswith("weight") and not any(word in name for word in ("norm", "class", "init_conv", "out_conv"))


def test_inner_kernels_are_muons_and_the_rest_is_adamws(tiny: UNet) -> None:
    optimizer, before = muon(tiny), {name: p.detach().clone() for name, p in tiny.named_parameters()}
    with_gradient(tiny)
    step(optimizer, 0.01)
    for name, p in tiny.named_parameters():
        moved = (p.detach() - before[name]).flatten(1) if p.ndim > 1 else (p.detach() - before[name])[None]
        if is_inner(name):  # an orthogonal matrix, nearly, of RMS 0.2 times the rate
            values = torch.linalg.svdvals(moved / (0.01 * 0.2 * max(moved.shape) ** 0.5))
            assert values.min() > 0.6, name
            assert values.max() < 1.3, name
        else:  # the first step of Adam is the gradient's sign
            torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_a_step_is_that_of_torchs_two_with_clipping(is_on_cpu: bool, tiny: UNet) -> None:
    other = copy.deepcopy(tiny)
    optimizer = muon(tiny, 0.1)
    optimizer._is_on_cpu = is_on_cpu
    names = dict(other.named_parameters())
    kernels = {name: torch.nn.Parameter(p.detach().flatten(1)) for name, p in names.items() if is_inner(name)}
    decaying = [names["init_conv.weight"], names["out_conv.weight"]]
    rest = [p for name, p in names.items() if not is_inner(name) and all(p is not q for q in decaying)]
    references = [
        torch.optim.Muon(kernels.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": decaying, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.02),
    ]
    for seed in range(3):
        with_gradient(tiny, seed)
        with_gradient(other, seed)
        step(optimizer, 0.02, 0.5)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        for name, kernel in kernels.items():
            kernel.grad = names[name].grad.flatten(1)
        for reference in references:
            reference.step()
    assert all(parameter.grad is None for parameter in tiny.parameters())
    for name, p in tiny.named_parameters():
        expected = kernels[name].view(p.shape) if name in kernels else names[name]
        torch.testing.assert_close(p, expected, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize("first", [True, False], ids=["at the first step", "later"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["out_conv.bias", "mid.0.conv_1.weight"])
@pytest.mark.parametrize("is_on_cpu", [True, False])
def test_a_gradient_not_finite_changes_nothing(
    is_on_cpu: bool, where: str, poison: float, first: bool, tiny: UNet
) -> None:
    optimizer = muon(tiny, 0.1)
    optimizer._is_on_cpu = is_on_cpu  # elsewhere nothing waits to see whether it is finite
    if not first:
        with_gradient(tiny)
        assert step(optimizer, 1e-3, 1.0)
    before = snapshot(tiny, optimizer)
    with_gradient(tiny, 1)
    gradient = tiny.get_parameter(where).grad
    assert gradient is not None
    gradient.view(-1)[0] = poison
    assert not step(optimizer, 1e-3, 1.0)
    after = snapshot(tiny, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after[: len(before)], strict=True) if a.any())
    with_gradient(tiny, 2)
    assert step(optimizer, 1e-3, 1.0)
    assert not any(torch.equal(a, b) for a, b in zip(after, snapshot(tiny, optimizer), strict=True))


def test_a_state_goes_on_exactly(tiny: UNet) -> None:
    optimizer, other = muon(tiny), copy.deepcopy(tiny)
    with_gradient(tiny)
    step(optimizer, 0.01)
    file = io.BytesIO()
    torch.save({"network": tiny.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["network"])
    resumed = muon(other)
    resumed.load_state_dict(state["optimizer"])
    for network, one in ((tiny, optimizer), (other, resumed)):
        with_gradient(network, 1)
        step(one, 0.01)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), other.parameters(), strict=True))


def test_a_state_goes_on_where_kernels_lie_otherwise(tiny: UNet) -> None:
    optimizer, other = muon(tiny), copy.deepcopy(tiny).to(memory_format=torch.channels_last)
    for seed in range(3):
        with_gradient(tiny, seed)
        step(optimizer, 0.01)
    other.load_state_dict(tiny.state_dict())
    resumed = muon(other)
    load_state(resumed, copy.deepcopy(optimizer.state_dict()))
    back = muon(tiny)
    load_state(back, copy.deepcopy(resumed.state_dict()))
    for one, again in zip(
        tensors(optimizer.state_dict()["muon"]["state"]), tensors(back.state_dict()["muon"]["state"]), strict=True
    ):
        assert torch.equal(one, again)
    before = copy.deepcopy(tiny)
    for network, one in ((tiny, optimizer), (other, resumed)):
        with_gradient(network, 0, 1e-3)  # the momentum says where to go
        step(one, 0.01)
    for (name, p), q, start in zip(tiny.named_parameters(), other.parameters(), before.parameters(), strict=True):
        moves = [(x - start).flatten() for x in (p, q)]
        assert torch.cosine_similarity(*moves, dim=0) > 0.99, name


def test_a_state_whose_momenta_are_matrices_goes_on(tiny: UNet) -> None:
    tiny.to(memory_format=torch.channels_last)
    optimizer, resumed = muon(tiny), muon(tiny)
    with_gradient(tiny)
    step(optimizer, 0.01)
    state = copy.deepcopy(optimizer.state_dict())
    state["muon"] = copy.deepcopy(optimizer._muon.state_dict())
    assert all(moments["momentum_buffer"].dim() == 2 for moments in state["muon"]["state"].values())
    load_state(resumed, state)
    for one, again in zip(snapshot(tiny, optimizer), snapshot(tiny, resumed), strict=True):
        assert torch.equal(one, again)


def test_weights_of_layers_decay_and_no_others() -> None:
    network = nn.Sequential(OrderedDict(init_conv=nn.Conv2d(3, 8, 3), mid=nn.Conv2d(8, 8, 3), dense=nn.Linear(8, 8)))
    optimizer = MuonAdamW(network, 0.1, 0.5)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    before = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for (name, p), start in zip(network.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, start * (0.95 if name.endswith("weight") else 1.0), msg=name)


def test_a_kernel_with_channels_last_steps_as_one_without() -> None:
    networks = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)).to(memory_format=layout)
        optimizer = MuonAdamW(network, 0.1)
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
        for _ in range(3):
            network(torch.ones(2, 3, 8, 8)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        networks.append(network)
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=0)
