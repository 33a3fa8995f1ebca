"""What a program prints, on terminals that go away and encodings that lack a letter."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


def exit_code(command: str, run: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Runs it and returns 0; 2 where it raises an error that is the user's to mend, and 130 at Ctrl-C, each with a
    sentence. `interrupted` says what becomes of the work."""
    try:
        run()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: {interrupted}", file=sys.stderr)
        return 130
    return 0


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within it nothing that is printed can end the program.

    A letter that the encoding lacks is escaped. Where a stream is gone (a terminal that hung up, a pipe whose reader
    has ended), what is printed to it is lost.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Lasting(before[0]), _Lasting(before[1])  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


class _Lasting:
    """A text stream whose `write` and `flush` always succeed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Leads the stream to nowhere, what it still holds included, or it would complain when Python ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
