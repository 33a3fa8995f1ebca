"""Edits in the shared batch: what the naive loop computes, to the bit the same alone, among strangers and by graphs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engine.edits import kept_parts
from app.engine.request import Request, Sample
from app.engine.runner import ModelRunner
from model.checkpoint import Checkpoint
from model.images import from_uint8, to_uint8
from model.sampling.edit import Edit
from model.sampling.noise import normal
from model.sampling.solvers import SAMPLERS
from model.sampling.step import sample
from tests.app.engine.conftest import HeldRunner, Metrics, TestedEngine, equal, finish, graphed, state

CPU = torch.device("cpu")
Ask = Callable[..., Request]
IMAGE = from_uint8(torch.arange(0, 256, 4, dtype=torch.uint8).reshape(1, 8, 8))
SOFT = torch.linspace(0, 1, 8).expand(1, 8, 8)  # 0 in the first column, 1 in the last
EDITS = {"image to image": (Edit(IMAGE), 0.6), "inpainting": (Edit(IMAGE, SOFT), 1.0), "both": (Edit(IMAGE, SOFT), 0.6)}


Edited = Callable[..., Request]


@pytest.fixture
def edit(ask: Ask) -> Iterator[Edited]:
    """edit(sampler, kind, …) → a request for an edit."""
    loop = asyncio.new_event_loop()

    def edit(sampler: str, kind: str, seed: int = 9, n: int = 2, **settings: Any) -> Request:
        what, strength = EDITS[kind]
        return ask(loop, sampler=sampler, seed=seed, n=n, edit=what, strength=strength, **{"steps": 6} | settings)

    yield edit
    loop.close()


def everything(edit: Edited, samples: Callable[[], list[Sample]]) -> list[Sample]:
    """Edits of every kind for every sampler, and strangers that edit nothing."""
    requests = [edit(sampler, kind, seed, n=1) for seed, sampler in enumerate(SAMPLERS) for kind in EDITS]
    requests.append(edit("ddim", "both", 77, eta=0.5, guidance_scale=2.5, limit="dynamic"))
    requests.append(edit("dpmpp_2m", "both", 78, guidance_scale=2.5))
    return [one for request in requests for one in request.samples] + samples()


def naive(checkpoint: Checkpoint, one: Sample) -> Tensor:
    request = one.request
    assert request.classes is not None
    place = request.index + one.i
    images = sample(
        checkpoint.network,
        request.schedule,
        (1, 8, 8),
        [request.seed],
        [place],
        [request.classes[one.i]],
        null_class=3,
        edit=request.edit,
    )
    return images[0]


@pytest.mark.slow
def test_alone_among_strangers_and_by_graphs_the_bits_are_the_same(
    checkpoint: Checkpoint, edit: Edited, samples: Callable[[], list[Sample]]
) -> None:
    plain, by_graphs = ModelRunner(checkpoint, CPU, 4), graphed(checkpoint, 4)
    plain.warm_up(4)
    by_graphs.warm_up(4)
    assert by_graphs._graphs is not None
    alone = [finish(plain, [one])[0] for one in everything(edit, samples)]
    assert equal(finish(plain, everything(edit, samples)[::-1]), alone[::-1])
    assert equal(finish(by_graphs, everything(edit, samples)), alone)
    for one, found in zip(everything(edit, samples), alone, strict=True):
        torch.testing.assert_close(found, naive(checkpoint, one), rtol=0, atol=2e-5)


@pytest.mark.slow
def test_noise_of_other_scales_is_mixed_with_the_rest(
    checkpoint: Checkpoint, ask: Ask, edit: Edited, samples: Callable[[], list[Sample]]
) -> None:
    """As levels of noise have it: x_T is shorter, whoever draws it."""
    loop = asyncio.new_event_loop()

    def mixed() -> list[Sample]:
        plain, given = ask(loop, seed=9, n=2), edit("ddim", "inpainting", n=1)
        for request, scale in ((plain, 0.75), (given, 0.5)):
            request.schedule = replace(request.schedule, start=(0.0, scale))
        given.schedule = given.schedule.from_latents()
        return [*samples()[:2], *plain.samples, *given.samples, *samples()[3:5]]

    eager, by_graphs = ModelRunner(checkpoint, CPU, 4), graphed(checkpoint, 4)
    by_graphs.warm_up(4)
    found = finish(eager, mixed())
    assert equal(finish(by_graphs, mixed()), found)
    for one, x in zip(mixed(), found, strict=True):
        torch.testing.assert_close(x, naive(checkpoint, one), rtol=0, atol=2e-5)
    by_graphs.init_latents(both := mixed())
    assert torch.equal(state(by_graphs, both[3]), 0.75 * normal(9, 1, 0, (1, 8, 8)))
    loop.close()


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_beside_others_is_that_of_the_naive_loop(
    checkpoint: Checkpoint, edit: Edited, sampler: str, kind: str
) -> None:
    one, others = edit(sampler, kind, n=1), edit("ddim", "inpainting", 5, n=2)
    (found, *_) = finish(ModelRunner(checkpoint, CPU, 4), one.samples + others.samples)
    torch.testing.assert_close(found, naive(checkpoint, Sample(one, 0)), rtol=0, atol=2e-5)


def test_what_is_kept_leaves_the_engine_as_it_came(
    checkpoint: Checkpoint, edit: Edited, samples: Callable[[], list[Sample]]
) -> None:
    runner, request = ModelRunner(checkpoint, CPU, 4), edit("dpmpp_2m_sde", "inpainting")
    finish(runner, request.samples + samples()[:3])
    for view in ("xt", "x0"):
        images = runner.to_images(request.samples, view)  # type: ignore[arg-type]
        assert np.array_equal(images[:, :, :, 0], to_uint8(IMAGE)[None, :, :, 0].expand(2, 1, 8).numpy())
        assert not np.array_equal(images[0], images[1])


@pytest.mark.slow
def test_graphs_step_what_has_no_mask_and_fail_as_a_whole(
    checkpoint: Checkpoint, edit: Edited, samples: Callable[[], list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = graphed(checkpoint, 4)
    runner.warm_up(4)
    together = [*edit("ddim", "image to image", n=1).samples, *edit("ddim", "both", n=1).samples, samples()[0]]
    assert runner._graphs is not None
    with monkeypatch.context() as patch:
        patch.setattr(runner._graphs, "init_latents", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.init_latents(together)
    assert not any(one.has_noise for one in together)
    runner.init_latents(together)
    runner.step(together)
    assert [one.slot is None for one in together] == [False, True, False]
    assert together[1].x is not None


def test_who_edits_nothing_pays_nothing(
    checkpoint: Checkpoint, samples: Callable[[], list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, kept = ModelRunner(checkpoint, CPU, 4), []
    update = runner._update
    monkeypatch.setattr(runner, "_update", lambda *args: kept.append(args[4]) or update(*args))  # type: ignore[func-returns-value]
    finish(runner, samples()[:2])
    assert set(kept) == {None}
    assert kept_parts(samples(), torch.zeros(14, 1, 8, 8)) is None


def test_only_steps_that_are_run_are_counted(
    engine: TestedEngine, runner: HeldRunner, metrics: Metrics, ask: Ask
) -> None:
    async def main() -> np.ndarray[Any, Any]:
        loop = asyncio.get_running_loop()
        settings = {"sampler": "dpmpp_2m", "steps": 20, "guidance_scale": 2.0, "strength": 0.6}
        request = ask(loop, n=3, edit=Edit(IMAGE, SOFT), **settings)
        runner.hold()
        engine.submit(request)
        assert len(request.schedule) == 12
        assert metrics["ddpm_pending_nfe"] == 3 * 12 * 2
        runner.free()
        return await request.output.images()

    images = asyncio.run(main())
    assert np.array_equal(images[:, 0, :, 0], to_uint8(IMAGE)[:, :, 0].expand(3, 8).numpy())
    assert metrics["ddpm_image_steps_total"] == 3 * 12


def test_frames_of_an_edit_begin_with_its_noised_reference(engine: TestedEngine, ask: Ask) -> None:
    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        shown = frozenset({0, 1})
        request = ask(loop, edit=Edit(IMAGE), steps=50, strength=0.02, frame_steps=shown, keep=2)
        engine.submit(request)
        return [frame async for frame in request.output.frames()]

    noised, _ = asyncio.run(main())
    assert noised.step == 0
    assert np.abs(noised.images[0].astype(int) - to_uint8(IMAGE).numpy()).mean() < 30, "there is little noise"
