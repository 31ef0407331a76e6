"""Broadcasts: one message to the clients of many connections, without waiting for any of them."""

import asyncio
from collections import deque
from collections.abc import Hashable, Iterable
from typing import Any, Literal, Protocol

from aioecho.stats import Stats

__all__ = ["MOST_UNSENT", "Audience"]

MOST_UNSENT = 2**20
"""Bytes that may wait to be sent to a client for a broadcast to be written to it."""

# Clients that are written to in one turn of the loop: a system call each.
PER_TURN = 1000

MOST_UNDER_WAY = 16
"""Broadcasts that may be under way. Where there is one more, the rest of the first is written at once: that slows handlers down
which broadcast faster than messages go out, and no message falls behind further and further."""


class _Listener(Protocol):
    """A connection, as a broadcast sees it."""

    handler: Any

    def is_listening(self) -> bool:
        """Tell whether broadcasts are for it."""

    def push(self, data: bytes, most: int) -> bool:
        """Write `data`, unless more than `most` bytes would wait to be sent then: return False."""

    def abort_for(self, reason: str) -> None:
        """Abort it; count `reason`."""


class _Broadcast:
    """One that is under way, and the connections that it is still to be written to, the last one first."""

    def __init__(self, data: bytes, most: int, skips: bool, rest: list[_Listener]) -> None:
        self.data, self.most, self.skips, self.rest = data, most, skips, rest


class Audience:
    """The connections of one server, and the groups that they are in. `connections` is the server's own collection."""

    def __init__(self, connections: Iterable[Any], stats: Stats) -> None:
        self._connections = connections
        self._stats = stats
        self._groups: dict[Hashable, dict[_Listener, None]] = {}
        self._memberships: dict[_Listener, set[Hashable]] = {}
        self._under_way: deque[_Broadcast] = deque()

    def join(self, connection: _Listener, group: Hashable) -> None:
        """Add a connection to a group, which is made for its first member."""
        self._groups.setdefault(group, {})[connection] = None
        self._memberships.setdefault(connection, set()).add(group)

    def leave(self, connection: _Listener, group: Hashable) -> None:
        """Remove a connection from a group, if it is in it. A group without members is no more."""
        members = self._groups.get(group, {})
        if connection in members:
            del members[connection]
            if not members:
                del self._groups[group]
            memberships = self._memberships[connection]
            memberships.discard(group)
            if not memberships:
                del self._memberships[connection]

    def forget(self, connection: Any) -> None:
        """Remove a connection that has ended from its groups."""
        if self._memberships:
            for group in tuple(self._memberships.get(connection, ())):
                self.leave(connection, group)

    def send(self, data: bytes, to: Hashable, but: Any, most: int, full: Literal["close", "skip"]) -> int:
        """Write `data` as BaseServer.broadcast() says, and return to how many."""
        connections: Iterable[Any] = self._connections
        kind = to if isinstance(to, type) else object
        if to is not None and kind is not to:
            connections = self._groups.get(to, ())
        rest = [
            connection
            for connection in connections
            if connection.is_listening() and connection.handler is not but and isinstance(connection.handler, kind)
        ]
        count = len(rest)
        rest.reverse()
        self._under_way.append(_Broadcast(data, most, full == "skip", rest))
        if len(self._under_way) == 1:
            self._go_on()
        elif len(self._under_way) > MOST_UNDER_WAY:
            broadcast = self._under_way.popleft()
            self._write(broadcast, len(broadcast.rest))
        return count

    def _go_on(self) -> None:
        """Write to as many as one turn allows, in the order of the broadcasts."""
        left = PER_TURN
        while self._under_way:
            broadcast = self._under_way[0]
            count = min(left, len(broadcast.rest))
            self._write(broadcast, count)
            left -= count
            if broadcast.rest:
                asyncio.get_running_loop().call_soon(self._go_on)
                return
            self._under_way.popleft()

    def _write(self, broadcast: _Broadcast, count: int) -> None:
        """Write to the next `count` connections."""
        data, most, rest = broadcast.data, broadcast.most, broadcast.rest
        for _ in range(count):
            connection = rest.pop()
            if not connection.push(data, most):
                if broadcast.skips:
                    self._stats.skipped += 1
                else:
                    connection.abort_for("broadcast")
