"""The only place that knows the device: weights, the U-Net call, the update, the noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from app.engine.memory import return_freed_memory
from app.engine.openvino import compile_openvino
from app.engine.request import Sample, View
from model.checkpoint import Checkpoint
from model.images import Image, to_uint8
from model.inference import compile_for_inference
from model.rng import normals
from model.sampling import apply_step, predict
from model.unet import UNet

SMALL = 10_000_000  # parameters; on a CPU a call of a smaller network costs much besides its rows


def best_chunk(network: UNet, device: torch.device) -> int:
    """Most rows of a call, by what is known before anything is measured: images must not depend on a clock."""
    if device.type == "cuda":
        return 32
    return 16 if sum(weights.numel() for weights in network.parameters()) < SMALL else 8


class Runner:
    """Steps samples of one checkpoint on one device.

    The U-Net runs on `chunk` rows, or on fewer where that gives the same bits: kernels choose their order of summation
    by the number of rows, so an image could otherwise depend, in its last bits, on who shares its batch. The first
    warm-up finds out which numbers of rows agree; the others are filled up with zeros. Runtime and precision are those
    of all batches.
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
        """Fills `sizes`: a number of rows may run if its rows come out as those of a whole chunk do, to the bit.

        Which instructions run is a matter of shapes and not of numbers, so noise tells. One network call at a time.
        """
        self._take_threads()
        x = normals([0] * self.chunk, range(self.chunk), [0] * self.chunk, self.config.image_shape, self.device)
        t = torch.linspace(0, self._last_timestep, self.chunk, device=self.device).long()
        classes = self.config.num_classes
        y = None if classes is None else torch.arange(self.chunk, device=self.device) % classes
        whole = self._network(x, t, y)
        agreeing = [self.chunk]
        for size in range(1, self.chunk):
            yield
            rows = slice(self.chunk - size, self.chunk)  # and so at other places than in the whole
            part = self._network(x[rows], t[rows], None if y is None else y[rows])
            if torch.equal(part, whole[rows]):
                agreeing.append(size)
        self.sizes = sorted(agreeing)
        self._probed = True

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
