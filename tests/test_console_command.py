"""`ddpm-serve`, from a wheel in an environment of its own, beside a user's own `model.py` and `app/`."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import httpx
import pytest

from ddpm_serve.__main__ import COMMANDS, usage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a fresh environment in which the wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    if subprocess.run([*pip, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no pip in this environment")
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel)], check=True)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    # What the project depends on; a .pth file of its own, as of this editable install, is not read there.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "ddpm-serve"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A user's folder, with modules that are called as ours."""
    (tmp_path / "model.py").write_text("raise SystemExit('the wrong model')\n")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text("raise SystemExit('the wrong app')\n")
    return tmp_path


@pytest.mark.slow
def test_digits_and_page_are_served_from_a_wheel(installed: Path, elsewhere: Path) -> None:
    words = [str(installed), "serve", "--port", "0", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen(words, cwd=elsewhere, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        url = next(found[1] for line in process.stderr if (found := re.search(r"running on (http://[\d.]+:\d+)", line)))
        with httpx.Client(base_url=url, timeout=120) as client:
            until = time.monotonic() + 120
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < until
                time.sleep(0.1)
            answer = client.post("/generate", json={"class_label": 7, "n": 2, "steps": 2})
            assert answer.content.startswith(b"\x89PNG")
            assert "<html" in client.get("/", headers={"Accept": "text/html"}).text
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_other_commands_run_beside_a_users_modules(installed: Path, elsewhere: Path) -> None:
    ran = subprocess.run(
        [str(installed), "export", "--help"], cwd=elsewhere, capture_output=True, text=True, check=True
    )
    assert "diffusers" in ran.stdout


def test_a_misspelt_command_is_told_the_right_one(capsys: pytest.CaptureFixture[str]) -> None:
    ran = subprocess.run([sys.executable, "-m", "ddpm_serve", "sampel"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr == "ddpm-serve: there is no command 'sampel'; did you mean sample?\n"


def test_help_names_every_command() -> None:
    assert all(f"  {name} " in usage() for name in COMMANDS)
