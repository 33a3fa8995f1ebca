"""What cannot be settled without a GPU: the bench prints what decides it. See "On a GPU" in docs/benchmarks.md."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from torch import Tensor

from app.engine.batch_invariance import candidate_batch_sizes
from model.backends.compile import PRECISIONS
from model.backends.cuda import CHANNELS_LAST_NORM, CudaRecorder, autocast_network
from model.diffusion import Network
from model.nn.config import UNetConfig
from model.nn.unet import UNet

Inputs = Callable[[UNetConfig, int, torch.device], tuple[Tensor, Tensor, Tensor | None]]
Medians = Callable[[dict[str, Callable[[], object]], torch.device, int], dict[str, float]]
NORMS = {"PyTorch's": False, "channels last": True}  # group norms, and what `autocast_network` is told
MIB = 2**20


@torch.inference_mode()
def same_bits(network: Network, config: UNetConfig, micro_batch_size: int, device: torch.device, inputs: Inputs) -> str:
    """Numbers of rows that give the same bits, group by group."""
    x, t, y = inputs(config, micro_batch_size, device)
    found: list[tuple[Tensor, list[int]]] = []
    for size in candidate_batch_sizes(micro_batch_size, device.type):
        out = network(x[-size:], t[-size:], None if y is None else y[-size:])
        for first, sizes in found:
            if torch.equal(out, first[-size:]):
                sizes.append(size)
                break
        else:
            found.append((out, [size]))
    return "; ".join(" ".join(map(str, sizes)) for _, sizes in found)


@torch.inference_mode()
def norms(
    network: UNet, args: argparse.Namespace, precision: str, micro_batch_size: int, inputs: Inputs, medians: Medians
) -> list[str]:
    """The network by both group norms: milliseconds of calls with at most so many rows, and who gives the same bits."""
    device, config = torch.device(args.device), network.config
    both = {
        name: autocast_network(copy.deepcopy(network), device, PRECISIONS[precision], flag)
        for name, flag in NORMS.items()
    }
    lines = ["| rows | " + " | ".join(f"norm: {name}, ms" for name in NORMS) + " | ratio |", "|---:|---:|---:|---:|"]
    ratio = 1.0
    for rows in sorted({min(int(n), micro_batch_size) for n in args.rows.split(",")}):
        given = inputs(config, rows, device)
        runs = {name: lambda call=call, given=given: call(*given) for name, call in both.items()}
        took = medians(runs, device, args.rounds)
        ratio = took["channels last"] / took["PyTorch's"]
        lines.append(f"| {rows} | " + " | ".join(f"{1e3 * s:.3f}" for s in took.values()) + f" | {ratio:.2f} |")
    lines.append("")
    lines += [
        f"same bits, norm {name}: {same_bits(call, config, micro_batch_size, device, inputs)}"
        for name, call in both.items()
    ]
    lines.append(
        f"norms: with the most rows, channels last takes {ratio:.2f} of the time of PyTorch's. If that is less than 1, "
        f"and no fewer numbers give the same bits, set CHANNELS_LAST_NORM, now {CHANNELS_LAST_NORM}"
    )
    return lines


def padding(sizes: list[int], asked: int) -> str:
    """What numbers of rows that do not agree cost."""
    return (
        f"padding: rows of a single image: {sizes[0]}; most rows of a call: {sizes[-1]}, of the {asked} that were tried"
    )


def warm_up_memory(device: torch.device, has_graphs: bool) -> str:
    """How near the warm-up came to the end of the memory. Call `torch.cuda.reset_peak_memory_stats` before it."""
    most, now = torch.cuda.max_memory_reserved(device) / MIB, torch.cuda.memory_reserved(device) / MIB
    total = torch.cuda.mem_get_info(device)[1] / MIB
    graphs = "there are graphs" if has_graphs else "graphs were given up"
    return f"warm-up: at most {most:.0f} MiB of {total:.0f} reserved, {now:.0f} after it; {graphs}"


def memory_of_a_spoiled_recording(device: torch.device) -> str:
    """What a recording that waits for the device leaves reserved. The last thing to do in a process."""

    def reserved() -> float:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(device) / MIB

    def run() -> None:
        torch.ones(64 * MIB, device=device).sum().item()

    run()
    before = reserved()
    try:
        CudaRecorder()(run)
    except RuntimeError:
        return f"a spoiled recording of 256 MiB leaves {reserved() - before:.0f} MiB reserved"
    return "a recording that waits for the device was accepted"
