"""Counter-based random numbers: noise is a function of (seed, index, step), never of what ran before.

Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), computed in int64 so that
the same code runs on every torch device. The key is the 64-bit seed; the counter is (block, step, image
index, purpose).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

NOISE, CLASS = 0, 1  # the fourth counter word: what the numbers are for

Word = TypeVar("Word", Tensor, int)

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


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
    """The same of words int64 [N, 4] on a device: the seed's low and high word, index and step. The host has no part
    in it, so it can be in a CUDA graph."""
    size = math.prod(shape)
    low, high, index, step = words.reshape(-1, 4, 1).unbind(1)
    block = torch.arange((size + 3) // 4, device=words.device).expand(len(words), -1)
    draws = philox((block, step, index, torch.full_like(index, NOISE)), (low, high))
    u = [(word.double() + 0.5) * 2.0**-32 for word in draws]
    pairs = []
    for radius, angle in ((u[0], u[1]), (u[2], u[3])):
        r, phi = torch.sqrt(-2.0 * torch.log(radius)), (2.0 * math.pi) * angle
        pairs += [r * torch.cos(phi), r * torch.sin(phi)]
    z = torch.stack(pairs, dim=-1).flatten(1)[:, :size]
    return z.float().reshape(-1, *shape)


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
