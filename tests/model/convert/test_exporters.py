"""What is exported gives in diffusers what it gives here; what diffusers cannot express is refused with a sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from diffusers.schedulers import scheduling_ddpm

from model.checkpoint import Checkpoint, CheckpointConfig, load, save
from model.convert.exporter import UnsupportedExportError, export, main
from model.convert.importer import import_path
from model.convert.layout import Flags
from model.diffusion import DiffusionConfig
from model.distilled import ANY_STEPS, Distilled
from model.nn.config import UNetConfig
from model.sampling.fitted import FittedTable, weights_digest
from model.sampling.noise import normals
from model.sampling.schedule import FITTED, SamplingParams, make_schedule
from model.sampling.step import apply_step, sample
from tests.networks import randomised

CONFIG = UNetConfig(
    image_channels=1,
    image_size=(8, 16),
    base_channels=16,
    channel_mults=(1, 2),
    num_res_blocks=2,
    attention_levels=(1,),
    time_emb_dim=24,
    norm_groups=8,
)


def checkpoint_of(path: Path, diffusion: DiffusionConfig | None = None, limit: str = "clamp", **values: Any) -> Any:
    config = replace(CONFIG, **values)
    diffusion = diffusion or DiffusionConfig(variance="learned_range" if config.learned_variance else "fixed_small")
    network = randomised(config, 0.15)
    names = tuple(str(i) for i in range(config.num_classes or 0))
    save(path, network.state_dict(), CheckpointConfig(config, diffusion, names, SamplingParams(limit=limit)))
    return load(path)


def outputs(source: Any, folder: Path, theirs_y: torch.Tensor | None, ours_y: torch.Tensor | None) -> Any:
    pipeline = DDPMPipeline.from_pretrained(folder)
    x = torch.randn(2, 1, 8, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 900])
    with torch.no_grad():
        return pipeline, source.network(x, t, ours_y), pipeline.unet(x, t, theirs_y).sample


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"downsample_padding": 0, "time_freq_shift": 1, "norm_eps": 1e-6},
        {"scale_shift_norm": True, "head_channels": 8},
        {"learned_variance": True, "time_table": 1000},
        {"resblock_updown": True, "attention_levels": (0, 1)},
    ],
    ids=str,
)
def test_an_unconditional_network_gives_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "ours.safetensors", **values)
    export(source, tmp_path / "theirs")
    _, ours, theirs = outputs(source, tmp_path / "theirs", None, None)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    back = import_path(tmp_path / "theirs", Flags())
    assert back.diffusion == source.config.diffusion
    assert replace(back.unet, class_conditioning="bias") == source.config.unet
    assert all(torch.equal(back.weights[name], weight) for name, weight in source.network.state_dict().items())


@pytest.mark.parametrize("limit", ["none", "clamp", "dynamic"])
def test_the_limit_of_x0_goes_out_and_comes_back(limit: str, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "ours.safetensors", DiffusionConfig(prediction="x0"), limit=limit)
    export(source, tmp_path / "theirs")
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "theirs").scheduler
    x0 = torch.linspace(-3, 3, 128).reshape(1, 1, 8, 16)
    theirs = scheduler.step(x0, 0, torch.zeros_like(x0)).pred_original_sample
    rows = torch.from_numpy(make_schedule(source.diffusion, "ddim", 1, limit=limit).table).float()
    _, ours = apply_step(torch.zeros_like(x0), x0, x0, x0, rows, x0)
    torch.testing.assert_close(theirs, ours)
    assert import_path(tmp_path / "theirs", Flags()).limit == limit


def test_trained_betas_go_out_and_come_back(tmp_path: Path) -> None:
    betas = tuple(np.random.default_rng(0).uniform(1e-3, 0.05, 50).tolist())
    source = checkpoint_of(tmp_path / "ours.safetensors", DiffusionConfig(50, "trained", trained_betas=betas))
    export(source, tmp_path / "theirs")
    scheduler = DDPMPipeline.from_pretrained(tmp_path / "theirs").scheduler
    np.testing.assert_allclose(scheduler.betas.numpy(), betas, rtol=1e-6)
    assert import_path(tmp_path / "theirs", Flags()).diffusion == source.config.diffusion


@pytest.mark.slow
@pytest.mark.parametrize("null_class", [False, True])
def test_classes_by_embedding_go_whole(null_class: bool, tmp_path: Path) -> None:
    values = {"num_classes": 4, "null_class": null_class, "class_conditioning": "embedding"}
    source = checkpoint_of(tmp_path / "ours.safetensors", **values)
    export(source, tmp_path / "theirs")
    y = torch.tensor([3, 3 + null_class])
    _, ours, theirs = outputs(source, tmp_path / "theirs", y, y)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"num_heads": 2}, {"time_scale": 0.25}, {"time_scale": 2.5, "time_freq_shift": 1}])
def test_what_diffusers_has_otherwise_gives_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "ours.safetensors", **values)
    export(source, tmp_path / "theirs")
    _, ours, theirs = outputs(source, tmp_path / "theirs", None, None)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["bias", "both"])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_classes_in_every_block_go_one_at_a_time(scale_shift: bool, conditioning: str, tmp_path: Path) -> None:
    values = {"scale_shift_norm": scale_shift, "class_conditioning": conditioning}
    source = checkpoint_of(tmp_path / "ours.safetensors", num_classes=4, **values)
    assert main([str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs"), "--class_label", "2"]) == 0
    _, ours, theirs = outputs(source, tmp_path / "theirs", None, torch.tensor([2, 2]))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "diffusion",
    [
        DiffusionConfig(),
        DiffusionConfig(500, "cosine", prediction="v"),
        DiffusionConfig(60, "trained", trained_betas=tuple(np.geomspace(1e-3, 0.1, 60).tolist()), prediction="x0"),
    ],
    ids=lambda config: config.schedule,
)
def test_the_pipeline_makes_the_same_images(
    diffusion: DiffusionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint_of(tmp_path / "ours.safetensors", diffusion)
    export(source, tmp_path / "theirs")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    steps = iter(range(11))

    def noise(shape: Any, **_: Any) -> torch.Tensor:
        return normals([5, 5], [0, 1], [next(steps)] * 2, tuple(shape[1:]))

    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", noise)
    monkeypatch.setattr("diffusers.pipelines.ddpm.pipeline_ddpm.randn_tensor", noise)
    theirs = pipeline(batch_size=2, num_inference_steps=10, output_type="pt").images
    ours = sample(source.network, make_schedule(source.diffusion, "ddpm", 10), (1, 8, 16), [5, 5], [0, 1])
    torch.testing.assert_close(theirs, (ours / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "label", "message"),
    [
        ({"num_classes": 3}, None, "one class at a time"),
        ({"num_classes": 3}, 3, "from 0 to 2"),
        ({"num_classes": 3, "class_conditioning": "both"}, None, "one class at a time"),
        ({}, 1, "needs none"),
        ({"norm": "bn"}, None, "'bn'"),
        ({"activation": "relu"}, None, "'relu'"),
        ({"channel_mults": (2, 2)}, None, "wider"),
        ({"num_heads": 2, "attention_levels": (0, 1)}, None, "2 heads"),
        ({"num_heads_upsample": 2}, None, "heads on the way up"),
        ({"initial_pad": 1}, None, "pads its images"),
        ({"norm_groups": 32}, None, "different numbers of groups"),
        ({"image_size": (7, 8)}, None, "image size"),
        ({"patch_size": 2}, None, "squares of 2 × 2 pixels"),
    ],
    ids=str,
)
def test_what_diffusers_cannot_express_is_refused(
    values: dict[str, Any], label: int | None, message: str, tmp_path: Path
) -> None:
    source = checkpoint_of(tmp_path / "ours.safetensors", **values)
    with pytest.raises(UnsupportedExportError, match=message):
        export(source, tmp_path / "theirs", label)
    assert not (tmp_path / "theirs").exists()


def with_table(source: Checkpoint, distilled: Distilled | None = None) -> Checkpoint:
    """The same with a table of two steps, its default."""
    schedule = make_schedule(source.diffusion, "ddim", 2)
    timesteps, rows = tuple(map(float, schedule.timesteps)), tuple(map(tuple, schedule.table.tolist()))
    table = FittedTable(
        2, 1.0, (0.0, 1.0), "clamp", timesteps, rows, (1, 2), weights_digest(source.network.state_dict())
    )
    config = replace(source.config, sampling=SamplingParams(FITTED, 2), fitted=(table,), distilled=distilled)
    return replace(source, config=config)


def test_fitted_tables_are_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = with_table(checkpoint_of(tmp_path / "ours.safetensors"))
    save(tmp_path / "ours.safetensors", source.network.state_dict(), source.config)
    assert main([str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs")]) == 0
    assert capsys.readouterr().err == "model.exporters: diffusers has no fitted tables: they are left out\n"
    back = import_path(tmp_path / "theirs", Flags())
    assert all(torch.equal(back.weights[name], weight) for name, weight in source.network.state_dict().items())


def test_a_student_of_fixed_steps_is_refused(tmp_path: Path) -> None:
    source, teacher = checkpoint_of(tmp_path / "ours.safetensors"), "0" * 64
    with pytest.raises(UnsupportedExportError, match="have not the 2 steps that this student was distilled to"):
        export(with_table(source, Distilled(1.0, 2, "sfd", teacher)), tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    export(replace(source, config=replace(source.config, distilled=Distilled(1.0, 8, ANY_STEPS, teacher))), tmp_path)
