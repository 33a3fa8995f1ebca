"""Muon for the matrices inside a network, AdamW for the rest of it, as one optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from training.loop.rollback import rollback

OUTER = ("init_conv", "out_conv")  # a network's first and last layer
MOMENTUM = "momentum_buffer"  # torch's name


class MuonAdamW:
    """Muon (Jordan 2024) for the kernels between the first and the last layer, each as a matrix [out, in·k·k].

    Embeddings, norms, biases, and the first and last layer stay with AdamW. An update of Muon's has the root mean
    square of 0.2 times the learning rate (Liu et al. 2025, "Muon is scalable for LLM training", §2.2), about that of
    AdamW's, so that one learning rate and one decay of the weights serve both. It looks like one of torch's
    optimizers to whoever calls it; `found_inf` and `grad_scale` mean what they mean to torch's fused ones.
    """

    found_inf: Tensor
    grad_scale: Tensor | None

    def __init__(self, network: nn.Module, learning_rate: float, weight_decay: float = 0.0) -> None:
        layers = {name: m for name, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        inner = {id(layer.weight) for name, layer in layers.items() if name not in OUTER}
        outer = {id(layers[name].weight) for name in OUTER if name in layers}
        self._kernels = [p for p in network.parameters() if id(p) in inner]
        self._matrices = [_matrix(kernel.detach()) for kernel in self._kernels]  # of the same memory
        rest = [p for p in network.parameters() if id(p) not in inner]
        self._muon = torch.optim.Muon(
            self._matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(
            [
                {"params": [p for p in rest if id(p) in outer], "weight_decay": weight_decay},
                {"params": [p for p in rest if id(p) not in outer], "weight_decay": 0.0},
            ],
            lr=learning_rate,
            fused=True,
        )
        self._is_on_cpu = all(kernel.device.type == "cpu" for kernel in self._kernels)
        for matrix in self._matrices:  # now, so that a first step that does not count has something to go back to
            self._muon.state[matrix][MOMENTUM] = torch.zeros_like(matrix)

    @property
    def parts(self) -> list[torch.optim.Optimizer]:
        """The two that it is made of."""
        return [self._adamw, self._muon]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As torch's optimizers have them, AdamW's first; those of Muon have views of the kernels."""
        return [*self._adamw.param_groups, *self._muon.param_groups]

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        parameters = [*self._kernels, *(p for group in self._adamw.param_groups for p in group["params"])]
        return [p.grad for p in parameters if p.grad is not None]

    @torch.no_grad()
    def step(self) -> None:
        """One of each, and none where `found_inf`, float [], is not 0; nothing waits for the device to find out."""
        self._adamw.found_inf, self._adamw.grad_scale = self.found_inf, self.grad_scale  # type: ignore[attr-defined]
        self._adamw.step()
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.grad = None if kernel.grad is None else _matrix(kernel.grad, like=kernel)
            if matrix.grad is not None and self.grad_scale is not None:
                matrix.grad = matrix.grad / self.grad_scale
        if not self._is_on_cpu:
            self._step_and_go_back()
        elif self.found_inf == 0:
            self._muon.step()
        for matrix in self._matrices:
            matrix.grad = None

    def _step_and_go_back(self) -> None:
        """A step of Muon's that the device undoes where it does not count."""
        changing = [*self._matrices, *(self._muon.state[matrix][MOMENTUM] for matrix in self._matrices)]
        before = [tensor.clone() for tensor in changing]
        self._muon.step()
        rollback(changing, before, self.found_inf == 0)

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self._adamw.zero_grad()
        for kernel in self._kernels:
            kernel.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Both, by name; Muon's momentum has the shape of the kernels, however these lie in memory."""
        muon = self._muon.state_dict()
        state = {i: {MOMENTUM: _kernel(muon["state"][i][MOMENTUM], k)} for i, k in enumerate(self._kernels)}
        return {"adamw": self._adamw.state_dict(), "muon": muon | {"state": state}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`; one of before 2026-12 has matrices, and is of kernels that lay as here."""
        muon, momenta = state["muon"], {}
        for i, kernel in enumerate(self._kernels):
            saved = muon["state"][i][MOMENTUM]
            momenta[i] = {MOMENTUM: _matrix(saved, kernel) if saved.shape == kernel.shape else saved}
        self._adamw.load_state_dict(state["adamw"])
        self._muon.load_state_dict(muon | {"state": momenta})


def _matrix(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """[out, in·k·k], the columns in the order in which `like`, or the tensor itself, lies in memory.

    Muon does not mind their order, and this way the matrix of a kernel with its channels last is a view, too.
    """
    if _is_channels_last(tensor if like is None else like):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.view(len(tensor), -1) if like is None else tensor.reshape(len(tensor), -1)


def _kernel(matrix: Tensor, like: Tensor) -> Tensor:
    """The way back: a tensor of the shape of the kernel `like`."""
    if not _is_channels_last(like):
        return matrix.view(like.shape)
    out, inside, height, width = like.shape
    return matrix.view(out, height, width, inside).permute(0, 3, 1, 2)


def _is_channels_last(kernel: Tensor) -> bool:
    return kernel.dim() == 4 and not kernel.is_contiguous()
