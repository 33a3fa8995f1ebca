"""python -m training.sample: weights → a folder of PNGs, {label}-{i}.png, balanced over the classes.

Image i of class k has the Philox index i·(number of classes) + k, so a name and a seed stand for one image: the same
in any batch, beside any others, as many as are asked for. The noise is equal to the bit; the network's sums are equal
to about 1e-6 in fp32 at different batch sizes, so a pixel may differ by one level where it was about to be rounded.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from model.atomic_write import atomic_write
from model.checkpoint import Checkpoint, CheckpointConfig
from model.images import to_uint8
from model.sampling.schedule import SamplingSchedule
from model.sampling.step import sample
from training.cli.command import add_known_options, check_choices
from training.cli.options import Parser, expanded
from training.cli.sampling_options import add_sampling_options, settings_of
from training.console import exit_code
from training.memory import memory_for
from training.run import load_weights
from training.run.config import torch_device
from training.run.image_io import save_gif, save_png, save_strip, sequence

WRITERS = 8  # files that wait for the disk at the same time

# The original's options of the network, which its sampling had to be told again
LEGACY_OPTIONS = (
    "image_size",
    "num_timesteps",
    "schedule",
    "schedule_low",
    "schedule_high",
    "loss_type",
    "use_labels",
    "base_channels",
    "channel_mults",
    "num_res_blocks",
    "time_emb_dim",
    "norm",
    "dropout",
    "activation",
    "attention_resolutions",
    "ema_decay",
    "ema_update_rate",
)

Item = tuple[str, int, int | None]
"""File name, Philox index, class."""


def items(config: CheckpointConfig, num_images: int, label: int | None = None) -> list[Item]:
    """What to make: `num_images` of one class, of all in turn, or of an unconditional network ({i}.png)."""
    classes = config.unet.num_classes
    if classes is None:
        return [(f"{i}.png", i, None) for i in range(num_images)]
    if label is not None:
        return [(f"{label}-{i}.png", i * classes + label, label) for i in range(num_images)]
    return [(f"{index % classes}-{index // classes}.png", index, index % classes) for index in range(num_images)]


def class_index(config: CheckpointConfig, label: str) -> int:
    """The class of this name or index; a name wins. Raises ValueError that lists the valid ones."""
    names = config.class_names
    if not names:
        raise ValueError("the checkpoint is unconditional: it takes no --class_label")
    if label in names:
        return names.index(label)
    if label.isdecimal() and int(label) < len(names):
        return int(label)
    valid = ", ".join(f"{i} ({name})" for i, name in enumerate(names[:20])) + (", …" if len(names) > 20 else "")
    raise ValueError(f"--class_label must be one of {valid}, not {label!r}")


def reserve_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder` that of images with these settings. Raises FileExistsError where it has other images."""
    record, text = folder / "sampling.json", json.dumps(settings, indent=2)
    if record.exists() and json.loads(record.read_text()) != json.loads(text):
        raise FileExistsError(f"{folder} has images with other settings (sampling.json): choose another --save_dir")
    if not record.exists() and any(folder.glob("*.png")):
        raise FileExistsError(f"{folder} has other images in it: choose another --save_dir")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(record) as part:
        part.write_text(text)


def write(
    source: Checkpoint, schedule: SamplingSchedule, todo: list[Item], folder: Path, seed: int, batch_size: int
) -> None:
    """Makes the images of `todo` that `folder` does not have yet."""
    missing = [item for item in todo if not (folder / item[0]).exists()]
    unet = source.config.unet
    progress = tqdm(total=len(todo), initial=len(todo) - len(missing), unit="image", dynamic_ncols=True)
    with progress as bar, ThreadPoolExecutor(WRITERS) as writers:
        for start in range(0, len(missing), batch_size):
            names, indices, classes = zip(*missing[start : start + batch_size], strict=True)
            x = sample(
                source.network,
                schedule,
                unet.image_shape,
                seeds=[seed] * len(indices),
                indices=indices,
                classes=None if unet.num_classes is None else classes,
                null_class=unet.num_classes if unet.null_class else None,
                device=next(source.network.parameters()).device,
            )
            images = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
            list(writers.map(save_png, [folder / name for name in names], images))
            bar.update(len(names))


def batch_size(config: CheckpointConfig) -> int:
    """How many images at once: 64 of 64 × 64, and the fewer the larger they are, so that memory stays bounded."""
    _, height, width = config.unet.image_shape
    return max(1, min(64, 64 * 64 * 64 // (height * width)))


def write_sequence(source: Checkpoint, schedule: SamplingSchedule, some: list[Item], folder: Path, seed: int) -> None:
    """How these images come to be: strip.png and animation.gif."""
    _, indices, classes = zip(*some, strict=True)
    labels = None if source.config.unet.num_classes is None else [k for k in classes if k is not None]
    frames = sequence(source.network, schedule, indices, labels, seed)
    folder.mkdir(exist_ok=True)
    save_strip(folder / "strip.png", frames)
    save_gif(folder / "animation.gif", frames)
    print(f"how {len(some)} of them come to be: strip.png and animation.gif in {folder}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.sample",
        description="Write images of a checkpoint, and their settings as sampling.json. What is there already is kept.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        "--model_path",
        required=True,
        metavar="WHAT",
        help="a bundled one by name, such as mnist, a file, the folder of a run, or the original's -model.pth",
    )
    add("--weights", **load_weights.weights_option("is in the folder of a run; raw is in a .pth too"))
    add("--save_dir", required=True, metavar="DIR", help="is made if need be")
    add("--num_images", type=int, default=10_000, metavar="N", help="in all (default: 10000)")
    add("--class_label", metavar="CLASS", help="name or index of the only class (default: all of them in turn)")
    add("--batch_size", type=int, metavar="N", help="images at once (default: 64 of up to 64 x 64, fewer if larger)")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    add_sampling_options(parser)
    add(
        "--sequence",
        type=int,
        nargs="?",
        const=8,
        metavar="N",
        help="also write how the first N images come to be (bare: 8): DIR/sequence/strip.png and animation.gif",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    add_known_options(parser, LEGACY_OPTIONS)
    args = parser.read(argv)
    try:
        _check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    check_choices(legacy_options(args))
    for name in ("num_images", "batch_size", "sequence"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 <= args.seed < 2**64:
        raise ValueError(f"--seed must be at least 0 and below 2^64, not {args.seed}")
    if len(legacy_options(args).get("ema_decay", (0.0,))) != 1:
        raise ValueError("--ema_decay chooses one of the averages: give one number")


def legacy_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of training that were given."""
    return {name: value for name, value in vars(args).items() if name in LEGACY_OPTIONS}


def run(args: argparse.Namespace) -> None:
    """Writes the images that the command line asks for. Raises ValueError or OSError."""
    source, which = load_weights.load(args.checkpoint, args.weights, legacy_options(args), torch_device(args.device))
    sampling, schedule = settings_of(source, args)
    label = None if args.class_label is None else class_index(source.config, args.class_label)
    folder = expanded(args.save_dir)
    settings = {"checkpoint": source.sha256, "weights": which, "seed": args.seed, **asdict(sampling)}
    reserve_folder(folder, settings | {"as_told": source.config.provenance.get("as_told", {})})
    todo = items(source.config, args.num_images, label)
    print(f"{source.name}, weights: {which}; {sampling.sampler} with {sampling.steps} steps", file=sys.stderr)
    write(source, schedule, todo, folder, args.seed, args.batch_size or batch_size(source.config))
    print(f"{args.num_images} images in {folder}")
    if args.sequence:
        write_sequence(source, schedule, todo[: args.sequence], folder / "sequence", args.seed)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def sample() -> None:
        with memory_for("these images", "give a smaller --batch_size"):
            run(args)

    return exit_code("training.sample", sample, "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
