"""Graphs of whole steps are made, checked and done without: on the CPU with a recorder that repeats calls, on a GPU
with the real one. What they compute in any company is in `test_latent_pool`."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.instance import ModelInstance
from app.engine.request import Request, Sample
from app.engine.runner import ModelRunner
from model.backends.cuda import CudaRecorder
from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.config import LucidrainsConfig
from model.sampling.noise import normals_of
from model.sampling.step import apply_step
from tests.app.engine.conftest import Metrics, TestedEngine, equal, finish, graphed, record_by_repeating, until
from tests.networks import randomised

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Ask = Callable[..., Request]
Samples = Callable[[], list[Sample]]


@pytest.mark.slow
def test_every_number_of_rows_has_graphs(checkpoint: Checkpoint, samples: Samples) -> None:
    runner, plain = graphed(checkpoint, 8), ModelRunner(checkpoint, CPU, 8)
    runner.warm_up(8)
    plain.warm_up(8)
    assert runner._graphs is not None
    assert runner._graphs.rows == runner.sizes == plain.sizes
    assert equal(finish(runner, samples()), finish(plain, samples()))


@pytest.mark.slow
def test_only_graphs_run_and_noise_only_where_needed(checkpoint: Checkpoint, samples: Samples) -> None:
    runner = ModelRunner(checkpoint, CPU, 8)
    network = runner._network
    recorded: list[str] = []
    replayed: list[str] = []
    calls = 0

    def counted(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x, t, y)

    def record(run: Callable[[], None]) -> Callable[[], None]:
        kind = ("start", "deterministic", "stochastic")[len(recorded) % 3]
        recorded.append(kind)

        def replay() -> None:
            replayed.append(kind)
            run()

        return replay

    runner._network, runner._record = counted, record
    runner.warm_up(8)
    runner.warm_up(19)
    calls, replayed[:] = 0, []
    runner.warm_up(19)
    assert replayed == ["deterministic"] * 3
    finish(runner, samples())
    assert calls == len(replayed) - replayed.count("start") > 3
    assert replayed[3:5] == ["start", "start"]
    noisy = replayed.index("stochastic")
    assert "deterministic" in replayed[noisy:], "the last steps of ddpm are silent"
    replayed.clear()
    finish(runner, samples()[-8:])
    assert replayed == ["start"] + ["deterministic"] * 7


def skewed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*args) + 1e-6


def skewed_step(*args: Any) -> tuple[Tensor, Tensor]:
    x, x0 = apply_step(*args)
    return x, x0 + 1e-6


WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "noise": lambda patch: patch.setattr("app.engine.cuda_graphs.normals_of", skewed(normals_of)),
    "guidance": lambda patch: patch.setattr("app.engine.cuda_graphs.apply_cfg", lambda out, u, g: out),
    "update": lambda patch: patch.setattr("app.engine.cuda_graphs.apply_step", skewed_step),
}


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize("how", ["raises", "has no memory", "does nothing", *WRONG])
def test_without_graphs_all_runs_as_ever_and_says_so_once(
    checkpoint: Checkpoint,
    samples: Samples,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    after: int,
) -> None:
    runner, plain = graphed(checkpoint, 8), ModelRunner(checkpoint, CPU, 8)
    plain.warm_up(8)
    recorded = 0

    def record(run: Callable[[], None]) -> Callable[[], None]:
        nonlocal recorded
        recorded += 1
        if recorded <= after:
            return record_by_repeating(run)
        if how == "has no memory":
            raise torch.OutOfMemoryError("CUDA out of memory, said a test")
        if how == "raises":
            raise RuntimeError("operation not permitted when stream is capturing, said a test")
        if how in WRONG:
            WRONG[how](monkeypatch)
            return record_by_repeating(run)
        return lambda: None

    runner._record = record
    with caplog.at_level(logging.WARNING):
        runner.warm_up(8)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "no CUDA graphs: steps run without them, slower")
    ]
    assert runner._graphs is None
    assert runner.sizes == plain.sizes
    assert equal(finish(runner, samples()), finish(plain, samples()))


def test_graphs_without_room_for_their_slots_are_done_without(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.engine.runner.pool_size", lambda shape, micro_batch_size: 2**50)
    runner = graphed(checkpoint, 8)
    with caplog.at_level(logging.WARNING):
        runner.warm_up(8)
    assert [r.message for r in caplog.records] == ["no CUDA graphs: steps run without them, slower"]
    assert runner._graphs is None


CUDNN = "GET was unable to find an engine to execute this computation"  # where it has no room to work in


@pytest.mark.slow
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory, said a test"), RuntimeError(CUDNN)])
def test_what_does_not_fit_into_the_memory_is_not_used(
    checkpoint: Checkpoint, samples: Samples, error: Exception
) -> None:
    runner, plain = graphed(checkpoint, 8), ModelRunner(checkpoint, CPU, 8)
    plain.warm_up(8)
    network = runner._network

    def small(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if len(x) > 3:
            raise error
        return network(x, t, y)

    runner._network = small
    runner.warm_up(8)
    assert runner.micro_batch_size == runner.sizes[-1] <= 3
    assert equal(finish(runner, samples()), finish(plain, samples()))


@pytest.mark.parametrize(
    ("error", "most"),
    [(torch.OutOfMemoryError("for a single row"), 0), (RuntimeError("no kernel image"), 4), (RuntimeError(CUDNN), 0)],
)
def test_a_network_that_cannot_run_is_refused(checkpoint: Checkpoint, error: Exception, most: int) -> None:
    runner = graphed(checkpoint, 8)
    network = runner._network

    def breaks(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if len(x) > most:
            raise error
        return network(x, t, y)

    runner._network = breaks
    with pytest.raises(type(error), match=str(error)):
        runner.warm_up(8)


def test_batch_sizes_whose_bits_depend_on_place_do_not_run(checkpoint: Checkpoint) -> None:
    runner = graphed(checkpoint, 5)
    network = runner._network

    def fussy(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        out = network(x, t, y)
        out[0] += 1e-7 if len(x) in (5, 2) else 0
        return out

    runner._network = fussy
    runner.warm_up(1)
    assert runner.sizes == [1, 3, 4]


# With a GPU


@pytest.fixture
def gpu(checkpoint: Checkpoint) -> Callable[[], ModelRunner]:
    return lambda: ModelRunner(checkpoint, CUDA, 64, precision="bf16")


@cuda
def test_every_batch_size_has_a_graph_and_gives_the_same_bits(
    gpu: Callable[[], ModelRunner], samples: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    runner, again = gpu(), gpu()  # that of a restarted server
    with caplog.at_level(logging.WARNING):
        runner.warm_up(64)
        again.warm_up(64)
    assert not caplog.records
    assert runner._graphs is not None
    assert runner._graphs.rows == runner.sizes == again.sizes
    crowd = finish(runner, samples()[::-1])[::-1]
    assert equal(finish(again, samples()), crowd)
    for i, x in enumerate(crowd):
        assert torch.equal(finish(runner, samples()[i : i + 1])[0], x)
    runner._graphs = None
    assert equal(finish(runner, samples()), crowd)


@cuda
def test_on_a_gpu_a_graph_that_has_no_memory_is_done_without(
    gpu: Callable[[], ModelRunner], samples: Samples, caplog: pytest.LogCaptureFixture
) -> None:
    runner, sound = gpu(), gpu()
    real, hoarded = CudaRecorder(), []

    def record(run: Callable[[], None]) -> Callable[[], None]:
        def greedy() -> None:
            run()  # first, since CUDA warns of a graph that is empty
            if torch.cuda.is_current_stream_capturing():
                hoarded.append(torch.empty(2**46, dtype=torch.uint8, device=CUDA))  # 64 TiB

        return real(greedy)

    runner._record = record
    with caplog.at_level(logging.WARNING):
        runner.warm_up(64)
    assert [r.message for r in caplog.records] == ["no CUDA graphs: steps run without them, slower"]
    assert not hoarded
    assert runner._graphs is None
    sound.warm_up(64)
    assert sound._graphs is not None, "and whoever comes next has graphs"
    assert equal(finish(runner, samples()), finish(sound, samples()))


@cuda
def test_a_new_model_is_captured_while_others_are_served(
    checkpoint: Checkpoint, gpu: Callable[[], ModelRunner], ask: Ask, metrics: Metrics
) -> None:
    first, second = (ModelInstance(checkpoint, gpu(), 16) for _ in range(2))
    engine, stop = TestedEngine(metrics, max_pending_nfe=1_000_000), threading.Event()
    engine.load_model(first)
    engine.start()
    until(lambda: engine.ready, 60)

    def load() -> None:
        kept = []
        while not stop.is_set():
            kept.append(torch.randn(2**20 + len(kept)).cuda())
            del kept[:-50]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        engine.submit(before := ask(loop, served=first, seed=7, n=4, steps=50))
        alone = await before.output.images()
        warm = engine.load_model(second)
        while not warm.done():
            engine.submit(request := ask(loop, served=first, seed=7, n=4, steps=50))
            assert np.array_equal(await request.output.images(), alone)
        warm.result()
        engine.submit(after := ask(loop, served=second, seed=7, n=4, steps=50))
        assert np.array_equal(await after.output.images(), alone), "the same weights"
        engine.unload_model(first)
        until(lambda: first not in engine._models.models)
        engine.submit(last := ask(loop, served=second, seed=7, n=4, steps=50))
        assert np.array_equal(await last.output.images(), alone)

    loader = threading.Thread(target=load)
    loader.start()
    try:
        asyncio.run(main())
    finally:
        stop.set()
        loader.join()
        engine.drain(0)
        assert engine.join(30)
    assert second.runner._graphs is not None


@pytest.mark.slow
def test_lucidrains_network_steps_by_graphs(samples: Samples) -> None:
    unet = LucidrainsConfig(
        image_size=(8, 8),
        dim=8,
        dim_mults=(1, 2),
        full_attention=(False, True),
        heads=(2,) * 3,
        head_channels=(8,) * 3,
        init_dim=8,
        num_classes=3,
        null_class=True,
    )
    config = CheckpointConfig(unet, DiffusionConfig(100, prediction="v"), ("a", "b", "c"))
    lucid = Checkpoint("lucid", "0" * 64, config, randomised(unet).requires_grad_(False))
    runner, plain = graphed(lucid, 8), ModelRunner(lucid, CPU, 8)
    runner.warm_up(8)
    plain.warm_up(8)
    assert runner._graphs is not None
    assert equal(finish(runner, samples()), finish(plain, samples()))
