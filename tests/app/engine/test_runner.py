from __future__ import annotations

import asyncio
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.batch_invariance import default_micro_batch_size
from app.engine.request import Request, Sample
from app.engine.runner import ModelRunner
from model.backends import recorded
from model.backends.recorded import RecordedNetwork
from model.checkpoint import Checkpoint
from model.images import to_uint8
from model.nn.unet import UNet
from model.sampling.schedule import COEFFICIENTS, FITTED, SamplingSchedule, make_schedule
from model.sampling.solvers import SAMPLERS
from model.sampling.step import sample
from tests.app.engine.conftest import graphed

CPU = torch.device("cpu")


def finish(runner: ModelRunner, samples: list[Sample]) -> None:
    """Steps them together, each until it is done."""
    runner.init_latents(samples)
    finish_started(runner, samples)


def finish_started(runner: ModelRunner, samples: list[Sample]) -> None:
    while left := [s for s in samples if not s.finished]:
        assert runner.step(left) == []


@pytest.fixture
def mixed(ask: Callable[..., Request]) -> list[Request]:
    loop = asyncio.new_event_loop()
    requests = [
        ask(loop, seed=1, n=3, sampler="ddpm", steps=12, label=0),
        ask(loop, seed=2**63 + 5, n=2, sampler="ddim", steps=5, eta=0.7, label=2, guidance_scale=2.5),
        ask(loop, seed=3, n=1, index=7, sampler="dpmpp_2m", steps=6, guidance_scale=0.0),
    ]
    loop.close()
    return requests


def test_mixed_samplers_in_one_batch_equal_the_naive_loop(checkpoint: Checkpoint, mixed: list[Request]) -> None:
    runner = ModelRunner(checkpoint, CPU, micro_batch_size=4)
    finish(runner, [s for request in mixed for s in request.samples])
    for request in mixed:
        indices = range(request.index, request.index + request.n)
        expected = sample(
            checkpoint.network,
            request.schedule,
            checkpoint.config.unet.image_shape,
            [request.seed] * request.n,
            indices,
            request.classes,
            null_class=3,
        )
        got = torch.stack([s.x for s in request.samples if s.x is not None])
        assert torch.allclose(got, expected, atol=2e-5)


def test_a_step_of_the_same_samples_copies_no_states(
    checkpoint: Checkpoint, mixed: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another order they are stacked anew; `test_mixed_samplers…` and those below tell of the numbers."""
    runner, copied = ModelRunner(checkpoint, CPU, micro_batch_size=4), list[int]()
    stack = torch.stack

    def counting(tensors: list[Tensor], dim: int = 0) -> Tensor:
        if tensors[0].dim() == 3:  # states, and not embedded timesteps
            copied.append(len(tensors))
        return stack(tensors, dim)

    samples = [s for request in mixed for s in request.samples]
    runner.init_latents(samples)
    runner.step(samples)
    monkeypatch.setattr(torch, "stack", counting)
    runner.step(samples)
    assert copied == []
    states = [s.x.clone() for s in samples if s.x is not None]
    images = runner.to_images(samples, "xt")
    assert copied == []
    assert (runner.to_images(samples[::-1], "xt") == images[::-1]).all()
    assert copied == [6]
    runner.step(samples[:2])
    assert copied == [6, 2]
    assert all(torch.equal(a, b.x) for a, b in zip(states[2:], samples[2:], strict=True) if b.x is not None)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_an_image_does_not_depend_on_its_mates_to_the_last_bit(
    checkpoint: Checkpoint, mixed: list[Request], ask: Callable[..., Request], micro_batch_size: int
) -> None:
    runner = ModelRunner(checkpoint, CPU, micro_batch_size)
    together = [s for request in mixed for s in request.samples]
    finish(runner, together[::-1])
    loop = asyncio.new_event_loop()
    loop.close()
    for s in together:
        r = s.request
        alone = Request(
            r.schedule, r.seed, r.index + s.i, 1, r.classes[:1] if r.classes else None, 0.0, r.output, r.model
        )
        finish(runner, alone.samples)
        assert torch.equal(alone.samples[0].x, s.x)  # type: ignore[arg-type]


def test_a_step_that_raises_changes_nothing(
    checkpoint: Checkpoint, mixed: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ModelRunner(checkpoint, CPU, micro_batch_size=4)
    samples = mixed[0].samples
    runner.init_latents(samples)
    before = [(s.step, s.x.clone()) for s in samples if s.x is not None]
    with monkeypatch.context() as patch:
        patch.setattr("app.engine.runner.apply_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.step(samples)
    assert all(s.step == step and torch.equal(s.x, x) for s, (step, x) in zip(samples, before, strict=True))  # type: ignore[arg-type]


def test_non_finite_values_are_reported_for_their_sample_only(checkpoint: Checkpoint, mixed: list[Request]) -> None:
    runner = ModelRunner(checkpoint, CPU, micro_batch_size=4)
    samples = mixed[0].samples
    runner.init_latents(samples)
    assert samples[1].x is not None
    samples[1].x = samples[1].x * float("inf")
    assert runner.step(samples) == [samples[1]]


def test_read_gives_the_state_or_the_prediction_as_pictures(checkpoint: Checkpoint, mixed: list[Request]) -> None:
    runner = ModelRunner(checkpoint, CPU, micro_batch_size=4)
    samples = mixed[0].samples
    runner.init_latents(samples)
    runner.step(samples)
    states = torch.stack([s.x for s in samples if s.x is not None])
    predictions = torch.stack([s.x0 for s in samples if s.x0 is not None])
    assert np.array_equal(runner.to_images(samples, "xt"), to_uint8(states).numpy())
    assert np.array_equal(runner.to_images(samples, "x0"), to_uint8(predictions).numpy())
    assert not np.array_equal(runner.to_images(samples, "xt"), runner.to_images(samples, "x0"))


def both_runtimes() -> list[object]:
    missing = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
    names = [(runtime, precision) for runtime in ("torch", "openvino") for precision in ("fp32", "bf16")]
    return [pytest.param(*name, marks=missing if name[0] == "openvino" else ()) for name in names]


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "precision"), both_runtimes())
def test_runtimes_and_precisions_are_batch_invariant(
    checkpoint: Checkpoint, mixed: list[Request], runtime: str, precision: str
) -> None:
    runner = ModelRunner(checkpoint, CPU, 4, 1, runtime, precision)
    runner.warm_up(4)
    together = [s for request in mixed for s in request.samples]
    runner.init_latents(together)
    early, late = together[:2], together[2:]
    while left := [s for s in early if not s.finished]:
        runner.step([*left, *late[:1]] if not late[0].finished else left)
    finish_started(runner, late)
    again = ModelRunner(checkpoint, CPU, 4, 1, runtime, precision)  # that of a restarted server
    again.warm_up(4)
    for s in together:
        r = s.request
        alone = Request(
            r.schedule, r.seed, r.index + s.i, 1, r.classes[:1] if r.classes else None, 0.0, r.output, r.model
        )
        finish(again, alone.samples)
        assert torch.equal(alone.samples[0].x, s.x)  # type: ignore[arg-type]


@pytest.mark.parametrize(("runtime", "precision"), both_runtimes())
def test_runtimes_and_precisions_agree_up_to_rounding(
    checkpoint: Checkpoint, mixed: list[Request], runtime: str, precision: str
) -> None:
    runner = ModelRunner(checkpoint, CPU, 4, 1, runtime, precision)
    runner.warm_up(4)
    samples = mixed[1].samples
    finish(runner, samples)
    expected = sample(
        checkpoint.network,
        mixed[1].schedule,
        checkpoint.config.unet.image_shape,
        [mixed[1].seed] * 2,
        [0, 1],
        mixed[1].classes,
        null_class=3,
    )
    got = torch.stack([s.x for s in samples if s.x is not None])
    assert float((got - expected).abs().mean()) < (1e-5 if precision == "fp32" else 0.05)


def test_numbers_of_rows_that_give_other_bits_do_not_run(checkpoint: Checkpoint) -> None:
    """Here an even number of rows does: they are filled up to the next that agrees with the micro-batch size."""
    runner = ModelRunner(checkpoint, CPU, micro_batch_size=5)
    network, ran = runner._network, []

    def fussy(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        ran.append(len(x))
        return network(x, t, y) + (1e-7 if len(x) % 2 == 0 else 0)

    runner._network = fussy
    runner.warm_up(1)
    assert runner.sizes == [1, 3, 5]
    ran.clear()
    x, t = torch.zeros(9, *checkpoint.config.unet.image_shape), torch.zeros(9, dtype=torch.int64)
    assert runner.forward(x, t, t).shape == x.shape
    assert runner.forward(x[:2], t[:2], t[:2]).shape == x[:2].shape
    assert ran == [5, 5, 3]


def test_warm_up_records_calls_that_are_right_for_noise(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warmed_up() -> RecordedNetwork:
        runner = ModelRunner(checkpoint, CPU, micro_batch_size=2)
        for _ in runner.find_invariant_sizes():
            pass
        assert isinstance(runner._network, RecordedNetwork)
        assert runner.sizes == [1, 2]
        return runner._network

    assert [shape[0] for shape in warmed_up().recordings] == [1, 2]
    trace = recorded.trace

    def right_for_zeros(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        recording = trace(function, arguments)
        return lambda x, *others: recording(x, *others) + x.sum()

    monkeypatch.setattr(recorded, "trace", right_for_zeros)
    assert not warmed_up().recordings


def test_warm_up_tries_no_call_again_that_is_longer_than_a_long_one(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "LONGEST_S", 0)
    runner, ran = ModelRunner(checkpoint, CPU, micro_batch_size=3), list[int]()
    network = runner._network
    assert isinstance(network, RecordedNetwork)
    forward = network.network.forward
    monkeypatch.setattr(network.network, "forward", lambda x, y: (ran.append(len(x)), forward(x, y))[1])
    for _ in runner.find_invariant_sizes():
        pass
    assert ran == [3, 2, 1, 1]


def test_calls_have_eight_rows_on_a_cpu_openvinos_of_small_networks_more(checkpoint: Checkpoint) -> None:
    assert default_micro_batch_size(checkpoint.network, CPU, "openvino") == 32
    with torch.device("meta"):
        large = UNet(replace(checkpoint.config.unet, base_channels=128, channel_mults=(1, 2, 4)))
    assert default_micro_batch_size(large, CPU, "openvino") == 8
    assert default_micro_batch_size(checkpoint.network, CPU) == default_micro_batch_size(large, CPU) == 8
    assert default_micro_batch_size(large, torch.device("cuda")) == 256


def test_a_runtime_that_is_not_there_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # what makes an import fail
    with pytest.raises(ValueError, match=r"pip install 'ddpm-serve\[openvino\]'"):
        ModelRunner(checkpoint, CPU, 4, 1, "openvino")


@pytest.mark.slow
def test_a_fitted_table_among_all_samplers_equals_the_naive_loop(
    checkpoint: Checkpoint, ask: Callable[..., Request]
) -> None:
    """To the bit, with and without graphs: timesteps between whole numbers, and x_T again in every row."""
    loop = asyncio.new_event_loop()
    plain = make_schedule(checkpoint.diffusion, "dpmpp_3m", 4, guidance_scale=1.5)
    rows = plain.table + 0.0
    rows[:, COEFFICIENTS.index("s")] = 0.25
    rows[2:, COEFFICIENTS.index("g")] = 1  # guidance on some rows only
    fitted = SamplingSchedule(FITTED, plain.timesteps * 0.993, rows, np.zeros(4, np.int64))

    def wanted() -> list[Request]:
        requests = [ask(loop, seed=i, n=1 + i % 2, sampler=name, steps=5) for i, name in enumerate(SAMPLERS)]
        for seed in (3, 2**63 + 1):
            requests.append(ask(loop, seed=seed, n=2))
            requests[-1].schedule = fitted
        return requests

    runner = ModelRunner(checkpoint, CPU, micro_batch_size=4)
    runner.warm_up(4)
    requests = wanted()
    finish(runner, [s for request in requests for s in request.samples])
    for r in requests:
        shape, indices = checkpoint.config.unet.image_shape, range(r.n)
        expected = sample(runner.forward, r.schedule, shape, [r.seed] * r.n, indices, r.classes, null_class=3)
        assert torch.equal(torch.stack([s.x for s in r.samples if s.x is not None]), expected)
    replayed = graphed(checkpoint, 4)
    replayed.warm_up(4)
    assert replayed._graphs is not None
    again = wanted()
    finish(replayed, [s for request in again for s in request.samples])
    for before, after in zip(requests, again, strict=True):
        assert np.array_equal(runner.to_images(before.samples, "xt"), replayed.to_images(after.samples, "xt"))
    loop.close()
