"""Recorded calls give the bits of the calls that were recorded, on any thread, or are not used."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from model.backends import recorded
from model.backends.compile import compile_for_inference
from model.backends.packed_conv import scripted
from model.backends.recorded import RecordedNetwork
from model.nn.unet import UNet

CPU = torch.device("cpu")


def inputs(network: UNet, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *network.config.image_shape, generator=generator)
    return x, torch.randint(0, 1000, (rows,), generator=generator), torch.arange(rows) % 3


@pytest.fixture
def forward(tiny: UNet) -> RecordedNetwork:
    compiled = compile_for_inference(tiny, CPU, "fp32")
    assert isinstance(compiled, RecordedNetwork)
    return compiled


def test_a_shape_is_recorded_when_it_comes_again(forward: RecordedNetwork, tiny: UNet) -> None:
    first = inputs(tiny, 2)
    outs = [forward(*first)]
    assert not forward.recordings
    outs += [forward(*first) for _ in range(4)]
    assert list(forward.recordings) == [first[0].shape]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_what_is_recorded_are_operations_and_not_numbers(forward: RecordedNetwork, tiny: UNet) -> None:
    """Other images, timesteps and classes of the same shape."""
    plain = compile_for_inference(tiny, CPU, "fp32")
    assert isinstance(plain, RecordedNetwork)
    plain.network.forward(inputs(tiny, 3)[0], plain.network.embed(*inputs(tiny, 3)[1:]))  # packs the weights
    for seed in range(6):
        x, t, y = inputs(tiny, 3, seed)
        assert torch.equal(forward(x, t, y), plain.network.forward(x, plain.network.embed(t, y)))
    assert forward.recordings


def test_threads_share_recordings(forward: RecordedNetwork, tiny: UNet) -> None:
    sizes = [1, 2, 3, 2] * 12
    expected = {rows: forward(*inputs(tiny, rows)) for rows in set(sizes)}
    barrier = threading.Barrier(4)

    def call(rows: int) -> bool:
        barrier.wait(30)
        return torch.equal(forward(*inputs(tiny, rows)), expected[rows])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, sizes))
    assert len(forward.recordings) == 3


def test_there_is_no_recording_of_other_bits(
    forward: RecordedNetwork, tiny: UNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = recorded.trace

    def other(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        recording = trace(function, arguments)
        return lambda *inputs: recording(*inputs) + 1e-7

    monkeypatch.setattr(recorded, "trace", other)
    outs = [forward(*inputs(tiny, 2)) for _ in range(3)]
    assert not forward.recordings
    assert all(torch.equal(out, outs[0]) for out in outs)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "can't be recorded" in record.message
    assert "other bits" in str(record.exc_info)


def test_where_recording_fails_the_network_runs_on(
    forward: RecordedNetwork, tiny: UNet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = forward(*inputs(tiny, 2))

    out_conv = forward.network.out_conv  # type: ignore[attr-defined]

    def fails(x: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            raise RuntimeError("not here")
        return out_conv(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(forward.network, "out_conv", fails)
    for rows in (2, 2, 1, 1):
        forward(*inputs(tiny, rows))
    assert torch.equal(forward(*inputs(tiny, 2)), expected)
    (record,) = caplog.records  # not one a call
    assert "not here" in str(record.exc_info)
    assert not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    monkeypatch.setattr(recorded, "trace", None)
    forward(*inputs(tiny, 2))  # nor is it tried again


def test_there_are_not_endlessly_many(forward: RecordedNetwork, tiny: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST_SHAPES", 2)
    for rows in (1, 2, 3, 1, 2, 3, 3):
        forward(*inputs(tiny, rows))
    assert sorted(shape[0] for shape in forward.recordings) == [1, 2]


def test_long_calls_are_not_recorded(forward: RecordedNetwork, tiny: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor later, in the middle of a service, where such a call happens to be quick."""
    monkeypatch.setattr(recorded, "LONGEST_S", 0)
    for _ in range(3):
        forward(*inputs(tiny, 2))
    monkeypatch.undo()
    forward(*inputs(tiny, 2))
    assert not forward.recordings


def test_nothing_is_left_of_a_network_that_goes(tiny: UNet) -> None:
    """Nor does it wait for the garbage collector, which the server keeps from what it began with."""
    forward = compile_for_inference(tiny, CPU, "fp32")
    assert isinstance(forward, RecordedNetwork)
    forward(*inputs(tiny, 1))
    scripted()  # which stays
    functions: Any = torch.jit._state._python_cu.get_functions
    before = len(functions())
    for _ in range(3):
        forward(*inputs(tiny, 1))
    assert forward.recordings
    network = weakref.ref(forward.network)
    gc.disable()
    try:
        del forward
        assert network() is None
    finally:
        gc.enable()
    assert len(functions()) == before
