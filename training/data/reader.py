"""Both parts of a data set as one array of pixels: decoded, or found where they were kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from training.data import memory, picture
from training.data.cache import PixelCache, Pixels
from training.data.decoding import in_parallel
from training.data.images import DataError
from training.data.options import LoadOptions
from training.data.picture import Encoded, Look
from training.data.splits import Split
from training.data.walk import counted

SHARE = 0.7  # of the free memory that images may take: a network needs some, too
SECONDS_PER_PICTURE, SECONDS_PER_PIXEL = 1e-4, 1e-8  # roughly, to decode one
KEEP_ABOVE_S = 2.0  # what takes longer is kept
LISTED = 1000  # broken images
DARK = 32  # the highest level of images that are hardly to be seen


@dataclass(frozen=True)
class Layout:
    """What all images become: [channels, height, width], where `white` is the level that a deep grey has at 255."""

    shape: tuple[int, int, int]
    white: int


class Reader:
    """The pictures of (train, held out), one after the other, by their place among all of them."""

    def __init__(
        self,
        parts: tuple[Split, Split],
        name: str,
        place: str,
        image_size: tuple[int, ...],
        options: LoadOptions,
        say: Callable[[str], None],
        quiet: bool,
    ) -> None:
        self._parts, self._name, self._place, self._size = parts, name, place, image_size
        self._options, self._say, self._quiet = options, say, quiet
        self._count = sum(part.count for part in parts)
        self._broken: dict[int, str] = {}

    def read(self, folder: Path | None) -> Pixels:
        """All that can be read, from the cache in `folder` if they are there. Raises DataError where they cannot be."""
        cache = self._cache(folder) if folder else None
        if cache and (found := cache.find()):
            return self._loaded(found)
        looks = self._looks()
        layout = self._layout(looks)
        size = self._count * int(np.prod(layout.shape))
        if size > SHARE * memory.free_addresses():
            raise DataError(
                f"{self._needs(layout)}, more than `ulimit -v` leaves for them: choose a smaller --image_size"
            )
        is_large = size > SHARE * memory.free_bytes()
        if is_large and not cache:
            raise DataError(
                f"{self._needs(layout)}, and {_gigabytes(memory.free_bytes())} are free: choose a smaller --image_size"
            )
        seconds = sum(SECONDS_PER_PICTURE + SECONDS_PER_PIXEL * look.height * look.width for look in looks.values())
        if not cache or (seconds < KEEP_ABOVE_S and not is_large):
            return self._decoded(layout, self._room(layout))
        with cache.only_one():
            if found := cache.find():
                return self._loaded(found)
            return self._kept(cache, layout, is_large)

    def _cache(self, folder: Path) -> PixelCache:
        request = {"place": self._place, "image_size": self._size, **asdict(self._options)}
        stamp = " ".join(part.stamp() for part in self._parts)
        return PixelCache(folder.expanduser(), self._name, request, stamp)

    def _kept(self, cache: PixelCache, layout: Layout, is_large: bool) -> Pixels:
        """Decodes into memory or, if they are too large for it, into the file that is mapped then."""
        try:
            array = cache.reserve((self._count, *layout.shape)) if is_large else None
        except OSError as error:
            why = error.strerror or str(error)
            raise DataError(f"{self._needs(layout)}, more than is free, and {cache.path}: {why.lower()}") from error
        if array is None:
            array = self._room(layout)
        else:
            self._say(f"{self._needs(layout)}, more than is free: they stay on the disk, in {cache.path}")
        try:
            pixels = self._decoded(layout, array)
        except BaseException:
            cache.discard()
            raise
        try:
            kept = cache.keep(pixels.array, pixels.left_out)
        except OSError as error:
            if is_large:
                raise DataError(f"cannot keep decoded images in {cache.path}: {error.strerror or error}") from error
            self._say(f"decoded images are not kept in {cache.path}: {error.strerror or error}")
            return pixels
        self._say(f"decoded images ({_gigabytes(kept.array.nbytes)}) are kept in {cache.path}; it may be deleted")
        return kept if is_large else pixels

    def _room(self, layout: Layout) -> np.ndarray[Any, Any]:
        try:
            return np.empty((self._count, *layout.shape), np.uint8)
        except MemoryError as error:
            raise DataError(
                f"{self._needs(layout)}, more than the system gives: choose a smaller --image_size"
            ) from error

    def _loaded(self, found: Pixels) -> Pixels:
        """In memory, if they fit."""
        if found.left_out:
            self._say(f"left out as before: {counted(len(found.left_out), 'broken image')}")
        if found.array.nbytes > SHARE * memory.free_bytes():
            self._say(f"the images ({_gigabytes(found.array.nbytes)}) do not fit into memory: mapped from {found.file}")
            return found
        return Pixels(np.array(found.array), found.left_out, found.file)

    def _needs(self, layout: Layout) -> str:
        channels, height, width = layout.shape
        size = _gigabytes(self._count * channels * height * width)
        colours = "colours" if channels == 3 else "grey"
        return f"{self._count:,} images of {height}×{width} in {colours} need {size}"

    def _looks(self) -> dict[int, Look]:
        """Of each picture that has a readable head, in order."""
        looks: dict[int, Look] = {}

        def work(places: Sequence[int]) -> None:
            for place, encoded in self._encoded(places):
                try:
                    looks[place] = picture.look(encoded)
                except Exception as error:
                    self._fail(place, encoded, error)

        in_parallel(work, self._count, f"looking at {self._name}", self._quiet)
        return dict(sorted(looks.items()))

    def _layout(self, looks: dict[int, Look]) -> Layout:
        """Raises DataError where no picture can be read, or sizes differ and none is chosen."""
        if not looks:
            self._refuse()
        of_train = [look for place, look in looks.items() if place < self._parts[0].count] or list(looks.values())
        sizes = Counter((look.height, look.width) for look in looks.values())
        height, width = self._size or (of_train[0].height, of_train[0].width)
        if not self._size and len(sizes) > 1:
            other = next(size for size in sizes if size != (height, width))
            raise DataError(
                f"the images of {self._name!r} differ in size ({width}×{height} and {other[1]}×{other[0]}): "
                "choose one with --image_size height,width"
            )
        is_grey = all(look.is_grey for look in of_train)
        if is_grey and (coloured := sum(not look.is_grey for look in looks.values())):
            self._say(f"{counted(coloured, 'held-out image')} in colour made grey, as those to train on are")
        if animated := sum(look.is_animated for look in looks.values()):
            self._say(f"only the first frame or page is taken of {counted(animated, 'image')}")
        return Layout((1 if is_grey else 3, height, width), self._white(looks))

    def _white(self, looks: dict[int, Look]) -> int:
        """The highest level of the greys of more than 8 bits, by the bits that are in use."""
        levels = [look.level for look in looks.values() if look.level is not None]
        if not levels:
            return 255
        used = max(8, max(levels).bit_length())
        bits = self._options.grey_bits or used + used % 2
        if bits != 16:
            what = "by --grey_bits" if self._options.grey_bits else "if that is wrong, say --grey_bits 16"
            self._say(
                f"{counted(len(levels), 'grey')} of 16 bits, up to level {max(levels)}: scaled as {bits} bits ({what})"
            )
        return int(2**bits - 1)

    def _decoded(self, layout: Layout, array: np.ndarray[Any, Any]) -> Pixels:
        """Fills `array` [N, C, H, W]. Raises DataError that lists all broken pictures, or leaves them out."""

        def work(places: Sequence[int]) -> None:
            for place, encoded in self._encoded([place for place in places if place not in self._broken]):
                try:
                    array[place] = picture.pixels(encoded, layout.shape, layout.white, bool(self._size))
                except Exception as error:
                    self._fail(place, encoded, error)

        in_parallel(work, self._count, f"reading {self._name}", self._quiet)
        if not self._broken:
            return Pixels(self._told_if_dark(array), ())
        left_out = tuple(sorted(self._broken))
        if not self._options.skip_broken or len(left_out) == self._count:
            self._refuse()
        lines = [self._broken[place] for place in left_out]
        self._say(
            f"left out {counted(len(lines), 'broken image')}: {'; '.join(lines[:20])}" + "; …" * (len(lines) > 20)
        )
        good = [place for place in range(self._count) if place not in self._broken]
        for new, old in enumerate(good):  # in place: there may be no memory for a second one
            if new != old:
                array[new] = array[old]
        return Pixels(self._told_if_dark(array[: len(good)]), left_out)

    def _told_if_dark(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        brightest = max(int(part.max()) for part in np.array_split(array, max(1, len(array) // 1000)))
        if brightest < DARK:
            self._say(f"all images are nearly black: their highest level is {brightest} of 255")
        return array

    def _encoded(self, places: Sequence[int]) -> list[tuple[int, Encoded]]:
        """Those of these pictures that are there, by place."""
        first = self._parts[0].count
        found = []
        for part, start in zip(self._parts, (0, first), strict=True):
            own = [place for place in places if start <= place < start + part.count]
            if not own:
                continue
            for place, encoded in zip(own, part.read([place - start for place in own]), strict=True):
                if encoded is None:
                    self._broken[place] = f"{part.where(place - start)} has no image"
                else:
                    found.append((place, encoded))
        return found

    def _fail(self, place: int, encoded: Encoded, error: Exception) -> None:
        first = self._parts[0].count
        where = self._parts[0].where(place) if place < first else self._parts[1].where(place - first)
        why = picture.reason(error, encoded, self._options.max_megapixels)
        self._broken[place] = f"{where} is not a readable image: {why}"

    def _refuse(self) -> NoReturn:
        lines = [self._broken[place] for place in sorted(self._broken)]
        if len(lines) == 1:
            raise DataError(f"{lines[0]} (--skip_broken leaves it out)")
        more = [f"… and {len(lines) - LISTED:,} more"] if len(lines) > LISTED else []
        listed = "\n".join(f"  {line}" for line in lines[:LISTED] + more)
        raise DataError(
            f"{len(lines):,} images cannot be read; mend them, or leave them out by --skip_broken:\n{listed}"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e10 else f"{size / 1e9:.0f} GB"
