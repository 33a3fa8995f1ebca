from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from model.nn.config import UNetConfig
from model.nn.ema import EMA, move_together, power_exponent
from model.nn.unet import UNet


def perturb(network: nn.Module, seed: int) -> None:
    """Stands for a training step: every weight moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("on", ["cpu", "gpu"])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.9999])
def test_the_average_is_the_formula_with_its_warm_up(
    tiny: UNet, decay: float, on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on == "gpu":  # its way to do it, which runs anywhere
        monkeypatch.setattr("model.nn.ema.move", move_together)
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


def test_several_decays_are_each_as_if_alone_and_resume(tiny: UNet, tmp_path: Path) -> None:
    together, alone = EMA(tiny, 0.999, 0.5), [EMA(tiny, 0.999), EMA(tiny, 0.5)]
    for k in range(20):
        perturb(tiny, k)
        for ema in (together, *alone):
            ema.update()
    assert list(together.averages) == [0.999, 0.5]
    assert together.weights is together.averages[0.999]
    for ema in alone:
        (decay,) = ema.averages
        assert all(torch.equal(together.averages[decay][name], weight) for name, weight in ema.weights.items())
    assert not torch.equal(together.averages[0.999]["out_conv.bias"], together.averages[0.5]["out_conv.bias"])
    torch.save(together.state_dict(), tmp_path / "ema.pt")
    resumed = EMA(tiny, 0.999, 0.5)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    assert resumed.updates == 20
    for decay, average in together.averages.items():
        assert all(torch.equal(resumed.averages[decay][name], weight) for name, weight in average.items())
    with pytest.raises(ValueError, match=r"0\.999, 0\.5"):
        EMA(tiny, 0.9).load_state_dict(together.state_dict())


def test_the_statistics_of_a_batch_norm_are_copied(tiny_config: UNetConfig) -> None:
    network = UNet(replace(tiny_config, norm="bn"))
    ema = EMA(network, 0.9999)
    network(torch.randn(4, 1, 8, 8) + 3, torch.arange(4), torch.arange(4))
    perturb(network, 0)
    ema.update()
    statistics = dict(network.named_buffers())
    assert statistics
    assert statistics["downs.0.norm_1.running_mean"].any()
    assert all(torch.equal(ema.weights[name], buffer) for name, buffer in statistics.items())
    UNet(network.config).load_state_dict(ema.weights)


def test_an_update_that_does_not_count_changes_nothing(tiny_config: UNetConfig) -> None:
    network = UNet(replace(tiny_config, norm="bn"))
    ema, other = EMA(network, 0.9999, 0.5), EMA(network, 0.9999, 0.5)

    for k, counts in enumerate([True, False, False, True]):
        perturb(network, k)
        for buffer in network.buffers():
            buffer.add_(1)
        ema.update(torch.tensor(counts))
        if counts:
            other.update()
        assert ema.updates == other.updates
        for decay, average in other.averages.items():
            assert all(torch.equal(ema.averages[decay][name], tensor) for name, tensor in average.items())


@pytest.mark.parametrize("decays", [(), (0.9, 0.9), (0.9, 1.5)])
def test_decays_that_are_none_are_refused(tiny: UNet, decays: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        EMA(tiny, *decays)


@pytest.mark.slow
@pytest.mark.parametrize("width", [0.05, 0.1, 0.15])
def test_a_power_profile_has_the_width_it_is_named_after(width: float) -> None:
    """What weighs how much is seen by averaging the moment, and its square: their deviation is the profile's."""
    moment, steps = nn.Module(), 4000
    moment.register_parameter("x", nn.Parameter(torch.zeros(2)))
    ema = EMA(moment, 0.5, powers=(width,))
    for k in range(1, steps + 1):
        moment.x.data.copy_(torch.tensor([k / steps, (k / steps) ** 2]))
        ema.update()
    mean, square = ema.averages[f"power-{width}"]["x"].tolist()
    assert (square - mean**2) ** 0.5 == pytest.approx(width, rel=0.01)
    gamma = power_exponent(width)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_power_profiles_resume_exactly_beside_the_decays(tiny: UNet, tmp_path: Path) -> None:
    ema, plain = EMA(tiny, 0.9, powers=(0.05, 0.1)), EMA(tiny, 0.9)
    for k in range(5):
        perturb(tiny, k)
        counts = torch.tensor(k != 3)
        ema.update(counts)
        plain.update(counts)
        if k == 0:  # the first forgets the random start
            assert torch.equal(ema.averages["power-0.1"]["out_conv.bias"], tiny.out_conv.bias)
    assert all(torch.equal(plain.weights[name], weight) for name, weight in ema.weights.items())
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    other = copy.deepcopy(tiny)
    resumed = EMA(other, 0.9, powers=(0.05, 0.1))
    state = torch.load(tmp_path / "ema.pt", weights_only=True)
    assert list(state["averages"]) == ["0.9", "power-0.05", "power-0.1"]
    assert state["power_updates"] == 4
    resumed.load_state_dict(state)
    for network, average in ((tiny, ema), (other, resumed)):
        perturb(network, 9)
        average.update()
    for key, average in ema.averages.items():
        assert all(torch.equal(resumed.averages[key][name], weight) for name, weight in average.items())
    with pytest.raises(ValueError, match=r"power-0\.05"):
        plain.load_state_dict(ema.state_dict())


def test_averages_that_begin_trained_stay_until_they_learn(tiny: UNet) -> None:
    ema, start = EMA(tiny, 0.999, 0.9, powers=(0.1,)), copy.deepcopy(tiny.state_dict())
    perturb(tiny, 0)
    ema.begin_with(start)
    for average in ema.averages.values():
        assert all(torch.equal(average[name], weight) for name, weight in start.items())
    ema.update()
    for decay in (0.999, 0.9):
        for name, weight in ema.averages[decay].items():
            torch.testing.assert_close(weight, start[name].lerp(tiny.state_dict()[name], 1 - decay))


@pytest.mark.parametrize("powers", [(0.0,), (0.3,), (0.1, 0.1), (float("nan"),)])
def test_widths_that_no_power_profile_has_are_refused(tiny: UNet, powers: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ema_power"):
        EMA(tiny, 0.9, powers=powers)
