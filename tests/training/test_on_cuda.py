"""Training on a GPU that is not there: see `tests.fake_cuda`. The backward pass is not run: it needs a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.ema import EMA
from model.unet import UNetConfig
from tests.fake_cuda import CUDA, FakeCuda, fake_cuda
from tests.networks import randomised
from training import gpu as training_gpu
from training import parallel
from training.batches import Batches
from training.config import TrainConfig, torch_device
from training.data import Images
from training.parallel import Ranks
from training.train import machine


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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_attention_gets_what_fused_kernels_take(
    gpu: FakeCuda, tiny_config: UNetConfig, layout: torch.memory_format, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash, memory-efficient and cuDNN attention all want the numbers of a row side by side."""
    given: list[tuple[Tensor, ...]] = []
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: (given.append(qkv), real(*qkv))[1])
    network = randomised(tiny_config).train().to(CUDA, memory_format=layout)
    x, t = torch.zeros(2, 1, 8, 8, device=CUDA), torch.zeros(2, dtype=torch.int64, device=CUDA)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        network(x.contiguous(memory_format=layout), t, t)
    assert len(given) == 4  # attention on one level and in the middle
    for z in (z for qkv in given for z in qkv):
        assert z.stride(3) == 1
        assert z.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def test_averages_of_all_weights_move_together(gpu: FakeCuda, tiny_config: UNetConfig) -> None:
    network = randomised(tiny_config).to(CUDA)
    ema, counts = EMA(network, 0.999, 0.9999), torch.ones((), dtype=torch.bool, device=CUDA)
    gpu.record(lambda: ema.update(counts))
    moves = {name: count for name, count in gpu.recordings[0].operators.items() if "_foreach" in name or "lerp" in name}
    assert moves == {f"aten._foreach_{name}": 2 for name in ("sub.List", "mul_.Tensor", "add_.List")}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_products_are_rounded_to_tf32_where_that_is_asked_for(gpu: FakeCuda, precision: str) -> None:
    config = TrainConfig(precision=precision)
    torch.backends.cudnn.allow_tf32 = True  # torch's default
    device = torch_device("cuda")
    assert not torch.backends.cudnn.allow_tf32, "for samples and evaluations, whose fp32 is fp32"
    training_gpu.set_up(config, device)
    is_rounded = precision == "tf32"
    assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == is_rounded
    assert ("TF32" in machine(device, Ranks())) == is_rounded


def test_tf32_is_refused_where_there_is_none(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(precision="tf32")
    with pytest.raises(ValueError, match="is for GPUs, and the device is cpu"):
        training_gpu.set_up(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match="has none"):
        training_gpu.set_up(config, CUDA)
