"""Training on a GPU that is not there: see `tests.fake_cuda`. The backward pass is not run: it needs a device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.diffusion import GaussianDiffusion
from model.nn.config import UNetConfig
from model.nn.ema import EMA
from tests.fake_cuda import CUDA, FakeCuda, fake_cuda
from tests.networks import randomised
from training.data import Images
from training.data.batches import Batches
from training.loop import distributed
from training.loop import gpu as training_gpu
from training.loop.distributed import DistributedContext
from training.loop.optimizer import step
from training.loop.rollback import rollback
from training.loop.state import TrainState
from training.loop.validation import chosen, validation_loss
from training.run.config import TrainConfig, torch_device
from training.train import machine


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def pictures(count: int = 64) -> Images:
    return Images(torch.zeros(count, 3, 8, 8, dtype=torch.uint8), torch.arange(count) % 3, ("a", "b", "c"), "pictures")


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_batches_are_on_the_gpu(gpu: FakeCuda, device: str, resident: bool) -> None:
    config = TrainConfig(batch_size=8, use_labels=True, label_dropout=0.3, flip=True)
    batches = Batches(pictures(), config, DistributedContext(), torch.device(device), resident)
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
    real = distributed.torch_device
    monkeypatch.setattr(distributed, "torch_device", lambda name: (used.append(name), real(name))[1])
    assert distributed.own_device(name) == torch.device("cuda", 1)
    assert used == [1, "cuda:1"]
    assert distributed.own_device("cpu") == torch.device("cpu")


@pytest.mark.slow
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
    assert ("TF32" in machine(device, DistributedContext())) == is_rounded


def test_tf32_is_refused_where_there_is_none(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(precision="tf32")
    with pytest.raises(ValueError, match="is for GPUs, and the device is cpu"):
        training_gpu.set_up(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    with pytest.raises(ValueError, match="has none"):
        training_gpu.set_up(config, CUDA)


TINY: dict[str, Any] = {"base_channels": 12, "channel_mults": (1, 2), "num_res_blocks": 1, "time_emb_dim": 16}
RUNS: dict[str, dict[str, Any]] = {
    "bf16, losses by timestep": {"precision": "bf16", "timestep_sampler": "loss_second_moment", "grad_clip": 1.0},
    "fp32, batch norm, learned variance": {"norm": "bn", "variance": "learned_range", "channels_last": False},
    "adamw, two averages": {"optimizer": "adamw", "weight_decay": 1e-4, "ema_decay": (0.99, 0.9)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_no_step_of_training_waits_for_the_gpu(gpu: FakeCuda, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of training.train, with a made-up gradient; then what is saved, loaded and validated."""
    monkeypatch.setattr("training.loop.validation.VALIDATION_IMAGES", 64)
    config = TrainConfig(**TINY | {"batch_size": 8, "use_labels": True, "label_dropout": 0.3} | RUNS[name])
    training_gpu.set_up(config, CUDA)
    assert torch.backends.cudnn.benchmark == config.channels_last
    images, diffusion = pictures(), GaussianDiffusion(config.diffusion()).to(CUDA)
    batches, now = Batches(images, config, DistributedContext(), CUDA, True), TrainState(config, (3, 8, 8), 3, CUDA)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    assert all(p.is_contiguous(memory_format=layout) for p in now.network.parameters() if p.dim() == 4)
    batches[0]  # copies the epoch's order
    gpu.waits.clear()
    with torch.no_grad():
        for i in range(2):
            batch, before = batches[i], [tensor.clone() for tensor in now.buffers_changed()]
            assert batch.x0.is_contiguous(memory_format=layout)
            t, weights = now.timesteps(batch.u)
            with torch.autocast("cuda", torch.bfloat16, enabled=config.precision == "bf16"):
                losses = diffusion.loss(now.network, batch.x0, batch.y, t, batch.noise)
            for parameter in now.network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            if now.importance:
                now.importance.update(t, losses)
            finite = step(now.optimizer, 1e-3, config.grad_clip)
            rollback(now.buffers_changed(), before, finite)
            now.ema.update(finite)
            now.tally.add((losses * weights).mean(), finite)
    assert not gpu.waits
    for moments in now.optimizer.state.values():
        assert moments["exp_avg"].device == CUDA
    TrainState(config, (3, 8, 8), 3, CUDA).load_state_dict(now.state_dict())
    assert len(validation_loss(now.network.eval(), diffusion, chosen(images, CUDA), config.precision)) == 4
    now.tally.read(DistributedContext(), 1)
