"""From what a client said to what the engine does: defaults, class names, seeds, the schedule."""

from __future__ import annotations

import asyncio
import difflib
import math
import random
import re
import time
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from urllib.parse import quote

import numpy as np

from app.engine.instance import ModelInstance
from app.engine.request import OutputStream, Request, View
from app.errors import InvalidClassLabel, InvalidRequest
from app.schemas import Sampling, SequenceQuery, StreamedSampling
from app.settings import Settings
from model.checkpoint import CheckpointConfig
from model.sampling.edit import Edit
from model.sampling.noise import draw_class
from model.sampling.schedule import InvalidSamplingParams, SamplingParams, usable_variance

LARGEST_JSON_INTEGER = 2**53
NUMBER = re.compile(r"\d{1,9}(\.0+)?", re.ASCII)  # of a class: an index, or a name that is a whole number


@dataclass(frozen=True)
class GenerationJob:
    """A request on its way, and everything needed to make its images again."""

    request: Request
    checkpoint: ModelInstance  # whose weights make the images
    class_label: int | None
    sampling: SamplingParams
    variance: str | None  # of ddpm; fixed_large is replaced where it would leave noise
    each_class: bool = False
    strength: float | None = None  # of an edit
    encodings: list[tuple[float, float]] = field(default_factory=list)  # begin and end of each, by time.monotonic

    @cached_property
    def provenance(self) -> Mapping[str, str]:
        """For response headers and PNG text: what to send again for the same images."""
        names = self.checkpoint.config.class_names
        # A mix is what a request without a class label gives: there is no word for it to send back.
        label = {} if self.class_label is None else {"class_label": names[self.class_label]}
        settings = {name: str(value) for name, value in vars(self.sampling).items()}
        variance = {"variance": self.variance} if self.variance else {}
        each_class = {"each_class": "true"} if self.each_class else {}
        strength = {} if self.strength is None else {"strength": str(self.strength)}
        return {
            "model": self.checkpoint.name,
            "checkpoint": self.checkpoint.sha256,
            "seed": str(self.request.seed),
            "index": str(self.request.index),
            **settings,
            "guidance_interval": ",".join(map(str, self.sampling.guidance_interval)),
            **variance,
            **strength,
            **label,
            **each_class,
        }

    @property
    def nfe(self) -> int:
        """Network rows that each image costs (number of function evaluations)."""
        return sum(self.request.schedule.nfe_of_steps)

    def headers(self, **more: str) -> dict[str, str]:
        """X-DDPM-… headers: what to send again, whatever `more` there is to say, and what an image cost."""
        return {**headers({**self.provenance, **more}), "X-DDPM-NFE": str(self.nfe)}

    def provenance_of(self, i: int) -> dict[str, str]:
        """The same for image i alone."""
        name = self.class_of(i)[1]
        own = {"index": str(self.request.index + i)} | ({} if name is None else {"class_label": name})
        return {key: value for key, value in self.provenance.items() if key != "each_class"} | own

    def class_of(self, i: int) -> tuple[int | str | None, str | None]:
        """What to send for image i's class, and its name; None for an unconditional checkpoint.

        The first is its index, or its name where that number means another class.
        """
        if self.request.classes is None:
            return None, None
        index, names = self.request.classes[i], self.checkpoint.config.class_names
        return index if class_index(index, names) == index else names[index], names[index]


def headers(provenance: Mapping[str, str]) -> dict[str, str]:
    """X-DDPM-… headers; values are percent-encoded where they are not plain ASCII."""
    return {_header_name(key): _header_value(value) for key, value in provenance.items()}


@lru_cache(256)
def _header_name(key: str) -> str:
    return f"X-DDPM-{key.replace('_', '-').title()}"


@lru_cache(256)
def _header_value(value: str) -> str:
    return quote(value, safe=" !#$&'()*+,/:;=?@[]~")


def build_request(
    asked: Sampling,
    checkpoint: ModelInstance,
    settings: Settings,
    on_drop: Callable[[], None] = lambda: None,
    edit: Edit | None = None,
    strength: float | None = None,
) -> GenerationJob:
    """Resolves a validated body or query. Raises InvalidRequest or InvalidClassLabel. Call it on the event loop.

    `edit` has images of the checkpoint's shape, and `strength` is for them; None where they are x_T.
    """
    asked.check(settings)
    unet, diffusion = checkpoint.config.unet, checkpoint.diffusion
    resolve = checkpoint.sampling_params if edit is None else editing_config(checkpoint.config).sampling_params
    try:
        sampling = resolve(settings.max_steps, **asked.overrides())  # asked.check has refused more
    except InvalidSamplingParams as error:
        raise InvalidRequest(str(error), param=error.field) from error
    variance = usable_variance(diffusion, sampling.steps) if sampling.sampler == "ddpm" else None
    try:
        schedule = checkpoint.schedule(sampling, variance, strength or 1.0)
    except InvalidSamplingParams as error:
        raise InvalidRequest(str(error), param=error.field) from error
    # Not from the system each time: that gives up Python's lock, and the engine may keep it for long.
    seed = random.getrandbits(53) if asked.seed is None else asked.seed
    label = class_index(asked.class_label, checkpoint.config.class_names)
    places = range(asked.index, asked.index + asked.n)
    if asked.each_class and (label is not None or unet.num_classes is None):
        why = "this checkpoint has none" if unet.num_classes is None else "leave out class_label"
        raise InvalidRequest(f"each_class asks for all classes: {why}", param="each_class")
    classes = None
    if unet.num_classes is not None:
        if asked.each_class:
            classes = tuple(i % unet.num_classes for i in places)
        else:
            classes = tuple(draw_class(seed, i, unet.num_classes) if label is None else label for i in places)

    view, steps_shown, keep = shown_frames(asked, len(schedule))
    size = asked.n * len(steps_shown) * math.prod(unet.image_shape)
    if size > settings.max_sequence_bytes:
        raise InvalidRequest(
            f"{len(steps_shown)} frames of {asked.n} images are {size} bytes of pixels; "
            f"at most {settings.max_sequence_bytes} are served",
            param="frames" if isinstance(asked, SequenceQuery) else "partial_images",
        )
    request = Request(
        schedule=schedule.from_latents() if edit is not None and strength is None else schedule,
        seed=seed,
        index=asked.index,
        n=asked.n,
        classes=classes,
        deadline=time.monotonic() + (asked.timeout_s or settings.max_timeout_s),
        output=OutputStream(asyncio.get_running_loop(), keep, on_drop),
        model=checkpoint.name,
        has_default_timeout=asked.timeout_s is None,
        frame_steps=steps_shown,
        view=view,
        edit=edit,
    )
    return GenerationJob(request, checkpoint, label, sampling, variance, asked.each_class, strength)


def editing_config(config: CheckpointConfig) -> CheckpointConfig:
    """What a checkpoint can do with an image: fitted tables begin from noise, so it has none. Raises InvalidRequest
    where all that it can do begins from noise."""
    if config.distilled and config.distilled.has_fixed_steps:
        raise InvalidRequest(
            "this checkpoint cannot begin from an image or between two seeds: its steps were distilled, from noise"
        )
    return config.without_tables()


def class_index(label: int | str | None, names: tuple[str, ...]) -> int | None:
    """The class that a client means; None for a random mix. Raises InvalidClassLabel.

    A number is first the class of that name, then the class of that index, however the two are written: 7, 7.0, "7" or
    "007". A name in another case or Unicode form will do where only one class can be meant.
    """
    if label is None:
        return None
    if not names:
        raise InvalidClassLabel("this checkpoint is unconditional: class_label must be null", param="class_label")
    text = str(label)
    if text in names:
        return names.index(text)
    if NUMBER.fullmatch(text):
        number = int(float(text))
        named = [i for i, name in enumerate(names) if NUMBER.fullmatch(name) and float(name) == number]
        if len(named) == 1:
            return named[0]
        if not named and number < len(names):
            return number
    for alike in (_composed, folded):
        same = [i for i, name in enumerate(names) if alike(name) == alike(text)]
        if len(same) == 1:
            return same[0]
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    known = {folded(name): name for name in names[:2000]}  # of more it would keep everybody waiting
    near = difflib.get_close_matches(folded(text[:80]), known, n=1)
    meant = f"; did you mean {known[near[0]]!r:.80}?" if near else ";"
    raise InvalidClassLabel(
        f"no class {label!r:.80}{meant} there are {shown} (or their numbers, 0 to {len(names) - 1})",
        param="class_label",
    )


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS's archives have names in the other form, which looks the same


def folded(name: str) -> str:
    """A name without differences of case and Unicode form."""
    return _composed(_composed(name).casefold())


def shown_frames(asked: Sampling, steps: int) -> tuple[View, frozenset[int], int]:
    """What a client wants to see on the way: as x_t or x_0, after which steps, and how many frames may wait for it."""
    if isinstance(asked, SequenceQuery):
        shown = frame_steps(asked.frames, steps, asked.view)
        keeps_all = asked.every_frame or asked.format in ("gif", "webp")
        return asked.view, shown, len(shown) if keeps_all else 1
    partials = asked.partial_images if isinstance(asked, StreamedSampling) else 0
    return "x0" if partials else "xt", partial_steps(partials, steps), max(1, partials)


@lru_cache(256)
def frame_steps(frames: int, steps: int, view: View) -> frozenset[int]:
    """`frames` steps spread evenly from the noise (step 0; for x0 from step 1) to the last, which is always shown."""
    first = 1 if view == "x0" else 0
    return frozenset(np.linspace(steps, first, frames).round().astype(int).tolist())


def partial_steps(partials: int, steps: int) -> frozenset[int]:
    """`partials` steps spread evenly between the first and the last, or all of those where they are fewer."""
    if partials >= steps:
        return frozenset(range(1, steps))
    return frozenset(round(i * steps / (partials + 1)) for i in range(1, partials + 1))
