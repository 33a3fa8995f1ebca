"""One picture file, as Pillow reads it: what it is, and its pixels."""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Encoded = Path | bytes  # a file, or its contents
NOT_READ = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # the first runs Ghostscript, of the rest Pillow reads a head
UNMISTAKABLE = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "PSD", "QOI", "TIFF", "WEBP")  # by first bytes
GREY = ("1", "L", "LA", "La")
LARGE = 25_000_000  # pixels; such pictures are decoded one at a time
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_large = threading.Lock()


@dataclass(frozen=True)
class Look:
    """What the head of a file says. `level` is the highest of a grey of more than 8 bits, which is decoded for it."""

    height: int
    width: int
    is_grey: bool
    is_animated: bool
    level: int | None


@cache
def formats() -> tuple[str, ...]:
    """The formats that are read: all of Pillow's but NOT_READ."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_READ)


@cache
def suffixes() -> frozenset[str]:
    """Endings of the names of such files, in lower case."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats())


def is_picture(path: Path) -> bool:
    """Whether a file of any ending begins as a picture does."""
    try:
        with Image.open(path, formats=UNMISTAKABLE):
            return True
    except Exception:
        return False


@contextmanager
def pillow(max_megapixels: int) -> Iterator[None]:
    """Within it Pillow refuses pictures of more pixels, and says nothing of what it finds odd in a file."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_megapixels * 1_000_000 // 2  # it refuses twice that
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def look(encoded: Encoded) -> Look:
    """Reads the head of a picture. Raises whatever Pillow does: see `reason`."""
    with _open(encoded) as picture:
        _check(picture)
        width, height = picture.size
        # Of a TIFF Pillow tells the size of the turned picture; of a PNG its own getexif would decode the whole file.
        if picture.format != "TIFF" and _orientation(picture, Image.Image.getexif) >= 5:
            width, height = height, width
        is_deep = picture.mode.startswith("I")
        is_animated = picture.format not in ("MPO", "PSD") and getattr(picture, "is_animated", False)
        level = int(np.asarray(picture).max()) if is_deep else None
        return Look(height, width, picture.mode in GREY or is_deep, is_animated, level)


def pixels(encoded: Encoded, shape: tuple[int, int, int], white: int, fit: bool) -> np.ndarray[Any, Any]:
    """The picture, upright, as uint8 [C, H, W], of one channel or three; transparency is laid over white.

    `white` is the level of a grey of more than 8 bits that becomes 255. `fit`: crop and scale what is of another size;
    a JPEG is then decoded no larger than need be. Raises whatever Pillow does: see `reason`.
    """
    channels, height, width = shape
    with _open(encoded) as picture:
        _check(picture)
        if fit:
            picture.draft(None, (2 * max(height, width),) * 2)
        with _large if picture.width * picture.height > LARGE else nullcontext():
            picture.load()
            upright = picture.transpose(UPRIGHT[turn]) if (turn := _orientation(picture)) in UPRIGHT else picture
            plain = _eight_bits(upright, white).convert("L" if channels == 1 else "RGB")
            if plain.size != (width, height):
                if not fit:
                    raise ValueError(f"it is of {plain.width}×{plain.height} pixels, not {width}×{height}")
                plain = ImageOps.fit(plain, (width, height), Image.Resampling.LANCZOS)
        return np.asarray(plain).reshape(height, width, channels).transpose(2, 0, 1)


def reason(error: Exception, encoded: Encoded, max_megapixels: int) -> str:
    """Why a picture cannot be read, in words for people."""
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\((\d+) pixels", str(error))
        size = f"{int(found[1]) / 1e6:.0f}" if found else f"more than {max_megapixels}"
        return f"it has {size} megapixels; --max_megapixels {max_megapixels} is the limit"
    if isinstance(error, FileNotFoundError):
        is_link = isinstance(encoded, Path) and encoded.is_symlink()
        return "it is a link that leads nowhere" if is_link else "it is not there"
    if isinstance(error, UnidentifiedImageError):
        return _not_a_picture(encoded)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, (OSError, SyntaxError, ValueError)) and (said := str(error).splitlines()):
        return said[0]
    return "its contents are damaged"


def _not_a_picture(encoded: Encoded) -> str:
    head = encoded[:64] if isinstance(encoded, bytes) else b""
    if isinstance(encoded, Path):
        with suppress(OSError), encoded.open("rb") as file:
            head = file.read(64)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the image itself: run git lfs pull"
    return "it is of no format that Pillow reads"


def _open(encoded: Encoded) -> Image.Image:
    return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=formats())


def _check(picture: Image.Image) -> None:
    if picture.mode == "F":
        raise ValueError("it has floating-point pixels, of unknown range")


def _orientation(picture: Image.Image, read: Callable[[Any], Image.Exif] = lambda picture: picture.getexif()) -> int:
    """EXIF's, 1 to 8. Damaged EXIF is none."""
    try:
        return int(read(picture).get(ORIENTATION, 1))
    except Exception:
        return 1


def _eight_bits(picture: Image.Image, white: int) -> Image.Image:
    """In mode L or RGB."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture).clip(0, white).astype(np.float32)
        return Image.fromarray((levels * (255 / white)).round().astype(np.uint8))
    if picture.has_transparency_data:
        paper = Image.new("RGBA", picture.size, "white")
        paper.alpha_composite(picture.convert("RGBA"))
        return paper.convert("L" if picture.mode in GREY else "RGB")
    return picture.convert("L" if picture.mode in GREY else "RGB")
