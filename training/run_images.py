"""The images of a run: loaded, and those that it was trained on before if it goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training import data
from training.cli.options import printable
from training.data import Images
from training.data_record import DataChanges, DataRecord, check_text, find_dataset
from training.loop.distributed import DistributedContext
from training.memory import memory_for
from training.run.config import TrainConfig
from training.run.run_dir import read_config


@dataclass(frozen=True)
class RunImages:
    """What is trained on and what is held out, with the run's numbers for the classes, and a record of both."""

    train: Images
    held_out: Images
    record: DataRecord

    @classmethod
    def load(
        cls,
        config: TrainConfig,
        ranks: DistributedContext,
        saved: dict[str, Any] | None,
        changes: DataChanges,
        resume: bool,
    ) -> RunImages:
        """Reads them, on every process, and says what they are.

        Raises DataError where they cannot be used, or where a run that goes on (`resume`, from the state `saved`) was
        trained on others; ValueError where they do not fit into memory.
        """
        before = read_config(config.run_dir)[1] if resume else None
        place = find_dataset(config, before)
        with memory_for(f"the images of {config.dataset!r}", "give a smaller --image_size height,width"):
            train, held_out = data.load(
                place,
                config.image_size,
                config.load_options(),
                use_labels=config.use_labels,
                cache=config.run_dir.parent,
                quiet=not ranks.is_first,
            )
        if ranks.is_first:
            counts = f"{len(train)} images to train on, {len(held_out)} to validate"
            classes = ", ".join(train.class_names[:20]) or "none"
            print(printable(f"{train.name}: {counts}, {tuple(train.images.shape[1:])}, classes: {classes}"))
        if config.use_labels:
            check_text(train.class_names)
        if saved:  # what the weights were trained with
            before = DataRecord.from_dict(saved["data"]) if "data" in saved else before or DataRecord.of_best(config)
        if before:
            before = before.renamed(changes.renamed)
            train, held_out = before.in_order(train), before.in_order(held_out)
        record = DataRecord.of(config, place, train, held_out) if ranks.is_first else None
        record = ranks.broadcast(record)
        assert record is not None
        if before:
            before.check(record, changes)
        return cls(train, held_out, record)
