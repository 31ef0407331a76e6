"""Admission: what a server's limits say of a client that was accepted, before anything is done for it."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sized
from typing import Any, Protocol

from aioecho.config import Limits
from aioecho.streams.memory import MemoryBudget

__all__ = ["Admission", "host_of"]

# Seconds by which a client may be accepted early after another was late: event loops keep time to a millisecond or worse.
SLACK = 0.02


class _Connections(Sized, Iterable[Any], Protocol):
    pass


class Admission:
    """Applies the limits on accepting. `connections` are the live ones, a collection that changes; they have `client_address`.

    `memory` is what the connections' streams hold. `retry` is called when there may be room again for another reason than
    the end of a connection.
    """

    def __init__(self, limits: Limits, connections: _Connections, retry: Callable[[], None]) -> None:
        self.limits = limits
        self.memory = MemoryBudget(limits.max_memory)
        self._connections = connections
        self._retry = retry
        self._hosts: Counter[str] = Counter()  # kept while max_per_host is set
        self._next = 0.0  # when accept_rate allows the next accept
        self._timer: asyncio.TimerHandle | None = None
        self._is_paused = self._is_closing = False

    def apply(self, limits: Limits) -> None:
        """Set other `limits`, which hold now. They close no connection that is too many by them."""
        self.limits = limits
        self.memory.most = limits.max_memory
        self._hosts = Counter()
        if limits.max_per_host is not None:
            hosts = (host_of(connection.client_address) for connection in self._connections)
            self._hosts.update(host for host in hosts if host is not None)
        self._next = 0.0
        self._retry()

    @property
    def is_paused(self) -> bool:
        """Whether no client is accepted until resume()."""
        return self._is_paused

    def pause(self) -> None:
        """Accept no client until resume()."""
        self._is_paused = True

    def resume(self) -> None:
        """Undo pause()."""
        self._is_paused = False
        self._retry()

    @property
    def is_closing(self) -> bool:
        """Whether close() was called."""
        return self._is_closing

    def close(self) -> None:
        """Apply max_connections alone from now on, to the clients in the kernel's backlog, and set no timer any more."""
        self._is_closing = True
        if self._timer is not None:
            self._timer.cancel()

    def has_room(self) -> bool:
        """Return whether to accept the next client now."""
        limits = self.limits
        if limits.max_connections is not None and limits.overflow == "wait" and self._is_full():
            return False
        if self._is_closing:
            return True
        if self._is_paused:
            return False
        if limits.accept_rate is not None:
            loop = asyncio.get_running_loop()
            if loop.time() < self._next:
                if self._timer is None:
                    self._timer = loop.call_at(self._next, self._end_wait)
                return False
        return True

    def admit(self, client_address: Any) -> str | None:
        """Count a client that was accepted. Return the reason to disconnect it at once, or None to serve it."""
        limits = self.limits
        if limits.accept_rate is not None:
            now = asyncio.get_running_loop().time()
            self._next = max(self._next, now - SLACK) + 1 / limits.accept_rate
        if limits.max_connections is not None and limits.overflow == "reject" and self._is_full():
            return "overflow"
        return None if limits.max_per_host is None else self.admit_host(client_address)

    def admit_host(self, client_address: Any) -> str | None:
        """Count a client by its host alone, as :meth:`admit` does besides."""
        most, host = self.limits.max_per_host, host_of(client_address)
        if most is not None and host is not None:
            if self._hosts[host] >= most:
                return "per host"
            self._hosts[host] += 1
        return None

    def leave(self, client_address: Any) -> None:
        """Count the end of a connection that was admitted."""
        if self._hosts and (host := host_of(client_address)) is not None and host in self._hosts:
            self._hosts[host] -= 1
            if self._hosts[host] <= 0:
                del self._hosts[host]  # addresses are many

    def _is_full(self) -> bool:
        limit = self.limits.max_connections
        return limit is not None and len(self._connections) >= limit

    def _end_wait(self) -> None:
        self._timer = None
        self._retry()


def host_of(client_address: Any) -> str | None:
    """Return what `max_per_host` counts a client by; None for a client of a Unix socket, which has no host."""
    return client_address[0] if isinstance(client_address, tuple) else None
