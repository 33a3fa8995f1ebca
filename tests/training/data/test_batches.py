from dataclasses import replace

import pytest
import torch

from training.data import DataError, Images
from training.data.batches import Batch, Batches, fits
from training.loop.distributed import DistributedContext
from training.run.config import TrainConfig

CPU = torch.device("cpu")
CONFIG = TrainConfig(batch_size=12, use_labels=True, label_dropout=0.3, flip=True)


def pictures(count: int = 100) -> Images:
    """Every image differs from every other, and from itself mirrored."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return Images(images, torch.arange(count) % 3, ("a", "b", "c"), "pictures")


def equal(a: Batch, b: Batch) -> bool:
    assert a.y is not None
    assert b.y is not None
    return all(torch.equal(x, y) for x, y in ((a.x0, b.x0), (a.y, b.y), (a.noise, b.noise), (a.u, b.u)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_batch_that_one_would_see(size: int) -> None:
    whole = Batches(pictures(), CONFIG, DistributedContext(), CPU)
    parts = [Batches(pictures(), CONFIG, DistributedContext(rank, size), CPU) for rank in range(size)]
    for i in range(20):
        one, several = whole[i], [batches[i] for batches in parts]
        x0, y, noise = (torch.cat([getattr(p, name) for p in several]) for name in ("x0", "y", "noise"))
        assert equal(one, Batch(x0, y, noise, several[0].u))
        assert all(torch.equal(one.u, p.u) for p in several)


def test_dropout_differs_by_process_and_is_reproducible() -> None:
    def dropped(rank: int, size: int, iteration: int) -> list[float]:
        Batches(pictures(), CONFIG, DistributedContext(rank, size), CPU)[iteration]
        return torch.rand(4).tolist()

    assert dropped(0, 1, 5) == dropped(0, 1, 5) == dropped(0, 2, 5)
    assert dropped(0, 2, 5) != dropped(1, 2, 5)
    assert dropped(0, 1, 5) != dropped(0, 1, 6)


def test_a_batch_depends_on_seed_and_iteration_alone() -> None:
    batches = Batches(pictures(), CONFIG, DistributedContext(), CPU)
    first = batches[3]
    batches[40]
    torch.manual_seed(7)
    assert equal(batches[3], first)
    assert not equal(batches[4], first)
    other = Batches(pictures(), replace(CONFIG, seed=1), DistributedContext(), CPU)[3]
    assert not torch.equal(other.noise, first.noise)
    assert not torch.equal(other.x0, first.x0)


def test_images_that_do_not_fit_are_copied_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device here is the CPU's stand-in for a GPU: what is elsewhere comes by way of pinned memory."""
    resident = Batches(pictures(), CONFIG, DistributedContext(), CPU)[2]
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (pinned.append(len(tensor)), tensor)[1])
    away = Batches(pictures(), CONFIG, DistributedContext(), torch.device("cpu", 0), resident=False)
    assert equal(away[2], resident)
    assert pinned == [12, 12]


def test_a_gpu_holds_at_most_half_of_its_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
    assert fits(500, torch.device("cuda"))
    assert not fits(501, torch.device("cuda"))
    assert fits(10**15, CPU)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "message"),
    [
        (101, 1, 1, "--batch_size 101, but only 100 images"),
        (12, 1, 5, "must be a multiple of the 5 processes of torchrun"),
        (12, 4, 2, "must be a multiple of the 2 processes of torchrun times --accumulate 4"),
    ],
)
def test_a_batch_that_cannot_be_had_is_refused(batch_size: int, accumulate: int, processes: int, message: str) -> None:
    config = TrainConfig(batch_size=batch_size, accumulate=accumulate)
    with pytest.raises((DataError, ValueError), match=message):
        Batches(pictures(), config, DistributedContext(0, processes), CPU)
