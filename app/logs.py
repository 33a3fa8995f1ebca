"""Logs on standard error: for programs JSON, one object a line; for a person at a terminal text."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

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
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """The same for people: the time of day, the level where it is not info, the message, NAME=VALUE."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line, and an exception's traceback below it."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno == logging.INFO else record.levelname + " "
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        line = " ".join([f"{time} {level}{record.getMessage()}", *(f"{key}={value}" for key, value in extra.items())])
        line = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)  # none steers the terminal
        return line + "\n" + self.formatException(record.exc_info) if record.exc_info else line


def configure(level: str, format: str = "auto") -> None:
    """Sends the logs of this process, uvicorn's among them, to standard error: as "json", as "text", or as a person or
    a program wants them who reads it ("auto")."""
    handler = logging.StreamHandler(sys.stderr)
    text = format == "text" or (format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of what the client is told in its answer
