"""What a GPU runs. The recording itself needs one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends.cuda import ChannelsLastGroupNorm, CudaRecorder, Record, autocast_network
from model.diffusion import Network
from model.nn.config import LucidrainsConfig, UNetConfig
from model.nn.networks import AnyConfig
from model.nn.unet import UNet
from tests.networks import randomised

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Inputs = tuple[Tensor, Tensor, Tensor | None]
GRID: dict[str, dict[str, Any]] = {
    "as it is": {},
    "unconditional": {"num_classes": None, "null_class": False},
    "class as both, scale and shift": {"class_conditioning": "both", "scale_shift_norm": True},
    "residual blocks resample": {"resblock_updown": True},
    "learned variance, time by a table": {"learned_variance": True, "time_table": 1000},
    "wavelets": {"patch_size": 2, "haar": True, "image_size": (7, 10)},
    "a size that must be padded": {"image_size": (7, 10), "channel_mults": (1, 2, 2)},
}


def inputs(config: AnyConfig, n: int, seed: int = 1, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *config.image_shape, generator=generator)
    t = torch.randint(0, 1000, (n,), generator=generator)
    y = None if config.num_classes is None else torch.randint(0, config.num_classes, (n,), generator=generator)
    return x.to(device), t.to(device), None if y is None else y.to(device)


def recorded(eager: Network, record: Record, given: Inputs) -> Network:
    """The network on memory that stays where it is, of the size of `given`."""
    places = [None if value is None else torch.zeros_like(value) for value in given]
    out = torch.empty(0, device=given[0].device)

    def run() -> None:
        nonlocal out
        out = eager(*places)  # type: ignore[arg-type]

    with torch.inference_mode():
        replay = record(run)

    @torch.inference_mode()
    def forward(*values: Tensor | None) -> Tensor:
        for place, value in zip(places, values, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        replay()
        return out.clone()

    return forward


@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
def test_weights_that_are_rounded_once_give_what_autocast_gives(
    tiny_config: UNetConfig, changes: dict[str, Any]
) -> None:
    config = replace(tiny_config, **changes)
    network = randomised(config)
    x, t, y = inputs(config, 3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, y)  # type: ignore[call-overload]
    exact = autocast_network(copy.deepcopy(network), CPU, torch.float32)(x, t, y)
    got = autocast_network(network, CPU, torch.bfloat16)(x, t, y)
    assert got.dtype == exact.dtype == torch.float32
    assert torch.equal(got, expected.float())
    assert not torch.equal(got, exact)
    rounded = {name for name, weight in network.named_parameters() if weight.dtype == torch.bfloat16}
    assert {name for name in rounded if "norm" in name or "time_mlp" in name or "class" in name} == set()
    assert {"mid.0.conv_1.weight", "mid.0.time_bias.weight", "mid.0.attention.qkv.weight", "out_conv.weight"} <= rounded


LUCID = LucidrainsConfig(
    image_size=(8, 12),
    dim=8,
    init_dim=6,
    dim_mults=(1, 2),
    full_attention=(False, True),
    heads=(2,) * 3,
    head_channels=(8,) * 3,
    num_classes=3,
    null_class=True,
)


def test_lucidrains_network_is_rounded_once_too() -> None:
    network = randomised(LUCID)
    x, t, y = inputs(LUCID, 3)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, y)  # type: ignore[call-overload]
    exact = autocast_network(copy.deepcopy(network), CPU, torch.float32)(x, t, y)
    got = autocast_network(network, CPU, torch.bfloat16)(x, t, y)
    assert torch.equal(got, expected.float())
    assert 0 < (got - exact).std() < 0.05 * exact.std()
    rounded = {name for name, weight in network.named_parameters() if weight.dtype == torch.bfloat16}
    assert {
        name for name in rounded if any(part in name for part in ("norm", "mlp", "class", "init", "memory"))
    } == set()
    assert {"mid.block_1.conv_1.weight", "downs.0.attention.qkv.weight", "out_conv.weight"} <= rounded


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lucidrains_network_is_recorded_as_a_graph(dtype: torch.dtype) -> None:
    eager = autocast_network(randomised(LUCID), torch.device("cuda"), dtype)
    given, others = inputs(LUCID, 3, device="cuda"), inputs(LUCID, 3, seed=2, device="cuda")
    graph = recorded(eager, CudaRecorder(), given)
    assert torch.equal(graph(*others), eager(*others))
    assert torch.equal(graph(*given), eager(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "channels", "size"), [(4, 12, (7, 10)), (32, 32, (8, 8)), (1, 6, (1, 1))])
def test_a_norm_that_keeps_channels_last_is_group_norm(
    groups: int, channels: int, size: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    norm, ours = torch.nn.GroupNorm(groups, channels), ChannelsLastGroupNorm(groups, channels)
    for parameter in norm.parameters():
        parameter.data.normal_(generator=generator)
    ours.load_state_dict(norm.state_dict())
    x = (3 * torch.randn(5, channels, *size, generator=generator) + 7).to(dtype)
    out = ours(x.contiguous(memory_format=torch.channels_last))
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, norm(x.float()), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours(x[:1].contiguous(memory_format=torch.channels_last)), out[:1])


@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
def test_channels_last_norms_compute_the_same(tiny_config: UNetConfig, changes: dict[str, Any]) -> None:
    network = randomised(replace(tiny_config, **changes))
    given = inputs(network.config, 3)
    expected = autocast_network(copy.deepcopy(network), CPU, torch.float32)(*given)
    got = autocast_network(network, CPU, torch.float32, channels_last_norm=True)(*given)
    assert sum(isinstance(module, ChannelsLastGroupNorm) for module in network.modules()) > 10
    assert not any(type(module) is torch.nn.GroupNorm for module in network.modules())
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@cuda
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
def test_cuda_graphs_give_the_bits_of_the_network(
    tiny_config: UNetConfig, changes: dict[str, Any], precision: torch.dtype
) -> None:
    config = replace(tiny_config, **changes)
    eager = autocast_network(randomised(config), torch.device("cuda"), precision)
    sizes, record = (64, 32, 16, 8, 4, 2, 1), CudaRecorder()
    graphs = {rows: recorded(eager, record, inputs(config, rows, device="cuda")) for rows in sizes}
    asked = [inputs(config, rows, seed=rows, device="cuda") for rows in (*sizes, *reversed(sizes))]
    got = [graphs[len(each[0])](*each) for each in asked]
    for each, out in zip(asked, got, strict=True):
        assert torch.equal(out, eager(*each))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@cuda
def test_other_threads_may_use_the_device_during_a_recording(tiny: UNet) -> None:
    eager = autocast_network(tiny, torch.device("cuda"), torch.bfloat16)
    stop, kept, failures = threading.Event(), [], []

    def load() -> None:
        try:
            while not stop.is_set():
                kept.append(torch.randn(2**20 + len(kept)).cuda())  # sizes that no cache has: it must allocate
                kept[-1].sum().item()
                del kept[:-50]
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(20):
            graph = recorded(eager, CudaRecorder(), inputs(tiny.config, 8, device="cuda"))
            asked = inputs(tiny.config, 8, seed=2, device="cuda")
            assert torch.equal(graph(*asked), eager(*asked))
    finally:
        stop.set()
        thread.join()
    assert not failures


@cuda
def test_graphs_that_are_gone_give_their_memory_back(tiny: UNet) -> None:
    eager = autocast_network(tiny, torch.device("cuda"), torch.bfloat16)
    asked = inputs(tiny.config, 512, device="cuda")

    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    def use() -> None:
        recorded(eager, CudaRecorder(), asked)(*asked)

    use()  # what libraries reserve stays
    before = reserved()
    for _ in range(3):
        use()
    assert reserved() == before


@cuda
@pytest.mark.parametrize(
    "breaks",
    [lambda x: 1 / 0, lambda x: x.new_empty(2**44), lambda x: x.sum().item()],
    ids=["raises", "has no memory", "waits for the device"],  # the last one spoils PyTorch's accounts before 2.13
)
def test_a_recording_that_fails_leaves_a_device_that_works(tiny: UNet, breaks: Callable[[Tensor], object]) -> None:
    eager = autocast_network(tiny, torch.device("cuda"), torch.bfloat16)

    def broken(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        out = eager(x, t, y)  # first, since CUDA warns of a graph that is empty
        if torch.cuda.is_current_stream_capturing():
            breaks(x)
        return out

    asked = inputs(tiny.config, 8, device="cuda")
    expected = eager(*asked)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        recorded(broken, CudaRecorder(), asked)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(eager(*asked), expected)
    assert torch.equal(recorded(eager, CudaRecorder(), asked)(*asked), expected)
