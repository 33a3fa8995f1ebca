"""A table that was learned is kept in its checkpoint, found by what was asked for, and carried out as every other."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint
from model.checkpoint import CheckpointConfig, CheckpointError
from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.fitted import FittedTable, FittedTableError, weights_digest, with_table
from model.sampling.noise import normals
from model.sampling.schedule import FITTED, InvalidSamplingParams, SamplingParams, make_schedule
from model.sampling.step import sample

DIFFUSION = DiffusionConfig(num_timesteps=400, schedule="cosine", prediction="v")


def table_like(config: UNetConfig, weights: str, steps: int = 4, g: float = 2.5, **other: Any) -> FittedTable:
    """dpmpp_2m's rows, a little moved: timesteps between whole numbers, and x_T again in all rows but the first."""
    schedule = make_schedule(GaussianDiffusion(DIFFUSION), "dpmpp_2m", steps, guidance_scale=g)
    rows = schedule.table + 0.0
    rows[1:, -1] = 0.125
    return FittedTable(
        **{"steps": steps, "guidance_scale": g, "guidance_interval": (0.0, 1.0), "limit": "clamp", "weights": weights}
        | {"timesteps": tuple((schedule.timesteps - 0.25).tolist()), "rows": rows.tolist(), "draws": [0] * steps}
        | other
    )


@pytest.fixture
def tables(tiny: UNet) -> tuple[FittedTable, ...]:
    digest = weights_digest(tiny.state_dict())
    return tuple(table_like(tiny.config, digest, steps) for steps in (4, 6))


@pytest.fixture
def config(tiny_config: UNetConfig, tables: tuple[FittedTable, ...]) -> CheckpointConfig:
    own = SamplingParams(FITTED, 4, 0.0, 2.5, spacing="logsnr")
    return CheckpointConfig(tiny_config, DIFFUSION, ("a", "b", "c"), own, fitted=tables)


def test_tables_come_back_exactly(tiny: UNet, config: CheckpointConfig, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "some.safetensors", tiny.state_dict(), config)
    assert checkpoint.load(tmp_path / "some.safetensors").config == config


def test_a_checkpoint_without_tables_says_nothing_of_them(config: CheckpointConfig) -> None:
    plain = config.without_tables()
    assert "fitted" not in json.loads(plain.to_json())
    assert plain.sampling == SamplingParams("dpmpp_2m", 20, 0.0, 2.5, spacing="logsnr")


def test_a_fitted_step_is_the_formula_with_x_T_again(tiny: UNet, config: CheckpointConfig) -> None:
    schedule = config.schedule(config.sampling)
    seen: list[float] = []

    def network(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        seen.append(float(t[0]))
        return tiny(x, t, y)

    got = sample(network, schedule, (1, 8, 8), [5], [3], [1], null_class=3)
    assert seen == schedule.timesteps.tolist()
    assert not np.equal(schedule.timesteps, schedule.timesteps.round()).any()
    x = x_T = normals([5], [3], [0], (1, 8, 8))
    x0 = x0_prev = torch.zeros_like(x)
    for t, row in zip(schedule.timesteps, schedule.table, strict=True):
        g, p, q, _, a, b, c, d, _, s = row.tolist()
        told = torch.tensor([float(t)])
        e, u = (tiny(x, told, torch.tensor([k])) for k in (1, 3))
        new = (p * x - q * (u + g * (e - u))).clamp(-1, 1)
        x, x0, x0_prev = a * x + b * new + c * x0 + d * x0_prev + s * x_T, new, x0
    assert torch.allclose(got, x, atol=1e-5)


def test_whole_timesteps_give_the_same_bytes_as_floats(tiny: UNet) -> None:
    schedule = make_schedule(GaussianDiffusion(DIFFUSION), "dpmpp_2m", 5, guidance_scale=2.0)
    floats = replace(schedule, timesteps=schedule.timesteps.astype(np.float64))
    one, other = (sample(tiny, s, (1, 8, 8), [1], [0], [2], null_class=3) for s in (schedule, floats))
    assert torch.equal(one, other)


def test_what_is_not_asked_for_is_the_default_table(config: CheckpointConfig) -> None:
    assert config.sampling_params() == config.sampling
    assert config.sampling_params(steps=6).steps == 6
    assert config.sampling_params(sampler=FITTED, steps=6, guidance_scale=2.5).sampler == FITTED
    sent_back = vars(config.sampling_params(steps=6))
    assert vars(config.sampling_params(**sent_back)) == sent_back


def test_a_named_solver_is_that_of_an_unnamed_one(config: CheckpointConfig) -> None:
    assert config.sampling_params(sampler="dpmpp_2m", limit="none") == config.sampling_params(limit="none")
    assert config.sampling_params(sampler="dpmpp_2m", spacing="leading").spacing == "leading"
    assert config.sampling_params(sampler="ddim").spacing == "trailing", "which nobody has measured"


def test_another_default_sampler_has_the_most_fitted_steps(config: CheckpointConfig) -> None:
    other = replace(config, sampling=SamplingParams("ddim", 4, 0.0, 1.0))
    assert other.sampling_params(sampler=FITTED) == SamplingParams(FITTED, 6, 0.0, 2.5)
    assert config.sampling_params(5, sampler=FITTED).steps == 4


@pytest.mark.parametrize("given", [{"steps": 9}, {"guidance_scale": 1.0}, {"limit": "dynamic"}])
def test_without_a_table_an_unnamed_sampler_is_the_solver(config: CheckpointConfig, given: dict[str, Any]) -> None:
    params = config.sampling_params(**given)
    assert params == replace(SamplingParams("dpmpp_2m", 20, 0.0, 2.5, spacing="logsnr"), **given)
    assert config.sampling_params(12, limit="none").steps == 12
    assert config.sampling_params(3).sampler == "dpmpp_2m"


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"steps": 5}, "steps must be 4 or 6 with sampler fitted, not 5"),
        ({"guidance_scale": 3.0}, "guidance_scale must be 2.5 with sampler fitted, not 3.0"),
        ({"guidance_interval": [0.2, 0.8]}, "guidance_interval must be 0,1 with sampler fitted, not 0.2,0.8"),
        ({"limit": "none"}, "limit must be clamp with sampler fitted, not none"),
        ({"spacing": "trailing"}, "spacing belongs to other samplers; fitted has timesteps of its own"),
        ({"eta": 0.5}, "eta belongs to the ddim sampler; fitted takes none"),
    ],
)
def test_what_no_table_was_fitted_to_is_refused(config: CheckpointConfig, given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidSamplingParams) as caught:
        config.sampling_params(sampler=FITTED, **given)
    assert str(caught.value) == sentence
    assert caught.value.field == next(iter(given))


def test_fitted_without_tables_is_refused(config: CheckpointConfig) -> None:
    with pytest.raises(InvalidSamplingParams, match="fitted needs fitted tables, which this checkpoint has none of"):
        config.without_tables().sampling_params(sampler=FITTED)
    with pytest.raises(InvalidSamplingParams, match="fitted needs a checkpoint"):
        make_schedule(GaussianDiffusion(DIFFUSION), FITTED, 4)


def test_tables_of_other_weights_are_refused(tiny: UNet, config: CheckpointConfig, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    weights = tiny.state_dict()
    weights["out_conv.bias"] = weights["out_conv.bias"] + 1
    with pytest.raises(FittedTableError, match="not of these weights"):
        checkpoint.save(path, weights, config)
    assert not path.exists()
    save_file(weights, path, metadata={"ddpm": config.to_json()})
    with pytest.raises(CheckpointError, match=r"some\.safetensors: its fitted tables are not of these weights: fit"):
        checkpoint.load(path)


DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"rows": [[1.0] * 10] * 3}, "not as many timesteps, rows and draws"),
    "columns": ({"rows": [[1.0] * 9] * 4}, "not as many timesteps, rows and draws"),
    "ragged": ({"rows": [[1.0]] * 3 + [[1.0, 2.0]]}, "damaged"),
    "words": ({"rows": [["x"] * 10] * 4}, "damaged"),
    "null": ({"timesteps": None}, "damaged"),
    "nan": ({"timesteps": [9.0, 8.0, 7.0, float("nan")]}, "not all finite"),
    "huge": ({"rows": [[1.0] * 9 + [-3.5e38]] * 4}, "not all finite"),  # as float32
    "numbers in words": ({"timesteps": ["9", "8", "7", "1"]}, "not of their types"),
    "truths": ({"timesteps": [True, True, False, False]}, "not of their types"),
    "many digits": ({"rows": [[10**400] * 10] * 4}, "not of their types"),
    "negative": ({"timesteps": [9.0, 8.0, 7.0, -1.0]}, "timesteps below 0"),
    "late": ({"timesteps": [399.5, 8.0, 7.0, 1.0]}, "has timestep 399.5: the last is 399"),
    "noise": ({"draws": [0, 0, 0, 3]}, "its own"),
    "fractions": ({"draws": [0, 0, 0, 0.5]}, "not of their types"),
    "limit": ({"limit": "none"}, "another limit than none"),
    "word": ({"limit": "tight"}, "limit must be one of"),
    "steps": ({"steps": 0}, "damaged"),
    "interval": ({"guidance_interval": [0.5]}, "two numbers"),
    "guidance": ({"guidance_scale": "much"}, "damaged"),
    "digest": ({"weights": 7}, "not of their types"),
    "more": ({"colour": 1}, "unexpected keyword argument 'colour'"),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_table_is_refused_with_a_sentence(
    tiny: UNet, config: CheckpointConfig, tmp_path: Path, how: str
) -> None:
    changes, sentence = DAMAGED[how]
    data = json.loads(config.to_json())
    data["fitted"][0] |= changes
    path = tmp_path / "some.safetensors"
    save_file(tiny.state_dict(), path, metadata={"ddpm": json.dumps(data)})
    with pytest.raises(CheckpointError, match=sentence) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_list_of_tables_and_a_field_less_are_refused(tiny: UNet, config: CheckpointConfig, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    data = json.loads(config.to_json())
    for tables in (7, [3], [{key: value for key, value in data["fitted"][0].items() if key != "rows"}]):
        save_file(tiny.state_dict(), path, metadata={"ddpm": json.dumps(data | {"fitted": tables})})
        with pytest.raises(CheckpointError, match=r"some\.safetensors"):
            checkpoint.load(path)


def test_a_network_refuses_tables_that_it_cannot_run(tiny: UNet, config: CheckpointConfig) -> None:
    with pytest.raises(FittedTableError, match="is guided: this network has no null class"):
        replace(config, unet=replace(config.unet, null_class=False))
    with pytest.raises(FittedTableError, match="between whole numbers"):
        replace(config, unet=replace(config.unet, time_table=400))
    with pytest.raises(FittedTableError, match="the same settings"):
        replace(config, fitted=config.fitted + config.fitted[:1])


def test_a_new_table_takes_the_place_of_one_for_the_same(tables: tuple[FittedTable, ...]) -> None:
    again = replace(tables[0], timesteps=(9.0, 8.0, 7.0, 6.0))
    assert with_table(tables, again) == (again, tables[1])
    other = replace(tables[0], guidance_scale=1.0)
    assert with_table(tables[1:], other) == (other, tables[1])
    assert asdict(again) == json.loads(json.dumps(asdict(again))) | {
        name: getattr(again, name) for name in ("guidance_interval", "timesteps", "rows", "draws")
    }
