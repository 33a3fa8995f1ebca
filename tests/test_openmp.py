"""How OpenMP's threads wait for one another: see `training/__init__.py` and `app/__init__.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SAID = f"import os, sys; print([os.environ.get(name) for name in {NAMES}], 'torch' in sys.modules)"


def python(code: str, **extra: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    where = Path(__file__).parents[1]
    return subprocess.run([sys.executable, "-c", code], env=kept | extra, cwd=where, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("package", "ours"), [("training", {"OMP_WAIT_POLICY": "PASSIVE"}), ("app", {"GOMP_SPINCOUNT": "20000"})]
)
@pytest.mark.parametrize("yours", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "5"}, {"KMP_BLOCKTIME": "9"}])
def test_threads_wait_as_a_package_says_unless_you_say_otherwise(
    package: str, ours: dict[str, str], yours: dict[str, str]
) -> None:
    said = python(f"import {package}; {SAID}", **yours).stdout.strip()
    assert said == f"{[(yours or ours).get(name) for name in NAMES]} False", "it has to be set before torch is loaded"


@pytest.mark.slow
@pytest.mark.parametrize(("package", "spins"), [("training", "0"), ("app", "20000")])
def test_torchs_openmp_takes_it_up(package: str, spins: str) -> None:
    said = python(f"import {package}, torch", OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("this torch has another OpenMP than GNU's")
    assert f"GOMP_SPINCOUNT = '{spins}'" in said
