"""The gradient of a batch, in parts that fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from model.diffusion import GaussianDiffusion, Network
from training.data.batches import Batch
from training.loop.distributed import no_sync
from training.run.config import TrainConfig


def backward(
    network: Network, diffusion: GaussianDiffusion, batch: Batch, t: Tensor, weights: Tensor, config: TrainConfig
) -> Tensor:
    """Adds the gradient of the mean of the weighted losses, one part of the batch [b, …] after the other.

    Returns the losses [b], not weighted.
    """
    size, losses = len(t) // config.accumulate, []
    for start in range(0, len(t), size):
        part = slice(start, start + size)
        y = None if batch.y is None else batch.y[part]
        with no_sync(network, start + size < len(t)):
            with torch.autocast(t.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = diffusion.loss(network, batch.x0[part], y, t[part], batch.noise[part])
            ((loss * weights[part]).sum() / len(t)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)
