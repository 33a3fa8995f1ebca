"""Data parallel training under `torchrun`: every process trains on its slice of one global batch."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training.run.config import torch_device

T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process, number `rank` of `size`. Every method is called by all of them together."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, prints and averages."""
        return self.rank == 0

    def shard(self, batch: Tensor) -> Tensor:
        """This process's part [N / size, …] of a global batch [N, …]."""
        each = len(batch) // self.size
        return batch[self.rank * each : (self.rank + 1) * each]

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x / self.size

    def any(self, flag: bool) -> bool:
        """Whether it is true of one of them. The host waits for the other hosts, not for the device."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def broadcast(self, value: T) -> T:
        """The first process's `value`."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wrap_ddp(self, network: nn.Module) -> nn.Module:
        """A network whose gradient is the mean over the processes, and whose weights are the first one's."""
        if self.size == 1:
            return network
        # Statistics of a batch norm are each process's own; the first one's are saved
        new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.13
        return DistributedDataParallel(network, **{"forward_sync_buffers" if new else "broadcast_buffers": False})


def no_sync(network: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Within it the gradient of a network of `wrap_ddp` stays this process's own: more parts of the batch follow."""
    if skip and isinstance(network, DistributedDataParallel):
        context: AbstractContextManager[None] = network.no_sync()
        return context
    return nullcontext()


def own_device(name: str) -> torch.device:
    """This process's under torchrun. No other GPU is used, not even to see whether it is there: that takes memory."""
    if name != "cuda" and not (name == "auto" and torch.cuda.is_available()):
        if name.startswith("cuda"):
            raise ValueError(f"--device {name}: each process has its own under torchrun; --device cuda will do")
        return torch_device(name)
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ValueError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs of this machine")
    torch.cuda.set_device(local)
    return torch_device(f"cuda:{local}")


@contextmanager
def init_distributed(device_name: str) -> Iterator[tuple[DistributedContext, torch.device]]:
    """The processes that `torchrun` started, or this one alone, and its device (cuda:i for the i-th of a machine).

    Raises ValueError where the device cannot be had.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield DistributedContext(), torch_device(device_name)
        return
    device = own_device(device_name)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield DistributedContext(dist.get_rank(), dist.get_world_size()), device
    dist.destroy_process_group()  # not after an error: torchrun ends the others, who may wait for this one


def exit_now(code: int) -> int:
    """Ends a process of `torchrun`, without what Python does at its end; returns `code` in one that runs alone.

    Threads of gloo's outlive the process group. One that still has something to free then asks for Python's lock, which
    aborts the process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
