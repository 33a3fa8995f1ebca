"""ddpm-serve COMMAND …: each command is the module that it runs, so `python -m` does the same.

The folder that you are in is not searched for modules: a `model.py` or a folder `app` of your own stays yours.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from pathlib import Path

COMMANDS = {
    "serve": ("app", "serve checkpoints over HTTP"),
    "key": ("app.access", "make an API key"),
    "sign": ("app.sign", "sign an image's address, so that it needs no API key for a while"),
    "train": ("training.train", "train a network on images"),
    "decay": ("training.decay", "copy a run, to end the copy with a falling learning rate"),
    "distill": ("training.distill", "train a student of few steps, one network row each, from its teacher"),
    "sample": ("training.sample", "make a folder of images from a checkpoint"),
    "evaluate": ("training.evaluate", "measure how good a checkpoint's samples are"),
    "classifier": ("training.classifier", "train the network that `evaluate` compares images by"),
    "card": ("training.model_card", "write a checkpoint's model card"),
    "fit": ("training.fit_sampler", "learn schedules of few steps for a checkpoint"),
    "export-checkpoint": ("training.export_checkpoint", "make a checkpoint smaller, or change its sampling defaults"),
    "import": ("model.importers", "turn another project's weights into a checkpoint"),
    "export": ("model.exporters", "turn a checkpoint into a diffusers folder"),
}


def usage() -> str:
    """What `ddpm-serve --help` says."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: ddpm-serve COMMAND [options]; COMMAND --help says which", "", *lines])


def main() -> None:
    """Runs the module of a command with the arguments after it."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0 if words else 2)
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists the commands"
        sys.exit(f"ddpm-serve: there is no command {words[0]!r}; {hint}")
    here, ours = Path.cwd().resolve(), Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here or here == ours]
    sys.argv[1:] = words[1:]
    runpy.run_module(COMMANDS[words[0]][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
