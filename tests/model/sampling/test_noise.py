"""Philox against its published vectors, and the layout of the noise against plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from model.sampling.noise import draw_class, draws_on_host, normal, normals, philox

MASK = 2**32 - 1


def reference_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox-4x32-10 in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        (high0, low0), (high1, low1) = divmod(0xD2511F53 * c[0], 2**32), divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) & MASK, (k[1] + 0xBB67AE85) & MASK]
    return c


def reference_noise(seed: int, index: int, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """The contract, element by element: blocks of four words, two Box-Muller pairs each."""
    values: list[float] = []
    for block in range(math.ceil(math.prod(shape) / 4)):
        words = reference_philox((block, step, index, 0), (seed & MASK, seed >> 32))
        u = [(word + 0.5) / 2**32 for word in words]
        for radius, angle in ((u[0], u[1]), (u[2], u[3])):
            r = math.sqrt(-2 * math.log(radius))
            values += [r * math.cos(2 * math.pi * angle), r * math.sin(2 * math.pi * angle)]
    return np.array(values[: math.prod(shape)]).reshape(shape)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123, "philox4x32 10"
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (MASK, MASK, MASK, MASK),
            (MASK, MASK),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_vectors(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    found = philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(word) for word in found) == words
    assert tuple(reference_philox(counter, key)) == words


def test_host_draws_the_words_of_other_devices() -> None:
    words = torch.tensor([[1, 2, 3, 4], [MASK, 0, MASK, 7], [0, MASK, 0, MASK]])
    low, high, index, step = words[:, :, None].unbind(1)
    draws = philox((torch.arange(50).expand(3, -1), step, index, torch.zeros_like(index)), (low, high))
    even, odd = draws_on_host(words.numpy(), 50)
    for word, drawn in zip(draws, (even[0], odd[0], even[1], odd[1]), strict=True):
        np.testing.assert_array_equal(drawn, word.numpy())


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 5, 7), (1, 1, 1)])
@pytest.mark.parametrize(
    ("seed", "index", "step"),
    [
        (0, 0, 0),
        (1, 2, 3),
        (2**32, 0, 1),
        (2**53 - 1, 63, 1000),
        (2**64 - 1, 2**32 - 1, 2**32 - 1),
        (19781057, 0, 0),  # its first word is 45: small enough for the ½ beside it to show
    ],
)
def test_noise_is_box_muller_of_philox_in_c_h_w_order(seed: int, index: int, step: int, shape: tuple[int, ...]) -> None:
    noise = normal(seed, index, step, shape)
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy(), reference_noise(seed, index, step, shape), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 5, 7)])
def test_noise_does_not_depend_on_the_batch(shape: tuple[int, int, int]) -> None:
    seeds, indices, steps = [5, 2**63 + 1, 5, 0, 5, 7, 8], [0, 1, 2, 3, 0, 9, 9], [0, 1, 0, 999, 4, 4, 0]
    together = normals(seeds, indices, steps, shape)
    alone = [normal(*key, shape) for key in zip(seeds, indices, steps, strict=True)]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(normals(seeds[::-1], indices[::-1], steps[::-1], shape), together.flip(0))


def test_noise_of_every_seed_index_and_step_is_its_own() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**32, 0, 0), (2**63, 0, 0)]
    noise = [normal(*key, (1, 8, 8)) for key in keys]
    distances = torch.cdist(torch.stack(noise).flatten(1), torch.stack(noise).flatten(1))
    assert distances[~torch.eye(len(keys), dtype=torch.bool)].min() > 5  # 8·√2 where they are independent


def test_noise_is_standard_normal() -> None:
    z = normals(range(40), [0] * 40, [1] * 40, (3, 32, 32)).double()
    assert z.mean().abs() < 0.01
    assert (z.std() - 1).abs() < 0.01
    assert ((z**4).mean() - 3).abs() < 0.1


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    normal(0, 0, 0, (1, 4, 4))
    draw_class(0, 0, 10)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [0, 12345, 2**53 - 1, 2**64 - 1])
def test_a_class_is_drawn_from_the_first_word_of_purpose_1(seed: int) -> None:
    for index in range(20):
        word = reference_philox((0, 0, index, 1), (seed & MASK, seed >> 32))[0]
        assert draw_class(seed, index, 10) == word * 10 // 2**32


def test_classes_are_drawn_uniformly() -> None:
    counts = np.bincount([draw_class(3, index, 10) for index in range(2000)], minlength=10)
    assert len(counts) == 10
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared, 9 degrees of freedom, p = 0.001
