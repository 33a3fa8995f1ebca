"""Counter-based random numbers: noise is a function of (seed, index, step), never of what ran before.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), computed in int64 so that
the same code runs on every torch device; on the CPU numpy takes fewer operations. The key is the 64-bit seed; the
counter is (block, step, image index, purpose).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NOISE, CLASS = 0, 1  # the fourth counter word: what the numbers are for

Word = TypeVar("Word", Tensor, int)
Doubles = NDArray[np.float64]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIER_COLUMN = np.array(_MULTIPLIERS, np.uint64).reshape(2, 1, 1)
_WEYL_COLUMN = np.array(_WEYL, np.uint32).reshape(2, 1, 1)
_HIGH = int(sys.byteorder == "little")  # which half of an uint64 in memory


def philox(counter: Sequence[Word], key: Sequence[Word]) -> tuple[Word, Word, Word, Word]:
    """Philox-4x32-10: four counter words and two key words → four random words.

    All are ints in [0, 2³²), or int64 tensors of such that broadcast against each other. The product of two
    words overflows int64, which wraps: the low 64 bits, all that is needed, are right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def normals(
    seeds: Sequence[int],
    indices: Sequence[int],
    steps: Sequence[int],
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise, float32 [N, *shape]: row i depends on (seeds[i], indices[i], steps[i]) alone.

    Step 0 is x_T. Box-Muller in float64 on u = (word + ½)·2⁻³², all four words of a block used, elements in
    C, H, W order. Seeds are in [0, 2⁶⁴), indices and steps in [0, 2³²).
    """
    words = [[s & _WORD, s >> 32, i, t] for s, i, t in zip(seeds, indices, steps, strict=True)]
    return normals_of(torch.tensor(words, dtype=torch.int64, device=device).reshape(-1, 4), shape)


def normals_of(words: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The same of words int64 [N, 4] on a device: the seed's low and high word, index and step. On another one than the
    CPU the host has no part in it, so it can be in a CUDA graph."""
    size = math.prod(shape)
    blocks = (size + 3) // 4
    if words.device.type == "cpu":
        even, odd = (torch.from_numpy(draws) for draws in draws_on_host(words.numpy(), blocks))
    else:
        low, high, index, step = words.reshape(-1, 4, 1).unbind(1)
        block = torch.arange(blocks, device=words.device).expand(len(words), -1)
        draws = philox((block, step, index, torch.full_like(index, NOISE)), (low, high))
        even, odd = torch.stack(draws[0::2]).double(), torch.stack(draws[1::2]).double()
    r = even.add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    phi = odd.add_(0.5).mul_(2.0**-32).mul_(2.0 * math.pi)
    z = torch.empty(len(words), blocks, 2, 2, device=words.device)
    z[..., 0] = (r * torch.cos(phi)).permute(1, 2, 0)
    z[..., 1] = (r * phi.sin_()).permute(1, 2, 0)
    return z.reshape(len(words), 4 * blocks)[:, :size].reshape(-1, *shape).contiguous()


def draws_on_host(words: NDArray[np.int64], blocks: int) -> tuple[Doubles, Doubles]:
    """`philox` of every block of every row: words 0 and 2, and words 1 and 3, each [2, N, blocks].

    Both products of a round are one array, whose high and low words are views: a third of the operations.
    """
    rows = words.T[:, :, None]
    even, odd = np.empty((2, len(words), blocks), np.uint64), np.empty((2, len(words), blocks), np.uint32)
    even[0], even[1], odd[0], odd[1] = np.arange(blocks), rows[2], rows[3], NOISE
    key = rows[:2].astype(np.uint32)
    for _ in range(10):
        product = (even * _MULTIPLIER_COLUMN).view(np.uint32).reshape(*even.shape, 2)[::-1]
        even = (product[..., _HIGH] ^ odd ^ key).astype(np.uint64)
        odd = product[..., 1 - _HIGH]
        key += _WEYL_COLUMN
    return even.astype(np.float64), odd.astype(np.float64)


def normal(seed: int, index: int, step: int, shape: tuple[int, ...]) -> Tensor:
    """The noise of one image at one step, float32 [*shape] on the CPU. See `normals`."""
    return normals([seed], [index], [step], shape)[0]


def between(seeds: tuple[int, int], index: int, n: int, shape: tuple[int, ...]) -> Tensor:
    """n ≥ 2 times x_T on the way from one seed's to another's, both ends included, float32 [n, *shape] on the CPU.

    A quarter of a great circle, as if the two were orthogonal (independent noise nearly is): so each is standard normal
    for its own sake. Different seeds.
    """
    first, last = (normal(seed, index, 0, shape) for seed in seeds)
    angles = [math.pi / 2 * i / (n - 1) for i in range(1, n - 1)]
    return torch.stack([first, *(math.cos(angle) * first + math.sin(angle) * last for angle in angles), last])


def draw_class(seed: int, index: int, num_classes: int) -> int:
    """The class of image `index` of `seed` when none was asked for: uniform over [0, num_classes)."""
    word = philox((0, 0, index, CLASS), (seed & _WORD, seed >> 32))[0]
    return (word * num_classes) >> 32
