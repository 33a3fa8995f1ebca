"""How many rows a batch usually has, and how many at most, by what they take.

A network runs chunk by chunk, so beyond one chunk a larger batch saves only what a step costs besides, and everyone
who comes waits for a longer one: on a CPU no more than a chunk is tried. Usually a batch has no more rows than at the
knee of that curve: a sixth of the throughput at most is the price of the shortest wait that can be had for it. A crowd
gets the most throughput that there is.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Generator

from app.engine.memory import is_out_of_memory

log = logging.getLogger("ddpm.engine")

BY_DEVICE = {"cpu": (8, 0), "cuda": (256, 1024)}  # usual rows if nothing can be measured; the most tried, or a chunk
ROUNDS = 5  # of all sizes in turn, so that a disturbance meets them alike; medians
BESIDES_S = 1e-3  # of a step: what the engine does
KNEE, MOST = 1.2, 1.02  # times the least per row; the times themselves are uncertain by some percent
SECONDS = 4.0  # that it may take; larger batches are not tried where they would take longer
TOO_SHORT_S = 2e-4  # such a call tells of the clock, not of the network


def autotune_batch_size(
    run: Callable[[int], None], chunk: int, device: str, clock: Callable[[], float] = time.monotonic
) -> Generator[None, None, tuple[int, int]]:
    """Returns the usual rows and the most. `run` is one call with so many; it yields after each.

    Raises what a chunk raises.
    """
    usual, limit = BY_DEVICE[device]
    otherwise, limit = (usual, max(usual, chunk)), max(limit, chunk)

    def timed(rows: int) -> float:
        started = clock()
        run(rows)
        return clock() - started

    timed(chunk)  # pays for kernel selection and memory
    yield
    first = timed(chunk)
    yield
    if first < TOO_SHORT_S:
        return otherwise
    tried: list[int] = []
    rows = max(1, chunk // 4)
    while rows <= limit and (ROUNDS + 1) * (sum(tried) + rows) / chunk * first < SECONDS:
        try:
            timed(rows)
        except Exception as error:
            if not is_out_of_memory(error, rows):
                raise
            otherwise = (tried[-1], tried[-1]) if tried else (chunk, chunk)
            break
        tried.append(rows)
        rows *= 2
        yield
    if len(tried) < 2:
        return otherwise
    times: dict[int, list[float]] = {rows: [] for rows in tried}
    for _ in range(ROUNDS):
        for rows in tried:
            times[rows].append((timed(rows) + BESIDES_S) / rows)
            yield
    per_row = {rows: statistics.median(values) for rows, values in times.items()}
    usual, most = (
        min(rows for rows in tried if per_row[rows] <= within * min(per_row.values())) for within in (KNEE, MOST)
    )
    told = {str(rows): round(1e3 * seconds, 3) for rows, seconds in per_row.items()}
    log.info("batches measured", extra={"rows": usual, "most": most, "milliseconds_per_row": told})
    return usual, most
