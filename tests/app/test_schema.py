"""/openapi.json against the server that it describes, by schemathesis (the extra `soak`)."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.app.processes import PATIENCE, ServerProcess

# 503 and 504 are told honestly, to who gives a time-out of 5e-324 s. Most limits are settings, or depend on each other.
CHECKS = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 204, 406, 422, 429, 503, 504]
"""


@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_every_answer_is_as_the_schema_says(server: ServerProcess, tmp_path: Path) -> None:
    """A few examples of everything; SCHEMA_EXAMPLES says how many, and then the edges of all fields are tried too."""
    (tmp_path / "schemathesis.toml").write_text(CHECKS)
    number = os.environ.get("SCHEMA_EXAMPLES", "")
    phases = "examples,coverage,fuzzing" if number else "examples,fuzzing"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", server.url + "/openapi.json"]
    options = ["--checks", "all", "--phases", phases, "--max-examples", number or "10", "--seed", "1", "--no-color"]
    ended = subprocess.run(
        [*command, *options, "--generation-database", "none"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=3600 if number else PATIENCE,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
