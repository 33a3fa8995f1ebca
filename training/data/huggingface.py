"""What the `datasets` library reads: folders of parquet files or archives, and names on the Hugging Face hub."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.data.images import DataError
from training.data.labels import Unclear, column_of_labels, from_values, printable
from training.data.options import LoadOptions
from training.data.picture import Encoded
from training.data.splits import Split

DATASET_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
TIMEOUT_S = 10.0  # for the hub's first answer
PICTURE_NAMES = ("image", "img", "png", "jpg", "jpeg", "webp", "picture")

Say = Callable[[str], None]


def hugging_face(dataset: str, path: Path, options: LoadOptions, say: Say) -> dict[str, Split]:
    """The splits of a folder with parquet files and the like, or of a name on the hub."""
    if path.is_file():
        raise DataError(f"{dataset!r} is a file; a data set is a folder, or a name on the Hugging Face hub")
    if not path.exists() and not DATASET_NAME.fullmatch(dataset):
        raise DataError(f"there is no folder {dataset!r}{_near(path)}")
    is_folder = path.exists()
    is_offline = not is_folder and not _reach(dataset, path)
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the outcome is reported below
    try:
        with _offline(is_offline):
            found = datasets.load_dataset(str(path) if is_folder else dataset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        why = " ".join(str(told).split())
        if not is_folder:
            why = f"there is no such folder{_near(path)}, and the Hugging Face hub does not give it: {why}"
        raise DataError(f"cannot read the data set {dataset!r}: {why}") from error
    return {str(name): _Columns(split, str(name), dataset, options, say).split() for name, split in found.items()}


def _near(path: Path) -> str:
    """A folder that was perhaps meant."""
    try:
        names = [folder.name for folder in path.parent.iterdir() if folder.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {printable(str(path.parent / close[0]))}?)" if close else ""


def _reach(dataset: str, path: Path) -> bool:
    """Asks the hub once whether it has the data set, and whether it can be reached: `datasets` takes half a minute.

    Raises DataError where it has none of that name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(dataset, timeout=TIMEOUT_S)
    except GatedRepoError:
        return True  # `datasets` says what to do
    except RepositoryNotFoundError as error:
        raise DataError(
            f"cannot read the data set {dataset!r}: there is no such folder{_near(path)}, and no such data set on the "
            f"Hugging Face hub, unless it is private and you are not logged in (hf auth login)"
        ) from error
    except HfHubHTTPError:
        return True
    except Exception:  # of whatever library carries its requests
        return False
    return True


@contextmanager
def _offline(is_offline: bool) -> Iterator[None]:
    """Within it only what was once fetched is looked for."""
    import datasets
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if is_offline:
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before


class _Columns:
    """The columns of one split of a `datasets.Dataset`: that of the pictures, and that of their classes."""

    def __init__(self, split: Any, name: str, dataset: str, options: LoadOptions, say: Say) -> None:
        self._split, self._name, self._dataset, self._options, self._say = split, name, dataset, options, say
        self._table = f"{dataset!r}" if name == "train" else f"{dataset!r}, split {name},"

    def split(self) -> Split:
        """What can be read of it."""
        import datasets

        column = self._pictures()
        if isinstance(self._split.features[column], datasets.Image):
            rows = self._split.cast_column(column, datasets.Image(decode=False))
        else:
            rows = self._split
        rows, fingerprint = rows.select_columns([column]), self._split._fingerprint
        labels: Sequence[str | None] = [None] * len(rows)
        names: tuple[str, ...] = ()
        unclear = ""
        try:
            labels, names = self._labels(column)
        except Unclear as error:
            unclear = str(error)

        def read(which: Sequence[int]) -> list[Encoded | None]:
            return [_encoded(value) for value in rows[list(which)][column]]

        return Split(len(rows), read, self._where, labels, lambda: f"{fingerprint} {column}", names, unclear)

    def _where(self, i: int) -> str:
        return f"row {i} of the {self._name} split of {self._dataset!r}"

    def _pictures(self) -> str:
        """The column of pictures: its type says so, or its contents do."""
        features = self._split.features
        found = [column for column, feature in features.items() if _holds_pictures(feature)]
        if not found:
            raise DataError(f"{self._dataset!r} has no column of images, only {', '.join(features)}")
        chosen = next((column for name in PICTURE_NAMES for column in found if column.casefold() == name), found[0])
        if len(found) > 1:
            self._say(f"images are those of the column {chosen}, not of {', '.join(c for c in found if c != chosen)}")
        return chosen

    def _labels(self, pictures: str) -> tuple[Sequence[str | None], tuple[str, ...]]:
        """The class of each row, and the classes in their own order where the column's type has one."""
        import datasets

        features, asked = self._split.features, self._options.label_column
        if self._options.label_from != "auto":
            raise Unclear(f"--label_from {self._options.label_from} is for folders of images: use --label_column")
        columns = [column for column in features if column != pictures]
        classes = [column for column in columns if isinstance(features[column], datasets.ClassLabel)]
        column = column_of_labels(columns, classes, asked, self._table)
        values = self._split[column][:]
        if column in classes:
            names = tuple(features[column].names)
            return [names[i] if i is not None and i >= 0 else None for i in values], names  # -1: it is not told
        labels = from_values(values, column)
        told = {label for label in labels if label is not None}
        if not asked and len(told) > max(20, len(labels) // 2):
            raise Unclear(f"the column {column} of {self._table} has {len(told):,} values for {len(labels):,} rows")
        return labels, ()


def _holds_pictures(feature: Any) -> bool:
    """An image, or what other writers of parquet make of one: bytes, alone or beside a path."""
    import datasets

    if isinstance(feature, dict):
        return "bytes" in feature and _is_binary(feature["bytes"])
    return isinstance(feature, datasets.Image) or _is_binary(feature)


def _is_binary(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("binary", "large_binary", "binary_view")


def _encoded(value: Any) -> Encoded | None:
    """A file or its contents, of one cell."""
    if isinstance(value, dict):
        if value.get("bytes") is None:
            return Path(value["path"]) if value.get("path") else None
        value = value["bytes"]
    return bytes(value) if value is not None else None
