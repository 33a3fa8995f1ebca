"""python -m training.classifier: images of classes → a small residual network that tells them apart.

What comes out is the judge of `training.evaluate`, one safetensors file that is read without flags (`training.judge`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from model.images import from_uint8
from training import data, judge
from training.config import torch_device
from training.data import DataError, Images
from training.judge import Classifier, ClassifierConfig
from training.options import Parser, integers, one_of, written


def augmented(images: Tensor, shift: int, flip: bool) -> Tensor:
    """float [N, C, H, W], each moved by up to `shift` pixels (what enters is mirrored), and mirrored half the time."""
    n, _, h, w = images.shape
    device = images.device
    if shift:
        dy, dx = torch.randint(0, 2 * shift + 1, (2, n, 1), device=device)
        rows, columns = dy + torch.arange(h, device=device), dx + torch.arange(w, device=device)
        padded = F.pad(images, (shift,) * 4, mode="reflect")
        image = torch.arange(n, device=device)[:, None, None]
        images = padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(n, 1, 1, 1, device=device) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images


def accuracy(network: Classifier, images: Images) -> float:
    """The share of `images` whose class the network, in eval mode, names."""
    right = [network.judge(p.images)[1].argmax(1) == p.labels for p in parts(images, 500)]
    return float(torch.cat(right).float().mean())


def parts(images: Images, size: int) -> list[Images]:
    """The images in order, `size` at a time."""
    return [images.select(which) for which in torch.arange(len(images), device=images.images.device).split(size)]


def train(args: argparse.Namespace, training_set: Images, device: torch.device) -> Classifier:
    """SGD with Nesterov momentum and one cycle of the learning rate (Smith & Topin 2018), over whole batches.

    No label smoothing: it would draw each class together to a point, and features that have forgotten the differences
    within a class cannot tell whether samples have them.
    """
    assert training_set.labels is not None
    _, c, h, w = training_set.images.shape
    config = ClassifierConfig(c, (h, w), len(training_set.class_names), args.width, args.depth)
    torch.manual_seed(args.seed)
    network = Classifier(config).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    per_epoch = len(training_set) // args.batch_size
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.epochs * per_epoch, pct_start=0.2)
    order = torch.Generator().manual_seed(args.seed)
    with tqdm(total=args.epochs * per_epoch * args.batch_size, unit="image", dynamic_ncols=True, mininterval=1) as bar:
        for epoch in range(args.epochs):
            losses = []
            chosen = torch.randperm(len(training_set), generator=order).to(device)
            for which in chosen[: per_epoch * args.batch_size].split(args.batch_size):
                x = augmented(from_uint8(training_set.images[which]), args.shift, args.flip)
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    logits = network(x.contiguous(memory_format=torch.channels_last))
                loss = F.cross_entropy(logits.float(), training_set.labels[which])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                cycle.step()
                losses.append(loss.detach())
                bar.update(len(x))
            bar.set_postfix_str(f"epoch {epoch + 1}, loss {float(torch.stack(losses).mean()):.4f}")
    return network.eval()


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.classifier",
        description="Train a classifier on a data set's train split, and test it on the held-out one.",
    )
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME_OR_FOLDER", help="as for training.train, with classes")
    add("--out", required=True, metavar="FILE", help="where it goes, a .safetensors file")
    add("--image_size", type=integers, default=(), metavar="N,N", help="height,width, as for training.train")
    add("--epochs", type=int, default=10, metavar="N", help="passes over the train split (default: 10)")
    add("--batch_size", type=int, default=128, metavar="N", help="(default: 128)")
    add("--learning_rate", type=float, default=0.1, metavar="X", help="at the top of the cycle (default: 0.1)")
    add("--width", type=int, default=32, metavar="N", help="channels of the first stage (default: 32; photos: 64)")
    add("--depth", type=int, default=1, metavar="N", help="residual blocks per stage (default: 1; photos: 2)")
    add("--shift", type=int, default=2, metavar="N", help="move images at random by up to N pixels (default: 2)")
    add("--flip", action="store_true", help="mirror images at random (photos, not digits)")
    add("--precision", default="fp32", **one_of(("fp32", "bf16")), help="bf16 is autocast (default: fp32)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    args = parser.read(argv)
    for name in ("epochs", "batch_size", "width", "depth"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 < args.learning_rate < 10:
        parser.error(f"--learning_rate must be between 0 and 10, not {args.learning_rate}")
    if not 0 <= args.seed < 2**63:
        parser.error(f"--seed must be at least 0 and below 2^63, not {args.seed}")
    if args.image_size and (len(args.image_size) != 2 or min(args.image_size) < 1):
        parser.error(f"--image_size is height,width, such as 32,48, not {written(args.image_size)}")
    if not Path(args.out).expanduser().parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {Path(args.out).parent}")
    return args


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Trains, tests and saves; returns what is known of the result."""
    device, out = torch_device(args.device), Path(args.out).expanduser()
    training_set, test_set = data.load(args.dataset, args.image_size)
    if training_set.labels is None or test_set.labels is None:
        raise DataError(f"{args.dataset!r} does not tell the class of every image")
    if len(training_set) < args.batch_size:
        raise DataError(f"--batch_size {args.batch_size}, but only {len(training_set)} images to train on")
    if not 0 <= args.shift < min(training_set.images.shape[2:]):
        raise DataError(f"--shift must be at least 0 and less than the images' sides, not {args.shift}")
    started = time.perf_counter()
    network = train(args, training_set.to(device), device)
    provenance = {
        "accuracy": round(accuracy(network, test_set.to(device)), 6),
        "dataset": training_set.name,
        "train_images": len(training_set),
        "test_images": len(test_set),
        "seconds": round(time.perf_counter() - started, 1),
        "command": shlex.join(["python", "-m", "training.classifier", *argv]),
    }
    judge.save(out, network, training_set.class_names, provenance)
    return provenance | {"parameters": sum(p.numel() for p in network.parameters())}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        print(json.dumps(run(args, argv)))
    except (ValueError, OSError) as error:
        print(f"training.classifier: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("training.classifier: interrupted; nothing was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
