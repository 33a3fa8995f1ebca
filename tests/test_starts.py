"""What a start does not wait for."""

import subprocess
import sys
from pathlib import Path

import pytest

LOADS = """
import sys
from app.main import create_app
from app.settings import Settings
create_app(Settings(checkpoint="mnist", device="cpu", threads=1))
assert "torch" in sys.modules
print(*sorted({"torch._dynamo", "sympy", "pandas", "matplotlib", "datasets", "opentelemetry.sdk"} & sys.modules.keys()))
"""


@pytest.mark.slow
def test_a_server_imports_nothing_that_it_does_not_need() -> None:
    """Torch's compiler takes longer to import than all the rest of a start; drawing on the meta device needs it.
    OpenTelemetry is for --otlp-endpoint."""
    ran = subprocess.run(
        [sys.executable, "-c", LOADS], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert ran.stdout.split() == []
