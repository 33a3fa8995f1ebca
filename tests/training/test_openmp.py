"""Training's OpenMP threads wait asleep: see `training/__init__.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def python(code: str, **extra: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    where = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], env=kept | extra, cwd=where, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("extra", "policy"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "5"}, "None")],
)
def test_threads_wait_asleep_unless_you_say_otherwise(extra: dict[str, str], policy: str) -> None:
    said = python("import os, sys, training; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)", **extra)
    assert said.stdout.split() == [policy, "False"], "it has to be set before torch is loaded"


@pytest.mark.slow
def test_torchs_openmp_takes_it_up() -> None:
    said = python("import training, torch", OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert "GOMP_SPINCOUNT = '0'" in said
