"""Other projects' weights give other projects' outputs; what a file does not tell is asked for, never guessed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model import checkpoint
from model.backends.compile import compile_for_inference
from model.convert.importer import import_path, load_weights, main
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.diffusion import GaussianDiffusion, cosine_betas, linear_betas
from model.nn.unet import UNet
from model.sampling.schedule import InvalidSamplingParams, make_schedule
from model.sampling.step import sample
from tests.fixtures import expected, theirs

LABELS, PLAIN, PADDED = (f"original/{name}-model.pth" for name in ("labels-linear", "plain-cosine", "padded"))
W86, IMPROVED, GUIDED = "w86763777/small.pt", "improved-diffusion/cifar-like.pt", "guided-diffusion/imagenet-like.pt"
DDIM, PESSER, TQCH = "ddim/small.pth", "pytorch_diffusion/model-790000.ckpt", "ddpm-torch/small_3.pt"
WITH_AVERAGES = (LABELS, PLAIN, PADDED, W86, DDIM, TQCH)
HO = {"image_size": (8, 8), "num_timesteps": 1000, "schedule": "linear", "variance": "fixed_large"}
ENDS = {"num_timesteps": 20, "schedule_low": 1e-4, "schedule_high": 0.004}  # 0.005 to 0.2 there, which scales nothing
FLAGS: dict[str, dict[str, Any]] = {
    DDIM: HO,
    PESSER: HO | ENDS,
    TQCH: HO | {"prediction": "eps"},
    LABELS: {},
    PLAIN: {},
    PADDED: {"norm_groups": 4, "initial_pad": 1, "time_scale": 0.5, "image_size": (6, 10)},
    W86: {"prediction": "eps", "variance": "fixed_large", "schedule_low": 2e-5, "schedule_high": 0.004},
    IMPROVED: {
        "num_heads": 4,
        "num_heads_upsample": 2,
        "num_timesteps": 4000,
        "schedule": "cosine",
        "prediction": "eps",
        "time_scale": 1.0,
    },
    GUIDED: {
        "head_channels": 16,
        "new_attention_order": True,
        "num_timesteps": 1000,
        "schedule": "linear",
        "prediction": "eps",
    },
}


def imported(name: str, without: tuple[str, ...] = (), **flags: Any) -> Imported:
    own = {flag: value for flag, value in FLAGS[name].items() if flag not in without}
    return import_path(theirs(name), Flags(**own | flags))


def network_of(found: Imported) -> UNet:
    network = UNet(found.unet).eval()
    network.load_state_dict(found.weights)
    return network


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor | None]:
    arrays = expected(name)
    x, t, y = (torch.from_numpy(arrays[key]) for key in "xty")
    return x, t, y if len(y) else None


@pytest.mark.parametrize(
    ("file", "output", "weights"),
    [
        *(
            (name, f"{weights}_out", weights)
            for name in (LABELS, PLAIN, PADDED, W86, DDIM, TQCH)
            for weights in ("ema", "raw")
        ),
        (IMPROVED, "out", None),
        (GUIDED, "out", None),
        (PESSER, "out", None),
    ],
)
def test_their_outputs_are_reproduced(file: str, output: str, weights: str | None) -> None:
    found = imported(file, weights=weights)
    network = network_of(found)
    with torch.no_grad():
        out = network(*inputs(file))
        exact = network.double()(
            *(part.double() if part is not None and part.is_floating_point() else part for part in inputs(file))
        )
    scale = exact.abs().max()
    assert (out - exact).abs().max() <= 2e-6 * scale
    error = 2e-6 if file in (DDIM, PESSER, TQCH) else 4e-6
    assert (out - torch.from_numpy(expected(file)[output])).abs().max() <= error * scale
    if "betas" in expected(file):
        np.testing.assert_allclose(found.diffusion.betas(), expected(file)["betas"], rtol=1e-5)
    assert (found.diffusion.variance == "learned_range") == found.unet.learned_variance


@pytest.mark.parametrize("file", [PADDED, IMPROVED])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_packed_network_pads_and_attends_alike(file: str, precision: str) -> None:
    network = network_of(imported(file))
    x, t, y = inputs(file)
    with torch.no_grad():
        plain = network(x, t, y)
    packed = compile_for_inference(network, torch.device("cpu"), precision)(x, t, y)
    assert packed.shape == x.shape[:1] + plain.shape[1:]
    assert (packed - plain).abs().max() <= (1e-5 if precision == "fp32" else 0.15) * plain.abs().max()


@pytest.mark.parametrize("file", [LABELS, PLAIN, PADDED])
def test_the_originals_mean_is_reproduced(file: str) -> None:
    found = imported(file)
    x, t, y = inputs(file)
    with torch.no_grad():
        mean, _ = GaussianDiffusion(found.diffusion).p_mean_log_variance(network_of(found)(x, t, y), x, t)
    theirs_mean = torch.from_numpy(expected(file)["mean"])
    assert (mean - theirs_mean).abs().max() <= 4e-6 * theirs_mean.abs().max()


def test_the_originals_own_sampling_equals_theirs() -> None:
    found = imported(PLAIN)  # cosine
    schedule = make_schedule(GaussianDiffusion(found.diffusion), "ddpm", 40, limit="none")
    ours = sample(network_of(found), schedule, (3, 8, 8), seeds=[5, 5], indices=[0, 1])
    sampled = torch.from_numpy(expected(PLAIN)["sampled"])
    assert (ours - sampled).abs().max() <= 2e-5 * sampled.abs().max()


def test_pessers_sampling_equals_theirs() -> None:
    found = imported(PESSER)
    ours = sample(
        network_of(found), make_schedule(GaussianDiffusion(found.diffusion), "ddpm", 20), (3, 8, 8), [5, 5], [0, 1]
    )
    sampled = torch.from_numpy(expected(PESSER)["sampled"])
    assert (ours - sampled).abs().max() <= 2e-5 * sampled.abs().max()


def test_ermongroups_ddim_equals_theirs() -> None:
    found = imported(DDIM)
    schedule = make_schedule(GaussianDiffusion(found.diffusion), "ddim", 10, spacing="leading", limit="none")
    ours = sample(network_of(found), schedule, (3, 8, 8), seeds=[5, 5], indices=[0, 1])
    sampled = torch.from_numpy(expected(DDIM)["sampled"])
    assert (ours - sampled).abs().max() <= 2e-5 * sampled.abs().max()


def test_tqchs_mean_and_variance_are_reproduced() -> None:
    found = imported(TQCH)
    x, t, _ = inputs(TQCH)
    with torch.no_grad():
        mean, log_variance = GaussianDiffusion(found.diffusion).p_mean_log_variance(
            network_of(found)(x, t), x, t, clip=True
        )
    torch.testing.assert_close(mean, torch.from_numpy(expected(TQCH)["mean"]), rtol=0, atol=1e-5)
    theirs_variance = torch.from_numpy(expected(TQCH)["log_variance"])
    torch.testing.assert_close(log_variance, theirs_variance.expand_as(x), rtol=0, atol=1e-5)


def test_only_ancestral_sampling_of_all_steps_is_unlimited() -> None:
    diffusion = GaussianDiffusion(imported(PLAIN).diffusion)
    make_schedule(diffusion, "ddpm", 40, limit="none")
    for sampler, steps, message in (("ddim", 40, "between 1 and 39 "), ("ddpm", 0, "1 and 39 or 40, all of them")):
        with pytest.raises(InvalidSamplingParams, match=message):
            make_schedule(diffusion, sampler, steps, limit="none")


# What the files do not tell


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "flag", "default"),
    [
        (IMPROVED, "num_heads", "--num_heads 4"),
        (IMPROVED, "num_timesteps", "--num_timesteps 1000"),
        (IMPROVED, "schedule", "--schedule linear"),
        (IMPROVED, "prediction", "--prediction eps"),
        (IMPROVED, "time_scale", "--rescale_timesteps"),
        (GUIDED, "prediction", "--prediction eps"),
        (W86, "prediction", "--prediction eps"),
        (W86, "variance", "--variance fixed_large"),
        (W86, "schedule_low", "--schedule_low 2e-05"),
        (W86, "schedule_high", "--schedule_high 0.004"),
        (DDIM, "image_size", "--image_size 32,32"),
        (DDIM, "num_timesteps", "--num_timesteps 1000"),
        (DDIM, "schedule", "--schedule linear"),
        (DDIM, "variance", "--variance fixed_large"),
        (PESSER, "schedule_high", "--schedule_high 0.0004"),
        (TQCH, "prediction", "--prediction eps"),
        (PADDED, "norm_groups", "--norm_groups"),
        (PADDED, "initial_pad", "--initial_pad"),
    ],
)
def test_what_a_file_does_not_tell_is_asked_for(file: str, flag: str, default: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=default):
        imported(file, without=(flag,))


@pytest.mark.parametrize("file", [DDIM, TQCH])
def test_ends_of_betas_that_nothing_scales_are_asked_for(file: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=r"--schedule_low 2e-05 --schedule_high 0\.004"):
        imported(file, num_timesteps=200)


def test_everything_missing_is_asked_for_at_once() -> None:
    with pytest.raises(UnsupportedCheckpointError) as error:
        import_path(theirs(GUIDED), Flags())
    assert "--num_heads 4 --num_timesteps 1000 --schedule linear --prediction eps" in str(error.value)


@pytest.mark.parametrize(
    ("file", "flags", "has"),
    [
        (IMPROVED, {"prediction": "x0"}, {"prediction": "x0"}),
        (GUIDED, {"prediction": "v"}, {"prediction": "v"}),
        (W86, {"prediction": "x0", "variance": "fixed_small"}, {"prediction": "x0", "variance": "fixed_small"}),
        (W86, {"schedule_low": 1e-5, "schedule_high": 0.003}, {"schedule_low": 1e-5, "schedule_high": 0.003}),
        (GUIDED, {"schedule_low": 2e-4}, {"schedule_low": 2e-4, "schedule_high": 0.02}),
    ],
)
def test_flags_tell_the_diffusion(file: str, flags: dict[str, Any], has: dict[str, Any]) -> None:
    diffusion = imported(file, **flags).diffusion
    assert {name: getattr(diffusion, name) for name in has} == has


def test_timesteps_are_scaled_as_told() -> None:
    assert imported(IMPROVED, without=("time_scale",), rescale_timesteps=True).unet.time_scale == 0.25
    assert imported(IMPROVED).unet.time_scale == 1
    assert imported(IMPROVED, without=("time_scale",), num_timesteps=1000).unet.time_scale == 1  # whoever made it
    with pytest.raises(UnsupportedCheckpointError, match="leave out one"):
        imported(IMPROVED, rescale_timesteps=True)


def test_w86763777_brings_its_image_size() -> None:
    assert imported(W86).unet.image_size == (8, 16)  # of its x_T
    with pytest.raises(UnsupportedCheckpointError, match="--image_size 32,32 contradicts the file, which has 8,16"):
        imported(W86, image_size=(32, 32))


@pytest.mark.parametrize("file", [LABELS, GUIDED])
def test_the_last_class_means_none_where_told(file: str) -> None:
    found = imported(file, null_class=True)
    assert (found.unet.num_classes, found.unet.null_class) == (9, True)
    with torch.no_grad():
        out = network_of(found)(*inputs(file))
    output = torch.from_numpy(expected(file)["out" if file == GUIDED else "ema_out"])
    assert (out - output).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        (LABELS, {"num_timesteps": 500}, "--num_timesteps 500 contradicts the file, which has 1000"),
        (LABELS, {"schedule": "cosine"}, "--schedule cosine contradicts the file, which has linear"),
        (LABELS, {"schedule_low": 2e-4}, "which has 0.0001"),
        (LABELS, {"num_heads": 4}, "--num_heads 4 contradicts the file, which has 1"),
        (LABELS, {"prediction": "v"}, "which has eps"),
        (PLAIN, {"schedule_low": 1e-4}, "--schedule_low means nothing for this file"),
        (PLAIN, {"null_class": True}, "--null_class needs a network with classes"),
        (PLAIN, {"new_attention_order": True}, "--new_attention_order means nothing"),
        (PLAIN, {"rescale_timesteps": True}, "--rescale_timesteps means nothing"),
        (W86, {"null_class": True}, "--null_class needs"),
        (PESSER, {"prediction": "v"}, "--prediction v: such a network always predicts eps"),
        (PESSER, {"weights": "raw"}, "--weights means nothing"),
        (PESSER, {"num_heads": 4}, "--num_heads 4 contradicts"),
        (TQCH, {"norm_groups": 8}, "--norm_groups 8 contradicts the file, which has 32"),
        (TQCH, {"image_size": (8, 9)}, "--image_size 8,9: its levels need sides that 2 divides"),
        (DDIM, {"null_class": True}, "--null_class needs"),
        (DDIM, {"variance": "learned_range"}, "its network does not say its variance"),
        (W86, {"norm": "in"}, "--norm in contradicts"),
        (W86, {"initial_pad": 2}, "--initial_pad 2 contradicts"),
        (W86, {"num_heads_upsample": 2}, "--num_heads_upsample 2 contradicts"),
        (GUIDED, {"weights": "raw"}, "--weights means nothing"),
        (GUIDED, {"variance": "fixed_small"}, "--variance fixed_small contradicts"),
        (GUIDED, {"num_heads": 2}, "leave out the other"),
        (GUIDED, {"num_heads_upsample": 2}, "leave out the other"),
        (PADDED, {"norm_groups": 5}, "do not divide into 5 groups"),
        (IMPROVED, {"num_heads_upsample": 3}, "cannot be divided among the attention heads"),
        (LABELS, {"null_class": True, "num_heads_upsample": 2}, "--num_heads_upsample 2 contradicts"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_refused(file: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=message):
        imported(file, **flags)


def test_flags_that_agree_with_the_file_are_fine() -> None:
    found = imported(LABELS, num_timesteps=1000, schedule="linear", schedule_low=1e-4, num_heads=1, weights="ema")
    assert found.diffusion == imported(LABELS).diffusion


def test_what_the_originals_file_cannot_tell_comes_by_flags(tmp_path: Path) -> None:
    source, out = theirs(PLAIN), tmp_path / "ours.safetensors"
    assert main([str(source), str(out), "--norm", "in", "--activation", "relu"]) == 0
    loaded = checkpoint.load(out)
    assert (loaded.config.unet.norm, loaded.config.unet.activation) == ("in", "relu")
    assert isinstance(loaded.network.out_norm, torch.nn.InstanceNorm2d)
    assert torch.equal(loaded.network.out_norm.weight, load_weights(source)["ema_model.out_norm.weight"])


# Other forms of the same weights


def changed(name: str, tmp_path: Path, change: Callable[[Any], Any]) -> Path:
    torch.save(change(load_weights(theirs(name))), tmp_path / "changed.pt")
    return tmp_path / "changed.pt"


def prefixed(state: Any, prefix: str) -> Any:
    return {prefix + name: value for name, value in state.items()}


FORMS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "original in DataParallel": (LABELS, lambda s: prefixed(s, "module.")),
    "network in DataParallel": (
        LABELS,
        lambda s: {name.replace("model.", "model.module.", 1): value for name, value in s.items()},
    ),
    "compiled": (GUIDED, lambda s: prefixed(s, "_orig_mod.")),
    "w86 in DataParallel": (
        W86,
        lambda s: s | {name: prefixed(s[name], "module.") for name in ("net_model", "ema_model")},
    ),
    "tqch in DDP": (TQCH, lambda s: s | {"model": prefixed(s["model"], "module.")}),
    "tqch's average in DDP": (
        TQCH,
        lambda s: s | {"ema": s["ema"] | {"shadow": prefixed(s["ema"]["shadow"], "module.")}},
    ),
    "tqch's network alone": (TQCH, lambda s: s["ema"]["shadow"]),
    "ddim without optimizer": (DDIM, lambda s: [s[0], {}, 1, 2, s[4]]),
    "ddim's average alone": (DDIM, lambda s: s[4]),
    "pesser in DataParallel": (PESSER, lambda s: prefixed(s, "module.")),
    "openai in DDP": (IMPROVED, lambda s: prefixed(s, "module.")),
    "openai in a table": (GUIDED, lambda s: {"model": s, "step": 7}),
    "average in a table": (GUIDED, lambda s: {"ema": s, "model": {"x": torch.zeros(1)}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_wrapped_weights_are_the_same(form: str, tmp_path: Path) -> None:
    name, change = FORMS[form]
    found = import_path(changed(name, tmp_path, change), Flags(**FLAGS[name]))
    plain = imported(name)
    assert found.unet == plain.unet
    assert found.diffusion == plain.diffusion
    assert all(torch.equal(found.weights[key], plain.weights[key]) for key in plain.weights)


def test_raw_weights_are_taken_where_there_is_no_average(tmp_path: Path) -> None:
    for name, change in ((DDIM, lambda s: s[:4]), (TQCH, lambda s: {k: v for k, v in s.items() if k != "ema"})):
        path = changed(name, tmp_path, change)
        found, raw = import_path(path, Flags(**FLAGS[name])), imported(name, weights="raw")
        assert all(torch.equal(found.weights[key], raw.weights[key]) for key in raw.weights)
        assert "raw weights" in found.origin
        with pytest.raises(UnsupportedCheckpointError, match="leave out --weights"):
            import_path(path, Flags(**FLAGS[name], weights="ema"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PESSER, lambda s: {k: v for k, v in s.items() if ".downsample." not in k}, "resamp_with_conv false"),
        (
            TQCH,
            lambda s: {k: v for k, v in s["model"].items() if not k.startswith("downsamples.level_0.1.")},
            "resample_with_conv false",
        ),
        (
            TQCH,
            lambda s: s["model"] | {"out_conv.2.weight": torch.zeros(6, 32, 3, 3), "out_conv.2.bias": torch.zeros(6)},
            "a learned log variance",
        ),
        (
            PESSER,
            lambda s: {k: v for k, v in s.items() if k != "mid.attn_1.q.weight"},
            "'mid.attn_1.q.weight' is missing",
        ),
        (PESSER, lambda s: s | {"logvar": torch.zeros(20)}, "1 tensors belong to no layer .* 'logvar'"),
        (DDIM, lambda s: [*s[:4], 5], "damaged"),
    ],
    ids=["ddim pools", "tqch pools", "tqch learns variance", "missing", "surplus", "no average"],
)
def test_variants_that_differ_are_refused(
    name: str, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=message):
        import_path(changed(name, tmp_path, change), Flags(**FLAGS[name]))


def test_the_originals_network_alone_is_read(tmp_path: Path) -> None:
    part = "model."
    path = changed(PLAIN, tmp_path, lambda s: {k[len(part) :]: v for k, v in s.items() if k.startswith(part)})
    with pytest.raises(UnsupportedCheckpointError, match="--num_timesteps 1000 --schedule linear"):
        import_path(path, Flags())
    found, whole = import_path(path, Flags(num_timesteps=40, schedule="cosine")), imported(PLAIN, weights="raw")
    assert found.diffusion == whole.diffusion
    assert all(torch.equal(found.weights[key], whole.weights[key]) for key in whole.weights)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [LABELS, PLAIN])
def test_half_precision_betas_are_recognised(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = changed(name, tmp_path, lambda s: {key: value.to(dtype) for key, value in s.items()})
    assert import_path(path, Flags()).diffusion == imported(name).diffusion


@pytest.mark.parametrize(
    ("betas", "schedule"),
    [
        (linear_betas(12, 1e-5, 7e-4), "linear"),
        (linear_betas(2000, 3e-4, 0.0123), "linear"),
        (cosine_betas(7), "cosine"),
    ],
)
def test_any_linear_betas_are_read(betas: Any, schedule: str, tmp_path: Path) -> None:
    path = changed(PLAIN, tmp_path, lambda s: s | {"betas": torch.from_numpy(betas).float()})
    found = import_path(path, Flags()).diffusion
    assert found.schedule == schedule
    np.testing.assert_allclose(found.betas(), betas, rtol=2e-5)


@pytest.mark.parametrize(
    "betas",
    [torch.zeros(0), torch.tensor([torch.nan] * 9), torch.ones(5, 2) / 9, torch.full((9,), 3), torch.ones(9)],
    ids=["none", "nan", "table", "integers", "ones"],
)
def test_betas_of_no_schedule_are_refused(betas: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="betas"):
        import_path(changed(PLAIN, tmp_path, lambda s: s | {"betas": betas}), Flags())


def test_betas_of_its_own_are_kept(tmp_path: Path) -> None:
    betas = torch.rand(50, generator=torch.Generator().manual_seed(1)) / 9 + 1e-3
    found = import_path(changed(PLAIN, tmp_path, lambda s: s | {"betas": betas}), Flags()).diffusion
    assert found.schedule == "trained"
    assert found.betas().tolist() == betas.double().tolist()


# Betas by a flag

BETAS = (*np.linspace(1e-2, 0.2, 30).tolist(), 0.3)
BY_BETAS = ("num_timesteps", "schedule", "schedule_low", "schedule_high")


def test_betas_come_by_a_flag(tmp_path: Path) -> None:
    (tmp_path / "betas.json").write_text(json.dumps(BETAS))
    out = tmp_path / "ours.safetensors"
    words = "--head_channels 16 --new_attention_order --prediction eps --time_scale 1 --trained_betas"
    assert main([str(theirs(GUIDED)), str(out), *words.split(), str(tmp_path / "betas.json")]) == 0
    config = checkpoint.load(out).config
    assert config.diffusion.betas().tolist() == list(BETAS)
    assert "trained_betas" not in config.provenance["flags"]


@pytest.mark.parametrize(
    ("file", "flags", "message"),
    [
        (GUIDED, {"schedule": "linear"}, "say all of the schedule: leave out --schedule"),
        (GUIDED, {"num_timesteps": 31}, "leave out --num_timesteps"),
        (LABELS, {}, "--trained_betas contradict the file, which has betas"),
        (W86, {}, "31 timesteps contradict the file, which has 200"),
    ],
    ids=str,
)
def test_betas_by_a_flag_contradict_others(file: str, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=message):
        imported(file, without=BY_BETAS, trained_betas=BETAS, **flags)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "it is no JSON"), ("[0.1]", "not a list of betas"), ("[0.1, true]", "not a list")],
)
def test_a_file_of_betas_is_checked(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "betas.json").write_text(content)
    with pytest.raises(SystemExit):
        main(["x.pt", "y.safetensors", "--trained_betas", str(tmp_path / "betas.json")])
    assert message in capsys.readouterr().err


# The command


def test_one_line_says_which_diffusion_is_from_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ours.safetensors"
    assert main([str(theirs(PLAIN)), str(out)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    for part in (
        "40 timesteps, cosine, prediction eps, fixed_large",
        "from its betas",
        "assumed: norm gn, image_size 32,32, activation silu, time_scale 1, initial_pad 0, norm_groups 32",
    ):
        assert part in line
    words = "--prediction x0 --variance fixed_small --schedule_low 1e-5 --schedule_high 0.003"
    assert main([str(theirs(W86)), str(out), *words.split()]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "200 timesteps, linear 1e-05 to 0.003, prediction x0, fixed_small, x0 clamped to ±1 (by flags" in line
    assert "assumed" not in line
    assert (
        checkpoint.load(out).config.diffusion
        == imported(
            W86, **{"prediction": "x0", "variance": "fixed_small", "schedule_low": 1e-5, "schedule_high": 0.003}
        ).diffusion
    )


def test_a_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "not there" / "ours.safetensors"
    assert main([str(theirs(PLAIN)), str(out)]) == 2
    assert f"{out} cannot be written: No such file" in capsys.readouterr().err


def test_every_flag_of_the_research_projects_is_stored(tmp_path: Path) -> None:
    out = tmp_path / "ours.safetensors"
    words = "--norm_groups 4 --initial_pad 1 --time_scale 0.5 --image_size 6,10 --weights raw"
    assert main([str(theirs(PADDED)), str(out), *words.split()]) == 0
    unet = checkpoint.load(out).config.unet
    assert (unet.norm_groups, unet.initial_pad, unet.time_scale, unet.image_size) == (4, 1, 0.5, (6, 10))
    assert replace(unet, initial_pad=0) != unet
