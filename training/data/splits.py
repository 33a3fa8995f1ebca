"""The parts of a data set that are not read yet, and which images are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from training.data.images import DataError
from training.data.picture import Encoded

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
HELD_OUT = ("validation", "test")  # the first that is there
EVERY = 20  # the share that is held out where no split is


@dataclass(frozen=True)
class Split:
    """`count` pictures that are not read yet.

    `read` gives them as files or contents, None where a row has none; `where` says which one is meant, in messages.
    `labels` has the class of each, None where it is not told, and `unclear` says why, if it is told of none.
    `class_names` is the order that the data set itself gives them, if it does; `stamp` changes when the pictures do.
    """

    count: int
    read: Callable[[Sequence[int]], list[Encoded | None]]
    where: Callable[[int], str]
    labels: Sequence[str | None]
    stamp: Callable[[], str]
    class_names: tuple[str, ...] = ()
    unclear: str = ""

    def select(self, which: Sequence[int]) -> Split:
        """These of its pictures."""
        return replace(
            self,
            count=len(which),
            read=lambda indices: self.read([which[i] for i in indices]),
            where=lambda i: self.where(which[i]),
            labels=[self.labels[i] for i in which],
            stamp=lambda: f"{self.stamp()} {list(which)}",
        )


def split_of(name: str) -> str | None:
    """train, validation or test, where a folder or a split of the hub is called so in whatever case."""
    return SPLITS.get(name.casefold())


def chosen(splits: dict[str, Split], name: str, say: Callable[[str], None]) -> tuple[Split, Split]:
    """(train, held out) of splits by name. Raises DataError where two have one meaning, or the images are too few."""
    meanings: dict[str, str] = {}
    for split in splits:
        if (meaning := split_of(split)) is None:
            continue
        if meaning in meanings:
            raise DataError(f"{name!r} has both {meanings[meaning]} and {split}: take one of them away")
        meanings[meaning] = split
    train = meanings.get("train") or next(iter(splits))
    held_out = next((meanings[m] for m in HELD_OUT if m in meanings and meanings[m] != train), None)
    others = [f"{s} ({splits[s].count:,} images)" for s in splits if s not in (train, held_out)]
    if others:
        say(f"not used: {', '.join(others)}")
    if not splits[train].count:
        raise DataError(f"{name!r} has no images to train on")
    if held_out is None:
        which = drawn(splits[train].labels)
        if not which:
            raise DataError(f"{name!r} has {splits[train].count} images; at least {EVERY} are needed")
        aside = set(which)
        return splits[train].select([i for i in range(splits[train].count) if i not in aside]), splits[train].select(
            which
        )
    if splits[train].class_names != splits[held_out].class_names:
        raise DataError(f"{name!r} has other classes in its {held_out} split than in {train}")
    if not splits[held_out].count:
        raise DataError(f"{name!r} has no images in its {held_out} split")
    return splits[train], splits[held_out]


def drawn(labels: Sequence[str | None]) -> list[int]:
    """Which images are held out: every 20th, with the classes one after the other, so that each gives its share.

    The only image of a class stays to be trained on. Fewer than 20 images give none.
    """
    total = len(labels)
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    sizes = Counter(labels)
    order = sorted((i for i in range(total) if sizes[labels[i]] > 1), key=lambda i: number[labels[i]])
    count = min(total // EVERY, len(order) // 2)
    step = min(EVERY, len(order) // count) if count else EVERY
    return sorted(order[step - 1 :: step][:count])
