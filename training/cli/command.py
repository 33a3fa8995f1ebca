"""The command line of `training.train`: one option per field of TrainConfig."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Collection, Mapping
from dataclasses import Field, fields, replace
from typing import Any

from training.cli.options import (
    Parser,
    boolean,
    check_choice,
    choice_option,
    expanded,
    format_value,
    integers,
    numbers,
    pairs,
)
from training.cli.presets import PRESETS
from training.data.options import LoadOptions
from training.data_record import NOTHING, DataChanges
from training.run.config import FIXED, GROUPS, TrainConfig
from training.run.run_dir import read_config


def add_options(parser: Parser) -> None:
    """One option per field, under headlines."""
    headlines = {first: headline for headline, first in GROUPS.items()}
    group = parser.add_argument_group("options")
    for f in fields(TrainConfig):
        if f.name in headlines:
            group = parser.add_argument_group(headlines[f.name])
        text = f.metadata["help"].replace("%", "%%")
        if f.default not in ("", ()):
            text += f" (default: {format_value(f.default)})"
        group.add_argument(f"--{f.name}", **_settings(f), help=text)


def add_known_options(parser: Parser, names: Collection[str]) -> None:
    """Those of these names, to be compared with what a checkpoint knows."""
    group = parser.add_argument_group("as it was trained", "compared with the checkpoint, which knows them by itself")
    for f in fields(TrainConfig):
        if f.name in names:
            group.add_argument(f"--{f.name}", **_settings(f))


def add_load_options(parser: Parser) -> None:
    """Those of `training.train` that say how a data set is read, with their defaults, for other commands."""
    group = parser.add_argument_group("how the data set is read", "as for training.train")
    names = {f.name for f in fields(LoadOptions)}
    for f in fields(TrainConfig):
        if f.name in names:
            choices = choice_option(f.metadata["choices"]) if f.metadata["choices"] else {}
            text = f.metadata["help"] + (f" (default: {format_value(f.default)})" if f.default != "" else "")
            group.add_argument(f"--{f.name}", **_settings(f) | choices | {"default": f.default}, help=text)


def load_options(given: Mapping[str, Any]) -> LoadOptions:
    """What `add_load_options` read. Raises ValueError where it makes no sense."""
    return LoadOptions(**{f.name: given[f.name] for f in fields(LoadOptions)})


def check_choices(given: Mapping[str, Any]) -> None:
    """Raises ValueError where an option has a value that is not among its choices."""
    for f in fields(TrainConfig):
        if f.name in given and f.metadata["choices"]:
            check_choice(f.name, given[f.name], f.metadata["choices"])


def _settings(f: Field[Any]) -> dict[str, Any]:
    """Keywords of argparse. What is not given stays out of the namespace, so that a resumed run keeps its own."""
    types = {"bool": boolean, "tuple[int, ...]": integers, "tuple[float, ...]": numbers}
    types |= {"int": int, "float": float, "str": str}
    metavars = {"bool": "yes|no", "tuple[int, ...]": "N,N,..", "tuple[float, ...]": "X,X,.."}
    metavars |= {"int": "N", "float": "X", "str": "TEXT"}
    settings: dict[str, Any] = {"type": types[str(f.type)], "metavar": metavars[str(f.type)], "default": SUPPRESS}
    if f.metadata["choices"]:  # checked later, so that the error can name the nearest
        settings["metavar"] = f"{{{','.join(f.metadata['choices'])}}}"
    if isinstance(f.default, bool):
        settings |= {"nargs": "?", "const": True}
    return settings


def parse(argv: list[str] | None = None) -> tuple[TrainConfig, bool, DataChanges]:
    """The configuration of this run, whether it goes on from one that exists, and what of its data may differ."""
    parser = Parser(
        prog="python -m training.train",
        usage="%(prog)s --dataset NAME_OR_FOLDER [options]\n       %(prog)s --resume DIR [options]",
        description="Train a diffusion model on images.",
        epilog="presets:\n" + "\n".join(f"  {name:<15} {text}" for name, (text, _) in PRESETS.items()),
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder; options replace its own")
    parser.add_argument(
        "--rename_classes",
        metavar="OLD=NEW,..",
        type=pairs,
        help="with --resume: what classes are called now, where a folder's name has changed",
    )
    parser.add_argument(
        "--changed_data",
        action="store_true",
        help="with --resume: go on though the images are not those that the run was trained on",
    )
    parser.add_argument("--preset", metavar="NAME", help="options by name (below); options given besides override them")
    add_options(parser)
    given = vars(parser.read(argv))
    resume, preset = given.pop("resume"), given.pop("preset")
    changes = DataChanges(given.pop("rename_classes") or {}, given.pop("changed_data"))
    try:
        if "attention_at" in given and "attention_resolutions" in given:
            raise ValueError("--attention_at and --attention_resolutions say the same in two ways: give one of them")
        if resume and preset:
            raise ValueError("--preset is for a new run: with --resume the options are the run's own")
        if resume:
            return _resumed(resume, given), True, changes
        if changes != NOTHING:
            raise ValueError("--rename_classes and --changed_data are for a run that goes on: give --resume, too")
        return (_preset(preset, given) if preset else TrainConfig(**given)), False, changes
    except ValueError as error:
        parser.error(str(error))


def _preset(name: str, given: dict[str, Any]) -> TrainConfig:
    """The configuration of a preset, with the options `given` in place of its own."""
    check_choice("preset", name, PRESETS)
    options = dict(PRESETS[name][1])
    if given.keys() & {"attention_at", "attention_resolutions"}:  # two ways to say one thing
        options.pop("attention_at", None)
        options.pop("attention_resolutions", None)
    try:
        return TrainConfig(**options | given)
    except ValueError as error:
        words = " ".join(f"--{key} {format_value(value)}" for key, value in options.items() if key not in given)
        raise ValueError(f"{error} (--preset {name} says: {words})") from error


def _resumed(resume: str, given: dict[str, Any]) -> TrainConfig:
    """The configuration of the run in folder `resume`, with the options `given` in place of its own."""
    folder = expanded(resume).resolve()
    if given.keys() & {"log_dir", "project_name", "run_name"}:
        raise ValueError(
            "--resume names the run's folder, so --log_dir, --project_name and --run_name cannot be given with it"
        )
    try:
        saved, _ = read_config(folder)
    except OSError as error:
        raise ValueError(f"--resume {resume}: no run there ({error.strerror}: config.json)") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"--resume {resume}: its config.json cannot be used: {error}") from error
    above = folder.parent
    place = {"log_dir": above.parent, "project_name": above.name} if saved.project_name else {"log_dir": above}
    if given.get("lr_schedule", "wsd") != "wsd":  # or what the run had of wsd would contradict it
        given = {"decay_share": TrainConfig.decay_share} | given
    config = replace(saved, **given, **{k: str(v) for k, v in place.items()}, run_name=folder.name)
    for name in FIXED:
        if getattr(config, name) != getattr(saved, name):
            raise ValueError(f"--{name} cannot change on --resume: the run has {getattr(saved, name)}")
    return config
