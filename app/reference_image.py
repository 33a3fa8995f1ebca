"""Images that clients send to be edited: decoded within limits, and cropped and scaled to the checkpoint's size."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image as Pillow
from PIL import ImageChops, ImageOps, UnidentifiedImageError

from app.errors import InvalidRequest
from model.images import from_uint8
from model.sampling.edit import Edit

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_SIDE = 8192
MAX_PIXELS = 4096 * 4096
MAX_SCANS = 100  # of a JPEG; a progressive one has about ten, and each costs as much as decoding all of its pixels
SCAN = b"\xff\xda"


def decode_edit(image: bytes, mask: bytes | None, shape: tuple[int, int, int]) -> Edit:
    """What a checkpoint of images [C, H, W] = `shape` is to edit. Raises InvalidRequest; takes up to a second.

    The middle of the image is scaled to `shape`. Where `mask`, or without one the image, is transparent it is painted
    anew; where a mask has no transparency, its brightness says how much. Under transparency the image is grey.
    """
    channels, height, width = shape
    picture, repaint = _decode(image, "image"), None
    if mask is not None:
        other = _decode(mask, "mask")
        if other.size != picture.size:
            raise InvalidRequest(
                f"mask is {_size(other)} pixels and image {_size(picture)}: they must have the same size", param="mask"
            )
        repaint = other.convert("L") if _is_opaque(other) else ImageChops.invert(other.getchannel("A"))
    elif not _is_opaque(picture):
        repaint = ImageChops.invert(picture.getchannel("A"))
    pixels = np.asarray(ImageOps.fit(picture, (width, height), Pillow.Resampling.LANCZOS))
    colours = pixels[:, :, :3]
    if channels == 1:
        colours = np.asarray(Pillow.fromarray(colours).convert("L"))[:, :, None]
    reference = from_uint8(torch.from_numpy(colours.transpose(2, 0, 1).copy()))
    reference[:, torch.from_numpy(pixels[:, :, 3] == 0)] = 0
    if repaint is None:
        return Edit(reference)
    # Averages: another filter would ring into what stays.
    weights = torch.from_numpy(np.array(ImageOps.fit(repaint, (width, height), Pillow.Resampling.BOX)))
    if not weights.any():
        name = "image" if mask is None else "mask"
        raise InvalidRequest(f"{name} keeps everything: what is to be painted anew must be transparent", param=name)
    return Edit(reference, weights[None].float() / 255)


def _decode(data: bytes, name: str) -> Pillow.Image:
    """An upright picture in RGBA. Raises InvalidRequest; `name` is the field."""
    try:
        with Pillow.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check(picture, data, name)
            picture.load()
            return _rgba(ImageOps.exif_transpose(picture))
    except InvalidRequest:
        raise
    except UnidentifiedImageError:
        found = "is empty" if not data else "is not a PNG, JPEG or WebP file"
        raise InvalidRequest(f"{name} {found}", param=name) from None
    except (Pillow.DecompressionBombError, Pillow.DecompressionBombWarning):
        raise InvalidRequest(f"{name} has too many pixels: {_limits()}", param=name) from None
    except Exception:  # a file that is damaged makes Pillow raise nearly anything
        raise InvalidRequest(f"{name} is damaged, or cut short", param=name) from None


def _check(picture: Pillow.Image, data: bytes, name: str) -> None:
    """Before a pixel is decoded."""
    width, height = picture.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InvalidRequest(f"{name} is {_size(picture)} pixels: {_limits()}", param=name)
    is_jpeg = picture.format in ("JPEG", "MPO")  # telephones put a second picture into the file
    if (frames := getattr(picture, "n_frames", 1)) > 1 and not is_jpeg:
        raise InvalidRequest(f"{name} is an animation of {frames} frames: send one picture", param=name)
    if is_jpeg and data.count(SCAN) > MAX_SCANS:
        raise InvalidRequest(f"{name} is a JPEG of more than {MAX_SCANS} scans: save it again", param=name)


def _rgba(picture: Pillow.Image) -> Pillow.Image:
    if picture.mode.startswith("I"):  # 16 bits, of which Pillow's conversion would cut those above the eighth
        picture = Pillow.fromarray((np.asarray(picture) / np.float32(257)).round().astype(np.uint8))
    return picture.convert("RGBA")


def _is_opaque(picture: Pillow.Image) -> bool:
    return picture.getchannel("A").getextrema()[0] == 255


def _size(picture: Pillow.Image) -> str:
    return f"{picture.width}x{picture.height}"


def _limits() -> str:
    return f"at most {MAX_SIDE} on a side and {MAX_PIXELS / 2**20:.0f} megapixels are taken"
