from __future__ import annotations

import pytest
import torch
from torch import Tensor

from app.engine.batch_invariance import candidate_batch_sizes, gpu_micro_batch_size, largest_invariant_set


@pytest.mark.parametrize(
    ("image_size", "rows"),
    [((28, 28), 256), ((32, 32), 256), ((33, 32), 128), ((64, 64), 64), ((256, 256), 4), ((4096, 4096), 1)],
)
def test_the_larger_the_images_the_fewer_at_once_on_a_gpu(image_size: tuple[int, int], rows: int) -> None:
    assert gpu_micro_batch_size(image_size) == rows


def test_candidate_batch_sizes_on_cpu_and_gpu() -> None:
    assert candidate_batch_sizes(5, "cpu") == [5, 4, 3, 2, 1]
    assert candidate_batch_sizes(26, "cpu") == [26, 24, 20, *range(16, 0, -1)]
    assert candidate_batch_sizes(256, "cuda") == [256, 128, 64, 32, 16, 8, 4, 2, 1]
    assert candidate_batch_sizes(100, "cuda") == [100, 64, 32, 16, 8, 4, 2, 1]
    assert candidate_batch_sizes(1, "cpu") == candidate_batch_sizes(1, "cuda") == [1]


def outs(*alike: list[int]) -> dict[int, Tensor]:
    """The last rows of 256, by number of rows; those in one list agree."""
    rows = torch.arange(256.0)[:, None]
    return {n: (rows + which / 8)[-n:] for which, numbers in enumerate(alike) for n in numbers}


@pytest.mark.parametrize(
    ("alike", "expected"),
    [
        ([[1, 2, 4, 8, 16, 32, 64, 128, 256]], [1, 2, 4, 8, 16, 32, 64, 128, 256]),
        ([[1], [2, 4, 8, 16, 32, 64, 128, 256]], [2, 4, 8, 16, 32, 64, 128, 256]),
        ([[1, 2, 4, 8, 16], [32, 64, 128, 256]], [32, 64, 128, 256]),  # 32 rows for a single image, and no more
        ([[1, 2, 4, 8, 16, 32], [64, 128, 256]], [1, 2, 4, 8, 16, 32]),
        ([[1, 2, 4], [8, 16, 64], [32, 128], [256]], [32, 128]),
        ([[1, 3, 5], [2, 4]], [1, 3, 5]),
        ([[n] for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)], [32]),
        ([[1]], [1]),
        ([[64], [128]], [64]),  # nothing smaller was possible
    ],
)
def test_largest_invariant_set_includes_a_padded_single(alike: list[list[int]], expected: list[int]) -> None:
    assert largest_invariant_set(outs(*alike)) == expected


def test_numbers_that_are_not_finite_are_like_no_others() -> None:
    assert largest_invariant_set({n: torch.full((n, 1), torch.nan) for n in (4, 2, 1)}) == [4]
