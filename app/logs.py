"""Logs on standard error: for programs JSON, one object a line; for a person at a terminal text."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import TextIO

_encode = json.JSONEncoder(default=str).encode
_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """Time, level, logger, message, and whatever was passed as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The record, with its extra fields, as one line of JSON."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line)


class TextFormatter(logging.Formatter):
    """The same for people: the time of day, the level where it is not info, the message, NAME=VALUE."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and an exception's traceback below it."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else record.levelname + " "
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        line = " ".join([f"{time} {level}{record.getMessage()}", *(f"{key}={value}" for key, value in extra.items())])
        traceback = self.formatException(record.exc_info).splitlines() if record.exc_info else []
        return "\n".join(map(_printable, [line, *traceback]))


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes the lines of one turn of an event loop together: a write gives up Python's lock, which the engine takes.

    A warning is written at once, with what waits before it, and so is what comes from other threads.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []
        self._writer: asyncio.AbstractEventLoop | None = None  # which will write them, unless it ends before

    def emit(self, record: logging.LogRecord) -> None:
        """Takes a line, and writes it unless the loop will."""
        try:
            self._lines.append(self.format(record) + self.terminator)
            loop = asyncio._get_running_loop()
            if loop is None or record.levelno >= logging.WARNING:
                self.flush()
            elif self._writer is not loop:
                self._writer = loop
                loop.call_soon(self._write, record)
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Writes what waits."""
        with self.lock:  # type: ignore[union-attr]
            lines, self._lines, self._writer = self._lines, [], None
            if lines:
                self.stream.write("".join(lines))
        super().flush()

    def _write(self, record: logging.LogRecord) -> None:
        try:
            self.flush()
        except Exception:
            self.handleError(record)


def _printable(line: str) -> str:
    """None of its signs steers the terminal."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


def configure(level: str, format: str = "auto") -> None:
    """Sends the logs of this process, uvicorn's among them, to standard error: as "json", as "text", or as a person or
    a program wants them who reads it ("auto")."""
    stream = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - none where it was closed: `2>&-`
    handler = LineHandler(stream)
    text = format == "text" or (format == "auto" and stream.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of what the client is told in its answer
