"""Lines of one turn of the event loop are written together; none is lost, late or out of order."""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import threading

import pytest

from app import logs
from app.logs import LineHandler, TextFormatter


class Written(io.StringIO):
    """A stream that knows its writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.fixture
def stream() -> Written:
    return Written()


@pytest.fixture
def log(stream: Written) -> logging.Logger:
    log = logging.Logger("test")
    log.addHandler(LineHandler(stream))
    return log


def test_lines_of_one_turn_are_one_write(log: logging.Logger, stream: Written) -> None:
    async def turns() -> None:
        for turn in range(2):
            log.info("%d a", turn)
            log.info("%d b", turn)
            assert len(stream.writes) == turn
            await asyncio.sleep(0)

    asyncio.run(turns())
    assert stream.writes == ["0 a\n0 b\n", "1 a\n1 b\n"]


def test_a_warning_is_written_at_once_after_what_waits(log: logging.Logger, stream: Written) -> None:
    async def turn() -> None:
        log.info("a")
        log.warning("b")
        assert stream.writes == ["a\nb\n"]

    asyncio.run(turn())


def test_other_threads_write_at_once(log: logging.Logger, stream: Written) -> None:
    async def turn() -> None:
        log.info("a")
        thread = threading.Thread(target=log.info, args=("b",))
        thread.start()
        thread.join()
        assert stream.writes == ["a\nb\n"]

    asyncio.run(turn())
    log.info("c")
    assert stream.writes[1:] == ["c\n"]


def test_what_waits_is_written_at_the_end(log: logging.Logger, stream: Written) -> None:
    loop = asyncio.new_event_loop()
    loop.call_soon(log.info, "a")
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    assert not stream.writes
    log.handlers[0].flush()  # as `logging.shutdown` does
    assert stream.writes == ["a\n"]


def test_a_loop_that_ends_keeps_no_other_from_writing(log: logging.Logger, stream: Written) -> None:
    async def turns(line: str) -> None:
        log.info(line)
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.call_soon(log.info, "a")
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    asyncio.run(turns("b"))
    asyncio.run(turns("c"))
    assert stream.writes == ["a\nb\n", "c\n"]


def test_a_broken_stream_breaks_no_loop(
    log: logging.Logger, stream: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    stream.close()
    stream.write = io.StringIO.write.__get__(stream)  # type: ignore[method-assign]

    async def turn() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: pytest.fail("the loop has seen it"))
        log.info("a")
        await asyncio.sleep(0)

    asyncio.run(turn())
    assert "--- Logging error ---" in capsys.readouterr().err


def test_no_sign_of_a_traceback_steers_the_terminal() -> None:
    try:
        raise ValueError("\x1b[2J\r\nof a client")
    except ValueError:
        record = logging.LogRecord("ddpm", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    text = TextFormatter().format(record)
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.splitlines()[0].endswith("ERROR failed")
    assert r"ValueError: \x1b[2J" in text.splitlines()


def test_a_server_without_standard_error_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr(sys, "stderr", None)
    try:
        logs.configure("info")
        logging.getLogger("ddpm").warning("into nothing")
    finally:
        (handler,) = root.handlers
        handler.stream.close()  # type: ignore[attr-defined]
        root.handlers[:] = before
        root.setLevel(level)
