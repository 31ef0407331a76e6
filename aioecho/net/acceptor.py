"""Accepting connections from one listening socket, and what happens when that is impossible."""

import asyncio
import errno
import functools
import logging
import os
import select
import socket
from collections.abc import Callable
from typing import Any

from aioecho.net.bound import BoundSocket
from aioecho.net.kernel import accept_queue
from aioecho.net.turns import PAUSE, AcceptTurns
from aioecho.net.watch import OUT_OF_RESOURCES, ReadWatch, as_os_error
from aioecho.runtime.addresses import is_dual_stack, unmapped
from aioecho.runtime.logs import BoundedLog

__all__ = ["Acceptor"]

logger = logging.getLogger("aioecho.listener")

# More in one turn of the loop would make live connections wait; a burst of clients is accepted over several turns.
ACCEPTS_PER_TURN = 64


class _AcceptedSocket(socket.socket):
    """A socket as socket.accept() makes it, without the search of three enumerations for every connection."""

    __slots__ = ()

    type = socket.SOCK_STREAM

    @classmethod
    def factory(cls, listening: socket.socket) -> Callable[[int], socket.socket]:
        """Return what makes such a socket of a descriptor that `listening` has accepted."""
        family, proto = listening.family, listening.proto
        if not proto and family in (socket.AF_INET, socket.AF_INET6):
            proto = socket.IPPROTO_TCP  # asyncio switches Nagle's algorithm off by this, and uvloop always
        kind = type(cls.__name__, (cls,), {"__slots__": (), "family": family})
        return functools.partial(kind, family, socket.SOCK_STREAM, proto)

    def setsockopt(self, *args: Any) -> None:
        """Set an option. Ignore that Nagle's algorithm can't be switched off: systems say so when the peer is gone.

        The error would leave a transport of asyncio's half made, and in the way of later ones with the same descriptor.
        """
        try:
            super().setsockopt(*args)
        except OSError:
            if args[:2] != (socket.IPPROTO_TCP, socket.TCP_NODELAY):
                raise


class Acceptor:
    """Accepts on one listening socket: calls `on_accept(sock, address)` for each connection while `has_room()` is true, and
    `on_error(error)` where accepting failed. `turns` are for a socket from which other processes accept too.

    Does not know what a connection is. All methods may be called in any state, and more than once.
    """

    def __init__(
        self,
        bound: BoundSocket,
        *,
        on_accept: Callable[[socket.socket, Any], None],
        has_room: Callable[[], bool],
        on_error: Callable[[OSError], None],
        turns: AcceptTurns | None = None,
    ) -> None:
        self.bound = bound
        self.sock = bound.sock
        self._accept_one: Callable[[], tuple[int, Any]] = self.sock._accept  # type: ignore[attr-defined]
        self._on_accept = on_accept
        self._has_room = has_room
        self._on_error = on_error
        self._turns = turns
        self._steps_back = False
        self._pauses = 0  # that a client has waited through, one after the other
        self._watch = ReadWatch(bound.sock, self._on_readable)
        self._loop = asyncio.get_running_loop()
        self._make_socket = _AcceptedSocket.factory(bound.sock)
        self._is_dual_stack = is_dual_stack(bound.sock)
        poll = select.poll()
        poll.register(bound.sock, select.POLLIN)
        self._poll = poll.poll  # with 0: tells whether a client waits
        # Where other processes accept too, what the kernel tells soon is no longer so.
        self._knows_queue = turns is None and accept_queue(bound.sock) is not None
        self._is_closed = False
        self._log = BoundedLog(logger, logging.WARNING)

    def resume(self) -> None:
        """Accept from now on, as long as there is room."""
        if not self._is_closed and not self._watch.is_on and not self._steps_back and self._has_room():
            if self._turns is not None:
                self._turns.note()
            try:
                self._watch.start()
            except OSError as error:
                self._retry_later(error)

    def pause(self) -> None:
        """Leave new clients in the kernel's backlog until resume()."""
        self._watch.stop()
        self._steps_back = False
        if self._turns is not None:
            self._turns.leave()

    def close(self, *, backlog: int, keep_backlog: bool = False) -> None:
        """Accept the clients in the kernel's backlog, at most `backlog` and one, and close the socket.

        Closing it would reset them, and they think they are connected. With `keep_backlog` do not accept them: other
        processes accept from the same socket.
        """
        if self._is_closed:
            return
        if not self._loop.is_closed():
            self.pause()
            if not keep_backlog:
                self.bound.refuse_clients()
                self._accept(backlog + 1)
                self.pause()
        self._is_closed = True
        self.bound.close()

    def _on_readable(self) -> None:
        most, turns = ACCEPTS_PER_TURN, self._turns
        if turns is not None and (most := min(most, turns.allowance())) <= 0:
            self._step_back(turns)
            return
        self._pauses = 0
        self._accept(most)
        if turns is not None and self._watch.is_on:
            turns.note()

    def _step_back(self, turns: AcceptTurns) -> None:
        """Leave a client to the processes that hold fewer connections, for a moment."""
        self._steps_back = True
        behind = turns.find_behind()

        def look_again() -> None:
            has_moved = turns.has_moved(behind)
            self._pauses = self._pauses + 1 if self._poll(0) else 0
            if self._pauses == 1 and not has_moved:  # it may have come just now, and be about to be accepted
                self._watch.retry_later(look_again, PAUSE)
                return
            # The ones behind have not accepted it. If they do accept, it is more than they can, or on other sockets.
            if self._pauses > 1:
                self._pauses = 0
                if self._accept(1) and not has_moved:
                    turns.disregard(behind)
            self._steps_back = False
            if not self._watch.is_to_retry:  # it had no descriptor for that one
                self.resume()

        self._watch.retry_later(look_again, PAUSE)

    def _accept(self, most: int) -> bool:
        """Accept at most so many connections; return whether there were as many."""
        accept, has_room, on_accept, make_socket = self._accept_one, self._has_room, self._on_accept, self._make_socket
        waiting = 1
        for _ in range(most):
            if not waiting and not (waiting := self._count_waiting()):  # an accept() in vain takes ten times as long
                return False
            waiting -= 1
            if not has_room():
                self.pause()
                return False
            fd = -1
            try:
                fd, address = accept()
                sock = make_socket(fd)
            except (BlockingIOError, InterruptedError):
                return False
            except (OSError, MemoryError) as caught:
                if fd >= 0:  # it could not be made a socket
                    os.close(fd)
                error = as_os_error(caught)
                # EINVAL: the socket was shut down, perhaps by another process that has it too.
                if error.errno in OUT_OF_RESOURCES or error.errno == errno.EINVAL:
                    self._retry_later(error)
                    self._on_error(error)
                    return False
                # By accept(2) the errors of a connection that was lost while it was queued come out here, and the
                # next one may be sound: ECONNABORTED, EPROTO, EPERM from a firewall, ENETDOWN and its kind.
                self._on_error(error)
                self._log.report("a connection on %s was lost before it was accepted: %s", self.bound.name, error)
                continue
            on_accept(sock, unmapped(address) if self._is_dual_stack else address)
        return True

    def _count_waiting(self) -> int:
        """Return how many clients wait, or 1 for any number where that is not known; 0 if none does."""
        if not self._poll(0):
            return 0
        queue = accept_queue(self.sock) if self._knows_queue else None
        return 1 if queue is None else max(queue[0], 1)

    def _retry_later(self, error: OSError) -> None:
        self._watch.retry_later(self.resume)
        if self._turns is not None:
            self._turns.leave()
        self._log.report("cannot accept on %s for now: %s", self.bound.name, error)
