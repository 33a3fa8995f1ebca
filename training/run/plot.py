"""The losses of a run as a picture, drawn from its log."""

from __future__ import annotations

import io
import json
from pathlib import Path

from model.atomic_write import atomic_write


def save_plot(path: Path, log: Path) -> None:
    """PNG of the training loss and of the validation loss by quartile of t, over the iterations of a log.jsonl."""
    # Imported here: it takes longer than the rest of training.train
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log.read_text().splitlines()]
    trained = [(line["iteration"], line["train_loss"]) for line in lines if line.get("train_loss") is not None]
    validated = [line for line in lines if "validation_loss" in line]
    at = [line["iteration"] for line in validated]
    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    marker = "o" if max(len(trained), len(validated)) < 20 else None
    if trained:
        axes.plot(*zip(*trained, strict=True), color="0.6", linewidth=1, marker=marker, label="training")
    if validated:
        axes.plot(at, [v["validation_loss"] for v in validated], "k", marker=marker, label="validation (average)")
        names = ("first quarter of t (little noise)", "second", "third", "last (most noise)")
        by_quartile = all("validation_loss_by_t_quartile" in v for v in validated)  # a distilled student's is not
        for i, (name, colour) in enumerate(zip(names, ("C0", "C2", "C1", "C3"), strict=True) if by_quartile else ()):
            quartile = [v["validation_loss_by_t_quartile"][i] for v in validated]
            axes.plot(at, quartile, colour, linewidth=1, marker=marker, markersize=3, label=name)
    axes.set(xlabel="iteration", ylabel="loss", title=path.parent.name)
    if any(value > 0 for _, value in trained):
        axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    if trained or validated:
        axes.legend()
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out, metadata={"Software": None})
    with atomic_write(path) as part:
        part.write_bytes(out.getvalue())
