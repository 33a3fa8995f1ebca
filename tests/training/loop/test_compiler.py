"""--compile: the network is one graph, traced once, and learns the same; mostly by a backend without a C++ compiler."""

import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from model.nn.config import UNetConfig
from model.nn.layers import Upsample
from model.nn.unet import UNet
from training.loop.compiler import ChannelGroupNorm, check_gradient, compiled
from training.run.config import TrainConfig
from training.train import main, train

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own
]

Options = dict[str, Any]


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs that `compiled` makes, forward and backward traced, and fails where one is broken in two."""
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channel_group_norm_is_a_group_norm(dtype: torch.dtype) -> None:
    """Forward, and the gradients of input, weight and bias, for groups of one, two and twelve channels."""
    torch.manual_seed(0)
    for groups in (12, 6, 1):
        plain = nn.GroupNorm(groups, 12, eps=1e-3)
        nn.init.normal_(plain.weight)
        nn.init.normal_(plain.bias)
        norm, x = ChannelGroupNorm(deepcopy(plain)), (3 * torch.randn(2, 12, 5, 7) - 4).to(dtype)
        upstream, outcomes = torch.randn(2, 12, 5, 7).to(dtype), []
        for module in (plain, norm):
            z = x.clone().requires_grad_()
            y = module(z)
            y.backward(upstream)
            outcomes.append([y, z.grad, *(p.grad for p in module.parameters())])
        assert outcomes[1][0].dtype == dtype
        for ours, theirs in zip(outcomes[1], outcomes[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-3)])
def test_a_compiled_run_traces_one_graph_and_learns_the_same(
    precision: str, tolerance: float, tiny_options: Options, counter: CompileCounterWithBackend
) -> None:
    """With every draw that a step makes: classes left out, two parts a batch, under autocast."""
    options = tiny_options | {"label_dropout": 0.3, "accumulate": 2, "dropout": 0.0, "iterations": 4}
    config = TrainConfig(**options | {"precision": precision})
    plain = train(config)
    assert counter.frame_count == 0
    run = train(replace(config, compile=True, run_name="compiled"))
    assert counter.frame_count == 2  # the trial of the compiler, and the network, of which there is one graph
    a, b = (torch.load(folder / "state-0000004.pt", weights_only=True)["network"] for folder in (plain, run))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [{"image_size": (7, 10), "dropout": 0.1}, {"norm": "bn", "head_channels": 6}, {"num_classes": None, "norm": "in"}],
    ids=str,
)
def test_a_network_in_channels_last_is_one_graph_both_ways(
    more: Options, tiny_config: UNetConfig, counter: CompileCounterWithBackend
) -> None:
    torch.manual_seed(0)
    config = replace(tiny_config, channel_mults=(1,), attention_levels=(), null_class=False, **more)
    network = UNet(config).to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, *config.image_size).to(memory_format=torch.channels_last)
    t, y = torch.tensor([0, 999]), None if config.num_classes is None else torch.tensor([0, 2])
    model = compiled(network, torch.device("cpu"))
    for _ in range(2):
        model(x, t, y).square().mean().backward()
    assert counter.frame_count == 2
    assert network.out_conv.bias.grad is not None
    assert not any(isinstance(module, nn.GroupNorm) for module in network.modules())
    network.load_state_dict(UNet(config).state_dict())


@pytest.mark.slow
def test_a_network_is_one_graph_under_torchrun(
    tiny_config: UNetConfig, counter: CompileCounterWithBackend, tmp_path: Path
) -> None:
    """On a CPU, with buckets so small that a GPU's would be several."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        network = UNet(tiny_config)
        model = DistributedDataParallel(compiled(network, torch.device("cpu")), bucket_cap_mb=0.001)
        model(torch.randn(2, 1, *tiny_config.image_size), torch.tensor([0, 9]), torch.tensor([0, 2])).sum().backward()
    finally:
        dist.destroy_process_group()
    assert counter.frame_count == 2
    assert network.init_conv.weight.grad is not None


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_the_real_compilers_gradient_passes_the_doubling_of_pixels() -> None:
    """In bfloat16, where that of `F.interpolate` is 0, which is refused."""
    x = torch.randn(4, 8, 8, 8)

    def add_gradient(network: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            (network(x) - 1).float().square().mean().backward()

    def network(doubling: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), doubling, nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1))

    torch.compiler.reset()
    check_gradient(network(Upsample(8)), add_gradient)
    torchs = nn.Sequential(nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1))
    with pytest.raises(ValueError, match=r"--compile: the gradient of 0\.weight that this machine's compiler makes"):
        check_gradient(network(torchs), add_gradient)


def test_a_gradient_that_is_no_number_by_itself_is_no_fault_of_the_compiler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: network)
    x = torch.tensor([[float("nan")]])
    check_gradient(nn.Linear(1, 1), lambda network: network(x).sum().backward())
    assert "--compile: the first batch's gradient is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [0.0, 0.5, float("nan"), None], ids=str)
def test_a_wrong_gradient_is_refused_and_leaves_no_run(
    factor: float | None,
    tiny_options: Options,
    command_line: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a single parameter in the middle, or none for it, in a network that begins with zeros, and with dropout."""

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        if isinstance(function, UNet):
            weight = function.mid[0].conv_1.weight
            if factor is None:
                weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
            else:
                weight.register_hook(lambda gradient: factor * gradient)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    assert main([*command_line, "--dropout", "0.5", "--compile"]) == 2
    assert "--compile: the gradient of mid.0.conv_1.weight that this" in capsys.readouterr().err
    assert not list(Path(tiny_options["log_dir"]).rglob("config.json"))


def test_compile_without_a_compiler_is_refused_and_leaves_no_run(
    command_line: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_compiler(*_: object, **__: object) -> Callable[..., object]:
        def call(*_: object) -> object:
            raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert main([*command_line, "--compile"]) == 2
    err = capsys.readouterr().err
    assert "--compile needs a C++ compiler such as g++ for the device cpu, and it does not work: No working" in err
