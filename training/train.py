"""python -m training.train: images → EMA checkpoint. Reads top to bottom; every draw of step i follows from (seed, i)."""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.ema import EMA
from model.images import from_uint8, grid, to_uint8
from model.samplers import SamplingDefaults, make_plan, sample
from model.unet import UNet, UNetConfig
from training import config as config_module
from training import data
from training.config import TrainConfig
from training.data import DataError, Images
from training.rundir import RunDir

VALIDATION_IMAGES = 1024


def train(config: TrainConfig, resume: bool = False, command: str = "") -> Path:
    """Runs to `config.iterations`, or until SIGINT or SIGTERM, and leaves a checkpoint. Returns the run's folder."""
    device = config.torch_device()
    run = RunDir(config, resume)
    training_set, validation_set = data.load(config.dataset, config.image_size)
    if config.use_labels and training_set.labels is None:
        raise DataError(f"--use_labels, but {config.dataset!r} has no column of class labels")
    if config.batch_size > len(training_set):
        raise DataError(f"--batch_size {config.batch_size}, but only {len(training_set)} images to train on")
    training_set, validation_set = training_set.to(device), validation_set.to(device)

    torch.manual_seed(config.seed)
    network = UNet(unet_config(config, training_set)).to(device)
    diffusion = GaussianDiffusion(diffusion_config(config)).to(device)
    ema = EMA(network, config.ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    iteration, best = 0, math.inf
    if resume:
        state = run.load_state()
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        iteration, best = state["iteration"], state["best"]

    def checkpoint(train_loss: float | None) -> None:
        nonlocal best
        averaged = UNet(network.config).to(device)
        averaged.load_state_dict(ema.weights)
        averaged.eval()
        quartiles = validation_loss(averaged, diffusion, validation_set, config)
        loss = sum(quartiles) / len(quartiles)
        run.log(iteration=iteration, validation_loss=loss, validation_loss_by_t_quartile=quartiles)
        provenance = {
            "dataset": training_set.name,
            "iterations": iteration,
            "images_seen": iteration * config.batch_size,
            "metrics": {"train_loss": train_loss, "validation_loss": loss},
            "command": command,
            "seed": config.seed,
            "git_revision": git_revision(),
            "machine": f"{device.type}, {os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
        }
        saved = CheckpointConfig(
            unet=network.config,
            diffusion=diffusion.config,
            class_names=training_set.class_names if config.use_labels else (),
            sampling=SamplingDefaults(config.sampler, config.sample_steps, 0.0, config.guidance_scale),
            provenance=provenance,
        )
        state = {
            "network": network.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "iteration": iteration,
            "best": min(best, loss),
        }
        run.save(iteration, ema.weights, saved, state, best=loss < best)
        best = min(best, loss)
        run.save_grid(iteration, sample_grid(averaged, diffusion, saved.sampling))

    stop = StopSignals()
    bar = tqdm(total=config.iterations, initial=iteration, unit="it", dynamic_ncols=True, mininterval=1.0)
    losses: list[Tensor] = []
    last_loss: float | None = None
    started, images_since = time.perf_counter(), 0
    while iteration < config.iterations and not stop.requested:
        x0, y = batch(training_set, iteration, config)
        seed_everything(config.seed, iteration)
        if config.flip:
            mirrored = torch.rand(len(x0), device=device) < 0.5
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        if y is not None and config.label_dropout:
            dropped = torch.rand(len(y), device=device) < config.label_dropout
            y = torch.where(dropped, network.config.num_classes, y)
        t = torch.randint(0, config.num_timesteps, (len(x0),), device=device)
        noise = torch.randn_like(x0)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = diffusion.loss(network, x0, y, t, noise).mean()
        loss.backward()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, iteration)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

        iteration += 1
        losses.append(loss.detach())
        images_since += len(x0)
        bar.update()
        if iteration % config.log_rate == 0:
            last_loss = float(torch.stack(losses).mean())  # the only synchronisation with the device
            rate = images_since / (time.perf_counter() - started)
            run.log(iteration=iteration, train_loss=last_loss, images_per_second=round(rate, 1), time=round(time.time(), 1))
            bar.set_postfix_str(f"loss {last_loss:.4f}, {rate:.0f} images/s")
            losses, started, images_since = [], time.perf_counter(), 0
        if iteration % config.checkpoint_rate == 0 and iteration < config.iterations:
            checkpoint(last_loss)
            started, images_since = time.perf_counter(), 0
    bar.close()
    checkpoint(float(torch.stack(losses).mean()) if losses else last_loss)
    if stop.requested:
        print(f"Stopped at iteration {iteration}; go on with: python -m training.train --resume {run.path}")
    else:
        print(f"Done: {run.path}/best.safetensors (lowest validation loss, {best:.5f})")
    return run.path


def unet_config(config: TrainConfig, images: Images) -> UNetConfig:
    """The network that `config` asks for, on these images."""
    _, channels, height, width = images.images.shape
    return UNetConfig(
        image_channels=channels,
        image_size=(height, width),
        base_channels=config.base_channels,
        channel_mults=config.channel_mults,
        num_res_blocks=config.num_res_blocks,
        attention_levels=config.attention_resolutions,
        time_emb_dim=config.time_emb_dim,
        num_classes=len(images.class_names) if config.use_labels else None,
        null_class=config.label_dropout > 0,
        dropout=config.dropout,
    )


def diffusion_config(config: TrainConfig) -> DiffusionConfig:
    """The forward process that `config` asks for."""
    return DiffusionConfig(
        num_timesteps=config.num_timesteps,
        schedule=config.schedule,
        schedule_low=config.schedule_low,
        schedule_high=config.schedule_high,
        prediction=config.prediction,
        loss_type=config.loss_type,
    )


def seed_everything(seed: int, iteration: int) -> None:
    """Seeds torch for one step, so that a resumed run draws what an unbroken one would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([seed, 1, iteration]).generate_state(1, np.uint64)[0]))


def batch(images: Images, iteration: int, config: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """x0 in [-1, 1], float32 [B, C, H, W], and its classes: the next B of this epoch's permutation, the rest dropped."""
    per_epoch = len(images) // config.batch_size
    epoch, i = divmod(iteration, per_epoch)
    order = np.random.default_rng([config.seed, 0, epoch]).permutation(len(images))
    chosen = torch.from_numpy(order[i * config.batch_size : (i + 1) * config.batch_size]).to(images.images.device)
    labels = images.labels[chosen] if config.use_labels and images.labels is not None else None
    return from_uint8(images.images[chosen]), labels


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * iteration / config.iterations)) if config.lr_schedule == "cosine" else 1.0
    return config.learning_rate * warm * decay


@torch.no_grad()
def validation_loss(network: UNet, diffusion: GaussianDiffusion, images: Images, config: TrainConfig) -> list[float]:
    """The loss on the first validation images, always the same t and noise, by quartile of t (four numbers)."""
    n = min(VALIDATION_IMAGES, len(images)) // 4 * 4 or len(images)
    generator = torch.Generator().manual_seed(0)
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * diffusion.num_timesteps).long()
    t = t.clamp(max=diffusion.num_timesteps - 1)[torch.randperm(n, generator=generator)]
    noise = torch.randn(images.images[:n].shape, generator=generator)
    losses = []
    for start in range(0, n, 64):
        part = slice(start, min(start + 64, n))
        x0 = from_uint8(images.images[part])
        y = images.labels[part] if network.config.num_classes is not None and images.labels is not None else None
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses.append(diffusion.loss(network, x0, y, t[part].to(x0.device), noise[part].to(x0.device)).cpu())
    by_t = torch.cat(losses)[t.argsort()]
    return [float(quarter.mean()) for quarter in by_t.chunk(4)]


def sample_grid(network: UNet, diffusion: GaussianDiffusion, defaults: SamplingDefaults, per_class: int = 8) -> np.ndarray:
    """A picture uint8 [H', W', C]: one row of images per class (at most 16 classes), or an 8 × 8 square without classes."""
    config = network.config
    rows = min(config.num_classes or per_class, 16)
    indices = list(range(rows * per_class))
    plan = make_plan(diffusion, defaults.sampler, defaults.steps, eta=defaults.eta, guidance_scale=defaults.guidance_scale)
    images = sample(
        network,
        plan,
        config.image_shape,
        seeds=[0] * len(indices),
        indices=indices,
        classes=None if config.num_classes is None else [i // per_class for i in indices],
        null_class=config.num_classes if config.null_class else None,
        device=next(network.parameters()).device,
    )
    return grid(to_uint8(images).cpu().numpy(), columns=per_class)


def git_revision() -> str | None:
    """The commit of this source tree, "+" behind it where files differ from it; None outside a git checkout."""
    root = Path(__file__).parent
    try:
        revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.strip() + ("+" if dirty.strip() else "")


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the present step; a second one ends the process at once."""

    def __init__(self) -> None:
        self.requested = False
        self._handlers = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}

    def _request(self, *_: Any) -> None:
        self.requested = True
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    config, resume = config_module.parse(argv)
    command = "python -m training.train " + shlex.join(sys.argv[1:] if argv is None else argv)
    try:
        train(config, resume, command)
    except (ValueError, OSError) as error:
        print(f"training.train: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
