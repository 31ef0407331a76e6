"""The end of a connection that had a blocking handler: the loop reads on for a while, and closes the descriptor."""

import asyncio
import socket
from typing import Any

from aioecho.blocking.request import Threaded

__all__ = ["LingeringRequest"]

# More than a kernel keeps unread of one connection, in reads of 64 KiB.
MOST_READS = 256


class LingeringRequest(Threaded):
    """The part of a :class:`~aioecho.blocking.streams.ThreadedConnection` that closes it."""

    __slots__ = ("_has_shut_reading", "_is_over", "_left", "_linger")

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._has_shut_reading = self._is_over = False
        self._left: socket.socket | None = None  # what has come back, to be closed
        self._linger: asyncio.TimerHandle | None = None

    def _read_on(self) -> None:
        """Read and discard for a while what the peer still sends: a reset could destroy the reply on its way."""
        assert self._left is not None
        if self._is_cancelled or self.reason == "handshake":
            self._close()
            return
        try:
            self._left.setblocking(False)
            if self._has_shut_reading:
                # The kernel itself resets a connection on which more comes. What has come is taken: to close over it would
                # throw away the rest of the reply, as far as it waits in the kernel to be sent.
                for _ in range(MOST_READS):
                    if not self._left.recv(2**16):
                        break
                self._close()
                return
            self._discard()
            if self._left is not None and not self._is_over:
                self._loop.add_reader(self._left.fileno(), self._discard)
        except OSError:  # nothing has come, or it is reset, or epoll has no room
            self._close()
            return
        if self._left is not None and (seconds := self._server.timeouts.linger) is not None:
            self._linger = self._loop.call_later(seconds, self._close)

    def _discard(self) -> None:
        assert self._left is not None
        try:
            if self._left.recv(2**16):
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # reset
            pass
        self._close()

    def _close(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        left, self._left = self._left, None
        if left is not None:
            self.look_at_wire(left)
            self._loop.remove_reader(left.fileno())
            left.close()
        if self._has_returned:
            self._end()

    def _end(self) -> None:
        if not self._is_over:
            self._is_over = True
            self.look_at_wire(self.request)
            # The handler may live on, and its socket with it.
            self.request.owner = None
            self._server.unregister_connection(self)
