"""A convolution whose weights oneDNN has packed beforehand."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import List, Optional  # noqa: UP035 - TorchScript reads these

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKING = threading.Lock()  # calls may run on several threads


class PackedConv:
    """A convolution in `dtype`, its weights packed by oneDNN, where PyTorch has it, for the size of its first input.

    Packed for another size they may lie as no fast kernel takes them, and a call be 50 times as slow.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(layer, nn.Conv2d)
        self.stride, self.padding = list(layer.stride), list(map(int, layer.padding))
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.packed = False

    def _pack(self, size: torch.Size) -> None:
        with PACKING:
            if not self.packed:
                self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
                    self.weight.to_mkldnn(), self.padding, self.stride, [1, 1], 1, [1, *size]
                )
                self.packed = True

    def __call__(self, x: Tensor) -> Tensor:
        if not self.packed:
            if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
                return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
            self._pack(x.shape[1:])
        convolution = scripted() if torch.jit.is_tracing() else packed_convolution  # type: ignore[attr-defined,no-untyped-call]
        return convolution(x, self.weight, self.bias, self.padding, self.stride)


def packed_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    padding: List[int],  # noqa: UP006
    stride: List[int],  # noqa: UP006
) -> Tensor:
    """A convolution of oneDNN's."""
    return torch.ops.mkldnn._convolution_pointwise(  # type: ignore[no-any-return]
        x, weight, bias, padding, stride, [1, 1], 1, "none", [], None
    )


@cache
def scripted() -> Callable[..., Tensor]:
    """The same for a recording: `torch.jit.trace` knows no empty list of optional numbers, `torch.jit.script` does."""
    return torch.jit.script(packed_convolution)
