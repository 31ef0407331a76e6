"""When a server's stream may end because the server stops: never in the middle of a message.

A message is in progress (a) if a part of the record that is being read has come, and (b) if something was read since the
handler's last write: a request that was not answered yet. A read that waits in the middle of one goes on, and the end of the
grace cancels its handler. Otherwise it gets the end of the stream, which the reader tells from the peer's by its `end`.
"""

import asyncio
import socket
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from aioecho.net.kernel import HELD, has_unread, silence_of, stop_receiving, unread

__all__ = ["OneWayDrain", "StreamDrain", "Unbroken"]

# The reads that end with a separator, or at a frame's end. Between two of these a peer that is silent has said all.
BETWEEN_RECORDS = {"readuntil", "frames"}

# Seconds in which a peer that only sends may have sent more whenever its handler has read all, until it is stopped: one that
# sends as fast as it can does not put the end off for longer.
PATIENCE = 1.0

# Reads in a row that a peer that only sends may fill, before it is taken to send as fast as it can.
MOST_READS = 16

# Seconds for which a handler has not waited for its peer, until the peer is stopped though the handler is at work. One that
# keeps up waits in time, between two records: to stop its peer before may cut a record in two.
AT_WORK = 0.5

# Seconds between two looks whether a peer that only sends can be stopped while its handler is at work.
LOOK_AGAIN = 0.05

# Seconds since something came that count as none: the kernel's clock has steps of 4 ms mostly.
AT_ONCE = 0.005

# The least that either loop takes from a full socket in one read, in bytes; asyncio's takes READ_BYTES of protocol.py.
LEAST_READ = 2**16

# In a reader's _scan: nothing was read since it was put there. A reader forgets its scan whenever it takes something from its
# buffer, so that a read costs no more for being noticed here.
UNREAD: Any = (None, 0, 1)


class _Reader(Protocol):
    _awaited: Any
    _eof: bool
    _exception: BaseException | None
    _gathered: int
    _paused: bool
    _received: bytearray
    _skip: Any
    _holds: int
    _loop: asyncio.AbstractEventLoop
    _news: Any
    _scan: Any
    _transport: Any

    def _wakeup_waiter(self) -> None: ...
    def break_off(self, exc: BaseException) -> None:
        """Raise `exc` once all is read."""


class StreamDrain:
    """Decides for one reader, from the beginning of a drain on, whether a read that waits gets the end of the stream.

    Args:
        sock: the connection's socket.
        linger: seconds of silence after which a peer is taken to have nothing more to say; None for ever.
    """

    # It does not keep the reader, which refers to it: the two would wait for the garbage collector, in all connections at once.
    __slots__ = ("_linger", "_quiet_since", "_reads_left", "_sock", "_timer")

    # Whether the kernel refuses what the peer sends. Then the end that the loop meets in the stream is the server's.
    has_stopped_peer = False

    def __init__(self, sock: socket.socket, linger: float | None) -> None:
        self._sock = sock
        self._linger = linger
        # What is in the socket now has been read after so many reads at the most, or when the socket is empty. A peer that
        # never stops sending does not put the end off. What was read before the first time that it is asked does not count.
        self._reads_left = -(-unread(sock) // LEAST_READ) + 1
        self._timer: asyncio.TimerHandle | None = None
        self._quiet_since: float | None = None

    def begin(self, reader: _Reader) -> None:
        """Do what is done while no read waits: nothing."""

    def may_end(self, reader: _Reader, kind: str, began: bool) -> bool:
        """Return whether a read that is about to wait gets the end of the stream; if not, have it ask again in time.

        `kind` is "read", "readexactly", "readuntil" or "frames"; `began` tells whether the read has handed out a part already.
        """
        self.stop()
        if began or reader._received or reader._skip is not None or reader._holds:
            return False
        if getattr(reader._transport, "is_delivering", False):
            # TLS has read more than it has handed over yet. That may be no whole record, and then brings no news.
            reader._loop.call_soon(reader._wakeup_waiter)
            return False
        if not self._has_read_all(reader):
            return False
        if getattr(reader._transport, "is_in_record", False) and not self._has_lingered(reader, silence_of(self._sock)):
            return False  # a part of a TLS record has come, of which the reader does not know
        return self._may_end_between(reader, kind)

    def _may_end_between(self, reader: _Reader, kind: str) -> bool:
        """As may_end(), where no part of a record has come."""
        if not reader._news.unanswered:
            if kind != "read":
                return True
            silence = silence_of(self._sock)
            if silence is None:
                return True
        elif kind in BETWEEN_RECORDS:
            silence = silence_of(self._sock)
        else:
            return False
        return self._has_lingered(reader, silence)

    def _has_read_all(self, reader: _Reader) -> bool:
        """Tell whether all that the peer had sent when the drain began has been read. Asked when the buffer is empty.

        It may be asked again although nothing was read: a wait also ends for a cancellation, a timeout, a block of hold().
        """
        if reader._scan is not UNREAD:
            reader._scan = UNREAD
            self._reads_left -= 1
            self._quiet_since = None
        return self._reads_left <= 0 or unread(self._sock) == 0

    def _has_lingered(self, reader: _Reader, silence: float | None) -> bool:
        if self._linger is None:
            return False
        loop = reader._loop
        if unread(self._sock):
            silence = 0.0  # something has come, and the loop was held up, or does not read at the moment
            self._quiet_since = None
        elif silence is None:
            if self._quiet_since is None:
                self._quiet_since = loop.time()
            silence = loop.time() - self._quiet_since
        left = self._linger - silence
        if left <= 0:
            return True
        self._timer = loop.call_later(left, reader._wakeup_waiter)
        return False

    def stop(self) -> None:
        """Ask no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class OneWayDrain(StreamDrain):
    """Decides it for a peer that only sends, and waits for no reply. It was sent FIN, and read on for `linger`.

    From the end on the kernel refuses what it sends. While the handler works at what has come, the kernel does so as soon as it
    has been at work for AT_WORK, and all of that is in the reader's buffer: else a handler that is slower than its peer would
    never come to the end.
    """

    __slots__ = ("_stops_at", "has_stopped_peer")

    has_stopped_peer: bool

    def __init__(self, sock: socket.socket, linger: float | None) -> None:
        super().__init__(sock, linger)
        self._stops_at: float | None = None  # when the peer is stopped, though there is more
        self.has_stopped_peer = False

    def begin(self, reader: _Reader) -> None:
        """Look whether the peer can be stopped while the handler works, once that has not waited for a while."""
        self._timer = reader._loop.call_later(AT_WORK, self._look, reader)

    def _look(self, reader: _Reader) -> None:
        if reader._eof or reader._exception is not None:  # which is not to be replaced by what a closed socket tells
            return
        is_waiting = bool(reader._awaited)  # then it is asked
        if not (is_waiting or reader._gathered or reader._skip is not None or reader._holds) and self._read_rest(
            reader
        ):
            self._stop_peer()
        else:
            self._timer = reader._loop.call_later(LOOK_AGAIN, self._look, reader)

    def may_end(self, reader: _Reader, kind: str, began: bool) -> bool:
        """As in StreamDrain."""
        may_end = super().may_end(reader, kind, began)
        if not may_end and not self.has_stopped_peer and self._timer is None:
            self.begin(reader)
        return may_end

    def _may_end_between(self, reader: _Reader, kind: str) -> bool:
        now = reader._loop.time()
        if self._stops_at is None:
            self._stops_at = now + PATIENCE
        if not self.has_stopped_peer:
            has_all = self._read_rest(reader)
            # What was read just now may end in the middle of a record: then it is asked again when that is read.
            if now > self._stops_at or (has_all and not reader._received):
                self._stop_peer()
            elif not has_all:
                self._timer = reader._loop.call_later(HELD, reader._wakeup_waiter)
        if reader._received or reader._exception is not None:
            # Of what was read just now, or the error met, the read that is about to wait hears in no other way: the transport
            # may be paused by now.
            reader._loop.call_soon(reader._wakeup_waiter)
            return False
        return self.has_stopped_peer and unread(self._sock) == 0

    def _may_hold_back(self) -> bool:
        """Tell whether the peer may have written what its system has not sent yet.

        It holds small writes back until what was sent before is acknowledged (Nagle's algorithm), which may be HELD seconds
        later. They come all together then, and it has nothing else to say at that moment.
        """
        silence = silence_of(self._sock)
        return silence is not None and AT_ONCE < silence < HELD

    def _stop_peer(self) -> None:
        stop_receiving(self._sock)
        self.has_stopped_peer = True

    def _read_rest(self, reader: _Reader) -> bool:
        """Read what waits in the socket, and return whether that was all.

        It is not left to the loop, as more would come until then. Nor is it left in the socket: it is acknowledged when it is
        read, and what the peer holds back until then would be refused.
        """
        deliver = getattr(reader._transport, "data_received", reader._news.data_received)  # of TLS, where there is that
        for _ in range(MOST_READS):
            if reader._paused:
                return False
            try:
                chunk = self._sock.recv(LEAST_READ, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if has_unread(self._sock):  # it has waited for the interpreter's lock since
                    continue
                return not getattr(reader._transport, "is_in_record", False) and not self._may_hold_back()
            except OSError as error:
                reader.break_off(error)  # the kernel tells it once
                return False
            if not chunk:
                return False  # the peer has ended the stream, as the loop is about to tell
            deliver(chunk)
        return False


class Unbroken:
    """``async with handler.unbroken():`` see StreamRequestHandler.unbroken."""

    def __init__(self, hold: Callable[[int], None]) -> None:
        self._hold = hold

    async def __aenter__(self) -> None:
        self._hold(1)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hold(-1)
