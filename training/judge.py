"""The judge of `training.evaluate`: a small residual network that tells classes apart, and its file.

Its penultimate layer gives the features in which images are compared, its answer says whether a sample shows what was
asked for. `python -m training.classifier` trains one.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.images import from_uint8
from training import inception
from training.inception import Inception

FORMAT = "ddpm-serve-classifier/1"


class JudgeError(ValueError):
    """The file cannot be used as a classifier; the message says why."""


@dataclass(frozen=True)
class ClassifierConfig:
    """The architecture: three stages of `depth` residual blocks with `width`, 2·width and 4·width channels."""

    image_channels: int
    image_size: tuple[int, int]  # height, width
    num_classes: int
    width: int = 32
    depth: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON has lists only
        limits = [
            ("image_channels", self.image_channels, 1, 4),
            *(("image_size", side, 4, 1024) for side in self.image_size),
            ("num_classes", self.num_classes, 2, 100_000),
            ("width", self.width, 1, 1024),
            ("depth", self.depth, 1, 32),
        ]
        for name, value, low, high in limits:
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value}")
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be (height, width), not {self.image_size}")


class Block(nn.Module):
    """norm → ReLU → conv, twice, plus the input (He et al. 2016b, "Identity mappings in deep residual networks")."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm_1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv_2(F.relu(self.norm_2(self.conv_1(h))))


class Classifier(nn.Module):
    """A wide residual network (Zagoruyko & Komodakis 2016; width 64, depth 2 is near their WRN-16-4).

    Its BatchNorm is the running one in eval mode: what it says of an image does not depend on the others of a batch.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.width
        self.stem = nn.Conv2d(config.image_channels, channels, 3, padding=1, bias=False)
        blocks = []
        for stage in range(3):
            for i in range(config.depth):
                blocks.append(Block(channels, config.width * 2**stage, stride=2 if stage and i == 0 else 1))
                channels = config.width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] in [-1, 1] → what the last layer sees, [N, 4·width]: means over the image, none negative."""
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] in [-1, 1] → logits [N, num_classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    @torch.no_grad()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, C, H, W] → features [N, 4·width] and logits [N, num_classes], both float32, on its device."""
        x = from_uint8(images.to(self.head.weight.device)).contiguous(memory_format=torch.channels_last)
        features = self.features(x)
        return features, self.head(features)


@dataclass(frozen=True)
class Judge:
    """A network read from its file: in eval mode; `sha256` of the file; `accuracy` in [0, 1] on held-out images.

    Inception knows neither the classes nor the size of the images: it has no `class_names`, no `accuracy`, and any
    `image_shape` (C, H, W). `size` is the number of its features.
    """

    name: str
    sha256: str
    network: Classifier | Inception
    class_names: tuple[str, ...]
    accuracy: float | None
    provenance: dict[str, Any]

    @property
    def size(self) -> int:
        """How many features an image has."""
        return self.network.head.in_features if isinstance(self.network, Classifier) else inception.FEATURES

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images it takes, None for any."""
        if not isinstance(self.network, Classifier):
            return None
        return self.network.config.image_channels, *self.network.config.image_size

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.network.parameters()).device


def save(path: Path, network: Classifier, class_names: tuple[str, ...], provenance: dict[str, Any]) -> None:
    """Writes the file atomically. `provenance` holds "accuracy", in [0, 1], and whatever else people should know."""
    metadata = {"format": FORMAT, "network": asdict(network.config), "class_names": class_names} | provenance
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, metadata={"classifier": json.dumps(metadata, ensure_ascii=False)})
        os.replace(part, path)
    except SafetensorError as error:  # its word for a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: str | Path, device: torch.device | str = "cpu") -> Judge:
    """Reads what `save` wrote, or Inception's .pth. Raises JudgeError with a sentence for anything else.

    Executes nothing.
    """
    path = Path(path).expanduser()
    if path.suffix == ".pth":
        return _inception(path, device)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get("classifier", "{}"))
            if metadata.pop("format", None) != FORMAT:
                raise JudgeError(f"not a classifier that this version reads ({FORMAT})")
            config = ClassifierConfig(**metadata.pop("network"))
            class_names = tuple(str(name) for name in metadata.pop("class_names"))
            if len(class_names) != config.num_classes or not 0 <= metadata["accuracy"] <= 1:
                raise JudgeError("its metadata contradict themselves")
            with torch.device("meta"):
                network = Classifier(config)
            expected = network.state_dict()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
                raise JudgeError("its tensors are not those that its metadata describe")
            weights = {name: file.get_tensor(name).clone() for name in expected}
        for name, tensor in weights.items():
            if tensor.dtype != expected[name].dtype or not torch.isfinite(tensor).all():
                raise JudgeError(f"tensor {name!r} is not of finite {expected[name].dtype} numbers")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except JudgeError as error:
        raise JudgeError(f"{path}: {error}") from error
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise JudgeError(f"{path} is not a readable classifier: {error}") from error
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Judge(path.stem, sha256, network, class_names, metadata["accuracy"], metadata)


def _inception(path: Path, device: torch.device | str) -> Judge:
    try:
        network, sha256 = inception.load(path)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise JudgeError(str(error) if str(path) in str(error) else f"{path} cannot be read: {error}") from error
    return Judge("inception", sha256, network.to(device, memory_format=torch.channels_last), (), None, {})
