"""Makes the picture of docs/guides/train.md: python -m docs.images_seen IMAGES=REPORT …

IMAGES is how many a network has seen, REPORT what training.evaluate wrote of it. Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib import pyplot

from docs.explanation.diffusion import save

MEASURES = {"frechet_distance": "Fréchet distance", "accuracy": "classified as asked", "recall": "recall"}


def main(points: list[str]) -> None:
    pairs = sorted((int(images), Path(report)) for images, _, report in (point.partition("=") for point in points))
    reports = [json.loads(path.read_text()) for _, path in pairs]
    millions = [images / 1e6 for images, _ in pairs]
    figure, all_axes = pyplot.subplots(1, len(MEASURES), figsize=(9, 2.6), layout="constrained")
    for axes, (key, name) in zip(all_axes, MEASURES.items(), strict=True):
        axes.plot(millions, [report["generated"][key] for report in reports], "k", marker="o", markersize=4)
        axes.set(title=name, xlabel="million images seen", ylim=(0, None))
        axes.grid(alpha=0.3)
    save("images-seen", figure)


if __name__ == "__main__":
    main(sys.argv[1:])
