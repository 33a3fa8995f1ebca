from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.images import to_uint8
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from training.run.image_io import animation, sample_grid, save_gif, save_png, save_strip, sequence, strip

DIFFUSION = GaussianDiffusion(DiffusionConfig())
GUIDED = make_schedule(DIFFUSION, "ddim", 6, eta=0.5, guidance_scale=2.0)


def made(tiny: UNet, indices: list[int], classes: list[int], seed: int = 0) -> torch.Tensor:
    """By the definition: model.sampling.solvers.sample."""
    return to_uint8(sample(tiny, GUIDED, (1, 8, 8), [seed] * len(indices), indices, classes, null_class=3))


def test_a_grid_has_a_row_per_class(tiny: UNet) -> None:
    picture = sample_grid(tiny, GUIDED, per_class=2)
    expected = made(tiny, list(range(6)), [0, 0, 1, 1, 2, 2])
    assert picture.shape == (24, 16, 1)
    assert np.array_equal(picture[8:16, 8:, 0], expected[3, 0].numpy())


def test_a_grid_without_classes_is_a_square(tiny_config: UNetConfig) -> None:
    network = UNet(replace(tiny_config, num_classes=None, null_class=False)).eval()
    assert sample_grid(network, make_schedule(DIFFUSION, "ddim", 1)).shape == (64, 64, 1)


def test_a_sequence_begins_with_noise_and_ends_with_the_image(tiny: UNet) -> None:
    frames = sequence(tiny, GUIDED, [7, 0], [2, 1], seed=5)
    assert frames.shape == (7, 2, 2, 1, 8, 8)
    noise = to_uint8(normals([5, 5], [7, 0], [0, 0], (1, 8, 8))).numpy()
    assert np.array_equal(frames[0, 0], noise)
    image = made(tiny, [7, 0], [2, 1], seed=5).numpy()
    assert np.array_equal(frames[-1, 0], image)
    assert np.array_equal(frames[-1, 1], image)


def test_a_frame_pairs_the_networks_input_with_its_prediction(tiny: UNet) -> None:
    steps: list[tuple[torch.Tensor, torch.Tensor]] = []
    sample(tiny, GUIDED, (1, 8, 8), [0], [0], [1], null_class=3, on_step=lambda _, x, x0: steps.append((x, x0)))
    frames = sequence(tiny, GUIDED, [0], [1])
    for i in range(1, 6):
        assert np.array_equal(frames[i, 0], to_uint8(steps[i - 1][0]).numpy())
        assert np.array_equal(frames[i, 1], to_uint8(steps[i][1]).numpy())


def test_few_frames_of_many_steps_keep_the_ends(tiny: UNet) -> None:
    every = sequence(tiny, GUIDED, [0], [1])
    few = sequence(tiny, GUIDED, [0], [1], frames=3)
    assert np.array_equal(few, every[[0, 3, 6]])
    with pytest.raises(ValueError, match="at least 2 frames"):
        sequence(tiny, GUIDED, [0], [1], frames=1)


def numbered(f: int, n: int, channels: int, size: tuple[int, int] = (64, 80)) -> np.ndarray:
    """Frames whose every image is of one shade, its place in the array."""
    shades = np.arange(f * 2 * n, dtype=np.uint8).reshape(f, 2, n, 1, 1, 1)
    return np.broadcast_to(shades, (f, 2, n, channels, *size)).copy()


def test_a_strip_goes_from_left_to_right_with_predictions_below() -> None:
    picture = strip(numbered(5, 2, 3), columns=3)
    assert picture.shape == (4 * 64, 3 * 80, 3)
    assert picture[::64, ::80, 0].tolist() == [[0, 8, 16], [2, 10, 18], [1, 9, 17], [3, 11, 19]]


def test_small_images_are_enlarged() -> None:
    assert strip(numbered(2, 1, 1, (8, 12))).shape == (128, 192, 1)
    assert animation(numbered(2, 1, 1, (100, 12)))[0].shape == (1200, 72, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_plays_every_frame_and_rests_on_the_last(channels: int, tmp_path: Path) -> None:
    frames = numbered(4, 2, channels)
    save_gif(tmp_path / "a.gif", frames, seconds=2.0)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"], gif.size) == (4, 0, (160, 128))
        durations = []
        for i in range(4):
            gif.seek(i)
            durations.append(gif.info["duration"])
            shown = np.asarray(gif.convert("RGB"))[:, :, 0]
            assert shown[::64, ::80].tolist() == frames[i, :, :, 0, 0, 0].tolist()
    assert durations == [500, 500, 500, 1500]


def test_files_are_pngs_equal_for_equal_input_and_leave_no_parts(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 5, 3), dtype=np.uint8)  # one row: no axis may go astray
    save_png(tmp_path / "a.png", picture)
    save_png(tmp_path / "b.png", picture[:, :, :1])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "b.png")), picture[:, :, 0])
    for name in ("c.png", "d.png"):
        save_strip(tmp_path / name, numbered(3, 1, 1))
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()
    assert not list(tmp_path.glob("*.part"))
