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
from aioecho.serving.base import BaseServer
from aioecho.serving.running import HandlerRun
from aioecho.streams.protocol import StreamProtocol
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter

__all__ = ["CLOSED", "HANDLE", "OPEN", "PREPARE", "TimedConnection"]

# The part of a full kernel's buffer that a kernel sends a peer that takes nothing: to probe its window. More is progress.
PROBES = 1 / 16

# The stages of a connection's life: its transport is made, what comes before handle() is waited for, and the methods run.
OPEN, PREPARE, HANDLE, CLOSED = range(4)


class TimedConnection(HandlerRun):
    """The part of a :class:`~aioecho.serving.connection.Connection` that knows the time."""

    __slots__ = (
        "_RequestHandlerClass",
        "_is_cut_off",
        "_linger",
        "_loop",
        "_protocol",
        "_server",
        "_sock",
        "_stage",
        "_stalled",
        "handler",
        "request",
        "since",
    )

    _RequestHandlerClass: Callable[..., Any]
    _is_cut_off: bool
    _linger: asyncio.TimerHandle | None
    _loop: asyncio.AbstractEventLoop
    _protocol: StreamProtocol
    _server: BaseServer
    _sock: socket.socket
    _stage: int
    _stalled: tuple[float, int, int] | None  # since when the peer reads nothing, and at which counts of bytes
    handler: Any
    request: tuple[StreamReader, StreamWriter] | None
    since: float

    def cut_off(self) -> None:
        """Cancel the handler; what is still unsent when it has ended is thrown away."""
        raise NotImplementedError

    @property
    def due(self) -> float:
        """When to visit it next, in the loop's time; 0 for soon."""
        return self._protocol.due

    def timeouts_changed(self) -> None:
        """Be visited in the next sweep, as other timeouts may hold now."""
        self._protocol.mark_due()

    def visit(self, now: float) -> float:
        """Do what the timeouts say is due, and rest until something may be due again; return when that is, or 0."""
        protocol = self._protocol
        if self.request is None:
            return 0  # a TLS handshake, and verify_request(), have timers of their own
        if protocol.is_lost:
            if protocol.cut_for is None or self._is_cut_off:
                protocol.due = inf
            elif self._stage == HANDLE:
                self.cut_off()  # it has had a round to find out: one that ignores drain() never does
            return 0
        timeouts = self._timeouts()
        due = min(self._watch_wait(now, timeouts), self._watch_unsent(now, timeouts.write))
        if protocol.is_tls and protocol.transport.is_closing():
            self._start_linger(protocol)  # its handler has closed it, and may wait until its peer has too
        elif due > now and self._stalled is None and protocol.cut_for is None:
            protocol.postpone(due)
        return due

    def _watch_wait(self, now: float, timeouts: Timeouts) -> float:
        """End the wait for the peer if that has taken too long; return until when it may last, or 0."""
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
            return 0
        if timeouts.max_age is not None and (kind == "idle" or timeouts.message is None):
            earliest = timeouts.max_age * (1 - timeouts.max_age_jitter)
            # The same for a connection each time that it is asked, at no memory.
            age = earliest + random.Random(id(self)).random() * (timeouts.max_age - earliest)
            if now >= self.since + age:
                reader.interrupt(ConnectionTimeout("max_age", timeouts.max_age))
                return 0
            until = min(until, self.since + age)
        return until

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

    def cut(self, reason: str) -> None:
        """Close at once, for a `reason` that stats count, and throw away what is unsent. The handler ends by itself."""
        if self.request is not None:
            self._protocol.cut(reason)

    def _timeouts(self) -> Timeouts:
        # Before there is a handler, in its setup() too, its class has the word.
        return self._server.timeouts_of(self.handler if self.handler is not None else self._RequestHandlerClass)

    def _watch_unsent(self, now: float, seconds: float | None) -> float:
        """Look whether the peer takes what waits to be sent, and raise or cut off if that is too long ago.

        Return until when it may take nothing, or 0.
        """
        protocol = self._protocol
        if seconds is None or not self._is_unsent(protocol):
            self._stalled = None
            return inf
        below = unacknowledged(self._sock)
        acked = tcp_info(self._sock, BYTES_ACKED)
        if acked is not None:
            # Not by what is left, of which there may be more and more although the peer takes some.
            if self._stalled is None:
                since, acked_then = protocol.paused_since or now, None
            else:
                since, acked_then, _ = self._stalled
            if acked_then is None or acked - acked_then > below * PROBES:
                # It took some, at the latest when the kernel last heard of it; later than that it can only be a probe.
                silent = (tcp_info(self._sock, LAST_ACK_RECV) or 0) / 1000 - TICK
                since, acked_then = min(now, max(since, now - silent)), acked
            self._stalled = (since, acked_then, 0)
        else:
            here = protocol.unsent()
            since, here_then, below_then = self._stalled or (protocol.paused_since or now, here, below)
            if here < here_then or below < below_then:
                since = now
            self._stalled = (since, here, below)
        if now < since + seconds:
            return since + seconds
        self._stalled = None
        if not protocol.interrupt_drains(ConnectionTimeout("write", seconds)):
            protocol.cut("write")
        return 0

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
