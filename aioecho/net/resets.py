"""Resets of connections that nothing reads: epoll tells of them alone, without being asked for anything else."""

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable
from weakref import WeakKeyDictionary, ref

from aioecho.net.kernel import is_broken

__all__ = ["ResetWatch", "reset_watch"]


class ResetWatch:
    """Calls back when a TCP connection is reset, or given up, while no loop watches its socket. Where there is no epoll, never.

    To watch it for reading would not do: what its peer has sent, and nothing reads, would call back again and again. All
    sockets have one epoll, which is open while there are any.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # else the loop would be kept by what is kept as long as the loop is: see reset_watch()
        self._epoll: select.epoll | None = None
        self._watched: dict[int, tuple[socket.socket, Callable[[], object]]] = {}

    def add(self, sock: socket.socket, callback: Callable[[], object]) -> Callable[[], None]:
        """Watch a socket; `callback` is called once, at most. Return what ends that; it may be called more than once.

        Does nothing if the system has no room for it.
        """
        fd, entry = sock.fileno(), (sock, callback)
        with contextlib.suppress(OSError, MemoryError, ValueError):  # no room, or the socket is closed
            if self._epoll is None:
                self._open()
            if self._epoll is not None:
                self._epoll.register(fd, 0)  # of errors and of the end of both directions it tells unasked
                self._watched[fd] = entry
        self._close_if_unused()

        def remove() -> None:
            if self._watched.get(fd) is entry:  # else the number has come to be another's
                self._remove(fd)
                self._close_if_unused()

        return remove

    def _open(self) -> None:
        loop = self._loop()
        if loop is not None and hasattr(select, "epoll"):
            self._epoll = select.epoll()
            loop.add_reader(self._epoll.fileno(), self._look)

    def _look(self) -> None:
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(0):
            found = self._watched.get(fd)
            self._remove(fd)  # else it would tell again and again
            if found is not None and is_broken(found[0]):
                found[1]()
        self._close_if_unused()

    def _remove(self, fd: int) -> None:
        self._watched.pop(fd, None)
        if self._epoll is not None:
            with contextlib.suppress(OSError, ValueError):  # it is closed
                self._epoll.unregister(fd)

    def _close_if_unused(self) -> None:
        if self._epoll is not None and not self._watched:
            epoll, self._epoll, loop = self._epoll, None, self._loop()
            if loop is not None and not loop.is_closed():
                loop.remove_reader(epoll.fileno())
            epoll.close()


_watches: "WeakKeyDictionary[asyncio.AbstractEventLoop, ResetWatch]" = WeakKeyDictionary()


def reset_watch() -> ResetWatch:
    """Return the running loop's."""
    loop = asyncio.get_running_loop()
    return _watches.get(loop) or _watches.setdefault(loop, ResetWatch(loop))
