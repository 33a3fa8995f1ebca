from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.backends.compile import best_precision, compile_for_inference
from model.backends.cpu import PackedUNet
from model.backends.recorded import RecordedNetwork
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from tests.networks import randomised

CPU = torch.device("cpu")
GRID: dict[str, dict[str, Any]] = {
    "as it is": {},
    "unconditional": {"num_classes": None, "null_class": False},
    "class as embedding": {"class_conditioning": "embedding"},
    "class as both": {"class_conditioning": "both"},
    "batch norm": {"norm": "bn"},
    "instance norm": {"norm": "in"},
    "no norm": {"norm": "none"},
    "no norm, scale and shift": {"norm": "none", "scale_shift_norm": True},
    "batch norm, scale and shift": {"norm": "bn", "scale_shift_norm": True},
    "instance norm, scale and shift": {"norm": "in", "scale_shift_norm": True},
    "scale and shift": {"scale_shift_norm": True},
    "residual blocks resample": {"resblock_updown": True},
    "learned variance": {"learned_variance": True},
    "heads": {"num_heads": 3},
    "heads by width": {"head_channels": 4, "attention_levels": (0, 1)},
    "no attention but the middle's": {"attention_levels": ()},
    "relu": {"activation": "relu"},
    "mish": {"activation": "mish"},
    "a size that must be padded": {"image_size": (7, 10), "channel_mults": (1, 2, 2)},
    "colour, wide": {"image_channels": 3, "image_size": (4, 12)},
    "one level": {"channel_mults": (1,), "attention_levels": (0,)},
    "one group": {"norm_groups": 1},
    "a group for each channel": {"norm_groups": 24},
    "padding as in TensorFlow": {"downsample_padding": 0},
    "time by a table": {"time_table": 1000},
    "time scaled, shifted": {"time_scale": 0.5, "time_freq_shift": 1},
    "patches": {"patch_size": 2, "image_channels": 3},
    "patches of a size that must be padded": {"patch_size": 3, "image_size": (7, 10), "learned_variance": True},
    "wavelets": {"patch_size": 2, "haar": True, "image_channels": 3},
    "wavelets that must be padded": {"patch_size": 2, "haar": True, "image_size": (7, 10), "learned_variance": True},
    "deep": {"num_res_blocks": 2, "channel_mults": (1, 1, 2)},
}


def with_statistics(config: UNetConfig) -> UNet:
    """Every weight random, running statistics too; activations stay near 1."""
    network = randomised(config, 0.05 if config.norm == "none" else 0.15)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in network.named_buffers():
        buffer.uniform_(0.5, 1.5, generator=generator) if name.endswith("var") else buffer.normal_(generator=generator)
    return network


def inputs(config: UNetConfig, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *config.image_shape, generator=generator) + 0.5
    t = torch.randint(0, 1000, (n,), generator=generator)
    y = None if config.num_classes is None else torch.arange(n) % (config.num_classes + config.null_class)
    return x, t, y


@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
@pytest.mark.parametrize("small", [0, 1024], ids=["large maps", "small maps"])
@torch.no_grad()
def test_it_computes_what_the_network_computes(
    tiny_config: UNetConfig, changes: dict[str, Any], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.backends.cpu.SMALL_MAP", small)
    config = replace(tiny_config, **changes)
    network = with_statistics(config)
    x, t, y = inputs(config, 5)
    expected = network(x, t, y)
    assert expected.std() > 1e-3
    got = compile_for_inference(network, CPU, "fp32")(x, t, y)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    assert torch.allclose(got, expected, rtol=2e-4, atol=2e-5 * float(expected.abs().max()))
    forward = compile_for_inference(network, CPU, "bf16")
    half = forward(x, t, y)
    assert half.dtype == torch.float32
    assert not torch.equal(half, got)
    assert float((half - expected).std() / expected.std()) < 0.03
    for _ in range(3):
        assert torch.equal(forward(x, t, y), half)
    assert isinstance(forward, RecordedNetwork)
    assert list(forward.recordings) == [x.shape]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_timestep_met_before_and_a_new_one_are_not_mixed_up(
    tiny: UNet, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.backends.cpu.CACHE_BYTES", 2000)  # of a few timesteps: it is emptied on the way
    x, t, y = inputs(tiny.config, 40)
    forward = compile_for_inference(tiny, CPU, precision)
    first = forward(x, t, y)
    assert torch.equal(forward(x, t, y), first)
    assert y is not None
    assert torch.equal(forward(x.flip(0), t.flip(0), y.flip(0)).flip(0), first)


def test_the_network_is_left_as_it_was(tiny: UNet) -> None:
    x, t, y = inputs(tiny.config, 2)
    before = tiny(x, t, y)
    compile_for_inference(tiny, CPU, "bf16")(x, t, y)
    assert torch.equal(tiny(x, t, y), before)


def test_without_onednn_the_same_comes_out(tiny: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, y = inputs(tiny.config, 2)
    packed = compile_for_inference(tiny, CPU, "fp32")
    expected = packed(x, t, y)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    plain = compile_for_inference(tiny, CPU, "fp32")
    assert torch.allclose(plain(x, t, y), expected, atol=1e-5)
    assert isinstance(plain, RecordedNetwork)
    assert isinstance(plain.network, PackedUNet)
    assert not plain.network.init_conv.packed
    assert torch.equal(plain(x, t, y), plain(x, t, y))


def test_another_size_than_the_first_one_is_computed_too(tiny: UNet) -> None:
    """Weights are packed for the first; they have to serve others, if slower."""
    x, t, y = inputs(tiny.config, 2)
    forward = compile_for_inference(tiny, CPU, "fp32")
    for other in (x, x.repeat(1, 1, 2, 3), x[..., :4, :6]):
        expected = tiny(other, t, y)
        assert torch.allclose(
            forward(other, t, y), expected, rtol=2e-4, atol=2e-5 * float(expected.detach().abs().max())
        )


def test_wrong_calls_are_refused(tiny: UNet) -> None:
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, not 'fp16'"):
        compile_for_inference(tiny, CPU, "fp16")
    x, t, _ = inputs(tiny.config, 2)
    with pytest.raises(ValueError, match="needs classes"):
        compile_for_inference(tiny, CPU, "fp32")(x, t, None)


def test_the_best_precision_is_one_that_there_is(tiny: UNet) -> None:
    compile_for_inference(tiny, CPU, best_precision(CPU))


@pytest.mark.parametrize(
    ("amx", "avx512", "channels", "expected"),
    [
        (True, False, 8, "bf16"),
        (False, True, 32, "bf16"),
        (False, True, 16, "fp32"),  # too narrow to gain
        (False, False, 128, "fp32"),
    ],
)
def test_auto_precision_follows_instructions_and_channels(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx512: bool, channels: int, expected: str
) -> None:
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx512)
    assert best_precision(CPU, channels) == expected
