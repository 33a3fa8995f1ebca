"""Adam, AdamW and Muon; a step whose gradient is not finite changes nothing, and nobody waits to find out."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from training.loop.muon import MuonAdamW
from training.run.config import TrainConfig

Optimizer = torch.optim.Optimizer | MuonAdamW


def make_optimizer(network: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer asked for. Weights of convolutions and linear layers decay; biases, norms, embeddings do not."""
    if config.optimizer == "muon":
        return MuonAdamW(network, config.learning_rate, config.weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    if not config.weight_decay:
        return kind(network.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    parameters, decay = dict(network.named_parameters()), _decaying(network)
    groups = [
        {"params": [p for name, p in parameters.items() if name in decay], "weight_decay": config.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decay], "weight_decay": 0.0},
    ]
    return kind(groups, lr=config.learning_rate, fused=True)


def numbered(network: nn.Module, state: dict[str, Any]) -> list[str]:
    """The parameters of a network by name, as the `state` of its Adam numbers them: weights that decay come first."""
    names = [name for name, _ in network.named_parameters()]
    decay = _decaying(network) if len(state["param_groups"]) > 1 else set()
    return [name for name in names if name in decay] + [name for name in names if name not in decay]


def _decaying(network: nn.Module) -> set[str]:
    """Weights of convolutions and linear layers; an embedding's rows are the biases of classes."""
    layers = network.named_modules()
    return {f"{name}.weight" for name, layer in layers if isinstance(layer, (nn.Conv2d, nn.Linear))}


def load_state(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Each moment lies in memory as its parameter does, though the state was saved where they lay otherwise.

    The fused kernels go through both in the order of their addresses: a GPU's refuse what differs, a CPU's do not look.
    """
    optimizer.load_state_dict(state)
    for part in optimizer.parts if isinstance(optimizer, MuonAdamW) else [optimizer]:
        for parameter, moments in part.state.items():
            for name, moment in moments.items():
                if moment.dim() and moment.shape == parameter.shape and moment.stride() != parameter.stride():
                    moments[name] = torch.empty_like(parameter, requires_grad=False).copy_(moment)


def step(optimizer: Optimizer, rate: float, largest_norm: float = 0.0) -> Tensor:
    """Updates the weights, with the gradient's norm limited if `largest_norm` is not 0, and forgets the gradient.

    Returns whether the gradient was finite, bool []. If not, weights and state are as before: the fused kernels look
    at the flag themselves, as they do for `torch.amp.GradScaler`, whose two attributes these are.
    """
    if isinstance(optimizer, MuonAdamW):
        gradients = optimizer.gradients()
    else:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = norm.isfinite()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
    optimizer.grad_scale = (norm / largest_norm).clamp(min=1) if largest_norm else None  # type: ignore[attr-defined]
    optimizer.step()
    optimizer.zero_grad()
    return finite


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Linear warm-up; then constant, half a cosine down to 0, or constant and a line down to 0 at the end (wsd)."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    decay = 1.0
    if config.lr_schedule == "cosine":
        decay = 0.5 * (1 + math.cos(math.pi * iteration / config.iterations))
    elif config.lr_schedule == "wsd":
        decay = min(1.0, (config.iterations - iteration) / (config.decay_share * config.iterations))
    return config.learning_rate * warm * decay


def tell_jump(config: TrainConfig, before: TrainConfig, iteration: int) -> None:
    """Says where a run's new options make the learning rate jump, such as back up in the middle of a decay."""
    now, was = learning_rate(config, iteration), learning_rate(before, iteration)
    if not math.isclose(now, was, rel_tol=1e-3):
        told = f"with these options the learning rate is {now:.3g}, where the run's own would be {was:.3g}"
        print(f"training.train: at step {iteration} {told}", file=sys.stderr)
