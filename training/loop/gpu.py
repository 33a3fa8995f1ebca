"""What a training run asks of a GPU."""

from __future__ import annotations

import torch

from model.backends.cuda import use_tf32
from training.run.config import TrainConfig

TF32_SINCE = (8, 0)  # compute capability


def layout(config: TrainConfig, device: torch.device) -> torch.memory_format:
    """How weights and images lie in memory: with --channels_last as the kernels of matrix units want.

    On a CPU only with --compile: torch's own norms are slow there.
    """
    has_gain = device.type == "cuda" or (device.type == "cpu" and config.compile)
    return torch.channels_last if config.channels_last and has_gain else torch.contiguous_format


def set_up(config: TrainConfig, device: torch.device) -> None:
    """Sets what libraries on the device may do. Raises ValueError where --precision tf32 asks for what it has not."""
    if config.precision == "tf32":
        if device.type != "cuda":
            raise ValueError(f"--precision tf32 is for GPUs, and the device is {device.type}: take fp32 or bf16")
        if torch.cuda.get_device_capability(device) < TF32_SINCE:
            raise ValueError(f"--precision tf32: {torch.cuda.get_device_name(device)} has none, take fp32")
    if device.type == "cuda":
        use_tf32(config.precision == "tf32")
        torch.backends.cudnn.benchmark = config.channels_last  # shapes are the same at every step
