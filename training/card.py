"""python -m training.card CHECKPOINT: writes the model card and a sample grid beside a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from model import checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from training.train import sample_grid

CARD = """# {name}

![samples: a row for each class]({name}.png)

{kind} DDPM for {size} images of `{dataset}`, {parameters:,} parameters{classes}.
The picture is not chosen: seed 0, image indices in order, {sampling}.

| | |
|---|---|
| file | `{name}.safetensors`, {bytes:,} bytes |
| SHA-256 | `{sha256}` |
| training steps | {iterations:,} ({images_seen:,} images seen) |
| training loss | {train_loss:.5f} (mean since the last line of the log) |
| validation loss | {validation_loss:.5f} (EMA weights, 1,024 held-out images, fixed noise) |
| trained on | {machine} |
| source | git {git_revision} |
| seed | {seed} |
| sampled by default with | {sampling} |
| diffusion | {diffusion} |
| network | {unet} |

Trained by

    {command}
{notes}
The weights are the moving average (EMA). Whether training images are memorised was not tested. This card was written
by `python -m training.card {name}`.
"""


def card(loaded: Checkpoint, file: Path) -> str:
    """The text of the card, Markdown."""
    config, provenance = loaded.config, loaded.config.provenance
    c, h, w = config.unet.image_shape
    fields = {**provenance, **provenance["metrics"]}
    return CARD.format(
        **{key: value for key, value in fields.items() if key not in ("metrics", "notes")},
        name=file.stem,
        notes="\n" + provenance.get("notes", "") + "\n",
        kind="A class-conditional" if config.class_names else "An unconditional",
        size=f"{h}×{w} {'grey' if c == 1 else 'colour'}",
        parameters=sum(p.numel() for p in loaded.network.parameters()),
        classes=f"; classes: {', '.join(config.class_names)}" if config.class_names else "",
        bytes=file.stat().st_size,
        sha256=loaded.sha256,
        sampling=", ".join(f"{key} {value}" for key, value in vars(config.sampling).items()),
        diffusion=", ".join(f"{key} {value}" for key, value in vars(config.diffusion).items()),
        unet=", ".join(f"{key} {value}" for key, value in vars(config.unet).items()),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.card", description="Write a checkpoint's model card.")
    parser.add_argument("checkpoint", help="a bundled checkpoint's name, or the path of a .safetensors file")
    args = parser.parse_args(argv)
    try:
        file = checkpoint.find(args.checkpoint)
        loaded = checkpoint.load(file)
        text = card(loaded, file)
    except CheckpointError as error:
        print(f"training.card: {error}", file=sys.stderr)
        return 2
    except KeyError as error:
        print(f"training.card: {args.checkpoint} was not made by training.train: no {error} in it", file=sys.stderr)
        return 2
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    picture = sample_grid(loaded.network, loaded.diffusion, loaded.config.sampling)
    Image.fromarray(picture.squeeze()).save(file.with_suffix(".png"))
    print(f"{file.with_suffix('.md')} and {file.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
