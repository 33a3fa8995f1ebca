"""What every peer runs: the same weights, the same network function, the same loop, the same picture files.

A peer batches whole requests. In a batch those of one schedule run together, `rows` images at a time; another
schedule has to wait, since a loop over a schedule is all that `model.sampling.sample` can do. That is what a competent
user of these servers would write. (Running all to the longest schedule would cost more than it saves.)
"""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model import checkpoint
from model.backends.compile import best_precision, compile_for_inference
from model.images import grid, to_uint8
from model.malloc import tune_malloc
from model.sampling.schedule import SamplingSchedule, make_schedule
from model.sampling.step import sample
from tests.bench.serving.fixed_latency import held
from tests.bench.serving.settings import SAMPLER, Settings

CPU = torch.device("cpu")


class Backend:
    """The network, warm. It has what our server gives its own: a thread that no other shares the cores with in OpenMP's
    eyes (in two of these servers the network would run on another thread than it was warmed up on, 1.6 times as
    slowly), and memory that stays with the process."""

    def __init__(self, told: Settings) -> None:
        torch.set_num_threads(1)
        tune_malloc()
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(told.threads,))
        self.told, self.checkpoint = told, checkpoint.load(told.checkpoint)
        self.precision = best_precision(CPU)
        self.network = held(compile_for_inference(self.checkpoint.network, CPU, self.precision), told)
        self.schedules: dict[int, SamplingSchedule] = {}
        self.steps_done = 0
        for rows in {1, told.rows}:
            self.run([(0, 0)] * rows, [0] * rows, 2)

    def schedule(self, steps: int) -> SamplingSchedule:
        """That of all requests with so many steps, as the service would make it."""
        if steps not in self.schedules:
            config = self.checkpoint.config
            asked = config.sampling.with_overrides(config.diffusion.num_timesteps, steps=steps, **SAMPLER)
            self.schedules[steps] = make_schedule(self.checkpoint.diffusion, **asdict(asked))
        return self.schedules[steps]

    def run(
        self,
        places: Sequence[tuple[int, int]],
        classes: Sequence[int],
        steps: int,
        on_step: Callable[[int, Tensor, Tensor], Any] | None = None,
    ) -> Tensor:
        """Images of (seed, index), uint8 [N, C, H, W]."""
        seeds, indices = zip(*places, strict=True)
        shape, schedule = self.checkpoint.config.unet.image_shape, self.schedule(steps)
        work = self.thread.submit(sample, self.network, schedule, shape, seeds, indices, classes, on_step=on_step)
        self.steps_done += len(places) * steps
        return to_uint8(work.result())

    def generate(self, requests: Sequence[dict[str, Any]]) -> list[bytes]:
        """A PNG for each request {class_label, n, seed, steps}."""
        groups: dict[int, list[tuple[int, int]]] = defaultdict(list)  # steps → (request, image)
        for i, request in enumerate(requests):
            groups[request["steps"]] += [(i, index) for index in range(request["n"])]
        pictures: list[list[Tensor]] = [[] for _ in requests]
        for steps, members in groups.items():
            for start in range(0, len(members), self.told.rows):
                chunk = members[start : start + self.told.rows]
                places = [(requests[i]["seed"], index) for i, index in chunk]
                images = self.run(places, [requests[i]["class_label"] for i, _ in chunk], steps)
                for (i, _), image in zip(chunk, images, strict=True):
                    pictures[i].append(image)
        self.count()
        return [png(torch.stack(images)) for images in pictures]

    def stream(self, request: dict[str, Any], show: Callable[[bytes], object]) -> None:
        """Gives `show` one server-sent event per frame of x0 (`frames`, evenly), and one with the finished images."""
        count, steps = request["frames"], request["steps"]
        due = {round(1 + i * (steps - 1) / (count - 1)) for i in range(count)}

        def on_step(i: int, _: Tensor, x0: Tensor) -> None:
            if i in due:
                show(event("frame", to_uint8(x0)))

        places = [(request["seed"], index) for index in range(request["n"])]
        images = self.run(places, [request["class_label"]] * request["n"], steps, on_step)
        self.count()
        show(event("completed", images))

    def count(self) -> None:
        """Tells the bench how much was computed."""
        Path(self.told.counter).write_text(str(self.steps_done))


def png(images: Tensor) -> bytes:
    """A grid of images, uint8 [N, C, H, W], as a file."""
    out, picture = io.BytesIO(), grid(images.numpy())
    Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(out, "PNG")
    return out.getvalue()


def event(name: str, images: Tensor) -> bytes:
    """A server-sent event with the images as base64 PNG."""
    data = json.dumps({"png": base64.b64encode(png(images)).decode()})
    return f"event: {name}\ndata: {data}\n\n".encode()
