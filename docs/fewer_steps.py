"""Makes the picture of docs/guides/fewer-steps.md: python -m docs.fewer_steps [CHECKPOINT] [DISTILLED …]

One digit of each class by number of steps: by dpmpp_2m, by the checkpoint's fitted tables, and by distilled students;
by default of the bundled ones. The same noise everywhere, and below each its network rows an image. Needs matplotlib.
"""

from __future__ import annotations

import sys

import numpy as np

from docs.explanation.diffusion import FOLDER, SEED, mosaic, panels, pixels, save
from model import checkpoint
from model.checkpoint import SOLVER, Checkpoint
from model.sampling.schedule import FITTED, InvalidSamplingParams
from model.sampling.step import sample

STEPS = (1, 2, 4, 5, 6, 8, 20)
COLUMNS = 5
NAMES = {SOLVER: SOLVER, "fitted": FITTED}


def panel(source: Checkpoint, sampler: str, steps: int) -> tuple[np.ndarray | None, str]:
    """The images and what one costs; None where the checkpoint has no such table."""
    try:
        schedule = source.config.schedule(source.config.sampling_params(sampler=sampler, steps=steps))
    except InvalidSamplingParams:
        return None, ""
    unet = source.config.unet
    classes = list(range(unet.num_classes or 2 * COLUMNS))[: 2 * COLUMNS]
    x = sample(
        source.network,
        schedule,
        unet.image_shape,
        [SEED] * len(classes),
        range(len(classes)),
        None if unet.num_classes is None else classes,
        null_class=unet.num_classes if unet.null_class else None,
    )
    return mosaic(pixels(x), COLUMNS), f"{int(schedule.nfe.sum())} rows"


def main(argv: list[str]) -> None:
    argv = argv or ["mnist-teacher", "mnist", "mnist-fast"]
    source = checkpoint.load(argv[0])
    made = {name: [panel(source, sampler, steps) for steps in STEPS] for name, sampler in NAMES.items()}
    for student in map(checkpoint.load, argv[1:]):
        own = [panel(student, FITTED, steps) for steps in STEPS]
        others = made.get("distilled", own)
        made["distilled"] = [mine if mine[0] is not None else other for mine, other in zip(own, others, strict=True)]
    white = np.full_like(made[SOLVER][0][0], 255)
    pictures = [[white if image is None else image for image, _ in row] for row in made.values()]
    figure = panels(pictures, list(made), ["1 step", *(f"{steps} steps" for steps in STEPS[1:])], 9)
    figure.subplots_adjust(hspace=0.5)
    for axis, (_, cost) in zip(figure.axes, [entry for row in made.values() for entry in row], strict=True):
        axis.text(0.5, -0.02, cost, ha="center", va="top", fontsize=7, transform=axis.transAxes)
    save("fewer-steps", figure, colours=16)
    print(FOLDER / "how-fewer-steps.png")


if __name__ == "__main__":
    main(sys.argv[1:])
