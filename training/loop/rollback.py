"""A step that does not count is undone by the device; nobody waits to find out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def rollback(tensors: Iterable[Tensor], before: Iterable[Tensor], finite: Tensor) -> None:
    """Puts `tensors` back to what they were `before`, unless the step was finite (bool [])."""
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(finite, tensor, old))
