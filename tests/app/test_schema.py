"""/openapi.json against the server that it describes, by schemathesis (extra `stress`). `make stress` tries more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.app.processes import ServerProcess
from tests.stress.corrupt_checkpoints import settings
from tests.stress.schema import installed, run_schemathesis


@pytest.mark.skipif(not installed(), reason="schemathesis is not installed")
def test_every_answer_is_as_the_schema_says(grey_checkpoint: Path, tmp_path: Path) -> None:
    with ServerProcess("app", "--checkpoint", str(grey_checkpoint), *settings(tmp_path)) as server:
        ended = run_schemathesis(server.url, tmp_path, examples=10, edges=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
