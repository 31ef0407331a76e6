"""The stream pair that a handler talks through, and the one asyncio protocol that feeds it.

Both classes are asyncio's with the same behaviour to the letter. What differs is how data gets to a coroutine that waits
for it: at once, through a :class:`~aioecho.driver.Waiter`, and as the chunk that the transport made, with no copy into a
buffer and out of it again.
"""

import asyncio
import contextlib
import socket
import ssl as ssl_module
import struct
import sys
from asyncio import IncompleteReadError, LimitOverrunError
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal, SupportsIndex, cast

from aioecho.driver import Waiter, steps
from aioecho.tls import FOR_EVER, start_tls

__all__ = [
    "DEFAULT_LIMIT",
    "CountingStreamProtocol",
    "StreamProtocol",
    "StreamReader",
    "StreamWriter",
    "reset_when_closed",
]

DEFAULT_LIMIT = 2**16
"""Bytes: asyncio's default for the longest line, and half of what a reader buffers before it pauses the transport."""

# asyncio's transports forgot their high-water mark in writelines(), so that drain() never waited (CVE-2024-12254). This can
# go with the last Python that has it.
WRITELINES_NEVER_PAUSES = (3, 12) <= sys.version_info < (3, 12, 9) or (3, 13) <= sys.version_info < (3, 13, 2)

Buffer = bytes | bytearray | memoryview


class _Slow:
    """In place of a waiter where nobody waits, and a read has to look before it does; false, as None is."""

    def __bool__(self) -> Literal[False]:
        return False


_SLOW = _Slow()


class StreamReader(asyncio.StreamReader):
    """asyncio's StreamReader, faster.

    Made by the server. Anybody may call :meth:`feed_data`, :meth:`feed_eof` and :meth:`set_exception`, as with asyncio's.
    On every version of Python `readuntil` takes a tuple of separators too, as it does in 3.13's.
    """

    # asyncio's own names: its methods that are inherited (repr, at_eof, feed_data, ...) go by them.
    _buffer: bytearray
    _eof: bool
    _exception: BaseException | None
    _limit: int
    _loop: asyncio.AbstractEventLoop
    _paused: bool
    _transport: asyncio.ReadTransport | None
    _awaited: "Waiter | _Slow | None"  # what a read waits for; else None if the next may wait without looking further

    _ends_when: Callable[[], bool] | None = None
    _interruption: Exception | None = None
    _unawaited: "_Slow | None"  # what _awaited is, or will be, when nobody waits
    _message_began: float | None = None  # when a read came to wait for the rest of what it has begun to read
    _seen_idle: float | None = None  # when a visitor first found the wait that goes on

    def __init__(
        self,
        limit: int = DEFAULT_LIMIT,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        _news: Waiter | None = None,
    ) -> None:
        super().__init__(limit, loop)
        self._news = _news if _news is not None else Waiter(self._loop)
        self._unawaited = None  # not as the class's, which 3.11 would look up anew for every read

    @property
    def _waiter(self) -> "Waiter | _Slow | None":  # what asyncio's own methods look for
        return self._awaited or None

    @_waiter.setter
    def _waiter(self, waiter: Waiter | None) -> None:
        self._awaited = waiter

    def _slow_down(self) -> None:
        """Let every read look at everything before it waits, until :meth:`_speed_up` finds nothing to look at any more."""
        self._unawaited = _SLOW
        if self._awaited is None:
            self._awaited = _SLOW

    def _speed_up(self) -> None:
        if self._unawaited is not None and not (
            self._buffer
            or self._eof
            or self._paused
            or self._exception is not None
            or self._interruption is not None
            or self._ends_when is not None
        ):
            self._unawaited = None
            if self._awaited is _SLOW:
                self._awaited = None

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """Buffer `data`, and wake whoever waits for it."""
        self._slow_down()
        super().feed_data(data)

    def feed_eof(self) -> None:
        """End the stream after what is buffered."""
        self._slow_down()
        super().feed_eof()

    def set_exception(self, exc: BaseException) -> None:
        """Make this and every later read raise `exc`."""
        self._exception = exc
        self._slow_down()
        if isinstance(self._news, StreamProtocol):
            self._news.heed()  # drain() raises it too
        self._wakeup_waiter()

    def end_when(self, no_more_comes: Callable[[], bool]) -> None:
        """End the stream at the first wait for data, with none buffered, at which `no_more_comes()` is true.

        For a server that stops: what the peer has sent by then is still read. Asked at once if a reader waits already.
        """
        self._ends_when = no_more_comes
        self._slow_down()
        self._end_if_idle()

    def interrupt(self, exc: Exception) -> None:
        """Raise `exc` in the read that waits now; later ones go on as if nothing had been."""
        self._interruption = exc
        self._slow_down()
        self._wakeup_waiter()

    def _take_interruption(self) -> Exception | None:
        interruption, self._interruption = self._interruption, None
        return interruption

    def _raise_interruption(self) -> None:
        interruption = self._take_interruption()
        self._message_began = None  # who catches it gives the peer as much time again
        if interruption is not None:
            raise interruption

    def waits(self, now: float) -> tuple[str, float] | None:
        """Tell for what a read waits, "idle" or "message", and since when; None if none does. `now` is the loop's time.

        "idle" is for the first byte, counted from the first call that meets the wait, so that reading need not look at the
        clock; "message" for the rest, counted from the first byte.
        """
        if not self._awaited:
            return None
        if self._message_began is not None:
            return "message", self._message_began
        if self._seen_idle is None:
            self._seen_idle = now
            self._slow_down()  # for the next read to forget it; so a read that nobody has seen need not
        return "idle", self._seen_idle

    def _end_if_idle(self) -> None:
        waits = self._awaited and not self._buffer and not self._eof
        if waits and self._ends_when is not None and self._ends_when():
            self.feed_eof()

    def _wakeup_waiter(self) -> None:
        if self._awaited:
            self._awaited.wake()

    @steps
    def _wait(self, func_name: str) -> Generator[Any, None, None]:
        """Wait for news, and then look: at the buffer, at the end of the stream. Wakes without news are possible."""
        if self._awaited:
            raise RuntimeError(f"{func_name}() called while another coroutine is already waiting for incoming data")
        if self._exception is not None:
            raise self._exception
        if self._interruption is not None:  # of a read that was cancelled before it met it
            self._take_interruption()
        if self._paused:
            # To wait while the transport is paused would be for ever: readexactly() of more than the limit.
            self._paused = False
            assert self._transport is not None
            self._transport.resume_reading()
            if self._ends_when is not None:
                # A TLS transport may hold data of its own, which it delivers in the next turn.
                self._loop.call_soon(self._loop.call_soon, self._end_if_idle)
        elif self._ends_when is not None and not self._buffer and self._ends_when():
            self._eof = True
            return
        self._speed_up()
        if self._buffer and self._message_began is None:
            self._message_began = self._loop.time()
        self._seen_idle = None
        self._awaited = self._news
        try:
            yield self._news
        finally:
            self._awaited = self._unawaited
            self._keep_item()
        if self._interruption is not None:
            self._raise_interruption()
        if self._exception is not None and not self._buffer:
            raise self._exception

    def _keep(self, chunk: bytes) -> None:
        """Buffer a chunk that was handed over."""
        self._slow_down()
        self._buffer.extend(chunk)
        if len(self._buffer) > 2 * self._limit and not self._paused and self._transport is not None:
            try:
                self._transport.pause_reading()
            except NotImplementedError:
                self._transport = None  # as asyncio: it can't be paused, so never ask again
            else:
                self._paused = True

    def _keep_item(self) -> None:
        """Buffer a chunk that was handed over to somebody who has not taken it, before anything that came later."""
        news = self._news
        if news is not None and (chunk := news.take()) is not None:
            self._keep(chunk)

    def _take(self, size: int) -> bytes:
        """Take `size` bytes, or as many as there are, from the front of the buffer."""
        buffer = self._buffer
        if size >= len(buffer):
            data = bytes(buffer)
            buffer.clear()
        else:
            data = bytes(memoryview(buffer)[:size])
            del buffer[:size]
        self._message_began = None
        if self._paused:
            self._maybe_resume_transport()  # type: ignore[attr-defined]
        self._speed_up()
        return data

    # In read(), readline(), its twin __anext__() and readexactly(), the way that most calls go comes first: nothing is
    # buffered, so wait, and return the chunk that is handed over. It is _wait() written out, and saves its coroutine.

    @steps
    def read(self, n: int = -1) -> Generator[Any, None, bytes]:
        """Read up to `n` bytes, as soon as there are any; until the end of the stream if `n` is negative.

        Return b"" at the end of the stream, and at once if `n` is 0.

        Raises:
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        if self._awaited is None and n > 0:
            self._awaited = waiter = self._news
            try:
                yield waiter
            except BaseException:
                self._awaited = self._unawaited
                self._keep_item()
                raise
            self._awaited = self._unawaited
            chunk: bytes | None = waiter.item
            if chunk is not None:
                waiter.item = None
                if len(chunk) <= n:
                    return chunk
                self._keep(chunk)
                return self._take(n)
            if self._interruption is not None:
                self._raise_interruption()
            if self._buffer:
                return self._take(n)
        if self._exception is not None:
            raise self._exception
        if n == 0:
            return b""
        if n < 0:
            blocks = []
            while block := (yield from self.read(self._limit).__await__()):
                blocks.append(block)
            return b"".join(blocks)
        while not self._buffer and not self._eof:
            yield from self._wait("read").__await__()
        return self._take(n)

    @steps
    def readline(self) -> Generator[Any, None, bytes]:
        r"""Read up to and with the next b"\n"; at the end of the stream, what is left, which may be b"".

        Raises:
            ValueError: the line is longer than the limit. It is removed, as far as it has come.
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        if self._awaited is None:
            self._awaited = waiter = self._news
            try:
                yield waiter
            except BaseException:
                self._awaited = self._unawaited
                self._keep_item()
                raise
            self._awaited = self._unawaited
            chunk: bytes | None = waiter.item
            if chunk is not None:
                waiter.item = None
                end = chunk.find(b"\n") + 1
                if end == len(chunk) <= self._limit:
                    return chunk
                self._keep(chunk)
            elif self._interruption is not None:
                self._raise_interruption()
        return self._buffered_line() or (yield from self._readline().__await__())

    @steps
    def __anext__(self) -> Generator[Any, None, bytes]:
        if self._awaited is None:
            self._awaited = waiter = self._news
            try:
                yield waiter
            except BaseException:
                self._awaited = self._unawaited
                self._keep_item()
                raise
            self._awaited = self._unawaited
            chunk: bytes | None = waiter.item
            if chunk is not None:
                waiter.item = None
                end = chunk.find(b"\n") + 1
                if end == len(chunk) <= self._limit:
                    return chunk
                self._keep(chunk)
            elif self._interruption is not None:
                self._raise_interruption()
        line = self._buffered_line() or (yield from self._readline().__await__())
        if line:
            return line
        raise StopAsyncIteration

    def _buffered_line(self) -> bytes:
        """Take a whole line from the buffer, or nothing if that takes more than a look."""
        end = self._buffer.find(b"\n") + 1
        return self._take(end) if 0 < end <= self._limit and self._exception is None else b""

    async def _readline(self) -> bytes:
        try:
            return await self.readuntil(b"\n")
        except IncompleteReadError as error:
            return error.partial
        except LimitOverrunError as error:
            if self._buffer.startswith(b"\n", error.consumed):
                del self._buffer[: error.consumed + 1]
            else:
                self._buffer.clear()
            self._message_began = None
            self._maybe_resume_transport()  # type: ignore[attr-defined]
            raise ValueError(error.args[0]) from error

    async def readuntil(self, separator: Buffer | tuple[Buffer, ...] = b"\n") -> bytes:  # type: ignore[override]
        """Read up to and with `separator`, or with the one of a tuple of separators that ends first.

        Raises:
            IncompleteReadError: the stream ended before; its `partial` holds what came.
            LimitOverrunError: more than the limit came before a separator. All of it stays in the buffer.
            ValueError: the separator is empty.
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        separators = sorted(separator, key=len) if isinstance(separator, tuple) else [separator]
        if not separators:
            raise ValueError("Separator should contain at least one element")
        shortest, longest = len(separators[0]), len(separators[-1])
        if shortest == 0:
            raise ValueError("Separator should be at least one-byte string")
        if self._exception is not None:
            raise self._exception
        buffer = self._buffer
        searched = 0  # before this offset no separator starts
        while True:
            if len(buffer) - searched >= shortest:
                # Shortest first, so that of two which end together the later start counts.
                found = [(start + len(s), start) for s in separators if (start := buffer.find(s, searched)) != -1]
                if found:
                    end, start = min(found, key=_end_of_match)
                    if start > self._limit:
                        raise LimitOverrunError("Separator is found, but chunk is longer than limit", start)
                    return self._take(end)
                searched = max(0, len(buffer) + 1 - longest)
                if searched > self._limit:
                    raise LimitOverrunError("Separator is not found, and chunk exceed the limit", searched)
            if self._eof:
                raise IncompleteReadError(self._take(len(buffer)), None)
            await self._wait("readuntil")

    @steps
    def readexactly(self, n: int) -> Generator[Any, None, bytes]:
        """Read exactly `n` bytes; the limit does not bound them.

        Raises:
            IncompleteReadError: the stream ended before; its `partial` holds what came.
            ValueError: `n` is negative.
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        if n < 0:
            raise ValueError("readexactly size can not be less than zero")
        if self._exception is not None:
            raise self._exception
        if n == 0:
            return b""
        if self._awaited is None:
            self._awaited = waiter = self._news
            try:
                yield waiter
            except BaseException:
                self._awaited = self._unawaited
                self._keep_item()
                raise
            self._awaited = self._unawaited
            chunk: bytes | None = waiter.item
            if chunk is not None:
                waiter.item = None
                if len(chunk) == n:
                    return chunk
                self._keep(chunk)
            elif self._interruption is not None:
                self._raise_interruption()
        while len(self._buffer) < n:
            if self._eof:
                raise IncompleteReadError(self._take(len(self._buffer)), n)
            yield from self._wait("readexactly").__await__()
        return self._take(n)


def _end_of_match(match: tuple[int, int]) -> int:
    return match[0]


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
            if self._protocol.is_tls and reader is not None and reader._paused:
                transport.resume_reading()  # or asyncio's would not see that its peer closes too
            transport.close()

    def write_eof(self) -> None:
        """End this direction when all that was written is sent. Does nothing on a connection that is lost."""
        if not self._protocol._connection_lost:  # uvloop's transport would raise RuntimeError
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
        if protocol._paused or protocol._connection_lost:
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
    peer has sent its last. `bytes_in` and `bytes_out` count what is read and written, with `counts`.
    """

    __slots__ = (
        "_connection_lost",
        "_is_special",
        "_max_unsent",
        "_paused",
        "_socket_transport",
        "_stays_open_at_eof",
        "_waiting_to_close",
        "_waiting_to_write",
        "cut_for",
        "is_server_side",
        "is_tls",
        "lost_with",
        "peer_has_closed",
        "reader",
        "transport",
    )

    transport: asyncio.Transport

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
        super().__init__(loop)
        self.reader = StreamReader(limit, loop, _news=self)
        self._max_unsent = max_unsent
        self.is_server_side = is_server_side
        self.lost_with: Exception | None = None
        self.cut_for: str | None = None
        self.peer_has_closed = False
        self._is_special = self.counts
        self._stays_open_at_eof = True
        # These two and the methods with an underscore are those that asyncio.StreamWriter expects of its protocol.
        self._connection_lost = False
        self._paused = False
        self._waiting_to_write: tuple[asyncio.Future[None], ...] = ()
        self._waiting_to_close: tuple[asyncio.Future[None], ...] = ()

    @property
    def is_lost(self) -> bool:
        """Whether the connection is closed, or broke."""
        return self._connection_lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._socket_transport = cast(asyncio.Transport, transport)
        self.replace_transport(self._socket_transport)

    def make_writer(self) -> StreamWriter:
        """Return a writer; to keep it here would tie the two into a cycle, for the garbage collector to undo."""
        return StreamWriter(self.transport, self, self.reader, self._loop)

    def replace_transport(self, transport: asyncio.Transport) -> None:
        """Take the TLS transport in place of the plain one under it, or the first of all."""
        # A TLS transport complains of a protocol that wants to stay half open.
        self.is_tls = transport.get_extra_info("sslcontext") is not None
        self._stays_open_at_eof = not self.is_tls
        self.transport = transport
        self.reader._transport = transport
        if self.is_tls:
            # uvloop forgets what it has received, and not passed on to a reader that is paused, when the peer closes. So let
            # it receive no more than it passes on: it then learns of the end when all before it was read.
            cast(Any, transport).set_read_buffer_limits(high=1, low=0)

    data_received = Waiter.deliver  # type: ignore[assignment] # resumes whoever waits for data

    def refuse(self, data: bytes) -> bool:
        """Buffer what nobody waits for. What comes after the end of the stream is dropped."""
        reader = self.reader
        reader._keep_item()
        if not reader._eof:
            reader.feed_data(data)
        return True

    def eof_received(self) -> bool:
        """End the stream; the other direction stays open where that is possible."""
        self.peer_has_closed = True
        self.reader.feed_eof()
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
        if self._connection_lost or self.cut_for is not None:
            return False
        if self._max_unsent is not None and self.unsent() > self._max_unsent:
            self.cut("write buffer")
            return False
        return True

    def cut(self, reason: str) -> None:
        """Cut the connection off: throw away what is unsent. `cut_for` is the first such reason."""
        if not self._connection_lost:
            self.cut_for = self.cut_for or reason
            self.heed()
            if self._paused:
                reset_when_closed(self.transport)
            self.transport.abort()

    def unsent(self) -> int:
        """Return how many bytes wait that the kernel has not taken."""
        # The TLS transport of a server's stream holds nothing back but for moments: aioecho.tls.
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
            or self._paused
            or self._connection_lost
            or self.cut_for is not None
            or self.reader._exception is not None
        )

    def pause_writing(self) -> None:
        """Let drain() wait."""
        self._paused = True
        self.heed()

    def resume_writing(self) -> None:
        """Let drain() return."""
        self._paused = False
        self.heed()
        for waiting in self._waiting_to_write:
            _set_result(waiting)

    def connection_lost(self, exc: Exception | None) -> None:
        """End the stream, with `exc` if the connection broke. A second call changes nothing."""
        if self._connection_lost:
            return
        self._connection_lost = True
        self.heed()
        self.lost_with = exc
        reader = self.reader
        if exc is None:
            reader.feed_eof()
        else:
            reader.set_exception(exc)
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
        if self._connection_lost:
            raise ConnectionResetError("Connection lost")
        if self._paused:
            waiting = self._loop.create_future()
            self._waiting_to_write += (waiting,)
            try:
                await waiting
            finally:
                self._waiting_to_write = tuple(each for each in self._waiting_to_write if each is not waiting)

    async def wait_lost(self) -> None:
        """Wait until the connection is closed, or broke."""
        if not self._connection_lost:
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
