"""/openapi.json against the server that it describes, by schemathesis (the extra `stress`)."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from tests.stress.corrupt_checkpoints import ADMIN
from tests.stress.resources import Findings

# 503 and 504 are told honestly, to who gives a time-out of 5e-324 s. Most limits are settings, or depend on each other.
# No schema tells which models there are (404, 410), nor that the default cannot be removed (409), nor which class a
# prompt names (400).
CHECKS = """
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503, 504]
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 400, 403, 404, 406, 409, 410, 422, 429, 503, 504]
"""
AT_MOST_S = 3600


def installed() -> bool:
    """Whether schemathesis is."""
    return importlib.util.find_spec("schemathesis") is not None


def run_schemathesis(url: str, folder: Path, examples: int, edges: bool) -> subprocess.CompletedProcess[str]:
    """All of its checks with so many examples of every operation, by an administrator of the server with
    `corrupt_checkpoints.settings`; with `edges` those of all fields are tried, too."""
    (folder / "schemathesis.toml").write_text(CHECKS)
    phases = "examples,coverage,fuzzing" if edges else "examples,fuzzing"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", url + "/openapi.json"]
    options = ["--checks", "all", "--phases", phases, "--max-examples", str(examples), "--seed", "1", "--no-color"]
    options += ["--header", f"Authorization: Bearer {ADMIN}", "--generation-database", "none"]
    return subprocess.run(
        [*command, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=AT_MOST_S,
    )


def fuzz(url: str, folder: Path, examples: int) -> Findings:
    """The long form: edges, too."""
    findings = Findings()
    if not installed():
        findings.wrong.append("schemathesis is not installed (the extra `stress`)")
        return findings
    ended = run_schemathesis(url, folder, examples, edges=True)
    summary = ended.stdout.rpartition("SUMMARY")[2]
    for name, pattern in (("operations tested", r"Tested: (.+)"), ("test cases", r"Test cases:\s+(.+)")):
        if found := re.search(pattern, summary):
            findings.numbers[name] = found[1]
    if ended.returncode:
        said = [line for line in (ended.stdout + ended.stderr).splitlines() if line.strip()]
        findings.wrong += [f"exit code {ended.returncode}", *said[-60:]]
    return findings
