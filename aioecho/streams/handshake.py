"""TLS handshakes: from the socket's first byte to the TLS transport, or to the alert that says why there is none.

On a server's side nothing is allocated for TLS until a whole ClientHello has come, and the server's HandshakeLimit
has room. Until then a connection costs what one without TLS does, and the bytes that it has sent.
"""

import asyncio
import contextlib
import enum
import ssl
from collections.abc import Callable
from ssl import SSLError, SSLWantReadError
from typing import Any

from aioecho.net.kernel import round_trip, unread
from aioecho.streams.handshake_limit import HandshakeLimit, Terms
from aioecho.streams.tls import FOR_EVER, SLICE, TLSTransport
from aioecho.streams.tls_info import Stream

__all__ = ["Handshake", "start_tls"]

# Seconds that asyncio's documentation promises for both.
DEFAULT_HANDSHAKE_TIMEOUT = 60.0
DEFAULT_SHUTDOWN_TIMEOUT = 30.0

# Bytes of a ClientHello that are kept until it is whole. What is longer goes to OpenSSL in parts. Browsers send up to 2 KiB.
MOST_OF_HELLO = 2**13

# Records of a ClientHello that are looked at, each time that more comes.
MOST_RECORDS = 16

# Bytes that are kept of a peer whose handshake waits until others have ended. It has nothing to say after its ClientHello.
MOST_WAITING = 2**14

# Seconds: the most that is taken for a round trip. More is a peer that has done something else meanwhile.
MOST_ROUND_TRIP = 1.0

RECORD_HEADER, HANDSHAKE_RECORD, CLIENT_HELLO = 5, 22, 1


class _State(enum.Enum):
    HELLO = "hello"  # a whole ClientHello has not come, or others are in progress
    RUNNING = "running"
    ALERTED = "alerted"  # it failed, the peer is told why, and what it still sends is dropped
    OVER = "over"


_HELLO, _RUNNING, _ALERTED, _OVER = _State


class Handshake(asyncio.Protocol):
    """The protocol of the socket's transport until TLS is open; then a TLSTransport is.

    Args:
        loop, transport: the event loop, and the socket's transport. It has to be paused.
        stream: the protocol of the stream.
        context: of the ssl module.
        replace: is called with the TLS transport, before that delivers anything.
        server_side: whether this is the server's side.
        server_hostname: the name that the server's certificate must have, on a client's side.
        shutdown_timeout: seconds that the TLS transport waits, when it closes, for its peer to close too.
        limit: where it counts.
        linger: seconds that what a refused peer still sends is dropped, so that a reset does not destroy the alert.
    """

    __slots__ = (
        "_answered_in",
        "_context",
        "_error",
        "_incoming",
        "_is_server_side",
        "_limit",
        "_linger",
        "_object",
        "_outgoing",
        "_received",
        "_replace",
        "_server_hostname",
        "_shutdown_timeout",
        "_state",
        "_stream",
        "_timer",
        "_transport",
        "asked_at",
        "began",
        "count",
        "done",
        "is_waiting",
        "loop",
    )

    _object: ssl.SSLObject
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO

    done: "asyncio.Future[asyncio.Transport]"
    """What tells how it ends: the TLS transport, or an error."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        stream: Stream,
        context: ssl.SSLContext,
        replace: Callable[[asyncio.Transport], object],
        *,
        server_side: bool,
        server_hostname: str | None,
        shutdown_timeout: float,
        limit: HandshakeLimit | None,
        linger: float | None,
    ) -> None:
        self.loop = loop
        self._transport = transport
        self._stream: Stream | None = stream
        self._context = context
        self._replace: Callable[[asyncio.Transport], object] | None = replace
        self._is_server_side = server_side
        self._server_hostname = server_hostname
        self._shutdown_timeout = shutdown_timeout
        self._limit = limit
        self._linger = linger
        self._received = b""
        self._state = _HELLO
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.began = loop.time()
        self.asked_at = self.began  # when the peer was answered last
        self._answered_in = 0.0  # seconds that the peer took the last time
        self.count = 0  # bytes received
        self.is_waiting = False  # until others have ended

    def start(self, received: bytes, timeout: float) -> None:
        """Begin, with the bytes of it that were `received` already. `timeout` is in seconds.

        Raises:
            ValueError: the context wants to check a host name, and there is none.
        """
        self.done = self.loop.create_future()
        self._transport.set_protocol(self)
        if timeout < FOR_EVER:
            self._timer = self.loop.call_later(timeout, self._time_out, timeout)
        try:
            if not self._is_server_side:
                self._received = received
                self.begin()
            elif received:
                self.data_received(received)
            self._transport.resume_reading()
        except BaseException:
            self._finish(None)
            raise

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or failed."""
        return self._state is _OVER or self._state is _ALERTED

    def round_trip(self) -> float:
        """Return its peer's round trip, in seconds; 0 if that is not known."""
        sock = self._transport.get_extra_info("socket")
        return round_trip(sock) if sock is not None else 0

    def has_more(self) -> bool:
        """Tell whether more has come of the peer, and only waits for the loop to read it."""
        sock = self._transport.get_extra_info("socket")
        return sock is not None and unread(sock) > 0

    def data_received(self, data: bytes) -> None:
        """Go on, if a whole ClientHello has come, and there is room for another handshake."""
        self.count += len(data)
        if self._state is _RUNNING:
            self._answered_in = self.loop.time() - self.asked_at
            self._step(data)
        elif self._state is _HELLO:
            self._received += data
            if not self.is_waiting and not _is_whole_hello(self._received):
                return
            if not self.is_waiting and (self._limit is None or self._limit.acquire(self)):
                self.begin()
                return
            self.is_waiting = True
            if len(self._received) > MOST_WAITING:
                self.fail(ConnectionAbortedError("more came than a ClientHello, before it was answered"))

    def begin(self) -> None:
        """Have OpenSSL answer what has been received."""
        self.is_waiting = False
        self._state = _RUNNING
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        try:
            self._object = self._context.wrap_bio(
                self._incoming, self._outgoing, self._is_server_side, self._server_hostname
            )
        except (OSError, ValueError) as error:  # it is no context for this side
            if not self._is_server_side:
                raise
            self.fail(error)
            return
        received, self._received = self._received, b""
        self._step(received)

    def _step(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(view) or 1, SLICE):
            self._incoming.write(view[start : start + SLICE])
            try:
                self._object.do_handshake()
            except SSLWantReadError:
                pass
            except SSLError as error:
                self.fail(error)
                return
            else:
                self._open(bytes(view[start + SLICE :]))
                return
            if self._outgoing.pending:
                self._transport.write(self._outgoing.read())
                self.asked_at = self.loop.time()

    def _open(self, received: bytes) -> None:
        stream, replace, done = self._stream, self._replace, self.done
        assert stream is not None
        assert replace is not None
        made = TLSTransport(
            self.loop,
            self._transport,
            stream,
            self._context,
            self._object,
            self._incoming,
            self._outgoing,
            shutdown_timeout=self._shutdown_timeout,
            round_trip=min(self._answered_in, MOST_ROUND_TRIP),
        )
        self._transport.set_protocol(made)
        self._finish(None)
        replace(made)
        if not done.done():
            done.set_result(made)
        made.receive(received)

    def _time_out(self, seconds: float) -> None:
        self._timer = None
        if self._state is _ALERTED:
            self._finish(self._error)
        else:
            self.fail(ConnectionAbortedError(f"the TLS handshake took longer than {seconds:.4g} seconds"))

    def fail(self, error: Exception) -> None:
        """End it with `error`, after the alert that says why, if OpenSSL has made one. Does nothing if it has ended."""
        if self.is_over:
            return
        error = error.with_traceback(None)  # whose frames refer to this
        if self._state is _RUNNING and self._outgoing.pending:
            self._transport.write(self._outgoing.read())
            if self._is_server_side and self._linger != 0 and not self._transport.is_closing():
                self._drop_what_comes(error)
                return
        self._finish(error)

    def _drop_what_comes(self, error: Exception) -> None:
        """Wait until the peer closes: to close over what it has sent would reset the connection, and destroy the alert."""
        self._state, self._error = _ALERTED, error
        self._release_limit()
        if self._linger is not None:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.loop.call_later(self._linger, self._time_out, self._linger)
        with contextlib.suppress(OSError):  # the peer has reset the connection, and the loop does not know yet
            self._transport.write_eof()

    def _release_limit(self) -> None:
        limit, self._limit = self._limit, None
        if limit is not None:
            limit.release(self)

    def _finish(self, error: Exception | None) -> None:
        self._state = _OVER
        self._received = b""
        # Else all of them would be a cycle, for the garbage collector to undo.
        self._stream = self._replace = self._error = None
        self._release_limit()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if error is not None and not self.done.done():
            self.done.set_exception(error)

    def eof_received(self) -> bool:
        """Fail, and close."""
        if self._state is _ALERTED:
            self._finish(self._error)
        else:
            self.fail(ConnectionResetError("the peer closed the connection during the TLS handshake"))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail."""
        if self._state is not _OVER:
            self._finish(self._error or exc or ConnectionResetError("the connection was lost during the TLS handshake"))

    def pause_writing(self) -> None:
        """Pass it on to the stream's protocol."""
        if self._stream is not None:
            self._stream.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on to the stream's protocol."""
        if self._stream is not None:
            self._stream.resume_writing()


def _is_whole_hello(data: bytes) -> bool:
    """Return whether OpenSSL can do something with `data`: a whole ClientHello, or what is none or too long."""
    if len(data) > MOST_OF_HELLO:
        return True
    at = got = 0
    wanted: int | None = None
    for _ in range(MOST_RECORDS):
        if len(data) < at + RECORD_HEADER:
            return len(data) > at and data[at] != HANDSHAKE_RECORD
        size = int.from_bytes(data[at + 3 : at + RECORD_HEADER], "big")
        if data[at] != HANDSHAKE_RECORD or not size:
            return True
        if wanted is None:
            if size < 4:  # not even the length of the ClientHello
                return True
            if len(data) < at + RECORD_HEADER + 4:
                return False
            if data[at + RECORD_HEADER] != CLIENT_HELLO:
                return True
            wanted = 4 + int.from_bytes(data[at + RECORD_HEADER + 1 : at + RECORD_HEADER + 4], "big")
        got += size
        at += RECORD_HEADER + size
        if got >= wanted:
            return len(data) >= at
    return True


async def start_tls(
    loop: asyncio.AbstractEventLoop,
    transport: asyncio.Transport,
    stream: Stream,
    context: ssl.SSLContext,
    received: bytes,
    replace: Callable[[asyncio.Transport], object],
    *,
    server_side: bool,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
    terms: Terms | None = None,
) -> asyncio.Transport:
    """Return a TLS transport over `transport`, of which `stream` has `received` bytes that belong to the handshake.

    `transport` has to be paused. `replace` is called with the new one before any data comes. The timeouts are in seconds. If
    they are None, the handshake's is that of the `terms`, or else 60, and the other 30.

    Raises:
        ssl.SSLError, ConnectionError: the handshake failed.
        ValueError: the context wants to check a host name, and there is none.
    """
    made: Any = Handshake(
        loop,
        transport,
        stream,
        context,
        replace,
        server_side=server_side,
        server_hostname=server_hostname,
        shutdown_timeout=ssl_shutdown_timeout or DEFAULT_SHUTDOWN_TIMEOUT,
        limit=terms.limit if terms is not None else None,
        linger=terms.linger if terms is not None else 0,
    )
    timeout = ssl_handshake_timeout or (terms.timeout if terms is not None else DEFAULT_HANDSHAKE_TIMEOUT)
    try:
        made.start(received, timeout)
        opened: asyncio.Transport = await made.done
    except BaseException:
        del made  # the traceback refers to this frame, and the reader to the exception
        raise
    return opened
