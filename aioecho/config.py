"""What a user sets on a server: limits and timeouts. Values are checked when an object is made, so that a server never
meets a bad one."""

from dataclasses import dataclass

__all__ = ["Limits", "Timeouts"]


MOST = 2**31 - 1
"""The largest count: what listen() takes."""


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

    max_threads: int = 200
    """Threads for blocking handlers, each of which has one for as long as its connection lasts. At the limit accepted
    connections wait for one, in order. A thread that is idle is used again, and kept until the server stops. Handlers that
    compute, rather than wait, make the event loop wait as well: see aioecho.blocking for how long."""

    max_buffer: int = 2**16
    """Bytes: asyncio's `limit`. The longest line, and half of what is buffered of a peer that sends faster than its
    handler reads."""

    def __post_init__(self) -> None:
        if self.max_connections is not None:
            _check_count("max_connections", self.max_connections)
        _check_count("backlog", self.backlog)
        _check_count("max_threads", self.max_threads)
        _check_count("max_buffer", self.max_buffer)


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

    def __post_init__(self) -> None:
        _check_seconds("handshake", self.handshake)
        _check_seconds("linger", self.linger)


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
        raise ValueError(f"{name} must be a whole number from 1 to {MOST}, not {value!r}")


def _check_seconds(name: str, value: object) -> None:
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not value > 0):
        raise ValueError(f"{name} must be a number of seconds above 0, or None, not {value!r}")
