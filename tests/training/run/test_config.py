import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.sampling.schedule import SamplingParams
from training.cli.command import parse
from training.run.config import GROUPS, TrainConfig


def parsed(*words: str) -> TrainConfig:
    return parse(list(words))[0]


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message with which the command line ends."""
    with pytest.raises(SystemExit) as stop:
        parse(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_without_words_it_is_the_originals_cifar10_run() -> None:
    config = parsed()
    assert config.dataset == "uoft-cs/cifar10"
    assert (config.batch_size, config.iterations, config.learning_rate) == (128, 800_000, 2e-4)
    assert (config.base_channels, config.channel_mults, config.attention_resolutions) == (128, (1, 2, 2, 2), (1,))
    assert config.run_dir.parent == Path.home() / "ddpm_logs"
    assert config.run_dir.name.startswith("ddpm-20")


@pytest.mark.parametrize(
    "words", [["--use_labels"], ["--use_labels", "True"], ["--use_labels", "y"], ["--use_labels=1"]]
)
def test_a_switch_is_bare_or_valued(words: list[str]) -> None:
    assert parsed(*words, "--flip").use_labels


def test_a_switch_can_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    assert not parsed("--use_labels", "False").use_labels
    assert "expected true or false, not 'maybe'" in refused(capsys, "--use_labels", "maybe")


@pytest.mark.parametrize("text", ["1,2,2", "(1, 2, 2)", "[1,2,2]", "1, 2, 2,"])
def test_whole_numbers_are_written_in_several_ways(text: str) -> None:
    assert parsed("--channel_mults", text).channel_mults == (1, 2, 2)


def test_a_tuple_of_one_and_of_none() -> None:
    assert parsed("--attention_resolutions", "(1,)").attention_resolutions == (1,)
    assert parsed("--attention_resolutions", "()").attention_resolutions == ()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--schedule cosin", "one of linear, cosine, sigmoid, not 'cosin'; did you mean cosine?"),
        ("--sampler foo", "one of ddpm, ddim, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, consistency, fitted, not 'foo'"),
        ("--channel_mults 1,x", "whole numbers such as 1,2,2"),
        ("--attention_resolutions 16", "they are 0 to 3"),
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--learning_rate 2", "between 0 and 1"),
        ("--learning_rate nan", "between 0 and 1"),
        ("--grad_clip nan", "--grad_clip must not be negative"),
        ("--ema_decay 1", "--ema_decay must be"),
        ("--image_size 32", "height,width"),
        ("--base_channels 7", "base_channels must be even"),
        ("--num_timesteps 10", "betas outside (0, 1)"),
        ("--label_dropout 0.1", "needs --use_labels"),
        ("--use_labels --guidance_scale 2", "needs --label_dropout"),
        ("--seed -1", "--seed must be at least 0"),
        ("--lr 1e-3", "there is no option --lr; did you mean --learning_rate?"),
        ("--learning-rate 1e-3", "did you mean --learning_rate?"),
        ("--learning_rate=x", "invalid float value: 'x'"),
        ("--train_batch_size 5", "did you mean --batch_size?"),
        ("--qqq 5", "there is no option --qqq (--help lists all)"),
        ("--changed_data", "are for a run that goes on: give --resume"),
        ("--rename_classes cat=kitty", "are for a run that goes on: give --resume"),
        ("--rename_classes cat", "expected pairs such as OLD=NEW,OLD=NEW, not 'cat'"),
        ("--rename_classes cat=a,cat=b", "expected pairs"),
        ("--run_name caf\udce9", "--run_name caf\\udce9 is not UTF-8"),
        ("--channel_mults 1 2 2", "unexpected '2 2'; a list is one word"),
        ("--norm batch", "one of gn, bn, in, none, not 'batch'"),
        ("--activation sillu", "one of silu, relu, mish, not 'sillu'; did you mean silu?"),
        ("--timestep_sampler importance", "one of uniform, antithetic, stratified, loss_second_moment"),
        ("--variance learned", "did you mean learned_range?"),
        ("--optimizer sgd", "one of adam, adamw, muon, not 'sgd'"),
        ("--ema_decay 0.9,0.9", "--ema_decay must be"),
        ("--ema_decay ()", "--ema_decay must be"),
        ("--ema_decay 0.9,x", "numbers such as 0.999,0.9999"),
        ("--ema_update_rate 0", "--ema_update_rate must be at least 1"),
        ("--accumulate 3", "--accumulate 3 must divide --batch_size 128"),
        ("--weight_decay 0.1", "--weight_decay needs --optimizer adamw or muon"),
        ("--optimizer muon --model_checkpoint x --optim_checkpoint y", "needs --optimizer adam or adamw"),
        ("--decay_share 0.5", "--decay_share needs --lr_schedule wsd"),
        ("--lr_schedule wsd --decay_share 0", "--decay_share must be above 0"),
        ("--noise_mean 0", "--noise_mean needs --timestep_sampler lognormal"),
        ("--timestep_sampler lognormal --noise_std 0", "--noise_std above 0"),
        (
            "--schedule cosine --prediction v --zero_terminal_snr --timestep_sampler lognormal",
            "--timestep_sampler lognormal draws no infinite noise level",
        ),
        ("--haar", "--haar needs --patch_size 2"),
        ("--ema_power 0.3", "--ema_power is from 0.001 to 0.28"),
        ("--ema_power 1e-160", "--ema_power is from 0.001 to 0.28"),
        ("--ema_power 0.1,0.1", "--ema_power is from"),
        ("--schedule cosine --schedule_low 1e-3", "--schedule_low needs --schedule linear"),
        ("--norm bn --norm_groups 8", "--norm_groups needs --norm gn"),
        ("--norm none --norm_eps 1e-6", "--norm_eps needs a --norm"),
        ("--class_conditioning both", "--class_conditioning needs --use_labels"),
        ("--num_heads 4 --head_channels 32", "--num_heads needs --head_channels 0"),
        ("--num_heads 3", "256 channels cannot be divided"),
        ("--resblock_updown --downsample_padding 0", "--downsample_padding needs --resblock_updown false"),
        ("--zero_terminal_snr", "zero_terminal_snr needs prediction x0 or v"),
        ("--optim_checkpoint x", "--optim_checkpoint needs --model_checkpoint"),
        ("--project_name a/b", "the name of a folder, not a path"),
        ("--attention_at 16 --attention_resolutions 1", "give one of them"),
        ("--attention_at 15 --image_size 32,32", "shorter sides are 32,16,8,4"),
        ("--attention_at 0", "--attention_at are at least 1"),
        ("--channel_mults ()", "--channel_mults is one number or more"),
        ("--attention_at 16,15", "shorter sides are 120,60,30,15"),
        ("--iteration 5", "there is no option --iteration; did you mean --iterations?"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words += " --sample_steps 5" if "num_timesteps" in words else ""
    assert message in refused(capsys, *words.split())


def test_muon_is_refused_where_torch_has_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    assert "--optimizer muon needs torch 2.9 or newer" in refused(capsys, "--optimizer", "muon")


def test_help_names_every_option_once_under_its_headline(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(text.count(f"  --{f.name} ") == 1 for f in fields(TrainConfig))
    assert all(f"\n{headline}:\n  --{first} " in text for headline, first in GROUPS.items())


def test_json_and_command_give_the_configuration_back() -> None:
    text = "--dataset a/b --use_labels --label_dropout 0.1 --image_size 8,12 --attention_resolutions () --grad_clip 1"
    config = parsed(*text.split())
    assert TrainConfig(**json.loads(config.to_json())) == config
    words = shlex.split(config.command())
    assert words[:3] == ["python", "-m", "training.train"]
    assert replace(parsed(*words[3:]), run_name=config.run_name) == config


def saved(tmp_path: Path, **options: object) -> str:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(TrainConfig(**options).to_json())
    return str(tmp_path / "run")


def test_resume_takes_the_runs_config_and_given_overrides(tmp_path: Path) -> None:
    folder = saved(tmp_path, batch_size=7, seed=3, log_dir="elsewhere", run_name="moved")
    config, resume, _ = parse(["--resume", folder, "--iterations", "9"])
    assert resume
    assert (config.batch_size, config.seed, config.iterations) == (7, 3, 9)
    assert config.run_dir == tmp_path / "run"


@pytest.mark.parametrize("words", ["--base_channels 64", "--prediction v", "--use_labels", "--channel_mults 1,2"])
def test_resume_refuses_options_that_change_the_network(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot change on --resume" in refused(capsys, "--resume", saved(tmp_path), *words.split())


def test_resume_refuses_a_place_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run there" in refused(capsys, "--resume", str(tmp_path))
    assert "--log_dir" in refused(capsys, "--resume", saved(tmp_path), "--log_dir", "x")
    (tmp_path / "run" / "config.json").write_text('{"no_such_option": 1}')
    assert "config.json cannot be used" in refused(capsys, "--resume", str(tmp_path / "run"))


def test_a_run_from_when_there_were_fewer_options_goes_on(tmp_path: Path) -> None:
    folder = Path(saved(tmp_path, norm_groups=8, use_labels=True, class_conditioning="both", ema_decay=(0.999,)))
    old = json.loads((folder / "config.json").read_text())
    kept = ("dataset", "use_labels", "base_channels", "norm_groups", "class_conditioning", "ema_decay", "run_name")
    (folder / "config.json").write_text(json.dumps({name: old[name] for name in kept}))
    config = parsed("--resume", str(folder), "--ema_decay", "0.999")
    assert config.ema_decay == (0.999,)
    assert (config.norm_groups, config.class_conditioning) == (8, "both")
    assert parse(["--resume", str(folder)])[0] == config


@pytest.mark.parametrize(
    ("option", "default", "text", "value"),
    [  # the original's, and a value that differs; reference §1
        ("num_timesteps", 1000, "500", 500),
        ("schedule", "linear", "cosine", "cosine"),
        ("schedule_low", 1e-4, "2e-4", 2e-4),
        ("schedule_high", 0.02, "0.01", 0.01),
        ("loss_type", "l2", "l1", "l1"),
        ("use_labels", False, "True", True),
        ("base_channels", 128, "48", 48),  # theirs had to be divisible by 32
        ("channel_mults", (1, 2, 2, 2), "(1, 2, 4)", (1, 2, 4)),
        ("num_res_blocks", 2, "1", 1),
        ("time_emb_dim", 512, "100", 100),
        ("norm", "gn", "in", "in"),
        ("dropout", 0.1, "0", 0.0),
        ("activation", "silu", "mish", "mish"),
        ("attention_resolutions", (1,), "(1,2)", (1, 2)),
        ("ema_decay", (0.9999,), "0.99", (0.99,)),
        ("ema_update_rate", 1, "10", 10),
        ("learning_rate", 2e-4, "1e-4", 1e-4),
        ("batch_size", 128, "64", 64),
        ("iterations", 800_000, "5", 5),
        ("log_to_wandb", False, "true", True),  # theirs is on
        ("log_rate", 1000, "10", 10),
        ("checkpoint_rate", 1000, "10", 10),
        ("log_dir", "~/ddpm_logs", "logs", "logs"),
        ("project_name", "", "ddpm", "ddpm"),
        ("run_name", "", "first", "first"),
        ("model_checkpoint", "", "a-model.pth", "a-model.pth"),
        ("device", "auto", "cpu", "cpu"),
    ],
)
def test_an_option_of_the_original_has_its_name_and_default(
    option: str, default: object, text: str, value: object
) -> None:
    assert next(f.default for f in fields(TrainConfig) if f.name == option) == default
    assert getattr(parsed(f"--{option}", text), option) == value
    assert getattr(parsed(f"--{option}={text}"), option) == value


@pytest.mark.parametrize("option", [f.name for f in fields(TrainConfig) if f.type == "bool"])
def test_every_switch_is_bare_or_valued(option: str) -> None:
    needed = {"zero_terminal_snr": ["--prediction", "v"], "haar": ["--patch_size", "2"]}
    besides = needed.get(option, [])
    assert getattr(parsed(f"--{option}", *besides), option) is True
    assert getattr(parsed(f"--{option}", "True", *besides), option) is True
    assert getattr(parsed(f"--{option}", "False", *besides), option) is False


@pytest.mark.parametrize("option", [f.name for f in fields(TrainConfig) if "tuple" in str(f.type)])
@pytest.mark.parametrize("form", ["{},{}", "({}, {})", "[{},{}]"])
def test_every_tuple_is_written_in_several_ways(option: str, form: str) -> None:
    pair = {
        "ema_decay": (0.5, 0.75),
        "ema_power": (0.05, 0.1),
        "attention_at": (16, 8),
        "guidance_interval": (0.25, 0.5),
    }.get(option, (1, 2))
    guided = ["--use_labels", "--label_dropout", "0.1", "--guidance_scale", "2"]  # without it there is no interval
    assert getattr(parsed(f"--{option}", form.format(*pair), *guided), option) == pair


def test_how_grids_are_sampled_is_the_checkpoints_default() -> None:
    words = (
        "--use_labels --label_dropout 0.1 --guidance_scale 2 --guidance_interval 0.2,0.8 --sampler ddim "
        "--sample_steps 30 --spacing quadratic --limit dynamic"
    )
    expected = SamplingParams("ddim", 30, 0.0, 2.0, (0.2, 0.8), "quadratic", "dynamic")
    assert parsed(*words.split()).sampling() == expected


def test_options_are_those_of_a_checkpoints_sampling() -> None:
    options, own = ({f.name: f for f in fields(kind)} for kind in (TrainConfig, SamplingParams))
    assert own.keys() - options.keys() == {"steps", "eta"}  # --sample_steps, and none: a grid of ddim has no noise
    for name in own.keys() & options.keys():
        assert options[name].default == own[name].default or name == "sampler"
        assert options[name].metadata["help"].startswith(own[name].metadata["description"])
        assert options[name].metadata["choices"] == (
            own[name].metadata["choices"] and list(own[name].metadata["choices"])
        )


def test_every_network_and_diffusion_option_reaches_it() -> None:
    words = (
        "--use_labels --label_dropout 0.1 --class_conditioning both --base_channels 48 --channel_mults 1,2,3 "
        "--num_res_blocks 1 --attention_resolutions 0,2 --head_channels 16 --time_emb_dim 96 --norm_groups 8 "
        "--activation mish --scale_shift_norm --dropout 0.3 --norm_eps 1e-6 --downsample_padding 0 --time_freq_shift 1 "
        "--time_scale 0.5 --num_timesteps 500 --schedule_low 2e-4 --schedule_high 0.03 --zero_terminal_snr "
        "--prediction v --variance learned_range --loss_type huber --weighting min_snr"
    )
    config = parsed(*words.split())
    unet = config.unet((1, 28, 20), 7)
    assert unet == UNetConfig(
        image_channels=1,
        image_size=(28, 20),
        base_channels=48,
        channel_mults=(1, 2, 3),
        num_res_blocks=1,
        attention_levels=(0, 2),
        time_emb_dim=96,
        num_classes=7,
        null_class=True,
        class_conditioning="both",
        dropout=0.3,
        activation="mish",
        head_channels=16,
        learned_variance=True,
        scale_shift_norm=True,
        norm_groups=8,
        norm_eps=1e-6,
        downsample_padding=0,
        time_freq_shift=1,
        time_scale=0.5,
    )
    assert config.diffusion() == DiffusionConfig(
        500, "linear", 2e-4, 0.03, "v", "huber", "learned_range", "min_snr", zero_terminal_snr=True
    )
    other = parsed("--norm", "bn", "--num_heads", "4", "--resblock_updown").unet((3, 32, 32), 7)
    assert (other.norm, other.num_heads, other.resblock_updown, other.num_classes) == ("bn", 4, True, None)


def test_attention_at_counts_pixels_of_the_padded_shorter_side() -> None:
    config = parsed("--attention_at", "16,8")
    assert config.unet((3, 32, 48), 2).attention_levels == (1, 2)
    assert config.unet((3, 80, 60), 2).attention_levels == (2, 3)  # 64 after padding
    assert parsed("--attention_at", "7", "--channel_mults", "1,2,2").unet((1, 28, 28), 2).attention_levels == (2,)
    patches = parsed("--attention_at", "8", "--channel_mults", "1,2", "--patch_size", "2")
    assert patches.unet((3, 32, 48), 2).attention_levels == (1,)
    assert patches.unet((3, 32, 48), 2).patch_size == 2
    assert parsed("--haar", "--patch_size", "2").unet((3, 32, 32), 2).haar
    assert patches.unet((3, 30, 30), 2).attention_levels == (1,)  # 32 after padding
    with pytest.raises(ValueError, match="shorter sides are 24,12,6,3"):
        config.unet((3, 24, 24), 2)


def test_a_project_is_a_folder_above_the_run_s(tmp_path: Path) -> None:
    config = TrainConfig(log_dir=str(tmp_path), project_name="digits", run_name="one")
    assert config.run_dir == tmp_path / "digits" / "one"
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.to_json())
    assert parse(["--resume", str(config.run_dir)])[:2] == (config, True)
    (tmp_path / "digits").rename(tmp_path / "moved")
    assert parse(["--resume", str(tmp_path / "moved" / "one")])[0].project_name == "moved"


def test_what_the_optimizer_s_state_brings_with_it_cannot_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, optimizer="adamw", weight_decay=0.1)
    for words in ("--weight_decay 0.2", "--ema_decay 0.9", "--ema_update_rate 2", "--norm bn", "--model_checkpoint x"):
        assert "cannot change on --resume" in refused(capsys, "--resume", folder, *words.split())
    assert parse(["--resume", folder, "--dropout", "0", "--learning_rate", "1e-5", "--accumulate", "2"])[1]
