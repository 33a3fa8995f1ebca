"""What a comparison of samples with real images says, and which way round."""

import torch

from training.comparison import compare
from training.statistics import Moments


def test_samples_of_one_mode_are_precise_and_recall_little() -> None:
    draw = torch.Generator().manual_seed(0)
    modes = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0], [30.0, 30.0]], dtype=torch.float64)
    real = modes.repeat(25, 1) + torch.rand(100, 2, generator=draw, dtype=torch.float64)
    one_mode = modes[:1] + 0.3 + 0.4 * torch.rand(100, 2, generator=draw, dtype=torch.float64)
    found = compare(real, Moments(2).add(real), one_mode, None)
    assert found["precision"] > 0.9
    assert found["recall"] < 0.3
