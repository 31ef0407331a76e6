"""The log of `serve`: by a file that configures logging, or on stderr, which never keeps the program waiting.

A thread writes to stderr, and what it cannot write is bounded.

A terminal that was stopped with Ctrl-S, or a full pipe whose reader hangs, would otherwise stop the server at its next record.
"""

import contextlib
import dataclasses
import logging
import os
import select
import sys
import threading
import traceback
from queue import SimpleQueue

from aioecho.cli.console import Mistake
from aioecho.cli.log_format import JSONFormatter, TextFormatter, shows_colors
from aioecho.runtime.log_config import apply_log_config

__all__ = ["DEFAULT_QUEUE", "LogSettings", "configure_log", "flush_log"]

DEFAULT_QUEUE = 2**20
"""Bytes of records that wait to be written."""

_ALL = "aioecho"  # the logger that the others are below

_ATOMIC = 4096  # bytes that a pipe takes in one piece: lines of several workers are not mixed (PIPE_BUF of Linux)
_LAST_WORDS = 1.0  # seconds that the end of the program waits for the log


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What the command line says of the log. `queue` is in bytes; with 0 a record is written at once."""

    level: str | None
    """None: as `config` has it."""
    format: str
    queue: int
    colors: bool | None
    config: str | None
    has_access_log: bool
    has_process: bool


def configure_log(settings: LogSettings) -> None:
    """Send records where `settings.config` says, or to stderr, unless logging is configured already.

    Raises:
        Mistake: the file can't be used (caller).
    """
    if settings.config is not None:
        try:
            apply_log_config(settings.config)
        except OSError as error:
            raise Mistake(f"cannot read {settings.config}: {error.strerror or error}") from error
        except ValueError as error:
            raise Mistake(str(error)) from error
        if settings.level is not None:
            logging.getLogger(_ALL).setLevel(settings.level)
        return
    descriptor = None
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or an object of another kind
        descriptor = sys.stderr.fileno()
    handler = (
        logging.StreamHandler()
        if descriptor is None or not settings.queue
        else _QueuedHandler(descriptor, settings.queue)
    )
    handler.setFormatter(
        JSONFormatter()
        if settings.format == "json"
        else TextFormatter(has_process=settings.has_process, has_colors=shows_colors(settings.colors))
    )
    logging.basicConfig(level=settings.level, handlers=[handler])
    if settings.has_access_log:  # is asked for, at whatever level the rest is logged
        logging.getLogger("aioecho.access").setLevel(logging.INFO)


def flush_log() -> None:
    """Wait until stderr has what was logged, for a second at most."""
    for handler in logging.getLogger().handlers:
        handler.flush()


class _QueuedHandler(logging.Handler):
    """Queues records for a thread that writes them. Records that find no room are dropped and counted.

    A record tells how many were, in the place where they are missing.

    Logging's lock, `self.lock`, is held while records are queued, and never while they are written. To write no lock of
    Python's on stderr is held either: the interpreter would wait for that at its end.
    """

    lock: threading.RLock

    def __init__(self, descriptor: int, most: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._most = most
        self._queue: SimpleQueue[bytes | threading.Event] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_direct = self._is_stuck = False
        self._queued = self._written = 0  # bytes, in all: the thread alone counts what is written
        self._dropped = self._failed = self._told = (
            0  # records, in all: the thread alone counts what it failed to write
        )
        # A child has no such thread, and may end without Python's knowledge.
        os.register_at_fork(after_in_child=self._write_directly)

    def _write_directly(self) -> None:
        self._is_direct = True

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a record."""
        try:
            text = self.format(record)
        except Exception:
            text = f"--- Logging error ---\n{traceback.format_exc()}{record.name} in {record.pathname}:{record.lineno}"
        data = f"{text}\n".encode("utf-8", "backslashreplace")
        if self._thread is None and not self._is_direct:
            self._start()
        if self._is_direct:
            self._write(data)
        elif self._queued - self._written + len(data) > self._most:
            self._dropped += 1
        else:
            self._put(self._tell_dropped())
            self._put(data)

    def _put(self, data: bytes) -> None:
        if data:
            self._queued += len(data)
            self._queue.put(data)

    def _tell_dropped(self) -> bytes:
        """Return a record about what was dropped since the last such record, or nothing. The lock has to be held."""
        count = self._dropped + self._failed - self._told
        if not count:
            return b""
        self._told += count
        message = "%d log records were dropped: stderr could not be written"
        record = logging.LogRecord("aioecho.cli", logging.WARNING, __file__, 0, message, (count,), None)
        return f"{self.format(record)}\n".encode()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._write_all, name="aioecho log", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # Python is about to end, or the system has no threads
            self._is_direct = True

    def flush(self) -> None:
        """Wait until what was queued is written, for a second at most, and not again after that was in vain."""
        if self._thread is None or self._is_direct or self._is_stuck:
            return
        is_written = threading.Event()
        self._queue.put(is_written)
        self._is_stuck = not is_written.wait(_LAST_WORDS)

    # In the thread.

    def _write_all(self) -> None:
        while True:
            entry = self._queue.get()
            if isinstance(entry, threading.Event):
                entry.set()
                continue
            is_possible = self._write(entry)
            self._written += len(entry)
            if is_possible and self._queue.empty():
                with self.lock:
                    self._put(self._tell_dropped())  # no later record may come that would tell it

    def _write(self, data: bytes) -> bool:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._descriptor, view[:_ATOMIC]) :]
            except BlockingIOError:  # another program has made it so
                select.select([], [self._descriptor], [])
            except OSError:  # it is closed, or a disk is full: that can be told only when it is so no longer
                self._failed += 1
                return False
        return True
