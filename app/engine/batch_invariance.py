"""Numbers of rows that a network may run with: those at which a row comes out the same, to the last bit.

Kernels choose their order of summation by the number of rows, so an image could otherwise depend on who shares its
batch. Times play no part in the choice, or a restart could make another, and other images. On a CPU a call has one
thread, so the choice does not depend on how many threads there are, and no image does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.nn.networks import AnyUNet

GPU_MICRO_BATCH_SIZE = 256
GPU_POSITIONS = GPU_MICRO_BATCH_SIZE * 32 * 32  # of larger images fewer fill a GPU, and its memory
CPU_MICRO_BATCH_SIZE = 8  # twice as many would be 5 % faster a row; fewer and more calls share a busy machine better
OPENVINO_MICRO_BATCH_SIZES = (32, 8)  # of networks of less than SMALL_NETWORK parameters, and of others
SMALL_NETWORK = 10_000_000
DENSE_UP_TO = 16  # rows up to which a CPU tries all numbers: of more, few are filled up, and each try takes longer
MAX_PADDED_SINGLE = 32  # rows, at most, that a single image is filled up to where others agree on larger numbers only


def gpu_micro_batch_size(image_size: tuple[int, int]) -> int:
    """The most rows of a call where nobody says how many, a power of two; image_size is (height, width)."""
    fit = GPU_POSITIONS // math.prod(image_size)
    return min(GPU_MICRO_BATCH_SIZE, 1 << max(fit.bit_length() - 1, 0))


def default_micro_batch_size(network: AnyUNet, device: torch.device, runtime: str = "torch") -> int:
    """Most rows of a call, by what is known before anything is measured: images must not depend on a clock."""
    if device.type == "cuda":
        return gpu_micro_batch_size(network.config.image_size)
    if runtime == "torch":
        return CPU_MICRO_BATCH_SIZE
    is_small = sum(weights.numel() for weights in network.parameters()) < SMALL_NETWORK
    return OPENVINO_MICRO_BATCH_SIZES[0 if is_small else 1]


def split_rows(rows: int, sizes: list[int], workers: int) -> list[int]:
    """How many rows each call of a batch has, before it is filled up to one of `sizes` (ascending).

    As few calls as hold them, and as many for one worker as for another. The sizes give the same bits, so an image does
    not depend on how many workers there are.
    """
    calls = math.ceil(rows / sizes[-1])
    calls = min(rows, math.ceil(calls / workers) * workers)
    share, more = divmod(rows, calls)
    even = [share + 1] * more + [share] * (calls - more)
    if set(even).issubset(sizes):
        return even
    size = next(size for size in sizes if size >= even[0])
    return [size] * (rows // size) + [rows % size] * (rows % size > 0)


def candidate_batch_sizes(micro_batch_size: int, device: str) -> list[int]:
    """What is tried, largest first: all numbers, of the large ones every fourth; on a GPU, where each costs a graph,
    powers of two."""
    if device != "cuda":
        smaller = range(micro_batch_size - 1, 0, -1)
        return [micro_batch_size] + [rows for rows in smaller if rows <= DENSE_UP_TO or rows % 4 == 0]
    return [micro_batch_size] + [2**i for i in range(micro_batch_size.bit_length(), -1, -1) if 2**i < micro_batch_size]


def largest_invariant_set(outs: dict[int, Tensor]) -> list[int]:
    """Those that agree with one another, ascending; `outs` has the last rows of one batch, in each number.

    Of all such sets the one with the largest number, if a single image fits into `MAX_PADDED_SINGLE` rows there.
    """
    sizes = sorted(outs, reverse=True)
    for largest in sizes:
        same = [largest] + [n for n in sizes if n < largest and torch.equal(outs[n], outs[largest][-n:])]
        if same[-1] <= MAX_PADDED_SINGLE:
            break
    return same[::-1]


def take_last(size: int, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The last `size` rows."""
    return x[-size:], t[-size:], None if y is None else y[-size:]
