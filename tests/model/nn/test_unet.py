from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.nn.config import ACTIVATION_NAMES, NORM_NAMES, UNetConfig
from model.nn.layers import ACTIVATIONS, NORMS, Attention, attention, patchify, time_embedding, unpatchify
from model.nn.unet import UNet
from tests.networks import randomised


def inputs(n: int, channels: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, height, width, generator=generator), torch.arange(n) * 100


@pytest.mark.parametrize(
    ("num_classes", "null_class", "parameters"),
    # google/ddpm-cifar10-32 has the first count; a class is one row in each block: 4 896 numbers in all
    [(None, False, 35_746_307), (10, False, 35_796_227), (10, True, 35_801_219)],
)
def test_the_default_network_has_the_known_number_of_parameters(
    num_classes: int | None, null_class: bool, parameters: int
) -> None:
    with torch.device("meta"):
        network = UNet(UNetConfig(num_classes=num_classes, null_class=null_class))
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (28, 28), (7, 10), (1, 1)])
def test_every_image_shape_comes_back(tiny_config: UNetConfig, channels: int, height: int, width: int) -> None:
    config = replace(tiny_config, image_channels=channels, channel_mults=(1, 2, 2))
    x, t = inputs(2, channels, height, width)
    assert UNet(config)(x, t, torch.tensor([0, 2])).shape == x.shape
    assert replace(config, image_size=(height, width)).image_shape == (channels, height, width)


def test_a_size_that_does_not_divide_is_padded_below_and_right(tiny: UNet) -> None:
    x, t = inputs(2, 1, 7, 5)
    y = torch.tensor([0, 2])
    padded = torch.zeros(2, 1, 8, 6)
    padded[:, :, :7, :5] = x
    torch.testing.assert_close(tiny(x, t, y), tiny(padded, t, y)[:, :, :7, :5])


def test_a_fresh_network_says_zero(tiny_config: UNetConfig) -> None:
    x, t = inputs(2, 1, 8, 8)
    assert not UNet(tiny_config)(x, t, torch.tensor([0, 1])).any()


def test_fresh_blocks_and_attention_change_nothing(tiny_config: UNetConfig) -> None:
    network = UNet(tiny_config)
    x, emb = torch.randn(2, 12, 8, 8), torch.randn(2, 16)
    assert torch.equal(network.downs[0](x, emb, torch.tensor([0, 1])), x)
    assert torch.equal(Attention(tiny_config, 12)(x), x)


def test_the_output_depends_on_class_timestep_and_image(tiny: UNet) -> None:
    x, _ = inputs(1, 1, 8, 8)
    t, y = torch.tensor([10]), torch.tensor([0])
    out = tiny(x, t, y)
    others = [tiny(x, t, torch.tensor([k])) for k in (1, 2, 3)]  # 3 is the null class
    others += [tiny(x, t + 300, y), tiny(x + 0.1 * x.roll(1, 2), t, y)]
    assert all((out - other).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize(("base_channels", "norm_groups"), [(8, 4), (16, 8), (32, 8), (48, 32)])
def test_time_and_class_reach_every_block(tiny_config: UNetConfig, base_channels: int, norm_groups: int) -> None:
    # A norm of single channels (`in`, or as many groups as channels) would undo their biases
    config = replace(tiny_config, base_channels=base_channels, norm_groups=norm_groups)
    block = UNet(config).eval().downs[0]
    torch.nn.init.normal_(block.conv_2.weight)
    x, emb = torch.randn(1, base_channels, 8, 8), torch.randn(1, 16)
    out = block(x, emb, torch.tensor([0]))
    assert (block(x, emb, torch.tensor([1])) - out).abs().max() > 1e-3
    assert (block(x, emb + 1, torch.tensor([0])) - out).abs().max() > 1e-3


def test_rows_of_a_batch_do_not_mix(tiny: UNet) -> None:
    x, t = inputs(3, 1, 8, 8)
    y = torch.tensor([0, 3, 1])
    alone = [tiny(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(tiny(x, t, y), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_dropout_is_for_training_only(tiny: UNet) -> None:
    x, t = inputs(1, 1, 8, 8)
    y = torch.tensor([0])
    assert torch.equal(tiny(x, t, y), tiny(x, t, y))
    tiny.train()
    assert not torch.equal(tiny(x, t, y), tiny(x, t, y))


def test_labels_are_required_exactly_by_conditional_networks(tiny_config: UNetConfig) -> None:
    x, t = inputs(1, 1, 8, 8)
    with pytest.raises(ValueError, match="needs classes"):
        UNet(tiny_config)(x, t)
    unconditional = UNet(replace(tiny_config, num_classes=None, null_class=False))
    with pytest.raises(ValueError, match="takes none"):
        unconditional(x, t, torch.tensor([0]))
    assert unconditional(x, t).shape == x.shape


def test_a_bfloat16_network_is_near_the_float32_one(tiny: UNet) -> None:
    x, t = inputs(2, 1, 8, 8)
    y = torch.tensor([0, 1])
    exact = tiny(x, t, y)
    out = tiny.bfloat16()(x.bfloat16(), t, y)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("norm", ["gn", "bn", "in", "none"])
@pytest.mark.parametrize("base_channels", [2, 10, 14, 48])
def test_every_norm_takes_any_number_of_channels(tiny_config: UNetConfig, norm: str, base_channels: int) -> None:
    network = UNet(replace(tiny_config, norm=norm, base_channels=base_channels, channel_mults=(1, 3)))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t = inputs(2, 1, 8, 8)
    out = network(x, t, torch.tensor([0, 1]))
    assert out.isfinite().all()
    out.square().mean().backward()
    assert network.init_conv.weight.grad is not None
    assert network.init_conv.weight.grad.any()


def test_instance_norm_is_a_group_norm_of_single_channels() -> None:
    norm, other = NORMS["in"](6, UNetConfig()), torch.nn.GroupNorm(6, 6)
    other.load_state_dict(norm.state_dict())
    x = 3 + torch.randn(2, 6, 5, 4, dtype=torch.float64)  # in float32 rounding passes the bound for some draws
    torch.testing.assert_close(norm.double()(x), other.double()(x), rtol=0, atol=1e-6)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unconditional": {"num_classes": None, "null_class": False},
    "embedding": {"class_conditioning": "both", "image_size": (7, 10)},
    "adm": {"scale_shift_norm": True, "resblock_updown": True, "head_channels": 4, "learned_variance": True},
    "batch norm, table": {"norm": "bn", "time_table": 1000, "downsample_padding": 0},
}


@pytest.fixture(params=KINDS)
def network(tiny_config: UNetConfig, request: pytest.FixtureRequest) -> UNet:
    return randomised(replace(tiny_config, **KINDS[request.param]))


def arguments(network: UNet) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x, t = inputs(3, 1, *network.config.image_size)
    return x, t, None if network.config.num_classes is None else torch.tensor([0, 2, 1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("kind", ["embedding", "adm"])
@torch.no_grad()
def test_it_compiles_as_one_graph(tiny_config: UNetConfig, kind: str) -> None:
    torch.compiler.reset()
    network = randomised(replace(tiny_config, **KINDS[kind]))
    x, t, y = arguments(network)
    with torch.autocast("cpu", torch.bfloat16, enabled=network.config.scale_shift_norm):
        compiled = torch.compile(network, fullgraph=True, backend="eager")(x, t, y)
        torch.testing.assert_close(compiled, network(x, t, y))


@torch.no_grad()
def test_channels_last_says_the_same(network: UNet) -> None:
    x, t, y = arguments(network)
    plain = network(x, t, y)
    last = network.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, y)
    torch.testing.assert_close(last, plain, rtol=0, atol=1e-5 * float(plain.abs().max()))


@torch.no_grad()
def test_autocast_is_near_float32_and_does_not_round_time(network: UNet) -> None:
    x, t, y = arguments(network)
    exact, emb = network(x, t, y), network.embed(t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, t, y)
        assert torch.equal(network.embed(t, y), emb)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().max() < 0.06 * exact.abs().max()
    assert (out - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_gradients_reach_every_parameter(tiny: UNet) -> None:
    x, t = inputs(4, 1, 8, 8)
    tiny(x, t, torch.arange(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in tiny.parameters())


def test_time_is_embedded_as_sines_then_cosines() -> None:
    dim, t = 6, torch.tensor([0, 1, 999])
    expected = [[f(step * 10000 ** (-i / 3)) for f in (math.sin, math.cos) for i in range(3)] for step in (0, 1, 999)]
    found = time_embedding(t, dim)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)
    assert torch.equal(time_embedding(t.bfloat16()[:2], dim), found[:2])


def test_attention_is_softmax_over_all_positions_with_a_residual() -> None:
    torch.manual_seed(0)
    attention = Attention(UNetConfig(), 8)
    torch.nn.init.normal_(attention.out.weight)
    x = torch.randn(2, 8, 3, 5)
    h = attention.norm(x)
    q, k, v = torch.nn.functional.conv2d(h, attention.qkv.weight, attention.qkv.bias).flatten(2).chunk(3, dim=1)
    weights = torch.einsum("nci,ncj->nij", q, k).div(math.sqrt(8)).softmax(dim=2)
    mixed = torch.einsum("nij,ncj->nci", weights, v).reshape_as(x)
    torch.testing.assert_close(attention(x), x + attention.out(mixed), rtol=1e-4, atol=1e-5)


def test_attention_is_at_the_levels_asked_for_and_in_the_middle(tiny_config: UNetConfig) -> None:
    config = replace(tiny_config, channel_mults=(1, 1, 1), num_res_blocks=2, attention_levels=(0, 2))
    names = {name.split(".attention")[0] for name, _ in UNet(config).named_parameters() if ".attention" in name}
    # downs: level 0 = 0, 1; 2 halves; level 1 = 3, 4; 5 halves; level 2 = 6, 7. ups: level 2 = 0 … 2, 0 = 8 … 10.
    assert names == {f"downs.{i}" for i in (0, 1, 6, 7)} | {f"ups.{i}" for i in (0, 1, 2, 8, 9, 10)} | {"mid.0"}


@pytest.mark.parametrize(
    "values",
    [
        {"image_channels": 0},
        {"image_size": (0, 32)},
        {"image_size": (32,)},
        {"image_size": (32, 32, 3)},
        {"image_size": (32, 5000)},
        {"image_size": (32.0, 32.0)},
        {"base_channels": 0},
        {"base_channels": 33},
        {"base_channels": 64.0},
        {"base_channels": 10**6},
        {"channel_mults": ()},
        {"channel_mults": (1, 0)},
        {"channel_mults": (1, 1.5, 2)},
        {"channel_mults": (1,) * 9},
        {"num_res_blocks": 0},
        {"attention_levels": (4,)},
        {"attention_levels": (-1,)},
        {"time_emb_dim": 0},
        {"num_classes": 0},
        {"num_classes": -1},
        {"null_class": True},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"dropout": math.nan},
        {"patch_size": 0},
        {"patch_size": 17},
        {"patch_size": 2.0},
        {"haar": True},
        {"haar": 0.5, "patch_size": 2},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_network_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        UNetConfig(**values)


@torch.no_grad()
def test_patches_are_channels_of_a_network_for_smaller_images(tiny_config: UNetConfig) -> None:
    network = randomised(replace(tiny_config, image_size=(12, 8), patch_size=2, learned_variance=True))
    inner = UNet(replace(tiny_config, image_channels=4, image_size=(6, 4), learned_variance=True)).eval()
    inner.load_state_dict(network.state_dict())
    x, t = inputs(2, 1, 12, 8)
    y = torch.tensor([0, 2])
    squares = torch.stack([x[:, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)
    out, expected = network(x, t, y), inner(squares, t, y)
    assert out.shape == (2, 2, 12, 8)
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        torch.testing.assert_close(out[:, :, i::2, j::2], expected[:, [k, 4 + k]])
    assert network.config.multiple == 4
    assert network(x[:, :, :11, :5], t, y).shape == (2, 2, 11, 5)


@torch.no_grad()
def test_wavelets_are_channels_of_a_network_for_smaller_images(tiny_config: UNetConfig) -> None:
    network = randomised(replace(tiny_config, image_size=(12, 8), patch_size=2, haar=True))
    inner = UNet(replace(tiny_config, image_channels=4, image_size=(6, 4))).eval()
    inner.load_state_dict(network.state_dict())
    x, t = inputs(2, 1, 12, 8)
    y = torch.tensor([0, 2])
    haar = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    squares = torch.stack([x[:, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)
    out = network(x, t, y)
    expected = torch.einsum("ij,nihw->njhw", haar, inner(torch.einsum("ij,njhw->nihw", haar, squares), t, y))
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        torch.testing.assert_close(out[:, 0, i::2, j::2], expected[:, k])
    assert network(x[:, :, :11, :5], t, y).shape == (2, 1, 11, 5)


def test_wavelets_of_white_noise_are_white_and_go_back() -> None:
    x = torch.randn(64, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    wavelets = patchify(x, 2, haar=True)
    assert wavelets.shape == (64, 24, 4, 4)
    assert float(wavelets.square().sum()) == pytest.approx(float(x.square().sum()), rel=1e-5)
    torch.testing.assert_close(unpatchify(wavelets, 2, haar=True), x)
    torch.testing.assert_close(unpatchify(patchify(x, 2), 2), x)
    assert unpatchify(wavelets.bfloat16(), 2, haar=True).dtype == torch.float32  # sums of four are not rounded
    flat = patchify(torch.ones(1, 1, 2, 2), 2, haar=True)
    assert flat.flatten().tolist() == [2, 0, 0, 0]


def test_lists_as_json_has_them_give_an_equal_configuration() -> None:
    lists: dict[str, Any] = {"image_size": [28, 20], "channel_mults": [1, 2], "attention_levels": [0]}
    tuples: dict[str, Any] = {"image_size": (28, 20), "channel_mults": (1, 2), "attention_levels": (0,)}
    assert UNetConfig(**lists) == UNetConfig(**tuples)
    assert hash(UNetConfig(**lists)) == hash(UNetConfig(**tuples))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("length", [49, 1025])  # written out, torch's own
def test_attention_is_torchs(length: int, heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 2, heads, length, 8, generator=generator, dtype=torch.float64).requires_grad_()
    weights = torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
    results = []
    for call in (attention, torch.nn.functional.scaled_dot_product_attention):
        qkv.grad = None
        out = call(*qkv)
        (out * weights).sum().backward()
        results.append((out.detach(), qkv.grad))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-12)


def test_the_names_of_a_configuration_are_those_of_the_layers() -> None:
    assert (*NORMS,) == NORM_NAMES
    assert (*ACTIVATIONS,) == ACTIVATION_NAMES
