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

from aioecho.net.kernel import silence_of, stop_receiving, unread

__all__ = ["StreamDrain", "Unbroken"]

# The reads that end with a separator, or at a frame's end. Between two of these a peer that is silent has said all.
BETWEEN_RECORDS = {"readuntil", "frames"}

# Seconds for which something more may have come of a peer that only sends whenever all was read, before it is stopped: one that
# sends faster than its handler reads does not put the end off for longer, and on a busy machine nothing is lost of the others.
PATIENCE = 1.0

# The least that either loop takes from a full socket in one read, in bytes; asyncio's takes READ_BYTES of protocol.py.
LEAST_READ = 2**16

# In a reader's _scan: nothing was read since it was put there. A reader forgets its scan whenever it takes something from its
# buffer, so that a read costs no more for being noticed here.
UNREAD: Any = (None, 0, 1)


class _Reader(Protocol):
    _received: bytearray
    _skip: Any
    _holds: int
    _loop: asyncio.AbstractEventLoop
    _news: Any
    _scan: Any
    _transport: Any

    def _wakeup_waiter(self) -> None: ...


class StreamDrain:
    """Decides for one reader, from the beginning of a drain on, whether a read that waits gets the end of the stream.

    Args:
        sock: the connection's socket.
        linger: seconds of silence after which a peer is taken to have nothing more to say; None for ever.
        one_way: whether the peer only sends, and waits for no reply. Then the kernel refuses what it sends from the end on.
    """

    # It does not keep the reader, which refers to it: the two would wait for the garbage collector, in all connections at once.
    __slots__ = ("_linger", "_one_way", "_quiet_since", "_reads_left", "_sock", "_stops_at", "_timer")

    def __init__(self, sock: socket.socket, linger: float | None, *, one_way: bool) -> None:
        self._sock = sock
        self._linger = linger
        self._one_way = one_way
        # What is in the socket now has been read after so many reads at the most, or when the socket is empty. A peer that
        # never stops sending does not put the end off. What was read before the first time that it is asked does not count.
        self._reads_left = -(-unread(sock) // LEAST_READ) + 1
        self._stops_at: float | None = None  # when receiving is stopped, whatever has come by then
        self._timer: asyncio.TimerHandle | None = None
        self._quiet_since: float | None = None

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
        if self._one_way:
            now = reader._loop.time()
            if self._stops_at is None:
                self._stops_at = now + PATIENCE
            return stop_receiving(self._sock, now > self._stops_at)
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
