from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator

import pytest
import torch

from app.engine.autotune import TIME_BUDGET_S, autotune_batch_size


class Device:
    """Takes `seconds(rows)` for a call, on a clock of its own."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.now, self.calls, self._seconds = 0.0, list[int](), seconds

    def run(self, rows: int) -> None:
        self.calls.append(rows)
        self.now += self._seconds(rows)


def measured(device: Device, micro_batch_size: int = 8, kind: str = "cpu") -> tuple[int, int]:
    steps = autotune_batch_size(device.run, micro_batch_size, kind, lambda: device.now)
    portions = 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            assert portions >= len(device.calls) - 1, "never two calls without a pause for those who are served"
            found: tuple[int, int] = end.value
            return found
        portions += 1


@pytest.mark.parametrize(
    ("curve", "kind", "micro_batch_size", "expected"),
    [
        (lambda rows: 0.01 * rows, "cpu", 8, (2, 4)),  # with what the engine does: 3.7 % for 2 rows, 1.2 % for 4
        (lambda rows: 0.01 * rows + 0.002, "cpu", 8, (2, 8)),  # 10.8 %, 3.6 %
        (lambda rows: 0.01 * rows + 0.009, "cpu", 32, (8, 32)),  # 9.1 % for 8, 3 % for 16
        (lambda rows: 0.001 * rows + 0.002, "cpu", 32, (16, 32)),  # 25.7 %, 8.6 %
        (lambda rows: 0.001 * rows + 0.009, "cpu", 32, (32, 32)),  # 23.8 % for 16
        (lambda rows: 0.001 * rows + 0.009, "cpu", 8, (8, 8)),  # a call after the other gains nothing
        (lambda rows: 0.03 if rows <= 256 else 0.03 * rows / 256, "cuda", 32, (256, 256)),  # 1.7 % for 256
        (lambda rows: 0.003, "cuda", 32, (1024, 1024)),
    ],
)
def test_autotune_finds_the_target_and_the_largest_batch(
    curve: Callable[[int], float], kind: str, micro_batch_size: int, expected: tuple[int, int]
) -> None:
    assert measured(Device(curve), micro_batch_size, kind) == expected


def test_autotune_ignores_one_slow_round_of_three() -> None:
    turns: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
    disturbed = Device(lambda rows: 0.01 * rows * (9 if next(turns[rows]) == 2 and rows == 2 else 1))
    assert measured(disturbed) == (2, 4)


def test_what_cannot_be_measured_is_as_ever() -> None:
    assert measured(Device(lambda rows: 0.0)) == (8, 8)
    slow = Device(lambda rows: 1.0 * rows)
    assert measured(slow) == (8, 8)
    assert slow.calls == [8, 8]
    assert measured(Device(lambda rows: 0.0), micro_batch_size=24) == (8, 24), "a micro-batch for a crowd"


def test_it_takes_only_so_long() -> None:
    for per_row in (0.0001, 0.001, 0.003, 0.01, 0.03):
        device = Device(lambda rows, per_row=per_row: per_row * rows)
        measured(device)
        assert device.now < TIME_BUDGET_S + 3 * 8 * per_row
        assert set(device.calls) <= {2, 4, 8}


def test_a_workers_call_is_timed_from_one_row_on() -> None:
    def tuned(curve: Callable[[int], float]) -> tuple[tuple[int, int], set[int]]:
        device = Device(curve)
        steps = autotune_batch_size(device.run, 8, "cpu", lambda: device.now, fewest=1, calls=(3, 6))
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value, set(device.calls)

    assert tuned(lambda rows: 0.01 * rows) == ((3, 24), {1, 2, 4, 8})
    assert tuned(lambda rows: 0.006 * rows + 0.005) == ((12, 48), {1, 2, 4, 8})
    assert tuned(lambda rows: 1.0 * rows) == ((3, 48), {8}), "a network so slow has no use for more"
    assert tuned(lambda rows: 0.0) == ((24, 768), {8}), "calls that cost nothing"


def test_what_does_not_fit_into_the_memory_is_not_allowed() -> None:
    def seconds(rows: int) -> float:
        if rows > 128:
            raise torch.OutOfMemoryError("CUDA out of memory, said a test")
        return 0.003

    assert measured(Device(seconds), 32, "cuda") == (128, 128)
    assert measured(Device(seconds), 128, "cuda") == (128, 128)
    with pytest.raises(torch.OutOfMemoryError):
        measured(Device(seconds), 256, "cuda")
