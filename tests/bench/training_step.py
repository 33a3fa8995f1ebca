"""python -m tests.bench.training_step: one step of training, ours beside diffusers' and the original's.

All train the same network from the same weights on images that lie in memory, and keep an average of the weights.
bf16 is autocast.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.images import from_uint8
from model.nn.ema import EMA
from model.nn.unet import UNet
from tests.bench import networks, timing
from training.loop.compiler import compiled

DECAY = 0.9999


def prepared(network: nn.Module, options: set[str]) -> Callable[..., object]:
    """The network as `options` want it called: channels_last, compile."""
    network.train()
    if "channels_last" in options:
        network.to(memory_format=torch.channels_last)
    return compiled(network, next(network.parameters()).device) if "compile" in options else network


def layout(options: set[str]) -> torch.memory_format:
    return torch.channels_last if "channels_last" in options else torch.contiguous_format


def our_step(images: Tensor, batch: int, network: UNet, options: set[str]) -> Callable[[], None]:
    """The step of training.train."""
    device = images.device
    diffusion, ema = GaussianDiffusion(DiffusionConfig()).to(device), EMA(network, DECAY)
    call = prepared(network, options)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4, fused=True)

    def step() -> None:
        x0 = from_uint8(images[torch.randint(len(images), (batch,), device=device)]).contiguous(
            memory_format=layout(options)
        )
        t, noise = torch.randint(0, 1000, (batch,), device=device), torch.randn_like(x0)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in options):
            loss = diffusion.loss(call, x0, None, t, noise).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return step


def diffusers_step(images: Tensor, batch: int, network: nn.Module, options: set[str]) -> Callable[[], None]:
    """That of diffusers' example train_unconditional.py: AdamW, clipping at 1, EMAModel, the loss read at every step.

    Its images are floating-point numbers already.
    """
    device, data = images.device, from_uint8(images)
    call = prepared(network, options)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    ema = EMAModel(network.parameters(), decay=DECAY, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def step() -> None:
        clean = data[torch.randint(len(data), (batch,), device=device)].contiguous(memory_format=layout(options))
        noise, t = torch.randn_like(clean), torch.randint(0, 1000, (batch,), device=device)
        noisy = scheduler.add_noise(clean, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled="bf16" in options):
            out = call(noisy, t).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(network.parameters())
        loss.item()

    return step


def original_step(images: Tensor, batch: int, network: nn.Module, options: set[str]) -> Callable[[], None]:
    """That of abarankab/DDPM: the loss read at every step, no clipping, attention written out.

    The average is a deep copy in the module that the optimiser holds, with a new tensor for each parameter each time.
    """
    assert options <= {"fp32"}, "the original knows float32 only"
    device, data = images.device, from_uint8(images)
    pair = nn.ModuleDict({"model": network, "ema_model": copy.deepcopy(network)}).train()
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - betas, 0)
    alpha, sigma = alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)
    optimizer = torch.optim.Adam(pair.parameters(), lr=2e-4)
    total = 0.0

    def step() -> None:
        nonlocal total
        x = data[torch.randint(len(data), (batch,), device=device)]
        t, noise = torch.randint(0, 1000, (batch,), device=device), torch.randn_like(x)
        noisy = alpha.gather(0, t)[:, None, None, None] * x + sigma.gather(0, t)[:, None, None, None] * noise
        loss = F.mse_loss(pair["model"](noisy, t), noise)
        total += loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for average, new in zip(pair["ema_model"].parameters(), pair["model"].parameters(), strict=True):
            average.data = average.data * DECAY + new.data * (1 - DECAY)

    return step


STEPS = {"ours": our_step, "diffusers": diffusers_step, "original": original_step}
OPTIONS = ("fp32", "bf16", "channels_last", "compile")
CPU = "diffusers+fp32,original+fp32,ours+fp32,diffusers+bf16,ours+bf16"
CUDA = CPU + ",diffusers+bf16+channels_last+compile,ours+bf16+channels_last+compile"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training_step", description="Time a training step.")
    parser.add_argument("--network", choices=networks.CONFIGS, default="mnist")
    timing.add_options(parser, 64, CUDA if torch.cuda.is_available() else CPU)
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before the first round")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    base = networks.ours(networks.CONFIGS[args.network], device)
    shape = max(2048, args.batch_size), *base.config.image_shape
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    makers = {who: partial(maker, images, args.batch_size) for who, maker in STEPS.items()}
    command = shlex.join(["python", "-m", "tests.bench.training_step", *argv])
    candidates = networks.candidates(args.candidates, base, makers, OPTIONS)
    timing.report(
        command, candidates, args, warmup=args.warmup, flops=networks.flops(base, args.batch_size, backward=True)
    )


if __name__ == "__main__":
    main(sys.argv[1:])
