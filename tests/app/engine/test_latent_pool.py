"""Samples in slots, stepped by graphs: on the CPU, with a recorder that repeats calls. In any company they come out as
without, to the bit."""

from __future__ import annotations

import asyncio
import gc
import itertools
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from app.engine.cuda_graphs import split_micro_batches
from app.engine.instance import ModelInstance
from app.engine.latent_pool import MAX_SLOTS, POOL_BYTES, LatentPool, pool_size, x0_row, x_row
from app.engine.request import Request, RequestStatus, Sample
from app.engine.runner import ModelRunner
from app.errors import Cancelled, StepFailed
from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import DiffusionConfig
from model.sampling.schedule import make_schedule
from model.sampling.step import sample as naive_loop
from tests.app.engine.conftest import (
    HeldRunner,
    Metrics,
    TestedEngine,
    equal,
    finish,
    graphed,
    record_by_repeating,
    state,
    until,
)
from tests.networks import randomised

CPU = torch.device("cpu")
Samples = Callable[[], list[Sample]]
Ask = Callable[..., Request]


@pytest.fixture
def plain(checkpoint: Checkpoint) -> ModelRunner:
    runner = ModelRunner(checkpoint, CPU, 4)
    runner.warm_up(4)
    return runner


@pytest.fixture
def runner(checkpoint: Checkpoint) -> ModelRunner:
    runner = graphed(checkpoint, 4)
    runner.warm_up(4)
    assert runner._graphs is not None
    return runner


@pytest.fixture
def narrow(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> ModelRunner:
    """With 8 slots."""
    monkeypatch.setattr("app.engine.latent_pool.MAX_SLOTS", 8)
    runner = graphed(checkpoint, 4)
    runner.warm_up(4)
    assert slots(runner).count == 8
    return runner


def slots(runner: ModelRunner) -> LatentPool:
    assert runner._graphs is not None
    return runner._graphs.slots


def states(runner: ModelRunner, sample: Sample) -> list[torch.Tensor]:
    return [slots(runner).x_of(sample).clone(), *(slots(runner).x0_of(sample, ago).clone() for ago in (0, 1))]


@pytest.mark.slow
def test_in_slots_all_samplers_make_the_images_of_the_naive_loop(
    checkpoint: Checkpoint, runner: ModelRunner, plain: ModelRunner, samples: Samples
) -> None:
    found = samples()
    finished = finish(runner, found)
    assert all(sample.slot is not None and sample.x is None for sample in found)
    assert equal(finished, finish(plain, samples()))
    for sample, x in zip(found, finished, strict=True):
        request = sample.request
        index, classes = request.index + sample.i, [request.classes[sample.i]] if request.classes else None
        shape = checkpoint.config.unet.image_shape
        expected = naive_loop(
            checkpoint.network, request.schedule, shape, [request.seed], [index], classes, null_class=3
        )
        assert torch.allclose(x, expected[0], atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("room", ["for all", "for eight"])
def test_who_comes_when_and_with_whom_changes_no_image(
    plain: ModelRunner, runner: ModelRunner, narrow: ModelRunner, samples: Samples, room: str
) -> None:
    runner = narrow if room == "for eight" else runner
    expected = finish(plain, samples())
    crowd, chance, moved = samples(), random.Random(1), 0
    waiting, inside = list(crowd), list[Sample]()
    while left := [s for s in crowd if not s.finished]:
        joins, waiting = waiting[:2], waiting[2:]
        if joins:
            runner.init_latents(joins)
        inside += joins
        batch = chance.sample([s for s in inside if s in left], min(chance.randint(1, 8), len(set(inside) & set(left))))
        moved += sum(s.slot is None for s in batch)
        assert runner.step(batch) == []
    assert (moved > 0) == (room == "for eight")
    assert equal([state(runner, sample) for sample in crowd], expected)
    assert runner.to_images(crowd, "xt").shape[0] == len(crowd)


@pytest.mark.slow
def test_a_batch_with_more_samples_than_slots_runs_without_them(
    narrow: ModelRunner, plain: ModelRunner, samples: Samples
) -> None:
    crowd = samples()
    narrow.init_latents(crowd[:4])
    narrow.init_latents(crowd[4:])
    assert [s.slot is None for s in crowd] == [False] * 4 + [True] * 10
    assert narrow.step(crowd) == []
    assert all(sample.slot is None for sample in crowd)
    while left := [s for s in crowd if not s.finished]:
        assert narrow.step(left) == []
    assert any(sample.slot is not None for sample in crowd), "when there were eight or fewer left"
    assert equal([state(narrow, sample) for sample in crowd], finish(plain, samples()))


def test_a_warm_up_larger_than_the_pool_runs_without_slots(narrow: ModelRunner) -> None:
    """Or the knee would be told of a speed that is not there."""
    graphs = narrow._graphs
    assert graphs is not None
    graphs._graphs = {}
    with pytest.raises(KeyError):
        narrow.warm_up(8)
    narrow.warm_up(9)


@pytest.mark.slow
def test_calls_are_filled_up_with_rows_that_change_nothing(checkpoint: Checkpoint, samples: Samples) -> None:
    """The table's rows from earlier steps among them: written again, they would bring back old states."""

    def fussy(runner: ModelRunner) -> ModelRunner:
        network = runner._network
        runner._network = lambda x, t, y: network(x, t, y) + (1e-6 if 1 < len(x) < 8 else 0)
        runner.warm_up(8)
        assert runner.sizes == [1, 8]
        return runner

    runner, plain = fussy(graphed(checkpoint, 8)), fussy(ModelRunner(checkpoint, CPU, 8))
    assert runner._graphs is not None
    expected = finish(plain, samples())
    crowd, chance = samples(), random.Random(2)
    runner.init_latents(crowd)
    while left := [s for s in crowd if not s.finished]:
        assert runner.step(chance.sample(left, min(len(left), chance.choice((2, 3, 7))))) == []
    assert equal([state(runner, sample) for sample in crowd], expected)
    null_slot = slots(runner).null_slot
    assert not slots(runner).x[2 * null_slot].any()


@pytest.mark.slow
def test_dynamic_thresholding_steps_run_without_graphs(
    checkpoint: Checkpoint,
    runner: ModelRunner,
    plain: ModelRunner,
    samples: Samples,
    ask: Ask,
    loop: asyncio.AbstractEventLoop,
) -> None:
    schedule = make_schedule(checkpoint.diffusion, "ddim", 3, limit="dynamic")

    def both() -> list[Sample]:
        request = ask(loop, seed=9, n=2)
        request.schedule = schedule
        return [*samples()[:3], *request.samples]

    crowd = both()
    assert equal(finish(runner, crowd), finish(plain, both()))
    assert [sample.slot is None for sample in crowd] == [False] * 3 + [True] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned variance", "unconditional", "no null class"])
def test_every_kind_of_network_runs_in_slots(
    checkpoint: Checkpoint, ask: Ask, loop: asyncio.AbstractEventLoop, kind: str
) -> None:
    changes: dict[str, object] = {
        "learned variance": {"learned_variance": True},
        "unconditional": {"num_classes": None, "null_class": False},
        "no null class": {"null_class": False},
    }[kind]  # type: ignore[assignment]
    unet = replace(checkpoint.config.unet, **changes)  # type: ignore[arg-type]
    learned = kind == "learned variance"
    diffusion = DiffusionConfig(
        num_timesteps=100, prediction="eps", variance="learned_range" if learned else "fixed_small"
    )
    other = Checkpoint(
        "other",
        "0" * 64,
        CheckpointConfig(unet, diffusion, ("a", "b", "c")[: unet.num_classes or 0]),
        randomised(unet, std=0.05),
    )

    def wanted() -> list[Sample]:
        crowd = []
        for seed, sampler, g in ((1, "ddpm", 1.0), (2, "ddim", 1.0), (3, "ddpm", 2.0 if unet.null_class else 1.0)):
            request = ask(loop, seed=seed, n=2)
            request.schedule = make_schedule(other.diffusion, sampler, 5, guidance_scale=g)
            request.classes = None if unet.num_classes is None else (1, 2)
            crowd += request.samples
        return crowd

    runner, plain = graphed(other, 4), ModelRunner(other, CPU, 4)
    runner.warm_up(4)
    plain.warm_up(4)
    assert runner._graphs is not None
    assert equal(finish(runner, wanted()), finish(plain, wanted()))


@pytest.mark.slow
def test_a_guided_sample_larger_than_a_call_runs_without_graphs(checkpoint: Checkpoint, samples: Samples) -> None:
    runner, plain = graphed(checkpoint, 1), ModelRunner(checkpoint, CPU, 1)
    runner.warm_up(1)
    plain.warm_up(1)
    assert runner._graphs is not None
    crowd = samples()
    unguided, guided = crowd[:3], crowd[3:6]
    assert equal(finish(runner, unguided) + finish(runner, guided), finish(plain, samples()[:6]))
    assert [s.slot is None for s in unguided + guided] == [False] * 3 + [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("where", ["host", "second part", "copy"])
def test_a_step_that_raises_changes_nothing(
    runner: ModelRunner, plain: ModelRunner, samples: Samples, where: str
) -> None:
    crowd = samples()
    runner.init_latents(crowd)
    assert runner.step(crowd) == []
    before = [states(runner, sample) for sample in crowd]
    steps = [sample.step for sample in crowd]
    graphs = runner._graphs
    assert graphs is not None
    with pytest.MonkeyPatch.context() as patch:
        if where == "host":
            patch.setattr(graphs, "_rows", lambda *_: 1 / 0)
        elif where == "second part":
            calls = iter((False, True))
            good = dict(graphs._graphs)

            def fails(key: tuple[str, int]) -> None:
                good[key]()
                if next(calls):
                    raise RuntimeError("launch failed, said a test")

            patch.setattr(graphs, "_graphs", {key: lambda key=key: fails(key) for key in good})
        else:
            patch.setattr(graphs, "_host_finite", None)
        with pytest.raises((ZeroDivisionError, RuntimeError, TypeError)):
            runner.step(crowd)
    assert [sample.step for sample in crowd] == steps
    for sample, kept in zip(crowd, before, strict=True):
        assert equal(states(runner, sample), kept)
    while left := [s for s in crowd if not s.finished]:
        assert runner.step(left) == []
    assert equal([state(runner, s) for s in crowd], finish(plain, samples()))


@pytest.mark.slow
def test_noise_that_could_not_be_drawn_is_drawn_again(
    runner: ModelRunner, plain: ModelRunner, samples: Samples
) -> None:
    crowd = samples()
    assert runner._graphs is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._graphs, "_graphs", {})
        with pytest.raises(KeyError):
            runner.init_latents(crowd)
    assert not any(sample.has_noise for sample in crowd)
    assert equal(finish(runner, crowd), finish(plain, samples()))
    assert all(sample.has_noise for sample in crowd)


def test_non_finite_values_are_reported_for_their_sample_only(checkpoint: Checkpoint, samples: Samples) -> None:
    """Even a single one: this network does not spread it."""
    runner = graphed(checkpoint, 4)
    runner._network = lambda x, t, y: 0.1 * x
    runner.warm_up(4)
    crowd = samples()
    runner.init_latents(crowd)
    runner.step(crowd)
    with torch.inference_mode():
        for sick in (crowd[4], crowd[13]):
            slots(runner).x_of(sick)[0, 0, 0] = torch.nan
    assert runner.step(crowd) == [crowd[4], crowd[13]]
    assert all(state(runner, s).isfinite().all() for s in crowd if s not in (crowd[4], crowd[13]))


@pytest.mark.slow
def test_pictures_are_of_the_slots(runner: ModelRunner, plain: ModelRunner, samples: Samples) -> None:
    crowd, others = samples(), samples()
    for each, those in ((runner, crowd), (plain, others)):
        each.init_latents(those)
    for steps in range(4):
        if steps:
            assert runner.step(crowd) == plain.step(others) == []
        for view in ("xt", "x0"):
            assert np.array_equal(runner.to_images(crowd, view), plain.to_images(others, view))  # type: ignore[arg-type]
    with torch.inference_mode():
        slots(runner).evict(crowd[::2])
    assert np.array_equal(runner.to_images(crowd, "x0"), plain.to_images(others, "x0"))


# Who has a slot


def test_slots_do_not_overlap_and_steps_write_none_being_read() -> None:
    for rows, places in ((x_row, 2), (x0_row, 3)):
        assert len({rows(slot, step) for slot in range(4) for step in range(places)}) == 4 * places
        assert {rows(slot, step) for slot in range(4) for step in range(-3, 9)} == set(range(4 * places))
    for step in range(9):
        assert len({x0_row(2, at) for at in (step, step - 1, step - 2)}) == 3
        assert x_row(2, step) != x_row(2, step + 1)


@pytest.mark.slow
def test_a_slot_is_free_when_its_sample_or_request_is_gone(narrow: ModelRunner, samples: Samples) -> None:
    crowd = samples()[6:]
    narrow.init_latents(crowd)
    assert {sample.slot for sample in crowd} == set(range(8))
    request, kept = crowd[0].request, crowd[1:6]
    gone = {crowd[6].slot, crowd[7].slot}
    before = [state(narrow, sample) for sample in kept]
    request.samples = request.samples[:6]
    del crowd
    gc.collect()
    newcomers = samples()[:2]
    narrow.init_latents(newcomers)
    assert {sample.slot for sample in newcomers} == gone
    assert all(sample.slot is not None for sample in kept)
    assert equal([state(narrow, sample) for sample in kept], before)
    newcomers[0].request.status = RequestStatus.CANCELLED
    narrow.init_latents(more := samples()[:3])
    assert {sample.slot for sample in more[:2]} <= gone | {request.samples[0].slot, 0}
    assert newcomers[0].slot is newcomers[1].slot is None


@pytest.mark.slow
def test_the_longest_waiting_slot_outside_the_batch_is_evicted(narrow: ModelRunner, samples: Samples) -> None:
    crowd = samples()
    first, second = crowd[:8], crowd[8:]
    narrow.init_latents(first)
    for sample in (3, 1, 0, 2, 4, 5, 6, 7):
        narrow.step(first[sample : sample + 1])
    batch = [first[3], *second[:2]]
    narrow.init_latents(second[:2])
    assert [i for i, s in enumerate(first) if s.slot is None] == [1, 3], "the two that were stepped first"
    narrow.step(batch)
    assert [i for i, s in enumerate(first) if s.slot is None] == [0, 1]
    assert all(sample.slot is not None for sample in batch)


def test_slots_stay_within_their_memory_but_fit_one_call() -> None:
    assert pool_size((3, 32, 32), 256) == MAX_SLOTS
    large = pool_size((3, 256, 256), 4)
    assert 5 * 4 * 3 * 256 * 256 * (large + 1) <= POOL_BYTES < 5 * 4 * 3 * 256 * 256 * (large + 2)
    assert pool_size((3, 2048, 2048), 1) >= 1
    assert pool_size((3, 4096, 4096), 7) == 7


@pytest.mark.parametrize("micro_batch_size", [2, 3, 8])
def test_micro_batches_have_all_samples_in_order_and_fit(micro_batch_size: int) -> None:
    chance = random.Random(micro_batch_size)
    for n in range(1, 30):
        costs = np.array([chance.randint(1, 2) for _ in range(n)])
        cut = list(split_micro_batches(costs, micro_batch_size))
        assert [i for part in cut for i in range(part.start, part.stop)] == list(range(n))
        sums = [int(costs[part].sum()) for part in cut]
        assert all(0 < rows <= micro_batch_size for rows in sums)
        assert all(a + b > micro_batch_size for a, b in itertools.pairwise(sums))


# With an engine


@pytest.fixture
def held(checkpoint: Checkpoint) -> HeldRunner:
    runner = HeldRunner(checkpoint)
    runner._record = record_by_repeating
    return runner


@pytest.mark.slow
def test_an_engine_serves_from_slots_through_cancels_and_faults(
    checkpoint: Checkpoint, held: HeldRunner, ask: Ask, metrics: Metrics
) -> None:
    reference, served, second = (
        ModelRunner(checkpoint, CPU, 4),
        ModelInstance(checkpoint, held, 8),
        graphed(checkpoint, 4),
    )
    newcomer = ModelInstance(checkpoint, second, 8)
    reference.warm_up(4)
    engine = TestedEngine(metrics, max_pending_nfe=100_000)
    engine.load_model(served)
    engine.start()
    until(lambda: engine.ready)
    assert held._graphs is not None

    def poison(samples: list[Sample]) -> bool:
        for sample in samples:
            if sample.request.seed == 13 and sample.step == 5:
                with torch.inference_mode():
                    slots(held).x_of(sample).fill_(torch.nan)
        return any(sample.request.seed == 66 and sample.step == 4 for sample in samples)

    held.fail = poison

    async def main() -> None:
        loop = asyncio.get_running_loop()
        wanted = [
            {"seed": 1, "n": 3, "sampler": "ddpm", "steps": 40},
            {"seed": 2, "n": 2, "sampler": "dpmpp_2m", "steps": 15, "guidance_scale": 3.0},
            {"seed": 3, "n": 9, "sampler": "ddim", "eta": 0.5, "steps": 30},
        ]
        good = [ask(loop, served=served, **fields) for fields in wanted]
        sick, failing, leaving = (ask(loop, served=served, seed=s, n=2, steps=50) for s in (13, 66, 5))
        for request in (*good, sick, failing, leaving):
            engine.submit(request)
        await asyncio.to_thread(until, lambda: leaving.first_step_time is not None)
        engine.cancel(leaving)
        warm = engine.load_model(newcomer)
        for request, error in ((sick, StepFailed), (failing, StepFailed), (leaving, Cancelled)):
            with pytest.raises(error):
                await request.output.images()
        for fields, request in zip(wanted, good, strict=True):
            alone = ask(loop, **fields)
            finish(reference, alone.samples)
            assert np.array_equal(await request.output.images(), reference.to_images(alone.samples, "xt"))
        await asyncio.wrap_future(warm)
        assert second._graphs is not None
        assert second._graphs.slots is not slots(held)
        pair = [ask(loop, served=each, **wanted[0]) for each in (served, newcomer)]
        for request in pair:
            engine.submit(request)
        engine.unload_model(served)
        one, other = [await request.output.images() for request in pair]
        assert np.array_equal(one, other)
        await asyncio.to_thread(until, lambda: served not in engine._models.models)

    try:
        asyncio.run(main())
    finally:
        engine.drain(0)
        assert engine.join(10)
    assert held._graphs is None, "with its slots"


@pytest.mark.slow
def test_a_dynamic_limit_moves_no_sample_of_others(
    runner: ModelRunner,
    plain: ModelRunner,
    checkpoint: Checkpoint,
    samples: Samples,
    ask: Ask,
    loop: asyncio.AbstractEventLoop,
) -> None:
    others, request = samples(), ask(loop, seed=9, n=2)
    request.schedule = make_schedule(checkpoint.diffusion, "ddim", 12, limit="dynamic")
    runner.init_latents(others)
    runner.init_latents(request.samples)
    places, graphs = [sample.slot for sample in others], runner._graphs
    assert graphs is not None
    while left := [s for s in others if not s.finished]:
        assert runner.step([request.samples[0], *left[:3], request.samples[1], *left[3:]]) == []
        assert [sample.slot for sample in others] == places
        assert [sample.slot for sample in request.samples] == [None, None]
        if request.samples[0].step == 3:
            before = [sample.step for sample in (*others, *request.samples)]
            kept, graphs._graphs = graphs._graphs, {}
            with pytest.raises(KeyError):  # a step that fails halfway has changed nothing
                runner.step([*request.samples, *left])
            graphs._graphs = kept
            assert [sample.step for sample in (*others, *request.samples)] == before
    assert equal([state(runner, sample) for sample in others], finish(plain, samples()))


def test_of_dynamic_and_other_samples_the_broken_ones_are_told(
    runner: ModelRunner, checkpoint: Checkpoint, samples: Samples, ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    others, request = samples()[:3], ask(loop, seed=9, n=2)
    request.schedule = make_schedule(checkpoint.diffusion, "ddim", 12, limit="dynamic")
    crowd = [others[0], request.samples[0], others[1], request.samples[1], others[2]]
    runner.init_latents(crowd)
    assert runner.step(crowd) == []
    with torch.inference_mode():
        for broken in (others[1], request.samples[1]):
            slots(runner).x_of(broken).fill_(torch.nan)
    assert set(map(id, runner.step(crowd))) == {id(others[1]), id(request.samples[1])}


@pytest.mark.slow
def test_a_warm_up_is_of_noise_in_places_that_no_sample_has(
    runner: ModelRunner, samples: Samples, plain: ModelRunner
) -> None:
    """Zeros, or one place for all, would take a GPU less time than samples do."""
    graphs, seen = runner._graphs, list[torch.Tensor]()
    assert graphs is not None
    network = runner._network

    def watched(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        seen.append(x.clone())
        return network(x, t, y)

    crowd = samples()
    runner.init_latents(crowd)
    graphs._network = watched
    runner.warm_up(8)
    rows = torch.cat(seen).flatten(1)
    assert len(rows) == len(rows.unique(dim=0)) == 8
    assert rows.std() > 0.9
    graphs._network = network
    left = crowd
    while left := [s for s in left if not s.finished]:
        runner.warm_up(5)
        assert runner.step(left) == []
    assert equal([state(runner, sample) for sample in crowd], finish(plain, samples()))
