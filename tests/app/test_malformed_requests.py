"""Requests that nobody should send, against a real server: none of them is its fault, and none of them costs others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.processes import ServerProcess
from tests.soak.flood import flood
from tests.soak.spoiled import offer_spoiled, settings


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "asyncio")  # it warns of every byte written to a server that hung up


@pytest.mark.slow
def test_hostile_requests_get_no_5xx_and_leave_nothing_behind(grey_checkpoint: Path) -> None:
    with ServerProcess("app", "--checkpoint", str(grey_checkpoint), "--read-timeout-s", "3") as server:
        findings = flood(server, 300)
    assert not findings.wrong
    assert findings.outcomes["hostile", "200"]
    assert findings.outcomes["hostile", "400"] > 30
    assert findings.outcomes["canary", "ok"] > 2


@pytest.mark.slow
def test_files_that_are_nearly_checkpoints_are_refused_and_nothing_runs(grey_checkpoint: Path, tmp_path: Path) -> None:
    argv = ["--checkpoint", str(grey_checkpoint), "--max-batch-size", "8", *settings(tmp_path)]
    with ServerProcess("app", *argv) as server:
        findings = offer_spoiled(server, tmp_path, grey_checkpoint, 60)
    assert not findings.wrong
    assert findings.outcomes["pickle", "invalid_checkpoint"] == 6
    assert findings.numbers["different sentences of refusal"] > 8
