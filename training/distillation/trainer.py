"""A distillation in this process: batches of trajectories in, updates of the student, logs and checkpoints out."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from model.backends.compile import compile_for_inference
from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import Network
from model.nn.ema import EMA
from model.nn.networks import AnyUNet, build
from model.sampling.fitted import weights_digest
from model.sampling.schedule import SamplingParams, make_schedule
from training.classifier.network import Classifier
from training.distillation.config import DistillConfig
from training.distillation.losses import LOSSES, Lesson, feature_distance
from training.distillation.matching import FeatureMatching
from training.distillation.student import Batch, easiest_points, inside, student_config, student_table, walk
from training.distillation.trajectories import AT_ONCE, Trajectories
from training.loop.compiler import check_gradient, compiled
from training.loop.distributed import DistributedContext
from training.loop.loss_meter import LossMeter
from training.loop.optimizer import learning_rate, load_state, step
from training.loop.validation import finite
from training.memory import is_out_of_memory, memory_for
from training.run.git import git_revision, machine
from training.run.image_io import NUM_PREVIEW, sample_grid, sequence
from training.run.run_dir import RunDir
from training.run.signals import StopSignals

HELD_OUT = 64  # trajectories at the beginning of the file, by which students are compared
SHOWN = 1024  # images of a student that are compared with real ones: before its first update, and of its average
FRESH = 2**31  # where noise begins that no trajectory has
ALONE = DistributedContext()


class DistillTrainer:
    """`fit` takes the student from `state` to `config.iterations`."""

    def __init__(
        self,
        config: DistillConfig,
        teacher: Checkpoint,
        student: AnyUNet,
        params: SamplingParams,
        judges: tuple[Classifier, ...],
        matching: FeatureMatching | None,
        device: torch.device,
        run: RunDir,
        saved: dict[str, Any] | None,
    ) -> None:
        self.config, self.teacher, self.device, self.run, self.params = config, teacher, device, run, params
        self._taught_by = taught_by(teacher, params, judges)
        if saved and saved.get("taught_by", self._taught_by) != self._taught_by:
            raise ValueError(f"--teacher {config.teacher} or --features has changed since {run.path} began: begin anew")
        if saved and matching and saved.get("real_images", matching.fingerprint) != matching.fingerprint:
            raise ValueError(f"--real_images {config.real_images} has changed since {run.path} began: begin anew")
        self.network = student.eval().requires_grad_(True).to(device)  # no dropout: the teacher has none either
        if config.compile:
            self.network.to(memory_format=torch.channels_last)
        self.ema = EMA(self.network, config.ema_decay)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, fused=True)
        self.meter = LossMeter(device)
        self.iteration, self.images_seen, self.best = 0, 0, math.inf
        self.diffusion = teacher.diffusion.to(device)
        self.trajectories = Trajectories(
            teacher, params, device, config.seed, self._wanted(), run.path.parent, config.precision
        )
        self._matching = matching
        self._revision = git_revision()
        self._timesteps: list[float] = list(config.timesteps)
        self._last_loss: float | None = None
        if saved:
            self._load(saved)
        null_class = teacher.config.unet.num_classes if teacher.config.unet.null_class else None
        self._lesson_of = lambda schedule: Lesson(
            schedule,
            self.diffusion,
            compile_for_inference(teacher.network, device, config.precision),
            params.guidance_scale,
            null_class,
            judges,
            config.feature_weight,
            config.anchor,
            matching,
            config.real_weight,
            config.precision == "bf16",
        )

    def _wanted(self) -> int:
        """How many trajectories are kept."""
        return self.config.trajectories and max(self.config.trajectories, HELD_OUT + AT_ONCE)

    def fit(self) -> None:
        """Makes the trajectories that are missing, trains, and saves, until the last iteration or a signal."""
        config = self.config
        with StopSignals() as signals:
            self.run.start(config, self.iteration)
            if not self.trajectories.make(lambda: signals.stop):
                print(f"Stopped while trajectories were made; go on with: {self._go_on()}")
                return
            self._prepare()
            bar = tqdm(total=config.iterations, initial=self.iteration, unit="it", dynamic_ncols=True, mininterval=1.0)
            self._bar, self._started, self._since = bar, time.perf_counter(), 0
            with bar:
                while self.iteration < config.iterations and not signals.stop:
                    self._train_step()
                    bar.update()
                    is_last = self.iteration == config.iterations
                    if self.iteration % config.log_rate == 0 or is_last:
                        self._log()
                    if self.iteration % config.checkpoint_rate == 0 or is_last or signals.save or signals.stop:
                        signals.save = False
                        self._save()
        if self.iteration < config.iterations:
            print(f"Stopped at iteration {self.iteration}; go on with: {self._go_on()}")
        else:
            nearest_to = "the teacher's" if self._matching is None else "the real"
            print(f"Done: {self.run.path}/best.safetensors (nearest to {nearest_to} images, {self.best:.5f})")

    def _go_on(self) -> str:
        return f"python -m training.distill --resume {self.run.path}"

    def _prepare(self) -> None:
        """The held-out trajectories, and the student's schedule."""
        indices = torch.arange(HELD_OUT)
        x_T, states = self.trajectories.x_T(indices), self.trajectories.states(indices)
        grid_t = self.trajectories.schedule.timesteps
        if self.config.method == "guidance":
            self._points = [len(grid_t) - 1]
            own = replace(self.params, steps=self.config.steps)
            of_one_row = inside(self.config, self.teacher, self.params)
            schedule = of_one_row.schedule(make_schedule(self.diffusion, **vars(own)))
        else:
            if not self._timesteps:
                every = torch.cat([x_T[:, None], states], dim=1)
                points = easiest_points(self.diffusion, self.trajectories.schedule, every, self.config.steps)
                self._timesteps = [grid_t[i].item() for i in points]
            starts = [grid_t.tolist().index(t) for t in self._timesteps]
            self._points = [i - 1 for i in [*starts[1:], len(grid_t)]]  # states[:, i] is at the end of step i
            schedule = student_table(self.diffusion, np.array(self._timesteps), self.config.sampler, self.params.limit)
        self._held_out = Batch(x_T, states[:, self._points], self.trajectories.classes(indices), x_T, x_T[:, 0, 0, 0])
        self.lesson = self._lesson_of(schedule)
        self._student: Network = self._compiled() if self.config.compile else self.network
        if self._matching is not None and self.iteration == 0:
            self._show(self.network, self._matching)  # so that the first update knows where it stands

    def _compiled(self) -> Network:
        """The student for a compiler, whose gradient of a step with the first batch was found to be right."""
        batch, bf16 = self._batch(self.iteration), self.lesson.bf16
        x_T = batch.x_T.contiguous(memory_format=torch.channels_last)
        t = torch.full((len(x_T),), self.lesson.schedule.timesteps[0].item(), device=self.device)

        def add_gradient(network: nn.Module) -> None:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                out = network(x_T, t, batch.y)
            out.float().square().mean().backward()

        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch's compiler asks
        model = compiled(self.network, self.device)
        with memory_for(f"a step of {self.config.batch_size} images", "give a smaller --batch_size"):
            check_gradient(self.network, add_gradient)
        return lambda x, t, y: model(x.contiguous(memory_format=torch.channels_last), t, y)  # one layout, one graph

    @torch.no_grad()
    def _show(self, network: AnyUNet, matching: FeatureMatching) -> FeatureMatching:
        """Images of a student, of noise from which it does not learn."""
        for part in torch.arange(FRESH, FRESH + SHOWN).split(self.config.batch_size):
            x_T, y = self.trajectories.x_T(part), self.trajectories.classes(part)
            *_, (_, x) = walk(network, self.lesson.schedule, x_T, y, self.lesson.bf16, detached=True)
            matching.add(x, y)
        return matching

    def _batch(self, iteration: int) -> Batch:
        """The batch of an iteration: its trajectories in an order that follows from seed and pass."""
        size, count = self.config.batch_size, self.trajectories.count
        places = torch.arange(iteration * size, (iteration + 1) * size)
        if count:
            kept = count - HELD_OUT
            orders = {
                epoch: torch.randperm(kept, generator=torch.Generator().manual_seed(self.config.seed + epoch))
                for epoch in sorted(set((places // kept).tolist()))
            }
            places = torch.tensor([int(orders[int(p) // kept][int(p) % kept]) for p in places])
        indices = HELD_OUT + places
        generator = torch.Generator().manual_seed(hash((self.config.seed, iteration)) % 2**63)
        noise = torch.randn(size, *self.trajectories.shape, generator=generator).to(self.device)
        u = torch.rand(size, generator=generator).to(self.device)
        states = self.trajectories.states(indices)[:, self._points]
        return Batch(self.trajectories.x_T(indices), states, self.trajectories.classes(indices), noise, u)

    def _train_step(self) -> None:
        """One batch: an update of the weights and their average for each of the method's losses."""
        config, rate = self.config, learning_rate(self.config, self.iteration)
        with memory_for(f"a step of {config.batch_size} images", "give a smaller --batch_size"):
            losses = []
            for loss in LOSSES[config.method](self._student, self._batch(self.iteration), self.lesson):
                loss.mean().backward()
                is_finite = step(self.optimizer, rate, config.grad_clip)
                self.ema.update(is_finite)
                losses.append(loss.detach().mean())
            self.meter.add(torch.stack(losses).mean(), is_finite)
        self.iteration += 1
        self.images_seen += config.batch_size
        self._since += config.batch_size

    def _log(self) -> None:
        count = self.meter.read(ALONE, self.iteration)
        self.meter.clear()
        rate = self._since / (time.perf_counter() - self._started)
        self._started, self._since = time.perf_counter(), 0
        matched = {} if self._matching is None else {"distance_to_real": round(self._matching.distance(), 6)}
        self.run.log(
            iteration=self.iteration,
            train_loss=count.loss,
            **matched,
            skipped_steps=count.skipped,
            images_per_second=round(rate, 1),
            time=round(time.time(), 1),
        )
        self._last_loss = count.loss
        if count.loss is not None:
            self._bar.set_postfix_str(f"loss {count.loss:.4f}, {rate:.0f} images/s")

    def _save(self) -> None:
        """A checkpoint of the averaged weights, the state to go on from, and a grid of samples."""
        network = build(self.network.config).to(self.device)
        network.load_state_dict(self.ema.weights)
        network.eval()
        distance, by_features = self._validate(network)
        judged = finite(distance if by_features is None else by_features, self.iteration)
        numbers = {"validation_loss": distance, "validation_features": by_features}
        if self._matching is not None:
            to_real = self._show(network, self._matching.anew()).distance()
            numbers["validation_real"] = judged = finite(to_real, self.iteration)
        self.run.log(iteration=self.iteration, **numbers)
        is_best = judged < self.best
        self.best = min(self.best, judged)
        self.run.save(self.iteration, self.ema.weights, self._checkpoint_config(distance), self.state_dict(), is_best)
        schedule, classes = self.lesson.schedule, network.config.num_classes
        labels = None if classes is None else range(min(NUM_PREVIEW, classes))
        frames = sequence(network, schedule, labels or range(NUM_PREVIEW), labels)
        self.run.save_pictures(self.iteration, sample_grid(network, schedule), frames)
        self._started, self._since = time.perf_counter(), 0

    @torch.no_grad()
    def _validate(self, network: AnyUNet) -> tuple[float, float | None]:
        """How far the student's images are from the teacher's, of the same noise: by pixels, and by judges."""
        held, parts = self._held_out, []
        for part in torch.arange(HELD_OUT).split(AT_ONCE):
            y = None if held.y is None else held.y[part]
            *_, (_, x) = walk(network, self.lesson.schedule, held.x_T[part], y, bf16=False, detached=False)
            parts.append(x)
        x, target, judges = torch.cat(parts), held.targets[:, -1], self.lesson.judges
        distance = float((x - target).abs().mean())
        return distance, float(feature_distance(judges, x, target, False).mean()) if judges else None

    def _checkpoint_config(self, distance: float) -> CheckpointConfig:
        config, source = self.config, self.teacher
        made = student_config(config, source, self.params, self.lesson.schedule, self.ema.weights)
        return replace(
            made,
            provenance={
                "teacher": {"name": source.name, "sha256": source.sha256},
                "dataset": source.config.provenance.get("dataset"),
                "iterations": self.iteration,
                "images_seen": self.images_seen,
                "metrics": {"train_loss": self._last_loss, "distance_to_teacher": distance},
                "command": config.command(),
                "seed": config.seed,
                "git_revision": self._revision,
                "machine": machine(self.device, ALONE),
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """Without classes of ours, so that it is loaded without executing code."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tally": self.meter.numbers,
            "timesteps": self._timesteps,
            "taught_by": self._taught_by,
            "iteration": self.iteration,
            "images_seen": self.images_seen,
            "best": self.best,
            "matching": self._matching and self._matching.state_dict(),
            "real_images": self._matching and self._matching.fingerprint,
        }

    def _load(self, state: dict[str, Any]) -> None:
        try:
            self._load_weights(state)
        except (RuntimeError, LookupError) as error:
            if is_out_of_memory(error):
                raise
            raise ValueError(f"the state of {self.run.path} is of another network than the teacher's") from error
        if self._matching is not None:
            try:
                self._matching.load_state_dict(state["matching"])
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"the state of {self.run.path} compares no real images as now: begin anew") from error

    def _load_weights(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        load_state(self.optimizer, state["optimizer"])
        self.meter.numbers = state["tally"].to(self.meter.numbers)
        self._timesteps = list(state["timesteps"])
        self.iteration, self.images_seen, self.best = state["iteration"], state["images_seen"], state["best"]


def taught_by(teacher: Checkpoint, params: SamplingParams, judges: tuple[Classifier, ...]) -> list[str]:
    """What a student's losses are of: digests of the teacher's weights, of its schedule, and of the judges' weights."""
    schedule = teacher.config.schedule(params).digest()
    digests = [weights_digest(teacher.network.state_dict()), schedule]
    return [*digests, *(weights_digest(judge.state_dict()) for judge in judges)]
