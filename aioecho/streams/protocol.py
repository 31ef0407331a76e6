"""The stream pair that a handler talks through: its writer, and the one asyncio protocol that feeds its reader.

Both are asyncio's with the same behaviour to the letter.
"""

import asyncio
import contextlib
import socket
import ssl as ssl_module
import struct
import sys
from collections.abc import Iterable
from typing import Any

from aioecho.runtime.driver import Waiter
from aioecho.streams.reader import DEFAULT_LIMIT, Buffer, StreamReader
from aioecho.streams.tls import FOR_EVER, start_tls

__all__ = [
    "CountingStreamProtocol",
    "StreamProtocol",
    "StreamReader",
    "StreamWriter",
    "reset_when_closed",
]

# The most that asyncio's transports read at a time. By themselves they ask for 256 KiB, for which malloc() maps memory at each
# read and unmaps it, as it does from 128 KiB on unless its heap happens to have room. That was measured as twice the processor
# time of a short message, and 3.5 KiB more for an idle connection.
READ_BYTES = 2**17 - 2**12

# asyncio's transports forgot their high-water mark in writelines(), so that drain() never waited (CVE-2024-12254). This can
# go with the last Python that has it.
WRITELINES_NEVER_PAUSES = (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)


class StreamWriter(asyncio.StreamWriter):
    """asyncio's StreamWriter. Made by the server."""

    _transport: asyncio.Transport
    _protocol: "StreamProtocol"
    _reader: StreamReader | None
    _loop: asyncio.AbstractEventLoop

    def __init__(
        self,
        transport: asyncio.Transport,
        protocol: "StreamProtocol",
        reader: StreamReader | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        # Not super().__init__(): it makes a future that nothing uses, for every connection.
        self._transport = transport
        self._protocol = protocol
        self._reader = reader
        self._loop = loop

    def write(self, data: Buffer) -> None:
        """Send `data` as soon as the peer takes it; does not wait: :meth:`drain` does.

        A server's stream is cut off if more than Limits.max_write_buffer waits to be sent already.
        """
        protocol = self._protocol
        if not protocol._is_special or protocol.note_write(data):
            self._transport.write(data)

    def writelines(self, data: Iterable[Buffer]) -> None:
        """Send all of `data`, in order."""
        if WRITELINES_NEVER_PAUSES or self._protocol._is_special:
            self.write(b"".join(data))
        else:
            self._transport.writelines(data)

    def close(self) -> None:
        """Close the connection when all that was written is sent."""
        transport, reader = self._transport, self._reader
        if not transport.is_closing():  # one of asyncio's for TLS that is closed twice can't be aborted any more
            if self._protocol.is_tls:
                self._protocol.stir()  # it waits until its peer closes too, which has its time
                if reader is not None and reader._paused:
                    transport.resume_reading()  # or asyncio's would not see that its peer closes too
            transport.close()

    def write_eof(self) -> None:
        """End this direction when all that was written is sent. Does nothing on a connection that is lost."""
        if not self._protocol.is_lost:  # uvloop's transport would raise RuntimeError
            try:
                self._transport.write_eof()
            except OSError:  # asyncio's: the peer has reset the connection, and the loop does not know yet
                if self._reader is None or self._reader._paused:
                    self._transport.abort()  # else it will learn that, and with what it broke, when it reads

    async def drain(self) -> None:
        """Wait, once more than the high-water mark waits to be sent, until it is no more than the low-water mark.

        Raises:
            ConnectionResetError: the connection is gone.
            OSError: what the reader would raise.
        """
        reader, protocol, transport = self._reader, self._protocol, self._transport
        if not protocol._is_special and not transport.is_closing():
            return
        if reader is not None and reader._exception is not None:
            raise reader._exception
        if transport.is_closing():
            # Give connection_lost() a turn to run, else a loop of write() and drain() would never learn of it.
            await asyncio.sleep(0)
        if protocol.paused_since is not None or protocol.is_lost:
            await protocol._drain_helper()

    async def start_tls(
        self,
        sslcontext: ssl_module.SSLContext,
        *,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> None:
        """Go over to TLS on this connection, on the side that this program has in it (server or client).

        What the reader had buffered is taken for the beginning of the handshake. So a client may send its hello right
        behind the command that asks for TLS, and nobody can slip plain text in between the two (CVE-2011-0411).

        Raises:
            ssl.SSLError, ConnectionError: the handshake failed. The connection is closed.
        """
        protocol, reader, transport = self._protocol, self._reader, self._transport
        await self.drain()
        received = reader._take(len(reader._buffer)) if reader is not None else b""
        if isinstance(protocol, CountingStreamProtocol):
            protocol.bytes_in -= len(received)
        transport.pause_reading()  # what comes now is TLS's; uvloop would read on before it gets to start that
        try:
            if reader is not None and reader._eof:  # the loop's TLS would wait for it until its time is over
                raise ConnectionResetError("the peer has closed the connection before the TLS handshake")
            self._transport = await start_tls(
                self._loop,
                transport,
                protocol,
                sslcontext,
                received,
                protocol.replace_transport,
                server_side=protocol.is_server_side,
                server_hostname=server_hostname,
                ssl_handshake_timeout=ssl_handshake_timeout,
                # By itself it would count, on the server's side, while a large reply is still being sent.
                ssl_shutdown_timeout=ssl_shutdown_timeout or (FOR_EVER if protocol.is_server_side else None),
            )
        except BaseException as error:
            # The loops' TLS does not tell the protocol under it of a connection that is lost in mid-handshake.
            transport.abort()
            if reader is not None and isinstance(error, OSError):
                reader.set_exception(error)  # now, for whoever asks whether this is the peer's doing
            self._loop.call_soon(protocol.connection_lost, error if isinstance(error, Exception) else None)
            raise


class StreamProtocol(Waiter, asyncio.Protocol):
    """Connects a transport with a reader and a writer, and is what the reader waits for.

    `is_server_side` says which side start_tls() takes; `max_unsent` is Limits.max_write_buffer. `reader` is there from the
    start, `transport` from the time that it calls connection_made(); then :meth:`make_writer` makes the writer. `is_lost`
    and `lost_with` tell whether and how it ended, `cut_for` why this side has cut it off, and `peer_has_closed` whether the
    peer has sent its last. `due` is when its timeouts are looked at next, and `paused_since` since when drain() waits, if it
    does, in the loop's time. `bytes_in` and `bytes_out` count what is read and written, with `counts`.

    The methods with an underscore are those that asyncio.StreamWriter expects of its protocol.
    """

    __slots__ = (
        "_is_special",
        "_max_unsent",
        "_socket_transport",
        "_stays_open_at_eof",
        "_waiting_to_close",
        "_waiting_to_write",
        "cut_for",
        "due",
        "is_lost",
        "is_server_side",
        "is_tls",
        "lost_with",
        "paused_since",
        "peer_has_closed",
        "reader",
        "transport",
    )

    transport: asyncio.Transport
    _socket_transport: asyncio.Transport

    counts = False
    bytes_in = bytes_out = 0

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        limit: int = DEFAULT_LIMIT,
        max_unsent: int | None = None,
        is_server_side: bool,
    ) -> None:
        Waiter.__init__(self, loop)
        self.reader = StreamReader(limit, loop, _news=self)
        self._max_unsent = max_unsent
        self.is_server_side = is_server_side
        self.lost_with: Exception | None = None
        self.cut_for: str | None = None
        self.peer_has_closed = self.is_lost = self.is_tls = False
        self.due = 0.0
        self._is_special = self.counts
        self._stays_open_at_eof = True
        self.paused_since: float | None = None
        self._waiting_to_write: tuple[asyncio.Future[None], ...] = ()
        self._waiting_to_close: tuple[asyncio.Future[None], ...] = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport, of a socket; TLS's takes its place later."""
        made: Any = transport
        self.transport = self._socket_transport = self.reader._transport = made
        if isinstance(self._loop, asyncio.SelectorEventLoop):
            made.max_size = READ_BYTES
            if self.is_server_side:
                # It would begin to watch the socket in a callback of its own, where an error is nobody's: the connection
                # would stay, and never hear of anything.
                made.pause_reading()

    def begin_reading(self) -> None:
        """Let a server's transport read.

        Raises:
            OSError: the loop can't watch its socket, as epoll has no room or no memory.
        """
        if isinstance(self._loop, asyncio.SelectorEventLoop):
            try:
                self.transport.resume_reading()
            except (OSError, MemoryError):
                self.transport.abort()  # else it would be in the way of later ones with the same descriptor
                raise

    def is_socket_read(self) -> bool:
        """Tell whether the loop reads the socket: not while somebody has paused the transport."""
        return self._socket_transport.is_reading()

    def make_writer(self) -> StreamWriter:
        """Return a writer; to keep it here would tie the two into a cycle, for the garbage collector to undo."""
        return StreamWriter(self.transport, self, self.reader, self._loop)

    def replace_transport(self, transport: asyncio.Transport) -> None:
        """Take the TLS transport in place of the one under it."""
        self.is_tls = True
        self._stays_open_at_eof = False  # it complains of a protocol that wants to stay half open
        self.transport = self.reader._transport = transport

    data_received = Waiter.deliver  # type: ignore[assignment] # resumes whoever waits for data

    def buffer_unawaited(self, data: bytes | None) -> bool:
        """Buffer what nobody waits for. What comes after the end of the stream is dropped. None is the news of the end."""
        reader = self.reader
        reader._keep_item()
        if data is None:
            reader._wakeup_waiter()
        elif not reader._eof:
            reader.feed_data(data)
        return True

    def eof_received(self) -> bool:
        """End the stream; the other direction stays open where that is possible."""
        self.peer_has_closed = True
        self.reader._end()
        # A handler that ends then, as most do, has its connection closed by the time that this returns.
        self.deliver(None)
        return self._stays_open_at_eof

    def discard(self) -> None:
        """Drop whatever comes from now on, and close the connection once the peer has closed its direction."""
        self._stays_open_at_eof = False
        self.reader._buffer.clear()
        self.reader.feed_eof()
        if self.reader._paused:
            self.reader._maybe_resume_transport()  # type: ignore[attr-defined]

    def note_write(self, data: Buffer) -> bool:
        """Return whether to write `data`; if too much waits to be sent already, cut the connection off.

        Called where that is possible, or the connection lost: then loops would warn for each write, or raise.
        """
        if self.due:
            self.stir()
        if self.is_lost or self.cut_for is not None:
            return False
        if self._max_unsent is not None and self.unsent() > self._max_unsent:
            self.cut("write buffer")
            return False
        return True

    def cut(self, reason: str) -> None:
        """Cut the connection off: throw away what is unsent. `cut_for` is the first such reason."""
        if not self.is_lost:
            self.cut_for = self.cut_for or reason
            self.stir()
            if self.paused_since is not None:
                reset_when_closed(self.transport)
            self.transport.abort()

    def unsent(self) -> int:
        """Return how many bytes wait that the kernel has not taken."""
        # The TLS transport of a server's stream holds nothing back but for moments: aioecho.streams.tls.
        return self._socket_transport.get_write_buffer_size()

    def interrupt_drains(self, exc: Exception) -> bool:
        """Raise `exc` in every drain() that waits; return whether any does."""
        waiting = [each for each in self._waiting_to_write if not each.done()]
        for each in waiting:
            each.set_exception(exc)
        return bool(waiting)

    def heed(self) -> None:
        """Let writers look at everything before they write, or after, as long as there is anything to look at."""
        self._is_special = (
            self.counts
            or self.due > 0
            or self.paused_since is not None
            or self.is_lost
            or self.cut_for is not None
            or self.reader._exception is not None
        )

    def rest(self, until: float) -> None:
        """Let nobody look at its timeouts until then, or until a read comes to wait or something is written."""
        self.due = until
        self._is_special = True  # for the next write to tell

    def stir(self) -> None:
        """Let its timeouts be looked at soon."""
        self.due = 0.0
        self.heed()

    def pause_writing(self) -> None:
        """Let drain() wait."""
        self.paused_since = self._loop.time()
        self.stir()

    def resume_writing(self) -> None:
        """Let drain() return."""
        self.paused_since = None
        self.heed()
        for waiting in self._waiting_to_write:
            _set_result(waiting)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the stream, with `exc` if the connection broke. A second call changes nothing."""
        if self.is_lost:
            return
        self.is_lost = True
        self._is_special = True
        self.lost_with = exc
        reader = self.reader
        if exc is not None:
            reader.set_exception(exc)
        elif not reader._eof:
            reader.feed_eof()
        if self.item is not None:
            reader._keep_item()
        reader._news = None  # type: ignore[assignment] # no read waits any more, and without the cycle both go at once
        for waiting in self._waiting_to_write:
            if exc is None or waiting.done():
                _set_result(waiting)
            else:
                waiting.set_exception(exc)
        for waiting in self._waiting_to_close:
            _set_result(waiting)

    async def _drain_helper(self) -> None:
        if self.is_lost:
            raise ConnectionResetError("Connection lost")
        if self.paused_since is not None:
            waiting = self._loop.create_future()
            self._waiting_to_write += (waiting,)
            try:
                await waiting
            finally:
                self._waiting_to_write = tuple(each for each in self._waiting_to_write if each is not waiting)

    async def wait_lost(self) -> None:
        """Wait until the connection is closed, or broke."""
        if not self.is_lost:
            waiting = self._loop.create_future()
            self._waiting_to_close += (waiting,)
            await waiting

    async def _get_close_waiter(self, writer: asyncio.StreamWriter) -> None:
        await self.wait_lost()
        if self.lost_with is not None:
            raise self.lost_with


class CountingStreamProtocol(StreamProtocol):
    """A StreamProtocol that counts bytes, which costs every message some time."""

    __slots__ = ("bytes_in", "bytes_out")

    counts = True

    def __init__(self, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        super().__init__(loop, **options)
        self.bytes_in = self.bytes_out = 0

    def data_received(self, data: bytes) -> bool:  # type: ignore[override]
        """Count, and do as for any stream."""
        self.bytes_in += len(data)
        return self.deliver(data)

    def note_write(self, data: Buffer) -> bool:
        """Count, and do as for any stream."""
        is_written = super().note_write(data)
        if is_written:
            self.bytes_out += memoryview(data).nbytes
        return is_written


def reset_when_closed(transport: asyncio.BaseTransport) -> None:
    """Let a connection end with a reset: for one that is closed over data that its peer has not taken.

    Otherwise the kernel goes on offering the peer what it has in its own buffer, megabytes and for minutes, and then tells it
    that this was all.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # it is closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _set_result(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
