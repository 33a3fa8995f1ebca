from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine.batch_invariance import split_rows
from app.engine.engine import Engine
from app.engine.instance import ModelInstance
from app.engine.request import Request, Sample
from app.engine.runner import ModelRunner
from app.engine.workers import WorkerPool, usable_cores
from app.errors import OutOfMemory, StepFailed
from model.checkpoint import Checkpoint
from tests.app.engine.conftest import Metrics, TestedEngine, equal, finish, until

CPU = torch.device("cpu")
Samples = Callable[[], list[Sample]]


def network_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "network"]


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(3)
    yield pool
    pool.close()
    assert not network_threads()


def test_calls_run_side_by_side_and_in_order(pool: WorkerPool) -> None:
    meeting = threading.Barrier(3, timeout=10)  # nobody passes before three are there

    def call(i: int) -> int:
        meeting.wait()
        return 10 * i

    assert pool.map(call, range(6)) == [0, 10, 20, 30, 40, 50]
    assert pool.map(lambda i: i, [7]) == [7]
    assert pool.map(lambda i: i, []) == []


def test_a_held_up_worker_leaves_its_calls_to_others(pool: WorkerPool) -> None:
    others, held = threading.Event(), []

    def call(i: int) -> int:
        if i == 0:
            held.append(threading.get_ident())
            assert others.wait(10)
        elif i == 8:
            others.set()
        return threading.get_ident()

    assert pool.map(call, range(9)).count(held[0]) == 1


def test_each_call_has_one_thread_and_no_gradients(pool: WorkerPool) -> None:
    meeting = threading.Barrier(3, timeout=10)

    def call(i: int) -> tuple[int, bool]:
        meeting.wait()
        return torch.get_num_threads(), torch.is_inference_mode_enabled()

    torch.set_num_threads(2)  # of this thread, and of those to come unless they say otherwise
    try:
        with torch.inference_mode():
            assert pool.map(call, range(3)).count((1, True)) >= 2, "all but this one, at least"
    finally:
        torch.set_num_threads(1)


def test_a_failure_is_raised_when_all_calls_have_ended(pool: WorkerPool) -> None:
    running, late = threading.Barrier(2, timeout=10), []

    def call(i: int) -> None:
        if i < 2:
            running.wait()
        if i == 0:
            raise ValueError("a test said so")
        time.sleep(0.05)
        late.append(i)

    with pytest.raises(ValueError, match="a test said so"):
        pool.map(call, range(20))
    ended = len(late)
    time.sleep(0.1)
    assert len(late) == ended < 19, "the calls after a failure are not made"
    assert pool.map(lambda i: i, range(3)) == [0, 1, 2]


def test_nothing_is_kept_of_calls_that_have_ended(pool: WorkerPool) -> None:
    kept: list[weakref.ref[Tensor]] = []

    def call(x: Tensor) -> Tensor:
        out = x + 1
        kept.append(weakref.ref(out))
        if len(kept) == 3:
            raise ValueError("a test said so")
        return out

    pool.map(call, [torch.zeros(4) for _ in range(2)])
    with pytest.raises(ValueError, match="a test said so"):
        pool.map(call, [torch.zeros(4) for _ in range(3)])
    until(lambda: not any(ref() is not None for ref in kept))


@pytest.mark.parametrize(
    ("rows", "sizes", "workers", "expected"),
    [
        (1, range(1, 9), 4, [1]),
        (2, range(1, 9), 2, [1, 1]),  # the two halves of a guided image
        (3, range(1, 9), 2, [2, 1]),
        (16, range(1, 9), 2, [8, 8]),
        (17, range(1, 9), 2, [5, 4, 4, 4]),
        (32, range(1, 9), 2, [8, 8, 8, 8]),
        (32, range(1, 9), 1, [8, 8, 8, 8]),
        (6, range(1, 9), 4, [2, 2, 1, 1]),
        (9, [4, 8], 2, [8, 1]),  # 8 and 4 rows, not 8 and 8
        (32, [32], 2, [32]),
        (33, [1, 2, 4, 8, 16, 32], 1, [32, 1]),
        (12, [1, 2, 4, 8], 2, [8, 4]),
    ],
)
def test_rows_are_shared_out_evenly(rows: int, sizes: list[int], workers: int, expected: list[int]) -> None:
    assert split_rows(rows, list(sizes), workers) == expected


def test_every_row_is_in_a_call_that_may_run() -> None:
    for sizes in ([1], [3, 5], [2, 4, 8], list(range(1, 9))):
        for rows in range(1, 70):
            for workers in (1, 2, 3, 8):
                parts = split_rows(rows, sizes, workers)
                assert sum(parts) == rows
                assert 1 <= min(parts) <= max(parts) <= sizes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_do_not_depend_on_how_many_threads(checkpoint: Checkpoint, samples: Samples, precision: str) -> None:
    """Among strangers of all samplers, and alone."""
    runners = [ModelRunner(checkpoint, CPU, 4, threads, "torch", precision) for threads in (1, 2, 3, 4)]
    for runner in runners:
        runner.warm_up(1)
    expected = finish(runners[0], samples())
    for runner in runners[1:]:
        assert equal(finish(runner, samples()), expected)
    for runner in (runners[0], runners[3]):
        alone = [finish(runner, [sample])[0] for sample in samples()[3:6]]
        assert equal(alone, expected[3:6])
    for runner in runners:
        runner.close()
    assert not network_threads()


def test_the_halves_of_a_guided_image_run_side_by_side(checkpoint: Checkpoint, ask: Callable[..., Request]) -> None:
    runner = ModelRunner(checkpoint, CPU, 4, 2)
    runner.warm_up(1)
    network, meeting, seen = runner._network, threading.Barrier(2, timeout=10), []

    def both(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        meeting.wait()
        seen.append(len(x))
        return network(x, t, y)

    runner._network = both
    loop = asyncio.new_event_loop()
    finish(runner, ask(loop, guidance_scale=2.0, steps=3).samples)
    loop.close()
    assert seen == [1] * 6
    runner.close()


def test_first_calls_at_once_pack_the_weights_once(checkpoint: Checkpoint, samples: Samples) -> None:
    """Without a warm-up, where all workers meet weights that are not packed."""
    cold, warm = ModelRunner(checkpoint, CPU, 1, 4), ModelRunner(checkpoint, CPU, 1, 1)
    warm.warm_up(1)
    assert equal(finish(cold, samples()[:4]), finish(warm, samples()[:4]))
    cold.close()


@pytest.fixture
def parallel(checkpoint: Checkpoint) -> Iterator[tuple[Engine, ModelInstance]]:
    """An engine whose network runs on two threads."""
    engine = TestedEngine(Metrics(), max_pending_nfe=1000)
    model = ModelInstance(checkpoint, ModelRunner(checkpoint, CPU, 4, 2), max_batch_size=8)
    engine.load_model(model)
    engine.start()
    until(lambda: engine.ready)
    yield engine, model
    engine.drain(0)
    assert engine.join(10)
    assert not network_threads(), "the threads end with the engine"


@pytest.mark.parametrize(
    ("error", "answer"), [(RuntimeError("a kernel fails"), StepFailed), (MemoryError("no room"), OutOfMemory)]
)
def test_a_failing_call_fails_only_its_culprit(
    parallel: tuple[Engine, ModelInstance],
    checkpoint: Checkpoint,
    ask: Callable[..., Request],
    error: Exception,
    answer: type[Exception],
) -> None:
    engine, model = parallel
    runner, network = model.runner, model.runner._network

    def fails_for_class_2(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        if (y == 2).any():
            raise error
        return network(x, t, y)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        requests = [ask(loop, seed=i, n=2, label=label, served=model) for i, label in enumerate((0, 2, 1))]
        runner._network, runner._team = fails_for_class_2, None
        for request in requests:
            engine.submit(request)  # type: ignore[call-arg, arg-type]
        with pytest.raises(answer):
            await requests[1].output.images()
        for request in (requests[0], requests[2]):
            images = await request.output.images()
            alone = ask(loop, seed=request.seed, n=2, label=request.classes[0])  # type: ignore[index]
            single = ModelRunner(checkpoint, CPU, 4, 1)
            finish(single, alone.samples)
            assert (images == single.to_images(alone.samples, "xt")).all()

    asyncio.run(main())


def test_unloading_a_model_ends_its_threads(parallel: tuple[Engine, ModelInstance], checkpoint: Checkpoint) -> None:
    engine, _ = parallel
    before = len(network_threads())
    other = ModelInstance(checkpoint, ModelRunner(checkpoint, CPU, 4, 4), max_batch_size=8)
    engine.load_model(other).result(20)
    assert len(network_threads()) == before + 3
    engine.unload_model(other)
    until(lambda: len(network_threads()) == before)


@pytest.mark.parametrize(
    ("content", "cores"),
    [
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("max 100000\n", 8),
        ("900000 100000\n", 8),
    ],
)
def test_a_container_has_the_cores_of_its_limit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, cores: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr("app.engine.workers.CPU_LIMIT", tmp_path / "cpu.max")
    assert usable_cores() == 8
    (tmp_path / "cpu.max").write_text(content)
    assert usable_cores() == cores
