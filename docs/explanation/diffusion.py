"""Makes the pictures and tables of docs/explanation/diffusion.md: python -m docs.explanation.diffusion [CHECKPOINT]

Everything comes from the package and from one checkpoint, a class-conditional one with a null class (default: mnist).
Needs matplotlib. Some minutes on two cores. The tables are written between their marks in the chapter.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from model import checkpoint
from model.checkpoint import SOLVER, Checkpoint
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.images import to_uint8
from model.nn.unet import UNetConfig
from model.sampling.noise import normals
from model.sampling.schedule import COEFFICIENTS, make_schedule
from model.sampling.solvers import SAMPLERS
from model.sampling.step import sample

HERE = Path(__file__).resolve().parent
CHAPTER, FOLDER = HERE / "diffusion.md", HERE.parent / "pictures"
SEED = 1
INK, PALE, WARM = "#1f3a5f", "#dbe7f3", "#d9822b"

CURVES = {
    "linear": DiffusionConfig(schedule="linear"),
    "cosine": DiffusionConfig(schedule="cosine"),
    "linear, zero terminal SNR": DiffusionConfig(schedule="linear", prediction="v", zero_terminal_snr=True),
}
PLANS = {"ddpm": 1.0, "dpmpp_2m": 1.5}  # sampler → guidance scale in the chapter's table
GUIDANCE = (1.0, 1.5, 3.0, 6.0)
STEPS = (5, 10, 20, 50)


# --- what the text says in numbers


def schedule_table(steps: int = 3) -> str:
    """The rows of two schedules over the cosine schedule for a network that predicts v, as a Markdown table.

    Columns that are the same in all rows are left out.
    """
    diffusion = GaussianDiffusion(DiffusionConfig(schedule="cosine", prediction="v"))
    schedules = {name: make_schedule(diffusion, name, steps, guidance_scale=g) for name, g in PLANS.items()}
    differ = np.ptp(np.concatenate([schedule.table for schedule in schedules.values()]), axis=0) > 0
    columns = [name for name, told in zip(COEFFICIENTS, differ, strict=True) if told]
    lines = ["| sampler | t | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, schedule in schedules.items():
        for timestep, row in zip(schedule.timesteps, schedule.table, strict=True):
            numbers = " | ".join(f"{number + 0.0:.4g}" for number in row[differ])
            lines.append(f"| `{name}` | {timestep} | {numbers} |")
    return "\n".join(lines)


def origin(source: Checkpoint) -> str:
    """Which checkpoint the pictures are of."""
    return f"They show the checkpoint `{source.name}`, SHA-256 `{source.sha256}`, seed {SEED}."


def marked(text: str, blocks: dict[str, str]) -> str:
    """`text` with each block between its marks, <!-- name --> and <!-- /name -->. Raises ValueError without them."""
    for name, block in blocks.items():
        pattern = rf"(?s)<!-- {name} -->\n.*?<!-- /{name} -->"
        if not re.search(pattern, text):
            raise ValueError(f"no place <!-- {name} --> in {CHAPTER.name}")
        replacement = f"<!-- {name} -->\n{block}\n<!-- /{name} -->"
        text = re.sub(pattern, lambda _, r=replacement: r, text)
    return text


# --- pictures


def save(name: str, figure: Figure, colours: int = 48) -> None:
    """docs/pictures/how-NAME.png, with a palette, which halves it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, bbox_inches="tight", facecolor="white")
    picture = Image.open(buffer).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    picture.save(FOLDER / f"how-{name}.png", optimize=True)


def pixels(images: Tensor) -> np.ndarray:
    """uint8 [N, H, W, 3] of images [N, C, H, W] in [-1, 1], one channel or three."""
    shown = to_uint8(images).permute(0, 2, 3, 1).numpy()
    return np.repeat(shown, 3, axis=3) if shown.shape[3] == 1 else shown[..., :3]


def mosaic(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [H', W', 3] of [N, H, W, 3], row by row."""
    n, h, w, c = images.shape
    return images.reshape(n // columns, columns, h, w, c).swapaxes(1, 2).reshape(n // columns * h, columns * w, c)


def panels(
    pictures: Sequence[Sequence[np.ndarray]], rows: Sequence[str], columns: Sequence[str], width: float
) -> Figure:
    """A figure of pictures in rows and columns, with their names at the left and on top."""
    h, w = pictures[0][0].shape[:2]
    size = width / len(pictures[0])
    figure = Figure(figsize=(width, size * h / w * len(pictures)))
    axes = figure.subplots(len(pictures), len(pictures[0]), squeeze=False)
    for i, line in enumerate(pictures):
        for j, picture in enumerate(line):
            axis = axes[i, j]
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if i == 0 and columns:
                axis.set_title(columns[j], fontsize=9, color=INK)
            if j == 0 and rows:
                axis.set_ylabel(rows[i], fontsize=9, color=INK, rotation=0, ha="right", va="center")
    figure.subplots_adjust(wspace=0.06, hspace=0.06 if not columns or len(columns) == 1 else 0.08)
    return figure


def make(source: Checkpoint, sampler: str, steps: int, classes: Sequence[int], g: float, on_step=None) -> Tensor:
    """One image of each class of `classes`, [N, C, H, W]; image i always has the noise of (SEED, i)."""
    schedule = make_schedule(source.diffusion, sampler, steps, guidance_scale=g)
    unet = source.config.unet
    indices = list(range(len(classes)))
    return sample(
        source.network,
        schedule,
        unet.image_shape,
        seeds=[SEED] * len(classes),
        indices=indices,
        classes=classes,
        null_class=unet.num_classes,
        on_step=on_step,
    )


def schedules() -> None:
    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2)
    for (name, config), colour in zip(CURVES.items(), (INK, WARM, "#7a9cc0"), strict=True):
        diffusion = GaussianDiffusion(config)
        left.plot(diffusion.alphas_cumprod, color=colour, label=name)
        right.plot(2 * diffusion.log_snr(), color=colour, label=name)
    left.set(xlabel="t", title=r"$\bar\alpha_t$, the share of the image's variance that is left")
    right.set(xlabel="t", title=r"$\log\,\mathrm{SNR}_t = \log\,\bar\alpha_t/(1-\bar\alpha_t)$", ylim=(-22, 12))
    for axis in (left, right):
        axis.title.set(fontsize=10, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=9)
    save("schedules", figure)


def forward(x0: Tensor) -> None:
    """One image x0 [1, C, H, W] and the same noise, at several t, under two schedules."""
    timesteps = (0, 100, 250, 400, 550, 700, 850, 999)
    noise = normals([SEED], [0], [1], tuple(x0.shape[1:]), "cpu")
    t, n = torch.tensor(timesteps), len(timesteps)
    rows = [
        list(pixels(GaussianDiffusion(CURVES[name]).q_sample(x0.expand(n, -1, -1, -1), t, noise)))
        for name in ("linear", "cosine")
    ]
    save("forward", panels(rows, ["linear", "cosine"], [f"t = {t}" for t in timesteps], 9), colours=32)


def denoising(source: Checkpoint, classes: Sequence[int], g: float) -> None:
    """x_t and the expected x_0 of one image on its way."""
    steps, shown = 50, (1, 10, 20, 25, 30, 35, 40, 50)
    frames: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(i: int, x: Tensor, x0: Tensor) -> None:
        if i in shown:
            frames[i] = (x.clone(), x0.clone())

    make(source, "ddpm", steps, classes, g, keep)
    rows = [list(pixels(torch.cat([frames[i][place] for i in shown]))) for place in (0, 1)]
    titles = [f"step {i}" for i in shown]
    save("denoising", panels(rows, [r"$x_t$", r"expected $x_0$"], titles, 9), colours=32)


def guidance(source: Checkpoint, classes: Sequence[int]) -> None:
    row = [mosaic(pixels(make(source, SOLVER, 20, classes, g)), 5) for g in GUIDANCE]
    save("guidance", panels([row], [], [f"g = {g:g}" for g in GUIDANCE], 9), colours=16)


def samplers(source: Checkpoint, classes: Sequence[int], g: float) -> None:
    rows = [[mosaic(pixels(make(source, name, steps, classes, g)), 5) for steps in STEPS] for name in SAMPLERS]
    save("samplers", panels(rows, list(SAMPLERS), [f"{steps} steps" for steps in STEPS], 9), colours=16)


def unet(config: UNetConfig) -> None:
    """The network of `config`: levels down on the left, up on the right, drawn as lower as they are smaller."""
    last = len(config.channel_mults) - 1
    figure = Figure(figsize=(9, 1.15 * last + 3.1))
    axis = figure.subplots()

    def box(x: float, y: float, text: str, colour: str = PALE, width: float = 2.9, height: float = 0.62) -> None:
        axis.add_patch(Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, edgecolor=INK))
        axis.text(x, y, text, ha="center", va="center", fontsize=8.5, color=INK)

    def arrow(start: tuple[float, float], end: tuple[float, float], text: str = "", style: str = "-") -> None:
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "linestyle": style})
        if text:
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.13)
            axis.text(*middle, text, ha="center", fontsize=8, color=INK)

    def blocks(count: int, level: int) -> str:
        attention = " + attention" if level in config.attention_levels else ""
        return f"{count} × (residual block{attention})"

    height, width = config.image_size
    multiple = 2**last
    rows, columns = height + -height % multiple, width + -width % multiple
    left, right, gap = 1.7, 8.3, 1.15
    for level, mult in enumerate(config.channel_mults):
        y, channels = -gap * level, config.base_channels * mult
        size = f"{rows >> level}×{columns >> level}, {channels} channels"
        inset = 0.25 * level
        box(left + inset, y, f"{blocks(config.num_res_blocks, level)}\n{size}")
        box(right - inset, y, f"{blocks(config.num_res_blocks + 1, level)}\n{size}")
        arrow((left + inset + 1.45, y), (right - inset - 1.45, y), "concatenated", "--")
        if level < last:
            arrow((left + inset, y - 0.31), (left + inset + 0.25, y - gap + 0.31))
            axis.text(left + inset - 0.05, y - gap / 2, "½", ha="right", va="center", fontsize=9, color=WARM)
            arrow((right - inset - 0.25, y - gap + 0.31), (right - inset, y - 0.31))
            axis.text(right - inset + 0.05, y - gap / 2, "×2", ha="left", va="center", fontsize=9, color=WARM)
    bottom = -gap * last - gap
    box(5, bottom, "residual block + attention,\nresidual block")
    arrow((left + 0.25 * last, bottom + gap - 0.31), (3.55, bottom))
    arrow((6.45, bottom), (right - 0.25 * last, bottom + gap - 0.31))
    begin = f"$x_t$: {config.image_channels}×{height}×{width}\n3×3 convolution"
    axis.text(left, 1.02, begin, ha="center", fontsize=8.5, color=INK)
    arrow((left, 0.95), (left, 0.31))
    end = "norm, activation, 3×3 convolution\nthe prediction, as large as $x_t$"
    axis.text(right, 1.02, end, ha="center", fontsize=8.5, color=INK)
    arrow((right, 0.31), (right, 0.95))
    lines = ["t → sines and cosines → MLP"]
    if config.num_classes is not None:
        lines.append("class → table" + (", added to t's" if config.class_conditioning == "embedding" else ""))
        lines += ["(and one more, added to t's)"] * (config.class_conditioning == "both")
    lines.append("scale and shift in every block" if config.scale_shift_norm else "a bias in every block")
    box(5, 1.1, "\n".join(lines), "#f7e3cd", 3.1, 0.85)
    axis.set(xlim=(0, 10), ylim=(bottom - 0.4, 1.65))
    axis.axis("off")
    save("unet", figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", nargs="?", default="mnist-teacher", help="a class-conditional one (default: mnist-teacher)"
    )
    source = checkpoint.load(parser.parse_args().checkpoint)
    count = source.config.unet.num_classes
    if count is None or not source.config.unet.null_class:
        parser.error("the pictures of guidance need a checkpoint with classes and a null class")
    g = source.config.sampling.guidance_scale
    some = [i % count for i in range(5)]

    schedules()
    unet(source.config.unet)
    forward(make(source, "dpmpp_2m", 20, some[3:4], g))
    denoising(source, some[3:4], g)
    guidance(source, some * 4)
    samplers(source, some, g)
    CHAPTER.write_text(marked(CHAPTER.read_text(), {"plans": schedule_table(), "origin": origin(source)}))

    sizes = {path.name: path.stat().st_size for path in sorted(FOLDER.glob("how-*.png"))}
    print("\n".join(f"{size:7} {name}" for name, size in sizes.items()), f"\n{sum(sizes.values()):7} in all")


if __name__ == "__main__":
    main()
