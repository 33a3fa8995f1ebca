"""Which class a prompt means: a class's name or number, or a sentence with one class word in it."""

from __future__ import annotations

import re
from functools import lru_cache

from app.errors import InvalidClassLabel
from app.request_params import class_index, folded

MAX_PROMPT = 4000  # characters
RANDOM = frozenset({"", "*", "random"})  # a mix of all classes, where no class is called so
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BARE_NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")  # of a class that there is, or of none: "-1" is no sentence about 1
WORD = re.compile(r"[^\W_]+")

Words = tuple[str, ...]


def class_of_prompt(prompt: str, names: tuple[str, ...]) -> int | None:
    """The class's index, or None for a random mix. Raises InvalidClassLabel where no class or several are named."""
    text = prompt.strip()
    if folded(text) in RANDOM and text not in names:
        return None
    if not names:
        raise InvalidClassLabel('this checkpoint has no classes: the prompt must be "random"', param="prompt")
    try:
        return class_index(text, names)
    except InvalidClassLabel as error:
        unknown = error.message
    found = [] if BARE_NUMBER.fullmatch(text) else sorted(classes_in(text, names))
    if len(found) > 1:
        several = " and ".join(names[i] for i in found[:5])
        raise InvalidClassLabel(
            f"the prompt names {several:.200}: an image is of one class, so send a request for each", param="prompt"
        )
    if not found:
        raise InvalidClassLabel(unknown, param="prompt")
    return found[0]


def classes_in(sentence: str, names: tuple[str, ...]) -> set[int]:
    """The classes that a sentence names, in any case, in the singular or with an s.

    "traffic light" is not also "light". A name with commas is a list of synonyms, and a digit has its English word.
    """
    words, known = tuple(WORD.findall(folded(sentence))), _by_words(names)
    covered = [False] * len(words)
    found: set[int] = set()
    for length in sorted({len(key) for key in known}, reverse=True):
        for i in range(len(words) - length + 1):
            part = words[i : i + length]
            classes = known.get(part) or known.get((*part[:-1], part[-1].removesuffix("s")))
            if classes and not all(covered[i : i + length]):
                covered[i : i + length] = [True] * length
                found |= classes
    return found


@lru_cache(16)
def _by_words(names: tuple[str, ...]) -> dict[Words, set[int]]:
    known: dict[Words, set[int]] = {}
    for i, name in enumerate(names):
        spellings = [name, *name.split(",")]
        if name in map(str, range(len(DIGITS))):
            spellings.append(DIGITS[int(name)])
        for spelling in spellings:
            if words := tuple(WORD.findall(folded(spelling))):
                known.setdefault(words, set()).add(i)
    return known
