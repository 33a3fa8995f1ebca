"""The options of a checkpoint's sampling are the fields of SamplingParams."""

from dataclasses import fields, replace

import pytest

from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.unet import UNet
from model.sampling.schedule import SamplingParams
from training.cli.options import Parser
from training.cli.sampling_options import add_sampling_options, settings_of

OWN = SamplingParams("ddim", 6, 0.5, 2.0, (0.1, 0.9), "leading", "none")
ASKED = SamplingParams("ddim", 7, 0.25, 3.0, (0.2, 0.8), "linspace", "dynamic")


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="python -m training.sample", description="")
    add_sampling_options(parser)
    return parser


@pytest.fixture
def source(tiny: UNet) -> Checkpoint:
    names = tuple(map(str, range(tiny.config.num_classes or 0)))
    config = CheckpointConfig(tiny.config, DiffusionConfig(schedule="cosine", prediction="v"), names, OWN)
    return Checkpoint("tiny", "0" * 64, config, tiny)


def words(name: str, value: object) -> list[str]:
    return [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def test_without_options_a_checkpoint_has_its_own(parser: Parser, source: Checkpoint) -> None:
    assert settings_of(source, parser.read([]))[0] == OWN


@pytest.mark.parametrize("name", [setting.name for setting in fields(SamplingParams)])
def test_each_setting_has_an_option(name: str, parser: Parser, source: Checkpoint) -> None:
    value = getattr(ASKED, name)
    settings, schedule = settings_of(source, parser.read(words(name, value)))
    assert settings == replace(OWN, **{name: value})
    assert len(schedule) == settings.steps
    assert f"--{name}" in parser.format_help()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eta", "2", "--eta must be between 0 and 1, not 2.0"),
        ("steps", "0", "--steps must be between 1 and"),
        ("guidance_scale", "nan", "--guidance_scale must be finite, not nan"),
        ("guidance_interval", "0.1,0.2,0.3", "--guidance_interval must be two numbers, lower end first, not 3"),
        ("guidance_interval", "0.9,0.1", "--guidance_interval must be within 0 and 1, lower end first, not 0.9, 0.1"),
    ],
)
def test_a_wrong_value_is_refused_by_its_option(
    name: str, value: str, message: str, parser: Parser, source: Checkpoint
) -> None:
    with pytest.raises(ValueError, match="^" + message.replace(".", r"\.")):
        settings_of(source, parser.read([f"--{name}", value]))


def test_every_settings_help_can_be_printed(parser: Parser) -> None:
    help_text = " ".join(parser.format_help().split())
    for setting in fields(SamplingParams):
        assert setting.metadata["description"] in help_text


def test_another_sampler_has_its_own_steps(parser: Parser, source: Checkpoint) -> None:
    settings, _ = settings_of(source, parser.read(["--sampler", "dpmpp_2m"]))
    assert (settings.sampler, settings.steps, settings.eta, settings.spacing) == ("dpmpp_2m", 20, 0.0, "trailing")
