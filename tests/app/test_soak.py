"""Some seconds of `python -m tests.soak`: every kind of client and of failure at once. What ends a process has tests of
its own, in test_breakdowns.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.soak.run import lay_siege


@pytest.mark.slow
def test_a_server_under_siege_answers_everyone_rightly(grey_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "asyncio")  # it warns of every byte written to a server that hung up
    findings = lay_siege(grey_checkpoint, seconds=5, overload_s=1, seed=0)
    assert not findings.wrong
    assert findings.numbers["unanswered"] == 0
    assert findings.numbers["answers made again in a quiet process"]
    assert findings.outcomes["overload", "ok"]
