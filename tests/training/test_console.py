"""Streams that go away or lack a letter, with real pipes and terminals."""

import io
import os
import sys

import pytest

from training.console import lasting_output


def streams(monkeypatch: pytest.MonkeyPatch, file: int, encoding: str = "utf-8") -> io.TextIOWrapper:
    """Standard output and error on a file descriptor."""
    stream = io.TextIOWrapper(io.FileIO(file, "w", closefd=False), encoding, line_buffering=True)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_pipe_whose_reader_has_ended_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    stream = streams(monkeypatch, writer)
    with lasting_output():
        print("heard")
        os.close(reader)
        print("lost")
        print("lost", file=sys.stderr, flush=True)
    assert sys.stdout is stream
    stream.write("nobody is told, at the end of Python either\n")
    stream.close()
    os.close(writer)


def test_a_terminal_that_hung_up_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    stream = streams(monkeypatch, slave)
    with lasting_output():
        print("seen")
        assert b"seen" in os.read(master, 100)
        os.close(master)
        print("lost", flush=True)
    stream.close()
    os.close(slave)


def test_a_letter_that_the_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    stream = streams(monkeypatch, writer, "latin-1")
    with lasting_output():
        print("café, 猫, caf\udce9")
    assert os.read(reader, 100).decode("latin-1") == "café, \\u732b, caf\\udce9\n"
    stream.close()
    for file in (reader, writer):
        os.close(file)
