"""Every preset makes a configuration, a network and a schedule; what is given besides wins."""

import shlex
from dataclasses import fields, replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model import checkpoint
from model.diffusion import GaussianDiffusion
from model.nn.unet import UNet
from model.sampling.schedule import make_schedule
from training.cli.command import parse
from training.cli.presets import PRESETS
from training.run.config import TrainConfig
from training.run.norm_groups import single_channel_groups


def parsed(words: str) -> TrainConfig:
    return parse(shlex.split(words))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_makes_a_network_and_a_schedule(name: str) -> None:
    explanation, options = PRESETS[name]
    config = parsed(f"--preset {name}")
    defaults = {f.name: f.default for f in fields(TrainConfig)}
    assert not [key for key, value in options.items() if value == defaults[key]], "says what is so anyway"
    assert all(getattr(config, key) == value for key, value in options.items())
    assert len(explanation) < 115
    shape = (1, 28, 28) if "mnist" in name else (3, *(config.image_size or (32, 32)))
    with FakeTensorMode():  # shapes alone, as on meta, which knows no autocast
        network = UNet(config.unet(shape, 10))
        y = torch.zeros(2, dtype=torch.int64) if config.use_labels else None
        out = network(torch.zeros(2, *shape), torch.zeros(2), y)
    assert out.shape == (2, shape[0] * (2 if config.variance == "learned_range" else 1), *shape[1:])
    make_schedule(GaussianDiffusion(config.diffusion()), config.sampler, config.sample_steps)


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_of_a_preset_is_reproducible_without_it(name: str) -> None:
    config = parsed(f"--preset {name} --batch_size 32 --accumulate 4 --ema_decay 0.5,0.75")
    words = shlex.split(config.command())
    assert "--preset" not in words
    assert replace(parsed(shlex.join(words[3:])), run_name=config.run_name) == config


def test_ho_s_network_is_the_papers() -> None:
    with torch.device("meta"):
        network = UNet(parsed("--preset ho2020").unet((3, 32, 32), 10))
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


def test_mnist_is_the_recipe_of_the_bundled_checkpoint() -> None:
    words = (
        "--dataset ylecun/mnist --use_labels --label_dropout 0.1 --base_channels 32 --channel_mults 1,2,3 "
        "--time_emb_dim 128 --norm_groups 8 --class_conditioning both --dropout 0 --schedule cosine --prediction v "
        "--batch_size 64 --iterations 9200 --learning_rate 1e-3 --warmup 200 --lr_schedule cosine --grad_clip 1 "
        "--ema_decay 0.999 --precision bf16 --sample_steps 20 --guidance_scale 1.2 --run_name a"
    )
    assert parsed("--preset mnist --run_name a") == parsed(words)


@pytest.mark.slow
def test_cifar10_small_is_the_network_of_the_bundled_checkpoint_and_muons_long_run() -> None:
    words = (
        "--use_labels --label_dropout 0.1 --class_conditioning both --flip --patch_size 2 --base_channels 96 "
        "--channel_mults 1,2 --num_res_blocks 1 --attention_at 8 --time_emb_dim 256 --norm_groups 16 --dropout 0 "
        "--schedule cosine --prediction v --timestep_sampler stratified --batch_size 64 --optimizer muon "
        "--learning_rate 6e-4 --warmup 300 --lr_schedule wsd --grad_clip 1 --ema_decay 0.999,0.9995 "
        "--ema_power 0.05,0.1 --precision bf16 --guidance_scale 1.5 --iterations 62500 --run_name a"
    )
    small, said = parsed("--preset cifar10-small --run_name a"), parsed(words)
    bundled = checkpoint.load("cifar10-teacher").config.unet
    assert small.unet((3, 32, 32), 10) == said.unet((3, 32, 32), 10) == bundled
    assert replace(said, attention_at=()) == small


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_has_groups_of_a_single_channel(name: str) -> None:
    assert single_channel_groups(parsed(f"--preset {name}").unet((3, 64, 64), 10)) is None


def test_options_override_the_preset() -> None:
    assert parsed("--preset mnist --learning_rate 3e-4 --flip").learning_rate == 3e-4
    assert parsed("--learning_rate 3e-4 --preset mnist").dataset == "ylecun/mnist"
    assert parsed("--preset iddpm --attention_resolutions 0").unet((3, 32, 32), 10).attention_levels == (0,)
    assert parsed("--preset diffusers --attention_at 16").unet((3, 64, 64), 10).attention_levels == (2,)


def test_original_preset_is_the_defaults_but_for_sampling() -> None:
    original, plain = parsed("--preset original --run_name a"), parsed("--run_name a")
    same = {"variance": "fixed_small", "sampler": "dpmpp_2m", "sample_steps": 20}
    assert replace(original, **same) == plain


def test_a_preset_that_does_not_fit_is_told_with_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    def refused(words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parsed(words)
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "one of mnist, mnist-small, cifar10" in (text := refused("--preset cifar"))
    assert "did you mean cifar10?" in text
    text = refused("--preset mnist --use_labels false")
    assert "--label_dropout needs --use_labels (--preset mnist says:" in text
    assert "--label_dropout 0.1" in text
    assert "--preset is for a new run" in refused("--preset mnist --resume x")


def test_help_lists_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    lines = capsys.readouterr().out.splitlines()
    for name, (explanation, _) in PRESETS.items():
        assert f"  {name:<15} {explanation}" in lines
