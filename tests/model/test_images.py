from __future__ import annotations

import numpy as np
import pytest
import torch

from model.images import from_uint8, grid, to_uint8


def test_every_byte_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(levels)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), levels)


def test_bytes_are_rounded_to_nearest_and_clamped() -> None:
    x = torch.tensor([-7.0, -1.0, 0.49 / 127.5 - 1, 0.51 / 127.5 - 1, 1.0, 7.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


def test_low_precision_is_rounded_in_float32() -> None:
    x = torch.linspace(-1, 1, 50).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.float()))


@pytest.mark.parametrize(
    ("n", "columns", "rows_and_columns"),
    [
        (1, None, (1, 1)),
        (2, None, (1, 2)),
        (3, None, (2, 2)),
        (5, None, (2, 3)),
        (9, None, (3, 3)),
        (5, 1, (5, 1)),
        (5, 2, (3, 2)),
        (5, 5, (1, 5)),
        (5, 8, (1, 5)),  # no wider than what there is
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_is_filled_row_by_row_and_black_where_images_end(
    n: int, columns: int | None, rows_and_columns: tuple[int, int], channels: int
) -> None:
    h, w = 2, 3
    images = np.random.default_rng(0).integers(1, 256, (n, channels, h, w), dtype=np.uint8)
    picture = grid(images, columns)
    rows, across = rows_and_columns
    assert picture.shape == (rows * h, across * w, channels)
    assert picture.dtype == np.uint8
    for i in range(rows * across):
        top, left = i // across * h, i % across * w
        tile = picture[top : top + h, left : left + w].transpose(2, 0, 1)
        assert np.array_equal(tile, images[i] if i < n else np.zeros_like(tile))
