"""python -m training.train: images → EMA checkpoint. Every random draw of step i follows from (seed, i)."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from model.checkpoint import CheckpointConfig
from model.diffusion import GaussianDiffusion
from model.nn.unet import UNet
from model.sampling.schedule import SamplingParams, make_schedule
from training.cli import command
from training.cli.options import printable
from training.console import exit_code, lasting_output
from training.data.batches import Batches
from training.data_record import NOTHING, DataChanges
from training.loop import gpu
from training.loop.backward import backward
from training.loop.compiler import check_gradient, compiled
from training.loop.distributed import DistributedContext, exit_now, init_distributed
from training.loop.optimizer import learning_rate, step, tell_jump
from training.loop.rollback import rollback
from training.loop.state import TrainState
from training.loop.validation import chosen, finite, validation_loss
from training.memory import is_out_of_memory, memory_for
from training.run.config import TrainConfig
from training.run.git import git_revision, machine
from training.run.image_io import NUM_PREVIEW, sample_grid, sequence
from training.run.norm_groups import single_channel_groups
from training.run.run_dir import RunDir, read_config
from training.run.signals import StopSignals
from training.run.trackers import Trackers
from training.run.warm_start import warm_start
from training.run_images import RunImages


def train(config: TrainConfig, resume: bool = False, changes: DataChanges = NOTHING) -> Path:
    """Runs to `config.iterations`, or until a signal, and leaves a checkpoint. Returns the run's folder.

    A resumed run goes on with its own data, but for the `changes`. Under `torchrun` every process calls it: each trains
    on its part of the same batches, and the first one writes.
    """
    with (
        init_distributed(config.device) as (ranks, device),
        RunDir(config, resume) if ranks.is_first else nullcontext() as run,
    ):
        saved = ranks.broadcast(run.load_state() if run and resume else None)
        done = saved["iteration"] if saved else 0
        if done > config.iterations:
            raise ValueError(f"--iterations {config.iterations}: {config.run_dir} has done {done} already; give more")
        if done == config.iterations:
            if run:
                print(f"Nothing to do: {run.path} has done its {done} iterations; give more --iterations to go on")
            return config.run_dir
        if run and saved:
            tell_jump(config, read_config(run.path)[0], done)
        images = RunImages.load(config, ranks, saved, changes, resume)
        Trainer(config, ranks, device, run, saved, images).fit()
    return config.run_dir


class Trainer:
    """A run in this process: `fit` takes it from `state` to `config.iterations`. All processes call all methods.

    `saved` is what the run goes on from, if it does. Raises ValueError with a sentence where data, network and options
    do not go together, or memory does not suffice.
    """

    def __init__(
        self,
        config: TrainConfig,
        ranks: DistributedContext,
        device: torch.device,
        run: RunDir | None,
        saved: dict[str, Any] | None,
        images: RunImages,
    ) -> None:
        self.config, self.ranks, self.device, self.run, self.data = config, ranks, device, run, images.record
        self._revision = git_revision()
        gpu.set_up(config, device)
        with memory_for("the images on the device", "give a smaller --image_size height,width"):
            self._batches = Batches(images.train, config, ranks, device)
            self._validation_set = chosen(images.held_out, device)
        with memory_for("the network", "give fewer --base_channels"):
            self.diffusion = GaussianDiffusion(config.diffusion()).to(device)
            self.state = TrainState(config, self.data.image_shape, len(images.train.class_names), device)
            if saved:
                self._go_on_from(saved)
            else:
                warm_start(config, self.state.network, self.state.ema, self.state.optimizer, self.data.class_names)
        if run and (warning := single_channel_groups(self.state.network.config)):
            print(f"training.train: {warning}", file=sys.stderr)
        network = self.state.network
        self._last_loss: float | None = None
        self._saved_at = self.state.iteration
        self._network = ranks.wrap_ddp(self._compiled(network) if config.compile else network)
        self._restart_clock()

    def _compiled(self, network: UNet) -> nn.Module:
        """The network for a compiler, whose gradient of the first batch was found to be right."""
        model = compiled(network, self.device)
        batch, share = self._batches[self.state.iteration], self.ranks.shard
        t, weights = map(share, self.state.timesteps(batch.u))
        with memory_for(f"a step of {self.config.batch_size} images", self._less_memory()):
            check_gradient(network, lambda trial: backward(trial, self.diffusion, batch, t, weights, self.config))
        return model

    def _go_on_from(self, saved: dict[str, Any]) -> None:
        try:
            self.state.load_state_dict(saved)
        except (RuntimeError, LookupError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"the state of {self.config.run_dir} is of another network than its options make"
            ) from error

    def fit(self) -> None:
        """Trains, logs and saves as often as `config` says, until the last iteration or a signal."""
        config, now = self.config, self.state
        self._bar = tqdm(
            total=config.iterations,
            initial=now.iteration,
            unit="it",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not self.run,
        )
        with (
            Trackers(config if self.run else None, now.iteration) as self._trackers,
            StopSignals(patient=self.ranks.size > 1) as signals,
            self._bar,
        ):
            if self.run:
                self.run.start(config, now.iteration, self.data)
            self._restart_clock()
            while now.iteration < config.iterations:
                if self.ranks.any(signals.stop or signals.save):
                    if self.ranks.any(signals.stop):
                        if self.run:
                            self._bar.write(f"Stopping at iteration {now.iteration}: saving a checkpoint")
                        break
                    signals.save = False
                    self._save()
                self._train_step()
                self._bar.update()
                if now.iteration % config.log_rate == 0 or now.iteration == config.iterations:
                    self._log()
                if now.iteration % config.checkpoint_rate == 0:
                    self._save()
            self._save()
        if self.run and now.iteration < config.iterations:
            go_on = f"python -m training.train --resume {self.run.path}"
            print(f"Stopped at iteration {now.iteration}; go on with: {go_on}")
        elif self.run:
            print(f"Done: {self.run.path}/best.safetensors (lowest validation loss, {now.best:.5f})")

    def _train_step(self) -> None:
        """One batch, one update of the weights and of their averages; nothing but counts where it is not finite."""
        config, now, share = self.config, self.state, self.ranks.shard
        with memory_for(f"a step of {config.batch_size} images", self._less_memory()):
            batch, before = self._batches[now.iteration], [tensor.clone() for tensor in now.buffers_changed()]
            t, weights = now.timesteps(batch.u)
            losses = backward(self._network, self.diffusion, batch, share(t), share(weights), config)
            if now.importance:
                now.importance.update(share(t), losses)
            is_finite = step(now.optimizer, learning_rate(config, now.iteration), config.grad_clip)
            rollback(now.buffers_changed(), before, is_finite)
            now.iteration += 1
            now.images_seen += config.batch_size
            if self.run and now.iteration % config.ema_update_rate == 0:
                now.ema.update(is_finite)
            now.tally.add((losses * share(weights)).mean(), is_finite)
        self._images_since += config.batch_size

    def _log(self) -> None:
        """A line of the losses since the last one."""
        now = self.state
        count = now.tally.read(self.ranks, now.iteration)  # the only wait for the device
        now.tally.clear()
        self._last_loss, rate = count.loss, self._images_since / (time.perf_counter() - self._started)
        self._restart_clock()
        if self.run is None:
            return
        self.run.log(
            iteration=now.iteration,
            train_loss=count.loss,
            skipped_steps=count.skipped,
            images_per_second=round(rate, 1),
            time=round(time.time(), 1),
        )
        self._trackers.scalars(now.iteration, {"skipped_steps": count.skipped, "images_per_second": rate})
        if count.loss is not None:
            self._trackers.scalars(now.iteration, {"train_loss": count.loss})
            self._bar.set_postfix_str(f"loss {count.loss:.4f}, {rate:.0f} images/s")

    def _save(self) -> None:
        """A checkpoint of the averaged weights, the state to go on from, and pictures, if there are none yet."""
        now, run = self.state, self.run
        if now.iteration == self._saved_at:
            return
        count = now.tally.read(self.ranks, now.iteration)
        self._saved_at = now.iteration
        if run:
            shown = self._bar.postfix
            advice = "what was saved before is good; free some, and go on with --resume"
            with memory_for(f"the checkpoint of iteration {now.iteration}", advice):
                averaged = self._averaged()
                loss = self._validate(averaged)
                self._say_in_bar("saving")
                config = self._checkpoint_config(self._last_loss if count.loss is None else count.loss, loss)
                is_best, now.best = loss < now.best, min(now.best, loss)
                state = now.state_dict() | {"data": self.data.to_dict()}
                run.save(now.iteration, now.ema.weights, config, state, is_best)
                self._draw(averaged, config.sampling)
            self._bar.set_postfix_str(shown or "")
        self._restart_clock()

    def _validate(self, network: UNet) -> float:
        """The mean loss on the validation images, logged with its quartiles. Raises FloatingPointError."""
        now = self.state
        self._say_in_bar("validating")
        quartiles = validation_loss(network, self.diffusion, self._validation_set, self.config.precision)
        loss = finite(sum(quartiles) / len(quartiles), now.iteration)
        if self.run:
            self.run.log(iteration=now.iteration, validation_loss=loss, validation_loss_by_t_quartile=quartiles)
        by_quartile = {f"validation_loss/t_quartile_{i}": x for i, x in enumerate(quartiles, start=1)}
        self._trackers.scalars(now.iteration, {"validation_loss": loss} | by_quartile)
        return loss

    def _averaged(self) -> UNet:
        """A network of the averaged weights, in eval mode."""
        layout = gpu.layout(self.config, self.device)
        network = UNet(self.state.network.config).to(self.device, memory_format=layout)
        network.load_state_dict(self.state.ema.weights)
        return network.eval()

    def _checkpoint_config(self, train_loss: float | None, validation_loss: float) -> CheckpointConfig:
        config, now = self.config, self.state
        return CheckpointConfig(
            unet=now.network.config,
            diffusion=self.diffusion.config,
            class_names=self.data.class_names,
            sampling=config.sampling(),
            provenance={
                "dataset": printable(Path(self.data.folder).name or self.data.dataset),
                "iterations": now.iteration,
                "images_seen": now.images_seen,
                "metrics": {"train_loss": train_loss, "validation_loss": validation_loss},
                "command": printable(config.command()),
                "seed": config.seed,
                "git_revision": self._revision,
                "machine": machine(self.device, self.ranks),
            },
        )

    def _draw(self, network: UNet, sampling: SamplingParams) -> None:
        """A grid of samples, and how the first of them come to be."""
        now, classes = self.state, None
        if self.config.use_labels:
            classes = range(min(NUM_PREVIEW, len(self.data.class_names)))
        self._say_in_bar("drawing samples")
        schedule = make_schedule(self.diffusion, **vars(sampling))
        samples = sample_grid(network, schedule)
        self._trackers.picture(now.iteration, "samples", samples)
        frames = sequence(network, schedule, classes or range(NUM_PREVIEW), classes)
        if self.run:
            self.run.save_pictures(now.iteration, samples, frames)

    def _restart_clock(self) -> None:
        """What is measured from here on is the steps alone."""
        self._started, self._images_since = time.perf_counter(), 0

    def _say_in_bar(self, what: str) -> None:
        """The bar stands still during a checkpoint."""
        self._bar.set_postfix_str(f"checkpoint: {what}")

    def _less_memory(self) -> str:
        """What to try where a step does not fit."""
        size, parts = self.config.batch_size, self.config.accumulate
        more = next((n for n in range(parts + 1, size + 1) if size % (n * self.ranks.size) == 0), None)
        advice = f"--accumulate {more} does the same in smaller parts" if more else "give fewer --base_channels"
        again = f" (what is saved goes on by --resume {self.run.path})" if self.run and self._saved_at else ""
        return f"{advice}, and a smaller --batch_size needs less, too{again}"


def main(argv: list[str] | None = None) -> int:
    with lasting_output():
        arguments = command.parse(argv)
        code = exit_code("training.train", lambda: train(*arguments))
    return exit_now(code)


if __name__ == "__main__":
    sys.exit(main())
