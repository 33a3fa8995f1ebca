"""python -m tests.bench.sampling: a run of 50 steps, ours beside diffusers' and the original's.

All use the same network with the same weights. Ours is what training.sample and training.evaluate call; diffusers' is
DDIMPipeline, from noise to images in memory; both are DDIM. The original has ancestral sampling only, with all its
steps: here it takes 50 of them.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from functools import partial

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

from model.backends.compile import compile_for_inference
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.images import to_uint8
from model.nn.unet import UNet
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.bench import networks, timing

STEPS = 50


def our_run(batch: int, network: UNet, options: set[str]) -> Callable[[], object]:
    device = network.init_conv.weight.device
    schedule = make_schedule(GaussianDiffusion(DiffusionConfig()), "ddim", STEPS)
    call = compile_for_inference(network, device, "bf16" if "bf16" in options else "fp32")
    if "compile" in options:
        network.compile()

    def run() -> None:
        shape, seeds = network.config.image_shape, [0] * batch
        to_uint8(sample(call, schedule, shape, seeds, range(batch), device=device)).cpu()

    return run


def diffusers_run(batch: int, network: nn.Module, options: set[str]) -> Callable[[], object]:
    """bf16 is autocast, or, as half, weights in bfloat16: what diffusers' pages recommend on a GPU."""
    device = next(network.parameters()).device
    pipeline = DDIMPipeline(network, DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    if "channels_last" in options:
        network.to(memory_format=torch.channels_last)
    if "half" in options:
        network.to(torch.bfloat16)
    if "compile" in options:
        network.compile()

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in options):
            pipeline(batch_size=batch, num_inference_steps=STEPS, output_type="np")

    return run


def original_run(batch: int, network: nn.Module, options: set[str]) -> Callable[[], object]:
    """Ancestral steps in float32, each coefficient gathered for each image, and dropout left on, as its script does."""
    assert options <= {"fp32"}, "the original knows float32 only"
    device = next(network.parameters()).device
    network.train()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    scale, remove, sigma = (
        table.float().to(device) for table in ((1 - betas) ** -0.5, betas / (1 - alpha_bar).sqrt(), betas.sqrt())
    )
    shape = (batch, *network.config.image_shape)

    @torch.no_grad()
    def run() -> None:
        x = torch.randn(shape, device=device)
        for step in reversed(range(STEPS)):
            t = torch.full((batch,), step, device=device)
            a, b, s = (table.gather(0, t)[:, None, None, None] for table in (scale, remove, sigma))
            x = (x - b * network(x, t)) * a
            if step:
                x = x + s * torch.randn_like(x)
        x.cpu()

    return run


RUNS = {"ours": our_run, "diffusers": diffusers_run, "original": original_run}
OPTIONS = ("fp32", "bf16", "half", "channels_last", "compile")
CPU = "diffusers+fp32,original+fp32,ours+fp32,diffusers+bf16,ours+bf16"
CUDA = CPU + ",diffusers+half+channels_last+compile,ours+bf16+compile"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sampling", description=f"Time {STEPS} steps.")
    parser.add_argument("--network", choices=networks.CONFIGS, default="mnist")
    timing.add_options(parser, 16, CUDA if torch.cuda.is_available() else CPU)
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    base = networks.ours(networks.CONFIGS[args.network], device).eval()
    makers = {who: partial(maker, args.batch_size) for who, maker in RUNS.items()}
    command = shlex.join(["python", "-m", "tests.bench.sampling", *argv])
    candidates = networks.candidates(args.candidates, base, makers, OPTIONS)
    timing.report(
        command, candidates, args, warmup=1, flops=STEPS * networks.flops(base, args.batch_size, backward=False)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
