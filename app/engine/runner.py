"""The only place that knows the device: weights, the U-Net call, the update, the noise."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from operator import is_

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.autotune import autotune_batch_size
from app.engine.batch import DYNAMIC, LIMIT, Batch, finite_rows, rng_counters
from app.engine.batch_invariance import candidate_batch_sizes, largest_invariant_set, split_rows, take_last
from app.engine.cuda_graphs import CUDAGraphRunner, verify_against_eager
from app.engine.edits import Kept, first_states, kept_parts
from app.engine.latent_pool import LatentPool, pool_size
from app.engine.memory import is_out_of_memory
from app.engine.request import Sample, View
from app.engine.thread_team import ThreadTeam
from app.engine.workers import WorkerPool
from model.backends.compile import compile_for_inference
from model.backends.cuda import CudaRecorder, Record
from model.backends.openvino import compile_openvino
from model.backends.recorded import RecordedNetwork
from model.checkpoint import Checkpoint
from model.diffusion import Network
from model.images import Image, to_uint8
from model.malloc import trim_malloc
from model.sampling.noise import normals, normals_of
from model.sampling.step import apply_step, cfg_forward

log = logging.getLogger("ddpm.engine")

LONE_NOISE = 16_384  # values of noise that one thread draws sooner than it wakes another


class ModelRunner:
    """Steps samples of one checkpoint on one device.

    The U-Net runs on `micro_batch_size` rows, or on fewer where that gives the same bits. The first warm-up finds out
    which numbers of rows agree (see `app.engine.batch_invariance`); the others are filled up with zeros. On a CPU the
    calls of a step run side by side, on one thread each (see `app.engine.workers`), but a lone row may have several
    threads (see `app.engine.thread_team`). On a GPU each number that agrees gets CUDA graphs of whole steps then (see
    `app.engine.cuda_graphs`), and samples are in slots; steps that are not among those run without, to the same bits.
    Runtime and precision are those of all batches.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        micro_batch_size: int,
        threads: int = 0,
        runtime: str = "torch",
        precision: str = "fp32",
    ) -> None:
        """Raises ValueError for a runtime or precision that is not there; `threads` 0 is as many as torch has now."""
        self.config = checkpoint.config.unet
        self._threads = threads or torch.get_num_threads()
        self._workers = WorkerPool(self._threads if device.type == "cpu" and runtime == "torch" else 1)
        self.device, self.micro_batch_size, self.runtime, self.precision = device, micro_batch_size, runtime, precision
        if runtime == "openvino":
            if device.type != "cpu":
                raise ValueError(f"runtime openvino runs on the CPU, not on {device.type}")
            self._network = compile_openvino(checkpoint.network, precision, self._threads)
        else:
            self._network = compile_for_inference(checkpoint.network, device, precision)
        self._team: ThreadTeam | None = None  # of a call of the fewest rows, alone in its step; see the warm-up
        if self._workers.size > 1:
            packed_anew = compile_for_inference(checkpoint.network, device, precision)
            self._team = ThreadTeam(packed_anew, self._network, self._workers.size)
        self._record: Record | None = CudaRecorder() if device.type == "cuda" else None
        self._graphs: CUDAGraphRunner | None = None
        self._whole: list[tuple[Tensor, tuple[Tensor, ...]]] = []  # x, x0, x0 before of the last step; their rows
        self._last_timestep = checkpoint.config.diffusion.num_timesteps - 1
        self.sizes = [micro_batch_size]  # numbers of rows that may run, ascending
        self._sizes_found = False
        self._null_class = self.config.num_classes if self.config.null_class else None

    @torch.inference_mode()
    def init_latents(self, samples: list[Sample]) -> None:
        """Draws x_T; edits begin from their noised reference. Nothing is changed if it raises."""
        graphs = self._graphs if self._graphs and len(samples) <= self._graphs.slots.count else None
        others = samples if graphs is None else [sample for sample in samples if sample.request.edit is not None]
        drawn = [] if graphs is None else [sample for sample in samples if sample.request.edit is None]
        states = first_states(others, self._noise(rng_counters(others, [0] * len(others)))) if others else []
        if graphs is not None and drawn:
            slots = graphs.slots.allocate(len(drawn), drawn)
            scales = np.array([sample.request.schedule.start[1] for sample in drawn])
            graphs.init_latents(np.array(slots), rng_counters(drawn, [0] * len(drawn)), scales)
            graphs.slots.assign(drawn, slots)
        nothing = torch.zeros(self.config.image_shape, device=self.device)  # one for all: a step replaces states
        for sample, (x, kept) in zip(others, states, strict=True):
            sample.x, sample.x0, sample.x0_prev, sample.kept = x, nothing, nothing, kept

    @torch.inference_mode()
    def step(self, samples: list[Sample]) -> list[Sample]:
        """Takes every sample one step further and returns those whose x is no longer finite.

        Nothing is changed if it raises: the same samples can be stepped again.
        """
        graphed, batch = self._recorded(samples)
        those = set(graphed)
        others = [sample for sample in samples if sample not in those] if graphed else samples
        states, finite = self._step_eagerly(others, Batch.of(others)) if others else ([], [])
        if batch is not None:
            finite += self._step_by_graphs(graphed, batch)
        # Nothing fails from here on.
        for sample, (x, x0) in zip(others, states, strict=True):
            sample.x, sample.x0, sample.x0_prev = x, x0, sample.x0
        for sample in samples:
            sample.step += 1
        return [sample for sample, ok in zip(others + graphed, finite, strict=True) if not ok]

    def _recorded(self, samples: list[Sample]) -> tuple[list[Sample], Batch | None]:
        """Whom graphs step. A dynamic limit or a mask is its own request's affair: the others keep theirs."""
        if self._graphs is None:
            return [], None
        those = [s for s in samples if s.kept is None and s.request.schedule.table[s.step, LIMIT] != DYNAMIC]
        batch = Batch.of(those) if those else None
        return (those, batch) if batch is not None and self._graphs.can_run(batch) else ([], None)

    def _step_by_graphs(self, samples: list[Sample], batch: Batch) -> list[bool]:
        """Whose x is finite. The new states lie beside the old ones, which are theirs until the step is counted."""
        assert self._graphs is not None
        self._graphs.slots.load(samples)
        steps = np.array([sample.step for sample in samples])
        finite: list[bool] = self._graphs.step(np.array([sample.slot for sample in samples]), steps, batch).tolist()
        return finite

    def _step_eagerly(self, samples: list[Sample], batch: Batch) -> tuple[list[tuple[Tensor, Tensor]], list[bool]]:
        """Their next x and x_0, and whose x is finite, kernel by kernel."""
        if self._graphs is not None:
            self._graphs.slots.evict(samples)
        x = self._stacked([s.x for s in samples])
        x0_prev = self._stacked([s.x0 for s in samples]) if batch.uses("c") else None
        x0_prev2 = self._stacked([s.x0_prev for s in samples]) if batch.uses("d") else None
        x_next, x0 = self._update(batch, x, x0_prev, x0_prev2, kept_parts(samples, x))
        rows, x0_rows = x_next.unbind(), x0.unbind()
        self._whole = [(x_next, rows), (x0, x0_rows), *self._whole[1:2]]
        return list(zip(rows, x0_rows, strict=True)), finite_rows(x_next)

    def _stacked(self, states: Sequence[Tensor | None]) -> Tensor:
        """One tensor of them: not a copy where the last steps were of the same samples."""
        for whole, rows in self._whole:
            if len(rows) == len(states) and all(map(is_, rows, states)):
                return whole
        return torch.stack(list(states))  # type: ignore[arg-type]

    def _update(
        self, batch: Batch, x: Tensor, x0_prev: Tensor | None, x0_prev2: Tensor | None, kept: Kept | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_next and x0, each [N, C, H, W] as the states."""
        table = torch.from_numpy(batch.coefficients.astype(np.float32)).to(self.device)
        t = torch.from_numpy(batch.t.astype(np.float32)).to(self.device)
        y = None if batch.y is None else torch.from_numpy(batch.y).to(self.device)
        if batch.uses("g"):
            out = cfg_forward(self.forward, x, t, y, table[:, 0], self._null_class)
        else:
            out = self.forward(x, t, y)
        z = self._noise_of_step(batch, x) if batch.uses("s") else None
        return apply_step(x, out, x0_prev, x0_prev2, table, z, batch.has_dynamic, kept, batch.all_clamped)

    def _noise_of_step(self, batch: Batch, x: Tensor) -> Tensor:
        """Of the rows that add some; zeros for the others."""
        if batch.noisy.all():
            return self._noise(batch.words)
        z, noisy = torch.zeros_like(x), np.flatnonzero(batch.noisy)
        z[torch.from_numpy(noisy).to(self.device)] = self._noise(batch.words[noisy])
        return z

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network, never on a number of rows outside `sizes`. x [N, C, H, W], t [N], y [N] or None → as x."""
        if self._sizes_found and len(x) <= self.sizes[0]:
            return self._padded((x, t, y), self._team)
        cuts = split_rows(len(x), self.sizes, self._workers.size)
        classes = [None] * len(cuts) if y is None else y.split_with_sizes(cuts)
        outs = self._workers.map(
            self._padded, list(zip(x.split_with_sizes(cuts), t.split_with_sizes(cuts), classes, strict=True))
        )
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _padded(self, rows: tuple[Tensor, Tensor, Tensor | None], network: Network | None = None) -> Tensor:
        x, t, y = rows
        n = len(x)
        padding = next(size for size in self.sizes if size >= n) - n
        if padding:
            x = torch.cat([x, x.new_zeros(padding, *x.shape[1:])])
            t = torch.cat([t, t.new_zeros(padding)])
            y = None if y is None else torch.cat([y, y.new_zeros(padding)])
        return (network or self._network)(x, t, y)[:n]

    @torch.inference_mode()
    def find_invariant_sizes(self) -> Iterator[None]:
        """Fills `sizes`: numbers of rows whose rows come out alike, to the bit; then makes their graphs.

        Which instructions run is a matter of shapes and not of numbers, so noise tells. One network call at a time.
        """
        self._take_threads()
        most = self.micro_batch_size
        x = normals([0] * most, range(most), [0] * most, self.config.image_shape, self.device)
        t = torch.linspace(0, self._last_timestep, most, device=self.device).floor()
        classes = self.config.num_classes
        y = None if classes is None else torch.arange(most, device=self.device) % classes
        outs: dict[int, Tensor] = {}
        for size in candidate_batch_sizes(most, self.device.type):
            if size < most:
                yield
            out = self._try_batch(*take_last(size, x, t, y))  # at other places than in the whole
            if out is not None:
                outs[size] = out
        self.sizes = largest_invariant_set(outs)
        self.micro_batch_size = self.sizes[-1]
        if self._record is not None:
            yield from self._capture(self._record)
        if isinstance(network := self._network, RecordedNetwork):
            for size in self.sizes:
                yield
                if not network.record(*take_last(size, x, t, y)):
                    break  # larger calls take longer
        if self._team is not None:
            yield
            try:
                agree = yield from self._team.agrees(*take_last(self.sizes[0], x, t, y))
            except Exception as error:  # it is to be faster, no more: there may be no memory for more weights
                log.warning("a lone row has no team of threads: slower", exc_info=error)
                agree = False
            self._team = self._team if agree else None
        self._sizes_found = True

    def _try_batch(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor | None:
        """What the network computes. None on a GPU that has no room for it, or where a row's place changes its bits."""
        if self._record is None:
            return self._network(x, t, y)
        try:
            out = self._network(x, t, y)
            turned = self._network(x.flip(0), t.flip(0), None if y is None else y.flip(0)).flip(0)
            return out if len(x) == 1 or torch.equal(turned, out) else None
        except Exception as error:
            if len(x) == 1 or not is_out_of_memory(error, len(x)):
                raise
        # The traceback is gone, with the memory that it held.
        self.free_memory()
        return None

    def _capture(self, record: Record) -> Iterator[None]:
        """Graphs for each of `sizes`. If one cannot be made, or computes something else, there are none."""
        shape = self.config.image_shape
        try:
            slots = LatentPool(pool_size(shape, self.micro_batch_size), shape, self.device)
            graphs = CUDAGraphRunner(self._network, self.config, self.sizes, slots, record, self.device)
            for size in reversed(self.sizes):
                yield from graphs.capture(size)
            for size in self.sizes:
                yield
                if not verify_against_eager(graphs, self.config, size, self._last_timestep, self._update):
                    raise RuntimeError(f"graphs of {size} rows do not give the bits of a step without them")
            graphs.fill()
        except Exception as error:
            log.warning("no CUDA graphs: steps run without them, slower", exc_info=error)
        else:
            self._graphs = graphs
            log.info("CUDA graphs captured", extra={"rows": graphs.rows, "slots": slots.count})
            return
        slots = graphs = None  # type: ignore[assignment]
        self.free_memory()

    def to_images(self, samples: list[Sample], view: View) -> Image:
        """The samples as pictures, uint8 [N, C, H, W] on the host."""
        if self._graphs is not None:
            of = self._graphs.slots.x0_of if view == "x0" else self._graphs.slots.x_of
            states = [of(sample) for sample in samples]
        else:
            states = [s.x0 if view == "x0" else s.x for s in samples]  # type: ignore[misc]
        return to_uint8(self._stacked(states)).cpu().numpy()

    def autotune(self) -> Generator[None, None, tuple[int, int]]:
        """How many rows a step usually has, and how many at most. Yields after each call."""
        kind, workers = self.device.type, self._workers.size
        if self.runtime != "torch" or kind != "cpu":
            return (yield from autotune_batch_size(self.warm_up, self.micro_batch_size, kind))
        # The processor's time of one worker's call: what else the machine does has no part in it.
        # A worker that is held up leaves its second call to the others.
        calls = workers, 2 * workers
        return (yield from autotune_batch_size(self._call, self.micro_batch_size, kind, time.thread_time, 1, calls))

    @torch.inference_mode()
    def _call(self, rows: int) -> None:
        x = torch.zeros(rows, *self.config.image_shape, device=self.device)
        t = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self._padded((x, t, None if self.config.num_classes is None else t))

    @torch.inference_mode()
    def warm_up(self, rows: int) -> None:
        """Runs `rows` rows once, as the engine will."""
        self._take_threads()
        if not self._sizes_found:
            for _ in self.find_invariant_sizes():
                pass
        if self._graphs is not None and rows <= self._graphs.slots.count:
            self._graphs.replay_dummy(rows)
            return
        x = torch.zeros(rows, *self.config.image_shape, device=self.device)
        t = torch.zeros(rows, device=self.device)
        self.forward(x, t, None if self.config.num_classes is None else t.long())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Ends the workers, and gives back the weights and what the allocator kept for them. It cannot run any more."""
        self._workers.close()
        self._graphs = self._team = None
        del self._network
        self.free_memory()

    def free_memory(self) -> None:
        """Gives back what the allocator keeps for later; another shape may need it."""
        self._whole.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            trim_malloc()

    def stop_workers(self) -> None:
        """No step will come. If one does, they start again."""
        self._workers.close()

    def _take_threads(self) -> None:
        """Of the calling thread's team: a call on a CPU has one, and its mates the others."""
        torch.set_num_threads(self._threads if self.device.type == "cuda" else 1)

    def _noise(self, words: NDArray[np.int64]) -> Tensor:
        shape = self.config.image_shape
        workers = self._workers.size if len(words) * math.prod(shape) > LONE_NOISE else 1
        parts = torch.from_numpy(words).to(self.device).chunk(workers)
        noise = self._workers.map(lambda part: normals_of(part, shape), parts)
        return noise[0] if len(noise) == 1 else torch.cat(noise)
