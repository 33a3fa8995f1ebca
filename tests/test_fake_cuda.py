"""The device that is not there does what a GPU does, and its recorder finds what a CUDA graph may not hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.fake_cuda import CUDA, FakeCuda, NotRecordable, fake_cuda

kept: list[Tensor] = []
host = torch.zeros(4)
FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "reads a number": (lambda x: x.sum().item(), "waits for the device"),
    "branches": (lambda x: bool((x > 0).any()), "waits for the device"),
    "looks for indices": (lambda x: torch.nonzero(x), "waits for the device"),
    "compares": (lambda x: torch.equal(x, x), "waits for the device"),
    "copies to the device": (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]).to(CUDA), "reads .4,. on cpu"),
    "copies a number to the device": (lambda x: x + torch.tensor(1.0, device=CUDA), "makes .. on cpu"),
    "copies to the host": (lambda x: x.cpu(), "makes"),
    "copies into the host's memory": (lambda x: host.copy_(x), "copy_.* reads"),
    "draws random numbers": (lambda x: torch.randn_like(x), "generator"),
    "drops out": (lambda x: torch.dropout(x, 0.1, True), "generator"),
    "leaves a tensor": (lambda x: kept.append(x + 1), "outlive"),
}


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    kept.clear()
    with fake_cuda() as device, torch.no_grad():
        yield device
    kept.clear()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_recording_with_a_fault_is_refused(gpu: FakeCuda, fault: str) -> None:
    run, why = FAULTS[fault]
    x = torch.zeros(4, device="cuda")
    with pytest.raises(NotRecordable, match=why):
        gpu.record(lambda: run(x))
    assert not gpu.recordings
    gpu.record(lambda: x.add_(1))
    assert gpu.recordings[0].operators == {"aten.add_.Tensor": 1}


def test_outside_recordings_only_what_a_gpu_refuses_fails(gpu: FakeCuda) -> None:
    x = torch.zeros(4, device="cuda")
    assert x.device == CUDA != torch.device("cuda")
    for allowed, _ in FAULTS.values():
        allowed(x)
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.zeros(4)
    with pytest.raises(AssertionError, match="index_copy_"):
        x.index_copy_(0, torch.arange(4, device="cuda"), x.double())
    with pytest.raises(RuntimeError, match="cannot pin"):
        x.pin_memory()
    with pytest.raises((RuntimeError, TypeError), match="numpy"):
        x.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(4, device="cuda", generator=torch.Generator())


def test_only_what_waits_for_the_device_counts_as_a_wait(gpu: FakeCuda) -> None:
    x, pinned, plain = torch.zeros(4, device="cuda"), torch.zeros(4, pin_memory=True), torch.zeros(4)
    x.copy_(pinned, non_blocking=True)
    pinned[1:3].copy_(x[1:3], non_blocking=True)
    plain.pin_memory().to("cuda", non_blocking=True)
    torch.rand(4, device="cuda", generator=torch.Generator("cuda")).mul_(x).sum()
    assert not gpu.waits
    x.copy_(pinned)
    x.copy_(plain, non_blocking=True)
    plain.copy_(x, non_blocking=True)
    assert x.cpu().tolist() == [1.0] * 4
    assert gpu.waits == {"copy to the device": 2, "copy to the host": 2}


def test_after_it_torch_has_no_gpu_again() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    with fake_cuda():
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic) == before
    if not torch.version.cuda:
        with pytest.raises((AssertionError, RuntimeError)):
            torch.zeros(1, device="cuda")
