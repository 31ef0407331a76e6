"""TLS over a connection: a transport that drives an ssl.SSLObject, on any loop and over any transport of its own.

It begins where the handshake has ended: aioecho.streams.handshake.

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
from contextlib import suppress
from ssl import SSLError, SSLWantReadError, SSLZeroReturnError
from typing import Any

from aioecho.streams.tls_info import TOLD_BY_SSL, Stream

__all__ = ["FOR_EVER", "SLICE", "TLSTransport"]

FOR_EVER = 1e6  # seconds: a timeout that never ends

# Bytes: the most plaintext in a TLS record, and so the most that SSL_read returns.
RECORD = 2**14

SLICE = RECORD + 2**9
"""Bytes: the most that is passed to OpenSSL at once. Its memory BIOs never shrink: this bounds what an idle connection keeps.
A whole record fits in, with its header, its MAC and padding."""

# Records that are delivered, or passed to the socket's transport, in one piece. From 128 KiB on malloc() maps memory for it,
# whose pages cost more than the decryption.
RECORDS_AT_ONCE = 4

# Bytes that OpenSSL may write by itself while its peer does not take what was sent before. An answer to a key update takes 27.
MOST_REPLIES = 2**14

Buffer = bytes | bytearray | memoryview


class _State(enum.Enum):
    OPEN = "open"
    CLOSING = "closing"  # close_notify is sent, and the peer's has not come
    LOST = "lost"


_OPEN, _CLOSING, _LOST = _State


class TLSTransport(asyncio.Transport, asyncio.Protocol):
    """The transport of a stream over TLS, and at the same time the protocol of the socket's transport under it.

    close() sends close_notify, and drops what comes until the peer closes too. A renegotiation (TLS 1.2) aborts the connection.
    """

    __slots__ = (
        "_deliver",
        "_error",
        "_has_ended",
        "_has_said_end",
        "_incoming",
        "_loop",
        "_most",
        "_object",
        "_outgoing",
        "_protocol",
        "_read",
        "_replies",
        "_shutdown_timeout",
        "_state",
        "_timer",
        "_transport",
        "_write",
        "is_delivering",
        "is_in_record",
        "open_from",
    )

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        transport: asyncio.Transport,
        protocol: Stream,
        context: ssl.SSLContext,
        tls_object: ssl.SSLObject,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        *,
        shutdown_timeout: float,
        round_trip: float,
    ) -> None:
        self._loop = loop
        self._transport = transport
        self._protocol: Stream | None = protocol
        self._deliver: Callable[[bytes], object] = protocol.data_received
        self._object, self._incoming, self._outgoing = tls_object, incoming, outgoing
        # The object's own methods do no more than call these, for every message.
        made: Any = tls_object
        inner = made._sslobj if type(made) is ssl.SSLObject and hasattr(made, "_sslobj") else made
        self._read: Callable[[int], bytes] = inner.read
        self._write: Callable[[Buffer], int] = inner.write
        self._shutdown_timeout = shutdown_timeout
        self._state = _OPEN
        self._most = SLICE  # bytes: for how many at once data_received() may take the short way
        self.is_in_record = False  # OpenSSL has a part of a record; or a whole one had no data, which is seldom
        self.is_delivering = False  # more of what the socket's transport has read is about to be delivered
        self._has_said_end = False  # by end_writing()
        self._has_ended = False  # the peer has sent close_notify, or closed its direction of the connection
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._replies = 0  # bytes that OpenSSL has written by itself since the peer had taken all
        self.open_from = loop.time() + round_trip  # for the peer, whose first message may come then

    # What the socket's transport calls.

    def data_received(self, data: bytes) -> None:
        """Decrypt and deliver."""
        if len(data) > self._most:
            self.receive(data)
            return
        # Most data are one record, or the rest of one. So much has to be read as came, but where a part of it came before.
        incoming = self._incoming
        incoming.write(data)
        try:
            chunk = self._read(RECORD if self.is_in_record else len(data))
        except SSLWantReadError:
            self.is_in_record = True
            if self._outgoing.pending:
                self._reply()
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
                self.is_in_record = False
                self._deliver(chunk)

    def receive(self, data: bytes) -> None:
        """Decrypt any number of bytes, and what is there already, in any state, and deliver them."""
        chunks: list[bytes] = []
        view = memoryview(data)
        for start in range(0, len(view) or 1, SLICE):
            if self._has_ended or self._state is _LOST:
                break
            self._incoming.write(view[start : start + SLICE])
            self._process(chunks)
            if len(chunks) >= RECORDS_AT_ONCE:
                self.is_delivering = start + SLICE < len(view)
                self._deliver(b"".join(chunks))
                chunks.clear()
        self.is_delivering = False
        self._pass_on(chunks)

    def _process(self, chunks: list[bytes]) -> None:
        """Do what the state demands with what is in the incoming BIO; append to `chunks` what is to be delivered."""
        if self._state is _CLOSING:
            self._shut_down()
            return
        has_come = self._incoming.pending > 0
        try:
            while chunk := self._read(RECORD):
                chunks.append(chunk)
                if not self._incoming.pending:  # OpenSSL takes no byte of the next record, and so has none
                    self.is_in_record = False
                    break
            else:
                self._end()
        except SSLWantReadError:
            self.is_in_record |= has_come
        except SSLZeroReturnError:  # for an end, once there is one of both directions
            self._end()
        except SSLError as error:
            self._fail(error)
            return
        if self._outgoing.pending:
            self._reply()

    def _pass_on(self, chunks: list[bytes]) -> None:
        if chunks and self._protocol is not None:
            self._deliver(b"".join(chunks))
        # The handler, which may have been resumed, may have closed meanwhile.
        if self._has_ended and self._state is _OPEN and self._protocol is not None:
            self._protocol.eof_received()

    def eof_received(self) -> bool:
        """End the stream; the other direction stays open."""
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
        """Pass it on to the stream's protocol."""
        protocol = self._protocol
        self._state, self._most = _LOST, -1
        # Else all of them would be a cycle, for the garbage collector to undo.
        self._protocol = None
        self._deliver = _drop
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if protocol is not None:
            protocol.connection_lost(exc or self._error)

    def _fail(self, error: Exception) -> None:
        """Send the alert that says why, if OpenSSL has made one, and end the connection with `error`."""
        self._error = error.with_traceback(None)  # whose frames refer to this
        self._state, self._most = _LOST, -1
        if self._outgoing.pending:
            self._transport.write(self._outgoing.read())
        self._transport.abort()

    def _reply(self) -> None:
        """Send what OpenSSL has written by itself: the answers to its peer's key updates, mostly.

        No write of a handler is bounded by them, so a peer that has them made and does not read them is cut off.
        """
        data = self._outgoing.read()
        if self._has_said_end:
            return
        self._transport.write(data)
        if not self._transport.get_write_buffer_size():
            self._replies = 0
            return
        self._replies += len(data)
        if self._replies > MOST_REPLIES and self._protocol is not None:
            self._protocol.abort_for("key updates")

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

    def end_writing(self) -> None:
        """Send close_notify and FIN after all that was written, and read on. A write from now on is a RuntimeError.

        close() does not wait for the peer any more then: it has been told.
        """
        if self._state is not _OPEN or self._has_said_end:
            return
        self._most = -1
        with suppress(SSLError):  # it wants the peer's, mostly
            self._object.unwrap()  # nothing that is whole is unread
        self._transport.write(self._outgoing.read())
        self._has_said_end = True
        self._write = _refuse
        self._transport.write_eof()

    def close(self) -> None:
        """Close in good order: send close_notify after all that was written, and wait until the peer closes too."""
        if self._state is _OPEN:
            self._state, self._most = _CLOSING, -1
            if self._has_said_end:
                self._transport.close()
                return
            if self._shutdown_timeout < FOR_EVER:
                self._timer = self._loop.call_later(self._shutdown_timeout, self.abort)
            self._shut_down()

    def _shut_down(self) -> None:
        # To unwrap over unread data is an error. That is raised for the peer's close_notify too, which has not come.
        is_over = self._has_ended
        try:
            with suppress(SSLWantReadError, SSLZeroReturnError):
                while self._object.read(RECORD):
                    pass
            self._object.unwrap()
            is_over = True
        except SSLWantReadError:
            pass
        except SSLError:  # such as of a peer that did not close so much as break off
            is_over = True
        if self._outgoing.pending:
            self._reply()
        if is_over:
            self._has_ended = True
            self._transport.close()

    def abort(self) -> None:
        """Close at once; what is unsent is lost."""
        if self._state is _OPEN:
            self._state = _CLOSING
            self._end()
            self._deliver = _drop  # also what was decrypted just now
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
        made: Any = protocol
        self._protocol, self._deliver = made, made.data_received

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol that data are delivered to."""
        assert self._protocol is not None
        return self._protocol  # type: ignore[return-value]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the ssl module tells of the connection, or what the socket's transport does."""
        tell = TOLD_BY_SSL.get(name)
        return self._transport.get_extra_info(name, default) if tell is None else tell(self._object)


def _refuse(data: Buffer) -> int:
    raise RuntimeError("Cannot call write() after the server has ended the stream")


def _drop(data: bytes) -> None:
    """Deliver to nothing."""
