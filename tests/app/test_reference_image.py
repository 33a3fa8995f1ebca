"""Pictures from strangers: what is taken of them, and what is refused before it costs anything."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from app.errors import InvalidRequest
from app.reference_image import MAX_SCANS, decode_edit
from model.images import to_uint8

GREY, COLOUR = (1, 8, 12), (3, 8, 12)
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (8, 12), np.uint8)
COLOURS = RNG.integers(0, 256, (8, 12, 3), np.uint8)
RED = (255, 0, 0)


def file(picture: Pillow.Image | np.ndarray[Any, Any], format: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (picture if isinstance(picture, Pillow.Image) else Pillow.fromarray(picture)).save(out, format, **options)
    return out.getvalue()


def pixels(image: bytes, shape: tuple[int, int, int] = GREY) -> np.ndarray[Any, Any]:
    edit = decode_edit(image, None, shape)
    assert edit.mask is None
    assert edit.image.shape == shape
    return to_uint8(edit.image).numpy()


def transparent(box: tuple[int, int, int, int], size: tuple[int, int] = (12, 8)) -> Pillow.Image:
    picture = Pillow.new("RGBA", size, (*RED, 255))
    picture.paste((0, 0, 0, 0), box)
    return picture


def test_an_image_of_the_checkpoints_size_is_taken_as_it_is() -> None:
    assert np.array_equal(pixels(file(NOISE))[0], NOISE)
    assert np.array_equal(pixels(file(COLOURS), COLOUR), COLOURS.transpose(2, 0, 1))
    assert np.array_equal(pixels(file(COLOURS, "WEBP", lossless=True), COLOUR), COLOURS.transpose(2, 0, 1))


def test_grey_and_colour_are_made_of_each_other() -> None:
    assert np.array_equal(pixels(file(NOISE), COLOUR), np.stack([NOISE] * 3))
    assert (pixels(file(Pillow.new("RGB", (12, 8), RED))) == 76).all()  # 0.299 of 255


def test_the_middle_is_cropped_and_scaled() -> None:
    wide = np.zeros((80, 360), np.uint8)
    wide[:, 120:240] = np.repeat(np.repeat(NOISE, 10, 0), 10, 1)
    assert np.abs(pixels(file(wide))[0].astype(int) - NOISE).mean() < 30
    assert pixels(file(Pillow.new("L", (3, 2), 200))).min() == 200, "smaller ones are enlarged"


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA"])
def test_all_kinds_of_pixels_are_read(mode: str) -> None:
    picture = Pillow.new("L", (12, 8), 255).convert(mode)
    assert (pixels(file(picture)) == 255).all()


def test_sixteen_bits_are_scaled_and_not_cut() -> None:
    assert np.array_equal(pixels(file(NOISE.astype(np.uint16) * 257))[0], NOISE)


def test_cmyk_is_converted() -> None:
    magenta = pixels(file(Pillow.new("CMYK", (12, 8), (0, 255, 0, 0)), "JPEG"), COLOUR)
    assert magenta[:, 4, 6].tolist() == pytest.approx([255, 0, 255], abs=3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_exif_rotation_is_applied(format: str) -> None:
    upright = Pillow.new("L", (12, 8))
    upright.paste(255, (0, 0, 12, 4))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    stored = upright.transpose(Pillow.Transpose.ROTATE_90).convert("RGB")
    assert np.abs(pixels(file(stored, format, exif=exif))[0].astype(int) - np.asarray(upright)).max() < 40


def test_where_a_mask_is_transparent_is_painted_anew() -> None:
    edit = decode_edit(file(NOISE), file(transparent((0, 0, 6, 8))), GREY)
    assert edit.mask is not None
    assert edit.mask.shape == (1, 8, 12)
    assert torch.equal(edit.mask[0], torch.tensor([1.0] * 6 + [0.0] * 6).expand(8, 12))
    assert np.array_equal(to_uint8(edit.image)[0].numpy(), NOISE), "colours of the mask mean nothing"


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA"])
def test_a_mask_without_transparency_is_white_where_it_is_painted(mode: str) -> None:
    mask = Pillow.new("L", (12, 8))
    mask.paste(255, (0, 0, 6, 8))
    edit = decode_edit(file(NOISE), file(mask.convert(mode)), GREY)
    assert edit.mask is not None
    assert torch.equal(edit.mask[0], torch.tensor([1.0] * 6 + [0.0] * 6).expand(8, 12))


def test_without_a_mask_the_images_own_transparency_is_one() -> None:
    edit = decode_edit(file(transparent((0, 0, 6, 8))), None, COLOUR)
    assert edit.mask is not None
    assert edit.mask[0, 0].tolist() == [1.0] * 6 + [0.0] * 6
    assert edit.image[:, 0, 0].tolist() == [0, 0, 0], "grey, which is in the middle between black and white"
    assert edit.image[:, 0, 11].tolist() == [1, -1, -1]


def test_a_mask_is_cropped_and_scaled_with_its_image() -> None:
    mask = transparent((60, 0, 120, 80), (240, 80))  # the left half of the middle
    edit = decode_edit(file(Pillow.new("L", (240, 80))), file(mask), GREY)
    assert edit.mask is not None
    assert edit.mask[0, 0].tolist() == [1.0] * 6 + [0.0] * 6
    soft = decode_edit(file(Pillow.new("L", (240, 80))), file(transparent((60, 0, 125, 80), (240, 80))), GREY)
    assert soft.mask is not None
    assert soft.mask[0, 0].tolist() == pytest.approx([1.0] * 6 + [0.5] + [0.0] * 5, abs=0.01), "kept means kept"


def test_a_mask_may_be_rotated_otherwise_than_its_image() -> None:
    exif = Pillow.Exif()
    exif[0x0112] = 6
    assert decode_edit(file(NOISE), file(transparent((0, 0, 4, 4), (8, 12)), exif=exif), GREY).mask is not None


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG that says that it is that large."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    frames = [Pillow.new("L", (12, 8), i) for i in (0, 99)]
    return file(frames[0], format, save_all=True, append_images=frames[1:])


def many_scans() -> bytes:
    whole = file(NOISE, "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[last:-2] * MAX_SCANS + whole[-2:]


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"not a picture", "is not a PNG, JPEG or WebP file"),
    "svg": (SVG, "is not a PNG, JPEG or WebP file"),
    "gif": (file(NOISE, "GIF"), "is not a PNG, JPEG or WebP file"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a PNG, JPEG or WebP file"),
    "wide": (file(Pillow.new("L", (30_000, 1))), "is 30000x1 pixels: at most 8192 on a side and 16 megapixels"),
    "large": (bomb(5000, 5000), "is 5000x5000 pixels: at most 8192 on a side and 16 megapixels"),
    "bomb": (bomb(10_000, 10_000), "has too many pixels: at most"),
    "large bomb": (bomb(60_000, 60_000), "has too many pixels: at most"),
    "no pixels": (bomb(0, 8), "is not a PNG, JPEG or WebP file"),
    "short of pixels": (bomb(4000, 4000), "is damaged, or cut short"),
    "cut": (file(NOISE)[:-40], "is damaged, or cut short"),
    "cut jpeg": (file(COLOURS, "JPEG")[:-60], "is damaged, or cut short"),
    "cut webp": (file(COLOURS, "WEBP")[:-20], "is damaged, or cut short"),
    "head alone": (file(NOISE)[:20], "is damaged, or cut short"),
    "animated png": (animated("PNG"), "is an animation of 2 frames: send one picture"),
    "animated webp": (animated("WEBP"), "is an animation of 2 frames: send one picture"),
    "many scans": (many_scans(), f"is a JPEG of more than {MAX_SCANS} scans"),
}


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_taken_is_refused_in_a_sentence(kind: str, name: str) -> None:
    data, sentence = REFUSED[kind]
    image, mask = (data, None) if name == "image" else (file(NOISE), data)
    with pytest.raises(InvalidRequest) as refusal:
        decode_edit(image, mask, GREY)
    assert refusal.value.message.startswith(f"{name} {sentence}")
    assert refusal.value.param == name


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="mask is 12x9 pixels and image 12x8: they must have the same size"):
        decode_edit(file(NOISE), file(transparent((0, 0, 4, 4), (12, 9))), GREY)


def test_a_mask_that_keeps_everything_is_refused() -> None:
    for mask in (Pillow.new("L", (12, 8)), Pillow.new("RGBA", (12, 8), (0, 0, 0, 255))):
        with pytest.raises(InvalidRequest, match="mask keeps everything"):
            decode_edit(file(NOISE), file(mask), GREY)


def test_a_telephones_second_picture_is_not_an_animation() -> None:
    two = file(COLOURS, "MPO", save_all=True, append_images=[Pillow.fromarray(COLOURS)])
    assert pixels(two, COLOUR).shape == COLOUR


def test_random_damage_is_refused_or_harmless() -> None:
    rng = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "WEBP"):
        whole = file(COLOURS, format)
        for _ in range(100):
            spoiled = bytearray(whole)
            for place in rng.integers(0, len(spoiled), rng.integers(1, 6)):
                spoiled[place] = rng.integers(0, 256)
            with suppress(InvalidRequest):
                decode_edit(bytes(spoiled), None, COLOUR)
