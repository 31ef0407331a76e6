"""What log records tell of a handler's end: the one record of every connection that has ended, and the handler's mistakes."""

import logging
import sysconfig
import threading
from typing import Any

from aioecho.runtime.logs import BoundedLog, ErrorInfo, format_address
from aioecho.serving.ends import OUTCOMES

__all__ = ["MistakeLog", "handlers_part", "log_end", "logger"]

logger = logging.getLogger("aioecho.connection")

# The modules that call handlers' methods. At the top of a traceback they tell nothing of a handler's mistake.
CALLERS = (
    "aioecho.serving.",
    "aioecho.datagrams.",
    "aioecho.blocking.",
    "aioecho.runtime.",
    "aioecho.compat.",
    "socketserver.",
)

# Where the standard library is: a mistake is told apart by the line that called it.
LIBRARY = tuple(f"{path}/" for name in ("stdlib", "platstdlib") if (path := sysconfig.get_path(name)) is not None)
PACKAGES = ("site-packages", "dist-packages")

# Kinds of mistakes that are known at a time.
MOST_KINDS = 256


class MistakeLog:
    """Logs handlers' mistakes at ERROR: of each kind, at most one record every second, which tells how many were left out.

    A kind is a type of exception and a line of code: the last line in the traceback that is neither the standard library's nor
    aioecho's. May be called in any thread.
    """

    def __init__(self, of: logging.Logger) -> None:
        self._logger = of
        self._kinds: dict[tuple[object, ...], BoundedLog] = {}
        self._lock = threading.Lock()

    def report(self, error: BaseException, message: str, *args: object, is_whole: bool = False) -> None:
        """Log ``message % args`` unless the last such record is too recent.

        With the handler's part of the traceback, or, if `is_whole`, with all of it.
        """
        kind = _kind_of(error)
        with self._lock:
            log = self._kinds.pop(kind, None)
            if log is None:
                log = BoundedLog(self._logger, logging.ERROR)
            self._kinds[kind] = log  # at the end: the first ones were met the longest ago
            if len(self._kinds) > MOST_KINDS:
                del self._kinds[next(iter(self._kinds))]
            is_due = log.count()
        if is_due:
            log.log(message, *args, exc_info=error if is_whole else handlers_part(error))


def _kind_of(error: BaseException) -> tuple[object, ...]:
    line: tuple[object, ...] = ()
    traceback = error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        file = code.co_filename
        is_librarys = file.startswith(LIBRARY) and not any(name in file for name in PACKAGES)
        is_own = f"{traceback.tb_frame.f_globals.get('__name__')}.".startswith("aioecho.")
        if not (is_librarys or is_own or file.startswith("<frozen")) or not line:
            line = file, traceback.tb_lineno
        traceback = traceback.tb_next
    # By its name: a class that is made anew each time is of one kind.
    return type(error).__module__, type(error).__qualname__, *line


def log_end(client_address: Any, reason: str, seconds: float = 0.0, bytes_in: int = 0, bytes_out: int = 0) -> None:
    """Log, at DEBUG, that a connection has ended, with the facts as fields of the record too. Bytes not counted are 0."""
    if not logger.isEnabledFor(logging.DEBUG):
        return
    facts = {
        "client_address": client_address,
        "outcome": OUTCOMES[reason],
        "reason": reason,
        "seconds": seconds,
        "bytes_in": bytes_in,
        "bytes_out": bytes_out,
    }
    logger.debug(
        "connection from %(peer)s: %(outcome)s (%(reason)s) after %(seconds).3f s,"
        " %(bytes_in)d bytes in, %(bytes_out)d out",
        {**facts, "peer": format_address(client_address)},
        extra=facts,
    )


def handlers_part(error: BaseException) -> ErrorInfo:
    """Return what logging takes as `exc_info`: the error with its traceback from the handler's own first frame on."""
    traceback = error.__traceback__
    while traceback is not None and f"{traceback.tb_frame.f_globals.get('__name__')}.".startswith(CALLERS):
        traceback = traceback.tb_next
    return (type(error), error, traceback or error.__traceback__)
