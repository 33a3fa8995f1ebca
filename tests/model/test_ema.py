from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from model.ema import EMA
from model.unet import UNet


def perturb(network: nn.Module, seed: int) -> None:
    """Stands for a training step: every weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_the_average_is_the_formula_with_its_warm_up(tiny: UNet, decay: float) -> None:
    ema = EMA(tiny, decay)
    expected = {name: p.detach().double().clone() for name, p in tiny.named_parameters()}
    for k in range(1, 31):
        perturb(tiny, k)
        ema.update()
        d = min(decay, (1 + k) / (10 + k))
        for name, p in tiny.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * p.detach().double()
    assert ema.weights.keys() == expected.keys()
    for name, average in ema.weights.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_the_average_can_be_loaded_into_the_network(tiny: UNet) -> None:
    ema = EMA(tiny, 0.5)
    perturb(tiny, 0)
    ema.update()
    tiny.load_state_dict(ema.weights)
    assert all(torch.equal(ema.weights[name], p) for name, p in tiny.named_parameters())


def test_the_average_is_no_part_of_the_network_or_its_optimiser(tiny: UNet) -> None:
    before = copy.deepcopy(tiny.state_dict())
    ema = EMA(tiny, 0.9)
    storages = {p.data_ptr() for p in tiny.parameters()}
    assert all(not average.requires_grad for average in ema.weights.values())
    assert all(average.data_ptr() not in storages for average in ema.weights.values())
    ema.weights["out_conv.bias"].add_(1)
    ema.update()
    assert tiny.state_dict().keys() == before.keys()
    assert all(torch.equal(tiny.state_dict()[name], weight) for name, weight in before.items())


def test_the_average_follows_an_optimiser(tiny: UNet) -> None:
    ema = EMA(tiny, 0.0)
    optimizer = torch.optim.Adam(tiny.parameters(), lr=0.1)
    tiny(torch.ones(1, 1, 8, 8), torch.tensor([3]), torch.tensor([1])).square().sum().backward()
    optimizer.step()
    ema.update()
    assert all(torch.equal(ema.weights[name], p) for name, p in tiny.named_parameters())


def test_a_half_precision_network_is_averaged_in_float32(tiny: UNet) -> None:
    ema = EMA(tiny.bfloat16(), 0.0)
    perturb(tiny, 0)
    ema.update()
    assert all(average.dtype == torch.float32 for average in ema.weights.values())
    assert all(torch.equal(ema.weights[name], p.float()) for name, p in tiny.named_parameters())


def test_a_resumed_average_continues_exactly(tiny: UNet, tmp_path: Path) -> None:
    ema = EMA(tiny, 0.9)
    for k in range(5):
        perturb(tiny, k)
        ema.update()
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = copy.deepcopy(tiny)
    resumed = EMA(other, 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for k in range(5, 10):
        for network, average in ((tiny, ema), (other, resumed)):
            perturb(network, k)
            average.update()
    assert resumed.updates == ema.updates == 10
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in ema.weights.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_that_is_none_is_refused(tiny: UNet, decay: float) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        EMA(tiny, decay)
