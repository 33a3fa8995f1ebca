"""Words of a command line, and what was probably meant by the wrong ones."""

import pytest

from training.cli.options import boolean, closest_match


@pytest.mark.parametrize("word", ["no", "False", "f", "N", "0"])
def test_the_words_for_no(word: str) -> None:
    assert boolean(word) is False


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("learning-rate", "learning_rate"),
        ("lr", "learning_rate"),
        ("sched", "schedule"),  # the only one that begins so
        ("norm", None),  # two begin so
        ("image_width", "image_size"),  # not near, but nothing is nearer
    ],
)
def test_the_nearest_option(word: str, meant: str | None) -> None:
    valid = ("learning_rate", "schedule", "image_size", "norm_groups_of_all", "norm_eps_of_everything")
    assert closest_match(word, valid) == meant
