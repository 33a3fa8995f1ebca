import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from app.encoders import LAST_FRAME_MS, animation, archive, png
from model.images import Image

PRETRAINED = Path(__file__).parents[2] / "model" / "pretrained"


def pictures(count: int, channels: int) -> list[Image]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 8, 12, channels), np.uint8))


def as_array(picture: Pillow.Image, channels: int) -> Image:
    array = np.array(picture.convert("L" if channels == 1 else "RGB"))
    return array.reshape(*array.shape[:2], channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_picture_and_its_text_exactly(channels: int) -> None:
    picture = pictures(1, channels)[0]
    text = {"seed": "7", "class_label": "Käfer → 虫", "model": "a\nb"}
    opened = Pillow.open(io.BytesIO(png(picture, text)))
    assert opened.size == (12, 8)
    np.testing.assert_array_equal(as_array(opened, channels), picture)
    assert opened.text == text


def test_equal_input_gives_equal_bytes() -> None:
    frames = pictures(3, 1)
    files = {"0.png": png(frames[0], {"seed": "1"})}
    assert png(frames[0], {"seed": "1"}) == files["0.png"]
    assert archive(files) == archive(dict(files))
    assert animation(frames, "gif") == animation(frames, "gif")
    assert animation(frames, "webp") == animation(frames, "webp")


@pytest.mark.parametrize(("format", "channels"), [("gif", 1), ("webp", 1), ("webp", 3)])
def test_animations_lose_nothing(format: str, channels: int) -> None:
    frames = pictures(5, channels)
    opened = Pillow.open(io.BytesIO(animation(frames, format)))
    assert opened.n_frames == 5
    for i, frame in enumerate(frames):
        opened.seek(i)
        np.testing.assert_array_equal(as_array(opened, channels), frame)


def test_a_gif_of_colours_keeps_its_frames_and_about_its_colours() -> None:
    frames = [np.full((8, 12, 3), colour, np.uint8) for colour in [(250, 10, 10), (10, 250, 10), (10, 10, 250)]]
    opened = Pillow.open(io.BytesIO(animation(frames, "gif")))
    assert opened.n_frames == 3
    for i, frame in enumerate(frames):
        opened.seek(i)
        np.testing.assert_allclose(as_array(opened, 3).astype(int), frame.astype(int), atol=8)


@pytest.mark.parametrize("format", ["gif", "webp"])
def test_animations_loop_and_rest_on_the_last_frame(format: str) -> None:
    opened = Pillow.open(io.BytesIO(animation(pictures(4, 1), format, seconds=2)))
    durations = []
    for i in range(4):
        opened.seek(i)
        opened.load()
        durations.append(opened.info["duration"])
    assert durations == [500, 500, 500, LAST_FRAME_MS]
    assert opened.info["loop"] == 0


def test_an_animation_of_one_frame_is_a_picture() -> None:
    assert Pillow.open(io.BytesIO(animation(pictures(1, 1), "gif"))).size == (12, 8)


def test_a_zip_holds_the_files_in_order_without_a_date() -> None:
    with zipfile.ZipFile(io.BytesIO(archive({"b.png": b"1", "a.png": b"22"}))) as opened:
        assert opened.namelist() == ["b.png", "a.png"]
        assert opened.read("a.png") == b"22"
        assert {entry.date_time for entry in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.external_attr >> 16 for entry in opened.infolist()} == {0o644}  # else nobody may read them


@pytest.mark.skipif(not shutil.which("unzip"), reason="needs unzip")
def test_unzipped_files_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(archive({"0.png": b"picture"}))
    subprocess.run(["unzip", "-q", "images.zip"], cwd=tmp_path, check=True)
    assert (tmp_path / "0.png").stat().st_mode & 0o444 == 0o444


def test_small_grey_pngs_are_no_larger_than_pillows() -> None:
    digits = np.asarray(Pillow.open(PRETRAINED / "mnist.png"))[:112, :112, None]
    out = io.BytesIO()
    Pillow.fromarray(digits[:, :, 0]).save(out, "PNG")
    assert len(png(digits, {})) <= len(out.getvalue())
