"""An image is an address: model@hash/class/seed/index.format, and in the query all else that decides its pixels."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from app.engine.instance import ModelInstance
from app.errors import Gone, InvalidClassLabel
from app.model_registry import ModelRegistry
from app.request_params import GenerationJob
from app.signing import encoded

NUMERICS = 1
"""Raise it when the same request gives other pixels than before: every cache then asks again."""
HASH_DIGITS = 8
VERSIONED = re.compile(rf"(.+)@([0-9a-fA-F]{{{HASH_DIGITS},64}})")
RANDOM, CLASSLESS = "random", "none"
"""Instead of a class: a draw by seed and index; an unconditional checkpoint."""


@dataclass(frozen=True)
class ImageAddress:
    """Where an image or its animation is, for ever. `options` are of the file: what its format leaves open."""

    job: GenerationJob
    i: int  # which of the job's images
    extension: str
    options: tuple[tuple[str, object], ...] = ()

    @property
    def segments(self) -> tuple[str, str, str, str]:
        """Model, class, seed and file, as in the path but not encoded."""
        job, model = self.job, self.job.checkpoint
        label = job.class_of(self.i)[0]
        return (
            f"{model.name}@{model.sha256[:HASH_DIGITS]}",
            CLASSLESS if label is None else str(label),
            str(job.request.seed),
            f"{job.request.index + self.i}.{self.extension}",
        )

    @property
    def path(self) -> str:
        """After /images/, encoded."""
        return "/".join(quote(segment, safe="@") for segment in self.segments)

    @property
    def query(self) -> list[tuple[str, str]]:
        """Every effective parameter."""
        sampling = {name: text(value) for name, value in vars(self.job.sampling).items() if value is not None}
        return [*sampling.items(), *((name, text(value)) for name, value in self.options)]

    def __str__(self) -> str:
        return f"{self.path}?{encoded(self.query)}"

    @property
    def etag(self) -> str:
        """Weak: the same pixels, to the eye, whatever made the file. It changes with the precision."""
        model, schedule = self.job.checkpoint, self.job.request.schedule
        parts = [str(NUMERICS), model.sha256, schedule.digest(), *map(str, sorted(model.runs_on.items())), str(self)]
        return f'W/"{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:32]}"'


def text(value: object) -> str:
    """A parameter's value as a query has it: 1 for 1.0, and a list by commas."""
    if isinstance(value, tuple | list):
        return ",".join(map(text, value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def class_label(segment: str, names: tuple[str, ...]) -> str | None:
    """The class label of a path; None for a draw, and for a checkpoint without classes. Raises InvalidClassLabel."""
    if not names and segment != CLASSLESS:
        raise InvalidClassLabel(f"this checkpoint has no classes: write {CLASSLESS} for one", param="class_label")
    return segment if names and (segment in names or segment != RANDOM) else None


def find_version(models: ModelRegistry, wanted: str) -> ModelInstance:
    """The checkpoint NAME, or NAME@HASH of the first digits of its SHA-256. Raises ModelNotFound, or Gone where the
    name is served with another hash, or not at all."""
    served = {model.name: model for model in models}
    found = VERSIONED.fullmatch(wanted)
    if wanted in served or found is None:
        return models.find(wanted)
    name, digits = found[1], found[2].lower()
    if name in served and served[name].sha256.startswith(digits):
        return served[name]
    raise Gone(f"{wanted!r:.200} is not served any more; there are {_versions(served.values())}", param="model")


def _versions(models: Iterable[ModelInstance]) -> str:
    return ", ".join(f"{model.name}@{model.sha256[:HASH_DIGITS]}" for model in models)


def matches(if_none_match: str, etag: str) -> bool:
    """Whether a client has what the tag stands for (RFC 9110, 13.1.2, by weak comparison)."""
    known = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in known or etag.removeprefix("W/") in known
