"""What a user sets on a server: limits and timeouts. Values are checked when an object is made, so that a server never
meets a bad one."""

import ssl as ssl_module
from dataclasses import dataclass
from math import inf
from typing import Any, Literal, TypeGuard, TypeVar

__all__ = ["Limits", "Timeouts", "check_ssl", "check_type"]

T = TypeVar("T")

MOST = 2**31 - 1
"""The largest count: what listen() takes."""

MOST_BYTES = 2**20
"""The longest datagram, in bytes: so many are allocated for a datagram before it is read."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of anything a server holds at a time.

    Raises ValueError, naming the value, if one makes no sense.
    """

    max_connections: int | None = None
    """Connections at once, never one more; for datagrams handlers, or sessions. None: as many as there are file
    descriptors."""

    overflow: Literal["wait", "reject"] = "wait"
    """What happens to new clients at `max_connections`: they wait in the kernel's queue, or are disconnected at once."""

    max_per_host: int | None = None
    """Connections at once from one IPv4 address, or one IPv6 network of 64 bits. The one too many is disconnected at once.
    Clients behind one router share an address; clients of Unix sockets have none, and are not limited. For datagrams handlers
    that wait, or sessions: the datagram too many is dropped, and counted as "per host"."""

    accept_rate: float | None = None
    """Connections a second, evenly spaced. Clients that come faster wait in the kernel's queue. For datagrams sessions that
    begin: a peer that comes faster is dropped, and counted as "accept rate". A server of single datagrams has no such rate,
    and is not made with one."""

    max_handshakes: int | None = 256
    """TLS handshakes in progress at once, from a whole ClientHello on. Others wait, in order. While any waits, one that has
    taken more than a quarter of a second and four round trips, or a second, is aborted. None: any number."""

    shed: Literal["idle"] | None = None
    """What to do when there are no file descriptors left: let new clients wait for one (None), or cut off the connection
    that has waited longest for its peer ("idle")."""

    backlog: int = 2048
    """Clients that the kernel queues until they are accepted; it cuts the figure to net.core.somaxconn. Clients beyond
    it are not refused: their connecting takes seconds longer."""

    max_threads: int = 200
    """Threads for blocking handlers. A handler has one for as long as its connection lasts. At the limit accepted
    connections wait for a thread, in order. A thread that is idle is used again, and kept until the server stops. Handlers that
    compute, rather than wait, make the event loop wait as well: see aioecho.blocking for how long."""

    max_buffer: int = 2**16
    """Bytes of the longest line: asyncio's `limit`. Also half of what is buffered of a peer that sends faster than its
    handler reads."""

    max_frame: int | None = 2**24
    """Bytes: the most of a frame that begins with its length, and of what readexactly() and read(-1) read. Every connection
    may hold so much. Over it FrameTooLong is raised. None: as much as a peer announces."""

    max_memory: int | None = 2**30
    """Bytes that all connections together hold of what came and was not read, and of what was written and is not sent. Over it
    the connection that holds most is aborted, or one that holds up to an eighth less. What comes counts where it is more than
    16 KiB of a connection, and what is sent where it is more than 64. None: no limit."""

    max_handlers: int = 1024
    """Datagrams: handlers at once. At the limit datagrams wait in the server's queue."""

    max_queue: int = 1024
    """Datagrams that wait for a handler. At the limit a datagram that comes is dropped, and counted as "queue full"."""

    max_sessions: int = 4096
    """Datagrams: sessions at once. At the limit the host that has most of them yields one to a new peer whose host has at
    least two fewer: the session that has been quiet for longest ends. If none yields, a new peer's datagrams are dropped,
    and counted as "too many sessions"; known peers are served on."""

    max_session_queue: int = 64
    """Datagrams of one session that wait until its handler takes them; and all but the first are no more than `max_buffer`
    bytes. At the limit that session's are dropped, and counted as "session queue full"."""

    max_datagram: int = 65_535
    """Bytes of a datagram; by default the most that UDP has. A longer datagram is dropped, and counted as "truncated"."""

    receive_buffer: int | None = None
    """Bytes that the kernel keeps of datagrams until they are read: SO_RCVBUF, which it cuts to net.core.rmem_max and, on
    Linux, doubles. None: as the system has it."""

    max_write_buffer: int | None = 2**24
    """Bytes that may wait to be sent when a handler writes; over it the connection is aborted. Such a handler ignores drain().
    A single write() may be larger."""

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_per_host", "max_handshakes", "max_write_buffer", "max_frame"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.max_memory is not None:
            _check_count("max_memory", self.max_memory, 2**63 - 1)
        _check_count("backlog", self.backlog)
        _check_count("max_threads", self.max_threads)
        _check_count("max_buffer", self.max_buffer)
        for name in ("max_handlers", "max_queue", "max_sessions", "max_session_queue"):
            _check_count(name, getattr(self, name))
        _check_count("max_datagram", self.max_datagram, MOST_BYTES)
        if self.receive_buffer is not None:
            _check_count("receive_buffer", self.receive_buffer)
        _check_choice("overflow", self.overflow, ("wait", "reject"))
        _check_choice("shed", self.shed, (None, "idle"))
        rate = self.accept_rate
        if rate is not None and not (_is_number(rate) and 0 < rate < inf):
            raise ValueError(f"accept_rate must be a number of connections a second above 0, or None, not {rate!r}")


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """How long a server waits, in seconds; None is for ever.

    Raises ValueError, naming the value, if one makes no sense.

    A timeout that passes raises ConnectionTimeout in the handler, where it reads or drains; uncaught, it closes the
    connection. They are looked at together, by one timer: one may be up to a tenth late, or 10 ms if that is more.
    A handler class may have an attribute `timeouts`, which takes the place of its server's.

    To blocking handlers only `handshake`, `proxy`, `linger` and `send` apply, as the server has them. The timeout of its socket
    says how long a blocking handler waits for its peer, as under socketserver: set the attribute `timeout` of
    socketserver.StreamRequestHandler, or call ``request.settimeout()``, in verify_request() for instance. Its TimeoutError
    ends the connection with the reason "timeout". Without a timeout a silent peer keeps its thread.
    """

    handshake: float | None = 10.0
    """For a peer to complete its TLS handshake, from the connection's accepting on, or from `writer.start_tls()`; and for
    verify_request(), if that is a coroutine function, from the accepting on too."""

    proxy: float | None = 5.0
    """For a PROXY header, from the connection's accepting on, where the server or the endpoint expects one."""

    idle: float | None = 600.0
    """For the first byte of what a handler reads."""

    message: float | None = 60.0
    """For the whole of a line, or of what readuntil() and readexactly() wait for, from its first byte. A peer that sends a
    byte now and then does not put it off."""

    write: float | None = 60.0
    """For a peer to take anything at all, while something waits to be sent."""

    max_age: float | None = None
    """For a connection, from its accepting. From then on the next read raises, or the next drain(), or the wait for the first
    byte of something that goes on. A handler that does neither for `linger` more is cancelled."""

    max_age_jitter: float = 0.1
    """The part of `max_age`, from 0 to 1, by which a connection may end earlier, so that all do not return at once."""

    handler: float | None = None
    """For a handler of a stream, from its setup() to the end of its handle(). Then it is cancelled. finish() is not."""

    lost: float | None = 10.0
    """For a handler to finish with the message in progress when its connection broke. Then it is cancelled. If no message is in
    progress, a handler that waits for something else than its stream is cancelled at once: see
    StreamRequestHandler.cancel_on_lost."""

    half_closed: float | None = 10.0
    """For a handler that goes on after its peer has ended its stream, with no message in progress and nothing that it sends.
    Then it is cancelled. None is for protocols that reply later. The peer of a Unix socket has to have closed it altogether."""

    keepalive: float | None = 60.0
    """For a TCP peer that sends nothing to answer the kernel's probes (SO_KEEPALIVE): then its connection is lost. Likewise one
    that acknowledges nothing of what is sent. Whole seconds, 4 at the least. Neither happens before `write` seconds: Linux
    has one time for both and for a peer that reads slowly (TCP_USER_TIMEOUT), so to find vanished peers sooner lower `write`
    too. It holds for the connections accepted from then on. None leaves the sockets as they are."""

    linger: float | None = 0.5
    """For a peer to close its side after the handler has returned, while what it still sends is discarded. Closing over
    unread data resets the connection, and a reset can destroy the reply on its way. At a stop, also the seconds of silence
    after which a peer is taken to have nothing more to say. 0: at once, which discards what is on its way."""

    session: float | None = 60.0
    """For a session's peer to send another datagram. Then the session's `datagrams` end, and so does its handler."""

    datagram_handler: float | None = 60.0
    """For an async handler of one datagram, or for that of a session once its datagrams have ended. Then it is cancelled."""

    send: float | None = 1.0
    """For a full socket to take a datagram that a handler awaits to be sent. Then it is dropped and counted."""

    def __post_init__(self) -> None:
        for name in (
            "handshake",
            "proxy",
            "idle",
            "message",
            "write",
            "max_age",
            "handler",
            "lost",
            "half_closed",
            "keepalive",
            "session",
            "datagram_handler",
            "send",
        ):
            _check_seconds(name, getattr(self, name))
        if self.linger != 0 or isinstance(self.linger, bool):
            _check_seconds("linger", self.linger)
        if not _is_number(self.max_age_jitter) or not 0 <= self.max_age_jitter <= 1:
            raise ValueError(f"max_age_jitter must be a part from 0 to 1, not {self.max_age_jitter!r}")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_count(name: str, value: object, most: int = MOST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value!r}")


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


def _check_seconds(name: str, value: object) -> None:
    if value is not None and not (_is_number(value) and value > 0):
        raise ValueError(f"{name} must be a number of seconds above 0, or None, not {value!r}")


def check_type(name: str, value: Any, kind: type[T]) -> T:
    """Return `value`; raise TypeError, naming it, unless it is of the class `kind`, which is one of aioecho's."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be an aioecho.{kind.__name__}, not {value!r}")
    return value


def check_ssl(ssl: Any) -> None:
    """Raise TypeError or ValueError if a server cannot serve TLS 1.2 or later with this; None is no TLS.

    Where a context leaves the least version to OpenSSL, set it to TLS 1.2.
    """
    if ssl is None:
        return
    if not isinstance(ssl, ssl_module.SSLContext):
        raise TypeError(f'ssl must be an aioecho.TLS, as aioecho.TLS("server.pem"), or an ssl.SSLContext, not {ssl!r}')
    if ssl.protocol == ssl_module.PROTOCOL_TLS_CLIENT:
        raise ValueError(
            "ssl is a context for clients: make it by ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), and load the"
            " server's certificate into it"
        )
    minimum, maximum, tls_1_2 = ssl.minimum_version, ssl.maximum_version, ssl_module.TLSVersion.TLSv1_2
    if maximum != ssl_module.TLSVersion.MAXIMUM_SUPPORTED and maximum < tls_1_2:
        raise ValueError(f"ssl allows no version after {maximum.name}: set its maximum_version to MAXIMUM_SUPPORTED")
    if minimum == ssl_module.TLSVersion.MINIMUM_SUPPORTED:
        # No version was chosen: Debian's and Ubuntu's default contexts say this, where python.org's say TLSv1_2.
        ssl.minimum_version = tls_1_2
    elif minimum < tls_1_2:
        raise ValueError(f"ssl allows {minimum.name}: set its minimum_version to TLSv1_2 or TLSv1_3")
