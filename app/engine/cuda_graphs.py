"""Whole steps on a GPU: the host writes a table, launches one CUDA graph, and reads which samples are finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.batch import Batch, Ints
from app.engine.latent_pool import LatentPool, x0_row, x_row
from model.backends.cuda import Record
from model.diffusion import Network
from model.nn.networks import AnyConfig
from model.sampling.noise import normals, normals_of
from model.sampling.schedule import COEFFICIENTS
from model.sampling.step import apply_cfg, apply_step

# Columns of the table that say where things are, before the coefficients. Rows of the slots' tables: which x and x_0
# are read, and which are written; `null`: the row of the same call that has the null class.
INDEX_COLUMNS = ("x", "x0", "x0_prev", "x_next", "x0_next", "null", "t", "y", "seed_low", "seed_high", "index", "draw")
WORDS = slice(INDEX_COLUMNS.index("seed_low"), len(INDEX_COLUMNS))
START, DETERMINISTIC, STOCHASTIC = "start", "deterministic", "stochastic"

Bools = NDArray[np.bool_]


class CUDAGraphRunner:
    """Steps of samples in `slots`, by a graph for each number of network rows and each kind of step.

    A graph gathers the states, draws the noise (in steps of the kind STOCHASTIC; it costs a small network's step much),
    runs the network, guides, updates, and writes the new states beside the old. Kind START writes x_T, as if by a step
    number -1. Larger batches are cut in parts. What a table holds is exact in float64: 32-bit words, and coefficients.

    The host waits once for all parts of a step (an event), so it is never ahead of the device. One thread at a time.
    """

    def __init__(
        self,
        network: Network,
        config: AnyConfig,
        sizes: list[int],
        slots: LatentPool,
        record: Record,
        device: torch.device,
    ) -> None:
        """`sizes`: the numbers of rows, ascending."""
        self._network, self._config, self._sizes, self.slots, self._record = network, config, sizes, slots, record
        self._null_class = config.num_classes if config.null_class else None
        self._graphs: dict[tuple[str, int], Callable[[], None]] = {}
        columns = len(INDEX_COLUMNS) + len(COEFFICIENTS)
        # Two micro-batches in a row have more than `sizes[-1]` rows together, before they are filled up.
        most, pinned = 4 * slots.count + sizes[-1], device.type == "cuda"
        self._table = torch.zeros(sizes[-1], columns, dtype=torch.float64, device=device)
        self._finite = torch.zeros(sizes[-1], dtype=torch.bool, device=device)
        self._host_table = torch.zeros(most, columns, dtype=torch.float64, pin_memory=pinned)
        self._host_finite = torch.zeros(most, dtype=torch.bool, pin_memory=pinned)
        # A thread that waits for it sleeps: others have work for its core.
        self._done = torch.cuda.Event(blocking=True) if pinned else None  # type: ignore[no-untyped-call]
        nowhere = np.array([slots.null_slot])
        self._padding = self._rows(nowhere, np.array([0]), dummy_batch(1))[0]
        self._table.copy_(torch.from_numpy(self._padding))

    @property
    def rows(self) -> list[int]:
        """Numbers of network rows that have a graph for each kind of step, ascending."""
        return [n for n in self._sizes if all((kind, n) in self._graphs for kind in (START, DETERMINISTIC, STOCHASTIC))]

    def capture(self, rows: int) -> Iterator[None]:
        """Makes those of one number of rows; the largest comes first: the others use its memory. Yields before each.

        Raises whatever a recording raises.
        """
        for kind, run in (
            (START, partial(self._start, rows)),
            (DETERMINISTIC, partial(self._step, rows, False)),
            (STOCHASTIC, partial(self._step, rows, True)),
        ):
            yield
            self._graphs[kind, rows] = self._record(run)

    def can_run(self, batch: Batch) -> bool:
        """Whether a step of it is one of those that are recorded."""
        most_rows = 2 if batch.uses("g") else 1
        return len(batch.t) <= self.slots.count and most_rows <= self._sizes[-1] and not batch.has_dynamic

    def init_latents(self, slots: Ints, words: Ints, scales: NDArray[np.float64] | float = 1.0) -> None:
        """Puts x_T of these words there, of these scales, and zeros for x_0."""
        batch = dummy_batch(len(slots))
        self._run(START, slots, np.full(len(slots), -1), Batch(batch.t, batch.y, batch.coefficients, words))
        self.slots.scale(slots, np.broadcast_to(scales, len(slots)))

    def step(self, slots: Ints, steps: Ints, batch: Batch) -> Bools:
        """Steps number `steps` of what is in `slots`, which stays there, beside what comes of it. Whose x is finite."""
        return self._run(STOCHASTIC if batch.uses("s") else DETERMINISTIC, slots, steps, batch)

    def fill(self) -> None:
        """Puts noise into all slots, for `replay_dummy`. Nobody has one yet."""
        slots = np.arange(self.slots.count)
        self.init_latents(slots, np.stack([slots, 0 * slots, slots, 0 * slots], axis=1))

    def replay_dummy(self, rows: int) -> None:
        """A step of as many rows that changes no sample: of free slots, whose noise takes as long as a sample does. On
        zeros, or in one place, a GPU is faster."""
        free = np.array(self.slots.free() or [self.slots.null_slot])
        self._run(DETERMINISTIC, np.resize(free, rows), np.zeros(rows, np.int64), dummy_batch(rows))

    # On the host

    def _run(self, kind: str, slots: Ints, steps: Ints, batch: Batch) -> Bools:
        table, spans, at = self._host_table.numpy(), [], 0
        rows, is_guided = self._rows(slots, steps, batch), batch.guided
        try:
            for part in split_micro_batches(1 + is_guided, self._sizes[-1]):
                used = self._fill(table[at:], rows[part], np.flatnonzero(is_guided[part]))
                size = next(size for size in self._sizes if size >= used)
                table[at + used : at + size] = self._padding
                self._table[:size].copy_(self._host_table[at : at + size], non_blocking=True)
                self._graphs[kind, size]()
                self._host_finite[at : at + size].copy_(self._finite[:size], non_blocking=True)
                spans.append(slice(at, at + part.stop - part.start))
                at += size
        finally:  # a part that was launched reads the host's table, whatever became of those after it
            if self._done is not None:
                self._done.record()
                self._done.synchronize()
        finite = self._host_finite.numpy()
        return np.concatenate([finite[span] for span in spans])

    def _rows(self, slots: Ints, steps: Ints, batch: Batch) -> NDArray[np.float64]:
        """The table's [N, columns], each with itself as the null row."""
        places = {
            "x": x_row(slots, steps),
            "x0": x0_row(slots, steps - 1),
            "x0_prev": x0_row(slots, steps - 2),
            "x_next": x_row(slots, steps + 1),
            "x0_next": x0_row(slots, steps),
            "null": np.zeros(len(slots)),
            "t": batch.t,
            "y": np.zeros(len(slots)) if batch.y is None else batch.y,
        }
        return np.column_stack(
            [*(places[name] for name in INDEX_COLUMNS[: WORDS.start]), batch.words, batch.coefficients]
        )

    def _fill(self, table: NDArray[np.float64], rows: NDArray[np.float64], is_guided: Ints) -> int:
        """Writes them down, with those of the null class after them; how many there are."""
        nulls = np.arange(len(rows), len(rows) + len(is_guided))
        used = len(rows) + len(nulls)
        table[: len(rows)] = rows
        if len(nulls):
            assert self._null_class is not None, "guidance needs a network with a null class"
            table[is_guided, INDEX_COLUMNS.index("null")] = nulls
            table[nulls] = self._padding
            for name in ("x", "t"):
                table[nulls, INDEX_COLUMNS.index(name)] = rows[is_guided, INDEX_COLUMNS.index(name)]
            table[nulls, INDEX_COLUMNS.index("y")] = self._null_class
        return used

    # On the device; nothing waits for it here, and all memory that outlives a call stays where it is

    def _unpack_inputs(self, rows: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Indices int64 [rows] by name (t float32), words int64 [rows, 4], coefficients float32 [rows, 10]."""
        ints = self._table[:rows, : len(INDEX_COLUMNS)].long()
        columns = dict(zip(INDEX_COLUMNS, ints.t().contiguous().unbind(), strict=True))
        columns["t"] = self._table[:rows, INDEX_COLUMNS.index("t")].float()
        return columns, ints[:, WORDS], self._table[:rows, len(INDEX_COLUMNS) :].float()

    def _start(self, rows: int) -> None:
        at, words, _ = self._unpack_inputs(rows)
        x = normals_of(words, self._config.image_shape)
        self.slots.x.index_copy_(0, at["x_next"], x)
        for place in ("x0", "x0_next"):  # of steps -2 and -1
            self.slots.x0.index_copy_(0, at[place], torch.zeros_like(x))

    def _step(self, rows: int, noisy: bool) -> None:
        at, words, coefficients = self._unpack_inputs(rows)
        x = self.slots.x.index_select(0, at["x"])
        x0_prev, x0_prev2 = (self.slots.x0.index_select(0, at[name]) for name in ("x0", "x0_prev"))
        out = self._network(x, at["t"], None if self._config.num_classes is None else at["y"])
        if self._null_class is not None:
            u = out[:, : x.shape[1]].index_select(0, at["null"])
            out = apply_cfg(out, u, coefficients[:, COEFFICIENTS.index("g")])
        # Rows without noise are given some, too: their s is 0.
        z = normals_of(words, self._config.image_shape) if noisy else torch.zeros_like(x)
        x_next, x0 = apply_step(x, out, x0_prev, x0_prev2, coefficients, z, False)
        self.slots.x.index_copy_(0, at["x_next"], x_next)
        self.slots.x0.index_copy_(0, at["x0_next"], x0)
        self._finite[:rows].copy_(torch.isfinite(x_next).flatten(1).all(1))


def split_micro_batches(costs: Ints, micro_batch_size: int) -> Iterator[slice]:
    """Cuts samples into runs of them that cost at most `micro_batch_size` network rows; each costs `costs` [N]."""
    start, rows = 0, 0
    for i, cost in enumerate(costs.tolist()):
        if rows + cost > micro_batch_size:
            yield slice(start, i)
            start, rows = i, 0
        rows += cost
    yield slice(start, len(costs))


def dummy_batch(n: int) -> Batch:
    """n rows that change nothing: unguided, and multiplied by zero."""
    coefficients = np.zeros((n, len(COEFFICIENTS)))
    coefficients[:, COEFFICIENTS.index("g")] = 1
    zeros = np.zeros(n, np.int64)
    return Batch(zeros.astype(np.float64), zeros, coefficients, np.zeros((n, 4), np.int64))


Update = Callable[[Batch, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A step without graphs: of a batch and its x, x0_prev and x0_prev2 → x_next, x0."""


def verify_against_eager(
    graphs: CUDAGraphRunner, config: AnyConfig, rows: int, last_timestep: int, update: Update
) -> bool:
    """Whether made-up samples that fill `rows` rows of the network come out of `update` the same, to the bit.

    They take a step of each kind and one more, so that every slot is written to in every place, from x_T on, and have
    all that a schedule can have but a dynamic limit. Overwrites the first slots.
    """
    slots, places = graphs.slots, np.arange(rows)
    words = np.stack([7 * places + 1, places, places, 0 * places], axis=1)
    graphs.init_latents(places, words)
    seeds = [int(low) + 2**32 * int(high) for low, high in words[:, :2]]
    x = normals(seeds, places.tolist(), [0] * rows, config.image_shape, slots.x.device)
    n = rows - (rows + 1) // 3 if config.null_class else rows
    x, places, words = x[:n], places[:n], words[:n]
    x0 = x0_prev = torch.zeros_like(x)
    for step in range(4):
        row = random_coefficients(n, step, n - rows, config)
        y = None if config.num_classes is None else (places + step) % config.num_classes
        batch = Batch(last_timestep * (places + step + 1) / (n + 3), y, row, words + np.array([0, 0, 0, step + 1]))
        finite = graphs.step(places, np.full(n, step), batch)
        x, new = update(batch, x, x0, x0_prev)
        x0, x0_prev = new, x0
        found = slots.x[x_row(places, np.array(step + 1))], slots.x0[x0_row(places, np.array(step))]
        if not (finite.all() and torch.equal(found[0], x) and torch.equal(found[1], x0)):
            return False
    return True


def random_coefficients(n: int, step: int, guided: int, config: AnyConfig) -> NDArray[np.float64]:
    """Rows of a schedule [n, 10]; the last `guided` (a negative number) are guided."""
    row = np.outer(np.arange(1, n + 1) + step, np.arange(1.0, len(COEFFICIENTS) + 1)).astype(np.float64) * 0.618
    row -= np.floor(row)
    columns = dict(zip(COEFFICIENTS, row.T, strict=True))  # views
    columns["g"][:] = 1
    if guided:
        columns["g"][guided:] = 2.5
    columns["limit"][:] = np.arange(n) % 2
    columns["k"] *= config.learned_variance
    columns["s"] *= step % 2 * ((np.arange(n) + step) % 3 != 0)
    return row
