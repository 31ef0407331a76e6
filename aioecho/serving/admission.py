"""Admission: what a server's limits say of a client that was accepted, before anything is done for it."""

import asyncio
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence, Sized
from math import inf
from typing import Any, Protocol

from aioecho.config import Limits
from aioecho.serving.ends import Reason
from aioecho.serving.networks import NetworkLists
from aioecho.streams.memory import MemoryBudget

__all__ = ["Admission", "host_of"]

# Seconds by which a client may be accepted early after another was late: event loops keep time to a millisecond or worse.
SLACK = 0.02

# The IPv6 addresses that are counted whole: see host_of().
WHOLE = ("fe80:", "64:ff9b::")


class _Connections(Sized, Iterable[Any], Protocol):
    pass


class Admission:
    """Applies the limits on accepting. `connections` are the live ones, a collection that changes; they have a
    `counted_address`.

    `memory` is what the connections' streams hold. `retry` is called when there may be room again for another reason than
    the end of a connection.

    `networks` are the lists of the networks that may connect; None is all. `is_paused` tells whether no client is accepted
    until resume(), and `is_closing` whether close() was called.

    After close() clients that were in the kernel's backlog, and for which there is no room, are queued here.
    """

    def __init__(self, limits: Limits, connections: _Connections, retry: Callable[[], None]) -> None:
        self.limits = limits
        self.memory = MemoryBudget(limits.max_memory)
        self.networks: NetworkLists | None = None
        self._connections = connections
        self._retry = retry
        self._hosts: Counter[str] = Counter()  # kept while max_per_host is set
        self._next = 0.0  # when accept_rate allows the next accept
        self._timer: asyncio.TimerHandle | None = None
        self.is_paused = self.is_closing = self._is_admitting = False
        self._wait_from, self._reject_from = _bounds_of(limits)
        self._queue: deque[tuple[socket.socket, Any, Callable[[socket.socket, Any], None]]] = deque()

    def apply(self, limits: Limits) -> None:
        """Set other `limits`, which hold now. They close no connection that is too many by them."""
        self.limits = limits
        self._wait_from, self._reject_from = _bounds_of(limits)
        self.memory.most = limits.max_memory
        self._hosts = Counter()
        if limits.max_per_host is not None:
            hosts = (host_of(connection.counted_address) for connection in self._connections)
            self._hosts.update(host for host in hosts if host is not None)
        self._next = 0.0
        self._retry()

    def pause(self) -> None:
        """Accept no client until resume()."""
        self.is_paused = True

    def resume(self) -> None:
        """Undo pause()."""
        self.is_paused = False
        self._retry()

    def close(self) -> None:
        """Accept all clients in the kernel's backlog from now on, at any rate: :meth:`enqueue` keeps the ones without room."""
        self.is_closing = True
        if self._timer is not None:
            self._timer.cancel()

    def has_room(self) -> bool:
        """Return whether to accept the next client now."""
        if self.is_closing:
            return True
        if self.is_paused or len(self._connections) >= self._wait_from:
            return False
        if self.limits.accept_rate is not None:
            loop = asyncio.get_running_loop()
            if loop.time() < self._next:
                if self._timer is None:
                    self._timer = loop.call_at(self._next, self._end_wait)
                return False
        return True

    def admit(self, client_address: Any) -> Reason | None:
        """Count a client that was accepted. Return the reason to disconnect it at once, or None to serve it."""
        limits = self.limits
        if limits.accept_rate is not None:
            now = asyncio.get_running_loop().time()
            self._next = max(self._next, now - SLACK) + 1 / limits.accept_rate
        if len(self._connections) >= self._reject_from:
            return "overflow"
        return None if limits.max_per_host is None and self.networks is None else self.admit_host(client_address)

    def admit_host(self, client_address: Any) -> Reason | None:
        """Count a client by its host alone, as :meth:`admit` does besides, if its network is allowed."""
        if self.networks is not None and not self.networks.allow(client_address):
            return "not allowed"
        most, host = self.limits.max_per_host, host_of(client_address)
        if most is not None and host is not None:
            if self._hosts[host] >= most:
                return "per host"
            self._hosts[host] += 1
        return None

    def release(self, client_address: Any) -> None:
        """Count the end of a connection that was admitted."""
        if self._hosts and (host := host_of(client_address)) is not None and host in self._hosts:
            self._hosts[host] -= 1
            if self._hosts[host] <= 0:
                del self._hosts[host]  # addresses are many

    # The queue, once nothing is accepted any more.

    def enqueue(self, sock: socket.socket, client_address: Any, serve: Callable[[socket.socket, Any], None]) -> bool:
        """After close(), keep a client for which there is no room, and return True. `serve` is called when there is."""
        if not self.is_closing or self._has_room_for(client_address):
            return False
        self._queue.append((sock, client_address, serve))
        return True

    @property
    def queued(self) -> Sequence[socket.socket]:
        """The sockets of the clients that are queued, in order."""
        return [sock for sock, _, _ in self._queue]

    def admit_queued(self) -> None:
        """Serve the clients that are queued, in order, as far as there is room."""
        if not self._queue or self._is_admitting:  # one ended at once: the loop below goes on
            return
        self._is_admitting = True
        try:
            passed_over: deque[Any] = deque()  # by max_per_host
            while self._queue and not self._must_wait():
                queued = self._queue.popleft()
                sock, client_address, serve = queued
                if self._has_room_for(client_address):
                    serve(sock, client_address)
                else:
                    passed_over.append(queued)
            self._queue.extendleft(reversed(passed_over))
        finally:
            self._is_admitting = False

    def take_queued(self) -> Sequence[tuple[socket.socket, Any]]:
        """Return the clients that are queued, with their addresses, and forget them."""
        queue, self._queue = self._queue, deque()
        return [(sock, client_address) for sock, client_address, _ in queue]

    def _has_room_for(self, client_address: Any) -> bool:
        if self._must_wait():
            return False
        most, host = self.limits.max_per_host, host_of(client_address)
        return most is None or host is None or self._hosts[host] < most

    def _must_wait(self) -> bool:
        return len(self._connections) >= self._wait_from

    def _end_wait(self) -> None:
        self._timer = None
        self._retry()


def _bounds_of(limits: Limits) -> tuple[float, float]:
    """Return the numbers of connections from which on new clients wait, and are disconnected."""
    most = inf if limits.max_connections is None else limits.max_connections
    return (most, inf) if limits.overflow == "wait" else (inf, most)


def host_of(client_address: Any) -> str | None:
    """Return what `max_per_host` counts a client by; None for a client of a Unix socket, which has no host.

    That is its IPv4 address, or the first 64 bits of its IPv6 address: the smallest network that a subscriber gets, with every
    address in it. Two kinds are counted whole. Link-local addresses all have the same network. And in the network
    64:ff9b::/96 every address is an IPv4 client's.
    """
    if not isinstance(client_address, tuple):
        return None
    host: str = client_address[0]
    if ":" not in host or host.startswith(WHOLE):
        return host
    try:
        return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex()
    except OSError:
        return host
