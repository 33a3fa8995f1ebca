"""Other projects' files as tensors. Never executes what it loads, and takes no more memory than the file is large."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.convert.layout import UnsupportedCheckpointError
from model.safetensors_io import not_data

ZIP, HDF5 = b"PK\x03\x04", b"\x89HDF"
TENSORFLOW = re.compile(r"\.(data-\d{5}-of-\d{5}|index|meta)$")
TENSORFLOW_INDEX = b"model_checkpoint_path:"
TENSORFLOW_SAYS = (
    "it is a TensorFlow checkpoint, which is not read: many of those weights are on the Hugging Face Hub as diffusers "
    "folders (google/ddpm-cifar10-32 and its siblings), which can be imported"
)
STEM = "diffusion_pytorch_model"
GREEDY = (  # what torch would call, with any size that the file likes
    "builtins bytearray",
    "__builtin__ bytearray",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor",
    "torch._utils _rebuild_device_tensor_from_numpy",
)
STATE_DICT_OF_EDM = (
    "in their repository, if you trust the file, `net = pickle.load(open('network.pkl', 'rb'))['ema']` and "
    "`torch.save(net.state_dict(), 'network.pt')` make one that can be imported"
)
OBJECTS = {  # in a pickle that holds more than tensors: what it is then
    "torch_utils.persistence": f"one of NVlabs' (EDM), which holds the code of its network; {STATE_DICT_OF_EDM}",
    "x_embedder.proj.weight": "of a diffusion transformer (DiT), another architecture",
    "pytorch_lightning": "PyTorch Lightning's; save its state_dict alone",
}


def load_weights(path: Path) -> Any:
    """The content of a .pt, .pth, .bin or .safetensors file, tensors only.

    Raises UnsupportedCheckpointError for anything else.
    """
    if TENSORFLOW.search(path.name) or (not path.exists() and path.with_name(f"{path.name}.index").is_file()):
        raise UnsupportedCheckpointError(TENSORFLOW_SAYS)
    if problem := not_data(path):
        raise UnsupportedCheckpointError(f"{path.name} is {problem}")
    try:
        with path.open("rb") as file:
            start = file.read(len(TENSORFLOW_INDEX))
        if start == TENSORFLOW_INDEX:
            raise UnsupportedCheckpointError(TENSORFLOW_SAYS)
        if start.startswith(HDF5):
            raise UnsupportedCheckpointError("it is an HDF5 file, as Keras writes, which is not read")
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            _check_pickle(path, start.startswith(ZIP))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of protocols and layouts
                content = torch.load(path, weights_only=True, map_location="cpu")
        _check_tensors(content, path.stat().st_size)
        return content
    except pickle.UnpicklingError as error:
        raise UnsupportedCheckpointError(_what_it_holds(path)) from error
    except UnsupportedCheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes torch, zipfile and pickle say
        kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch"
        raise UnsupportedCheckpointError(f"{path.name} is damaged, or no {kind} file") from error


def _check_pickle(path: Path, is_zip: bool) -> None:
    """Raises UnsupportedCheckpointError where loading takes more memory than the file, or its bytes have changed."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UnsupportedCheckpointError("it is a compressed archive; PyTorch's files are not: unpack it first")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise UnsupportedCheckpointError("it is an archive that says it has more in it than it can")
            if damaged := archive.testzip():
                raise UnsupportedCheckpointError(f"it is damaged: the checksum of {damaged} in it is wrong")
    if any(word in GREEDY for word in _words(path)):
        raise UnsupportedCheckpointError("it holds objects besides tensors, and is not loaded")


def _words(path: Path) -> Iterator[str]:
    """The texts in its pickle, names of classes and keys among them. Nothing is executed."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                yield from (str(word) for _, word, _ in pickletools.genops(archive.read(name)) if isinstance(word, str))
        else:
            with path.open("rb") as file:
                for _ in range(5):  # pickles of an old file; its numbers follow
                    yield from (str(word) for _, word, _ in pickletools.genops(file) if isinstance(word, str))
    except (ValueError, StopIteration, OSError, zipfile.BadZipFile):
        return  # no pickle, or what follows it: the storages of an old file


def _what_it_holds(path: Path) -> str:
    words = list(_words(path))
    if not words:
        return f"{path.name} is damaged, or no PyTorch file"
    for sign, what in OBJECTS.items():
        if any(sign in word for word in words):
            return f"it holds code or objects besides tensors and is not loaded; it is {what}"
    return (
        "it holds code or objects besides tensors (as EDM's pickles do) and is not loaded: "
        "save the network's state_dict() alone, where you trust the file"
    )


def tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in a loaded file, with the last of their keys."""
    waiting: list[tuple[str, Any]] = [("", content)]
    seen: set[int] = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting += [
                (str(key), part) for key, part in (value.items() if isinstance(value, dict) else enumerate(value))
            ]


def _check_tensors(content: Any, size: int) -> None:
    """Raises UnsupportedCheckpointError for tensors that are no plain numbers, or exceed the file of `size` bytes."""
    total = 0
    for name, tensor in tensors(content):
        kinds = {
            "sparse": tensor.layout != torch.strided,
            "quantised": tensor.is_quantized,
            "without its numbers (on the meta device)": tensor.is_meta,
            "complex": tensor.is_complex(),
        }
        for kind, present in kinds.items():
            if present:
                raise UnsupportedCheckpointError(f"tensor {name!r} is {kind}, which cannot be imported")
        total += tensor.numel() * tensor.element_size()
    if total > 2 * size:
        raise UnsupportedCheckpointError("its tensors are larger than the file: their numbers are said to be repeated")


def folder_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """A diffusers network's tensors, from whatever file or shards it has, and the name of what was read.

    Full precision is preferred to a variant (fp16). Raises UnsupportedCheckpointError.
    """
    for ending in ("safetensors", "bin"):
        names = [f"{STEM}.{ending}", f"{STEM}.{ending}.index.json"]
        variants = sorted({p.name for p in folder.glob(f"{STEM}.*{ending}*")} - set(names))
        variants = [name for name in variants if name.endswith(".json") or "-of-" not in name]
        for name in [*names, *variants]:
            if (folder / name).exists():
                if name in variants and len(variants) > 1:
                    raise UnsupportedCheckpointError(f"{folder} has {' and '.join(variants)}: leave one of them there")
                return _loaded(folder, name), name
    raise UnsupportedCheckpointError(
        f"there is neither {STEM}.safetensors nor {STEM}.bin, nor a variant of them, in {folder}"
    )


def _loaded(folder: Path, name: str) -> dict[str, Tensor]:
    if not name.endswith(".json"):
        return dict(_dict(load_weights(folder / name)))
    places = read_json(folder / name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(shard, str) for shard in places.values()):
        raise UnsupportedCheckpointError(f"{name} does not tell which tensor is in which file")
    shards = sorted(set(places.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise UnsupportedCheckpointError(f"{name} names a file outside of its folder, {outside[0]!r}")
    return {key: tensor for shard in shards for key, tensor in _dict(load_weights(folder / shard)).items()}


def _dict(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UnsupportedCheckpointError("its weights are not a table of tensors by name")
    return {str(key): value for key, value in content.items()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UnsupportedCheckpointError for anything else."""
    if problem := not_data(path):
        raise UnsupportedCheckpointError(f"{path} is {problem}")
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedCheckpointError(f"{path} is not readable JSON") from error
    if not isinstance(data, dict):
        raise UnsupportedCheckpointError(f"{path} is not a JSON object")
    return data
