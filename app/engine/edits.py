"""Edited samples among others: what they begin from, and what they keep at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from app.engine.request import Sample
from model.sampling.edit import Edit, start_from

Kept = tuple[Tensor, Tensor]
"""Images [N, C, H, W] and masks [N, 1, H, W], as `apply_step` takes them."""


def first_states(samples: list[Sample], noise: Tensor) -> list[tuple[Tensor, Edit | None]]:
    """x [C, H, W] of each before its first step, and what it keeps of its image: noise [N, C, H, W] of the schedule's
    scale, or the reference with it. On the device of the noise."""
    requests = {sample.request for sample in samples}
    edits = {request: request.edit.to(noise.device) for request in requests if request.edit is not None}
    states: list[tuple[Tensor, Edit | None]] = []
    for sample, z in zip(samples, noise.unbind(), strict=True):
        edit = edits.get(sample.request)
        x = start_from(None if edit is None else edit.image_of(sample.i), z, sample.request.schedule)
        states.append((x, None if edit is None or edit.mask is None else edit))
    return states


def kept_parts(samples: list[Sample], x: Tensor) -> Kept | None:
    """Images and masks for `apply_step`, as x [N, C, H, W]; None where no sample keeps a part of its image."""
    if all(sample.kept is None for sample in samples):
        return None
    images, masks = torch.zeros_like(x), torch.ones_like(x[:, :1])
    for i, sample in enumerate(samples):
        if sample.kept is not None and sample.kept.mask is not None:
            images[i], masks[i] = sample.kept.image_of(sample.i), sample.kept.mask
    return images, masks
