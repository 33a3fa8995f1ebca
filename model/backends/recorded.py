"""A packed network's calls, recorded once for each shape and played without Python.

A small network's call on a CPU is hundreds of operations of some 20 µs. Python takes a tenth of it to ask for them and
holds its lock meanwhile, so two threads that run the same network wait for one another. TorchScript's interpreter asks
for the same operations and needs no lock. It is deprecated, but nothing else that torch has does this without a
compiler. A large network's operations take so long that this is no gain.
"""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from model.backends.packed_conv import PackedConv

log = logging.getLogger("ddpm.model")

MOST_SHAPES = 64  # that are recorded; the others run operation by operation
LONGEST_S = 0.1  # of a call that is recorded, of the processor's time
PLAYS = 2  # until the interpreter has seen and simplified a recording


class PackedNetwork(Protocol):
    """What is recorded: only `forward` is."""

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """What the blocks add for timesteps t [N] and classes y [N], [N, width]."""

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """x [N, C, H, W] float32 → as x, or with the learned variance's channels too."""


class RecordedNetwork:
    """`network` as a function of x [N, C, H, W], t [N], y [N] or None.

    A shape of x that comes a second time is recorded if that call is short: making a recording takes four. It must give
    the same bits; if it doesn't, or can't be made, the network runs operation by operation from then on, and the log
    says so. Threads may call it.
    """

    def __init__(self, network: PackedNetwork) -> None:
        self.network = network
        self._lock = threading.Lock()
        self._calls: Counter[torch.Size] = Counter()
        self.recordings: dict[torch.Size, Callable[..., Tensor]] = {}  # by the shape of x
        self._weights: tuple[Tensor, ...] = ()
        self._works = True

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        embedded = self.network.embed(t, y)
        if recording := self.recordings.get(x.shape):
            return recording(x, embedded, *self._weights)
        began = time.thread_time()
        out = self.network.forward(x, embedded)
        is_long = time.thread_time() - began > LONGEST_S
        if self._works and len(self.recordings) < MOST_SHAPES:
            with self._lock:
                self._calls[x.shape] += 1
                if self._calls[x.shape] == 2 and not is_long:
                    self._record(x, embedded, out)
        return out

    def record(self, x: Tensor, t: Tensor, y: Tensor | None) -> bool:
        """Calls it once more. Whether calls of this shape are recorded now."""
        self(x, t, y)
        return x.shape in self.recordings

    def _record(self, x: Tensor, embedded: Tensor, out: Tensor) -> None:
        convs = list(_convolutions(self.network))
        self._weights = weights = tuple(conv.weight for conv in convs)

        def forward(x: Tensor, embedded: Tensor, *weights: Tensor) -> Tensor:
            for conv, weight in zip(convs, weights, strict=True):
                conv.weight = weight  # a packed one can be an argument of a recording, but not a constant
            return self.network.forward(x, embedded)

        arguments = (x, embedded, *weights)
        try:
            with warnings.catch_warnings(action="ignore"):  # of deprecation, and that sizes are taken as they are
                recording = trace(forward, arguments)
            if not all(torch.equal(recording(*arguments), out) for _ in range(PLAYS)):
                raise RuntimeError("a recording gives other bits")
        except Exception as error:
            self._works = False
            log.warning("the network's calls can't be recorded: slower", exc_info=error)
        else:
            self.recordings[x.shape] = recording
        finally:
            for conv, weight in zip(convs, weights, strict=True):
                conv.weight = weight


def trace(function: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """As `torch.jit.trace`, which keeps every recording for as long as the process, and the weights with it."""
    graph, _ = torch._C._create_graph_by_tracing(function, arguments, lambda value: "", True, False, None, [])
    return torch._C._create_function_from_graph("forward", graph)


def _convolutions(part: Any) -> Iterator[PackedConv]:
    """All of a packed network, in one order."""
    if isinstance(part, PackedConv):
        yield part
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _convolutions(each)
    elif type(part).__module__.startswith("model.backends."):
        for each in vars(part).values():
            yield from _convolutions(each)
