"""The files for Docker, as far as they can be checked without one: pins, ports, times that must fit, locks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from app.__main__ import SHUTDOWN_GRACE_S
from app.settings import Settings
from tests.docker.files import DOCKER, ROOT

BASE = ROOT / "docker-compose.yml"
OVERRIDES = sorted(ROOT.glob("docker-compose.*.yml"))
HAPROXY = (DOCKER / "haproxy" / "haproxy.cfg").read_text()


class Loader(yaml.SafeLoader):
    """Knows Compose's own tags."""


for tag in ("!reset", "!override"):
    Loader.add_constructor(tag, lambda loader, node: None)


def services() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(BASE.read_text(), Loader)["services"]
    return loaded


def has_compose() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0


def test_every_yaml_file_is_one() -> None:
    files = [BASE, *OVERRIDES, *DOCKER.rglob("*.yml"), *(ROOT / "tests" / "docker").glob("*.yml")]
    assert len(files) >= 10
    for path in files:
        assert isinstance(yaml.load(path.read_text(), Loader), dict), path


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
@pytest.mark.parametrize("extra", [None, *OVERRIDES], ids=lambda path: path.name if path else "base")
def test_compose_accepts_its_files_and_reserves_the_gpu(extra: Any) -> None:
    files = ["-f", str(BASE), *(["-f", str(extra)] if extra else [])]
    secrets = {"API_KEYS_FILE": str(BASE), "GRAFANA_PASSWORD_FILE": str(BASE)}
    command = ["docker", "compose", *files, "config"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **secrets})
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout)["services"]
    has_gpu = "devices" in found["server"]["deploy"]["resources"].get("reservations", {})
    is_cpu = extra is not None and extra.name == "docker-compose.cpu.yml"
    assert has_gpu != is_cpu
    assert found["server"]["build"]["args"]["TORCH"] == ("cpu" if is_cpu else "cuda")
    assert ("secrets" in found["server"]) == (extra is not None and "secrets" in extra.name)
    if extra is not None and extra.name == "docker-compose.gpus.yml":
        devices = [found[name]["deploy"]["resources"]["reservations"]["devices"] for name in ("server", "server-gpu-1")]
        assert [device["device_ids"] for (device,) in devices] == [["0"], ["1"]]
        assert "server" in found["server-gpu-1"]["networks"]["default"]["aliases"]


def test_the_gpus_image_does_not_serve_on_a_cpu_by_accident() -> None:
    """The driver may be too old for its torch, which then finds no GPU and says no more than a warning."""
    assert services()["server"]["environment"]["DDPM_DEVICE"] == "${DEVICE:-cuda}"
    for_cpus = yaml.load((ROOT / "docker-compose.cpu.yml").read_text(), Loader)["services"]["server"]
    assert for_cpus["environment"] == {"DDPM_DEVICE": "cpu"}
    stages = re.split(r"^FROM ", (DOCKER / "Dockerfile").read_text(), flags=re.M)
    of_gpu = next(stage for stage in stages if stage.startswith("on-cpu AS on-cuda\n"))
    assert stages[-1].startswith("on-${TORCH}\n")
    (runtime,) = (version for name, (version, _) in locked("torch-cuda.txt").items() if name == "cuda-toolkit")
    major, minor, *_ = runtime.split(".")
    assert f"\nENV DDPM_DEVICE=cuda NVIDIA_REQUIRE_CUDA=cuda>={major}.{minor}\n" in of_gpu
    assert "DDPM_DEVICE" not in stages[-1]


def test_every_image_has_a_version() -> None:
    for name, service in services().items():
        default = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", service["image"])
        assert re.search(r":v?\d+\.\d+\.\d+", default) or name == "server", default
    base = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.M)
    assert base
    assert f"${{PYTHON_IMAGE:-{base[1]}}}" == services()["server"]["build"]["args"]["PYTHON_IMAGE"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base[1])


def test_only_localhost_is_published_by_default() -> None:
    for name, service in services().items():
        for port in service.get("ports", []):
            assert port.startswith(("127.0.0.1:", "${BIND:-127.0.0.1}:")), (name, port)
        assert "network_mode" not in service
    assert "ports" not in services()["server"]


def test_every_service_is_hardened_limited_watched_and_restarted() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert "healthcheck" in service or name == "server", name  # whose image brings one
        for dependency in service.get("depends_on", {}).values():
            assert dependency == {"condition": "service_healthy"}, name
    assert "environment" in services()["server"]
    assert not any("KEY" in key or "PASSWORD" in key for s in services().values() for key in s.get("environment", {}))


def test_the_times_fit_each_other() -> None:
    defaults = Settings.model_fields
    grace = int(services()["server"]["stop_grace_period"].removesuffix("s"))
    assert grace >= defaults["drain_s"].default + SHUTDOWN_GRACE_S + 2
    assert int(services()["balancer"]["stop_grace_period"].removesuffix("s")) >= grace
    for side in ("client", "server"):
        found = re.search(rf"timeout {side} +(\d+)s", HAPROXY)
        assert found
        assert int(found[1]) > defaults["max_timeout_s"].default, "the balancer would give up first"


def test_haproxy_and_prometheus_use_the_services_name_and_port() -> None:
    assert re.search(r"server-template replica \d+ server:8000 resolvers docker", HAPROXY)
    assert "http-check send meth GET uri /readyz" in HAPROXY
    scrape = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = [job["dns_sd_configs"][0] for job in scrape if job["job_name"] == "ddpm"]
    assert (found["names"], found["port"]) == (["server"], Settings.model_fields["port"].default)
    assert "server" in services()


def test_settings_of_the_compose_file_exist() -> None:
    known = {*Settings.model_fields, "api_keys_file"}
    for path in (BASE, *OVERRIDES):
        names = re.findall(r"^ +(DDPM_\w+):|\{(DDPM_\w+):", path.read_text(), re.M)
        for name in {part for pair in names for part in pair if part}:
            assert name.removeprefix("DDPM_").lower() in known, (path.name, name)


def test_operators_find_every_variable_in_the_manual() -> None:
    used = set(re.findall(r"\$\{(\w+):-", BASE.read_text()))
    manual = (ROOT / "docs" / "deploy" / "docker.md").read_text()
    internal = {"BUILD_NETWORK", "PIP_FIND_LINKS"}  # for builds without the internet
    assert {name for name in used - internal if f"`{name}`" not in manual and f"{name}=" not in manual} == set()


def test_the_dockerfile_needs_no_buildkit_and_ends_as_a_user() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    assert not re.search(r"--mount|--chmod|--link|<<|^# ?syntax", text, re.M)
    last = text.split("\nFROM ")[-1]
    assert re.search(r"^USER 10001:10001$", last, re.M)
    assert "HEALTHCHECK" in last
    assert 'CMD ["python", "-m", "app"]' in last
    assert "--require-hashes" in text


def locked(name: str) -> dict[str, tuple[str, str]]:
    """Package → its version and the rest of its block."""
    text = (DOCKER / name).read_text()
    blocks = re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)((?:.*\n +.*)*)", text, re.M)
    return {canonicalize_name(package): (version, rest) for package, version, rest in blocks}


@pytest.mark.parametrize("variant", ["cpu", "cuda"])
def test_the_lock_matches_the_project_and_every_line_has_a_hash(variant: str) -> None:
    common, torch = locked("requirements.txt"), locked(f"torch-{variant}.txt")
    assert not set(common) & set(torch)
    for package, (_, rest) in (common | torch).items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", rest), package
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for line in wanted:
        requirement = Requirement(line)
        version, _ = (common | torch)[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{line} is locked as {version}; run make lock"
    if variant == "cpu":
        assert torch["torch"][0].endswith("+cpu")
        assert not [name for name in common | torch if name.startswith(("nvidia", "triton"))]
    else:
        assert [name for name in torch if name.startswith("nvidia-")]


@pytest.mark.parametrize(
    ("tool", "command"),
    [
        ("promtool", ["check", "config", "docker/prometheus/prometheus.yml"]),
        ("amtool", ["check-config", "docker/alertmanager/alertmanager.yml"]),
        ("hadolint", ["docker/Dockerfile"]),
    ],
)
def test_the_tools_accept_their_files(tool: str, command: list[str]) -> None:
    found = shutil.which(tool)
    if found is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([found, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
