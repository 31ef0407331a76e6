"""What log records tell of a handler's end: the one record of every connection that has ended, and the handler's mistakes."""

import logging
import sysconfig
import threading
from typing import Any, Protocol

from aioecho.runtime.logs import BoundedLog, ErrorInfo, format_address
from aioecho.serving.ends import OUTCOMES

__all__ = ["MistakeLog", "handlers_part", "is_recorded", "log_end", "logger"]

logger = logging.getLogger("aioecho.connection")
access_logger = logging.getLogger("aioecho.access")

# Ends that the access log leaves out, as HAProxy's `option dontlognull`: a balancer looks whether the server is there.
NOT_ACCESS = ("probe",)

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


class Counts(Protocol):
    """What is counted of a connection while it lives: times as the loop has them, None for what did not happen."""

    bytes_in: int
    bytes_out: int
    first_at: float | None
    tls_at: float | None
    endpoint: str


def is_recorded(access_log: bool) -> bool:
    """Return whether the end of a connection will be recorded, so that its bytes are to be counted."""
    return (access_log and access_logger.isEnabledFor(logging.INFO)) or logger.isEnabledFor(logging.DEBUG)


def log_end(
    access_log: bool,
    client_address: Any,
    reason: str,
    *,
    began: float = 0.0,
    ended: float = 0.0,
    counts: Counts | None = None,
    endpoint: str = "",
) -> None:
    """Make the one record of a connection that has ended, with the facts as fields of the record too.

    With `access_log` it is a line of the access log, at INFO; else text for people, at DEBUG. What was not counted is 0 or
    None.
    """
    is_access = access_log and reason not in NOT_ACCESS and access_logger.isEnabledFor(logging.INFO)
    if not is_access and not logger.isEnabledFor(logging.DEBUG):
        return
    first_at = counts.first_at if counts is not None and counts.bytes_in else None
    tls_at = counts.tls_at if counts is not None else None
    seconds = ended - began
    facts = {
        "client_address": client_address,
        "endpoint": endpoint if counts is None else counts.endpoint,
        "outcome": OUTCOMES[reason],
        "reason": reason,
        "seconds": seconds,
        "tls_seconds": None if tls_at is None else _within(tls_at - began, seconds),
        "first_byte_seconds": None if first_at is None else _within(first_at - began, seconds),
        "bytes_in": 0 if counts is None else counts.bytes_in,
        "bytes_out": 0 if counts is None else counts.bytes_out,
    }
    peer = format_address(client_address)
    if is_access:
        times = (_milliseconds(facts[name]) for name in ("tls_seconds", "first_byte_seconds", "seconds"))
        access_logger.info(
            "%s %s %d/%d/%d %d/%d %s %s",
            _as_word(peer if client_address else "unix"),
            _as_word(facts["endpoint"] or "-"),
            *times,
            facts["bytes_in"],
            facts["bytes_out"],
            facts["outcome"],
            reason,
            extra=facts,
        )
        return
    logger.debug(
        "connection from %(peer)s: %(outcome)s (%(reason)s) after %(seconds).3f s,"
        " %(bytes_in)d bytes in, %(bytes_out)d out",
        {**facts, "peer": peer},
        extra=facts,
    )


def _within(seconds: float, all_seconds: float) -> float:
    """Return a time that is no more than the whole: uvloop's clock stands still for a turn, and a thread's does not."""
    return min(max(seconds, 0.0), all_seconds)


def _milliseconds(seconds: float | None) -> int:
    """Return what a log of HAProxy's has of a time: -1 for what did not happen."""
    return -1 if seconds is None else round(seconds * 1000)


def _as_word(text: str) -> str:
    r"""Return a text without blanks and line ends, which are \x20 and \n then: a Unix client chooses its path itself."""
    if not text.isprintable():
        text = text.encode("unicode_escape").decode("ascii")
    return text.replace(" ", "\\x20")


def handlers_part(error: BaseException) -> ErrorInfo:
    """Return what logging takes as `exc_info`: the error with its traceback from the handler's own first frame on."""
    traceback = error.__traceback__
    while traceback is not None and f"{traceback.tb_frame.f_globals.get('__name__')}.".startswith(CALLERS):
        traceback = traceback.tb_next
    return (type(error), error, traceback or error.__traceback__)
