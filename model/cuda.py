"""The U-Net on a GPU: PyTorch's own kernels, recorded as CUDA graphs.

A small batch takes the GPU less time than Python needs to launch its kernels, one by one. A graph has them all, for one
number of rows, and is one launch (PyTorch's notes on CUDA, "CUDA Graphs", whose rules are followed here).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model.unet import UNet

if TYPE_CHECKING:
    from model.inference import Forward

WARM_UPS = 3  # calls before a recording: they choose kernels, load them, and reserve what libraries need

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""A call → (what repeats it on whatever its inputs hold then, where its output is)."""


def autocast_network(network: UNet, device: torch.device, dtype: torch.dtype) -> Forward:
    """See `compile_for_inference`. Nothing in a call waits for the device, or a graph could not be made of it.

    The network is moved to the device. What autocast would round at every call is rounded once.
    """
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    half = dtype == torch.bfloat16
    if half:  # all but the first convolution: the embedding of time is computed in its precision
        for part in (network.downs, network.mid, network.ups, network.out_conv):
            for layer in part.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(dtype)
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = True  # for seeds: no kernel whose sums come in any order

    @torch.inference_mode()
    def forward(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        # Without its cache, whose tensors would belong to the graph that they were made in.
        with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            out: Tensor = network(x.contiguous(memory_format=torch.channels_last), t, y)
        return out.float()

    return forward


class Graphs:
    """A network, repeated by graphs for the numbers of rows that were captured; any other runs as ever (`eager`).

    For one thread at a time. Graphs share their memory: each output is copied before another graph runs.
    """

    def __init__(self, eager: Forward, record: Record) -> None:
        self.eager, self._record = eager, record
        self._inputs: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._graphs: dict[int, tuple[tuple[Tensor, Tensor, Tensor | None], Callable[[], None], Tensor]] = {}

    @property
    def rows(self) -> list[int]:
        """Numbers of rows that have a graph, ascending."""
        return sorted(self._graphs)

    @torch.inference_mode()
    def capture(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        """Makes the graph for so many rows of this shape; what is in them does not matter.

        The largest number comes first: the others use the head of its inputs, and its memory. Raises whatever a
        recording raises; the graphs that are there stay.
        """
        if self._inputs is None:
            self._inputs = torch.zeros_like(x), torch.zeros_like(t), None if y is None else torch.zeros_like(y)
        rows = len(x)
        assert rows <= len(self._inputs[0])
        all_x, all_t, all_y = self._inputs
        inputs = all_x[:rows], all_t[:rows], None if all_y is None else all_y[:rows]
        self._graphs[rows] = (inputs, *self._record(lambda: self.eager(*inputs)))

    @torch.inference_mode()
    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        if len(x) not in self._graphs:
            return self.eager(x, t, y)
        inputs, replay, out = self._graphs[len(x)]
        for place, value in zip(inputs, (x, t, y), strict=True):
            if place is not None:
                assert value is not None
                place.copy_(value)
        replay()
        return out.clone()


class CudaRecorder:
    """Records calls as CUDA graphs with one private pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Other threads may use the device meanwhile ("thread_local"). Raises what `run` or CUDA raises."""
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        # All recordings' stream, and not one for each: a library keeps working memory for every stream that it met.
        side = recording.capture_stream
        assert side is not None
        side.wait_stream(torch.cuda.current_stream())
        collects = gc.isenabled()
        with torch.cuda.stream(side):  # around it, since a recording that fails leaves its stream as the current one
            for _ in range(WARM_UPS):
                run()
            gc.disable()  # of garbage: an old graph that is destroyed now would spoil the new one
            try:
                with recording:
                    out = run()
            finally:
                if collects:
                    gc.enable()
        torch.cuda.current_stream().wait_stream(side)
        return graph.replay, out
