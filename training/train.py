"""python -m training.train: images → EMA checkpoint. Every random draw of step i follows from (seed, i)."""

from __future__ import annotations

import math
import os
import platform
import signal
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import CheckpointConfig
from model.diffusion import GaussianDiffusion
from model.ema import EMA
from model.images import from_uint8
from model.unet import UNet
from training import command, data
from training.config import TrainConfig
from training.data import DataError, Images
from training.pictures import sample_grid
from training.rundir import RunDir
from training.warm_start import warm_start

VALIDATION_IMAGES = 1024  # a multiple of four


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Runs to `config.iterations`, or until SIGINT or SIGTERM, and leaves a checkpoint. Returns the run's folder."""
    device = config.torch_device()
    revision = git_revision()
    run = RunDir(config, resume)
    training_set, validation_set = data.load(config.dataset, config.image_size)
    print(f"{training_set.name}: {len(training_set)} images to train on, {len(validation_set)} to validate,", end=" ")
    print(f"{tuple(training_set.images.shape[1:])}, classes: {', '.join(training_set.class_names[:20]) or 'none'}")
    if config.use_labels and (training_set.labels is None or validation_set.labels is None):
        raise DataError(f"--use_labels, but {config.dataset!r} does not tell the class of every image")
    if config.batch_size > len(training_set):
        raise DataError(f"--batch_size {config.batch_size}, but only {len(training_set)} images to train on")
    training_set, validation_set = training_set.to(device), validation_set.to(device)

    torch.manual_seed(config.seed)
    network = UNet(config.unet(tuple(training_set.images.shape[1:]), len(training_set.class_names))).to(device)
    diffusion = GaussianDiffusion(config.diffusion()).to(device)
    ema = EMA(network, *config.ema_decay)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    iteration, best = 0, math.inf
    if resume and (state := run.load_state()):
        try:
            network.load_state_dict(state["network"])
        except RuntimeError as error:
            raise DataError(f"{config.dataset!r} has other classes or channels than the run in {run.path}") from error
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        iteration, best = state["iteration"], state["best"]
    else:
        warm_start(config, network, ema, optimizer)
    run.start(config, iteration)

    def checkpoint(train_loss: float | None) -> None:
        nonlocal best
        averaged = UNet(network.config).to(device)
        averaged.load_state_dict(ema.weights)
        averaged.eval()
        quartiles = validation_loss(averaged, diffusion, validation_set, config)
        loss = finite(sum(quartiles) / len(quartiles), iteration)
        run.log(iteration=iteration, validation_loss=loss, validation_loss_by_t_quartile=quartiles)
        provenance = {
            "dataset": training_set.name,
            "iterations": iteration,
            "images_seen": iteration * config.batch_size,
            "metrics": {"train_loss": train_loss, "validation_loss": loss},
            "command": config.command(),
            "seed": config.seed,
            "git_revision": revision,
            "machine": f"{device.type}, {os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
        }
        saved = CheckpointConfig(
            unet=network.config,
            diffusion=diffusion.config,
            class_names=training_set.class_names if config.use_labels else (),
            sampling=config.sampling(),
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

    saved_at = iteration
    losses: list[Tensor] = []
    last_loss: float | None = None
    bar = tqdm(total=config.iterations, initial=iteration, unit="it", dynamic_ncols=True, mininterval=1.0)
    with StopSignals() as stop, bar:
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
            if iteration % config.log_rate == 0 or iteration == config.iterations:
                last_loss = finite(float(torch.stack(losses).mean()), iteration)  # the only wait for the device
                rate = images_since / (time.perf_counter() - started)
                run.log(
                    iteration=iteration,
                    train_loss=last_loss,
                    images_per_second=round(rate, 1),
                    time=round(time.time(), 1),
                )
                bar.set_postfix_str(f"loss {last_loss:.4f}, {rate:.0f} images/s")
                losses, started, images_since = [], time.perf_counter(), 0
            if iteration % config.checkpoint_rate == 0 and iteration < config.iterations:
                checkpoint(last_loss)
                saved_at = iteration
                started, images_since = time.perf_counter(), 0
        if stop.requested:
            bar.write(f"Stopping at iteration {iteration}: saving a checkpoint (once more to stop at once)")
        if iteration != saved_at:
            checkpoint(float(torch.stack(losses).mean()) if losses else last_loss)
    if iteration < config.iterations:
        print(f"Stopped at iteration {iteration}; go on with: python -m training.train --resume {run.path}")
    else:
        print(f"Done: {run.path}/best.safetensors (lowest validation loss, {best:.5f})")
    return run.path


def finite(loss: float, iteration: int) -> float:
    """`loss`, unless it is infinite or not a number: then FloatingPointError, so that no such weights are saved."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at iteration {iteration}; what was saved before is good. "
            "Try a lower --learning_rate, --warmup, or --grad_clip 1"
        )
    return loss


def seed_everything(seed: int, iteration: int) -> None:
    """Seeds torch for one step, so that a resumed run draws what an unbroken one would have drawn."""
    torch.manual_seed(int(np.random.SeedSequence([seed, 1, iteration]).generate_state(1, np.uint64)[0]))


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The permutation of the images in one epoch."""
    return np.random.default_rng([seed, 0, epoch]).permutation(size)


def batch(images: Images, iteration: int, config: TrainConfig) -> tuple[Tensor, Tensor | None]:
    """x0 in [-1, 1], float32 [B, C, H, W], and its classes: the next B of this epoch's permutation."""
    per_epoch = len(images) // config.batch_size
    epoch, i = divmod(iteration, per_epoch)
    order = epoch_order(config.seed, epoch, len(images))
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
    """The loss by quartile of t (four numbers): always the same images, t and noise, some twice if there are few."""
    n, device = VALIDATION_IMAGES, images.images.device
    chosen = (torch.arange(n) * len(images) // n).to(device)  # from everywhere: a folder of images is sorted by class
    generator = torch.Generator().manual_seed(0)
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * diffusion.num_timesteps).long()
    t = t.clamp(max=diffusion.num_timesteps - 1)[torch.randperm(n, generator=generator)]
    losses = []
    for part in torch.arange(n).split(64):
        some = images.select(chosen[part])
        x0, y = from_uint8(some.images), some.labels if network.config.num_classes is not None else None
        noise = torch.randn(x0.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses.append(diffusion.loss(network, x0, y, t[part].to(device), noise).cpu())
    by_t = torch.cat(losses)[t.argsort()]
    return [float(quarter.mean()) for quarter in by_t.chunk(4)]


def git_revision() -> str | None:
    """The commit of this source tree, "+" behind it where files differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class StopSignals:
    """Within it SIGINT and SIGTERM ask for a stop after the present step; a second one ends the process at once."""

    def __enter__(self) -> StopSignals:
        self.requested = False
        self._handlers = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True
        self.__exit__()


def main(argv: list[str] | None = None) -> int:
    config, resume = command.parse(argv)
    try:
        train(config, resume)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"training.train: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("training.train: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
