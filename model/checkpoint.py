"""Checkpoints: one safetensors file with the weights and, as JSON in its metadata, everything else.

Loading needs no architecture flag and never executes code. A file that is not one of ours, damaged or
dishonest is refused with a `CheckpointError` that says why, before any memory for a network is taken.

The JSON has, as `sha256`, a digest of all that the file says (see `_digest`), so a flipped bit does not go
unnoticed. Files without it, from before it was, load all the same. It is no signature: who can write a file
can write its digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.networks import AnyConfig, AnyUNet, build, config_fields, config_of
from model.safetensors_io import not_data, write_tensors
from model.sampling.schedule import SamplingParams, make_schedule

FORMAT = "ddpm-serve/1"
PRETRAINED = Path(__file__).parent / "pretrained"
CHECKSUMS_FILE = "SHA256SUMS"  # beside the bundled checkpoints: what `sha256sum` says of them


class CheckpointError(ValueError):
    """The file cannot be used as a checkpoint; the message says why."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint knows about itself besides its weights.

    `class_names` has one name per class (empty for an unconditional network). `provenance` is for people:
    data set, steps, metrics, command, git revision, …
    """

    unet: AnyConfig
    diffusion: DiffusionConfig
    class_names: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.class_names) != (self.unet.num_classes or 0):
            raise ValueError(f"{len(self.class_names)} class names for {self.unet.num_classes or 0} classes")
        if self.unet.learned_variance != (self.diffusion.variance == "learned_range"):
            raise ValueError("variance learned_range and a network with learned_variance belong together")
        # What a request gets that says nothing must be possible: ValueError where it is not.
        make_schedule(GaussianDiffusion(self.diffusion), **asdict(self.sampling))
        if self.sampling.guidance_scale != 1 and not self.unet.null_class:
            raise ValueError("a guidance_scale other than 1 needs a network with a null class")

    def to_json(self) -> str:
        """What the file's metadata holds; `from_json` reads it."""
        fields = asdict(self) | {"unet": config_fields(self.unet)}
        return json.dumps({"format": FORMAT, **fields}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> CheckpointConfig:
        """The inverse of `to_json`. Raises ValueError, TypeError or KeyError on anything else."""
        data = json.loads(text)
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}, where this version reads {FORMAT!r}")
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # which would break every answer that shows it
            raise ValueError("it has half of a surrogate pair, which is no text") from None
        return cls(
            unet=config_of(data["unet"]),
            diffusion=DiffusionConfig(**data["diffusion"]),
            class_names=tuple(str(name) for name in data["class_names"]),
            sampling=SamplingParams(**data["sampling"]),
            provenance=dict(data["provenance"]),
        )


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: `network` in eval mode, and the SHA-256 of the file as its identity."""

    name: str
    sha256: str
    config: CheckpointConfig
    network: AnyUNet

    @property
    def diffusion(self) -> GaussianDiffusion:
        """The forward process, with tables of its own."""
        return GaussianDiffusion(self.config.diffusion)


def save(path: str | Path, weights: dict[str, Tensor], config: CheckpointConfig) -> None:
    """Writes a U-Net's state dict and its `config` atomically: a reader sees the old file or the new."""
    data = json.loads(config.to_json())
    data["sha256"] = _digest(data, weights)
    write_tensors(Path(path), weights, {"ddpm": json.dumps(data, ensure_ascii=False)})


def find(name_or_path: str | Path) -> Path:
    """A bundled checkpoint by its name ("mnist"), or a file by its path. Raises CheckpointError."""
    bundled = PRETRAINED / f"{name_or_path}.safetensors"
    try:
        if Path(name_or_path).name == str(name_or_path) and bundled.is_file():
            return bundled
        path = Path(name_or_path).expanduser()
        if path.is_file():
            return path
        if path.exists():
            raise CheckpointError(f"no checkpoint {str(name_or_path)!r}: it is {not_data(path)}")
    except (OSError, RuntimeError) as error:  # a name too long, the home (~) of nobody
        raise CheckpointError(f"no checkpoint {str(name_or_path)!r}: {error}") from error
    names = ", ".join(sorted(p.stem for p in PRETRAINED.glob("*.safetensors")))
    raise CheckpointError(f"no checkpoint {str(name_or_path)!r}: neither a file nor bundled ({names})")


def load(name_or_path: str | Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Loads a checkpoint for sampling. Raises CheckpointError with a sentence for anything but a good one."""
    path = find(name_or_path)
    try:
        if problem := not_data(path):
            raise OSError(f"it is {problem}")
        before = _stamp(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get("ddpm")
            if metadata is None:
                raise CheckpointError("a safetensors file, but not a ddpm-serve checkpoint")
            config = CheckpointConfig.from_json(metadata)
            with torch.device("meta"):
                network = build(config.unet)
            names = file.keys()
            _check_shapes(network, {name: tuple(file.get_slice(name).get_shape()) for name in names})
            tensors = {name: file.get_tensor(name) for name in names}  # mapped, and not in memory yet
            data = json.loads(metadata)
            if "sha256" in data and data["sha256"] != _digest(data, tensors):
                raise CheckpointError("the file is damaged: its contents are not those that it was saved with")
            weights = {name: _float32(name, tensor) for name, tensor in tensors.items()}
        with path.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        if _stamp(path) != before:  # or the weights could be of one file and the hash of another
            raise CheckpointError("the file changed while it was read")
        if _shipped(path) not in (None, sha256):
            raise CheckpointError(f"the file is damaged: its SHA-256 is not the one in {CHECKSUMS_FILE} beside it")
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except SafetensorError as error:  # in whose words nothing helps
        raise CheckpointError(f"{path} is not a readable safetensors file, or is damaged") from error
    except OSError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error.strerror or error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} has a configuration that cannot be used: {error!r}") from error
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False)
    return Checkpoint(path.stem, sha256, config, network.to(device))


def _digest(data: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of `data` (the metadata) without its own field `sha256`, and of the tensors by name.

    Each is JSON as Python writes it, `data` with sorted keys, a tensor as [name, type, shape], then its bytes.
    """
    rest = {key: value for key, value in data.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, kind, list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shipped(path: Path) -> str | None:
    """The SHA-256 that a bundled file must have; None for other files."""
    sums = PRETRAINED / CHECKSUMS_FILE
    if path.parent != PRETRAINED or not sums.is_file():
        return None
    return {name: sha256 for sha256, name in map(str.split, sums.read_text().splitlines())}.get(path.name)


def _stamp(path: Path) -> tuple[int, ...]:
    """Something that changes when the file does."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev


def _float32(name: str, tensor: Tensor) -> Tensor:
    """A copy: what safetensors hands out is the mapped file itself, which may change on the disk."""
    if not tensor.is_floating_point():
        raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, not floating point numbers")
    weights = tensor.to(torch.float32, copy=True)
    if not torch.isfinite(weights).all():
        raise CheckpointError(f"tensor {name!r} has numbers that are not finite")
    return weights


def _check_shapes(network: AnyUNet, found: dict[str, tuple[int, ...]]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if missing := expected.keys() - found.keys():
        raise CheckpointError(f"{len(missing)} tensors are missing, {min(missing)!r} among them")
    if surplus := found.keys() - expected.keys():
        raise CheckpointError(f"{len(surplus)} tensors are not part of the network, {min(surplus)!r} among them")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {list(found[name])}, the configuration says {list(shape)}"
            )
