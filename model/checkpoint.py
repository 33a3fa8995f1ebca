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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.distilled import Distilled
from model.nn.config import UNetConfig
from model.nn.networks import AnyConfig, AnyUNet, build, config_fields, config_of
from model.safetensors_io import hash_tensors, not_data, private_copy, write_tensors
from model.sampling.fitted import FittedTable, FittedTableError, resolve, table_of, weights_digest
from model.sampling.schedule import (
    DEFAULT_STEPS,
    FITTED,
    InvalidSamplingParams,
    SamplingParams,
    SamplingSchedule,
    make_schedule,
)

FORMAT = "ddpm-serve/1"
PRETRAINED = Path(__file__).parent / "pretrained"
SOLVER = "dpmpp_2m"  # of a request that a checkpoint's fitted tables have nothing for
CHANGED = "the file changed while it was read"  # or the weights could be of one file and the hash of another
CHECKSUMS_FILE = "SHA256SUMS"  # beside the bundled checkpoints: what `sha256sum` says of them


class CheckpointError(ValueError):
    """The file cannot be used as a checkpoint; the message says why."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a checkpoint knows about itself besides its weights.

    `class_names` has one name per class (empty for an unconditional network). `provenance` is for people:
    data set, steps, metrics, command, git revision, … `fitted` are tables that were learned for these weights,
    `distilled` says what is inside them, where they are a student's.
    """

    unet: AnyConfig
    diffusion: DiffusionConfig
    class_names: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    provenance: dict[str, Any] = field(default_factory=dict)
    fitted: tuple[FittedTable, ...] = ()
    distilled: Distilled | None = None

    def __post_init__(self) -> None:
        if len(self.class_names) != (self.unet.num_classes or 0):
            raise ValueError(f"{len(self.class_names)} class names for {self.unet.num_classes or 0} classes")
        if self.unet.learned_variance != (self.diffusion.variance == "learned_range"):
            raise ValueError("variance learned_range and a network with learned_variance belong together")
        for table in self.fitted:
            has_time_table = isinstance(self.unet, UNetConfig) and self.unet.time_table > 0
            table.check(self.diffusion.num_timesteps, self.unet.null_class, has_time_table)
        if len({(table.steps, *table.fitted_to.values()) for table in self.fitted}) < len(self.fitted):
            raise FittedTableError("two fitted tables are for the same settings")
        # What a request gets that says nothing must be possible: ValueError where it is not.
        self.schedule(self.sampling)
        if self.sampling.guidance_scale != 1 and not self.unet.null_class:
            raise ValueError("a guidance_scale other than 1 needs a network with a null class")
        if self.distilled and self.distilled.guidance_scale != self.sampling.guidance_scale:
            raise ValueError("its guidance_scale is not the one that it was distilled with")
        if self.distilled and self.distilled.has_fixed_steps and self.distilled.steps != self.sampling.steps:
            raise ValueError("its steps are not those that it was distilled to")

    def schedule(
        self,
        params: SamplingParams,
        variance: str | None = None,
        diffusion: GaussianDiffusion | None = None,
        strength: float = 1.0,
    ) -> SamplingSchedule:
        """The schedule of such settings, by `make_schedule` or of a fitted table. `diffusion` is the checkpoint's own,
        where somebody has it.

        Raises what `make_schedule` does, InvalidSamplingParams where there is no such table, or it would not begin
        from noise.
        """
        if params.sampler == FITTED:
            if strength != 1:
                raise InvalidSamplingParams("strength", f"must be 1 with sampler {FITTED}, which begins from noise")
            return table_of(self.fitted, params).schedule()
        diffusion = diffusion or GaussianDiffusion(self.diffusion)
        made = make_schedule(diffusion, variance=variance, strength=strength, **vars(params))
        return self.distilled.schedule(made) if self.distilled else made

    def sampling_params(self, max_steps: int | None = None, **given: Any) -> SamplingParams:
        """The checkpoint's settings with what somebody asked for in their place; None is not asked for.

        Where the default is a fitted table and there is none for what was asked, with no sampler named, it is
        `SOLVER`. Steps that were not asked for are at most `max_steps`. Raises InvalidSamplingParams where settings
        contradict each other or this checkpoint.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if self.distilled:
            self.distilled.check(self.sampling, given)
        params = self._overridden(max_steps, given)
        if params.guidance_scale != 1 and not self.unet.null_class:
            raise InvalidSamplingParams(
                "guidance_scale", "must be 1: the checkpoint has no null class to guide away from"
            )
        if max_steps is None or "steps" in given or params.sampler == FITTED:
            return params
        return replace(params, steps=min(params.steps, max_steps))

    def _overridden(self, max_steps: int | None, given: Mapping[str, Any]) -> SamplingParams:
        timesteps = self.diffusion.num_timesteps
        own = {"sampler": SOLVER, "spacing": self.sampling.spacing}  # which a table has no use for
        if given.get("sampler", self.sampling.sampler) != FITTED:
            is_solver = self.sampling.sampler == FITTED and given["sampler"] == SOLVER
            return self.sampling.with_overrides(timesteps, **(own if is_solver else {}) | dict(given))
        tables = [table for table in self.fitted if max_steps is None or table.steps <= max_steps]
        try:
            return resolve(tables, self.sampling, given)
        except InvalidSamplingParams:
            if "sampler" in given or self.distilled:
                raise
        return self.sampling.with_overrides(timesteps, **own | dict(given))

    def without_tables(self) -> CheckpointConfig:
        """For other weights: without fitted tables, and with `SOLVER` where they were the default."""
        sampling = self.sampling
        if sampling.sampler == FITTED:
            steps = min(DEFAULT_STEPS[SOLVER], self.diffusion.num_timesteps)
            sampling = replace(sampling, sampler=SOLVER, steps=steps)
        return replace(self, sampling=sampling, fitted=())

    def to_json(self) -> str:
        """What the file's metadata holds; `from_json` reads it."""
        data = {"format": FORMAT, **asdict(self), "unet": config_fields(self.unet)}
        data = {key: value for key, value in data.items() if value or key not in ("fitted", "distilled")}
        if not self.diffusion.trained_betas:  # so that releases before them read what has none
            del data["diffusion"]["trained_betas"]
        if self.diffusion.sigmas is None:
            del data["diffusion"]["sigmas"]
        return json.dumps(data, ensure_ascii=False)

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
            fitted=tuple(FittedTable.from_json(table) for table in data.get("fitted", ())),
            distilled=Distilled(**data["distilled"]) if data.get("distilled") else None,
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
    """Writes a U-Net's state dict and its `config` atomically: a reader sees the old file or the new.

    Raises FittedTableError where the config has tables that were fitted to other weights.
    """
    _check_tables(config, weights)
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
        with private_copy(path) as (copy, sha256), safe_open(copy, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get("ddpm") != metadata or file.keys() != names:
                raise CheckpointError(CHANGED)
            tensors = {name: file.get_tensor(name) for name in names}  # mapped, and not copied yet
            data = json.loads(metadata)
            if "sha256" in data and data["sha256"] != _digest(data, tensors):
                raise CheckpointError("the file is damaged: its contents are not those that it was saved with")
            _check_tables(config, tensors)
            weights = {name: _float32(name, tensor) for name, tensor in tensors.items()}
        if _stamp(path) != before:
            raise CheckpointError(CHANGED)
        if _shipped(path) not in (None, sha256):
            raise CheckpointError(f"the file is damaged: its SHA-256 is not the one in {CHECKSUMS_FILE} beside it")
    except (CheckpointError, FittedTableError) as error:
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
    hash_tensors(digest, tensors)
    return digest.hexdigest()


def _check_tables(config: CheckpointConfig, tensors: Mapping[str, Tensor]) -> None:
    if config.fitted and {table.weights for table in config.fitted} != {weights_digest(tensors)}:
        raise FittedTableError("its fitted tables are not of these weights: fit them again, or leave them out")


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
