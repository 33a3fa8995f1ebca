"""The only place that knows the device: weights, the U-Net call, the update, the noise."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from app.engine.memory import is_out_of_memory, return_freed_memory
from app.engine.openvino import compile_openvino
from app.engine.request import Sample, View
from app.engine.sizes import agreeing, candidates, gpu_chunk
from model.checkpoint import Checkpoint
from model.cuda import CudaRecorder, Graphs, Record
from model.images import Image, to_uint8
from model.inference import compile_for_inference
from model.rng import normals
from model.sampling import apply_step, predict
from model.unet import UNet

log = logging.getLogger("ddpm.engine")

SMALL = 10_000_000  # parameters; on a CPU a call of a smaller network costs much besides its rows


def best_chunk(network: UNet, device: torch.device) -> int:
    """Most rows of a call, by what is known before anything is measured: images must not depend on a clock."""
    if device.type == "cuda":
        return gpu_chunk(network.config.image_size)
    return 16 if sum(weights.numel() for weights in network.parameters()) < SMALL else 8


class Runner:
    """Steps samples of one checkpoint on one device.

    The U-Net runs on `chunk` rows, or on fewer where that gives the same bits. The first warm-up finds out which
    numbers of rows agree (see `app.engine.sizes`); the others are filled up with zeros. On a GPU each number that
    agrees gets a CUDA graph then. Runtime and precision are those of all batches.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        chunk: int,
        threads: int = 0,
        runtime: str = "torch",
        precision: str = "fp32",
    ) -> None:
        """Raises ValueError for a runtime or precision that is not there; `threads` 0 is as many as torch has now."""
        self.config = checkpoint.config.unet
        self._threads = threads
        self.device, self.chunk, self.runtime, self.precision = device, chunk, runtime, precision
        if runtime == "openvino":
            if device.type != "cpu":
                raise ValueError(f"runtime openvino runs on the CPU, not on {device.type}")
            self._network = compile_openvino(checkpoint.network, precision, threads or torch.get_num_threads())
        else:
            self._network = compile_for_inference(checkpoint.network, device, precision)
        self._record: Record | None = CudaRecorder() if device.type == "cuda" else None
        self._last_timestep = checkpoint.config.diffusion.num_timesteps - 1
        self.sizes = [chunk]  # numbers of rows that may run, ascending
        self._probed = False
        self._null_class = self.config.num_classes if self.config.null_class else None

    @torch.inference_mode()
    def start(self, samples: list[Sample]) -> None:
        """Draws x_T."""
        noise = self._noise(samples, steps=[0] * len(samples))
        for sample, x in zip(samples, noise.unbind(), strict=True):
            sample.x, sample.x0, sample.x0_prev = x, torch.zeros_like(x), torch.zeros_like(x)

    @torch.inference_mode()
    def step(self, samples: list[Sample]) -> list[Sample]:
        """Takes every sample one step further and returns those whose x is no longer finite.

        Nothing is changed if it raises: the same samples can be stepped again.
        """
        plans = [sample.request.plan for sample in samples]
        rows = np.stack([plan.table[sample.step] for plan, sample in zip(plans, samples, strict=True)])
        table = torch.from_numpy(rows.astype(np.float32)).to(self.device)
        t = torch.tensor([int(p.timesteps[s.step]) for p, s in zip(plans, samples, strict=True)], device=self.device)
        y = None
        if self.config.num_classes is not None:
            y = torch.tensor([s.request.classes[s.i] for s in samples], device=self.device)  # type: ignore[index]
        x = torch.stack([s.x for s in samples])  # type: ignore[misc]
        x0_prev = torch.stack([s.x0 for s in samples])  # type: ignore[misc]
        x0_prev2 = torch.stack([s.x0_prev for s in samples])  # type: ignore[misc]
        z = torch.zeros_like(x)
        noisy = np.flatnonzero(rows[:, -1])
        if len(noisy):
            drawn = [samples[i] for i in noisy]
            z[torch.from_numpy(noisy).to(self.device)] = self._noise(drawn, [s.step + 1 for s in drawn])

        out = predict(self.forward, x, t, y, table[:, 0], self._null_class)
        x_next, x0 = apply_step(x, out, x0_prev, x0_prev2, table, z)
        finite = torch.isfinite(x_next).flatten(1).all(1).tolist()
        for sample, next_x, next_x0 in zip(samples, x_next.unbind(), x0.unbind(), strict=True):
            sample.x, sample.x0, sample.x0_prev = next_x, next_x0, sample.x0
            sample.step += 1
        return [sample for sample, ok in zip(samples, finite, strict=True) if not ok]

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """The network, never on a number of rows outside `sizes`. x [N, C, H, W], t [N], y [N] or None → as x."""
        parts = []
        for start in range(0, len(x), self.chunk):
            rows = slice(start, start + self.chunk)
            parts.append(self._padded(x[rows], t[rows], None if y is None else y[rows]))
        return torch.cat(parts)

    def _padded(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        n = len(x)
        padding = next(size for size in self.sizes if size >= n) - n
        if padding:
            x = torch.cat([x, x.new_zeros(padding, *x.shape[1:])])
            t = torch.cat([t, t.new_zeros(padding)])
            y = None if y is None else torch.cat([y, y.new_zeros(padding)])
        return self._network(x, t, y)[:n]

    @torch.inference_mode()
    def probe(self) -> Iterator[None]:
        """Fills `sizes`: numbers of rows whose rows come out alike, to the bit; then makes their graphs.

        Which instructions run is a matter of shapes and not of numbers, so noise tells. One network call at a time.
        """
        self._take_threads()
        x = normals([0] * self.chunk, range(self.chunk), [0] * self.chunk, self.config.image_shape, self.device)
        t = torch.linspace(0, self._last_timestep, self.chunk, device=self.device).long()
        classes = self.config.num_classes
        y = None if classes is None else torch.arange(self.chunk, device=self.device) % classes
        outs: dict[int, Tensor] = {}
        for size in candidates(self.chunk, self.device.type):
            if size < self.chunk:
                yield
            out = self._tried(*last(size, x, t, y))  # at other places than in the whole
            if out is not None:
                outs[size] = out
        self.sizes = agreeing(outs)
        self.chunk = self.sizes[-1]
        if self._record is not None:
            yield from self._capture(self._record, x, t, y, outs)
        self._probed = True

    def _tried(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor | None:
        """What the network computes. None on a GPU that has no room for it, or where a row's place changes its bits."""
        if self._record is None:
            return self._network(x, t, y)
        try:
            out = self._network(x, t, y)
            turned = self._network(x.flip(0), t.flip(0), None if y is None else y.flip(0)).flip(0)
            return out if len(x) == 1 or torch.equal(turned, out) else None
        except Exception as error:
            if len(x) == 1 or not is_out_of_memory(error):
                raise
        # The traceback is gone, with the memory that it held.
        self.free_memory()
        return None

    def _capture(
        self, record: Record, x: Tensor, t: Tensor, y: Tensor | None, outs: dict[int, Tensor]
    ) -> Iterator[None]:
        """A graph for each of `sizes`. If one cannot be made, or computes something else, there are none."""
        graphs = Graphs(self._network, record)
        try:
            for size in reversed(self.sizes):
                yield
                graphs.capture(*last(size, x, t, y))
                if not torch.equal(graphs(*last(size, x, t, y)), outs[size]):
                    raise RuntimeError(f"the graph of {size} rows does not give the bits of the network")
        except Exception as error:
            log.warning("no CUDA graphs: the network runs without them, slower", exc_info=error)
        else:
            self._network = graphs
            log.info("CUDA graphs captured", extra={"rows": graphs.rows})
            return
        del graphs
        self.free_memory()

    def read(self, samples: list[Sample], view: View) -> Image:
        """The samples as pictures, uint8 [N, C, H, W] on the host."""
        states = [sample.x0 if view == "x0" else sample.x for sample in samples]
        return to_uint8(torch.stack(states)).cpu().numpy()  # type: ignore[arg-type]

    @torch.inference_mode()
    def warm_up(self, rows: int) -> None:
        """Runs the network once on `rows` rows, as the engine will, on `threads` threads from now on (0: as is)."""
        self._take_threads()
        if not self._probed:
            for _ in self.probe():
                pass
        x = torch.zeros(rows, *self.config.image_shape, device=self.device)
        t = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.forward(x, t, None if self.config.num_classes is None else t)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Gives back the weights and what the allocator kept for them. It cannot run any more."""
        del self._network
        self.free_memory()

    def free_memory(self) -> None:
        """Gives back what the allocator keeps for later; another shape may need it."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            return_freed_memory()

    def _take_threads(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)  # of the calling thread's team

    def _noise(self, samples: list[Sample], steps: list[int]) -> Tensor:
        seeds = [sample.request.seed for sample in samples]
        indices = [sample.request.index + sample.i for sample in samples]
        return normals(seeds, indices, steps, self.config.image_shape, self.device)


def last(size: int, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The last `size` rows."""
    return x[-size:], t[-size:], None if y is None else y[-size:]
