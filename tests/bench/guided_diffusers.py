"""diffusers' network and scheduler in a loop with guidance, for `tests.bench.end_to_end`. Needs torch and diffusers.

    PYTHON guided_diffusers.py FOLDER_OF_A_CLASS FOLDER_OF_NONE GUIDANCE_SCALE

The folders are what `python -m model.exporters` makes with --class_label: diffusers' networks know no classes in their
blocks, so one makes the conditional half and another the unconditional one. First the fastest form of the networks is
chosen: fp32 or bf16, channels last or not. Then a line with two numbers makes images in so many steps, and so many of
them, and is answered by the seconds that it took; a third word is a file that gets them (.npy).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

import numpy
import torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
from torch import Tensor

BATCH = 16


class Pair:
    """The two networks in one form."""

    def __init__(self, folders: list[str], precision: torch.dtype, layout: torch.memory_format) -> None:
        self.form = f"{precision}, {layout}".replace("torch.", "")
        self.precision, self.layout = precision, layout
        told = {"torch_dtype": precision, "low_cpu_mem_usage": False}
        networks = [UNet2DModel.from_pretrained(f"{folder}/unet", **told) for folder in folders]
        self.networks = [network.eval().to(memory_format=layout) for network in networks]
        config = self.networks[0].config
        self.shape = config.in_channels, *config.sample_size

    def __call__(self, x: Tensor, t: Tensor) -> Iterator[Tensor]:
        """The class's output and that of none, float32."""
        x = x.to(self.precision, memory_format=self.layout)
        return (network(x, t).sample.float() for network in self.networks)

    @torch.inference_mode()
    def step_seconds(self, count: int) -> float:
        """Of a step of so many images, the best of three."""
        x, t, times = torch.randn(count, *self.shape), torch.tensor(500), []
        for _ in range(3):
            begun = time.perf_counter()
            list(self(x, t))
            times.append(time.perf_counter() - begun)
        return min(times)


@torch.inference_mode()
def generate(pair: Pair, scheduler: DPMSolverMultistepScheduler, steps: int, scale: float, count: int) -> Tensor:
    """Images, float32 [count, C, H, W]."""
    x = torch.randn(count, *pair.shape, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        conditional, unconditional = pair(x, t)
        x = scheduler.step(unconditional + scale * (conditional - unconditional), t, x).prev_sample
    return x


def main(folders: list[str], scale: float) -> None:
    scheduler = DPMSolverMultistepScheduler.from_pretrained(f"{folders[0]}/scheduler", final_sigmas_type="zero")
    layouts = (torch.contiguous_format, torch.channels_last)
    pairs = [Pair(folders, p, layout) for p in (torch.float32, torch.bfloat16) for layout in layouts]
    best = min(pairs, key=lambda pair: pair.step_seconds(BATCH))
    print(best.form, flush=True)
    for line in sys.stdin:
        steps, count, *file = line.split()
        begun = time.perf_counter()
        images = generate(best, scheduler, int(steps), scale, int(count))
        print(time.perf_counter() - begun, flush=True)
        if file:
            numpy.save(file[0], images.numpy())


if __name__ == "__main__":
    main(sys.argv[1:3], float(sys.argv[3]))
