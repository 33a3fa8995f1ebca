"""Weights by what a user has of them: a bundled name, a checkpoint, a run's folder, or the original's .pth."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from model import checkpoint, hub
from model.checkpoint import Checkpoint, CheckpointConfig, CheckpointError
from model.convert.abarankab import import_abarankab
from model.convert.from_hub import from_hub
from model.convert.importer import import_path, load_weights, recognise
from model.convert.layout import Flags, UnsupportedCheckpointError, Weights
from model.diffusion import DiffusionConfig
from model.hub import HubName
from model.nn.config import UNetConfig
from model.nn.networks import build
from model.sampling.fitted import weights_digest
from model.sampling.schedule import SamplingParams
from training.cli.options import choice_option, expanded, format_value, numbers
from training.run.config import TrainConfig
from training.run.run_dir import saved_states

CliOverrides = Mapping[str, Any]
"""Options of TrainConfig that were given, which a file may not know."""


def weights_option(what: str) -> dict[str, Any]:
    """Keywords of an option that names the weights to load: ema, raw, or one average of several by its name."""
    plain = choice_option(("ema", "raw"))

    def chosen(text: str) -> str:
        return text if re.fullmatch(r"(power-)?[0-9][0-9.e-]*", text) else str(plain["type"](text))

    names = "raw, or an average by its name, such as 0.999 or power-0.1,"
    return {"default": "ema", "type": chosen, "metavar": "{ema,raw,NAME}", "help": f"{names} {what} (default: ema)"}


@dataclass(frozen=True)
class Original:
    """A -model.pth of abarankab/DDPM: its network's weights and their average, both under our names."""

    raw: Weights
    averaged: Weights
    unet: UNetConfig
    diffusion: DiffusionConfig


def is_original(path: Path) -> bool:
    """Whether it is a file in which projects other than ours keep weights."""
    return path.suffix in (".pth", ".pt") and not path.name.startswith("state-")


def load_abarankab(path: Path, told: CliOverrides) -> Original:
    """What the file does not know, activation, dropout, loss, and instance from group norm, is as `told`.

    Raises UnsupportedCheckpointError with a sentence for other files.
    """
    try:
        state = load_weights(path)
        is_whole = any(str(key).endswith("betas") for key in state)  # not a network alone
        if recognise(state) is not import_abarankab or not is_whole:
            raise UnsupportedCheckpointError(
                "it is not the original's; python -m model.importers makes a checkpoint of it"
            )
        norm = "in" if told.get("norm") == "in" else None  # of any other the file knows
        flags = Flags(image_size=told.get("image_size") or None, norm=norm, initial_pad=0)  # as its scripts have it
        found = import_path(path, replace(flags, weights="raw"))
        averaged = import_path(path, flags).weights
    except UnsupportedCheckpointError as error:
        raise UnsupportedCheckpointError(f"{path}: {error}") from error
    unet = replace(found.unet, **{name: told[name] for name in ("activation", "dropout") if name in told})
    diffusion = replace(found.diffusion, loss_type=told.get("loss_type", found.diffusion.loss_type))
    return Original(found.weights, averaged, unet, diffusion)


def load(name: str, weights: str, told: CliOverrides, device: torch.device) -> tuple[Checkpoint, str]:
    """A network to sample from, and which weights it has, in words: of a file, a run, or a name on the hub.

    `weights` is "ema" (the first average), "raw", or the name of an average: its decay as it was given, or such as
    "power-0.1". A run's folder gives the first average of its best checkpoint. All others are in the state that belongs
    to a checkpoint, or, for a folder, in the newest; `provenance` then says which weights they are, and has measures of
    these only. Raises ValueError with a sentence where there are none, or the checkpoint contradicts what was
    `told`.
    """
    path = expanded(name)
    if not path.exists() and (on_hub := hub.parse(name)) is not None:
        path = _from_hub(on_hub)
        name = str(path)
    if path.is_file() and is_original(path):
        return _of_abarankab(path, weights, told, device)
    if path.is_dir():
        if not (path / "best.safetensors").is_file():
            raise CheckpointError(f"{path} is a folder, but not that of a run that has saved a checkpoint")
        served = checkpoint.load(path / "best.safetensors", device)
        state = next(reversed(saved_states(path).values()), None)
    else:
        served = checkpoint.load(name, device)
        state = path.with_name(path.name.replace("checkpoint-", "state-")).with_suffix(".pt")
    decays = averages(served.config)
    check(served.config, told, decays)
    index = decays.index(told["ema_decay"][0]) if "ema_decay" in told else 0
    own = str(served.config.provenance.get("weights", "ema"))
    if weights in map(repr, decays[:1]) and own == "ema" and path.is_file():
        weights = "ema"
    if weights == "ema" and index == 0:
        return served, own
    if state is None or not state.is_file():
        raise CheckpointError(f"{name}: only the first average is in it; the rest is in a run's folder (state-*.pt)")
    if path.is_dir() and (of_state := state.with_name(f"checkpoint-{state.stem[6:]}.safetensors")).is_file():
        served = checkpoint.load(of_state, device)
    if weights == "raw":
        return _of_state(state, served.config, None, "raw", device)
    if weights != "ema":
        which = decays.index(float(weights)) if weights in map(repr, decays) else weights
        return _of_state(state, served.config, which, f"ema {weights}", device)
    return _of_state(state, served.config, index, f"ema of decay {decays[index]}", device)


def _from_hub(name: HubName) -> Path:
    """The converted checkpoint. Raises ValueError with a sentence."""
    try:
        return from_hub(name, Flags(), lambda line: print(f"{name}: {line}", file=sys.stderr))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{name}: {error}") from error


def _of_abarankab(path: Path, weights: str, told: CliOverrides, device: torch.device) -> tuple[Checkpoint, str]:
    if weights not in ("ema", "raw"):
        raise CheckpointError(f"{path} has no weights {weights!r}: it has ema and raw")
    found = load_abarankab(path, told)
    names = tuple(str(i) for i in range(found.unet.num_classes or 0))
    noted = {key: value for key, value in told.items() if key in ("ema_decay", "ema_update_rate")}
    steps = min(SamplingParams.steps, found.diffusion.num_timesteps)
    provenance = {"imported_from": path.name, "as_told": noted, "weights": weights}
    config = CheckpointConfig(found.unet, found.diffusion, names, SamplingParams(steps=steps), provenance)
    check(config, {key: value for key, value in told.items() if key not in noted}, ())
    tensors = found.averaged if weights == "ema" else found.raw
    return _checkpoint(path, config, tensors, device), weights


def _of_state(
    path: Path, config: CheckpointConfig, which: int | str | None, words: str, device: torch.device
) -> tuple[Checkpoint, str]:
    """The raw weights in a state (`which` None), or its average of that number or name; and `words`, what they are."""
    state = load_weights(path)
    try:
        config = replace(config, provenance=_provenance(config, state, words, which == 0))
        of_run = state["ema"]["averages"] if which is not None else {}
        if isinstance(which, str) and which not in of_run:
            names = [*map(repr, decays := averages(config)), *list(of_run)[len(decays) :]]
            raise CheckpointError(f"{path} has no weights {which!r}; it has: raw, {', '.join(names)}")
        if which is None:
            tensors = state["network"]
        else:
            tensors = of_run[which] if isinstance(which, str) else list(of_run.values())[which]
        return _checkpoint(path, config, tensors, device), words
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a state of this run: {error!r}") from error


def _provenance(config: CheckpointConfig, state: dict[str, Any], words: str, is_first: bool) -> dict[str, Any]:
    """That of weights in a state, from what its checkpoint tells, or, if that one is gone, the run's best.

    `is_first`: they are the first average, which the checkpoint's measures are of.
    """
    told, count = config.provenance, state["iteration"]
    if (seen := state.get("images_seen")) is None:  # from before they were counted
        seen = count * int(_of_command(config, "batch_size") or 0)
    counts = {"iterations": count, "images_seen": seen}
    metrics = told.get("metrics", {}) if count == told.get("iterations") else {}
    if not is_first:
        metrics = {key: x for key, x in metrics.items() if key == "train_loss"}
    return told | counts | {"metrics": metrics, "weights": words}


def _checkpoint(path: Path, config: CheckpointConfig, tensors: Weights, device: torch.device) -> Checkpoint:
    if config.distilled:  # its table is none that was fitted to weights: the weights were trained to it
        digest = weights_digest({name: tensor.float() for name, tensor in tensors.items()})
        config = replace(config, fitted=tuple(replace(table, weights=digest) for table in config.fitted))
    elif config.fitted:
        print(f"{path.name}: fitted tables are of other weights: they are left out", file=sys.stderr)
        config = config.without_tables()
    with torch.device("meta"):
        network = build(config.unet)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    network.eval().requires_grad_(False)
    with path.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    return Checkpoint(path.stem, sha256, config, network.to(device))


def averages(config: CheckpointConfig) -> tuple[float, ...]:
    """The decays of the averages of the run that made a checkpoint, the one in it first; () where it does not tell."""
    text = _of_command(config, "ema_decay")
    return numbers(text) if text else ()


def _of_command(config: CheckpointConfig, option: str) -> str | None:
    """An option of the run that made a checkpoint, as its command line had it."""
    words = shlex.split(str(config.provenance.get("command", "")))
    if "training.train" not in words:
        return None
    if f"--{option}" in words[:-1]:
        return words[words.index(f"--{option}") + 1]
    return format_value(next(f.default for f in fields(TrainConfig) if f.name == option))


def known(config: CheckpointConfig) -> dict[str, Any]:
    """What a checkpoint tells of the options that its training had."""
    unet, diffusion = config.unet, config.diffusion
    same = ("base_channels", "channel_mults", "num_res_blocks", "time_emb_dim", "norm", "dropout", "activation")
    names = {name: name for name in same} | {"attention_resolutions": "attention_levels"}
    process = ("num_timesteps", "schedule", "schedule_low", "schedule_high", "loss_type")
    return {
        "image_size": unet.image_size,
        "use_labels": unet.num_classes is not None,
        **{told: getattr(unet, name) for told, name in names.items() if hasattr(unet, name)},  # another has others
        **{name: getattr(diffusion, name) for name in process},
    }


def check(config: CheckpointConfig, told: CliOverrides, decays: tuple[float, ...]) -> None:
    """Raises ValueError that names every option that contradicts the checkpoint, or about which it says nothing."""
    has = known(config)
    if decays:
        has["ema_decay"] = next((d for d in [told.get("ema_decay")] if d and d[0] in decays), decays)
    if rate := _of_command(config, "ema_update_rate"):
        has["ema_update_rate"] = int(rate)
    if unknown := [f"--{name}" for name in told if name not in has]:
        raise ValueError(f"the checkpoint does not tell its {' and '.join(unknown)}: leave it out")
    wrong = [name for name, value in told.items() if not _same(name, value, has[name])]
    if wrong:
        words = [f"--{name} {format_value(told[name])}, where it has {format_value(has[name])}" for name in wrong]
        raise ValueError(f"the checkpoint was made with other options: {'; '.join(words)}")


def _same(name: str, told: Any, has: Any) -> bool:
    if isinstance(told, float):
        return math.isclose(told, has, rel_tol=1e-4)
    return bool(set(told) == set(has) if name == "attention_resolutions" else told == has)
