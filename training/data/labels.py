"""The class of each picture as text: from a folder, a file's name or a table; and the order of the classes."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from training.cli.options import closest_match
from training.data.images import DataError

COLUMNS = {"label", "labels", "class", "classes", "class_label", "class_name", "category", "cls", "target"}
NUMBER = re.compile(r"-?\d+", re.ASCII)
WHOLE_FLOAT = re.compile(r"(-?\d+)\.0+", re.ASCII)
NUMBERED = re.compile(r"(.*?[^\s_.\-(#])[\s_.\-(#]*\d+\)?", re.ASCII | re.DOTALL)


class Unclear(Exception):
    """Where the class stands is not told, or in two ways; the message says what was found."""


def printable(text: str) -> str:
    r"""`text` with \xNN for each byte of a file's name that is not UTF-8."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def from_folder(name: str, place: str) -> str:
    """The class of a folder `name`, in Unicode's composed form. Raises DataError where it is not UTF-8."""
    if printable(name) != name:
        raise DataError(f"the name of the folder {printable(place)} is not UTF-8, so it cannot be a class: rename it")
    return unicodedata.normalize("NFC", name)


def from_filename(path: str, label_from: str) -> str | None:
    """The class that a file's name begins with, or None.

    "filename": what stands before its number, as in american_bulldog_100.jpg or cat.7.png. "prefix": what stands
    before the first underscore, as in improved-diffusion.
    """
    stem = PurePath(path).stem
    if label_from == "prefix":
        label = stem.partition("_")[0] if "_" in stem else ""
    else:
        match = NUMBERED.fullmatch(stem)
        label = match[1] if match else ""
    return unicodedata.normalize("NFC", label).strip() or None if printable(label) == label else None


def from_values(values: Iterable[Any], column: str) -> list[str | None]:
    """The classes that a column of a table tells: text, or whole numbers. Raises DataError on anything else."""
    labels = [_from_value(value, column) for value in values]
    told = {label for label in labels if label is not None}
    if told and all(WHOLE_FLOAT.fullmatch(label) for label in told):  # as pandas writes whole numbers beside gaps
        return [label and WHOLE_FLOAT.sub(r"\1", label) for label in labels]
    return labels


def _from_value(value: Any, column: str) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        value = str(value).lower()
    if not isinstance(value, (str, int)):
        raise DataError(f"the column {column!r} holds {value!r}: a class is text or a whole number")
    return unicodedata.normalize("NFC", str(value)).strip() or None


def column_of_labels(columns: Sequence[str], classes: Sequence[str], asked: str, table: str) -> str:
    """Which of the columns of `table` tells the class: the one `asked` for, or the only one that may.

    That is one of `classes`, whose type says so, or one with a name such as label. Raises DataError where there is no
    column `asked`, Unclear where there is none or more than one.
    """
    if asked:
        if asked in columns:
            return asked
        guess = closest_match(asked, columns)
        hint = f" (did you mean {guess}?)" if guess else ""
        raise DataError(f"{table} has no column {asked!r}{hint}, only {', '.join(columns)}")
    found = [column for column in columns if column in classes or column.casefold() in COLUMNS]
    if len(found) == 1:
        return found[0]
    if found:
        raise Unclear(f"{table} has the columns {' and '.join(found)}: choose one with --label_column")
    raise Unclear(f"{table} has no column called label or class, only {', '.join(columns)}: choose with --label_column")


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Each name once: whole numbers by their value, else in the order of the alphabet."""
    once = set(names)
    if once and all(NUMBER.fullmatch(name) for name in once):
        return tuple(sorted(once, key=lambda name: (int(name), name)))
    return tuple(sorted(once))
