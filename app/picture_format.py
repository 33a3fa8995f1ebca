"""How an image becomes a file: its format, its compression, and the size it is enlarged to."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from PIL import Image as Pillow

from app import encoders
from app.errors import InvalidRequest
from model.images import Image

Extension = Literal["png", "webp", "jpeg"]
Size = tuple[int, int]
"""Width and height."""
SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)


@dataclass(frozen=True)
class PictureFormat:
    """`compression` is the quality of webp and jpeg, 0 to 100; a webp of 100 is lossless. `size` is None for the
    image's own."""

    format: Extension = "png"
    compression: int = 100
    size: Size | None = None

    def options(self) -> dict[str, object]:
        """What an address says of it."""
        compression = {} if self.format == "png" else {"output_compression": self.compression}
        return {**compression, **({"size": size_text(self.size)} if self.size else {})}

    def encode(self, image: Image, text: Mapping[str, str]) -> bytes:
        """The file of an image, uint8 [H, W, C]. Only a PNG holds the text."""
        if self.size is not None:
            text = {**text, "enlarged_from": size_text((image.shape[1], image.shape[0]))}
            image = encoders.enlarged(image, self.size)
        if self.format == "png":
            return encoders.png(image, text)
        out = io.BytesIO()
        is_lossless = self.format == "webp" and self.compression == 100
        options = {"lossless": True} if is_lossless else {"quality": self.compression}
        Pillow.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(out, self.format, **options)
        return out.getvalue()


def size_text(size: Size) -> str:
    """As OpenAI writes it."""
    return f"{size[0]}x{size[1]}"


def enlargement(asked: str | None, shape: tuple[int, ...], n: int, max_bytes: int) -> Size | None:
    """The size that `asked` ("auto", "112x112") enlarges images [C, H, W] to; None for their own.

    The shape stays, to the nearest pixel. Raises InvalidRequest where it cannot, where the size is smaller than the
    images', or where n of them have more bytes than `max_bytes`.
    """
    channels, height, width = shape
    native = size_text((width, height))
    if asked in (None, "auto", native):
        return None
    found = SIZE.fullmatch(str(asked))
    if not found:
        raise InvalidRequest(f"size must be auto or WIDTHxHEIGHT, such as {native}, not {asked!r:.80}", param="size")
    wide, high = int(found[1]), int(found[2])
    if wide < width or high < height:
        raise InvalidRequest(f"images are {native}: size can enlarge them, not make them smaller", param="size")
    if high != max(1, round(height * wide / width)) and wide != max(1, round(width * high / height)):
        example = size_text((width * (1 + 512 // max(width, height)), height * (1 + 512 // max(width, height))))
        raise InvalidRequest(f"images are {native}: size must have that shape, such as {example}", param="size")
    if n * wide * high * channels > max_bytes:
        images = "1 image" if n == 1 else f"{n} images"
        raise InvalidRequest(
            f"{images} of {wide}x{high} would be {n * wide * high * channels} bytes of pixels; "
            f"at most {max_bytes} are served",
            param="size",
        )
    return wide, high
