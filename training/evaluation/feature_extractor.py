"""The feature extractor of `training.evaluate`: a small network that tells classes apart, and its file.

Its penultimate layer gives the features in which images are compared, its answer says whether a sample shows what was
asked for. `python -m training.classifier` trains one.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from model.safetensors_io import write_tensors
from training.classifier.network import Classifier, ClassifierConfig
from training.cli.options import expanded
from training.evaluation import inception
from training.evaluation.inception import Inception

FORMAT = "ddpm-serve-classifier/2"


class FeatureExtractorError(ValueError):
    """The file cannot be used as a classifier; the message says why."""


@dataclass(frozen=True)
class FeatureExtractor:
    """A network read from its file: in eval mode; `sha256` of the file; `accuracy` in [0, 1] on held-out images.

    Inception knows neither the classes nor the size of the images: it has no `class_names`, no `accuracy`, and any
    `image_shape` (C, H, W). `size` is the number of its features.
    """

    path: Path
    sha256: str
    network: Classifier | Inception
    class_names: tuple[str, ...]
    accuracy: float | None
    provenance: dict[str, Any]

    @property
    def name(self) -> str:
        """The file's, without its ending; "inception" for any of Inception's."""
        return "inception" if isinstance(self.network, Inception) else self.path.stem

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
    write_tensors(path, network.state_dict(), {"classifier": json.dumps(metadata, ensure_ascii=False)})


def load(path: str | Path, device: torch.device | str = "cpu") -> FeatureExtractor:
    """Reads what `save` wrote, or Inception's .pth. Raises FeatureExtractorError with a sentence for anything else.

    Executes nothing.
    """
    path = expanded(path)
    if path.suffix == ".pth":
        return _inception(path, device)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = json.loads((file.metadata() or {}).get("classifier", "{}"))
            if metadata.pop("format", None) != FORMAT:
                raise FeatureExtractorError(f"not a classifier that this version reads ({FORMAT})")
            config = ClassifierConfig(**metadata.pop("network"))
            class_names = tuple(str(name) for name in metadata.pop("class_names"))
            if len(class_names) != config.num_classes or not 0 <= metadata["accuracy"] <= 1:
                raise FeatureExtractorError("its metadata contradict themselves")
            with torch.device("meta"):
                network = Classifier(config)
            expected = network.state_dict()
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
                raise FeatureExtractorError("its tensors are not those that its metadata describe")
            weights = {name: file.get_tensor(name).clone() for name in expected}
        for name, tensor in weights.items():
            if tensor.dtype != expected[name].dtype or not torch.isfinite(tensor).all():
                raise FeatureExtractorError(f"tensor {name!r} is not of finite {expected[name].dtype} numbers")
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except FeatureExtractorError as error:
        raise FeatureExtractorError(f"{path}: {error}") from error
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FeatureExtractorError(f"{path} is not a readable classifier: {error}") from error
    network.load_state_dict(weights, assign=True)
    network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
    return FeatureExtractor(path, sha256, network, class_names, metadata["accuracy"], metadata)


def _inception(path: Path, device: torch.device | str) -> FeatureExtractor:
    try:
        network, sha256 = inception.load(path)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise FeatureExtractorError(
            str(error) if str(path) in str(error) else f"{path} cannot be read: {error}"
        ) from error
    return FeatureExtractor(path, sha256, network.to(device, memory_format=torch.channels_last), (), None, {})
