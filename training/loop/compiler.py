"""torch.compile, asked for on a machine that may have no compiler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn


class ChannelGroupNorm(nn.Module):
    """The group norm of `norm`, whose parameters it has, from each channel's mean and mean square.

    With a pixel's channels side by side, the loops that a compiler makes of it for a CPU run over channels, whatever
    the size of a group; those of torch's own formula run over the few channels of one group.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        size = norm.num_channels // norm.num_groups
        mean = torch.full((size, size), 1 / size, device=norm.weight.device)
        self._means = torch.block_diag(*[mean] * norm.num_groups)  # of each channel's group; no buffer: nothing to save

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] → the same shape and dtype; statistics in float32."""
        with torch.autocast(x.device.type, enabled=False):
            z = x.float()
            mean, square = (torch.cat([z.mean((2, 3)), z.square().mean((2, 3))]) @ self._means).chunk(2)
            scale = (square - mean.square()).clamp(min=0).add(self.eps).rsqrt() * self.weight
            shift = self.bias - mean * scale
            return torch.addcmul(shift[:, :, None, None], z, scale[:, :, None, None]).to(x.dtype)


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, compiled when it is first called; on a CPU its group norms become `ChannelGroupNorm`s.

    Raises ValueError where the machine cannot compile for `device`. A small function is compiled and run first: what
    the backends need differs (a C++ compiler, Triton).
    """
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(16, device=device))
    except Exception as error:  # each backend has its own
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--compile needs {needed} for the device {device.type}, and it does not work: {why}"
        ) from error
    if device.type == "cpu":
        # Or dynamo cuts the graph into torchrun's buckets of gradients, so that a GPU can send one and compute the next
        torch._dynamo.config.optimize_ddp = False
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.GroupNorm):
                    setattr(module, name, ChannelGroupNorm(child))
    return torch.compile(network)  # type: ignore[no-any-return]


def check_gradient(network: nn.Module, add_gradient: Callable[[nn.Module], object]) -> None:
    """Raises ValueError where the gradient that the compiler makes of the network is not the network's own.

    Compilers err without a word: inductor's gradient of `F.interpolate` is 0 in bfloat16 on a CPU (torch 2.13), and a
    network learns for hours without its lower levels. `add_gradient` adds a batch's. It is asked of a copy without
    dropout, whose weights are moved a little, for a network begins with zeros that let no gradient through. Where the
    network's own gradient is not finite, it says so and checks nothing.
    """
    trial, gradients = deepcopy(network), []
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise.to(parameter), alpha=0.05)
    for module in trial.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for call in (lambda network: network, torch.compile):
        add_gradient(call(trial))
        gradients.append({name: p.grad for name, p in trial.named_parameters() if p.grad is not None})
        trial.zero_grad()
    own, made = gradients
    total = torch.nn.utils.get_total_norm(own.values())
    if not total.isfinite():
        print("--compile: the first batch's gradient is not finite, so the compiler's is not checked", file=sys.stderr)
        return
    for name, gradient in own.items():
        error = made.get(name, torch.zeros_like(gradient)) - gradient
        if not error.norm() <= 0.25 * gradient.norm() + 1e-3 * total:  # nor where it is not a number
            raise ValueError(
                f"--compile: the gradient of {name} that this machine's compiler makes is wrong; "
                "leave it out, or try another --precision"
            )
