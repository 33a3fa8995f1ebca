"""How many rows a batch may have: the fewest that run about as fast, row for row, as any.

A network runs chunk by chunk, so beyond one chunk a larger batch saves only what a step costs besides, and everyone
who comes waits for a longer one: on a CPU no more than a chunk is tried. A cap at the knee of that curve costs a tenth
of the throughput at most, and gives the shortest wait that can be had for it.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Generator

from app.engine.memory import is_out_of_memory

log = logging.getLogger("ddpm.engine")

BY_DEVICE = {"cpu": (8, 0), "cuda": (256, 1024)}  # rows where nothing can be measured, and the most beyond a chunk
ROUNDS = 5  # of all sizes in turn, so that a disturbance meets them alike; medians
BESIDES_S = 1e-3  # of a step: what the engine does
WITHIN = 1.1  # times the least per row; the times themselves are uncertain by some percent
SECONDS = 4.0  # that it may take; larger batches are not tried where they would take longer
TOO_SHORT_S = 2e-4  # such a call tells of the clock, not of the network


def knee(
    run: Callable[[int], None], chunk: int, device: str, clock: Callable[[], float] = time.monotonic
) -> Generator[None, None, int]:
    """Returns the rows; `run` is one call with so many. Yields after each call. Raises what a chunk raises."""
    otherwise, most = BY_DEVICE[device]
    otherwise, most = max(otherwise, chunk), max(most, chunk)

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
    while rows <= most and (ROUNDS + 1) * (sum(tried) + rows) / chunk * first < SECONDS:
        try:
            timed(rows)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            otherwise = tried[-1] if tried else chunk
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
    found = min(rows for rows in tried if per_row[rows] <= WITHIN * min(per_row.values()))
    told = {str(rows): round(1e3 * seconds, 3) for rows, seconds in per_row.items()}
    log.info("batches measured", extra={"rows": found, "milliseconds_per_row": told})
    return found
