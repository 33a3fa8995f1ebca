"""python -m training.classifier: images of classes → a small network that tells them apart.

The result is the feature extractor of `training.evaluate`: one safetensors file, which
`training.evaluation.feature_extractor` reads without flags.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.atomic_write import atomic_write
from model.backends.compile import best_precision
from model.images import from_uint8
from model.nn.ema import EMA
from training import data
from training.classifier.network import Classifier, ClassifierConfig
from training.cli import command
from training.cli.options import Parser, choice_option, expanded, format_value, integers
from training.console import exit_code
from training.data import DataError, Images
from training.evaluation import feature_extractor
from training.memory import memory_for
from training.run.config import torch_device

WHITENING_IMAGES = 5000  # images whose patches make the stem
LOGIT_SCALE = 9  # the last layer's answers are divided by it, which slows it down beside the others
RECALIBRATION_IMAGES = 10_000  # images that the norms' statistics are of


def augmented(images: Tensor, shift: int, mirrored: Tensor) -> Tensor:
    """float [N, C, H, W], moved by up to `shift` pixels (what enters is a reflection), and turned if `mirrored` [N]."""
    n, _, h, w = images.shape
    device = images.device
    if shift:
        dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), device=device)
        rows, columns = dy + torch.arange(h, device=device), dx + torch.arange(w, device=device)
        padded = F.pad(images, (shift,) * 4, mode="reflect")
        image = torch.arange(n, device=device)[:, None, None]
        images = padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def accuracy(network: Classifier, images: Images) -> float:
    """The share of `images` whose class the network, in eval mode, names."""
    right = [network.extract(p.images)[1].argmax(1) == p.labels for p in parts(images, 500)]
    return float(torch.cat(right).float().mean())


def parts(images: Images, size: int) -> list[Images]:
    """The images in order, `size` at a time."""
    return [images.select(which) for which in torch.arange(len(images), device=images.images.device).split(size)]


def subsample(images: Tensor, count: int) -> Tensor:
    """At most `count` of them, from everywhere, since a folder is sorted by class, and in any order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[:count].to(images.device)]


class ClassifierState:
    """A network on its way, and what a killed training goes on with: one file, written after each pass."""

    def __init__(self, args: argparse.Namespace, training_set: Images, device: torch.device) -> None:
        _, c, h, w = training_set.images.shape
        torch.manual_seed(args.seed)
        config = ClassifierConfig(c, (h, w), len(training_set.class_names), args.width, args.depth)
        self.network = Classifier(config)
        self.network.whiten(subsample(training_set.images, WHITENING_IMAGES).cpu())
        self.network.to(device, memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.network, args)
        self.ema = EMA(self.network, 1 - 1 / max(2, args.epochs * (len(training_set) // args.batch_size) // 15))
        self.epoch = 0
        digest = hashlib.sha256(training_set.images.cpu().numpy())
        options = {k: v for k, v in vars(args).items() if k not in ("dataset", "out", "device")}
        self._key = json.dumps(options, sort_keys=True) + digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the file atomically."""
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        with atomic_write(path) as part:
            torch.save(state | {"ema": self.ema.state_dict(), "epoch": self.epoch, "key": self._key}, part)

    def load(self, path: Path) -> None:
        """Goes on from the file, if it is there and of the same command and images."""
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            return
        if state["key"] == self._key:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.load_state_dict(state["ema"])
            self.epoch = state["epoch"]


def make_optimizer(network: Classifier, args: argparse.Namespace) -> torch.optim.SGD:
    """SGD with Nesterov momentum. The stem stays as it is; norms do not scale but shift, up to 64 times as fast.

    That factor, and with its root the learning rate, falls with the batch: small ones are noisy.
    """
    network.stem.requires_grad_(False)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.requires_grad_(False)
    shifts = {id(norm.bias) for norm in norms}
    share = min(1.0, args.batch_size / 500)
    rate, decay, faster = args.learning_rate * share**0.5, 1.3e-3, 64 * share
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if id(p) not in shifts], "lr": rate, "weight_decay": decay},
        {"params": [norm.bias for norm in norms], "lr": faster * rate, "weight_decay": decay / faster},
    ]
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.SGD(groups, momentum=0.85, nesterov=True)


def lr_schedule(done: float) -> float:
    """The learning rate, of its peak, when a share `done` in [0, 1] of the steps is done: up from 0.2, down to 0.05."""
    return 0.2 + 0.8 * done / 0.25 if done < 0.25 else 1 - 0.95 * (done - 0.25) / 0.75


def train(args: argparse.Namespace, training_set: Images, device: torch.device, kept: Path) -> Classifier:
    """Jordan's recipe (2024) over whole batches: labels smoothed, one triangle of the learning rate, shifts and flips.

    An image is mirrored in every second pass. What is returned is the moving average of the weights, with the norms'
    statistics of clean images.
    """
    assert training_set.labels is not None
    now, n = ClassifierState(args, training_set, device), len(training_set)
    now.load(kept)
    network, per_epoch = now.network.train(), n // args.batch_size
    precision = best_precision(device) if args.precision == "auto" else args.precision
    turned = torch.rand(n, generator=torch.Generator().manual_seed(args.seed)).to(device) < 0.5
    total = args.epochs * per_epoch
    bar = tqdm(total=total * args.batch_size, initial=now.epoch * per_epoch * args.batch_size, unit="image")
    with bar:
        for epoch in range(now.epoch, args.epochs):
            torch.manual_seed(args.seed + 1 + epoch)
            losses = []
            chosen = torch.randperm(n).to(device)
            for i, which in enumerate(chosen[: per_epoch * args.batch_size].split(args.batch_size)):
                mirrored = turned[which] ^ bool(epoch % 2) if args.flip else torch.zeros_like(turned[which])
                x = augmented(from_uint8(training_set.images[which]), args.shift, mirrored)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    logits = network(x.contiguous(memory_format=torch.channels_last)) / LOGIT_SCALE
                loss = F.cross_entropy(logits.float(), training_set.labels[which], label_smoothing=args.label_smoothing)
                for group in now.optimizer.param_groups:
                    group["lr"] = group["peak"] * lr_schedule((epoch * per_epoch + i) / total)
                loss.backward()
                now.optimizer.step()
                now.optimizer.zero_grad()
                now.ema.update()
                losses.append(loss.detach())
                bar.update(len(x))
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {float(torch.stack(losses).mean()):.4f}")
            now.epoch = epoch + 1
            now.save(kept)
    network.load_state_dict(now.ema.weights)
    network.head.weight.data.div_(LOGIT_SCALE)
    recalibrate_batchnorm(network, subsample(training_set.images, RECALIBRATION_IMAGES))
    return network.eval()


@torch.no_grad()
def recalibrate_batchnorm(network: Classifier, images: Tensor) -> None:
    """Sets the norms' statistics to those of `images`, uint8: training saw them moved, by other weights."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over batches
    network.train()
    for part in images.chunk(-(-len(images) // 500)):
        network.extract(part)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.classifier",
        description="Train a classifier on a data set's train split, and test it on the held-out one.",
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME_OR_FOLDER", help="as for training.train, with classes")
    add("--out", required=True, metavar="FILE", help="where it goes, a .safetensors file")
    add("--image_size", type=integers, default=(), metavar="N,N", help="height,width, as for training.train")
    add("--epochs", type=int, default=15, metavar="N", help="passes over the train split (default: 15)")
    add("--batch_size", type=int, default=500, metavar="N", help="(default: 500)")
    add("--learning_rate", type=float, default=0.75, metavar="X", help="its peak, with 500 images (default: 0.75)")
    add("--label_smoothing", type=float, default=0.2, metavar="X", help="0 to 1 (default: 0.2)")
    add("--width", type=int, default=64, metavar="N", help="channels of the first of three groups (default: 64)")
    add("--depth", type=int, default=2, metavar="N", help="convolutions per group (default: 2)")
    add("--shift", type=int, default=2, metavar="N", help="move images at random by up to N pixels (default: 2)")
    add("--flip", action="store_true", help="mirror images at random (photos, not digits)")
    add(
        "--precision",
        default="auto",
        **choice_option(("auto", "fp32", "bf16")),
        help="auto: bf16 where it is fast (default)",
    )
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    command.add_load_options(parser)
    args = parser.read(argv)
    for name in ("epochs", "batch_size", "width", "depth"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.batch_size == 1:
        parser.error("--batch_size must be at least 2: the network's norms compare images with each other")
    if not 0 <= args.label_smoothing < 1:
        parser.error(f"--label_smoothing must be at least 0 and below 1, not {args.label_smoothing}")
    if not 0 < args.learning_rate < 10:
        parser.error(f"--learning_rate must be between 0 and 10, not {args.learning_rate}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2^63, not {args.seed}")
    if args.image_size and (len(args.image_size) != 2 or min(args.image_size) < 1):
        parser.error(f"--image_size is height,width, such as 32,48, not {format_value(args.image_size)}")
    parser.check_place("out", args.out)
    return args


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Trains, tests and saves; returns what is known of the result."""
    device, out = torch_device(args.device), expanded(args.out)
    training_set, test_set = data.load(
        args.dataset, args.image_size, command.load_options(vars(args)), use_labels=True, cache=data.beside(out)
    )
    if len(training_set) < args.batch_size:
        raise DataError(f"--batch_size {args.batch_size}, but only {len(training_set)} images to train on")
    if not 0 <= args.shift < min(training_set.images.shape[2:]):
        raise DataError(f"--shift must be at least 0 and less than the images' sides, not {args.shift}")
    started = time.perf_counter()
    kept = out.with_name(out.name + ".state")
    network = train(args, training_set.to(device), device, kept)
    provenance = {
        "accuracy": round(accuracy(network, test_set.to(device)), 6),
        "dataset": training_set.name,
        "train_images": len(training_set),
        "test_images": len(test_set),
        "seconds": round(time.perf_counter() - started, 1),
        "command": shlex.join(["python", "-m", "training.classifier", *argv]),
    }
    feature_extractor.save(out, network, training_set.class_names, provenance)
    kept.unlink()
    return provenance | {"parameters": sum(p.numel() for p in network.parameters())}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)

    def make() -> None:
        with memory_for("training a classifier", "give a smaller --image_size or --batch_size"):
            print(json.dumps(run(args, argv)))

    return exit_code("training.classifier", make, "interrupted; the same command goes on")
