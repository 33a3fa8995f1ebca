"""Words of a command line: switches, tuples, and errors that say what would have been right."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn


def boolean(text: str) -> bool:
    """yes/true/t/y/1 and no/false/f/n/0, as in the original's command line."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def integers(text: str) -> tuple[int, ...]:
    """ "1,2,2", "(1, 2, 2)", "(1,)"; "()" is none at all."""
    try:
        return tuple(int(word) for word in _parts(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,2,2, not {text!r}") from error


def numbers(text: str) -> tuple[float, ...]:
    """ "0.999,0.9999", written as `integers` are."""
    try:
        return tuple(float(word) for word in _parts(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0.999,0.9999, not {text!r}") from error


def pairs(text: str) -> dict[str, str]:
    """ "cat=kitty,dog=hound": what is on the left to what is on the right."""
    found = dict(part.split("=", 1) for part in text.split(",") if part.count("=") == 1)
    if len(found) != len(text.split(",")) or not all((*found, *found.values())):
        raise argparse.ArgumentTypeError(f"expected pairs such as OLD=NEW,OLD=NEW, not {text!r}")
    return found


def _parts(text: str) -> list[str]:
    inner = text.strip("()[], ")
    return inner.split(",") if inner else []


def expanded(path: str | Path, option: str = "path") -> Path:
    """A path with ~ as the home folder. Raises ValueError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"the home folder in {path} cannot be found: set the variable HOME, or give a {option} without ~"
        ) from error


def printable(text: str) -> str:
    r"""`text` with \udcNN for each byte of a file's name that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def format_value(value: Any) -> str:
    """A value as these functions read it."""
    return ",".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value)


def closest_match(word: str, valid: Collection[str]) -> str | None:
    """What was probably meant: the same but for spelling, or its initials ("lr"), or the only one that begins so."""
    plain = word.lower().replace("-", "_")
    if close := difflib.get_close_matches(plain, valid, n=1, cutoff=0.7):
        return close[0]
    initials = [name for name in valid if "".join(part[0] for part in name.split("_") if part) == plain]
    begun = [name for name in valid if name.startswith(plain)]
    close = difflib.get_close_matches(plain, valid, n=1)
    return (initials or (begun if len(begun) == 1 else []) or close or [None])[0]


def choice_option(valid: Collection[str]) -> dict[str, Any]:
    """Keywords of an option of argparse with these values; as its `choices`, but the error names the nearest."""

    def chosen(text: str) -> str:
        if text in valid:
            return text
        raise argparse.ArgumentTypeError(_not_one_of(text, valid))

    return {"type": chosen, "metavar": f"{{{','.join(valid)}}}"}


def check_choice(option: str, value: str, valid: Collection[str]) -> None:
    """Raises ValueError that lists the valid values, and the nearest, where `value` is none of them."""
    if value not in valid:
        raise ValueError(f"--{option} {_not_one_of(value, valid)}")


def _not_one_of(value: str, valid: Collection[str]) -> str:
    guess = closest_match(str(value), valid)
    hint = f"; did you mean {guess}?" if guess else ""
    return f"must be one of {', '.join(valid)}, not {value!r}{hint}"


class Parser(argparse.ArgumentParser):
    """An unknown option is refused with the nearest known one."""

    def __init__(self, prog: str, description: str, usage: str | None = None, epilog: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
            allow_abbrev=False,
        )

    def read(self, argv: list[str] | None) -> argparse.Namespace:
        """As `parse_args`."""
        namespace, unknown = self.parse_known_args(argv)
        if unknown:
            self._refuse(unknown)
        return namespace

    def check_place(self, option: str, path: str) -> None:
        """Ends the program with a sentence where there is no folder for the file that an option names."""
        try:
            if not expanded(path).parent.is_dir():
                self.error(f"--{option} {path}: there is no folder {Path(path).parent}")
        except ValueError as error:
            self.error(f"--{option}: {error}")

    def _refuse(self, unknown: list[str]) -> NoReturn:
        word = next((word for word in unknown if word.startswith("--")), None)
        if word is None:
            self.error(f'unexpected {" ".join(unknown)!r}; a list is one word, such as 1,2,2 or "(1, 2, 2)"')
        name = word[2:].partition("=")[0].replace("-", "_")
        valid = [option[2:] for option in self._option_string_actions if option.startswith("--")]
        guess = name if name in valid else closest_match(name, valid)
        hint = f"; did you mean --{guess}?" if guess else ""
        self.error(f"there is no option {word.partition('=')[0]}{hint} (--help lists all)")
