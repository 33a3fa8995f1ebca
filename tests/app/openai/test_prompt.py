"""Which class a prompt means."""

from __future__ import annotations

import time

import pytest

from app.errors import InvalidClassLabel
from app.openai.prompt import MAX_PROMPT, class_of_prompt

ANIMALS = ("cat", "dog", "horse", "traffic light", "light", "tench, Tinca tinca", "Käfer → 虫", "glas", "glass")
DIGITS = tuple("0123456789")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("horse", "horse"),
        ("  HORSE\n", "horse"),
        ("2", "horse"),
        ("a photo of a horse", "horse"),
        ("Three Horses, at night.", "horse"),
        ("a traffic light", "traffic light"),
        ("the traffic_light is red", "traffic light"),
        ("light", "light"),
        ("a tench", "tench, Tinca tinca"),
        ("tinca tinca in a pond", "tench, Tinca tinca"),
        ("ein kleiner Ka\u0308fer 虫", "Käfer → 虫"),
        ("two glass", "glass"),
        ("a cat, a cat and more cats", "cat"),
    ],
)
def test_a_class_or_one_class_word_is_understood(prompt: str, name: str) -> None:
    assert ANIMALS[class_of_prompt(prompt, ANIMALS) or 0] == name


@pytest.mark.parametrize(
    ("prompt", "digit"), [("7", 7), ("a handwritten seven", 7), ("Sevens!", 7), ("draw a 7", 7), ("zero", 0)]
)
def test_digits_have_their_english_words(prompt: str, digit: int) -> None:
    assert class_of_prompt(prompt, DIGITS) == digit


@pytest.mark.parametrize("prompt", ["-1", "+1", "3.5", "10"])
def test_a_number_of_no_class_is_not_taken_apart(prompt: str) -> None:
    with pytest.raises(InvalidClassLabel, match="no class"):
        class_of_prompt(prompt, DIGITS)


@pytest.mark.parametrize("prompt", ["", " ", "*", "random", "RANDOM"])
def test_random_is_a_mix(prompt: str) -> None:
    assert class_of_prompt(prompt, DIGITS) is None
    assert class_of_prompt(prompt, ()) is None


def test_a_class_called_random_is_that_class() -> None:
    assert class_of_prompt("random", ("a", "random")) == 1


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a photo of a unicorn", "there are cat, dog, horse"),
        ("horze", "did you mean 'horse'?"),
        ("9", "no class '9'"),
        ("2 dogs and a cat", "the prompt names cat and dog: an image is of one class"),
        ("cat light", "cat and light"),
        ("concatenate hotdogs", "no class"),
    ],
)
def test_no_class_or_two_are_refused_with_a_sentence(prompt: str, said: str) -> None:
    with pytest.raises(InvalidClassLabel) as refused:
        class_of_prompt(prompt, ANIMALS)
    assert said in refused.value.message
    assert refused.value.param == "prompt"


def test_a_checkpoint_without_classes_takes_random_alone() -> None:
    with pytest.raises(InvalidClassLabel, match='the prompt must be "random"'):
        class_of_prompt("horse", ())


def test_the_longest_prompt_takes_no_time() -> None:
    names = tuple(" ".join(f"w{i}" for i in range(n)) for n in range(1, 40))
    began = time.process_time()
    with pytest.raises(InvalidClassLabel):
        class_of_prompt("w0 x " * (MAX_PROMPT // 5) + "w0 w1", names)
    assert time.process_time() - began < 0.5
