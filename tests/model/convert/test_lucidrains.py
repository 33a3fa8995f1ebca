"""lucidrains' own outputs from its own files: network, objective, schedule, guidance, sampling, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.backends.compile import compile_for_inference
from model.convert import scheduler
from model.convert.exporter import main as export_main
from model.convert.exporter import scheduler_json
from model.convert.importer import import_path, load_weights, main
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.diffusion import DiffusionConfig, GaussianDiffusion, sigmoid_betas
from model.nn.config import LucidrainsConfig
from model.nn.lucidrains import LucidrainsUNet
from model.sampling.schedule import make_schedule
from model.sampling.step import cfg_forward, sample
from tests.fixtures import HERE, expected, theirs

SMALL, CLASSES, VARIANCE = (f"lucidrains/{name}.pt" for name in ("small", "classes", "variance"))
FLAGS: dict[str, dict[str, Any]] = {
    SMALL: {"image_size": (8, 12)},
    CLASSES: {"image_size": (8, 8), "num_heads": 2},
    VARIANCE: {"image_size": (4, 4), "num_timesteps": 1000, "schedule": "linear", "prediction": "eps"},
}
CPU = torch.device("cpu")


def imported(name: str, **flags: Any) -> Imported:
    return import_path(theirs(name), Flags(**FLAGS[name] | flags))


def network_of(found: Imported) -> LucidrainsUNet:
    assert isinstance(found.unet, LucidrainsConfig)
    network = LucidrainsUNet(found.unet).eval().requires_grad_(False)
    network.load_state_dict(found.weights)
    return network


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    x, t, y = (torch.from_numpy(expected(name)[key]) for key in "xty")
    return x, t, y if len(y) else None


@pytest.mark.parametrize(
    ("file", "output", "weights"),
    [(SMALL, "ema_out", None), (SMALL, "raw_out", "raw"), (CLASSES, "out", None), (VARIANCE, "out", None)],
)
def test_their_outputs_are_reproduced(file: str, output: str, weights: str | None) -> None:
    network, (x, t, y) = network_of(imported(file, weights=weights)), inputs(file)
    out = network(x, t, y)
    exact = network.double()(x.double(), t, y)
    scale = exact.abs().max()
    assert scale > 0.5
    assert (out - exact).abs().max() <= 2e-6 * scale
    assert (out - torch.from_numpy(expected(file)[output])).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize("file", [SMALL, CLASSES, VARIANCE])
def test_the_packed_network_computes_the_same(file: str) -> None:
    network, (x, t, y) = network_of(imported(file)), inputs(file)
    plain = network(x, t, y)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.1)):
        packed = compile_for_inference(network, CPU, precision)
        out = packed(x, t, y)
        assert out.dtype == torch.float32
        assert (out - plain).abs().max() <= tolerance * plain.abs().max()
        assert torch.equal(packed(x, t, y), out)  # with the embedding kept


def test_the_packed_network_keeps_few_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.backends.cpu_lucidrains.CACHE_BYTES", 2000)
    network, (x, t, y) = network_of(imported(CLASSES)), inputs(CLASSES)
    packed = compile_for_inference(network, CPU, "fp32")
    assert y is not None
    first = packed(x, t, y)
    assert torch.equal(packed(x.flip(0), t.flip(0), y.flip(0)).flip(0), first)
    with pytest.raises(ValueError, match="needs classes"):
        packed(x, t, None)


def test_the_class_that_means_none_guides_as_theirs() -> None:
    network, (x, t, y) = network_of(imported(CLASSES)), inputs(CLASSES)
    null = torch.full_like(t, 5)
    null_out = torch.from_numpy(expected(CLASSES)["null_out"])
    assert (network(x, t, null) - null_out).abs().max() <= 2e-6 * null_out.abs().max()
    guided = torch.from_numpy(expected(CLASSES)["guided"])
    ours = cfg_forward(network, x, t, y, torch.full((len(x),), 3.0), 5)
    assert (ours - guided).abs().max() <= 5e-6 * guided.abs().max()


def test_their_trainers_file_tells_its_diffusion() -> None:
    diffusion = imported(SMALL).diffusion
    np.testing.assert_allclose(diffusion.betas(), expected(SMALL)["betas"], rtol=1e-6)
    assert (diffusion.schedule, diffusion.prediction, diffusion.weighting) == ("sigmoid", "v", "min_snr")
    assert diffusion.variance == "fixed_small"


def test_their_own_sampling_is_reproduced() -> None:
    found = imported(SMALL)
    schedule = make_schedule(GaussianDiffusion(found.diffusion), "ddim", 5, limit="clamp")
    ours = sample(network_of(found), schedule, (3, 8, 12), seeds=[5, 5], indices=[0, 1])
    assert ((ours + 1) / 2 - torch.from_numpy(expected(SMALL)["sampled"])).abs().max() <= 1e-5


OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("half", [False, True])
def test_the_objective_is_read_from_the_loss_weight(objective: str, half: bool, tmp_path: Path) -> None:
    state = load_weights(theirs(CLASSES))
    with np.load(HERE / "lucidrains/objectives.npz") as tables:
        for name in (name for name in tables.files if name.startswith(f"{objective} ")):
            _, schedule, gamma = name.split()
            if half and schedule != "sigmoid":
                continue
            told = dict(zip(("betas", "loss_weight"), torch.from_numpy(tables[name]), strict=True))
            torch.save(state | {k: t.bfloat16() if half else t for k, t in told.items()}, tmp_path / "x.pt")
            found = import_path(tmp_path / "x.pt", Flags(**FLAGS[CLASSES]))
            assert (found.diffusion.schedule, found.diffusion.prediction) == (schedule, OBJECTIVES[objective]), name
            assert found.diffusion.weighting == ("min_snr" if gamma == "5" else "none"), name
            assert any("min_snr_gamma 3" in text for text in found.assumed) == (gamma == "3"), name


def test_what_nothing_tells_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(theirs(SMALL)), str(tmp_path / "x.safetensors"), "--image_size", "8,12"]
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "50 timesteps, sigmoid, prediction v, fixed_small, x0 clamped to ±1 (from its betas and loss_weight)" in said
    assert "assumed: time_theta 10000" in said


def test_a_checkpoint_of_it_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.safetensors"
    assert main([str(theirs(CLASSES)), str(path), "--image_size", "8,8", "--num_heads", "2"]) == 0
    loaded, (x, t, y) = checkpoint.load(path), inputs(CLASSES)
    assert isinstance(loaded.config.unet, LucidrainsConfig)
    assert loaded.config.unet == imported(CLASSES).unet
    assert torch.equal(loaded.network(x, t, y), network_of(imported(CLASSES))(x, t, y))
    assert export_main([str(path), str(tmp_path / "folder")]) == 2
    assert "cannot express this network: it is lucidrains'" in capsys.readouterr().err


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_diffusers_gets_the_sigmoid_schedule_as_betas(zero_terminal_snr: bool) -> None:
    ours = DiffusionConfig(100, "sigmoid", prediction="v", zero_terminal_snr=zero_terminal_snr)
    theirs_json = scheduler_json(ours, "clamp")
    assert theirs_json["trained_betas"] == sigmoid_betas(100).tolist()
    assert scheduler.read(theirs_json, learned_variance=False)[0] == ours


def network_file(change: Callable[[dict[str, Any]], Any], path: Path, name: str = SMALL) -> Path:
    """A fixture, changed."""
    state = load_weights(theirs(name))
    torch.save(change(state) or state, path)
    return path


def old(state: dict[str, Any], memory: bool = True, folds: bool = True) -> dict[str, Any]:
    """As of an older version: names are all that is looked at."""
    network = {name.removeprefix("ema_model."): t for name, t in state["ema"].items() if name.startswith("ema_model.")}
    for name in list(network):
        if name.endswith("norm.g") and ".block" in name:
            network[name.replace("norm.g", "norm.weight")] = network.pop(name).flatten()
        elif name.endswith("mem_kv") and not memory:
            del network[name]
    if not folds:
        network["model.downs.0.3.weight"] = network.pop("model.downs.0.3.1.weight")
    return network


def version(state: dict[str, Any]) -> dict[str, Any]:
    return {"step": 1, "model": old(state), "opt": {}, "version": "1.10.4"}


def without_memory(state: dict[str, Any]) -> dict[str, Any]:
    return old(state, memory=False)


def strided(state: dict[str, Any]) -> dict[str, Any]:
    return old(state, memory=False, folds=False)


def ema_only(state: dict[str, Any]) -> dict[str, Any]:
    return {name: t for name, t in state["ema"].items() if not name.startswith("online_model.")}


def other_wrapper(state: dict[str, Any]) -> dict[str, Any]:
    return {name: t for name, t in state["model"].items() if name.startswith("model.")}


def network_alone(state: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("model."): t for name, t in other_wrapper(state).items()}


def renamed(old_name: str, new: str, tensor: Tensor | None = None) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        process = state["ema"]
        kept = process.pop(f"ema_model.{old_name}")
        process[f"ema_model.{new}"] = kept if tensor is None else tensor

    return change


INIT, FOLD, MEMORY = "model.init_conv.weight", "model.downs.0.3.1.weight", "model.mid_attn.mem_kv"


@pytest.mark.parametrize(
    ("change", "flags", "why"),
    [
        (None, {"image_size": None}, "add --image_size HEIGHT,WIDTH"),
        (None, {"image_size": (8, 9)}, "image_size must be a multiple of 2"),
        (None, {"num_heads": 2}, "--num_heads means nothing for this file"),
        (None, {"prediction": "eps"}, "--prediction eps contradicts the file, which has v"),
        (None, {"schedule": "linear"}, "--schedule linear contradicts the file, which has sigmoid"),
        (None, {"null_class": True}, "--null_class True contradicts the file, which has False"),
        (old, {}, "made by denoising-diffusion-pytorch from 1.9.0 to 1.11: its network has group norms"),
        (version, {"weights": "raw"}, "denoising-diffusion-pytorch 1.10.4, as the file says"),
        (version, {"weights": "ema"}, "it has no average"),
        (without_memory, {}, "from 0.32.0 to 1.8: its"),
        (strided, {}, "before 0.32.0: its"),
        (ema_only, {"weights": "raw"}, "it has no weights but the average"),
        (other_wrapper, {}, "another diffusion than GaussianDiffusion"),
        (
            lambda s: {k.removeprefix("model."): t for k, t in other_wrapper(s).items()},
            {},
            "add --num_timesteps 1000 --sc",
        ),
        (renamed(INIT, INIT, torch.zeros(6, 6, 7, 7)), {}, "it is self-conditioned"),
        (renamed(INIT, INIT, torch.zeros(6, 3, 7)), {}, "sequences"),
        (renamed(INIT, INIT, torch.zeros(6, 4, 7, 7)), {}, "makes 3 channels of 4"),
        (renamed("loss_weight", "loss_weight", torch.ones(50) * 0.3), {}, "that of no objective"),
        (renamed("loss_weight", "loss_weight", torch.full((50,), torch.nan)), {}, "that of no objective"),
        (renamed("loss_weight", "p2_loss_weight"), {}, "add --prediction v"),
        (renamed("betas", "betas", torch.zeros(50)), {}, "not from 2 to 100000 numbers between 0 and 1"),
        (renamed(FOLD, FOLD, torch.zeros(9, 24, 1, 1)), {}, "widths that are multiples of its dim"),
        (renamed(FOLD, FOLD, torch.zeros(8, 25, 1, 1)), {}, "downs.0.resample.conv.weight: (8, 25,"),
        (renamed(FOLD, "model.downs.0.3.9.weight"), {}, "is missing"),
        (renamed(INIT, INIT, torch.full((6, 3, 7, 7), torch.inf)), {}, "not finite"),
        (
            renamed("model.mid_attn.mem_kv", "model.mid_attn.mem_kv", torch.zeros(2, 3, 5, 4)),
            {},
            "numbers of learned keys",
        ),
        (renamed("alphas_cumprod", "model.more"), {}, "1 tensors belong to no layer"),
    ],
)
def test_other_files_are_refused_by_name(change: Any, flags: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = network_file(change or (lambda state: None), tmp_path / "x.pt")
    with pytest.raises(UnsupportedCheckpointError) as refused:
        import_path(path, Flags(**{"image_size": (8, 12)} | flags))
    assert why in str(refused.value)


def test_old_classifier_free_files_are_refused(tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        for name in [name for name in state if name.endswith("norm.g") and ".block" in name]:
            state[name.replace("norm.g", "norm.weight")] = state.pop(name).flatten()

    path = network_file(change, tmp_path / "x.pt", CLASSES)
    with pytest.raises(UnsupportedCheckpointError, match=r"denoising-diffusion-pytorch before 2\.0\.0"):
        import_path(path, Flags(**FLAGS[CLASSES]))


@pytest.mark.parametrize(
    ("num_heads", "why"), [(None, "add --num_heads"), (3, "--num_heads 3 does not divide the 16 channels")]
)
def test_the_heads_of_a_changed_middle_are_asked_for(num_heads: int | None, why: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=why):
        imported(CLASSES, num_heads=num_heads)
