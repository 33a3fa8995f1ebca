"""Files from uint8 arrays, a picture [H, W, C]. Pure functions: equal input gives equal bytes, whatever the time."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL.PngImagePlugin import PngInfo

from model.images import Image

LAST_FRAME_MS = 1500
SMALL = 16_384  # values of images that are encoded in less than a millisecond
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 5  # of deflate: 6, which is usual, takes up to three times as long for 1 % of the bytes


def png(image: Image, text: Mapping[str, str]) -> bytes:
    """A PNG with `text` in its text chunks."""
    if image.shape[2] == 1 and image.size <= SMALL:
        return _unfiltered_png(image[:, :, 0], text)
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    out = io.BytesIO()
    _pillow(image).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def _unfiltered_png(image: NDArray[np.uint8], text: Mapping[str, str]) -> bytes:
    """A grey picture [H, W]. Pillow takes up to eight times as long, most of it to filter each line; digits are smaller
    without."""
    height, width = image.shape
    lines = np.zeros((height, 1 + width), np.uint8)  # each begins with its filter, 0 for none
    lines[:, 1:] = image
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    texts = [_text_chunk(key, value) for key, value in text.items()]
    return b"".join(
        [PNG_SIGNATURE, head, *texts, _chunk(b"IDAT", zlib.compress(lines.tobytes(), LEVEL)), _chunk(b"IEND", b"")]
    )


@lru_cache(1024)
def _text_chunk(key: str, value: str) -> bytes:
    name = key.encode("latin-1")
    try:
        return _chunk(b"tEXt", name + b"\0" + value.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", name + b"\0\0\0\0\0" + value.encode())  # not compressed, of no language


def _chunk(kind: bytes, data: bytes) -> bytes:
    return b"".join([len(data).to_bytes(4, "big"), kind, data, zlib.crc32(data, zlib.crc32(kind)).to_bytes(4, "big")])


def animation(frames: Sequence[Image], format: str, seconds: float = 3.0) -> bytes:
    """A "gif" or "webp" that plays the frames in about `seconds`, rests on the last, and begins again."""
    pictures = [_pillow(frame) for frame in frames]
    each = max(20, round(1000 * seconds / len(pictures)))
    durations = [each] * (len(pictures) - 1) + [LAST_FRAME_MS]
    out = io.BytesIO()
    options = {"lossless": True} if format == "webp" else {}
    first, *rest = pictures
    first.save(out, format, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    return out.getvalue()


def archive(files: Mapping[str, bytes]) -> bytes:
    """A zip of files by name, stored (PNG is compressed already), all dated 1980."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # or unzip makes files that nobody may read
            target.writestr(entry, data)
    return out.getvalue()


def array(images: Image) -> bytes:
    """A .npy file of images [N, C, H, W]: uint8 [N, H, W] where they are grey, [N, H, W, 3] where they have colours."""
    last = images.transpose(0, 2, 3, 1)
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(last[..., 0] if last.shape[3] == 1 else last), allow_pickle=False)
    return out.getvalue()


def _pillow(image: Image) -> Pillow.Image:
    return Pillow.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def enlarged(image: Image, size: tuple[int, int]) -> Image:
    """The image [H, W, C] in that width and height, by bicubic interpolation."""
    large = np.asarray(_pillow(image).resize(size, Pillow.Resampling.BICUBIC))
    return large[:, :, None] if large.ndim == 2 else large
