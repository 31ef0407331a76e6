"""What users see of a live connection, session or datagram's handler, the members of `server.connections`; and their ids."""

import itertools
import socket
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from aioecho.net.kernel import wire_bytes

__all__ = ["ByteCounts", "Connections", "Identities", "Live", "LiveConnection"]


@dataclass(frozen=True)
class ByteCounts:
    """Bytes of a connection so far."""

    received: int | None
    """Wire bytes that have come: TLS and a PROXY header included. None where the system does not tell: over Unix sockets, for
    datagrams, and elsewhere than on Linux."""
    sent: int | None
    """Wire bytes that were given to the kernel. None as for `received`."""
    unsent: int
    """Bytes that the handler has written, and this process still holds, as the peer does not read them. 0 for blocking handlers
    and datagrams."""


@runtime_checkable
class LiveConnection(Protocol):
    """A member of `server.connections`: a connection, a datagram session, or the handler of one datagram."""

    client_address: Any
    """As accept() or recvfrom() gave it."""
    handler: Any
    """The handler object; None until its setup() has returned, and for blocking handlers."""

    @property
    def id(self) -> str:
        """A text that no other connection of the program has, or will have: "27", or "1.27" in a worker process."""

    @property
    def since(self) -> float | None:
        """When it was accepted, in seconds of the event loop's clock. None for the handler of a datagram that came just now."""

    @property
    def label(self) -> str | None:
        """What its handler has set as ``self.label``, as text; None if nothing."""

    def bytes(self) -> ByteCounts:
        """Return how many bytes have come and gone. It costs a system call."""

    def kick(self, reason: str = "") -> None:
        """End the connection at once, as `kicked`."""

    def abort(self) -> None:
        """End the connection at once, as `cancelled`."""


class Connections(frozenset[Any]):
    """The live connections of a server, as :class:`LiveConnection`: a copy, which does not change."""

    def get(self, id: str) -> LiveConnection | None:
        """Return the connection with this id; None if it has ended by the time of the copy, or never was."""
        return next((connection for connection in self if connection.id == id), None)

    def __repr__(self) -> str:
        return f"<{len(self)} connections>"


class Identities:
    """The ids of connections, and which of them were kicked; a service's parts have one for all.

    Kept here, and only for connections that were asked for it: in a connection itself it would take memory.
    """

    def __init__(self) -> None:
        self.prefix = ""
        """What ids begin with. Workers set it."""
        self._serials = itertools.count(1)
        self._ids: dict[Any, str] = {}
        self._kicked: set[Any] = set()

    def find(self, connection: Any) -> str:
        """Return the id of a live connection, which it gets now if it has none yet."""
        found = self._ids.get(connection)
        if found is None:
            found = self._ids[connection] = f"{self.prefix}{next(self._serials)}"
        return found

    def search(self, ids: Collection[str]) -> list[Any]:
        """Return the live connections that were given these ids. It gives none, and does not look at all connections."""
        wanted = set(ids)
        return [connection for connection, id in self._ids.items() if id in wanted]

    def add_kicked(self, connection: Any) -> bool:
        """Note that a live connection is kicked; return whether that is new."""
        is_new = connection not in self._kicked
        self._kicked.add(connection)
        return is_new

    def forget(self, connection: Any) -> bool:
        """Forget a connection that has ended; return whether it was kicked."""
        if self._ids:
            self._ids.pop(connection, None)
        if not self._kicked or connection not in self._kicked:
            return False
        self._kicked.discard(connection)
        return True


class _Identifying(Protocol):
    """The server of a connection, as far as this needs it."""

    def identify(self, connection: Any) -> str:
        """Return the connection's id."""

    def note_kick(self, connection: Any, reason: str) -> None:
        """Count its end as kicked."""


class Live:
    """What the members of `server.connections` have in common. It keeps nothing in them: a connection has to be small."""

    __slots__ = ()

    _server: Any  # an _Identifying
    client_address: Any

    @property
    def id(self) -> str:
        """A text that no other connection of the program has, or will have: "27", or "1.27" in a worker process.

        The number before the point is the worker process': a worker that replaces another has another. Numbers are given when
        they are asked for, and so are not in the order of accepting.
        """
        server: _Identifying = self._server
        return server.identify(self)

    @property
    def label(self) -> str | None:
        """What its handler has set as ``self.label``, as text; None if nothing."""
        label = getattr(getattr(self, "handler", None), "label", None)
        return None if label is None else str(label)

    def bytes(self) -> ByteCounts:
        """Return how many bytes have come and gone; costs a system call. What is not known is None: see :class:`ByteCounts`."""
        sock = self._find_socket()
        counted = None if sock is None or sock.fileno() < 0 else wire_bytes(sock)
        protocol = getattr(self, "_protocol", None)
        unsent = 0 if protocol is None or not hasattr(protocol, "transport") or protocol.is_lost else protocol.unsent()
        received, sent = (None, None) if counted is None else counted
        return ByteCounts(received, sent, unsent)

    def _find_socket(self) -> Any:
        sock = getattr(self, "_sock", None)
        if sock is None:
            sock = getattr(self, "request", None)  # a blocking handler's
        return sock if isinstance(sock, socket.socket) else None

    def kick(self, reason: str = "") -> None:
        """End the connection at once: cancel its handler, and throw away what is unsent. It is counted as `kicked`.

        In the loop's thread only. Does nothing if it has ended. `reason` is for the log. A blocking handler meets a broken
        socket instead of a cancellation.
        """
        server: _Identifying = self._server
        server.note_kick(self, reason)
        self.abort()

    def abort(self) -> None:
        """End it at once. To be overridden."""
        raise NotImplementedError
