"""Recorded calls give the bits of the calls that were recorded, on any thread, or are not used."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from model.backends import recorded
from model.backends.compile import compile_for_inference
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
    trace = torch.jit.trace

    def other(*args: object, **kwargs: object) -> Callable[..., Tensor]:
        recording = trace(*args, **kwargs)  # type: ignore[no-untyped-call]
        return lambda *inputs: recording(*inputs) + 1e-7

    monkeypatch.setattr(torch.jit, "trace", other)
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

    def fails(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.jit, "trace", fails)
    for rows in (2, 2, 1, 1):
        forward(*inputs(tiny, rows))
    assert torch.equal(forward(*inputs(tiny, 2)), expected)
    assert len(caplog.records) == 1  # not one a call
    monkeypatch.setattr(torch.jit, "trace", None)
    forward(*inputs(tiny, 2))  # nor is it tried again


def test_there_are_not_endlessly_many(forward: RecordedNetwork, tiny: UNet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "MOST_SHAPES", 2)
    for rows in (1, 2, 3, 1, 2, 3, 3):
        forward(*inputs(tiny, rows))
    assert sorted(shape[0] for shape in forward.recordings) == [1, 2]
