"""python -m training.evaluate: how good a checkpoint's samples are, in numbers, beside what real images get.

Images are sampled with the schedules of the service, the classes in turn, and compared with the train split in the
features of a classifier that knows the data set (`training.classifier`). The held-out images are compared in the same
way, as many of them: theirs are the numbers that a perfect network would have. None of them is an FID, which is a
distance in Inception's features: that name is kept for those (`training.evaluation.inception`), where its weights are
given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.atomic_write import atomic_write
from model.backends.compile import compile_for_inference
from model.checkpoint import Checkpoint
from model.diffusion import Network
from model.images import from_uint8, to_uint8
from model.sampling.schedule import SamplingSchedule
from model.sampling.step import sample
from training import data
from training.cli import command
from training.cli.options import Parser, choice_option, expanded
from training.cli.sampling_options import add_sampling_options, settings_of
from training.console import exit_code
from training.data import DataError, Images
from training.evaluation import feature_extractor, memorization, metrics
from training.evaluation.feature_extractor import FeatureExtractor
from training.evaluation.feature_files import FeatureFile
from training.evaluation.likelihood import bits_per_dim
from training.memory import memory_for
from training.run import load_weights
from training.run.config import torch_device
from training.run.git import git_revision


def draw(
    source: Checkpoint,
    network: Network,
    schedule: SamplingSchedule,
    first: int,
    device: torch.device,
    seed: int,
    n: int,
) -> Tensor:
    """The samples of indices `first`, `first` + 1, …: uint8 [n, C, H, W], as a client of the service gets them.

    Image i has Philox index i and, of K classes, class i mod K, as in training.sample.
    """
    unet, indices = source.config.unet, list(range(first, first + n))
    x = sample(
        network,
        schedule,
        unet.image_shape,
        seeds=[seed] * n,
        indices=indices,
        classes=None if unet.num_classes is None else [i % unet.num_classes for i in indices],
        null_class=unet.num_classes if unet.null_class else None,
        device=device,
    )
    return to_uint8(x)


def generate(draws: Callable[[int], Tensor], extractor: FeatureExtractor, rows: FeatureFile, num_images: int) -> None:
    """Extends `rows` (features and logits, one row per sample) to `num_images`, by whole batches `draws(first)`."""
    with tqdm(total=num_images, initial=rows.count, unit="image", dynamic_ncols=True, mininterval=1) as bar:
        while rows.count < num_images:
            images = draws(rows.count)
            rows.append(torch.cat(extractor.network.extract(images), dim=1))
            bar.update(len(images))


def bits(source: Checkpoint, network: Network, images: Images, num_images: int, batch_size: int) -> dict[str, Any]:
    """The variational bound on the first `num_images` of the held-out set's balanced draw, in bits per dimension."""
    num_classes, device = source.config.unet.num_classes, next(source.network.parameters()).device
    diffusion, parts = source.diffusion.to(device), []
    chosen = metrics.balanced(images, num_classes, num_images)
    for which in tqdm(chosen.split(batch_size), desc="bits per dimension"):
        some = images.select(which).to(device)
        y = None if num_classes is None else some.labels
        parts.append(bits_per_dim(diffusion, network, from_uint8(some.images), y, [0] * len(which), which.tolist()))
    total, prior, terms = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    error = float(total.std() / len(total) ** 0.5) if len(total) > 1 else None
    shares = {"prior": float(prior.mean()), "decoder": float(terms[:, 0].mean())}
    return {"bits_per_dim": float(total.mean()), "standard_error": error, "images": len(total), **shares}


def check(
    source: Checkpoint, extractor: FeatureExtractor, train_set: Images, test_set: Images, args: argparse.Namespace
) -> None:
    """Raises ValueError where these do not belong together."""
    unet = source.config.unet
    size, whose = (
        extractor.image_shape or unet.image_shape,
        "the classifier" if extractor.image_shape else "the checkpoint",
    )
    for what, shape in {"the checkpoint": unet.image_shape, args.dataset: tuple(train_set.images.shape[1:])}.items():
        if shape != size:
            raise DataError(f"{what} has images of (channels, height, width) {shape}, {whose} {size}")
    if unet.num_classes is not None:
        check_classes(source, extractor, train_set, test_set, args)
    classes = unet.num_classes or 1
    needed = max(metrics.NEIGHBOURS + 1, 2 * classes)
    found = len(metrics.balanced(test_set, unet.num_classes))
    if min(found, args.num_images) < needed:
        each = " equally many of each class" if classes > 1 else ""
        raise DataError(
            f"at least {needed} samples and {needed} held-out images are needed,{each}: --num_images is "
            f"{args.num_images}, and {args.dataset!r} has {found} (folders train and test choose which are held out)"
        )


def check_classes(
    source: Checkpoint, extractor: FeatureExtractor, train_set: Images, test_set: Images, args: argparse.Namespace
) -> None:
    """Raises ValueError where the three do not have the same classes."""
    unet = source.config.unet
    assert unet.num_classes is not None
    valid, whose = (
        extractor.class_names or source.config.class_names,
        "the classifier" if extractor.class_names else "the checkpoint",
    )
    for what, names in {"the checkpoint": source.config.class_names, args.dataset: train_set.class_names}.items():
        if names != valid:
            raise DataError(f"{what} has the classes {', '.join(names)}, {whose} {', '.join(valid)}")
    if args.num_images % unet.num_classes:
        raise ValueError(f"--num_images must be a multiple of {unet.num_classes}, the number of classes")


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Samples, measures, and writes the result. Returns it."""
    device, out = torch_device(args.device), expanded(args.out)
    source, weights = load_weights.load(args.checkpoint, args.weights, {}, device)
    if args.bits_images and source.config.diffusion.sigmas is not None:
        raise ValueError("--bits_images: the checkpoint has EDM's levels of noise, which have no bound here")
    extractor = feature_extractor.load(args.features, device)
    settings, schedule = settings_of(source, args)
    train_set, test_set = (
        images.ordered_as(extractor.class_names or source.config.class_names)
        for images in data.load(
            args.dataset,
            (extractor.image_shape or source.config.unet.image_shape)[1:],
            command.load_options(vars(args)),
            use_labels=source.config.unet.num_classes is not None,
            cache=data.beside(out),
        )
    )
    check(source, extractor, train_set, test_set, args)
    how = asdict(settings) | {
        "weights": weights,
        "seed": args.seed,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plan": schedule.digest(),
    }
    key = {"checkpoint": source.sha256, "features": extractor.sha256, **how}
    network = compile_for_inference(source.network, device, args.precision)

    def draws(first: int) -> Tensor:
        return draw(source, network, schedule, first, device, args.seed, args.batch_size)

    rows = FeatureFile(out, key, extractor.size + len(extractor.class_names), args.batch_size)
    before, started = min(rows.count, args.num_images), time.perf_counter()
    generate(draws, extractor, rows, args.num_images)
    sampled = time.perf_counter()
    measured = metrics.measure(
        extractor, train_set, test_set, rows.read()[: args.num_images], source.config.unet.num_classes
    )
    if args.neighbours:
        firsts = tqdm(range(0, args.neighbours, args.batch_size), desc="for neighbours", unit_scale=args.batch_size)
        images = torch.cat([draws(first).cpu() for first in firsts])[: args.neighbours]
        picture = out.with_name(f"{out.stem}-neighbours.png")
        k = source.config.unet.num_classes
        measured["neighbours"] = memorization.compare(extractor, train_set, test_set, images, k, picture)
    if args.bits_images:
        measured["bits_per_dim"] = bits(source, network, test_set, args.bits_images, args.batch_size)
    result = {
        "command": shlex.join(["python", "-m", "training.evaluate", *argv]),
        "git_revision": git_revision(),
        "checkpoint": {"name": source.name, "sha256": source.sha256},
        "features": extractor.provenance | {"name": extractor.name, "sha256": extractor.sha256, "size": extractor.size},
        "dataset": train_set.name,
        "num_images": args.num_images,
        "class_balanced": source.config.unet.num_classes is not None,
        "sampling": how,
        **measured,
        "time": {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "images_sampled": args.num_images - before,
            "sampling_seconds": round(sampled - started, 1),
            "comparing_seconds": round(time.perf_counter() - sampled, 1),
        },
    }
    with atomic_write(out) as part:
        part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.evaluate",
        description="Measure a checkpoint's samples against a data set. A killed evaluation goes on by its command.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="WHAT",
        help="a bundled one by name, such as mnist, a file, the folder of a run, or the original's -model.pth",
    )
    add(
        "--features",
        required=True,
        metavar="FILE",
        help="what to compare by: a classifier of training.classifier, or Inception's .pth",
    )
    add("--dataset", required=True, metavar="NAME_OR_FOLDER", help="what the checkpoint was trained on")
    add("--out", required=True, metavar="FILE", help="the result, JSON; features of the samples are kept beside it")
    add("--num_images", type=int, default=10_000, metavar="N", help="samples, all classes in turn (default: 10000)")
    add(
        "--neighbours",
        type=int,
        default=0,
        metavar="N",
        help="samples to find the train images nearest to (default: 0)",
    )
    add("--bits_images", type=int, default=0, metavar="N", help="held-out images for bits per dimension (default: 0)")
    add_sampling_options(parser)
    command.add_load_options(parser)
    add("--weights", **load_weights.weights_option("is in the folder of a run"))
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    add("--batch_size", type=int, default=32, metavar="N", help="images at once (default: 32; a GPU likes 500)")
    add(
        "--precision",
        default="fp32",
        **choice_option(("fp32", "bf16")),
        help="of the network's products (default: fp32)",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    args = parser.read(argv)
    if args.num_images <= metrics.NEIGHBOURS:
        parser.error(f"--num_images must be more than {metrics.NEIGHBOURS}, not {args.num_images}")
    for name in ("bits_images", "neighbours"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must not be negative, as {getattr(args, name)} is")
    if args.batch_size < 1:
        parser.error(f"--batch_size must be at least 1, not {args.batch_size}")
    if not 0 <= args.seed < 2**64:
        parser.error(f"--seed must be at least 0 and below 2^64, not {args.seed}")
    parser.check_place("out", args.out)
    return args


def table(result: dict[str, Any]) -> str:
    """The result in a few lines."""
    accuracy = result["features"].get("accuracy")
    lines = [
        f"in the features of {result['features']['name']}{'' if accuracy is None else f' (accuracy {accuracy:.2%})'},"
    ]
    lines.append(f"{result['compared_images']} images each: generated, held out")
    for name, value in result["generated"].items():
        if isinstance(value, float):
            lines.append(f"  {name.replace('_', ' '):28}{value:12.4g}{result['test'][name]:12.4g}")
    for space in ("pixels", "features") if "neighbours" in result else ():
        found = result["neighbours"][space]
        line = f"nearest train image, by {space}: {found['generated']['median']:.4g} away, of held-out images "
        lines.append(
            f"{line}{found['held_out']['median']:.4g}; nearer than their 1 %: {found['nearer_than_1_percent']:.2%}"
        )
    if bound := result.get("bits_per_dim"):
        lines.append(f"bits per dimension of {bound['images']} held-out images: {bound['bits_per_dim']:.4g}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)

    def evaluate() -> None:
        with memory_for("the evaluation", "give a smaller --batch_size"):
            print(table(run(args, argv)))

    return exit_code("training.evaluate", evaluate, "interrupted; the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
