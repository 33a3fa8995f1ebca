"""The U-Net on a GPU: PyTorch's own kernels, and how calls of them are recorded as CUDA graphs.

A small batch takes the GPU less time than Python needs to launch its kernels, one by one. A graph has them all, for one
number of rows, and is one launch (PyTorch's notes on CUDA, "CUDA CUDAGraphRunner", whose rules are followed here).
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.diffusion import Network
from model.nn.networks import AnyUNet

# Group norm by `ChannelsLastGroupNorm`. `tests.bench.gpu` times both, and says with which numbers of rows they give the
# same bits: PyTorch's norm sums each group in one block of threads, whatever the rows, so it stays until that is known.
CHANNELS_LAST_NORM = False
WARM_UPS = 3  # calls before a recording: they choose kernels, load them, and reserve what libraries need

Record = Callable[[Callable[[], None]], Callable[[], None]]
"""A call that reads and writes memory which stays where it is → what repeats it on whatever is there then. The call
itself runs, too, and more than once."""


def use_tf32(on: bool) -> None:
    """Whether this process's GPUs may round the factors of float32 products to TF32, with 10 bits of mantissa.

    Torch's own default is yes for convolutions and no for matrices. It is faster, from Ampere on.
    """
    torch.backends.cudnn.allow_tf32 = on
    torch.backends.cuda.matmul.allow_tf32 = on


class ChannelsLastGroupNorm(nn.GroupNorm):
    """Group norm of x [N, C, H, W] whose channels are last, and stay there; float32 out, as PyTorch's under autocast.

    PyTorch's own, on a GPU, copies x to where its channels are first, and the next convolution copies it back. Here two
    sums, of x and of its square, make a scale and a shift for each channel, and x is read once more.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        lines, size = (n, h, self.num_groups, -1), h * w * c // self.num_groups
        with torch.autocast(x.device.type, enabled=False):
            v = x.permute(0, 2, 3, 1)  # no copy
            # Line by line, then the lines: a GPU shares a long sum out by how many there are, which changes its bits.
            total = v.sum(2, dtype=torch.float32).view(lines).sum((1, 3))
            length = torch.linalg.vector_norm(v, dim=2, dtype=torch.float32)
            square = torch.linalg.vector_norm(length.view(lines), dim=(1, 3)).square()
            mean = total / size
            deviation = torch.addcmul(square / size, mean, mean, value=-1).clamp(min=0).add(self.eps).rsqrt()
            scale = deviation[:, :, None] * self.weight.view(self.num_groups, -1)
            shift = torch.addcmul(self.bias.view(self.num_groups, -1), mean[:, :, None], scale, value=-1)
            out = torch.addcmul(shift.view(n, 1, 1, c), v, scale.view(n, 1, 1, c))
        return out.permute(0, 3, 1, 2)


def keep_channels_last(network: nn.Module) -> None:
    """Puts a ChannelsLastGroupNorm in the place of every group norm, with its weights."""
    for module in list(network.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.GroupNorm:
                replaced = ChannelsLastGroupNorm(norm.num_groups, norm.num_channels, norm.eps, device="meta")
                replaced.weight, replaced.bias = norm.weight, norm.bias
                setattr(module, name, replaced.train(norm.training))


def autocast_network(
    network: AnyUNet, device: torch.device, dtype: torch.dtype, channels_last_norm: bool | None = None
) -> Network:
    """See `compile_for_inference`. Nothing in a call waits for the device, or a graph could not be made of it.

    The network is moved to the device. What autocast would round at every call is rounded once. `channels_last_norm`:
    see `ChannelsLastGroupNorm` (None: as CHANNELS_LAST_NORM says).
    """
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if CHANNELS_LAST_NORM if channels_last_norm is None else channels_last_norm:
        keep_channels_last(network)
    half = dtype == torch.bfloat16
    if half:
        for part in network.body:
            for layer in part.modules():
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    layer.to(dtype)
    if device.type == "cuda":
        use_tf32(False)  # where the precision is fp32, it is
        torch.backends.cudnn.deterministic = True  # for seeds: no kernel whose sums come in any order

    @torch.inference_mode()
    def forward(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        # Without its cache, whose tensors would belong to the graph that they were made in.
        with torch.autocast(device.type, torch.bfloat16, enabled=half, cache_enabled=False):
            out: Tensor = network(x.contiguous(memory_format=torch.channels_last), t, y)
        return out.float()

    return forward


class CudaRecorder:
    """Records calls as CUDA graphs with one private pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
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
                    run()
            finally:
                if collects:
                    gc.enable()
        torch.cuda.current_stream().wait_stream(side)
        replay: Callable[[], None] = graph.replay
        return replay
