"""The runner with graphs: on the CPU with a recorder that repeats calls, on a GPU with the real one."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.engine import Engine
from app.engine.request import Request, Sample
from app.engine.runner import Runner
from app.engine.served import Served
from model.checkpoint import Checkpoint
from model.cuda import CudaRecorder, Graphs
from tests.app.engine.conftest import Metrics, until

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
Ask = Callable[..., Request]


def record_by_repeating(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    out = run()

    def replay() -> None:
        out.copy_(run())

    return replay, out


@pytest.fixture
def samples(ask: Ask) -> Iterator[Callable[[], list[Sample]]]:
    """The same 14 each time, of four requests."""
    loop = asyncio.new_event_loop()
    wanted = [
        {"seed": 1, "n": 3, "sampler": "ddpm", "steps": 12, "label": 0},
        {"seed": 2**63 + 5, "n": 2, "sampler": "ddim", "steps": 5, "eta": 0.7, "label": 2, "guidance_scale": 2.5},
        {"seed": 3, "n": 1, "index": 7, "sampler": "dpmpp_2m", "steps": 6, "guidance_scale": 0.0},
        {"seed": 4, "n": 8, "steps": 7},
    ]
    yield lambda: [sample for fields in wanted for sample in ask(loop, **fields).samples]
    loop.close()


def finish(runner: Runner, samples: list[Sample]) -> list[Tensor]:
    """Steps them together, each until it is done."""
    runner.start(samples)
    while left := [s for s in samples if not s.finished]:
        assert runner.step(left) == []
    return [s.x for s in samples if s.x is not None]


def graphed(checkpoint: Checkpoint, chunk: int) -> Runner:
    """On the CPU, as on a GPU."""
    runner = Runner(checkpoint, CPU, chunk)
    runner._record = record_by_repeating
    return runner


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_graphs_change_no_image(checkpoint: Checkpoint, samples: Callable[[], list[Sample]]) -> None:
    runner, plain = graphed(checkpoint, 8), Runner(checkpoint, CPU, 8)
    runner.warm_up(8)
    plain.warm_up(8)
    assert isinstance(runner._network, Graphs)
    assert runner._network.rows == runner.sizes == plain.sizes
    assert equal(finish(runner, samples()), finish(plain, samples()))


def test_nothing_but_graphs_runs(checkpoint: Checkpoint, samples: Callable[[], list[Sample]]) -> None:
    runner = Runner(checkpoint, CPU, 8)
    network = runner._network
    calls = replays = 0

    def counted(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        nonlocal calls
        calls += 1
        return network(x, t, y)

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def replay() -> None:
            nonlocal replays
            replays += 1
            out.copy_(run())

        out = run()
        return replay, out

    runner._network, runner._record = counted, record
    runner.warm_up(8)
    calls = replays = 0
    finish(runner, samples())
    assert calls == replays > 0


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", ["raises", "has no memory", "computes something else"])
def test_without_a_graph_the_network_runs_as_ever_and_says_so_once(
    checkpoint: Checkpoint,
    samples: Callable[[], list[Sample]],
    caplog: pytest.LogCaptureFixture,
    how: str,
    after: int,
) -> None:
    runner, plain = graphed(checkpoint, 8), Runner(checkpoint, CPU, 8)
    plain.warm_up(8)
    recorded = 0

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        nonlocal recorded
        recorded += 1
        if recorded <= after:
            return record_by_repeating(run)
        if how == "has no memory":
            raise torch.OutOfMemoryError("CUDA out of memory, said a test")
        if how == "raises":
            raise RuntimeError("operation not permitted when stream is capturing, said a test")
        out = run()

        def replay() -> None:
            out.copy_(run() + 1e-6)

        return replay, out

    runner._record = record
    network = runner._network
    with caplog.at_level(logging.WARNING):
        runner.warm_up(8)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("WARNING", "no CUDA graphs: the network runs without them, slower")
    ]
    assert runner._network is network
    assert runner.sizes == plain.sizes
    assert equal(finish(runner, samples()), finish(plain, samples()))


def test_what_does_not_fit_into_the_memory_is_not_used(
    checkpoint: Checkpoint, samples: Callable[[], list[Sample]]
) -> None:
    runner, plain = graphed(checkpoint, 8), Runner(checkpoint, CPU, 8)
    plain.warm_up(8)
    network = runner._network

    def small(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory, said a test")
        return network(x, t, y)

    runner._network = small
    runner.warm_up(8)
    assert runner.chunk == runner.sizes[-1] <= 3
    assert equal(finish(runner, samples()), finish(plain, samples()))


@pytest.mark.parametrize(
    ("error", "most"), [(torch.OutOfMemoryError("for a single row"), 0), (RuntimeError("no kernel image"), 4)]
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


def test_numbers_of_rows_where_a_rows_bits_depend_on_its_place_do_not_run(checkpoint: Checkpoint) -> None:
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
def gpu(checkpoint: Checkpoint) -> Callable[[], Runner]:
    return lambda: Runner(checkpoint, CUDA, 64, precision="bf16")


@cuda
def test_on_a_gpu_every_number_of_rows_has_a_graph_and_no_image_depends_on_its_mates(
    gpu: Callable[[], Runner], samples: Callable[[], list[Sample]], caplog: pytest.LogCaptureFixture
) -> None:
    runner, again = gpu(), gpu()  # that of a restarted server
    with caplog.at_level(logging.WARNING):
        runner.warm_up(64)
        again.warm_up(64)
    assert not caplog.records
    assert isinstance(runner._network, Graphs)
    assert runner._network.rows == runner.sizes == again.sizes
    crowd = finish(runner, samples()[::-1])[::-1]
    assert equal(finish(again, samples()), crowd)
    for i, x in enumerate(crowd):
        assert torch.equal(finish(runner, samples()[i : i + 1])[0], x)
    runner._network = runner._network.eager
    assert equal(finish(runner, samples()), crowd)


@cuda
def test_on_a_gpu_a_graph_that_has_no_memory_is_done_without(
    gpu: Callable[[], Runner], samples: Callable[[], list[Sample]], caplog: pytest.LogCaptureFixture
) -> None:
    runner, sound = gpu(), gpu()
    real, hoarded = CudaRecorder(), []

    def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        def greedy() -> Tensor:
            if torch.cuda.is_current_stream_capturing():
                hoarded.append(torch.empty(2**46, dtype=torch.uint8, device=CUDA))  # 64 TiB
            return run()

        return real(greedy)

    runner._record = record
    with caplog.at_level(logging.WARNING):
        runner.warm_up(64)
    assert [r.message for r in caplog.records] == ["no CUDA graphs: the network runs without them, slower"]
    assert not hoarded
    assert not isinstance(runner._network, Graphs)
    sound.warm_up(64)
    assert isinstance(sound._network, Graphs), "and whoever comes next has graphs"
    assert equal(finish(runner, samples()), finish(sound, samples()))


@cuda
def test_on_a_gpu_a_newcomer_is_captured_while_others_are_served_and_loaded(
    checkpoint: Checkpoint, gpu: Callable[[], Runner], ask: Ask, metrics: Metrics
) -> None:
    first, second = (Served(checkpoint, gpu(), 16) for _ in range(2))
    engine, stop = Engine(metrics, max_work=1_000_000), threading.Event()
    engine.add(first)
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
        alone = await before.mailbox.answer()
        warm = engine.add(second)
        while not warm.done():
            engine.submit(request := ask(loop, served=first, seed=7, n=4, steps=50))
            assert np.array_equal(await request.mailbox.answer(), alone)
        warm.result()
        engine.submit(after := ask(loop, served=second, seed=7, n=4, steps=50))
        assert np.array_equal(await after.mailbox.answer(), alone), "the same weights"
        engine.retire(first)
        until(lambda: first not in engine._turns.served)
        engine.submit(last := ask(loop, served=second, seed=7, n=4, steps=50))
        assert np.array_equal(await last.mailbox.answer(), alone)

    loader = threading.Thread(target=load)
    loader.start()
    try:
        asyncio.run(main())
    finally:
        stop.set()
        loader.join()
        engine.drain(0)
        assert engine.join(30)
    assert isinstance(second.runner._network, Graphs)
