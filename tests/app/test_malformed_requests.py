"""Requests that nobody should send, against a real server: none of them is its fault, and none of them costs others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.processes import ServerProcess
from tests.stress.corrupt_checkpoints import fuzz_checkpoints, settings
from tests.stress.flood import run_malformed_requests


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "asyncio")  # it warns of every byte written to a server that hung up


@pytest.mark.slow
def test_malformed_requests_get_no_5xx_and_leave_nothing(grey_checkpoint: Path) -> None:
    with ServerProcess("app", "--checkpoint", str(grey_checkpoint), "--read-timeout-s", "3") as server:
        findings = run_malformed_requests(server, 300)
    assert not findings.wrong
    assert findings.outcomes["malformed", "200"]
    assert findings.outcomes["malformed", "400"] > 30
    assert findings.outcomes["canary", "ok"] > 2


@pytest.mark.slow
def test_corrupt_checkpoints_are_refused_and_run_no_code(grey_checkpoint: Path, tmp_path: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--max-batch-size", "8", *settings(tmp_path)]
    with ServerProcess("app", *argv) as server:
        findings = fuzz_checkpoints(server, tmp_path, grey_checkpoint, 60)
    assert not findings.wrong
    assert findings.outcomes["pickle", "invalid_checkpoint"] == 6
    assert findings.numbers["different sentences of refusal"] > 8
