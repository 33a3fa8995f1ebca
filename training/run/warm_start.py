"""A new run that begins with another's weights, ours or the original's: --model_checkpoint, --optim_checkpoint."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint
from model.convert.abarankab import import_abarankab
from model.convert.importer import load_weights
from model.convert.layout import Flags, UnsupportedCheckpointError, Weights
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.ema import EMA
from model.nn.networks import AnyConfig
from model.nn.unet import UNet
from training.cli.options import expanded, format_value, printable
from training.loop.muon import MuonAdamW
from training.loop.optimizer import Optimizer, load_state, numbered
from training.run.config import TrainConfig
from training.run.load_weights import is_original, load_abarankab

FREE = ("image_size", "dropout")  # of a network: its weights do not depend on them
PROCESS = ("num_timesteps", "schedule", "schedule_low", "schedule_high", "prediction")
OPTIONS = {"attention_levels": "attention_resolutions", "null_class": "label_dropout", "learned_variance": "variance"}


def warm_start(
    config: TrainConfig, network: UNet, ema: EMA, optimizer: Optimizer, class_names: tuple[str, ...] = ()
) -> None:
    """Puts `config.model_checkpoint` into network and averages, and `config.optim_checkpoint` into the optimizer.

    Iterations and learning rate begin anew. The averages' warm-up counts as done, so that they keep what they have.
    Says so where classes of one number have another name here: `class_names`. Raises ValueError with a sentence where
    the network, or the forward process, is another.
    """
    if not config.model_checkpoint:
        return
    path = expanded(config.model_checkpoint)
    if path.is_file() and is_original(path):
        found = load_abarankab(path, {f.name: getattr(config, f.name) for f in fields(config)})
        _check(config, network.config, found.unet, found.diffusion)
        raw, averaged = found.raw, found.averaged
    else:
        ours = checkpoint.load(config.model_checkpoint)
        _check(config, network.config, ours.config.unet, ours.config.diffusion)
        raw = averaged = ours.network.state_dict()
        if class_names and ours.config.class_names != class_names:
            told = f"the classes {', '.join(ours.config.class_names)} become {', '.join(class_names)}"
            print(printable(f"--model_checkpoint {config.model_checkpoint}: {told}, in this order"), file=sys.stderr)
    network.load_state_dict(raw)
    ema.begin_with(averaged)
    if config.optim_checkpoint and not isinstance(optimizer, MuonAdamW):  # for which the options refuse it
        _load_optimizer(expanded(config.optim_checkpoint), path, network, optimizer)


def _check(config: TrainConfig, ours: UNetConfig, theirs: AnyConfig, process: DiffusionConfig) -> None:
    """Raises ValueError that names every field in which the run and what it begins with differ."""
    if not isinstance(theirs, UNetConfig):
        raise ValueError(
            f"--model_checkpoint {config.model_checkpoint} is a {theirs.network} network, which is sampled here and "
            "not trained: train it on where it is from, or a network of ours from the start"
        )
    pairs = [(f.name, getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours) if f.name not in FREE]
    pairs += [(name, getattr(config, name), getattr(process, name)) for name in PROCESS]
    differ = [
        f"{OPTIONS.get(name, name)} is {format_value(here)} here, {format_value(there)} there"
        for name, here, there in pairs
        if not (math.isclose(here, there, rel_tol=1e-4) if isinstance(here, float) else here == there)
    ]
    if differ:
        raise ValueError(f"--model_checkpoint {config.model_checkpoint} is of another network: {'; '.join(differ)}")


def _load_optimizer(path: Path, weights: Path, network: UNet, optimizer: torch.optim.Optimizer) -> None:
    """Adam's moments and step counts; learning rate and the like stay those of the options."""
    ours = optimizer.state_dict()
    names = [name for name, _ in network.named_parameters()]
    try:
        loaded = load_weights(path)
        keys = set(loaded) if isinstance(loaded, dict) else set()
        if {"optimizer", "network"} <= keys:
            saved = loaded["optimizer"]
            if "muon" in saved:
                raise UnsupportedCheckpointError("it is of Muon, whose state goes on by --resume only")
            state = saved["state"]
            if len(state) == len(names):
                names = numbered(network, saved)
        elif {"state", "param_groups"} <= keys and is_original(weights):
            state = _original_moments(loaded, load_weights(weights), network)
        elif {"state", "param_groups"} <= keys:
            raise UnsupportedCheckpointError(
                "its order is that of the original's weights: --model_checkpoint must be its -model.pth"
            )
        else:
            raise UnsupportedCheckpointError("it is neither a state of ours (state-*.pt) nor the original's -optim.pth")
        if sorted(state) != list(range(len(names))):
            raise UnsupportedCheckpointError(f"it is of {len(state)} parameters, where the network has {len(names)}")
        named = {name: state[i] for i, name in enumerate(names)}
        for name, parameter in network.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if named[name][moment].shape != parameter.shape:
                    raise UnsupportedCheckpointError(f"{name} has shape {list(parameter.shape)}, in it another")
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"--optim_checkpoint {path}: something is missing in it: {error!r}") from error
    except UnsupportedCheckpointError as error:
        raise ValueError(f"--optim_checkpoint {path}: {error}") from error
    load_state(optimizer, ours | {"state": {i: named[name] for i, name in enumerate(numbered(network, ours))}})


def _original_moments(loaded: dict[str, Any], weights: Weights, network: UNet) -> dict[int, dict[str, Tensor]]:
    """Adam's state of the original, whose first N of 2N parameters are the network's, in the order of its weights.

    The moments go the way of the weights: each set is imported as if it were one.
    """
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    names = [name for name in weights if name.startswith("model.") and not name.endswith(buffers)]
    ids = [i for group in loaded["param_groups"] for i in group["params"]]
    if len(ids) not in (len(names), 2 * len(names)):
        raise UnsupportedCheckpointError(
            f"it is of {len(ids)} parameters, where --model_checkpoint has {len(names)}, and an average"
        )
    state: dict[int, dict[str, Tensor]] = {i: {} for i, _ in enumerate(network.parameters())}
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = {name: loaded["state"][i][moment] for i, name in zip(ids, names, strict=False)}
        flags = Flags(weights="raw", initial_pad=0, norm="in" if network.config.norm == "in" else None)
        imported = import_abarankab(weights | moments, flags).weights
        for i, (name, _) in enumerate(network.named_parameters()):
            state[i][moment] = imported[name]
    step = torch.tensor(float(loaded["state"][ids[0]]["step"]))  # older versions of torch have an int
    return {i: {"step": step.clone(), **moments} for i, moments in state.items()}
