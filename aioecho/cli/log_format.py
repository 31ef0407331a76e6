"""How `serve` writes log records: as lines of text, with colors on a terminal, or as JSON objects in a line."""

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

from aioecho.runtime.logs import format_address

__all__ = ["JSONFormatter", "TextFormatter", "shows_colors"]

# ANSI's: bright ones are not legible on every background.
_COLORS = {"DEBUG": 36, "INFO": 32, "WARNING": 33, "ERROR": 31, "CRITICAL": 31}

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class TextFormatter(logging.Formatter):
    """A line of text: when, level, logger, its process if there are several, and the message."""

    def __init__(self, *, has_process: bool = False, has_colors: bool = False) -> None:
        super().__init__(f"%(asctime)s %(levelname)s %(name)s{'[%(process)d]' if has_process else ''}: %(message)s")
        self._has_colors = has_colors

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, with its level in color."""
        color = _COLORS.get(record.levelname) if self._has_colors else None
        if color is None:
            return super().formatMessage(record)
        plain = record.levelname
        record.levelname = f"\x1b[{color}m{plain}\x1b[0m"
        try:
            return super().formatMessage(record)
        finally:
            record.levelname = plain  # other handlers get the same record


class JSONFormatter(logging.Formatter):
    """A JSON object in a line: `time` (UTC, ISO 8601), `level`, `logger`, `process`, `message`, the record's own fields.

    An error is `exception`, with its traceback. `client_address` is text, as 127.0.0.1:52240.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        found: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        found.update((name, value) for name, value in vars(record).items() if name not in _STANDARD)
        if "client_address" in found:
            found["client_address"] = format_address(found["client_address"])
        if record.exc_info and record.exc_info[0] is not None:
            found["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            found["stack"] = self.formatStack(record.stack_info)
        return json.dumps(found, default=str)


def shows_colors(wanted: bool | None) -> bool:
    """Return whether to write colors to stderr: as is `wanted` or, if that is None, on a terminal that has them."""
    if wanted is not None:
        return wanted
    try:
        return os.isatty(sys.stderr.fileno()) and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    except (AttributeError, OSError, ValueError):  # there is no stderr, or an object of another kind
        return False
