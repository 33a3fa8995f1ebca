"""Other projects' weights give other projects' outputs; what is not theirs is refused with a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.convert.diffusers import OLD_NAMES
from model.convert.layout import Flags, ImportRefused
from model.diffusion import GaussianDiffusion
from model.importers import import_path, load_weights, main
from model.nn.unet import UNet

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason=f"no {FIXTURES}")
IMPROVED = {"num_heads": 4, "num_timesteps": 4000}
GUIDED = {"head_channels": 16, "new_attention_order": True}


# The bar is 2e-6. The groups of `labels` are single channels, and its attention leaves its images in channels_last,
# where a GroupNorm sums least exactly: its outputs are 3.1e-6 (EMA) and 4.4e-6 (raw) from what float64 gives, and the
# order of operations that made them differs from itself by 3.3e-6 between two and five threads. Ours are 1.2e-6 from
# float64.
@needs_fixtures
@pytest.mark.parametrize(
    ("file", "output", "flags", "tolerance"),
    [
        ("original/labels-linear-model.pth", "ema_out", {}, 5e-6),
        ("original/labels-linear-model.pth", "raw_out", {"weights": "raw"}, 5e-6),
        ("original/plain-cosine-model.pth", "ema_out", {}, 2e-6),
        ("original/plain-cosine-model.pth", "raw_out", {"weights": "raw"}, 2e-6),
        ("w86763777/small.pt", "ema_out", {}, 2e-6),
        ("w86763777/small.pt", "raw_out", {"weights": "raw"}, 2e-6),
        ("improved-diffusion/cifar-like.pt", "out", IMPROVED, 2e-6),
        ("guided-diffusion/imagenet-like.pt", "out", GUIDED, 2e-6),
    ],
)
def test_their_outputs_are_reproduced(file: str, output: str, flags: dict[str, Any], tolerance: float) -> None:
    weights, unet, diffusion = import_path(FIXTURES / file, Flags(**flags))
    network = UNet(unet).eval()
    network.load_state_dict(weights)
    stem = (FIXTURES / file).stem.removesuffix("-model")
    expected = np.load((FIXTURES / file).with_name(f"{stem}-expected.npz"))
    x, t = torch.from_numpy(expected["x"]), torch.from_numpy(expected["t"])
    y = torch.from_numpy(expected["y"]) if unet.num_classes else None
    with torch.no_grad():
        found = network(x, t, y)
        exact = network.double()(x.double(), t, y)
    assert (found - exact).abs().max() <= 2e-6
    assert (found - torch.from_numpy(expected[output])).abs().max() <= tolerance
    if "betas" in expected:
        np.testing.assert_allclose(diffusion.betas(), expected["betas"], rtol=1e-5)
    assert (diffusion.variance == "learned_range") == unet.learned_variance


@needs_fixtures
@pytest.mark.parametrize("file", ["labels-linear", "plain-cosine"])
def test_the_originals_mean_is_reproduced(file: str) -> None:
    weights, unet, config = import_path(FIXTURES / "original" / f"{file}-model.pth", Flags())
    network = UNet(unet).eval()
    network.load_state_dict(weights)
    expected = np.load(FIXTURES / "original" / f"{file}-expected.npz")
    x, t = torch.from_numpy(expected["x"]), torch.from_numpy(expected["t"])
    y = torch.from_numpy(expected["y"]) if unet.num_classes else None
    with torch.no_grad():
        mean, _ = GaussianDiffusion(config).p_mean_log_variance(network(x, t, y), x, t)
    assert (mean - torch.from_numpy(expected["mean"])).abs().max() <= 2e-6


@needs_fixtures
def test_what_the_originals_file_cannot_tell_comes_by_flags(tmp_path: Path) -> None:
    source, out = FIXTURES / "original" / "plain-cosine-model.pth", tmp_path / "ours.safetensors"
    assert main([str(source), str(out), "--norm", "in", "--activation", "relu"]) == 0
    loaded = checkpoint.load(out)
    assert (loaded.config.unet.norm, loaded.config.unet.activation) == ("in", "relu")
    assert isinstance(loaded.network.out_norm, torch.nn.InstanceNorm2d)
    assert torch.equal(loaded.network.out_norm.weight, load_weights(source)["ema_model.out_norm.weight"])


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


def theirs(kind: str = "plain", **values: Any) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**(BASE | KINDS[kind] | values)).eval()


def inputs(model: UNet2DModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    y = torch.tensor([0, 4, 2]) if model.config.num_class_embeds else None
    return torch.randn(3, 1, 8, 16, generator=generator), torch.tensor([0, 500, 999]), y


def same_outputs(model: UNet2DModel, imported: Any) -> None:
    weights, config, _ = imported
    network = UNet(config).eval()
    network.load_state_dict(weights)
    x, t, y = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t, y), model(x, t, y).sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("safe", [True, False])
def test_networks_of_diffusers_give_their_outputs(kind: str, safe: bool, tmp_path: Path) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    same_outputs(model, import_path(tmp_path, Flags()))


def test_old_key_names_are_known(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    for new, old in {new: old for old, new in OLD_NAMES.items()}.items():
        weights = {k.replace(f".{new}.", f".{old}.") if ".attentions." in k else k: v for k, v in weights.items()}
    assert any(".proj_attn." in name for name in weights)
    save_file(weights, path)
    same_outputs(model, import_path(tmp_path, Flags()))


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
    diffusion = imported[2]
    assert expected is None or (diffusion.prediction, diffusion.variance, diffusion.zero_terminal_snr) == expected
    np.testing.assert_allclose(diffusion.betas(), noise_scheduler.betas, rtol=1e-3)  # theirs in float32


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
        ({"num_class_embeds": 7}, "class_embedding.weight"),
    ],
    ids=str,
)
def test_what_cannot_be_expressed_is_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ImportRefused, match=message):
        import_path(tmp_path, Flags())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("conv_out.bias"), "'conv_out.bias' is missing"),
        (lambda w: w.pop("mid_block.attentions.0.to_k.weight"), "to_k.weight"),
        (lambda w: w.update(extra=torch.zeros(1)), "1 tensors belong to no layer .* 'extra'"),
        (lambda w: w.update({"conv_out.bias": torch.zeros(2)}), "out_conv.bias"),
        (lambda w: w.update({"conv_out.bias": torch.tensor([torch.nan])}), "'out_conv.bias' .* not finite"),
    ],
    ids=["missing", "missing key", "surplus", "shape", "nan"],
)
def test_weights_that_are_not_the_networks_are_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    theirs().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(ImportRefused, match=message):
        import_path(tmp_path, Flags())


class Evil:
    """A pickle that would leave a trace if anyone opened it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"step": 1, "model": {}, "opt": {}, "ema": {}, "scaler": None, "version": "1"}, "lucidrains"),
        ({"state": {}, "param_groups": []}, "optimiser"),
        ([{}, {}, 1, 2], "ermongroup/ddim"),
        ({"model": {}, "optimizer": {}, "ema": {}}, "tqch"),
        ({"weight": torch.zeros(1)}, "not a checkpoint of a project known here"),
        ({"betas": torch.full((10,), 0.1), "ema_model.downs.0.x": torch.zeros(1)}, "is missing|missing in it"),
    ],
    ids=["lucidrains", "optimiser", "list", "tqch", "unknown", "half"],
)
def test_other_files_are_named_and_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ImportRefused, match=message):
        import_path(tmp_path / "x.pt", Flags())


def test_nothing_that_is_loaded_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"ema": Evil(tmp_path / "trace")}, tmp_path / "edm.pkl")
    assert main([str(tmp_path / "edm.pkl"), str(tmp_path / "out.safetensors")]) == 2
    assert "holds code" in capsys.readouterr().err
    (tmp_path / "x.pt").write_bytes(b"no such thing")
    assert main([str(tmp_path / "x.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert main([str(tmp_path / "absent.pt"), str(tmp_path / "out.safetensors")]) == 2
    assert not (tmp_path / "trace").exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_makes_a_checkpoint_that_loads(tmp_path: Path) -> None:
    model = theirs("classes")
    model.save_pretrained(tmp_path / "theirs")
    out = tmp_path / "ours.safetensors"
    flags = ["--null_class", "--class_names", "a,b,c,d", "--schedule", "cosine", "--num_timesteps", "500"]
    assert main([str(tmp_path / "theirs"), str(out), *flags]) == 0
    loaded = checkpoint.load(out)
    assert loaded.config.class_names == ("a", "b", "c", "d")
    assert loaded.config.unet.null_class
    assert (loaded.config.diffusion.schedule, loaded.config.diffusion.num_timesteps) == ("cosine", 500)
    assert loaded.config.provenance["imported_from"] == "theirs"
    x, t, y = inputs(model)
    with torch.no_grad():
        torch.testing.assert_close(loaded.network(x, t, y), model(x, t, y).sample, rtol=0, atol=1e-5)
