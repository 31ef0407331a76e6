"""When a server's stream may end because the server stops: never in the middle of a message.

A message is in progress (a) if a part of the record that is being read has come, and (b) if something was read since the
handler's last write: a request that was not answered yet. A read that waits in the middle of one goes on, and the end of the
grace cancels its handler. Otherwise it gets the end of the stream, which the reader tells from the peer's by its `end`.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

__all__ = ["StreamDrain", "Unbroken"]

# The reads that end with a separator, or at a frame's end. Between two of these a peer that is silent has said all.
BETWEEN_RECORDS = {"readuntil", "frames"}

# Waits of a peer that only sends in which something more has come already, after which it is stopped: one that sends faster
# than its handler reads does not put the end off.
ATTEMPTS = 64


class _Reader(Protocol):
    _received: bytearray
    _skip: Any
    _holds: int
    _loop: asyncio.AbstractEventLoop
    _news: Any

    def _wakeup_waiter(self) -> None: ...


class StreamDrain:
    """Decides for one reader, from the beginning of a drain on, whether a read that waits gets the end of the stream.

    Args:
        reader: the reader.
        no_more_comes: returns whether all that the peer had sent when the drain began has been read.
        silence: returns the seconds for which the peer has sent nothing; None if that is not known.
        linger: seconds of silence after which a peer is taken to have nothing more to say; None for ever.
        is_in_record: returns whether a part of a TLS record has come, of which the reader does not know.
        stop_receiving: for a peer that only sends, and waits for no reply: has the kernel refuse what it sends from now on, if
            nothing waits to be read, or, called with True, at once; returns whether it has. None for another peer.
    """

    def __init__(
        self,
        reader: _Reader,
        no_more_comes: Callable[[], bool],
        silence: Callable[[], float | None],
        linger: float | None,
        is_in_record: Callable[[], bool],
        stop_receiving: Callable[[bool], bool] | None,
    ) -> None:
        self._reader = reader
        self._no_more_comes = no_more_comes
        self._silence = silence
        self._linger = linger
        self._is_in_record = is_in_record
        self._stop_receiving = stop_receiving
        self._attempts = 0  # to stop receiving
        self._timer: asyncio.TimerHandle | None = None
        self._quiet_since: float | None = None

    def may_end(self, kind: str, began: bool) -> bool:
        """Return whether a read that is about to wait gets the end of the stream; if not, have it ask again in time.

        `kind` is "read", "readexactly", "readuntil" or "frames"; `began` tells whether the read has handed out a part already.
        """
        reader = self._reader
        if self._timer is not None:
            if self._timer.when() > reader._loop.time():
                self._quiet_since = None  # it was woken by data
            self._timer.cancel()
            self._timer = None
        if began or reader._received or reader._skip is not None or reader._holds or not self._no_more_comes():
            return False
        if self._is_in_record() and not self._has_lingered(self._silence()):
            return False
        if self._stop_receiving is not None:
            self._attempts += 1
            return self._stop_receiving(self._attempts > ATTEMPTS)
        if not reader._news.unanswered:
            if kind != "read":
                return True
            silence = self._silence()
            if silence is None:
                return True
        elif kind in BETWEEN_RECORDS:
            silence = self._silence()
        else:
            return False
        return self._has_lingered(silence)

    def _has_lingered(self, silence: float | None) -> bool:
        if self._linger is None:
            return False
        loop = self._reader._loop
        if silence is None:
            if self._quiet_since is None:
                self._quiet_since = loop.time()
            silence = loop.time() - self._quiet_since
        left = self._linger - silence
        if left <= 0:
            return True
        self._timer = loop.call_later(left, self._reader._wakeup_waiter)
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
