"""Checkpoints: one safetensors file with the weights and, as JSON in its metadata, everything else.

Loading needs no architecture flag and never executes code. A file that is not one of ours, damaged or dishonest is
refused with a `CheckpointError` that says why, before any memory for a network is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.samplers import SamplingDefaults
from model.unet import UNet, UNetConfig

FORMAT = "ddpm-serve/1"
PRETRAINED = Path(__file__).parent / "pretrained"


class CheckpointError(ValueError):
    """The file cannot be used as a checkpoint; the message says why."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint knows about itself besides its weights.

    `class_names` has one name per class (empty for an unconditional network). `provenance` is for people: data set,
    steps, metrics, command, git revision, …
    """

    unet: UNetConfig
    diffusion: DiffusionConfig
    class_names: tuple[str, ...] = ()
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.class_names) != (self.unet.num_classes or 0):
            raise ValueError(f"{len(self.class_names)} class names for {self.unet.num_classes or 0} classes")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> CheckpointConfig:
        """The inverse of `to_json`. Raises ValueError, TypeError or KeyError on anything else."""
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, where this version reads {FORMAT!r}")
        return cls(
            unet=UNetConfig(**data["unet"]),
            diffusion=DiffusionConfig(**data["diffusion"]),
            class_names=tuple(str(name) for name in data["class_names"]),
            sampling=SamplingDefaults(**data["sampling"]),
            provenance=dict(data["provenance"]),
        )


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: `network` in eval mode, and the SHA-256 of the file as its identity."""

    name: str
    sha256: str
    config: CheckpointConfig
    network: UNet

    @property
    def diffusion(self) -> GaussianDiffusion:
        return GaussianDiffusion(self.config.diffusion)


def save(path: str | Path, weights: dict[str, Tensor], config: CheckpointConfig) -> None:
    """Writes `weights` (a U-Net's state dict) and `config` to `path`, atomically: a reader sees the old file or the new."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, temporary, metadata={"ddpm": config.to_json()})
    os.replace(temporary, path)


def find(name_or_path: str | Path) -> Path:
    """A bundled checkpoint by its name ("mnist"), or the path of a file. Raises CheckpointError where there is none."""
    bundled = PRETRAINED / f"{name_or_path}.safetensors"
    if Path(name_or_path).name == str(name_or_path) and bundled.is_file():
        return bundled
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        names = sorted(p.stem for p in PRETRAINED.glob("*.safetensors"))
        raise CheckpointError(f"no checkpoint {str(name_or_path)!r}: neither a file nor bundled ({', '.join(names)})")
    return path


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Loads a checkpoint for sampling. Raises CheckpointError with a sentence for anything that is not a good one."""
    path = find(name_or_path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get("ddpm")
            if metadata is None:
                raise CheckpointError(f"{path} is a safetensors file, but not a ddpm-serve checkpoint")
            config = CheckpointConfig.from_json(metadata)
            with torch.device("meta"):
                network = UNet(config.unet)
            _check_shapes(network, {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()})  # noqa: SIM118
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    except CheckpointError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} has a configuration that cannot be used: {error!r}") from error
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: tensor {name!r} is not finite floating point numbers")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    network.eval().requires_grad_(False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Checkpoint(path.stem, digest, config, network.to(device))


def _check_shapes(network: UNet, found: dict[str, tuple[int, ...]]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"{len(missing)} tensors are missing, {min(missing)!r} among them")
    if surplus := found.keys() - expected.keys():
        raise CheckpointError(f"{len(surplus)} tensors are not part of the network, {min(surplus)!r} among them")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"tensor {name!r} has shape {list(found[name])}, the configuration says {list(shape)}")
