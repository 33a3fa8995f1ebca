"""What was trained and what was skipped, as the log tells it."""

import pytest
import torch

from training.loop.distributed import DistributedContext
from training.loop.loss_meter import MAX_CONSECUTIVE_SKIPS, Count, LossMeter


def tally_of(*steps: float) -> LossMeter:
    """A tally of steps with these losses; nan is one that was skipped."""
    tally = LossMeter(torch.device("cpu"))
    for loss in steps:
        tally.add(torch.tensor(loss), torch.tensor(loss == loss))
    return tally


NAN = float("nan")


def test_the_loss_is_the_mean_of_counted_steps_since_clearing() -> None:
    tally = tally_of(1.0, NAN, 2.0, 6.0)
    assert tally.read(DistributedContext(), 4) == Count(3.0, 1)
    tally.clear()
    assert tally.read(DistributedContext(), 4) == Count(None, 1)
    tally.add(torch.tensor(5.0), torch.tensor(True))
    assert tally.read(DistributedContext(), 5) == Count(5.0, 1)


def test_only_skips_in_a_row_end_a_run() -> None:
    many = [NAN] * (MAX_CONSECUTIVE_SKIPS - 1)
    assert tally_of(*many, 1.0, *many).read(DistributedContext(), 9).skipped == 2 * len(many)
    with pytest.raises(FloatingPointError, match="at iteration 9"):
        tally_of(*many, NAN).read(DistributedContext(), 9)
