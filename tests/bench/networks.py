"""The two networks that are timed, each three times: ours, diffusers', and ours with the original's attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model.convert.exporter import renamed, unet_json
from model.nn.config import UNetConfig
from model.nn.layers import Attention
from model.nn.unet import UNet
from tests.bench.timing import Candidate

CONFIGS = {
    "mnist": UNetConfig(
        image_channels=1,
        image_size=(28, 28),
        base_channels=32,
        channel_mults=(1, 2, 2),
        attention_levels=(1,),
        time_emb_dim=128,
        dropout=0.0,
    ),
    "cifar10": UNetConfig(),  # Ho et al.'s: 35.7M parameters, attention at 16 × 16, dropout 0.1
}


def ours(config: UNetConfig, device: torch.device) -> UNet:
    """A network with no zeros in it: fresh ones have zero convolutions, and multiply by nothing."""
    torch.manual_seed(0)
    network = UNet(config)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return network.to(device)


def of_diffusers(network: UNet) -> UNet2DModel:
    """diffusers' network of the same architecture and weights. Raises AssertionError where it says something else."""
    twin = UNet2DModel.from_config(unet_json(network.config))
    twin.load_state_dict(renamed(network.config, dict(network.state_dict())))
    twin.to(network.init_conv.weight.device)
    agree(network, lambda x, t: twin(x, t).sample, twin)
    return twin


class ExplicitAttention(nn.Module):
    """The original's: two batched matrix products and a softmax between them, all of it in memory."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = attention.norm, attention.qkv, attention.out

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)  # [N, HW, C] each
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * c**-0.5, dim=2)
        y = torch.bmm(weights, v).transpose(1, 2).reshape(n, c, h, w)
        out: Tensor = self.out(y) + x
        return out


def of_original(network: UNet) -> UNet:
    """The same network with `ExplicitAttention`."""
    twin = copy.deepcopy(network)
    for block in twin.modules():
        for name, child in block.named_children():
            if isinstance(child, Attention):
                setattr(block, name, ExplicitAttention(child))
    agree(network, twin, twin)
    return twin


@torch.no_grad()
def agree(network: UNet, other: Callable[[Tensor, Tensor], Tensor], module: nn.Module) -> None:
    """Raises AssertionError where `other`, a call of `module`, is not the function that `network` is."""
    training = network.training, module.training
    network.eval(), module.eval()
    device = network.init_conv.weight.device
    x, t = torch.randn(2, *network.config.image_shape, device=device), torch.tensor([3, 700], device=device)
    torch.testing.assert_close(other(x, t), network(x, t), rtol=1e-3, atol=1e-3)  # a GPU multiplies in TF32
    network.train(training[0]), module.train(training[1])


TWINS = {"ours": copy.deepcopy, "diffusers": of_diffusers, "original": of_original}

Maker = Callable[[nn.Module, set[str]], Callable[[], object]]
"""(network, options) → what is timed."""


def candidates(names: str, base: UNet, makers: dict[str, Maker], options: Collection[str]) -> list[Candidate]:
    """One for each of `names`, such as ours+bf16, each with a network of its own."""
    result = []
    for name in names.split(","):
        who, *chosen = name.split("+")
        if who not in makers or not set(options).issuperset(chosen):
            raise SystemExit(f"{name!r}: it must be {', '.join(makers)}, with any of +{', +'.join(options)} behind it")
        result.append(Candidate(name, makers[who](TWINS[who](base), set(chosen))))
    return result


def flops(network: UNet, images: int, backward: bool) -> float:
    """Of one call: convolutions and matrix products only."""
    x = torch.randn(2, *network.config.image_shape, device=network.init_conv.weight.device)
    with FlopCounterMode(display=False) as counter:
        out = network(x, torch.tensor([3, 700], device=x.device))
        if backward:
            out.square().mean().backward()
    network.zero_grad()
    return counter.get_total_flops() * images / len(x)
