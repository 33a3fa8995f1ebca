"""What a loaded file is: an importer for it, or a sentence that names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from model.convert.abarankab import import_abarankab, import_w86763777
from model.convert.edm import import_edm
from model.convert.ermongroup import import_ermongroup
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.convert.lucidrains import SIGN as LUCIDRAINS
from model.convert.lucidrains import import_lucidrains
from model.convert.openai import import_openai
from model.convert.pesser import import_pesser
from model.convert.tqch import import_tqch

Importer = Callable[[Any, Flags], Imported]

WRAPPER = re.compile(r"(^|\.)(?:module|_orig_mod)\.")  # of DataParallel, of torch.compile
AVERAGES = ("ema", "ema_model", "model_ema", "ema_state_dict")
NETWORKS = ("model", "state_dict", "model_state_dict", "net", "network")

OPENAI = {"time_embed.0.weight", "input_blocks.0.0.weight"}
ABARANKAB = {"init_conv.weight", "time_mlp.1.weight", "time_mlp.3.weight", "downs.0.conv_1.weight", "out_conv.weight"}
HO = {"temb.dense.0.weight", "conv_in.weight", "conv_out.weight"}  # in ermongroup/ddim and pesser/pytorch_diffusion
TQCH = {"embed.0.weight", "in_conv.weight", "middle.1.project_in.weight"}
W86 = {"head.weight", "time_embedding.timembedding.0.weight"}

NAMED: tuple[tuple[str, str], ...] = (  # a tensor's name → what has it
    (r"mem_kv|null_classes_emb|final_res_block\.", "a lucidrains checkpoint, but without all of its U-Net"),
    (r"(^|\.)project_in\.", "a tqch/ddpm-torch checkpoint, of which parts are missing"),
    (r"^temb\.dense\.0\.", "of ermongroup/ddim or pesser/pytorch_diffusion, but parts are missing"),
    (r"^all_modules\.\d", "a checkpoint of yang-song/score_sde_pytorch, another architecture"),
    (r"^x_embedder\.", "a diffusion transformer (DiT), another architecture"),
    (r"^model\.diffusion_model\.|^first_stage_model\.", "a latent diffusion model: its network works on latents"),
    (r"^time_mlp\.0\.weight$", "a network of this project already: it is in a checkpoint that needs no import"),
    (r"^(model\.)?map_noise\.|(^|\.)map_layer0\.", "a network of NVlabs/edm, but without all of its U-Net"),
)


def unwrapped(state: Any, depth: int = 3) -> Any:
    """The same without the prefixes of modules that only hold another, in it and in the tables inside."""
    if isinstance(state, list) and depth:
        return [unwrapped(part, depth - 1) for part in state]
    if not isinstance(state, dict) or depth == 0:
        return state
    return {WRAPPER.sub(r"\1", str(key)): unwrapped(value, depth - 1) for key, value in state.items()}


def recognise(state: Any) -> Importer:
    """The importer for a loaded file. Raises UnsupportedCheckpointError, naming what it is where that is known."""
    return recognised(state, Flags())[1]


def recognised(state: Any, flags: Flags) -> tuple[Any, Importer]:
    """What of a loaded file the importer takes, and the importer."""
    state = unwrapped(state)
    if not isinstance(state, dict):
        first = state[0] if isinstance(state, list) and state else None
        if isinstance(first, dict):
            if _keys(first) >= HO:
                return state, import_ermongroup
            raise UnsupportedCheckpointError(_name(_keys(first)) or "it is a list, and not of a project known here")
        raise UnsupportedCheckpointError("it is not a table of tensors: no checkpoint of a project known here")
    keys = _keys(state)
    if importer := _importer(state, keys):
        return state, importer
    if {"network", "ema", "optimizer"} <= keys:
        raise UnsupportedCheckpointError(
            "it is the state of a training here: its checkpoint-*.safetensors needs no import"
        )
    inside = {name: _keys(value) for name, value in state.items() if isinstance(value, dict)}
    inside |= {f"{name}.shadow": _keys(state[name].get("shadow")) for name in inside}
    for part in (keys, *inside.values()):
        if name := _name(part):
            raise UnsupportedCheckpointError(name)
    wanted = NETWORKS if flags.weights == "raw" else (*AVERAGES, *NETWORKS)
    for name in wanted:
        if name in inside and (importer := _importer(state[name], inside[name])):
            return state[name], importer
    if {"state", "param_groups"} <= keys:
        raise UnsupportedCheckpointError(
            "it is an optimiser's state, not a network's: import the file with the weights"
        )
    raise UnsupportedCheckpointError("it is not a checkpoint of a project known here (see --help)")


def _keys(state: Any) -> set[str]:
    return {str(key) for key in state} if isinstance(state, Mapping) else set()


def _importer(state: dict[str, Any], keys: set[str]) -> Importer | None:
    if {"net_model", "ema_model"} <= keys and _keys(state["ema_model"]) >= W86:
        return import_w86763777
    if {"model", "optimizer"} <= keys and _keys(state["model"]) >= TQCH:
        return import_tqch
    if any(key.endswith(LUCIDRAINS) for key in keys | _keys(state.get("model"))):
        return import_lucidrains
    if not all(isinstance(value, Tensor) for value in state.values()):
        return None
    if keys >= HO:
        return import_pesser
    if keys >= TQCH:
        return import_tqch
    if "betas" in keys and any(key.startswith("ema_model.downs.") for key in keys):
        return import_abarankab
    if keys >= ABARANKAB:
        return import_abarankab
    if any(key.removeprefix("model.") == "map_layer0.weight" for key in keys):
        return import_edm
    if keys >= OPENAI:
        if not any(key.startswith("output_blocks.") for key in keys):
            raise UnsupportedCheckpointError(
                "it is a classifier, of guided-diffusion: it sees noise and makes no images"
            )
        return import_openai
    return None


def _name(keys: set[str]) -> str | None:
    if {"time_embedding.linear_1.weight", "conv_in.weight"} <= keys:
        return "it has diffusers' weights without their configuration: give the folder with config.json"
    for pattern, what in NAMED:
        if any(re.search(pattern, key) for key in keys):
            return f"it is {what}"
    return None
