"""metadata.csv, metadata.jsonl and metadata.parquet: tables that name pictures and tell their classes."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.data.images import DataError
from training.data.labels import printable

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMNS = ("file_name", "filename", "file", "path", "image")  # the first that a table has


@dataclass(frozen=True)
class Table:
    """`rows` by the picture's path below the data set's folder; `columns` without the one that names the picture."""

    path: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, Any]]


def key(path: str) -> str:
    """A path below the data set's folder as tables are asked for it: any slashes, any form of Unicode."""
    return unicodedata.normalize("NFC", posixpath.normpath(path.replace("\\", "/")))


def read(root: Path, path: str) -> Table:
    """The table at `path` below `root`. Raises DataError where it cannot be read."""
    shown = printable(path)
    try:
        rows = _rows(root / path)
    except UnicodeDecodeError as error:
        raise DataError(f"{shown} is not UTF-8: save it again as UTF-8") from error
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise DataError(f"{shown} cannot be read: {error}") from error
    columns = list(dict.fromkeys(column for row in rows for column in row))
    known = {column.casefold(): column for column in reversed(columns)}
    name = next((known[c] for c in FILE_COLUMNS if c in known), None)
    if name is None:
        found = f"only {', '.join(columns)}" if columns else "and no rows"
        raise DataError(f"{shown} has no column file_name, which says whose row it is, {found}")
    folder = os.path.dirname(path)
    named = {key(posixpath.join(folder, str(row[name]))): row for row in rows if row.get(name)}
    return Table(path, tuple(column for column in columns if column != name), named)


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet

        found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
        return found
    data = path.read_bytes()
    text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    if path.suffix.lower() == ".csv":
        head = text.partition("\n")[0]
        delimiter = max(",;\t", key=head.count)
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, restkey="", skipinitialspace=True)
        return [{name.strip(): value for name, value in row.items() if name} for row in table]
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not an object")
        rows.append(row)
    return rows
