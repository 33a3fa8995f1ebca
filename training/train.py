"""python -m training.train: images → EMA checkpoint. Every random draw of step i follows from (seed, i)."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.checkpoint import CheckpointConfig
from model.diffusion import GaussianDiffusion, Network
from model.nn.unet import UNet, UNetConfig
from training import data, gpu
from training.cli import command
from training.data.batches import Batch, Batches
from training.data.datasets import DataError
from training.loop.compiler import compiled
from training.loop.distributed import Ranks, joined, unreduced
from training.loop.optimizer import restore, step
from training.loop.state import TrainState
from training.loop.validation import chosen, validation_loss
from training.run.config import TrainConfig
from training.run.git import git_revision
from training.run.image_io import sample_grid, sequence
from training.run.run_dir import RunDir
from training.run.signals import StopSignals
from training.run.trackers import Trackers
from training.run.warm_start import warm_start

SHOWN = 4  # images whose making is shown as a strip and a GIF


def train(config: TrainConfig, resume: bool = False) -> Path:
    """Runs to `config.iterations`, or until SIGINT or SIGTERM, and leaves a checkpoint. Returns the run's folder.

    Under `torchrun` every process calls it: each trains on its part of the same batches, and the first one writes.
    """
    with (
        joined(config.device) as (ranks, device),
        RunDir(config, resume) if ranks.is_first else nullcontext() as run,
    ):
        _train(config, resume, ranks, device, run)
    return config.run_dir


def _train(config: TrainConfig, resume: bool, ranks: Ranks, device: torch.device, run: RunDir | None) -> None:
    revision = git_revision()
    gpu.set_up(config, device)
    training_set, validation_set = data.load(config.dataset, config.image_size)
    (_, *shape), class_names = training_set.images.shape, training_set.class_names
    if run:
        print(
            f"{training_set.name}: {len(training_set)} images to train on, {len(validation_set)} to validate,", end=" "
        )
        print(f"{tuple(shape)}, classes: {', '.join(class_names[:20]) or 'none'}")
    if config.use_labels and (training_set.labels is None or validation_set.labels is None):
        raise DataError(f"--use_labels, but {config.dataset!r} does not tell the class of every image")
    batches = Batches(training_set, config, ranks, device)
    validation_set = chosen(validation_set, device)

    diffusion = GaussianDiffusion(config.diffusion()).to(device)
    now = TrainState(config, tuple(shape), len(class_names), device)
    if state := ranks.from_first(run.load_state() if run and resume else None):
        try:
            now.load_state_dict(state)
        except RuntimeError as error:
            raise DataError(
                f"{config.dataset!r} has other classes or channels than the run {config.run_dir}"
            ) from error
    else:
        warm_start(config, now.network, now.ema, now.optimizer)
    if run and (warning := single_channel_groups(now.network.config)):
        print(f"training.train: {warning}", file=sys.stderr)
    model = ranks.wrapped(compiled(now.network, device) if config.compile else now.network)

    def checkpoint(run: RunDir, train_loss: float | None) -> None:
        averaged = UNet(now.network.config).to(device, memory_format=gpu.layout(config, device))
        averaged.load_state_dict(now.ema.weights)
        averaged.eval()
        quartiles = validation_loss(averaged, diffusion, validation_set, config.precision)
        loss = finite(sum(quartiles) / len(quartiles), now.iteration)
        run.log(iteration=now.iteration, validation_loss=loss, validation_loss_by_t_quartile=quartiles)
        tracked.scalars(now.iteration, {"validation_loss": loss})
        tracked.scalars(now.iteration, {f"validation_loss/t_quartile_{i}": x for i, x in enumerate(quartiles, start=1)})
        saved = CheckpointConfig(
            unet=now.network.config,
            diffusion=diffusion.config,
            class_names=class_names if config.use_labels else (),
            sampling=config.sampling(),
            provenance={
                "dataset": training_set.name,
                "iterations": now.iteration,
                "images_seen": now.iteration * config.batch_size,
                "metrics": {"train_loss": train_loss, "validation_loss": loss},
                "command": config.command(),
                "seed": config.seed,
                "git_revision": revision,
                "machine": machine(device, ranks),
            },
        )
        is_best, now.best = loss < now.best, min(now.best, loss)
        run.save(now.iteration, now.ema.weights, saved, now.state_dict(), is_best)
        samples = sample_grid(averaged, diffusion, saved.sampling)
        tracked.picture(now.iteration, "samples", samples)
        classes = range(min(SHOWN, len(class_names))) if config.use_labels else None
        frames = sequence(averaged, diffusion, saved.sampling, classes or range(SHOWN), classes)
        run.save_pictures(now.iteration, samples, frames)

    bar = tqdm(
        total=config.iterations, initial=now.iteration, unit="it", dynamic_ncols=True, mininterval=1.0, disable=not run
    )
    with Trackers(config if run else None, now.iteration) as tracked, StopSignals(ranks.size > 1) as stop, bar:
        if run:
            run.start(config, now.iteration)
        saved_at, last_loss, stopped = now.iteration, None, False
        started, images_since = time.perf_counter(), 0
        while now.iteration < config.iterations and not (stopped := ranks.any(stop.requested)):
            batch, before = batches[now.iteration], [tensor.clone() for tensor in now.passing()]
            t, weights = now.timesteps(batch.u)
            losses = backward(model, diffusion, batch, ranks.share(t), ranks.share(weights), config)
            if now.importance:
                now.importance.update(ranks.share(t), losses)
            is_finite = step(now.optimizer, learning_rate(config, now.iteration), config.grad_clip)
            restore(now.passing(), before, is_finite)
            now.iteration += 1
            if run and now.iteration % config.ema_update_rate == 0:
                now.ema.update(is_finite)
            now.tally.add((losses * ranks.share(weights)).mean(), is_finite)

            images_since += config.batch_size
            bar.update()
            is_last = now.iteration == config.iterations
            if now.iteration % config.log_rate == 0 or is_last:
                count = now.tally.read(ranks, now.iteration)  # the only wait for the device
                now.tally.clear()
                last_loss, rate = count.loss, images_since / (time.perf_counter() - started)
                if run:
                    run.log(
                        iteration=now.iteration,
                        train_loss=count.loss,
                        skipped_steps=count.skipped,
                        images_per_second=round(rate, 1),
                        time=round(time.time(), 1),
                    )
                    tracked.scalars(now.iteration, {"skipped_steps": count.skipped, "images_per_second": rate})
                    if count.loss is not None:
                        tracked.scalars(now.iteration, {"train_loss": count.loss})
                        bar.set_postfix_str(f"loss {count.loss:.4f}, {rate:.0f} images/s")
                started, images_since = time.perf_counter(), 0
            if now.iteration % config.checkpoint_rate == 0 and not is_last:
                saved_at = now.iteration
                if run:
                    checkpoint(run, last_loss)
                started, images_since = time.perf_counter(), 0
        if stopped and run:
            bar.write(f"Stopping at iteration {now.iteration}: saving a checkpoint (once more to stop at once)")
        count = now.tally.read(ranks, now.iteration)
        if now.iteration != saved_at and run:
            checkpoint(run, last_loss if count.loss is None else count.loss)
    if not run:
        return
    if now.iteration < config.iterations:
        print(f"Stopped at iteration {now.iteration}; go on with: python -m training.train --resume {run.path}")
    else:
        print(f"Done: {run.path}/best.safetensors (lowest validation loss, {now.best:.5f})")


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
        with unreduced(network, start + size < len(t)):
            with torch.autocast(t.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = diffusion.loss(network, batch.x0[part], y, t[part], batch.noise[part])
            ((loss * weights[part]).sum() / len(t)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def single_channel_groups(config: UNetConfig) -> str | None:
    """A warning, where groups of one channel take the mean away that time and class have just added."""
    widths = [config.base_channels * mult for mult in config.channel_mults]
    alone = [width for width in widths if math.gcd(config.norm_groups, width) == width]
    if config.norm != "gn" or config.scale_shift_norm or not alone:
        return None
    groups = next((n for n in (8, 4, 2) if all(math.gcd(n, width) < width for width in widths)), 1)
    return (
        f"at {min(alone)} channels each group of the norm is a single channel, where the biases of time and class "
        f"cancel: --norm_groups {groups} lets the network see them"
    )


def finite(loss: float, iteration: int) -> float:
    """`loss`, unless it is infinite or not a number: then FloatingPointError, so that no such weights are saved."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the validation loss is {loss} at iteration {iteration}; what was saved before is good. "
            "Try a lower --learning_rate, --warmup, or --grad_clip 1"
        )
    return loss


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """Linear warm-up, then constant or half a cosine down to 0."""
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    decay = 0.5 * (1 + math.cos(math.pi * iteration / config.iterations)) if config.lr_schedule == "cosine" else 1.0
    return config.learning_rate * warm * decay


def machine(device: torch.device, ranks: Ranks) -> str:
    """For provenance."""
    devices = f"{ranks.size} × {device.type}" if ranks.size > 1 else device.type
    if device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        devices += ", TF32"
    return f"{devices}, {os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}"


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
