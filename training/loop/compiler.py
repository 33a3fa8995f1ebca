"""torch.compile, asked for on a machine that may have no compiler."""

from __future__ import annotations

import torch
from torch import nn


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network, compiled when it is first called. Raises ValueError where the machine cannot compile for `device`.

    A small function is compiled and run first: what the backends need differs (a C++ compiler, Triton).
    """
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(16, device=device))
    except Exception as error:  # each backend has its own
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        why = str(error).strip().splitlines()[0]
        raise ValueError(
            f"--compile needs {needed} for the device {device.type}, and it does not work: {why}"
        ) from error
    return torch.compile(network)  # type: ignore[no-any-return]
