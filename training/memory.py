"""Too little memory, said in a sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHRASES = ("out of memory", "not enough memory", "can't allocate memory", "alloc_failed", "alloc failed")
ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMG]iB)")


@contextmanager
def memory_for(what: str, advice: str) -> Iterator[None]:
    """Within it a lack of memory is a ValueError: there is not enough for `what`, and the `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"there is not enough memory for {what}{_asked(error)}: {advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device or host had no room: torch says so in several ways, by device and library."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in PHRASES)


def _asked(error: BaseException) -> str:
    """How much was asked for at last, where the error tells."""
    found = ASKED.search(str(error))
    if found is None:
        return ""
    return f" (it asked for {found[2] or f'{int(found[1]) / 2**30:.1f} GiB'} more)"
