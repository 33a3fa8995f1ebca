"""Training on a GPU that is not there: see `tests.fake_cuda`. The backward pass is not run: it needs a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.fake_cuda import CUDA, FakeCuda, fake_cuda
from training import parallel
from training.batches import Batches
from training.config import TrainConfig, torch_device
from training.data import Images
from training.parallel import Ranks


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def pictures(count: int = 64) -> Images:
    return Images(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), torch.arange(count) % 3, ("a", "b", "c"), "pictures")


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_batches_are_on_the_gpu(gpu: FakeCuda, device: str, resident: bool) -> None:
    config = TrainConfig(batch_size=8, use_labels=True, label_dropout=0.3, flip=True)
    batches = Batches(pictures(), config, Ranks(), torch.device(device), resident)
    gpu.waits.clear()
    for i in range(3):
        batch = batches[i]
        assert {part.device for part in (batch.x0, batch.y, batch.noise, batch.u) if part is not None} == {CUDA}
    assert gpu.waits == ({"copy to the device": 1} if resident else {})  # the epoch's order


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_named_gpu_has_an_index(gpu: FakeCuda, name: str) -> None:
    assert torch_device(name) == TrainConfig(device=name).torch_device() == CUDA


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_a_process_of_torchrun_uses_no_gpu_but_its_own(
    gpu: FakeCuda, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    used: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    real = parallel.torch_device
    monkeypatch.setattr(parallel, "torch_device", lambda name: (used.append(name), real(name))[1])
    assert parallel.own_device(name) == torch.device("cuda", 1)
    assert used == [1, "cuda:1"]
    assert parallel.own_device("cpu") == torch.device("cpu")
