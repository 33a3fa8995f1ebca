"""How many rows a batch usually has, and how many at most, by what they take.

A network runs micro-batch by micro-batch, so beyond one a larger batch saves only what a step costs besides, and
everyone who comes waits for a longer one: on a CPU no more than a micro-batch is tried. Usually a batch has
no more rows than at the knee of that curve: a sixth of the throughput at most is the price of the shortest wait that
can be had for it. A crowd gets the most throughput that there is.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Generator

from app.engine.memory import is_out_of_memory

log = logging.getLogger("ddpm.engine")

BY_DEVICE = {"cpu": (8, 0), "cuda": (256, 1024)}  # target if nothing can be measured; the most tried, or a micro-batch
ROUNDS = 3  # of all sizes in turn, so that a disturbance meets them alike; medians
STEP_OVERHEAD_S = 1e-3  # of a step: what the engine does
LATENCY_SLACK, THROUGHPUT_SLACK = 1.2, 1.02  # times the least per row; the times are uncertain by some percent
TIME_BUDGET_S = 2.5  # that it may take; larger batches are not tried where they would take longer
FREE_CALLS = 16  # times as many calls as else, where they cost nothing
MIN_TIMEABLE_S = 2e-4  # such a call tells of the clock, not of the network


def autotune_batch_size(
    run: Callable[[int], None],
    micro_batch_size: int,
    device: str,
    clock: Callable[[], float] = time.monotonic,
    fewest: int = 0,
    calls: tuple[int, int] = (1, 1),
) -> Generator[None, None, tuple[int, int]]:
    """Returns the target rows and the most. `run` is one call with so many; it yields after each.

    `fewest` rows are tried first (0: a quarter of a micro-batch), and are the target of a network too slow to be timed.
    `calls`: how many such calls a usual and a largest batch have. Raises what a micro-batch raises.
    """
    target, limit = BY_DEVICE[device]
    otherwise, limit = (target, max(target, micro_batch_size)), max(limit, micro_batch_size)

    def timed(rows: int) -> float:
        started = clock()
        run(rows)
        return clock() - started

    timed(micro_batch_size)  # pays for kernel selection and memory
    yield
    first = timed(micro_batch_size)
    yield
    if first < MIN_TIMEABLE_S:
        # A step then costs more than its calls, of which it may have more.
        return otherwise[0] * calls[0], otherwise[1] * calls[1] * (FREE_CALLS if fewest else 1)
    tried: list[int] = []
    rows = fewest or max(1, micro_batch_size // 4)
    while rows <= limit and (ROUNDS + 1) * (sum(tried) + rows) / micro_batch_size * first < TIME_BUDGET_S:
        try:
            timed(rows)
        except Exception as error:
            if not is_out_of_memory(error, rows):
                raise
            otherwise = (tried[-1], tried[-1]) if tried else (micro_batch_size, micro_batch_size)
            break
        tried.append(rows)
        rows *= 2
        yield
    if len(tried) < 2:
        target, most = (fewest, micro_batch_size) if fewest else otherwise
        return target * calls[0], most * calls[1]
    times: dict[int, list[float]] = {rows: [] for rows in tried}
    for _ in range(ROUNDS):
        for rows in tried:
            times[rows].append((timed(rows) + STEP_OVERHEAD_S) / rows)
            yield
    per_row = {rows: statistics.median(values) for rows, values in times.items()}
    target, most = (
        min(rows for rows in tried if per_row[rows] <= within * min(per_row.values()))
        for within in (LATENCY_SLACK, THROUGHPUT_SLACK)
    )
    target, most = target * calls[0], most * calls[1]
    told = {str(rows): round(1e3 * seconds, 3) for rows, seconds in per_row.items()}
    log.info("batches measured", extra={"rows": target, "most": most, "milliseconds_per_row": told})
    return target, most
