"""Waiting until a datagram socket has room to send, in the event loop and in a thread."""

import asyncio
import select
import socket
from collections import deque
from typing import Any

__all__ = ["SendRoom", "connected_probe", "is_writable"]


class SendRoom:
    """Room in a socket's send buffer: lets the coroutines that wait for it try to send, one after the other."""

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
        self._loop = loop
        self._descriptor = descriptor
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        """Return when the descriptor is writable, and the coroutines that waited before have tried."""
        if not self._waiting:
            self._loop.add_writer(self._descriptor, self._on_writable)
        turn = self._loop.create_future()
        self._waiting.append(turn)
        try:
            await turn
        finally:
            self._forget(turn)

    def _on_writable(self) -> None:
        turn = self._waiting[0]
        self._forget(turn)
        if not turn.done():
            turn.set_result(None)

    def _forget(self, turn: "asyncio.Future[None]") -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
            if not self._waiting:
                self._loop.remove_writer(self._descriptor)

    def wake_all(self) -> None:
        """Let all waiting coroutines try now, before the descriptor is closed."""
        while self._waiting:
            self._on_writable()


def connected_probe(address: Any) -> socket.socket:
    """Return a socket that is writable when the queue of the Unix socket at `address` has room: no other socket tells it."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        probe.setblocking(False)
        probe.connect(address)
    except BaseException:
        probe.close()
        raise
    return probe


def is_writable(sock: socket.socket, seconds: float | None = 0) -> bool:
    """Return whether a socket is writable, or becomes so within so many seconds; None is for ever."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else seconds * 1000))
