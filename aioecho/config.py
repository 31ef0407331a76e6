"""What a user sets on a server: limits and timeouts. Values are checked when an object is made, so that a server never
meets a bad one."""

from dataclasses import dataclass

__all__ = ["Limits", "Timeouts"]


MOST = 2**31 - 1
"""The largest count: what listen() takes."""

MOST_BYTES = 2**20
"""The longest datagram, in bytes: so many are allocated for each before it is read."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of anything a server holds at a time.

    Raises ValueError, naming the value, if one makes no sense.
    """

    max_connections: int | None = None
    """Connections at once, never one more. At the limit clients wait in the kernel's queue. None: as many as there are
    file descriptors."""

    backlog: int = 2048
    """Clients that the kernel queues until they are accepted; it cuts the figure to net.core.somaxconn. Clients beyond
    it are not refused: their connecting takes seconds longer."""

    max_buffer: int = 2**16
    """Bytes: asyncio's `limit`. The longest line, and half of what is buffered of a peer that sends faster than its
    handler reads."""

    max_handlers: int = 1024
    """Datagrams: handlers at once. At the limit datagrams wait in the server's queue."""

    max_queue: int = 1024
    """Datagrams that wait for a handler. At the limit a datagram that comes is dropped, and counted as "queue full"."""

    max_sessions: int = 4096
    """Datagrams: sessions at once. At the limit a new peer's datagrams are dropped, and counted as "too many sessions";
    known peers are served on."""

    max_session_queue: int = 64
    """Datagrams of one session that wait until its handler takes them; and all but the first are no more than `max_buffer`
    bytes. At the limit that session's are dropped, and counted as "session queue full"."""

    max_datagram: int = 65_535
    """Bytes, the most that UDP has. A longer datagram is dropped, and counted as "truncated"."""

    receive_buffer: int | None = None
    """Bytes that the kernel keeps of datagrams until they are read: SO_RCVBUF, which it cuts to net.core.rmem_max and, on
    Linux, doubles. None: as the system has it."""

    def __post_init__(self) -> None:
        if self.max_connections is not None:
            _check_count("max_connections", self.max_connections)
        _check_count("backlog", self.backlog)
        _check_count("max_buffer", self.max_buffer)
        for name in ("max_handlers", "max_queue", "max_sessions", "max_session_queue"):
            _check_count(name, getattr(self, name))
        _check_count("max_datagram", self.max_datagram, MOST_BYTES)
        if self.receive_buffer is not None:
            _check_count("receive_buffer", self.receive_buffer)


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long a server waits, in seconds; None is for ever.

    Raises ValueError, naming the value, if one makes no sense.
    """

    handshake: float | None = 10.0
    """For a peer to complete its TLS handshake."""

    linger: float | None = 0.5
    """For a peer to close its side after the handler has returned, while what it still sends is discarded. Closing over
    unread data resets the connection, and a reset can destroy the reply on its way."""

    session: float | None = 60.0
    """For a session's peer to send another datagram. Then the session's `datagrams` end, and so does its handler."""

    send: float | None = 1.0
    """For a full socket to take a datagram that a handler awaits to be sent. Then it is dropped and counted."""

    def __post_init__(self) -> None:
        _check_seconds("handshake", self.handshake)
        _check_seconds("linger", self.linger)
        _check_seconds("session", self.session)
        _check_seconds("send", self.send)


def _check_count(name: str, value: object, most: int = MOST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value!r}")


def _check_seconds(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not value > 0):
        raise ValueError(f"{name} must be a number of seconds above 0, or None, not {value!r}")
