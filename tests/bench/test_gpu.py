"""What the GPU's bench times, and that all of it runs, on a CPU."""

from __future__ import annotations

import re

import pytest
import torch

from tests.bench import gpu


def test_a_timed_turn_begins_where_its_candidate_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1,024 rows two steppers push each other out of the slots, and that is not what is to be timed."""
    called: list[str] = []
    monkeypatch.setattr(gpu, "seconds", lambda run, device, repeat: (called.append("timed"), run(), 0.05)[2])
    runs = {name: lambda name=name: called.append(name) for name in ("ddim", "ddpm")}
    gpu.medians(runs, torch.device("cpu"), 3)
    turns = [i for i, name in enumerate(called) if name == "timed"]
    assert len(turns) == 2 + 2 * 3
    assert all(called[i - 1] == called[i + 1] != "timed" for i in turns)


@pytest.mark.slow
def test_the_bench_prints_what_only_a_gpu_can_decide(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "gpu --device cpu --nets tiny --rows 1,4 --micro_batch_size 4 --rounds 1 --precision fp32"
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr(gpu, "TURN_S", 0.002)
    monkeypatch.setattr(gpu, "matrix_peak", lambda device, clock: 1e12)
    gpu.main()
    out = capsys.readouterr().out
    assert re.search(r"^padding: rows of a single image: \d+; most rows of a call: \d+, of the 4 ", out, re.M)
    assert re.search(r"^\| rows \| norm: PyTorch's, ms \| norm: channels last, ms \| ratio \|$", out, re.M)
    assert len(re.findall(r"^\| [14] \| \d+\.\d+ \| \d+\.\d+ \| \d+\.\d\d \|$", out, re.M)) == 2
    assert len(re.findall(r"^same bits, norm", out, re.M)) == 2
    assert "set CHANNELS_LAST_NORM, now False" in out
