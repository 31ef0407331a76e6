"""TLS over a connection: a transport that drives an ssl.SSLObject, on any loop and over any transport of its own.

The loops' own TLS is not used, for what it does to a connection:

- It begins to shut down as soon as its peer sends close_notify, or closes its direction of the TCP connection, and throws away
  what is written from then on. So a reply to a client that half-closes is lost (asyncio's in 3.11 to 3.15, uvloop's in 0.23).
- asyncio's closes the transport under it while it still holds back data, and never sends them in 3.12 and 3.13
  (cpython#115514). uvloop's forgets what a paused reader has not read when its peer closes.
- asyncio's allocates a buffer of 256 KiB for every connection, and uvloop's one for every read.
- Both meet the end of what has come by an exception, for every message, which costs more than the decryption.

This one holds nothing back. What is written is encrypted and passed to the socket's transport at once, which tells the stream's
protocol when too much is unsent there. What is read is decrypted and delivered in the same call.
"""

import asyncio
import enum
import ssl
from collections.abc import Callable, Iterable
from ssl import SSLError, SSLWantReadError, SSLZeroReturnError
from typing import Any

__all__ = ["FOR_EVER", "TLSTransport", "start_tls"]

FOR_EVER = 1e6
"""Seconds: a timeout that never ends."""

# Seconds that asyncio's documentation promises for both.
DEFAULT_HANDSHAKE_TIMEOUT = 60.0
DEFAULT_SHUTDOWN_TIMEOUT = 30.0

# Bytes: the most plaintext in a TLS record, and so the most that SSL_read returns.
RECORD = 2**14

# Bytes: the most that is passed to OpenSSL at once. Its memory BIOs never shrink, so this bounds what an idle connection keeps.
# A whole record fits in, with its header, its MAC and padding.
SLICE = RECORD + 2**9

# Records that are delivered, or passed to the socket's transport, in one piece. From 128 KiB on malloc() maps memory for it,
# whose pages cost more than the decryption.
RECORDS_AT_ONCE = 4

Buffer = bytes | bytearray | memoryview


class _State(enum.Enum):
    HANDSHAKE = "handshake"
    OPEN = "open"
    CLOSING = "closing"  # close_notify is sent, and the peer's has not come
    LOST = "lost"


_HANDSHAKE, _OPEN, _CLOSING, _LOST = _State


class TLSTransport(asyncio.Transport, asyncio.Protocol):
    """The transport of a stream over TLS, and at the same time the protocol of the socket's transport under it.

    close() sends close_notify and waits until the peer closes too; what the peer sends until then is dropped. Renegotiation
    (TLS 1.2) is not supported: a write that needs it fails, and aborts the connection.
    """

    __slots__ = (
        "_context",
        "_deliver",
        "_error",
        "_has_ended",
        "_incoming",
        "_is_in_record",
        "_is_server_side",
        "_loop",
        "_most",
        "_object",
        "_outgoing",
        "_protocol",
        "_read",
        "_server_hostname",
        "_shutdown_timeout",
        "_state",
        "_take",
        "_timer",
        "_transport",
        "_waiter",
        "_write",
    )

    _object: ssl.SSLObject
    _incoming: ssl.MemoryBIO
    _outgoing: ssl.MemoryBIO
    _read: Callable[[int], bytes]
    _write: Callable[[Buffer], int]
    _deliver: Callable[[bytes], object]

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        protocol: asyncio.Protocol,
        context: ssl.SSLContext,
        take: Callable[[asyncio.Transport], object],
        *,
        server_side: bool,
        server_hostname: str | None,
        shutdown_timeout: float,
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._protocol: asyncio.Protocol | None = protocol
        self._context = context
        self._take: Callable[[asyncio.Transport], object] | None = take
        self._is_server_side = server_side
        self._server_hostname = server_hostname
        self._shutdown_timeout = shutdown_timeout
        self._state = _HANDSHAKE
        self._most = -1  # bytes: for how many at once data_received() may take the short way
        self._is_in_record = False  # OpenSSL may have a part of a record
        self._has_ended = False  # the peer has sent close_notify, or closed its direction of the connection
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    def start(self, received: bytes, timeout: float) -> "asyncio.Future[None]":
        """Begin the handshake; the future tells how it ends. `timeout` is in seconds. The transport has to be paused.

        On a server's side nothing is allocated for TLS until the client's first byte comes.

        Raises:
            ValueError: the context wants to check a host name, and there is none.
        """
        self._transport.set_protocol(self)
        if not self._is_server_side:
            self._make_object()
        self._waiter = waiter = self._loop.create_future()
        if timeout < FOR_EVER:
            self._timer = self._loop.call_later(timeout, self._time_out, timeout)
        try:
            if received:
                self._receive(received)
            elif not self._is_server_side:
                self._process([])
            self._transport.resume_reading()
        except BaseException:
            waiter.cancel()
            raise
        return waiter

    def _make_object(self) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = self._context.wrap_bio(
            self._incoming, self._outgoing, self._is_server_side, self._server_hostname
        )
        # The object's own methods do no more than call these, for every message.
        made: Any = self._object
        inner = made._sslobj if type(made) is ssl.SSLObject and hasattr(made, "_sslobj") else made
        self._read, self._write = inner.read, inner.write

    def _time_out(self, seconds: float) -> None:
        self._timer = None
        if self._state is _HANDSHAKE:
            self._fail(ConnectionAbortedError(f"the TLS handshake took longer than {seconds} seconds"))
        else:
            self.abort()

    # What the socket's transport calls.

    def data_received(self, data: bytes) -> None:
        """Decrypt and deliver."""
        if len(data) > self._most:
            self._receive(data)
            return
        # The way that most data go: they are one record, or the rest of one. So much has to be read as came, but where a part
        # of the record came before.
        incoming = self._incoming
        incoming.write(data)
        try:
            chunk = self._read(RECORD if self._is_in_record else len(data))
        except SSLWantReadError:
            self._is_in_record = True
            if self._outgoing.pending:
                self._flush()
        except SSLError as error:
            self._fail(error)
        else:
            if not chunk:
                self._end()
                self._pass_on([])
            elif incoming.pending:
                chunks = [chunk]
                self._process(chunks)
                self._pass_on(chunks)
            else:
                self._is_in_record = False
                self._deliver(chunk)

    def _receive(self, data: bytes) -> None:
        """Decrypt any number of bytes, in any state, and deliver them."""
        if self._state is _HANDSHAKE and self._is_server_side and not hasattr(self, "_object"):
            self._make_object()
        chunks: list[bytes] = []
        view = memoryview(data)
        for start in range(0, len(view), SLICE):
            if self._has_ended or self._state is _LOST:
                break
            self._incoming.write(view[start : start + SLICE])
            self._process(chunks)
            if len(chunks) >= RECORDS_AT_ONCE:
                self._deliver(b"".join(chunks))
                chunks.clear()
        self._pass_on(chunks)

    def _process(self, chunks: list[bytes]) -> None:
        """Do what the state demands with what is in the incoming BIO; append to `chunks` what is to be delivered."""
        if self._state is _CLOSING:
            self._shut_down()
            return
        try:
            if self._state is _HANDSHAKE:
                self._object.do_handshake()
                self._open()
            while chunk := self._read(RECORD):
                chunks.append(chunk)
            self._end()
        except SSLWantReadError:
            self._is_in_record = True  # perhaps
        except SSLError as error:
            self._fail(error)
            return
        if self._outgoing.pending:
            self._flush()

    def _open(self) -> None:
        self._state, self._most = _OPEN, SLICE
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        protocol, take, waiter = self._protocol, self._take, self._waiter
        assert protocol is not None
        assert take is not None
        assert waiter is not None
        self._deliver = protocol.data_received
        self._take = self._waiter = None
        take(self)
        if not waiter.done():
            waiter.set_result(None)

    def _pass_on(self, chunks: list[bytes]) -> None:
        if chunks and self._protocol is not None:
            self._deliver(b"".join(chunks))
        # The handler, which may have been resumed, may have closed meanwhile.
        if self._has_ended and self._state is _OPEN and self._protocol is not None:
            self._protocol.eof_received()

    def eof_received(self) -> bool:
        """End the stream; the other direction stays open."""
        if self._state is _HANDSHAKE:
            self._fail(ConnectionResetError("the peer closed the connection during the TLS handshake"))
        if self._state is not _OPEN:
            return False  # the transport closes
        if not self._has_ended:
            self._end()
            assert self._protocol is not None
            self._protocol.eof_received()
        return True

    def _end(self) -> None:
        self._has_ended = True
        self._most = -1

    def pause_writing(self) -> None:
        """Pass it on to the stream's protocol."""
        if self._protocol is not None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Pass it on to the stream's protocol."""
        if self._protocol is not None:
            self._protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass it on to the stream's protocol, or fail the handshake."""
        protocol, waiter = self._protocol, self._waiter
        self._state, self._most = _LOST, -1
        # Else all of them would be a cycle, for the garbage collector to undo.
        self._protocol = self._take = self._waiter = None
        self._deliver = _drop
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if waiter is not None:
            if not waiter.done():
                waiter.set_exception(exc or ConnectionResetError("the connection was lost during the TLS handshake"))
        elif protocol is not None:
            protocol.connection_lost(exc or self._error)

    def _fail(self, error: Exception) -> None:
        """Send the alert that says why, if OpenSSL has made one, and end the handshake or the connection with `error`."""
        error = error.with_traceback(None)  # whose frames refer to this
        is_handshake = self._state is _HANDSHAKE
        self._state, self._most = _LOST, -1
        if hasattr(self, "_object") and self._outgoing.pending:
            self._flush()
        if not is_handshake:
            self._error = error
            self._transport.abort()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)

    def _flush(self) -> None:
        self._transport.write(self._outgoing.read())

    # What a stream calls.

    def write(self, data: Buffer) -> None:
        """Send `data`. Does nothing on a transport that is closing."""
        if self._state is not _OPEN:
            return
        try:
            if len(data) <= RECORD:
                if data:
                    self._write(data)
                    self._transport.write(self._outgoing.read())
            else:
                self._write_much(data)
        except SSLError as error:
            self._fail(error)

    def _write_much(self, data: Buffer) -> None:
        write, outgoing = self._write, self._outgoing
        records: list[bytes] = []
        with memoryview(data) as given, given.cast("B") as view:
            for start in range(0, len(view), RECORD):
                write(view[start : start + RECORD])
                records.append(outgoing.read())
                if len(records) == RECORDS_AT_ONCE:
                    self._transport.write(b"".join(records))
                    records.clear()
        if records:
            self._transport.write(b"".join(records))

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Send all of them, in order."""
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        """Return False: write_eof() raises NotImplementedError, as that of the loops' TLS does."""
        return False

    def close(self) -> None:
        """Close in good order: send close_notify after all that was written, and wait until the peer closes too."""
        if self._state is _OPEN:
            self._state, self._most = _CLOSING, -1
            if self._shutdown_timeout < FOR_EVER:
                self._timer = self._loop.call_later(self._shutdown_timeout, self._time_out, self._shutdown_timeout)
            self._shut_down()
        elif self._state is _HANDSHAKE:
            self.abort()

    def _shut_down(self) -> None:
        # To unwrap over unread data is an error. That is raised for the peer's close_notify too, which has not come.
        is_over = self._has_ended
        try:
            _discard(self._object)
            self._object.unwrap()
            is_over = True
        except SSLWantReadError:
            pass
        except SSLError:  # such as of a peer that did not close so much as break off
            is_over = True
        if self._outgoing.pending:
            self._flush()
        if is_over:
            self._has_ended = True
            self._transport.close()

    def abort(self) -> None:
        """Close at once; what is unsent is lost."""
        if self._state is _OPEN:
            self._state = _CLOSING
            self._end()  # what comes still is dropped
        self._transport.abort()

    def is_closing(self) -> bool:
        """Return whether it is closing or closed."""
        return self._state is not _OPEN or self._transport.is_closing()

    def pause_reading(self) -> None:
        """Let the socket's transport read no more."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Let the socket's transport read."""
        self._transport.resume_reading()

    def is_reading(self) -> bool:
        """Return whether the socket's transport reads."""
        return self._transport.is_reading()

    def get_write_buffer_size(self) -> int:
        """Return how many bytes, encrypted, the kernel has not taken."""
        return self._transport.get_write_buffer_size()

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the socket's transport's: (low, high), in bytes."""
        return self._transport.get_write_buffer_limits()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the socket's transport's, in bytes."""
        self._transport.set_write_buffer_limits(high, low)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Deliver to another protocol from now on."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol, self._deliver = protocol, protocol.data_received

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol that data are delivered to."""
        assert self._protocol is not None
        return self._protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the ssl module tells of the connection, or what the socket's transport does."""
        if name == "sslcontext":
            return self._context
        if name in ("ssl_object", "peercert", "cipher", "compression") and hasattr(self, "_object"):
            made = self._object
            if name == "ssl_object":
                return made
            if name == "peercert":
                return made.getpeercert()
            return made.cipher() if name == "cipher" else made.compression()
        return self._transport.get_extra_info(name, default)


def _discard(tls_object: ssl.SSLObject) -> None:
    """Read, and drop, all that has come."""
    try:
        while tls_object.read(RECORD):
            pass
    except (SSLWantReadError, SSLZeroReturnError):
        pass


def _drop(data: bytes) -> None:
    """Deliver to nothing."""


async def start_tls(
    loop: asyncio.AbstractEventLoop,
    transport: asyncio.Transport,
    stream: asyncio.Protocol,
    context: ssl.SSLContext,
    received: bytes,
    take: Callable[[asyncio.Transport], object],
    *,
    server_side: bool,
    server_hostname: str | None = None,
    ssl_handshake_timeout: float | None = None,
    ssl_shutdown_timeout: float | None = None,
) -> asyncio.Transport:
    """Return a TLS transport over `transport`, of which `stream` has `received` bytes that belong to the handshake.

    `transport` has to be paused. `take` is called with the new one before any data comes. The timeouts are in seconds, 60 and
    30 if they are None.

    Raises:
        ssl.SSLError, ConnectionError: the handshake failed.
        ValueError: the context wants to check a host name, and there is none.
    """
    made = TLSTransport(
        loop,
        transport,
        stream,
        context,
        take,
        server_side=server_side,
        server_hostname=server_hostname,
        shutdown_timeout=ssl_shutdown_timeout or DEFAULT_SHUTDOWN_TIMEOUT,
    )
    try:
        await made.start(received, ssl_handshake_timeout or DEFAULT_HANDSHAKE_TIMEOUT)
    except BaseException:
        del made  # the traceback refers to this frame, and the reader to the exception
        raise
    return made
