"""How far images of one runtime and precision are from those of torch in fp32: the table of docs/guides/reproduce.md.

    python -m tests.bench.tolerance [--images 100] [--checkpoint mnist]

The first images of seed 0, classes in turn, by the checkpoint's settings, in levels of 0 to 255. With OpenVINO where it
is installed. Not a test: pytest does not collect it.
"""

from __future__ import annotations

import argparse
import importlib.util

import torch
from torch import Tensor

from model import checkpoint
from model.backends.compile import compile_for_inference
from model.backends.openvino import compile_openvino
from model.checkpoint import Checkpoint
from model.diffusion import Network
from model.images import to_uint8
from model.sampling.step import sample

CPU = torch.device("cpu")
AT_ONCE = 8  # rows of a call


def images(loaded: Checkpoint, network: Network, count: int) -> Tensor:
    """int16 [count, C, H, W]."""
    unet, made = loaded.config.unet, []
    schedule = loaded.config.schedule(loaded.config.sampling)
    for indices in torch.arange(count).split(AT_ONCE):
        x = sample(
            network,
            schedule,
            unet.image_shape,
            seeds=[0] * len(indices),
            indices=indices.tolist(),
            classes=None if unet.num_classes is None else [int(i) % unet.num_classes for i in indices],
            null_class=unet.num_classes if unet.null_class else None,
        )
        made.append(to_uint8(x).short())
    return torch.cat(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--checkpoint", default="mnist")
    args = parser.parse_args()
    loaded = checkpoint.load(args.checkpoint)
    ways = {f"torch, {p}": compile_for_inference(loaded.network, CPU, p) for p in ("fp32", "bf16")}
    if importlib.util.find_spec("openvino"):
        threads = torch.get_num_threads()
        ways |= {f"openvino, {p}": compile_openvino(loaded.network, p, threads) for p in ("fp32", "bf16")}
    with torch.inference_mode():
        made = {name: images(loaded, network, args.images) for name, network in ways.items()}
    print(
        loaded.name,
        loaded.sha256,
        f"{args.images} images, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )
    print("| runtime, precision | most | mean | pixels within one level |\n|---|---|---|---|")
    for name, others in list(made.items())[1:]:
        levels = (others - made["torch, fp32"]).abs()
        within = (levels <= 1).float().mean()
        print(f"| {name} | {int(levels.max())} | {levels.float().mean():.2g} | {within:.2%} |")


if __name__ == "__main__":
    main()
