"""What a client asked for (Request), the state of one image on its way (Sample), where results go (OutputStream)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
from torch import Tensor

from app.errors import Cancelled, DeadlineExceeded, ServiceError
from model.images import Image
from model.sampling.edit import Edit
from model.sampling.schedule import SamplingSchedule

View = Literal["xt", "x0"]


class RequestStatus(Enum):
    """Where an admitted request is. The last four are final: it has its one answer."""

    WAITING = "waiting"  # no step yet
    RUNNING = "running"
    FINISHED = "finished"  # with images
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"

    def __init__(self, value: str) -> None:
        self.is_final = value not in ("waiting", "running")  # the answer was given


@dataclass(frozen=True)
class Frame:
    """All images of a request, uint8 [n, C, H, W], after `step` of its steps. Step 0 is pure noise."""

    step: int
    images: Image


RequestOutput = Image | ServiceError
"""The one final answer of a request: its images, uint8 [n, C, H, W], or why there are none."""


class OutputStream:
    """Where the engine thread leaves frames and the answer for one client on an event loop.

    At most `keep` frames wait for the client; when one more comes the oldest is dropped, and `on_drop` is called. The
    answer is never dropped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, keep: int = 1, on_drop: Callable[[], None] = lambda: None):
        self.loop = loop
        self._frames: deque[Frame] = deque()
        self._keep, self._on_drop = keep, on_drop
        self._output: RequestOutput | None = None
        self._news = asyncio.Event()

    def put(self, item: Frame | RequestOutput) -> None:
        """On the event loop only; the engine gets here by `dispatch`."""
        if isinstance(item, Frame):
            self._frames.append(item)
            if len(self._frames) > self._keep:
                self._frames.popleft()
                self._on_drop()
        else:
            self._output = item
        self._news.set()

    async def images(self) -> Image:
        """Waits for the images. Raises the ServiceError that the engine answered."""
        while self._output is None:
            await self._wait()
        if isinstance(self._output, ServiceError):
            raise self._output
        return self._output

    async def frames(self) -> AsyncIterator[Frame]:
        """Frames as they come, until the answer is there and no frame is left."""
        while True:
            while self._frames:
                yield self._frames.popleft()
            if self._output is not None:
                return
            await self._wait()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


def dispatch(items: Iterable[tuple[OutputStream, Frame | RequestOutput]]) -> None:
    """Delivers from the engine thread: one `call_soon_threadsafe` per event loop, however many the items."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, Frame | RequestOutput]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put_all, pairs)
        except RuntimeError:  # the loop is closed: no client is left to read
            continue


def _put_all(pairs: list[tuple[OutputStream, Frame | RequestOutput]]) -> None:
    for stream, item in pairs:
        stream.put(item)


_order = itertools.count()


@dataclass(eq=False)
class Request:
    """n images of one schedule. `classes` has one class per image, or is None for an unconditional checkpoint.

    Image i is drawn from (seed, index + i). `deadline` is in seconds of `time.monotonic`; with `has_default_timeout`
    the client did not ask for it. `frame_steps` are the steps (0 is the noise) after which the client wants to see all
    n images, as x_t or as the prediction of x_0. `edit` is what all of them begin from and keep, on the CPU. `model` is
    the checkpoint's name, for the metrics.
    """

    schedule: SamplingSchedule
    seed: int
    index: int
    n: int
    classes: tuple[int, ...] | None
    deadline: float
    output: OutputStream
    model: str
    has_default_timeout: bool = False
    frame_steps: frozenset[int] = frozenset()
    view: View = "xt"
    edit: Edit | None = None

    # From here on the engine's. Times are in seconds of `time.monotonic`.
    number: int = field(default_factory=lambda: next(_order))
    status: RequestStatus = RequestStatus.WAITING
    arrival_time: float = field(default_factory=time.monotonic)
    first_step_time: float | None = None
    finish_time: float | None = None
    image_steps: int = 0  # taken, over all images

    def __post_init__(self) -> None:
        self.samples = [Sample(self, i) for i in range(self.n)]  # those that are not finished
        self.remaining_nfe = self.n * sum(self.schedule.nfe_of_steps)
        self.nfe_per_step = self.n * max(self.schedule.nfe_of_steps)  # of a step of all its images, at most
        self._images: Image | None = None
        self._frames: dict[int, tuple[Image, set[int]]] = {}  # step → canvas and the images on it

    def finish(self, output: RequestOutput) -> None:
        """Sets the final status that goes with its answer."""
        self.finish_time = time.monotonic()
        if not isinstance(output, ServiceError):
            self.status = RequestStatus.FINISHED
        elif isinstance(output, Cancelled):
            self.status = RequestStatus.CANCELLED
        elif isinstance(output, DeadlineExceeded):
            self.status = RequestStatus.EXPIRED
        else:
            self.status = RequestStatus.FAILED

    def add_image(self, i: int, image: Image) -> Image | None:
        """Puts the finished image i [C, H, W] in its place; returns all n images when it is the last."""
        self._images = self._canvas(image) if self._images is None else self._images
        self._images[i] = image
        self.samples = [sample for sample in self.samples if sample.i != i]
        return None if self.samples else self._images

    def add_frame_image(self, step: int, i: int, image: Image) -> Frame | None:
        """Puts image i as it is after `step` into that step's frame; returns the frame when it is the last of n."""
        if step not in self._frames:
            self._frames[step] = self._canvas(image), set()
        canvas, there = self._frames[step]
        canvas[i] = image
        there.add(i)
        if len(there) < self.n:
            return None
        del self._frames[step]
        return Frame(step, canvas)

    def _canvas(self, image: Image) -> Image:
        return np.empty((self.n, *image.shape), np.uint8)


class Sample:
    """One image on its way: image i of its request, steps done, and its state, which belongs to the runner.

    The state is x_t and the last two x_0 [C, H, W], or the number of the slot that they are in; all None before the
    noise is drawn. `kept` is the request's edit on the device, where it has a mask.
    """

    __slots__ = ("__weakref__", "i", "kept", "request", "slot", "step", "x", "x0", "x0_prev")

    def __init__(self, request: Request, i: int) -> None:
        self.request, self.i = request, i
        self.step = 0
        self.slot: int | None = None  # see `app.engine.latent_pool`
        self.x: Tensor | None = None
        self.x0: Tensor | None = None
        self.x0_prev: Tensor | None = None
        self.kept: Edit | None = None

    @property
    def has_noise(self) -> bool:
        """Whether its x_T was drawn."""
        return self.x is not None or self.slot is not None

    @property
    def nfe(self) -> int:
        """Network rows of the next step: two with guidance."""
        return self.request.schedule.nfe_of_steps[self.step]

    @property
    def finished(self) -> bool:
        """Whether it has taken every step of its schedule."""
        return self.step == len(self.request.schedule)
