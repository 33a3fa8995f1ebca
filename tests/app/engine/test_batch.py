from __future__ import annotations

import numpy as np
import pytest

from app.engine.batch import Batch
from model.sampling.schedule import COEFFICIENTS, THRESHOLDING


def batch(*rows: dict[str, float]) -> Batch:
    """Of rows that are neutral but for these coefficients."""
    coefficients = np.array([[({"g": 1.0} | row).get(name, 0.0) for name in COEFFICIENTS] for row in rows])
    n = len(rows)
    return Batch(np.zeros(n), None, coefficients, np.zeros((n, 4), np.int64))


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_a_coefficient_is_used_where_one_row_has_it(name: str) -> None:
    used = [other for other in COEFFICIENTS if batch({}, {name: -2.0}, {}).uses(other)]
    assert used == [name]
    assert [other for other in COEFFICIENTS if batch({}, {name: 3.0}).uses(other)] == [name]
    assert not any(batch({}, {}).uses(other) for other in COEFFICIENTS)


def test_guidance_of_0_is_guidance() -> None:
    assert batch({"g": 0.0}, {}).uses("g")


def test_limits_are_told() -> None:
    none, clamp, dynamic = ({"limit": float(THRESHOLDING.index(name))} for name in ("none", "clamp", "dynamic"))
    assert [batch(*rows).all_clamped for rows in ((clamp, clamp), (clamp, none), (clamp, dynamic), (none,))] == [
        True,
        False,
        False,
        False,
    ]
    assert [batch(*rows).has_dynamic for rows in ((clamp, none), (none, dynamic, clamp), (dynamic,))] == [
        False,
        True,
        True,
    ]
