"""The network as it runs fastest on a device, in a precision: one function, `compile_for_inference`."""

from __future__ import annotations

import torch

from model.backends.cpu import PackedUNet
from model.backends.cpu_lucidrains import PackedLucidrainsUNet
from model.backends.cuda import autocast_network
from model.backends.recorded import RecordedNetwork
from model.diffusion import Network
from model.nn.lucidrains import LucidrainsUNet
from model.nn.networks import AnyUNet

PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
BF16_CHANNELS = 24  # of narrower networks AVX512-BF16 gains less than an eighth


def best_precision(device: torch.device, base_channels: int = BF16_CHANNELS) -> str:
    """bf16 where the device multiplies matrices in it and a network of such a width is faster in it, else fp32.

    A matter of instruction sets and not of times: images must not depend on a clock.
    """
    if device.type == "cuda":
        is_faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_faster = torch.cpu._is_amx_tile_supported() or (
            torch.cpu._is_avx512_bf16_supported() and base_channels >= BF16_CHANNELS
        )
    return "bf16" if is_faster and device.type in ("cpu", "cuda") else "fp32"


def compile_for_inference(network: AnyUNet, device: torch.device, precision: str) -> Network:
    """`network` as a function of x [N, C, H, W], t [N], y [N] or None, on `device`; float32 in, float32 out.

    The network itself is left as it is, on a CPU; elsewhere it is moved to the device, and rounded. Raises ValueError
    for a precision that is not one of `PRECISIONS`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    network.eval()
    if device.type == "cpu":
        dtype = PRECISIONS[precision]
        if isinstance(network, LucidrainsUNet):
            return RecordedNetwork(PackedLucidrainsUNet(network, dtype))
        return RecordedNetwork(PackedUNet(network, dtype))
    return autocast_network(network, device, PRECISIONS[precision])
