"""Checkpoints of ours from names on the Hugging Face hub, converted once and kept.

Of a repository only configurations and one network's weights are fetched. They are in `cache_folder()` then, by commit
and flags, so that another start needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from model import checkpoint, hub
from model.atomic_write import atomic_write
from model.convert.conversion import config_of, import_path, told
from model.convert.diffusers import check_folder
from model.convert.files import STATE_DICT_OF_EDM, STEM, read_json
from model.convert.layout import Flags, UnsupportedCheckpointError
from model.hub import HubName, HubUnreachableError, Repository

CONVERSION = 1  # raise it where imports of the same file come out different
NETWORKS = ("config.json", "unet/config.json", "unet_ema/config.json")
SCHEDULERS = {f"{folder}scheduler_config.json" for folder in ("", "scheduler/", "unet/", "unet_ema/")}
CONFIGURATIONS = {"model_index.json", *NETWORKS} | SCHEDULERS
MAX_CONFIGURATION = 2**24  # bytes: betas of 100,000 timesteps take a tenth
PICKLES = ("pt", "pth", "ckpt", "bin")
OTHERS = ("optim", "scheduler", "training_args", "random_states", "scaler")  # in names of files beside weights

Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where converted checkpoints are kept."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "ddpm-serve" / "hub"


def from_hub(name: HubName, flags: Flags, say: Say, warn: Say | None = None, allow_bin: bool = False) -> Path:
    """The checkpoint of that name's network, converted unless it was before. `say` and `warn` get lines for people.

    Raises HubError, UnsupportedCheckpointError, ValueError, or OSError where the cache cannot be written.
    """
    warn = warn or say
    folder = cache_folder() / name.repo.replace("/", "--")
    key = hashlib.sha256(json.dumps([CONVERSION, flags.given()], sort_keys=True).encode()).hexdigest()[:12]
    if name.is_pinned and _is_kept(kept := folder / f"{name.revision}-{key}.safetensors", warn):
        return _said(kept, say)
    try:
        repository = hub.look(name)
    except HubUnreachableError as error:
        commit = _commits(folder).get(name.revision or "main")
        if commit is None or not _is_kept(kept := folder / f"{commit}-{key}.safetensors", warn):
            raise
        warn(f"{error.why}; using commit {commit}, which was converted before")
        return _said(kept, say)
    if len(name.revision or "") < 7 or not repository.commit.startswith(str(name.revision)):
        warn(f"no commit is pinned, so {name} may become another: {name.repo}@{repository.commit} is what it is now")
    path = folder / f"{repository.commit}-{key}.safetensors"
    if not _is_kept(path, warn):
        path.parent.mkdir(parents=True, exist_ok=True)
        _convert(repository, flags, allow_bin, path, say)
    if not name.is_pinned:
        commits = _commits(folder) | {name.revision or "main": repository.commit}
        with atomic_write(folder / "commits.json") as part:
            part.write_text(json.dumps(commits))
    return _said(path, say)


def _commits(folder: Path) -> dict[str, Any]:
    """Which commit a branch or tag was when last seen."""
    try:
        content = json.loads((folder / "commits.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_kept(path: Path, warn: Say) -> bool:
    """Whether it was converted before, and is still good. A damaged one is removed."""
    if not path.is_file():
        return False
    try:
        checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        warn(f"{error}; it was converted before, and is removed to be converted again")
        path.unlink(missing_ok=True)
        return False
    return True


def _said(path: Path, say: Say) -> Path:
    with safe_open(path, framework="pt") as file:
        config = checkpoint.CheckpointConfig.from_json(file.metadata()["ddpm"])
    say(told(config))
    return path


def _convert(repository: Repository, flags: Flags, allow_bin: bool, path: Path, say: Say) -> None:
    configurations = sorted(CONFIGURATIONS & repository.files.keys())
    if large := [file for file in configurations if (repository.files[file] or 0) > MAX_CONFIGURATION]:
        raise UnsupportedCheckpointError(f"its {large[0]} is larger than a configuration is, and not fetched")
    if repository.folder is not None:
        network_files(repository, flags, allow_bin)  # or what was not fetched would be asked for by flags
    if configurations:
        _check_configurations(repository, hub.fetch(repository, configurations), flags)
    files = network_files(repository, flags, allow_bin)
    place = f"{repository.name.repo}@{repository.commit}"
    if repository.folder is None:
        size = sum(repository.files[file] or 0 for file in files) / 1e6
        say(f"fetching {', '.join(files)} ({size:.1f} MB) of {place}")
    snapshot = hub.fetch(repository, files)
    first = snapshot / files[0]
    if _is_ours(first):
        if given := flags.given():
            raise UnsupportedCheckpointError(f"it is a checkpoint of this project: --{min(given)} means nothing for it")
        with atomic_write(path) as part:
            shutil.copyfile(first, part)
        return
    imported = import_path(snapshot if first.name.startswith(STEM) else first, flags)
    imported = replace(imported, origin=imported.origin.replace(str(snapshot), place))
    digests = {file: _sha256(snapshot / file) for file in files}
    config = config_of(imported, flags, place, revision=repository.name.revision, files_sha256=digests)
    checkpoint.save(path, imported.weights, config)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check_configurations(repository: Repository, snapshot: Path, flags: Flags) -> None:
    """Raises UnsupportedCheckpointError for a repository of something else, before its weights are fetched."""
    found = {name: read_json(snapshot / name) for name in CONFIGURATIONS if name in repository.files}
    own = found.get("config.json", {})
    if kind := own.get("architectures") or own.get("model_type"):
        kind = kind[0] if isinstance(kind, list) else kind
        raise UnsupportedCheckpointError(f"it is a {kind} of the library transformers, not a diffusion model")
    if "model_index.json" in found or any("_class_name" in found.get(name, {}) for name in NETWORKS):
        check_folder(snapshot, flags)


def network_files(repository: Repository, flags: Flags, allow_bin: bool) -> list[str]:
    """The files with the weights of one network: of a diffusers folder, or the only one that a repository has.

    Raises UnsupportedCheckpointError where there are none, or several, or pickles that are not allowed.
    """
    files = list(repository.files)
    folders = ["", "unet/"] if flags.weights == "raw" else ["unet_ema/", "", "unet/"]
    folders = [folder for folder in folders if f"{folder}config.json" in files]
    for ending in ("safetensors", "bin"):
        for folder in folders:
            if found := _of_folder(files, folder, ending):
                return _allowed(found, allow_bin)
    plain = [file for file in files if not any(word in file.lower() for word in OTHERS)]
    found = [file for file in plain if file.endswith(".safetensors")]
    found = found or [file for file in plain if file.rpartition(".")[2] in PICKLES]
    if not found or _is_adapter(repository):
        raise UnsupportedCheckpointError(_what_it_is(repository))
    if len(found) > 1:
        raise UnsupportedCheckpointError(
            f"it has several files of weights, {', '.join(found[:3])} among them: "
            "fetch one with `hf download`, and import that"
        )
    return _allowed(found, allow_bin)


def _allowed(files: list[str], allow_bin: bool) -> list[str]:
    if not allow_bin and not files[0].endswith((".safetensors", ".safetensors.index.json")):
        raise UnsupportedCheckpointError(
            f"its weights are in {files[0]}, a pickle, and not in safetensors: `ddpm-serve import` with --allow_bin "
            "reads the tensors in it, and nothing else"
        )
    return files


def _of_folder(files: list[str], folder: str, ending: str) -> list[str]:
    """The file, or the index and its shards; a variant where neither is there."""
    start = f"{folder}{STEM}"
    if f"{start}.{ending}" in files:
        return [f"{start}.{ending}"]
    found = sorted(
        file for file in files if file.startswith(start) and file.endswith((f".{ending}", f".{ending}.index.json"))
    )
    if f"{start}.{ending}.index.json" in found:
        return [file for file in found if file.startswith((f"{start}-", f"{start}.{ending}.index"))]
    return found


def _is_adapter(repository: Repository) -> bool:
    return "lora" in repository.tags or any(
        file.startswith("adapter_") or "lora" in file.lower() for file in repository.files
    )


def _what_it_is(repository: Repository) -> str:
    """A sentence about a repository without weights that can be imported."""
    files = repository.files
    if repository.folder is not None:
        return "its weights were not fetched before, and the Hugging Face hub cannot be asked for them"
    if _is_adapter(repository):
        return "it is a LoRA or another adapter: changes to a model that is elsewhere"
    if any(file.endswith(".gguf") for file in files):
        return "it has weights in GGUF, as language models do"
    if any(file.endswith(".pkl") for file in files):
        return f"its weights are in .pkl, as EDM's are, which hold code, and that is never run; {STATE_DICT_OF_EDM}"
    if repository.library not in (None, "diffusers"):
        return f"it is of the library {repository.library}, and has no weights that can be imported"
    return "it has no weights that can be imported: neither .safetensors, nor .bin, .pt, .pth or .ckpt"


def _is_ours(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return "ddpm" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False
