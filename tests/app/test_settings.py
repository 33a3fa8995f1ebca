import pytest
import torch

from app.__main__ import read_settings
from app.settings import PREFIX, RENAMED, Settings, service_links, unknown_variables


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(PREFIX + name.upper(), raising=False)


def complaint(*argv: str) -> str:
    """What the start stops with: the exit status 1, and one line."""
    with pytest.raises(SystemExit) as stopped:
        read_settings(list(argv))
    assert isinstance(stopped.value.code, str)  # Python prints it and exits with 1
    assert "\n" not in stopped.value.code
    return stopped.value.code


def test_flags_and_variables_mean_the_same_and_the_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings([]).max_n == 64
    monkeypatch.setenv("DDPM_MAX_N", "5")
    assert read_settings([]).max_n == 5
    assert read_settings(["--max-n", "6"]).max_n == 6
    assert read_settings(["--max-n=7", "--drain-s", "0.5"]).drain_s == 0.5


def test_help_lists_every_setting_with_its_default(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stopped:
        read_settings(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert field.description is not None
        assert " ".join(field.description.split()) in text
        assert f"(default: {field.default})" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--max-n", "many"], "--max-n (DDPM_MAX_N): must be a whole number from 1 to 4096, not 'many'"),
        (["--max-n", "0"], "--max-n (DDPM_MAX_N): must be a whole number from 1 to 4096, not '0'"),
        (["--port", "65536"], "--port (DDPM_PORT): must be a whole number from 0 to 65535"),
        (["--device", "tpu"], "--device (DDPM_DEVICE): must be one of auto, cpu, cuda, not 'tpu'"),
        (["--max-timeout-s", "nan"], "--max-timeout-s (DDPM_MAX_TIMEOUT_S)"),
        (["--max-timeout-s", "inf"], "--max-timeout-s (DDPM_MAX_TIMEOUT_S)"),
        (["--drain-s", "nan"], "--drain-s (DDPM_DRAIN_S)"),
        (["--max-n", "0", "--port", "x"], "DDPM_PORT"),
        (["--cors-origins", "x"], "an origin is scheme://host or scheme://host:port, without a path, not 'x'"),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_wrong(argv: list[str], said: str) -> None:
    assert said in complaint(*argv)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--prot", "1"], "unknown option --prot; did you mean --port? --help lists the options"),
        (["--max-frame=3"], "unknown option --max-frame; did you mean --max-frames? --help lists the options"),
        (["--xyzzy"], "unknown option --xyzzy; --help lists the options"),
        (["stray"], "unknown option stray; --help lists the options"),
        (["--port"], "--port needs a value; --help lists the options"),
    ],
)
def test_an_unknown_flag_is_refused(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_settings(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"python -m app: {said}\n"


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_MAX_FRAMES", "lots")
    assert "DDPM_MAX_FRAMES" in complaint()
    assert "'lots'" in complaint()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("DDPM_MAX_FRAME", "unknown variable DDPM_MAX_FRAME; did you mean DDPM_MAX_FRAMES?"),
        ("ddpm_prot", "unknown variable ddpm_prot; did you mean DDPM_PORT?"),
        ("DDPM_XYZZY", "unknown variable DDPM_XYZZY"),
    ],
)
def test_a_misspelt_variable_stops_the_start(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setenv(name, "3")
    assert unknown_variables() == [said]
    assert said in complaint()


LINKS = {
    "DDPM_SERVICE_HOST": "10.0.0.1",
    "DDPM_SERVICE_PORT": "8000",
    "DDPM_SERVICE_PORT_HTTP": "8000",
    "DDPM_PORT": "tcp://10.0.0.1:8000",
    "DDPM_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "DDPM_PORT_8000_TCP_PROTO": "tcp",
    "DDPM_PORT_8000_TCP_PORT": "8000",
    "DDPM_PORT_8000_TCP_ADDR": "10.0.0.1",
    "DDPM_SERVE_SERVICE_HOST": "fd00::1",
    "DDPM_SERVE_PORT": "tcp://[fd00::1]:8000",
    "DDPM_SERVE_PORT_53_UDP_ADDR": "fd00::1",
}


def test_an_orchestrators_service_links_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LINKS.items():
        monkeypatch.setenv(name, value)
    assert unknown_variables() == []
    assert service_links() == sorted(LINKS)
    assert read_settings([]).port == Settings().port == 8000
    assert read_settings(["--port", "1234"]).port == 1234


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DDPM_PORT", "tcp"),
        ("DDPM_PORT", "tcp://"),
        ("DDPM_PORT", "http://10.0.0.1:8000"),
        ("DDPM_HOST", "tcp://10.0.0.1:8000"),
        ("DDPM_SERVICE", "x"),
        ("DDPM_PORTS", "8000"),
        ("DDPM_PORT_TCP", "8000"),
        ("DDPM_SERVICE_HOSTS", "x"),
    ],
)
def test_what_only_looks_like_a_service_link_is_not_ignored(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert service_links() == []
    if name == "DDPM_HOST":
        assert read_settings([]).host == value  # which no address resolves to
    else:
        assert name in complaint()


def test_the_device_is_found_or_refused() -> None:
    assert Settings(device="cpu").torch_device() == torch.device("cpu")
    assert Settings().torch_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device cuda was asked for"):
            Settings(device="cuda").torch_device()


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_names_of_settings_are_refused_with_the_new(
    old: str, new: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        read_settings([f"--{old.replace('_', '-')}", "8"])
    assert f"--{old.replace('_', '-')} is called --{new.replace('_', '-')} now" in capsys.readouterr().err
    monkeypatch.setenv(f"DDPM_{old.upper()}", "8")
    with pytest.raises(SystemExit, match=f"DDPM_{old.upper()} is called DDPM_{new.upper()} now"):
        read_settings([])
