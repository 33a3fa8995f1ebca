"""What the GPU's bench times, and that all of it runs, on a CPU."""

from __future__ import annotations

import pytest
import torch

from tests.bench import gpu


def test_a_timed_turn_begins_where_its_contender_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1,024 rows two steppers push each other out of the slots, and that is not what is to be timed."""
    called: list[str] = []
    monkeypatch.setattr(gpu, "seconds", lambda run, device, repeat: (called.append("timed"), run(), 0.05)[2])
    runs = {name: lambda name=name: called.append(name) for name in ("ddim", "ddpm")}
    gpu.medians(runs, torch.device("cpu"), 3)
    turns = [i for i, name in enumerate(called) if name == "timed"]
    assert len(turns) == 2 + 2 * 3
    assert all(called[i - 1] == called[i + 1] != "timed" for i in turns)
