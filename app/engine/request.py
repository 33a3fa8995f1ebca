"""What a client asked for (Request), the state of one image on its way (Sample), where the answer goes (Mailbox)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from app.errors import ServiceError
from model.images import Image
from model.sampling.schedule import Plan

if TYPE_CHECKING:
    from app.engine.served import Served

View = Literal["xt", "x0"]


@dataclass(frozen=True)
class Frame:
    """All images of a request, uint8 [n, C, H, W], after `step` of its steps. Step 0 is pure noise."""

    step: int
    images: Image


Answer = Image | ServiceError
"""The one terminal answer of a request: its images, uint8 [n, C, H, W], or why there are none."""


class Mailbox:
    """Where the engine thread leaves frames and the answer for one client on an event loop.

    With `keep` frames at most `keep` wait for the client; the oldest goes when one more comes. `on_drop` is told.
    The answer is never dropped.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, keep: int = 1, on_drop: Callable[[], None] = lambda: None):
        self.loop = loop
        self._frames: deque[Frame] = deque()
        self._keep, self._on_drop = keep, on_drop
        self._answer: Answer | None = None
        self._news = asyncio.Event()

    def deliver(self, item: Frame | Answer) -> None:
        """On the event loop only; the engine gets here by `post`."""
        if isinstance(item, Frame):
            self._frames.append(item)
            if len(self._frames) > self._keep:
                self._frames.popleft()
                self._on_drop()
        else:
            self._answer = item
        self._news.set()

    async def answer(self) -> Image:
        """Waits for the images. Raises the ServiceError that the engine answered."""
        while self._answer is None:
            await self._wait()
        if isinstance(self._answer, ServiceError):
            raise self._answer
        return self._answer

    async def frames(self) -> AsyncIterator[Frame]:
        """Frames as they come, until the answer is there and no frame is left."""
        while True:
            while self._frames:
                yield self._frames.popleft()
            if self._answer is not None:
                return
            await self._wait()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


def post(items: Iterable[tuple[Mailbox, Frame | Answer]]) -> None:
    """Delivers from the engine thread: one `call_soon_threadsafe` per event loop, however many the items."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, Frame | Answer]]] = {}
    for mailbox, item in items:
        by_loop.setdefault(mailbox.loop, []).append((mailbox, item))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_deliver, pairs)
        except RuntimeError:  # the loop is closed: nobody is left to read
            continue


def _deliver(pairs: list[tuple[Mailbox, Frame | Answer]]) -> None:
    for mailbox, item in pairs:
        mailbox.deliver(item)


_order = itertools.count()


@dataclass(eq=False)
class Request:
    """n images of one plan. `classes` has one class per image, or is None for an unconditional checkpoint.

    Image i is drawn from (seed, index + i), by the weights of `served`. `deadline` is in seconds of `time.monotonic`;
    a `patient` client did not ask for it. `frame_steps` are the steps (0 is the noise) after which the client wants to
    see all n images, as x_t or as the prediction of x_0.
    """

    plan: Plan
    seed: int
    index: int
    n: int
    classes: tuple[int, ...] | None
    deadline: float
    mailbox: Mailbox
    served: Served
    patient: bool = False
    frame_steps: frozenset[int] = frozenset()
    view: View = "xt"

    # From here on the engine's.
    number: int = field(default_factory=lambda: next(_order))
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    cancelled_at: float | None = None
    steps_done: int = 0  # over all images, for what a cancel wasted
    answered: bool = False
    answered_at: float | None = None

    def __post_init__(self) -> None:
        self.samples = [Sample(self, i) for i in range(self.n)]
        self.work_left = self.n * int(self.plan.rows.sum())  # in U-Net rows
        self.rows = self.n * int(self.plan.rows.max())  # U-Net rows of a step of all its images, at most
        self.images: Image | None = None
        self._frames: dict[int, tuple[Image, set[int]]] = {}  # step → canvas and the images on it

    @property
    def model(self) -> str:
        """The checkpoint's name, for the metrics."""
        return self.served.name

    @property
    def seconds_left(self) -> float:
        """What its steps will take alone on the device."""
        return self.work_left / self.served.rate.rows_per_second

    def place(self, i: int, image: Image) -> Image | None:
        """Puts the finished image i [C, H, W] in its place; all n images when it was the last."""
        self.images = self._canvas(image) if self.images is None else self.images
        self.images[i] = image
        self.samples = [sample for sample in self.samples if sample.i != i]
        return None if self.samples else self.images

    def place_in_frame(self, step: int, i: int, image: Image) -> Frame | None:
        """Puts image i as it is after `step` into that step's frame; the frame when it was the last of n."""
        if step not in self._frames:
            self._frames[step] = self._canvas(image), set()
        canvas, places = self._frames[step]
        canvas[i] = image
        places.add(i)
        if len(places) < self.n:
            return None
        del self._frames[step]
        return Frame(step, canvas)

    def _canvas(self, image: Image) -> Image:
        return np.empty((self.n, *image.shape), np.uint8)


class Sample:
    """One image on its way: place i in its request, steps done, and its state, which is the runner's.

    That is x_t and the last two x_0 [C, H, W], or the number of the slot that they are in; all None before the noise.
    """

    __slots__ = ("__weakref__", "i", "request", "slot", "step", "x", "x0", "x0_prev")

    def __init__(self, request: Request, i: int) -> None:
        self.request, self.i = request, i
        self.step = 0
        self.slot: int | None = None  # see `app.engine.slots`
        self.x: Tensor | None = None
        self.x0: Tensor | None = None
        self.x0_prev: Tensor | None = None

    @property
    def has_noise(self) -> bool:
        """Whether its x_T was drawn."""
        return self.x is not None or self.slot is not None

    @property
    def rows(self) -> int:
        """U-Net rows of the next step."""
        return 2 if self.request.plan.table[self.step, 0] != 1 else 1

    @property
    def finished(self) -> bool:
        """Whether it has taken every step of its plan."""
        return self.step == len(self.request.plan)
