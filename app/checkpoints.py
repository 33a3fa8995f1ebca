"""Which files `--checkpoint` names, and what the models in them are called."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from model import checkpoint, hub
from model.checkpoint import Checkpoint, CheckpointError
from model.convert.from_hub import from_hub
from model.convert.layout import Flags, UnsupportedCheckpointError
from model.hub import HubName

log = logging.getLogger("ddpm.models")

MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # a file's name and never a path, hidden, or an option
BEST = "best.safetensors"  # what a training run calls its best checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint's file, absolute, and the name under which it is served."""

    name: str
    path: Path


def parse(text: str) -> list[Source]:
    """The checkpoints in a list by commas: bundled ones, files, folders of training runs, ORG/NAME of the Hugging Face
    hub, or NAME=any of these.

    A path may have commas itself: the longest one that is there counts. Raises CheckpointError with a sentence where
    one is not there, or two would have the same name.
    """
    parts, found = text.split(","), dict[str, Source]()
    if not all(part.strip() for part in parts) and not _is_there(text):
        raise CheckpointError(f"--checkpoint {text!r}: must be a checkpoint, or several by commas")
    while parts:
        items = [",".join(parts[:end]).strip() for end in range(len(parts), 0, -1)]
        item = next((item for item in items if _is_there(item)), items[-1])
        source = locate(item)
        if source.name in found:
            raise CheckpointError(
                f"{found[source.name].path} and {source.path} would both be called {source.name}: "
                f"name one by NAME=PATH, such as {source.name}-2={source.path}"
            )
        found[source.name] = source
        del parts[: len(parts) - items.index(item)]
    return list(found.values())


def locate(item: str) -> Source:
    """One of them. A run's best checkpoint is called after the run, other files as they are without their ending.

    Raises CheckpointError.
    """
    name, text = _split(item)
    if (on_hub := hub.parse(text)) is not None:
        if not _exists(text):
            return Source(name or on_hub.repo.partition("/")[2], _from_hub(on_hub))
        log.info("%s is here, so the Hugging Face hub is not asked for it", text)
    path = _folder(text)
    path = _best_of(path) if path else checkpoint.find(text)
    path = Path(os.path.abspath(path))  # a link keeps its name, and where it leads may change
    is_run = path.name == BEST and (path.parent / "config.json").is_file()
    return Source(name or (path.parent.name if is_run else path.stem), path)


def _from_hub(name: HubName) -> Path:
    """The converted checkpoint. Raises CheckpointError with a sentence."""

    say, warn = (partial(level, "%s: %s", name) for level in (log.info, log.warning))
    try:
        return from_hub(name, Flags(), say, warn)
    except UnsupportedCheckpointError as error:
        raise CheckpointError(f"{name}: {error} (flags are for `ddpm-serve import`, whose file is served)") from error
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def load(source: Source) -> Checkpoint:
    """The checkpoint under its name. Raises CheckpointError with a sentence for anything but a good one."""
    return replace(checkpoint.load(source.path), name=source.name)


def _split(item: str) -> tuple[str, str]:
    """NAME and the rest of NAME=PATH; "" and all of it where it is a path with such a sign."""
    name, sign, rest = item.partition("=")
    if not sign or not MODEL_NAME.fullmatch(name) or _exists(item):
        return "", item
    return name, rest.strip()


def _is_there(item: str) -> bool:
    return _exists(item) or _exists(_split(item)[1])


def _exists(text: str) -> bool:
    if _folder(text):
        return True
    try:
        checkpoint.find(text)
    except CheckpointError:
        return False
    return True


def _folder(text: str) -> Path | None:
    """The folder of that path, unless it is the name of a bundled checkpoint."""
    if (checkpoint.PRETRAINED / f"{text}.safetensors").is_file():
        return None
    try:
        path = Path(text).expanduser()
        return path if text and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name too long, the home (~) of nobody, a zero byte
        return None


def _best_of(folder: Path) -> Path:
    if (folder / BEST).is_file():
        return folder / BEST
    if (folder / "config.json").is_file() and (folder / "log.jsonl").is_file():
        raise CheckpointError(f"{folder}: this training run has not saved a checkpoint yet")
    if (folder / "model_index.json").is_file() or (folder / "diffusion_pytorch_model.safetensors").is_file():
        raise CheckpointError(
            f"{folder} is a folder of diffusers: `python -m model.importers` makes a checkpoint of it"
        )
    raise CheckpointError(f"{folder} is a folder, but not that of a training run: it has no {BEST}")
