"""Some seconds of `python -m tests.soak`, part by part. What ends a process has tests of its own, in
test_breakdowns.py; hostile requests and files in test_hostile.py, slow readers in test_slow_readers.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.app.conftest import CLASSES, GREY, write_checkpoint
from tests.app.processes import ROOT, ServerProcess, environment, wait_for
from tests.soak.run import FAULTY, lay_siege
from tests.soak.vanishing import let_vanish


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "asyncio")  # it warns of every byte written to a server that hung up


@pytest.mark.slow
def test_a_server_under_siege_answers_everyone_rightly(grey_checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other.safetensors", GREY, CLASSES, seed=1)
    in_time = 0.5  # the machine may be a busy one
    findings = lay_siege([grey_checkpoint, other], seconds=5, overload_s=5, seed=0, in_time=in_time)
    assert not findings.wrong
    assert findings.numbers["unanswered"] == 0
    assert any("made again" in name and not made.startswith("0,") for name, made in findings.numbers.items())
    assert findings.outcomes["overload", "ok"]


@pytest.mark.slow
def test_clients_that_vanish_at_any_moment_leave_nothing_behind(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--max-batch-size", "16", "--read-timeout-s", "3"]
    with ServerProcess("tests.app.faulty_server", *argv) as server:
        findings = let_vanish(server, 60)
    assert not findings.wrong
    assert findings.numbers["cancels"] > 10


@pytest.mark.slow
def test_a_siege_that_is_told_to_end_leaves_no_server_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.soak", "mixed", "--results", "soak.json", "--report", "soak.md"]
    siege = subprocess.Popen(command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)))

    def servers() -> list[int]:
        children = Path(f"/proc/{siege.pid}/task/{siege.pid}/children").read_text().split()
        return [int(child) for child in children if FAULTY in Path(f"/proc/{child}/cmdline").read_text()]

    try:
        wait_for(servers, "its server")
        (server,) = servers()
        time.sleep(1)  # the siege knows it by then
        siege.terminate()
        assert siege.wait(30) == 143
        with pytest.raises(ProcessLookupError):
            os.kill(server, 0)
    finally:
        siege.kill()
        siege.wait()
