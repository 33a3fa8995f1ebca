"""How fast the network is, beside diffusers' UNet2DModel of the same architecture, run eagerly as its users run it.

    python -m tests.bench.runner [--rounds N] [--threads N] [--nets mnist,cifar] [--batches 1,4,16]

Candidates take turns within a round, so that a disturbance of the machine hits them alike; the table has medians of
milliseconds per call, and ratios over diffusers in fp32 and in the same precision. With one thread it counts that
thread's processor time, which on a busy machine is the better measure. Not a test: pytest does not collect it.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from diffusers import UNet2DModel
from diffusers.utils import logging as diffusers_logging

from model import checkpoint
from model.backends.compile import compile_for_inference
from model.backends.openvino import compile_openvino
from model.convert.exporter import unet_json
from model.nn.config import UNetConfig
from model.nn.unet import UNet

CPU = torch.device("cpu")


def networks() -> dict[str, tuple[UNet, torch.nn.Module]]:
    """Ours, and diffusers' of the same architecture; a random one has other weights there, which costs the same."""
    mnist = checkpoint.load("mnist").network
    cifar = UNet(UNetConfig(num_classes=None)).eval()  # of Ho et al. 2020: 35.7 million weights
    return {
        "mnist": (mnist, theirs(replace(mnist.config, num_classes=None, null_class=False))),
        "cifar": (cifar, theirs(cifar.config)),
    }


def theirs(config: UNetConfig) -> torch.nn.Module:
    fields = {name: value for name, value in unet_json(config).items() if not name.startswith("_")}
    network: torch.nn.Module = UNet2DModel(**fields).eval()
    return network


def candidates(ours: UNet, diffusers: torch.nn.Module, rows: int) -> dict[str, Callable[[], object]]:
    c = ours.config
    x, t = torch.randn(rows, *c.image_shape), torch.full((rows,), 500)
    y = None if c.num_classes is None else torch.zeros(rows, dtype=torch.long)
    half, xh = UNet2DModel.from_config(diffusers.config).eval().to(torch.bfloat16), x.to(torch.bfloat16)
    result: dict[str, Callable[[], object]] = {
        "diffusers fp32": lambda: diffusers(x, t).sample,
        "diffusers bf16": lambda: half(xh, t).sample,
        "plain fp32": lambda: ours(x, t, y),
    }
    for precision in ("fp32", "bf16"):
        forward = compile_for_inference(ours, CPU, precision)
        result[f"torch {precision}"] = lambda forward=forward: forward(x, t, y)
        if importlib.util.find_spec("openvino") and torch.get_num_threads() > 1:  # its thread is not this one
            compiled = compile_openvino(ours, precision, torch.get_num_threads())
            result[f"openvino {precision}"] = lambda compiled=compiled: compiled(x, t, y)
    return result


@torch.inference_mode()
def measure(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for run in runs.values():
        run(), run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = clock()
            run()
            times[name].append(1e3 * (clock() - started))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--nets", default="mnist,cifar")
    parser.add_argument("--batches", default="1,4,16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    diffusers_logging.set_verbosity_error()
    print(f"torch {torch.__version__}, {args.threads} threads, {platform.processor() or platform.machine()}")
    for name, (ours, diffusers) in networks().items():
        if name not in args.nets.split(","):
            continue
        for rows in map(int, args.batches.split(",")):
            times = measure(candidates(ours, diffusers, rows), args.rounds)
            medians = {who: statistics.median(values) for who, values in times.items()}
            print(
                f"\n{name}, batch {rows}: median ms (least), over diffusers fp32, over diffusers in the same precision"
            )
            for who, median in medians.items():
                same = medians[f"diffusers {who.split()[1]}"] / median
                fp32 = medians["diffusers fp32"] / median
                print(f"  {who:15} {median:8.2f} ({min(times[who]):.2f})  {fp32:5.2f}  {same:5.2f}", flush=True)


if __name__ == "__main__":
    main()
