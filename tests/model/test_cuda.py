"""What a GPU runs. The recording itself needs one; all else is tried on the CPU with a recorder that repeats calls."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.cuda import CudaRecorder, Graphs, autocast_network
from model.unet import UNet, UNetConfig
from tests.networks import randomised

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GRID: dict[str, dict[str, Any]] = {
    "as it is": {},
    "unconditional": {"num_classes": None, "null_class": False},
    "class as both, scale and shift": {"class_conditioning": "both", "scale_shift_norm": True},
    "residual blocks resample": {"resblock_updown": True},
    "learned variance, time by a table": {"learned_variance": True, "time_table": 1000},
    "a size that must be padded": {"image_size": (7, 10), "channel_mults": (1, 2, 2)},
}


def inputs(config: UNetConfig, n: int, seed: int = 1, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *config.image_shape, generator=generator)
    t = torch.randint(0, 1000, (n,), generator=generator)
    y = None if config.num_classes is None else torch.randint(0, config.num_classes, (n,), generator=generator)
    return x.to(device), t.to(device), None if y is None else y.to(device)


def record_by_repeating(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """As a graph does: it works on the same memory each time, and shows what was in it when it was recorded."""
    out = run()

    def replay() -> None:
        out.copy_(run())

    return replay, out


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


@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
def test_graphs_compute_what_the_network_computes(tiny_config: UNetConfig, changes: dict[str, Any]) -> None:
    config = replace(tiny_config, **changes)
    eager = autocast_network(randomised(config), CPU, torch.float32)
    graphs = Graphs(eager, record_by_repeating)
    for rows in (4, 2, 1):
        graphs.capture(*inputs(config, rows, seed=rows))
    assert graphs.rows == [1, 2, 4]
    asked = [inputs(config, rows, seed=rows + 10 * again) for again in range(2) for rows in (1, 4, 3, 2)]
    got = [graphs(*each) for each in asked]  # 3 has no graph
    for each, out in zip(asked, got, strict=True):
        assert torch.equal(out, eager(*each)), "nor does a later call change what an earlier one gave"


def test_only_what_has_no_graph_runs_eagerly_and_all_share_their_inputs(tiny: UNet) -> None:
    ran: list[Tensor] = []
    network = autocast_network(tiny, CPU, torch.float32)

    def eager(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        ran.append(x)
        return network(x, t, y)

    def record_once(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = run()
        return lambda: None, out

    graphs = Graphs(eager, record_once)
    graphs.capture(*inputs(tiny.config, 4))
    graphs.capture(*inputs(tiny.config, 2))
    assert [len(x) for x in ran] == [4, 2]
    assert ran[0].data_ptr() == ran[1].data_ptr()
    x, t, y = inputs(tiny.config, 2)
    graphs(x, t, y)
    assert torch.equal(ran[0][:2], x)
    assert len(ran) == 2
    graphs(*inputs(tiny.config, 3))
    assert len(ran[2]) == 3


def test_a_recording_that_fails_leaves_the_others(tiny: UNet) -> None:
    eager = autocast_network(tiny, CPU, torch.float32)
    calls = 0

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory, said a test")
        return record_by_repeating(run)

    graphs = Graphs(eager, record)
    graphs.capture(*inputs(tiny.config, 4))
    with pytest.raises(torch.OutOfMemoryError):
        graphs.capture(*inputs(tiny.config, 2))
    assert graphs.rows == [4]
    for rows in (2, 4):
        assert torch.equal(graphs(*inputs(tiny.config, rows)), eager(*inputs(tiny.config, rows)))


@cuda
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", GRID.values(), ids=GRID.keys())
def test_cuda_graphs_give_the_bits_of_the_network(
    tiny_config: UNetConfig, changes: dict[str, Any], precision: torch.dtype
) -> None:
    config = replace(tiny_config, **changes)
    eager = autocast_network(randomised(config), torch.device("cuda"), precision)
    graphs = Graphs(eager, CudaRecorder())
    sizes = (64, 32, 16, 8, 4, 2, 1)
    for rows in sizes:
        graphs.capture(*inputs(config, rows, device="cuda"))
    asked = [inputs(config, rows, seed=rows, device="cuda") for rows in (*sizes, *reversed(sizes))]
    got = [graphs(*each) for each in asked]
    for each, out in zip(asked, got, strict=True):
        assert torch.equal(out, eager(*each))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


@cuda
def test_another_thread_may_use_the_device_while_a_graph_is_recorded(tiny: UNet) -> None:
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
            graphs = Graphs(eager, CudaRecorder())
            graphs.capture(*inputs(tiny.config, 8, device="cuda"))
            asked = inputs(tiny.config, 8, seed=2, device="cuda")
            assert torch.equal(graphs(*asked), eager(*asked))
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
        graphs = Graphs(eager, CudaRecorder())
        graphs.capture(*asked)
        graphs(*asked)

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
        if torch.cuda.is_current_stream_capturing():
            breaks(x)
        return eager(x, t, y)

    asked = inputs(tiny.config, 8, device="cuda")
    expected = eager(*asked)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        Graphs(broken, CudaRecorder()).capture(*asked)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(eager(*asked), expected)
    graphs = Graphs(eager, CudaRecorder())
    graphs.capture(*asked)
    assert torch.equal(graphs(*asked), expected)
