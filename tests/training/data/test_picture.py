import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.data.conftest import Counts, Draw
from training import data
from training.data import DataError, LoadOptions, picture

Counting = Callable[..., Counts]
Refusal = Callable[..., str]
Capsys = pytest.CaptureFixture[str]


def grey16(folder: Path, highest: int) -> Path:
    """20 greys of 16 bits from 0 to `highest`."""
    folder.mkdir()
    levels = np.linspace(0, highest, 64).round().astype(np.uint16).reshape(8, 8)
    for i in range(20):
        Image.fromarray(levels).save(folder / f"{i:02d}.png")
    return folder


def first(dataset: Path, **options: Any) -> np.ndarray[Any, Any]:
    return data.load(str(dataset), (), LoadOptions(**options))[0].images[0, 0].numpy()


@pytest.mark.parametrize(("highest", "bits"), [(200, 8), (1023, 10), (4000, 12), (9000, 14), (65535, 16)])
def test_greys_are_scaled_by_the_bits_in_use(highest: int, bits: int, tmp_path: Path, capsys: Capsys) -> None:
    found = first(grey16(tmp_path / "d", highest))
    assert found.max() == round(255 * highest / (2**bits - 1))
    expected = (
        f"20 greys of 16 bits, up to level {highest}: scaled as {bits} bits (if that is wrong, say --grey_bits 16)"
    )
    assert (expected in capsys.readouterr().err) == (bits != 16)


def test_the_bits_of_greys_can_be_said(tmp_path: Path) -> None:
    dataset = grey16(tmp_path / "d", 4000)
    assert first(dataset, grey_bits=16).max() == round(4000 / 257)
    with pytest.raises(ValueError, match="--grey_bits must be one of 0, 8, 10"):
        LoadOptions(grey_bits=7)


def test_images_that_are_nearly_black_are_told(draw: Draw, capsys: Capsys) -> None:
    data.load(str(draw("cat", 20, level=0)))
    assert "all images are nearly black: their highest level is 19 of 255" in capsys.readouterr().err


def test_all_broken_images_are_listed(draw: Draw, refusal: Refusal, capsys: Capsys) -> None:
    dataset = draw("cat", 30)
    for i in (1, 5, 9):
        path = dataset / "cat" / f"{i:03d}.png"
        path.write_bytes(path.read_bytes()[:45])
    (dataset / "cat" / "020.png").write_bytes(b"")
    (dataset / "cat" / "021.png").write_text("version https://git-lfs.github.com/spec/v1\n")
    (dataset / "cat" / "gone.png").symlink_to("nowhere.png")
    why = refusal(dataset)
    assert why.startswith("6 images cannot be read; mend them, or leave them out by --skip_broken:\n")
    for line in ("001.png is not a readable image: image file is truncated", "005.png", "009.png"):
        assert line in why
    assert "020.png is not a readable image: the file is empty" in why
    assert "021.png is not a readable image: it is a Git LFS pointer" in why
    assert "gone.png is not a readable image: it is a link that leads nowhere" in why
    train, held_out = data.load(str(dataset), (), LoadOptions(skip_broken=True))
    assert "left out 6 broken images: " in capsys.readouterr().err
    levels = [*train.images[:, 0, 0, 0].tolist(), *held_out.images[:, 0, 0, 0].tolist()]
    assert sorted(levels) == [128 + i for i in range(30) if i not in (1, 5, 9, 20, 21)]


def test_a_class_of_broken_images_is_refused(draw: Draw, refusal: Refusal) -> None:
    dataset = draw("cat", 30)
    draw("dog", 1)
    (dataset / "dog" / "000.png").write_bytes(b"x")
    assert "has no image to train on of the class dog" in refusal(dataset, skip_broken=True)


def test_a_huge_scan_ends_in_a_sentence(draw: Draw, refusal: Refusal) -> None:
    dataset = draw("cat", 30)
    Image.new("1", (20_000, 9_500)).save(dataset / "cat" / "scan.png")
    why = refusal(dataset, (8, 8))
    assert f"{dataset}/cat/scan.png is not a readable image: it has 190 megapixels; --max_megapixels 179" in why
    assert "\n" not in why


def test_larger_scans_can_be_allowed(draw: Draw, counts: Counting, refusal: Refusal) -> None:
    dataset = draw("cat", 30)
    Image.new("L", (1_100, 1_000)).save(dataset / "cat" / "scan.png")
    assert "1 megapixels; --max_megapixels 1 is the limit" in refusal(dataset, (8, 8), max_megapixels=1)
    assert counts(dataset, (8, 8), max_megapixels=2) == {"cat": (30, 1)}


def test_pillow_is_left_as_it_was(draw: Draw) -> None:
    before = Image.MAX_IMAGE_PIXELS
    data.load(str(draw("cat", 20)), (), LoadOptions(max_megapixels=1))
    assert before == Image.MAX_IMAGE_PIXELS


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


HEAD = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0))
HOSTILE = {
    "text.png": HEAD + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10_000_000))) + chunk(b"IEND", b""),
    "wide.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)),
    "data.png": HEAD + chunk(b"IDAT", b"not zlib at all") + chunk(b"IEND", b""),
    "half.gif": b"GIF89a\xff\xff\xff\xff\x80\0\0",
    "icon.ico": b"\0\0\1\0\xff\xff" + bytes(16),
    "tags.tif": b"II*\0\x08\0\0\0\xff\xff" + bytes(40),
    "head.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + bytes(20),
    "float.tif": b"",
    "post.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_picture_ends_in_a_sentence(name: str, draw: Draw, refusal: Refusal, counts: Counting) -> None:
    dataset = draw("cat", 30)
    (dataset / "cat" / name).write_bytes(HOSTILE[name])
    if name == "float.tif":
        Image.new("F", (8, 8)).save(dataset / "cat" / name)
    if name == "post.eps":  # Pillow would start Ghostscript
        assert counts(dataset) == {"cat": (29, 1)}
        return
    why = refusal(dataset)
    assert f"{dataset}/cat/{name} is not a readable image: " in why
    assert "\n" not in why


def test_every_failure_of_pillow_has_words(monkeypatch: pytest.MonkeyPatch, draw: Draw, refusal: Refusal) -> None:
    dataset = draw("cat", 30)

    def fails(*_: object) -> None:
        raise KeyError(0x0112)

    monkeypatch.setattr(picture, "_check", fails)
    assert "000.png is not a readable image: its contents are damaged" in refusal(dataset)


def photo(dataset: Path, orientation: int = 1) -> None:
    """20 JPEGs of 1600 × 1200, of which the left half is red, as the camera holds it."""
    dataset.mkdir()
    pixels = np.zeros((1200, 1600, 3), np.uint8)
    pixels[:, :800, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for i in range(20):
        Image.fromarray(pixels).save(dataset / f"{i:02d}.jpg", exif=exif)


@pytest.mark.slow
@pytest.mark.parametrize(("orientation", "red"), [(1, (4, 1)), (6, (1, 4)), (3, (4, 6))])
def test_photos_are_decoded_small_and_upright(
    orientation: int, red: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(tmp_path / "d", orientation)
    decoded = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size) or load(self))
    train, _ = data.load(str(tmp_path / "d"), (8, 8))
    assert max(decoded) == (200, 150)  # an eighth: what the decoder can do without reading less than twice the size
    assert train.images[0, 0, red[0], red[1]] > 200
    assert train.images[0, 0].float().mean() < 150


def test_damaged_exif_does_not_break_an_image(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (6, 4)).save(tmp_path / f"{i}.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert data.load(str(tmp_path))[0].images.shape[2:] == (4, 6)


def test_frames_beside_the_first_are_told(tmp_path: Path, capsys: Capsys) -> None:
    frames = [Image.new("L", (8, 8), level) for level in (200, 20)]
    for i in range(20):
        frames[0].save(tmp_path / f"{i}.gif", save_all=True, append_images=frames[1:])
    assert data.load(str(tmp_path))[0].images.min() == 200
    assert "only the first frame or page is taken of 20 images" in capsys.readouterr().err


def test_coloured_held_out_images_of_a_grey_set_are_told(image_folder: Any, tmp_path: Path, capsys: Capsys) -> None:
    image_folder("d/train", count=20)
    image_folder("d/test", count=2, mode="RGB")
    _, held_out = data.load(str(tmp_path / "d"))
    assert held_out.images.shape[1] == 1
    assert "4 held-out images in colour made grey" in capsys.readouterr().err


def test_quiet_says_nothing_but_refuses(draw: Draw, capsys: Capsys) -> None:
    dataset = draw("cat", 20, level=0)
    data.load(str(dataset), quiet=True)
    (dataset / "cat" / "000.png").write_bytes(b"x")
    with pytest.raises(DataError, match="of no format that Pillow reads"):
        data.load(str(dataset), quiet=True)
    assert capsys.readouterr().err == ""
