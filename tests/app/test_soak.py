"""Some seconds of `python -m tests.soak`, part by part. What ends a process has tests of its own, in
test_breakdowns.py; hostile requests and files in test_hostile.py, slow readers in test_slow_readers.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.conftest import CLASSES, GREY, write_checkpoint
from tests.app.processes import ServerProcess
from tests.soak.run import lay_siege
from tests.soak.vanishing import let_vanish


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "asyncio")  # it warns of every byte written to a server that hung up


@pytest.mark.slow
def test_a_server_under_siege_answers_everyone_rightly(grey_checkpoint: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other.safetensors", GREY, CLASSES, seed=1)
    findings = lay_siege([grey_checkpoint, other], seconds=5, overload_s=5, seed=0)
    assert not findings.wrong
    assert findings.numbers["unanswered"] == 0
    assert any("made again" in name and not made.startswith("0,") for name, made in findings.numbers.items())
    assert findings.outcomes["overload", "ok"]


@pytest.mark.slow
def test_clients_that_vanish_at_any_moment_leave_nothing_behind(grey_checkpoint: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--max-batch-rows", "16", "--read-timeout-s", "3"]
    with ServerProcess("tests.app.faulty_server", *argv) as server:
        findings = let_vanish(server, 60)
    assert not findings.wrong
    assert findings.numbers["cancels"] > 10
