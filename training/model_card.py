"""python -m training.model_card CHECKPOINT: writes the model card and a sample grid beside a checkpoint."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from model import checkpoint
from model.atomic_write import atomic_write
from model.checkpoint import Checkpoint, CheckpointConfig, CheckpointError
from model.sampling.fitted import FittedTable
from training.run.image_io import sample_grid, save_png

MOST_CLASSES = 20  # that are listed one by one

CARD = """# {name}

![samples: a row for each class]({name}.png)

{kind} DDPM for {size} images of `{dataset}`, {parameters:,} parameters{classes}.
The picture is not chosen: seed 0, image indices in order, {sampling}.

| | |
|---|---|
| file | `{name}.safetensors`, {bytes:,} bytes |
| SHA-256 | `{sha256}` |
| training steps | {iterations:,} ({images_seen:,} images seen) |
{compared}| trained on | {machine} |
{source}| seed | {seed} |
| sampled by default with | {sampling} |
| diffusion | {diffusion} |
| network | {unet} |

Trained by

    {command}
{notes}{evaluation}
The weights are {weights}.{memory} This card was written by
`python -m training.model_card {name}`.
"""


LOSS = "| training loss | {train_loss:.5f} (mean since the last line of the log) |\n"
TRAINED = "| validation loss | {validation_loss:.5f} (EMA weights, 1,024 held-out images, fixed noise) |\n"
NEARNESS = "| distance to its teacher | {distance_to_teacher:.5f} (pixels in [-1, 1], 64 images of the same noise) |\n"
TAUGHT = "| distilled from | `{name}`, SHA-256 `{sha256}`, by method {method} |\n"
ANCHORED = "| anchored | its own steps are a fitted table; other samplers, steps and guidance are as its teacher's |\n"
INSIDE = "| inside its weights | guidance_scale {guidance_scale:g}, at a row a step; other scales are refused |\n"
TABLES = """
Schedules were fitted to these weights, for `sampler: "fitted"`. Distances are to the teacher's images, from noise that
no fit has seen: before is dpmpp_2m with the best spacing and as many steps, all guided.

| steps | network rows | teacher | before | after |
|---|---|---|---|---|
"""

EVALUATION = """
How good its samples are, by

    {command}

in the features of a classifier ({extractor_accuracy:.2%} of the test images right, SHA-256 `{extractor}`):
{num_images:,} images, equally many of each class, sampled with {sampling}.
The Fréchet distance is to the train split, in this classifier's features: it is not an FID.
The distance, precision and recall compare {compared_images:,} samples, and as many held-out images.

| | generated | held out |
|---|---|---|
| classified as asked | {generated[accuracy]:.2%} | {test[accuracy]:.2%} |
| Fréchet distance | {generated[frechet_distance]:.4f} | {test[frechet_distance]:.4f} |
| precision, recall | {generated[precision]:.3f}, {generated[recall]:.3f} | {test[precision]:.3f}, {test[recall]:.3f} |
"""

BY_CLASS = """
Classified as asked, by class: {shares}.
"""

BITS = """
The variational bound is {bits_per_dim:.4f}{error} bits per dimension on {images:,} held-out images.
"""

NEIGHBOURS = """
Are training images copied? How far {images:,} samples are from the nearest of {train_images:,} training images,
beside as many held-out images: by pixels (root of the mean squared difference, in grey levels of 255), and by the
classifier's features.
"Nearer" is the share of samples that are nearer to a training image than the nearest 1 % of held-out images are.

| by | samples, median | held out, median | ratio | nearest sample | nearest held out | nearer |
|---|---|---|---|---|---|---|
"""

PICTURE = """
![each of the first samples, its nearest training images by pixels, and those by features]({name})
"""

COMPARISON = """
By sampler, steps and weights, each by the same command with the options of its row. "Held out" is the Fréchet distance
of as many held-out images, and × how many times that the samples' is.

| sampler | steps | guidance | weights | images | as asked | Fréchet distance | held out | × | precision | recall |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def tables_text(tables: Sequence[FittedTable]) -> str:
    """What the checkpoint's fitted tables are, Markdown; nothing where there are none."""
    fits = [table for table in tables if "command" in table.provenance]  # a student's own table was not fitted
    if not fits:
        return ""
    text = TABLES
    for table in fits:
        told = table.provenance
        before, after = (f"{told[name]:.4f}" if name in told else "–" for name in ("distance_before", "distance_after"))
        text += f"| {table.steps} | {table.nfe} | {told.get('teacher', '–')} | {before} | {after} |\n"
    commands = dict.fromkeys(str(table.provenance["command"]) for table in fits)
    return text + "\nFitted by\n\n" + "".join(f"    {command}\n" for command in commands)


def evaluation_text(results: list[dict[str, Any]], loaded: Checkpoint, picture: str | None = None) -> str:
    """What `training.evaluate` found, Markdown: the first result by itself, and a table of all where there are more.

    `picture` is the file name of its samples' neighbours.

    Raises ValueError where one is of another checkpoint, or not by the first one's classifier. All weights but the
    first average are in the state that the run saved at the checkpoint's iteration, a file of its own.
    """
    for result in results:
        if not _is_of(result, loaded):
            raise ValueError(f"an evaluation is of another checkpoint: {result['command']}")
        if "accuracy" not in result["generated"]:
            raise ValueError("the evaluation is not by a classifier, whose numbers the card shows")
        if result["features"]["sha256"] != results[0]["features"]["sha256"]:
            raise ValueError("the evaluations are by different classifiers")
    if (own := loaded.config.provenance.get("weights", "ema")) != (found := results[0]["sampling"]["weights"]):
        raise ValueError(f"the first evaluation is of the weights {found}, where the checkpoint has {own}")
    text = headline(results[0])
    if picture:
        text += PICTURE.format(name=picture)
    return text + COMPARISON + "".join(map(comparison_row, results)) if len(results) > 1 else text


def _is_of(result: dict[str, Any], loaded: Checkpoint) -> bool:
    found = result["checkpoint"]
    of_state = result["sampling"]["weights"] != "ema"
    return bool(
        found.get("sha256") == loaded.sha256
        or (of_state and found["name"] == f"state-{loaded.config.provenance['iterations']:07}")
    )


def comparison_row(result: dict[str, Any]) -> str:
    """One line of the table that compares samplers."""
    sampling, generated, test = result["sampling"], result["generated"], result["test"]
    words = [
        *(str(sampling[key]) for key in ("sampler", "steps", "guidance_scale", "weights")),
        f"{result['num_images']:,}",
        f"{generated['accuracy']:.2%}",
        *(f"{value:.4f}" for value in (generated["frechet_distance"], test["frechet_distance"])),
        f"{generated['frechet_distance'] / test['frechet_distance']:.1f}",
        *(f"{generated[key]:.3f}" for key in ("precision", "recall")),
    ]
    return f"| {' | '.join(words)} |\n"


def headline(result: dict[str, Any]) -> str:
    """One result at length."""
    sampling = result["sampling"]
    shown = ("sampler", "steps", "guidance_scale", "seed", "precision")
    extractor = {"extractor": result["features"]["sha256"], "extractor_accuracy": result["features"]["accuracy"]}
    text = ", ".join(f"{key} {sampling[key]}" for key in shown)
    shown = EVALUATION.format(**{**result, **extractor, "sampling": text})
    if 1 < len(classes := result["generated"].get("accuracy_by_class", {})) <= MOST_CLASSES:
        shown += BY_CLASS.format(shares=", ".join(f"{name} {share:.1%}" for name, share in classes.items()))
    if bound := result.get("bits_per_dim"):
        error = bound["standard_error"]
        shown += BITS.format(**bound, error="" if error is None else f" ± {error:.4f}")
    if found := result.get("neighbours"):
        shown += NEIGHBOURS.format(**found) + "".join(
            neighbours_row(name, found[name]) for name in ("pixels", "features")
        )
    return shown


def neighbours_row(name: str, found: dict[str, Any]) -> str:
    """One line of the table that says whether training images are copied."""
    own, theirs = found["generated"], found["held_out"]
    numbers = [own["median"], theirs["median"], found["ratio"], own["minimum"], theirs["minimum"]]
    words = ["–" if x is None else f"{x:.3g}" for x in numbers]
    return f"| {name} | {' | '.join(words)} | {found['nearer_than_1_percent']:.2%} |\n"


def card(loaded: Checkpoint, file: Path, evaluation: str = "") -> str:
    """The text of the card, Markdown."""
    config, provenance = loaded.config, loaded.config.provenance
    c, h, w = config.unet.image_shape
    fields = {**provenance, **provenance["metrics"]}
    return CARD.format(
        **{key: value for key, value in fields.items() if key not in ("metrics", "notes", "teacher", "weights")},
        compared=compared(config),
        source=f"| source | git {revision} |\n" if (revision := provenance.get("git_revision")) else "",
        weights=which_weights(provenance.get("weights", "ema")),
        name=file.stem,
        evaluation=tables_text(config.fitted) + evaluation,
        memory=""
        if "training images copied" in evaluation
        else " Whether training images are memorised was not tested.",
        notes="\n" + provenance.get("notes", "") + "\n",
        kind="A class-conditional" if config.class_names else "An unconditional",
        size=f"{h}×{w} {'grey' if c == 1 else 'colour'}",
        parameters=sum(p.numel() for p in loaded.network.parameters()),
        classes=f"; classes: {', '.join(config.class_names)}" if config.class_names else "",
        bytes=file.stat().st_size,
        sha256=loaded.sha256,
        sampling=", ".join(f"{key} {value}" for key, value in vars(config.sampling).items()),
        diffusion=", ".join(
            f"{k} {v}" for k, v in vars(config.diffusion).items() if k != "trained_betas" and v is not None
        ),
        unet=", ".join(f"{key} {value}" for key, value in vars(config.unet).items()),
    )


def compared(config: CheckpointConfig) -> str:
    """The lines of the card's table that say how far training came: what is known of these weights."""
    metrics, teacher, inside = config.provenance["metrics"], config.provenance.get("teacher"), config.distilled
    known = {"train_loss": LOSS, "validation_loss": TRAINED, "distance_to_teacher": NEARNESS}
    text = "".join(line.format(**metrics) for key, line in known.items() if metrics.get(key) is not None)
    if teacher is None:
        return text
    text += TAUGHT.format(**teacher, method=inside.method if inside else "end_to_end")
    return text + (INSIDE.format(guidance_scale=inside.guidance_scale) if inside else ANCHORED)


def which_weights(name: str) -> str:
    """Of the provenance's name of them: "ema", the first average; "raw"; or such as "ema power-0.1"."""
    if name == "raw":
        return "the last of the training, not an average"
    return f"the moving average{name.removeprefix('ema')} (EMA)"


def neighbours_picture(evaluation: Path, file: Path) -> str | None:
    """Copies what `training.evaluate --neighbours` drew, if it did, to beside the checkpoint. Its name there."""
    found = evaluation.with_name(f"{evaluation.stem}-neighbours.png")
    if not found.is_file():
        return None
    return shutil.copyfile(found, file.with_name(f"{file.stem}-neighbours.png")).name


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.model_card", description="Write a checkpoint's model card."
    )
    parser.add_argument("checkpoint", help="a bundled checkpoint's name, or the path of a .safetensors file")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="JSON", help="what training.evaluate wrote of it"
    )
    args = parser.parse_args(argv)
    try:
        file = checkpoint.find(args.checkpoint)
        loaded = checkpoint.load(file)
        results = [json.loads(path.read_text()) for path in args.evaluation]
        picture = neighbours_picture(args.evaluation[0], file) if results else None
        text = card(loaded, file, evaluation_text(results, loaded, picture) if results else "")
    except (CheckpointError, OSError, ValueError) as error:
        print(f"training.model_card: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"training.model_card: {args.checkpoint} was not made by training.train (no {error})", file=sys.stderr)
        return 2
    with atomic_write(file.with_suffix(".md")) as part:
        part.write_text(text, encoding="utf-8")
    save_png(file.with_suffix(".png"), sample_grid(loaded.network, loaded.config.schedule(loaded.config.sampling)))
    print(f"{file.with_suffix('.md')} and {file.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
