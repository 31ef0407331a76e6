"""Watching a socket for something to read, and trying again later where the system or Python lacks resources."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable

__all__ = ["OUT_OF_RESOURCES", "ReadWatch", "as_os_error"]

# Seconds until what failed for lack of resources is tried again. A client waits no longer after a descriptor was closed
# elsewhere in the process; a descriptor that the server itself closes is noticed at once.
RETRY_AFTER = 0.1

OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
"""What a call fails with for lack of descriptors or memory, which may come free again."""


def as_os_error(error: OSError | MemoryError) -> OSError:
    """Return a MemoryError as the system's ENOMEM; an OSError as it is."""
    return error if isinstance(error, OSError) else OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


class ReadWatch:
    """Calls `on_readable` whenever the loop finds `sock` readable, between start() and stop().

    All methods may be called in any state, and more than once.
    """

    __slots__ = ("_loop", "_on_readable", "_retry", "_sock", "is_on")

    def __init__(self, sock: socket.socket, on_readable: Callable[[], None]) -> None:
        self._sock = sock
        self._on_readable = on_readable
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self.is_on = False

    def start(self) -> None:
        """Watch from now on.

        Raises:
            OSError: epoll watches no more for this user, or there is no memory.
        """
        if not self.is_on:
            self._cancel_retry()
            try:
                # The number and not the object: uvloop keeps, and after close() warns of, a socket that it was given.
                self._loop.add_reader(self._sock.fileno(), self._on_readable)
            except MemoryError as error:
                raise as_os_error(error) from error
            self.is_on = True

    def stop(self) -> None:
        """Watch no more."""
        self._cancel_retry()
        if self.is_on:
            self.is_on = False
            self._loop.remove_reader(self._sock.fileno())

    def retry_later(self, retry: Callable[[], None], seconds: float = RETRY_AFTER) -> None:
        """Watch no more, for the socket stays readable and the loop would spin; call `retry` after so many seconds.

        It is not called if start() or stop() is called before.
        """
        self.stop()
        self._retry = self._loop.call_later(seconds, self._try_again, retry)

    def _try_again(self, retry: Callable[[], None]) -> None:
        self._retry = None
        retry()

    @property
    def is_to_retry(self) -> bool:
        """Whether retry_later() was called, and the time for it has not come."""
        return self._retry is not None

    def _cancel_retry(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
