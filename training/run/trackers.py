"""TensorBoard and Weights & Biases: what log.jsonl and the pictures of a run's folder have, elsewhere too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType

from model.atomic_write import atomic_write
from model.images import Image
from training.run.config import TrainConfig


class TensorBoard:
    """Event files in the run's folder `tensorboard`. What a crash left of later iterations is hidden."""

    def __init__(self, config: TrainConfig, iteration: int) -> None:
        writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writer = writer(str(config.run_dir / "tensorboard"), purge_step=iteration + 1 if iteration else None)

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers by name, at this iteration."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)

    def picture(self, iteration: int, name: str, picture: Image) -> None:
        """An image by name, at this iteration."""
        self._writer.add_image(name, picture, iteration, dataformats="HWC")

    def close(self) -> None:
        """Nothing comes after this: what is left is written."""
        self._writer.close()


class WandB:
    """A run in the project --project_name, of the account that the machine is logged in to; WANDB_MODE=offline works.

    A resumed run goes on under its id, which the run's folder keeps. The iteration is the axis, so that a run that goes
    back to its last checkpoint overwrites nothing.
    """

    def __init__(self, config: TrainConfig, iteration: int) -> None:
        self._wandb = _imported("wandb", "log_to_wandb")
        kept = config.run_dir / "wandb-id"
        try:
            self._run = self._wandb.init(
                project=config.project_name or None,
                name=config.run_name,
                id=kept.read_text() if kept.exists() else None,
                resume="allow",
                dir=str(config.run_dir),
                config=json.loads(config.to_json()),
            )
        except self._wandb.Error as error:
            raise OSError(f"--log_to_wandb: {error} (WANDB_MODE=offline needs no account)") from error
        with atomic_write(kept) as part:
            part.write_text(self._run.id)
        self._run.define_metric("*", step_metric="iteration")

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers by name, at this iteration."""
        self._run.log({"iteration": iteration, **values})

    def picture(self, iteration: int, name: str, picture: Image) -> None:
        """An image by name, at this iteration."""
        shown = picture.squeeze(2) if picture.shape[2] == 1 else picture
        self._run.log({"iteration": iteration, name: self._wandb.Image(shown)})

    def close(self) -> None:
        """Nothing comes after this: what is left is written."""
        self._run.finish()


class Trackers:
    """Those that the configuration asks for, together: none of them for None. `with` closes them.

    Raises ValueError where a package is missing, OSError where W&B refuses.
    """

    def __init__(self, config: TrainConfig | None, iteration: int) -> None:
        self._all: list[TensorBoard | WandB] = []
        if config and config.tensorboard:
            self._all.append(TensorBoard(config, iteration))
        if config and config.log_to_wandb:
            self._all.append(WandB(config, iteration))

    def scalars(self, iteration: int, values: Mapping[str, float]) -> None:
        """Numbers by name, at this iteration, to every tracker."""
        for tracker in self._all:
            tracker.scalars(iteration, values)

    def picture(self, iteration: int, name: str, picture: Image) -> None:
        """uint8 [H, W, C]."""
        for tracker in self._all:
            tracker.picture(iteration, name, picture)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._all:
            tracker.close()


def _imported(module: str, option: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f'--{option} needs a package that is not installed: pip install "ddpm-serve[track]"'
        ) from error
