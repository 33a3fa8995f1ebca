import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from training.command import parse
from training.config import GROUPS, TrainConfig


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
        ("--schedule cosin", "one of linear, cosine, not 'cosin'; did you mean cosine?"),
        ("--sampler foo", "one of ddpm, ddim, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, not 'foo'"),
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
        ("--iteration 5", "there is no option --iteration; did you mean --iterations?"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words += " --sample_steps 5" if "num_timesteps" in words else ""
    assert message in refused(capsys, *words.split())


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
    words = config.command().replace("''", "()").split()
    assert words[:3] == ["python", "-m", "training.train"]
    assert replace(parsed(*words[3:]), run_name=config.run_name) == config


def saved(tmp_path: Path, **options: object) -> str:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(TrainConfig(**options).to_json())
    return str(tmp_path / "run")


def test_resume_takes_the_runs_configuration_and_what_is_given_besides(tmp_path: Path) -> None:
    folder = saved(tmp_path, batch_size=7, seed=3, log_dir="elsewhere", run_name="moved")
    config, resume = parse(["--resume", folder, "--iterations", "9"])
    assert resume
    assert (config.batch_size, config.seed, config.iterations) == (7, 3, 9)
    assert config.run_dir == tmp_path / "run"


@pytest.mark.parametrize("words", ["--base_channels 64", "--prediction v", "--use_labels", "--channel_mults 1,2"])
def test_resume_refuses_what_would_change_the_meaning_of_the_weights(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot change on --resume" in refused(capsys, "--resume", saved(tmp_path), *words.split())


def test_resume_refuses_a_place_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run there" in refused(capsys, "--resume", str(tmp_path))
    assert "--log_dir" in refused(capsys, "--resume", saved(tmp_path), "--log_dir", "x")
    (tmp_path / "run" / "config.json").write_text('{"no_such_option": 1}')
    assert "config.json cannot be used" in refused(capsys, "--resume", str(tmp_path / "run"))


def test_a_run_from_when_there_were_fewer_options_goes_on(tmp_path: Path) -> None:
    folder = Path(saved(tmp_path, norm_groups=8, use_labels=True, class_conditioning="both"))
    old = json.loads((folder / "config.json").read_text()) | {"ema_decay": 0.999}
    kept = ("dataset", "use_labels", "base_channels", "norm_groups", "class_conditioning", "ema_decay", "run_name")
    (folder / "config.json").write_text(json.dumps({name: old[name] for name in kept}))
    config, _ = parse(["--resume", str(folder), "--ema_decay", "0.999"])
    assert config.ema_decay == (0.999,)
    assert (config.norm_groups, config.class_conditioning) == (8, "both")
    assert parse(["--resume", str(folder)])[0] == config
