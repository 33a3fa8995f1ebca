"""Some seconds of `python -m tests.stress`, part by part. What ends a process has tests of its own, in
test_fatal_errors.py; malformed requests and files in test_malformed_requests.py; slow readers in
test_slow_readers.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.app.conftest import CLASSES, GREY, write_checkpoint
from tests.app.processes import ROOT, ServerProcess, environment, wait_for
from tests.stress.client_disconnects import run_disconnects
from tests.stress.mixed_load import FAULTY, run_mixed_load


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "asyncio")  # it warns of every byte written to a server that hung up


@pytest.mark.slow
def test_mixed_load_gets_right_answers(grey_checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other.safetensors", GREY, CLASSES, seed=1)
    in_time = 0.5  # the machine may be a busy one
    findings = run_mixed_load([grey_checkpoint, other], seconds=5, overload_s=5, seed=0, in_time=in_time)
    assert not findings.wrong
    assert findings.numbers["unanswered"] == 0
    assert any("made again" in name and not made.startswith("0,") for name, made in findings.numbers.items())
    assert findings.outcomes["overload", "ok"]


@pytest.mark.slow
def test_clients_that_disconnect_leave_nothing_behind(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--max-batch-size", "16", "--read-timeout-s", "3"]
    with ServerProcess("tests.app.faulty_server", *argv) as server:
        findings = run_disconnects(server, 60)
    assert not findings.wrong
    assert findings.numbers["cancels"] > 10


@pytest.mark.slow
def test_a_stress_test_ended_by_sigterm_ends_its_server(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.stress", "mixed", "--results", "stress.json", "--report", "stress.md"]
    stress = subprocess.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)))

    def servers() -> list[int]:
        children = Path(f"/proc/{stress.pid}/task/{stress.pid}/children").read_text().split()
        return [int(child) for child in children if FAULTY in Path(f"/proc/{child}/cmdline").read_text()]

    try:
        wait_for(servers, "its server")
        (server,) = servers()
        time.sleep(1)  # the stress test knows it by then
        stress.terminate()
        assert stress.wait(30) == 143
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
    finally:
        stress.kill()
        stress.wait()
