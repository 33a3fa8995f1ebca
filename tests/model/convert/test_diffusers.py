"""Folders of diffusers give its outputs and its diffusion, wherever they keep what; the rest is refused by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.convert.diffusers import OLD_NAMES
from model.convert.importer import import_path, main
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.nn.unet import UNet

ALONE = {"num_timesteps": 1000, "schedule": "linear", "prediction": "eps", "variance": "fixed_small"}
"""What a network without a scheduler does not tell."""
BASE = {
    "sample_size": (8, 16),
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
}
RESNETS = {
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "upsample_type": "resnet",
    "downsample_type": "resnet",
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "google": {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
    "classes": {"num_class_embeds": 5, "layers_per_block": 2},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8, "attention_head_dim": 8},
    "table": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "learned variance": {"out_channels": 2, "time_embedding_dim": 24},
    "residual blocks": RESNETS,
}
FILE = "diffusion_pytorch_model.safetensors"


def theirs(kind: str = "plain", seed: int = 0, **values: Any) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**(BASE | KINDS[kind] | values)).eval()


def alone(model: UNet2DModel) -> Flags:
    values = {k: v for k, v in ALONE.items() if k != "variance" or model.config.out_channels == 1}
    return Flags(**values)


def inputs(model: UNet2DModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    y = torch.tensor([0, 4, 2]) if model.config.num_class_embeds else None
    return torch.randn(3, 1, 8, 16, generator=generator), torch.tensor([0, 500, 999]), y


def same_outputs(model: UNet2DModel, imported: Imported) -> None:
    network = UNet(imported.unet).eval()
    network.load_state_dict(imported.weights)
    x, t, y = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, y), model(x, t, y).sample, rtol=0, atol=1e-5)


def edit(path: Path, **values: Any) -> None:
    """Changes fields of a JSON file; None stays null, and ... takes a field away."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [True, False])
def test_networks_of_diffusers_give_their_outputs(kind: str, safe: bool, tmp_path: Path) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    same_outputs(model, import_path(tmp_path, alone(model)))


def test_old_key_names_are_known(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    path = tmp_path / FILE
    weights = load_file(path)
    for new, old in {new: old for old, new in OLD_NAMES.items()}.items():
        weights = {k.replace(f".{new}.", f".{old}.") if ".attentions." in k else k: v for k, v in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, path)
    same_outputs(model, import_path(tmp_path, Flags(**ALONE)))


# Schedulers


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({}, ("eps", "fixed_small", False)),
        ({"variance_type": "fixed_large", "beta_schedule": "squaredcos_cap_v2"}, ("eps", "fixed_large", False)),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, ("v", "fixed_small", True)),
        ({"prediction_type": "sample", "num_train_timesteps": 200}, ("x0", "fixed_small", False)),
        ({"trained_betas": np.linspace(1e-4, 0.03, 500).tolist(), "num_train_timesteps": 500}, None),
    ],
)
def test_a_pipeline_brings_its_diffusion(scheduler: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    model, noise_scheduler = theirs(), DDPMScheduler(**scheduler)
    DDPMPipeline(model, noise_scheduler).save_pretrained(tmp_path)
    imported = import_path(tmp_path, Flags())
    same_outputs(model, imported)
    diffusion = imported.diffusion
    assert expected is None or (diffusion.prediction, diffusion.variance, diffusion.zero_terminal_snr) == expected
    # Theirs are float32, whose betas differ by a thousandth from processor to processor
    np.testing.assert_allclose(np.cumprod(1 - diffusion.betas()), noise_scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy
@pytest.mark.parametrize("ends", [{}, {"beta_start": 1e-5, "beta_end": 0.03, "num_train_timesteps": 300}], ids=str)
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        (DDPMScheduler, "scaled_linear"),
        (DDPMScheduler, "sigmoid"),
        (DDPMScheduler, "laplace"),
        (HeunDiscreteScheduler, "scaled_linear"),
        (HeunDiscreteScheduler, "exp"),  # whose betas are all the same
    ],
)
def test_other_schedules_come_in_as_their_betas(
    kind: Any, schedule: str, ends: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs().save_pretrained(tmp_path)
    scheduler = kind(beta_schedule=schedule, **ends)
    scheduler.save_pretrained(tmp_path)
    assert main([str(tmp_path), str(tmp_path / "ours.safetensors")]) == 0
    diffusion = checkpoint.load(tmp_path / "ours.safetensors").config.diffusion
    assert diffusion.schedule == ("linear" if schedule == "exp" else "trained")
    assert ("its own betas" in capsys.readouterr().err) == (schedule != "exp")
    np.testing.assert_allclose(np.cumprod(1 - diffusion.betas()), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_trained_betas_come_in_exactly(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    betas = np.random.default_rng(0).uniform(1e-4, 0.03, 300).tolist()
    DDPMScheduler(300, trained_betas=betas).save_pretrained(tmp_path)
    assert import_path(tmp_path, Flags()).diffusion.trained_betas == tuple(betas)


SCHEDULER = {
    "num_train_timesteps": 500,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "variance_type": "fixed_large",
}
LAYOUTS: dict[str, tuple[str, str, str]] = {  # of the network, of the scheduler, what the user names
    "flat": (".", ".", "."),
    "pipeline": ("unet", "scheduler", "."),
    "the pipeline's network": ("unet", "scheduler", "unet"),
    "a training's checkpoint": ("checkpoint-500/unet", "scheduler", "checkpoint-500"),
    "a training checkpoint's network": ("checkpoint-500/unet", "scheduler", "checkpoint-500/unet"),
    "beside unet": ("unet", ".", "."),
    "in unet": ("unet", "unet", "."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_scheduler_is_found_wherever_it_is(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, scheduler, source = LAYOUTS[layout]
    theirs().save_pretrained(tmp_path / network)
    DDPMScheduler(**SCHEDULER).save_pretrained(tmp_path / scheduler)
    found = import_path(tmp_path / source, Flags())
    assert (found.diffusion.num_timesteps, found.diffusion.schedule) == (500, "cosine")
    assert (found.diffusion.prediction, found.diffusion.variance) == ("v", "fixed_large")
    assert f"DDPMScheduler in {tmp_path / scheduler / 'scheduler_config.json'}" in found.origin
    monkeypatch.chdir(tmp_path / source)
    assert import_path(Path(), Flags()).diffusion == found.diffusion


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # theirs, of numpy
@pytest.mark.parametrize(
    "kind",
    [
        DDIMScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        UniPCMultistepScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
    ],
)
def test_schedulers_that_share_the_betas_come_in(kind: Any, tmp_path: Path) -> None:
    for scheduler in (kind(), kind.from_config(DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)):
        theirs().save_pretrained(tmp_path)
        scheduler.save_pretrained(tmp_path)
        found = import_path(tmp_path, Flags())
        ours = np.cumprod(1 - found.diffusion.betas())
        np.testing.assert_allclose(ours, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
        assert found.diffusion.variance == "fixed_small"


@pytest.mark.parametrize(
    ("kind", "ends"), [("DDPMScheduler", (1e-4, 0.02)), ("HeunDiscreteScheduler", (8.5e-4, 0.012))]
)
def test_a_short_configuration_has_the_classes_defaults(kind: str, ends: tuple[float, float], tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    betas = import_path(tmp_path, Flags()).diffusion.betas()
    assert (len(betas), betas[0], betas[-1]) == pytest.approx((1000, *ends))


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, DDIMScheduler])
def test_a_variance_that_is_not_named_is_told(kind: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs().save_pretrained(tmp_path)
    kind().save_pretrained(tmp_path)
    assert main([str(tmp_path), str(tmp_path / "ours.safetensors")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "assumed: variance fixed_small: its scheduler names none" in line


@pytest.mark.parametrize(
    "kind",
    [
        "FlowMatchEulerDiscreteScheduler",
        "ScoreSdeVeScheduler",
        "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
        "IPNDMScheduler",
        "KarrasVeScheduler",
        "RePaintScheduler",
    ],
)
def test_other_schedulers_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    if issubclass(scheduler := getattr(diffusers, kind, object), diffusers.ConfigMixin):
        scheduler().save_pretrained(tmp_path)
    else:
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(UnsupportedCheckpointError, match=f"its scheduler is a {kind}"):
        import_path(tmp_path, Flags())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "limit"),
    [
        ({}, "clamp"),
        ({"clip_sample": False}, "none"),
        ({"thresholding": True}, "clamp"),  # its sample_max_value of 1 leaves a clamp
        ({"thresholding": True, "sample_max_value": 1e6}, "dynamic"),
        ({"_class_name": "PNDMScheduler", "clip_sample": ...}, "none"),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": ...}, "none"),
        ({"clip_sample": ...}, "clamp"),
    ],
    ids=str,
)
def test_the_limit_of_x0_is_the_schedulers(values: dict[str, Any], limit: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    edit(tmp_path / "scheduler_config.json", **values)
    assert main([str(tmp_path), str(tmp_path / "ours.safetensors")]) == 0
    assert checkpoint.load(tmp_path / "ours.safetensors").config.sampling.limit == limit


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clip_sample_range": 2.0}, "clip_sample_range is 2.0"),
        ({"thresholding": True, "sample_max_value": 1.5}, "sample_max_value is 1.5"),
        ({"thresholding": True, "sample_max_value": 1e6, "dynamic_thresholding_ratio": 0.9}, "dynamic_thresholding"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
        ({"beta_schedule": "karras"}, "beta_schedule is 'karras'"),
        ({"trained_betas": [0.1, 0.2, 1.0]}, "trained_betas must be numbers between 0 and 1, not 1.0"),
        ({"variance_type": "learned"}, "variance_type 'learned'"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"timestep_type": "continuous"}, "timestep_type"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ({"beta_start": -1}, "beta_start is -1"),
        ({"trained_betas": "some"}, "trained_betas"),
        ({"trained_betas": [0.1, None]}, "trained_betas"),
        ({"_class_name": ...}, "of a class that it does not name"),
        ({"prediction_type": ["epsilon"]}, "contents are not"),
    ],
    ids=str,
)
def test_fields_that_cannot_be_honoured_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    DDPMScheduler().save_pretrained(tmp_path)
    edit(tmp_path / "scheduler_config.json", **values)
    with pytest.raises(UnsupportedCheckpointError, match=message):
        import_path(tmp_path, Flags())


@pytest.mark.parametrize("flag", ALONE)
def test_a_network_without_scheduler_asks_for_its_diffusion(flag: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=f"add --{flag} {ALONE[flag]}, or what"):
        import_path(tmp_path, Flags(**{name: value for name, value in ALONE.items() if name != flag}))


def test_linear_betas_of_other_lengths_are_asked_for(tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    flags = ALONE | {"num_timesteps": 200}
    with pytest.raises(UnsupportedCheckpointError, match=r"--schedule_low 2e-05 --schedule_high 0\.004"):
        import_path(tmp_path, Flags(**flags))
    diffusion = import_path(tmp_path, Flags(**flags, schedule_low=2e-5, schedule_high=0.004)).diffusion
    np.testing.assert_allclose(diffusion.betas(), DDPMScheduler(200).betas, rtol=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_timesteps": 500}, "--num_timesteps 500 contradicts the file, which has 1000"),
        ({"prediction": "v"}, "--prediction v contradicts the file, which has eps"),
        ({"variance": "fixed_large"}, "which has fixed_small"),
        ({"image_size": (8, 8)}, "--image_size 8,8 contradicts the file, which has 8,16"),
        ({"weights": "raw"}, "--weights means nothing"),
        ({"norm_groups": 4}, "which has 8"),
        ({"null_class": True}, "--null_class needs"),
    ],
    ids=str,
)
def test_flags_that_contradict_the_folder_are_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    DDPMPipeline(theirs(), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedCheckpointError, match=message):
        import_path(tmp_path, Flags(**flags))


# Which weights


@pytest.mark.slow
def test_the_average_beside_is_preferred(tmp_path: Path) -> None:
    raw, average = theirs(seed=1), theirs(seed=2)
    raw.save_pretrained(tmp_path / "checkpoint-5" / "unet")
    average.save_pretrained(tmp_path / "checkpoint-5" / "unet_ema")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    for source, weights, expected in (
        ("checkpoint-5", None, average),
        ("checkpoint-5", "ema", average),
        ("checkpoint-5", "raw", raw),
        ("checkpoint-5/unet", None, raw),
        ("checkpoint-5/unet", "ema", average),
        ("checkpoint-5/unet_ema", None, average),
    ):
        same_outputs(expected, import_path(tmp_path / source, Flags(weights=weights)))
    assert any("unet_ema" in text for text in import_path(tmp_path / "checkpoint-5/unet", Flags()).assumed)


@pytest.mark.slow
def test_sharded_weights_and_variants_are_read(tmp_path: Path) -> None:
    model = theirs()
    for safe in (True, False):
        folder = tmp_path / f"sharded-{safe}"
        model.save_pretrained(folder, max_shard_size="30KB", safe_serialization=safe)
        assert len(list(folder.glob("*-of-*"))) > 2
        same_outputs(model, import_path(folder, Flags(**ALONE)))
    model.save_pretrained(tmp_path / "shards of a variant", max_shard_size="30KB", variant="fp16")
    same_outputs(model, import_path(tmp_path / "shards of a variant", Flags(**ALONE)))

    half = theirs().half()
    half.save_pretrained(tmp_path / "half", variant="fp16")
    found = import_path(tmp_path / "half", Flags(**ALONE))
    assert all(weight.dtype == torch.float32 for weight in found.weights.values())
    same_outputs(half.float(), found)
    assert "fp16.safetensors" in found.origin
    model.save_pretrained(tmp_path / "half")
    same_outputs(model, import_path(tmp_path / "half", Flags(**ALONE)))  # full precision first
    (tmp_path / "half" / FILE).unlink()
    model.save_pretrained(tmp_path / "half", variant="non_ema")
    with pytest.raises(UnsupportedCheckpointError, match="leave one of them there"):
        import_path(tmp_path / "half", Flags(**ALONE))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "does not tell which tensor"),
        ({"weight_map": {"a": "../../secret.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "absent.safetensors"}}, "absent.safetensors is not there"),
    ],
    ids=str,
)
def test_a_wrong_index_of_shards_is_refused(index: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedCheckpointError, match=message):
        import_path(tmp_path, Flags(**ALONE))


# What is refused


@pytest.mark.parametrize("source", [".", "unet"])
@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, "it is a LDMPipeline: .* on latents"),
        ({"_class_name": "MyPipeline", "vae": ["diffusers", "AutoencoderKL"]}, "on latents of its vae"),
        ({"_class_name": "ConsistencyModelPipeline"}, "it is a ConsistencyModelPipeline"),
        ({"_class_name": "ScoreSdeVePipeline"}, "it is a ScoreSdeVePipeline"),
    ],
    ids=lambda value: value.get("_class_name") if isinstance(value, dict) else "",
)
def test_other_pipelines_are_refused_by_name(index: dict[str, Any], message: str, source: str, tmp_path: Path) -> None:
    DDPMPipeline(theirs(), DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedCheckpointError, match=message):
        import_path(tmp_path / source, Flags())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"act_fn": "mish"}, "act_fn is 'mish'"),
        ({"block_out_channels": (16, 24)}, "not whole multiples"),
        ({"time_embedding_type": "fourier"}, "'fourier'"),
        ({"class_embed_type": "identity"}, "class_embed_type"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D")}, "differ on the way down and up"),
        ({"out_channels": 3}, "1 channels in and 3 out"),
        ({"downsample_type": "resnet", "down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "differ|mixes"),
        ({"downsample_type": None}, "downsample_type is None"),
        ({"num_class_embeds": 7}, "class_embedding.weight"),
        ({"attn_norm_num_groups": 4}, "attn_norm_num_groups is 4"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups is None"),
        ({"block_out_channels": 5}, "contents are not"),
        ({"block_out_channels": [10**9, 10**9]}, "base_channels must be"),
        ({"layers_per_block": 10**9}, "num_res_blocks must be"),
        ({"down_block_types": ["DownBlock2D"] * 10**5, "up_block_types": ["UpBlock2D"] * 10**5}, "levels differ"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_expressed_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **values)
    with pytest.raises(UnsupportedCheckpointError, match=message):
        import_path(tmp_path, Flags(**ALONE))


def test_the_middles_norm_of_its_own_is_right_where_equal(tmp_path: Path) -> None:
    model = theirs(attn_norm_num_groups=8)
    model.save_pretrained(tmp_path)
    same_outputs(model, import_path(tmp_path, Flags(**ALONE)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_out.bias"), "'conv_out.bias' is missing"),
        (lambda w: w.pop("mid_block.attentions.0.to_k.weight"), "to_k.weight' is missing"),
        (lambda w: w.pop("time_embedding.linear_1.weight"), "linear_1.weight' is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 tensors belong to no layer .* 'extra'"),
        (lambda w: w.update({"conv_out.bias": torch.zeros(2)}), "out_conv.bias"),
        (lambda w: w.update({"conv_out.bias": torch.tensor([torch.nan])}), "'out_conv.bias' .* not finite"),
        (lambda w: w.update({"conv_out.bias": torch.tensor([1])}), "out_conv.bias is int64"),
        (
            lambda w: w.update({"time_embedding.linear_2.weight": torch.zeros(16, 256)}),  # as many numbers
            r"time_mlp.2.weight: \(16, 256\) in the file, where the network has \(64, 64\)",
        ),
        (
            lambda w: w.update({k: w[k].T.contiguous() for k in w if k.endswith("time_emb_proj.weight")}),
            r"time_bias.weight: \(64, 16\) in the file, where the network has \(16, 64\)",
        ),
        (lambda w: w.update({"mid_block.attentions.0.to_q.weight": torch.zeros(96, 32)}), "different shapes"),
        (lambda w: w.update({"time_embedding.linear_1.weight": torch.zeros(1)}), "contents are not"),
    ],
    ids=[
        "missing",
        "missing key",
        "missing first",
        "surplus",
        "shape",
        "nan",
        "integers",
        "another shape",
        "transposed",
        "one of three",
        "no matrix",
    ],
)
def test_weights_that_are_not_the_networks_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    theirs().save_pretrained(tmp_path)
    weights = load_file(tmp_path / FILE)
    change(weights)
    save_file(weights, tmp_path / FILE)
    with pytest.raises(UnsupportedCheckpointError, match=message):
        import_path(tmp_path, Flags(**ALONE))


def test_a_folder_without_a_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"no config\.json"):
        import_path(tmp_path, Flags())
    (tmp_path / "model.ckpt-790000.index").touch()
    with pytest.raises(UnsupportedCheckpointError, match="TensorFlow"):
        import_path(tmp_path, Flags())
    shutil.rmtree(tmp_path)
    theirs().save_pretrained(tmp_path)
    (tmp_path / FILE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:07\nsize 1400000\n")
    with pytest.raises(UnsupportedCheckpointError, match=f"{FILE} is a Git LFS pointer"):
        import_path(tmp_path, Flags(**ALONE))
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:07\nsize 1400000\n")
    with pytest.raises(UnsupportedCheckpointError, match=r"config\.json is a Git LFS pointer"):
        import_path(tmp_path, Flags(**ALONE))


def test_the_command_makes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    model = theirs("classes")
    model.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "ours.safetensors"
    flags = "--null_class --class_names a,b,c,d --schedule cosine --num_timesteps 500 --prediction v "
    assert main([str(tmp_path / "theirs"), str(out), *flags.split(), "--variance", "fixed_large"]) == 0
    loaded = checkpoint.load(out)
    assert loaded.config.class_names == ("a", "b", "c", "d")
    assert loaded.config.unet.null_class
    diffusion = loaded.config.diffusion
    assert (diffusion.schedule, diffusion.num_timesteps) == ("cosine", 500)
    assert (diffusion.prediction, diffusion.variance) == ("v", "fixed_large")
    assert loaded.config.provenance["imported_from"] == "theirs"
    x, t, y = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(x, t, y), model(x, t, y).sample, rtol=0, atol=1e-5)
