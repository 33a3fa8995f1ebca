"""python -m training.decay RUN NAME: a copy of a run at a saved state, where the learning rate begins to fall.

The copy ends with a good checkpoint; the run itself stays as it is, and can go on from before the decay.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from model.atomic_write import atomic_write, put_in_place
from training.cli.options import Parser
from training.console import exit_code
from training.run.config import TrainConfig
from training.run.run_dir import UNREADABLE, config_text, read_config, saved_states


def branch(run: Path, name: str, begin: int | None = None, share: float = 0.2) -> TrainConfig:
    """Makes the folder `name` beside `run`, with its state at iteration `begin` (None: the newest) and log until there.

    The learning rate falls from there on along a line, which is the last `share` of the copy's steps. Returns its
    configuration. Raises ValueError or OSError with a sentence where that cannot be.
    """
    try:
        saved, data = read_config(run)
    except OSError as error:
        raise ValueError(f"{run}: no run there ({error.strerror}: config.json)") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{run}: its config.json cannot be used: {error}") from error
    states = saved_states(run)
    chosen = max(states, default=None) if begin is None else begin
    found = ", ".join(map(str, states)) or "none"
    if chosen is None or chosen not in states:
        raise ValueError(f"{run} has no state of iteration {chosen}; it has: {found}")
    if saved.lr_schedule == "cosine":
        raise ValueError(f"{run} has --lr_schedule cosine: its learning rate has been falling from the start")
    falls = (1 - saved.decay_share) * saved.iterations
    if saved.lr_schedule == "wsd" and chosen > falls + 1e-6:  # what a product of floats may be off
        raise ValueError(
            f"{run}: the learning rate has been falling since iteration {falls:.0f}: choose a state before"
        )
    if chosen < saved.warmup:
        raise ValueError(f"{run}: the learning rate rises until iteration {saved.warmup}: choose a state after")
    if not 0 < share < 1 or math.ceil(chosen / (1 - share)) == chosen:
        raise ValueError(f"the share of the decay is above 0 and below 1, and a step at least, not {share}")
    folder = run.parent / name
    if Path(name).name != name or name == "..":
        raise ValueError(f"NAME is that of a folder beside {run}, not a path, as {name!r} is")
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: choose another name")
    config = replace(
        saved, lr_schedule="wsd", decay_share=share, iterations=math.ceil(chosen / (1 - share)), run_name=name
    )
    try:
        state = torch.load(states[chosen], weights_only=True, map_location="cpu")
        state |= {"best": math.inf}  # the best is to be one of the copy
    except UNREADABLE as error:
        raise ValueError(f"{states[chosen]} cannot be read: choose another --iteration of {found}") from error
    part = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=run.parent))
    try:
        with atomic_write(part / states[chosen].name) as file:
            torch.save(state, file)
        if (run / "log.jsonl").exists():
            shutil.copyfile(run / "log.jsonl", part / "log.jsonl")
        with atomic_write(part / "config.json") as file:
            file.write_text(config_text(config, data))
        part.chmod(run.stat().st_mode | 0o700)  # others may read the copy as they may the run
        put_in_place(part, folder)
    except RuntimeError as error:  # torch's for a full disk
        raise OSError(f"cannot write {folder} (is the disk full?): {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return config


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.decay",
        description="Copy a run with a constant learning rate, to end the copy with one that falls to 0.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a run of training.train; it stays as it is")
    add("name", metavar="NAME", help="of the new folder, beside it")
    add("--iteration", type=int, metavar="N", help="of the state to begin with (default: the newest)")
    add("--share", type=float, default=0.2, metavar="X", help="of all steps, over which it falls (default: 0.2)")
    return parser.read(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    run = Path(args.run).expanduser().resolve()

    def copy() -> None:
        config = branch(run, args.name, args.iteration, args.share)
        go_on = f"python -m training.train --resume {run.parent / args.name}"
        print(f"{config.iterations} steps in all; go on with: {go_on}")

    return exit_code("training.decay", copy, "interrupted")


if __name__ == "__main__":
    sys.exit(main())
