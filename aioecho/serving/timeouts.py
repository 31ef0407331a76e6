"""A connection's timeouts: what it does when the timeout sweeper visits it, and how long it lingers at its end."""

import asyncio
import random
import socket
from collections.abc import Callable
from math import inf
from typing import Any

from aioecho.config import Timeouts
from aioecho.exceptions import ConnectionTimeout
from aioecho.net.kernel import BYTES_ACKED, LAST_ACK_RECV, LAST_DATA_RECV, TICK, tcp_info, unacknowledged, unread
from aioecho.net.room import is_writable
from aioecho.serving.base import BaseServer
from aioecho.serving.ends import Reason
from aioecho.serving.running import HandlerRun
from aioecho.serving.sweeper import SHORTEST, SWEEPS_PER_TIMEOUT
from aioecho.streams.protocol import StreamProtocol
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter

__all__ = ["CLOSED", "FINISH", "HANDLE", "OPEN", "PREPARE", "TimedConnection"]

# Seconds until the next look at a handler that reads on in a message, of a connection that is too old.
LOOK_AGAIN = 1.0

# The stages of a connection's life: its transport is made; what comes before handle() is waited for; handle() runs; finish()
# runs, and what was written is sent; or all of that is done, and only its peer is still to close.
OPEN, PREPARE, HANDLE, FINISH, CLOSED = range(5)


class TimedConnection(HandlerRun):
    """The part of a :class:`~aioecho.serving.connection.Connection` that knows the time."""

    __slots__ = (
        "_RequestHandlerClass",
        "_handling",
        "_is_cancelled",
        "_linger",
        "_loop",
        "_protocol",
        "_server",
        "_sock",
        "_stage",
        "_stalled",
        "handler",
        "place",
        "request",
        "since",
    )

    _RequestHandlerClass: Callable[..., Any]
    # Since when the handler runs, if Timeouts.handler has told to note it; then the timeout that has cancelled it. One slot.
    _handling: float | Reason | None
    _is_cancelled: bool
    _linger: asyncio.TimerHandle | None
    _loop: asyncio.AbstractEventLoop
    _protocol: StreamProtocol
    _server: BaseServer
    _sock: socket.socket
    _stage: int
    _stalled: tuple[float, int, int] | None  # since when the peer takes nothing, and at which counts of bytes
    handler: Any
    place: Any  # the timeout sweeper's
    request: tuple[StreamReader, StreamWriter] | None
    since: float

    def cancel_handler(self) -> None:
        """Cancel what runs, the handler mostly."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Cancel the handler; what is still unsent when it has ended is thrown away."""
        raise NotImplementedError

    def note_wait(self) -> None:
        """Let the timeouts of the handler, or of its class, begin to count."""
        server, handler = self._server, self.handler
        timeouts = server.timeouts_of(self._RequestHandlerClass if handler is None else handler)
        if timeouts.handler is not None and self._handling is None:
            self._handling = self._loop.time()
        server.timeout_sweeper.watch(self, timeouts)

    def mark_due(self) -> None:
        """Be visited in the next sweep."""
        self._server.timeout_sweeper.mark_due(self)

    def visit(self, now: float) -> float:
        """Do what the timeouts say is due; return when something may be due again."""
        protocol = self._protocol
        if protocol.is_lost:
            if protocol.aborted_for is not None and not self._is_cancelled:
                if self._stage < HANDLE:
                    return now
                self.cancel()  # it has had a round to find out: one that ignores drain() never does
            return inf
        timeouts = self._timeouts()
        due = min(self._watch_wait(now, timeouts), self._watch_unsent(now, timeouts.write))
        if timeouts.max_age is not None:
            due = min(due, self._watch_age(now, timeouts, timeouts.max_age))
        if timeouts.handler is not None:
            due = min(due, self._watch_handler(now, timeouts.handler))
        if protocol.is_tls and protocol.transport.is_closing():
            self._start_linger(protocol)  # its handler has closed it, and may wait until its peer has too
        if due <= now or protocol.collected is not None:  # is about to be written
            return now
        protocol.postpone(due)
        return due

    def _watch_wait(self, now: float, timeouts: Timeouts) -> float:
        """End the wait for the peer if that has taken too long; return until when it may last."""
        reader = self._protocol.reader
        wait = reader.waits(now)
        if wait is None:
            return inf
        kind, since = wait
        seconds: float | None = getattr(timeouts, kind)
        until = inf if seconds is None else since + seconds
        if seconds is not None and now >= until:
            if not self._is_about_to_read():
                reader.interrupt(ConnectionTimeout(kind, seconds))
            return now
        return until

    def _watch_age(self, now: float, timeouts: Timeouts, seconds: float) -> float:
        """End a connection that is too old: where its handler waits between messages or drains, or reads or drains next.

        Cancel the handler if it does none of these for `linger` seconds more. Return when to look again.
        """
        if self._stage > HANDLE:
            return inf
        earliest = seconds * (1 - timeouts.max_age_jitter)
        # The same for a connection each time that it is asked, at no memory.
        end = self.since + earliest + random.Random(id(self)).random() * (seconds - earliest)
        if now < end:
            return end
        protocol = self._protocol
        reader = protocol.reader
        wait = reader.waits(now)
        error = ConnectionTimeout("max_age", seconds)
        if wait is not None and (wait[0] == "idle" or timeouts.message is None):
            reader.interrupt(error)
            return now
        if protocol.interrupt_drains(error):
            return now
        told_at = reader.overdue_since
        if told_at is None:
            told_at = now
            reader.interrupt_next(error, now)
        linger = timeouts.linger
        if wait is not None or linger is None:  # a message has its own time
            return now + (linger or LOOK_AGAIN)
        if now < told_at + linger:
            return told_at + linger
        self._cancel_for("max_age")
        return inf

    def _watch_handler(self, now: float, seconds: float) -> float:
        """Cancel the handler if it has run for too long; return when that is."""
        if self._stage > HANDLE or isinstance(self._handling, str):
            return inf
        until = (self.since if self._handling is None else self._handling) + seconds
        if now < until:
            return until
        self._cancel_for("handler")
        return inf

    def why_cancelled(self) -> Reason:
        """Return the timeout that has cancelled the handler, or else "cancelled"."""
        return self._handling if isinstance(self._handling, str) else "cancelled"

    def _cancel_for(self, reason: Reason) -> None:
        if not isinstance(self._handling, str):
            self._handling = reason
            self.cancel_handler()

    def _is_about_to_read(self) -> bool:
        """Tell whether more has come, and only waits for the loop, which something has held up, to read it."""
        return self._protocol.is_socket_read() and unread(self._sock) > 0

    def idle_since(self, now: float) -> float | None:
        """Return since when, about, it has waited for the first byte of something; None if it does not."""
        wait = self._protocol.reader.waits(now) if self.request is not None else None
        if wait is None or wait[0] != "idle":
            return None
        # The visits that the reader goes by are a second apart; the kernel knows when a TCP peer's last data came.
        milliseconds = tcp_info(self._sock, LAST_DATA_RECV)
        return wait[1] if milliseconds is None else now - milliseconds / 1000

    def abort_for(self, reason: str) -> None:
        """Close at once, for a `reason` that stats count, and throw away what is unsent. The handler ends by itself."""
        if self.request is not None:
            self._protocol.abort_for(reason)

    def _timeouts(self) -> Timeouts:
        # Before there is a handler, in its setup() too, its class has the word.
        return self._server.timeouts_of(self.handler if self.handler is not None else self._RequestHandlerClass)

    def _watch_unsent(self, now: float, seconds: float | None) -> float:
        """Look whether the peer takes what waits to be sent, and raise or cut off if that is too long ago.

        Return when to look again.
        """
        protocol = self._protocol
        if seconds is None or not self._is_unsent(protocol):
            self._stalled = None
            return inf
        acked = tcp_info(self._sock, BYTES_ACKED)
        counts = (protocol.unsent(), unacknowledged(self._sock)) if acked is None else (acked, 0)
        if self._stalled is None:
            since, has_taken = protocol.paused_since or now, acked is not None
        else:
            since, *before = self._stalled
            # What is left may be more and more although the peer takes some: what it has acknowledged tells. Of another
            # socket than TCP's that is not known. If nothing is taken there, what is in the socket stays the same.
            has_taken = counts != tuple(before)
        if has_taken:
            # At the latest when the kernel last heard of it: the probes of a window that is closed are acknowledged too, but
            # the peer brings nothing new.
            silent = 0.0 if acked is None else (tcp_info(self._sock, LAST_ACK_RECV) or 0) / 1000 - TICK
            since = min(now, max(since, now - silent))
        if now >= since + seconds and protocol.unsent() > 0 and self._has_room():
            since = now  # the loop has not come to write: it was held up, or the process stopped
        self._stalled = (since, *counts)
        if now < since + seconds:
            return min(since + seconds, now + max(SHORTEST, seconds / SWEEPS_PER_TIMEOUT))
        self._stalled = None
        if not protocol.interrupt_drains(ConnectionTimeout("write", seconds)):
            protocol.abort_for("write")
        return now

    def _has_room(self) -> bool:
        """Tell whether the kernel would take more of what waits to be sent."""
        return self._sock.fileno() >= 0 and is_writable(self._sock)

    # At its end.

    def _is_unsent(self, protocol: StreamProtocol) -> bool:
        """Tell whether data waits that the kernel has not taken, or, with TLS, that the peer's has not."""
        return protocol.unsent() > 0 or (protocol.is_tls and unacknowledged(self._sock) > 0)

    def _start_linger(self, protocol: StreamProtocol) -> None:
        seconds = self._timeouts().linger
        if seconds is not None and self._linger is None:
            self._linger = self._loop.call_later(seconds, self._end_linger, protocol)

    def _end_linger(self, protocol: StreamProtocol) -> None:
        self._linger = None
        if protocol.is_lost:
            return
        if self._is_unsent(protocol):
            self._start_linger(protocol)  # counts from the time that everything is sent
        else:
            protocol.transport.abort()
