"""A GPU that has no room says so in several ways."""

import asyncio
from collections.abc import Callable

import pytest

from app.engine.engine import Engine
from app.engine.instance import ModelInstance
from app.engine.request import Request, Sample
from tests.app.engine.conftest import HeldRunner


def test_cudnn_without_room_to_work_in_makes_batches_smaller(
    engine: Engine,
    runner: HeldRunner,
    served: ModelInstance,
    ask: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not say so: it finds no engine. Nor are samples tried one by one, as after other failures."""
    real, tried = runner.step, list[int]()

    def step(samples: list[Sample]) -> list[Sample]:
        tried.append(len(samples))
        if len(samples) > 4:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return real(samples)

    monkeypatch.setattr(runner, "step", step)

    async def main() -> int:
        engine.submit(request := ask(asyncio.get_running_loop(), n=8, steps=2))
        return len(await request.output.images())

    assert asyncio.run(main()) == 8
    assert tried[:2] == [8, 4]
    assert served.batch_limits.max < 8
