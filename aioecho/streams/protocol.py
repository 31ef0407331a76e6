"""The one asyncio protocol of streams: it feeds a reader, and is what the writer goes by."""

import asyncio
import socket
from time import monotonic
from typing import Any, Protocol

from aioecho.config import Limits
from aioecho.streams.heap import keep_large_blocks
from aioecho.streams.memory import MemoryBudget
from aioecho.streams.news import DEFAULT_LIMIT, Buffer, News
from aioecho.streams.outgoing import Outgoing, set_result
from aioecho.streams.reader import StreamReader
from aioecho.streams.records import BIG, SLICE

__all__ = [
    "CountingStreamProtocol",
    "MeasuredCountingStreamProtocol",
    "MeasuredStreamProtocol",
    "ReadCountingProtocol",
    "StreamProtocol",
]

# The most that asyncio's transports read at a time. By themselves they ask for 256 KiB, for which malloc() maps memory at each
# read and unmaps it, as it does from 128 KiB on unless its heap happens to have room. That was measured as twice the processor
# time of a short message, and 3.5 KiB more for an idle connection.
READ_BYTES = 2**17 - 2**12

# Bytes that uvloop reads at a time. Only after so many does libuv read the socket again at once, and then up to 32 times.
FULL_READ = 256_000

# Waits in mid-message, with nothing written in between, for which the kernel is asked to acknowledge at once. It is Linux's.
QUICK_ACKS = 16
TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", 12)


class Wire(Protocol):
    """What counts the bytes of a connection on the wire."""

    def look(self) -> None:
        """Count what has come and gone since the last look. The socket is still open."""


class StreamProtocol(Outgoing, asyncio.Protocol):
    """Connects a transport with a reader and a writer, and is what the reader waits for.

    `is_server_side` says which side start_tls() takes; `limits` are a server's, and so is `budget`, which all its streams
    share. `reader` is there from the start, `transport` from the time that it calls connection_made(). `lost_with` tells how it
    ended, and `peer_has_closed` whether the peer has sent its last. With `counts`, `bytes_in` and `bytes_out` count what is
    read and written, `first_at` and `tls_at` tell when the first byte came and when TLS began, and `endpoint` is where the
    client came in.

    The methods with an underscore are the ones that asyncio.StreamWriter expects of its protocol.
    """

    __slots__ = (
        "_reads_on_until",
        "_stays_open_at_eof",
        "_waiting_to_close",
        "is_breathing",
        "is_server_side",
        "is_tls",
        "lost_with",
        "peer_has_closed",
    )

    bytes_in = bytes_out = 0
    first_at: float | None = None
    tls_at: float | None = None
    endpoint = ""
    wire: Wire | None = None  # set where the server is measured

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        is_server_side: bool,
        limit: int = DEFAULT_LIMIT,
        limits: Limits | None = None,
        budget: MemoryBudget | None = None,
    ) -> None:
        Outgoing.__init__(self, loop)
        self.reader = StreamReader(limit, loop, self)
        self._limits = limits
        self._budget = budget
        if limits is not None and limits.max_frame is not None and limits.max_frame < DEFAULT_LIMIT:
            self.reader._unchecked = limits.max_frame
        self.is_server_side = is_server_side
        self.lost_with: Exception | None = None
        self.peer_has_closed = self.is_tls = False
        self.is_breathing: bool | None = False  # in a pause of note_chunk()'s; None: it makes none
        self._reads_on_until = 0.0  # what comes till then is read without such a pause
        self._stays_open_at_eof = True
        self._waiting_to_close: tuple[asyncio.Future[None], ...] = ()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport, of a socket; TLS's takes its place later."""
        made: Any = transport
        self.transport = self._socket_transport = self.reader._transport = made
        if isinstance(self._loop, asyncio.SelectorEventLoop):
            made.max_size = READ_BYTES
            if self.is_server_side:
                # It would begin to watch the socket in a callback of its own, where no code meets an error: the connection
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
        """Tell whether the loop reads the socket: not while the transport is paused."""
        return self._socket_transport.is_reading()

    def get_socket_protocol(self) -> asyncio.BaseProtocol | None:
        """Return the protocol of the socket's transport: this, a TLS handshake or a TLS transport; None before it is made."""
        transport = getattr(self, "_socket_transport", None)
        return transport.get_protocol() if transport is not None else None

    def replace_transport(self, transport: asyncio.Transport) -> None:
        """Take the TLS transport in place of the one under it."""
        self.is_tls = True
        self._stays_open_at_eof = False  # it complains of a protocol that wants to stay half open
        self.transport = self.reader._transport = transport

    data_received = News.deliver  # type: ignore[assignment] # resumes the coroutine that waits for data

    def buffer_unawaited(self, data: bytes | None) -> bool:
        """Buffer what no read waits for. What comes after the end of the stream is dropped. None is the news of the end."""
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
        if self.reader._eof and not (self._stays_open_at_eof or self.is_tls):  # it was discarded
            return False
        if self.reader.has_stopped_peer():
            self.reader._wakeup_waiter()  # for the server's own end, which comes between two records alone
            return self._stays_open_at_eof
        self.reader._end()
        # A handler that ends then, as most do, has its connection closed by the time that this returns.
        self.deliver(None)
        if self.driver is not None:
            self.driver.note_stream_end(False)
        return self._stays_open_at_eof

    def discard(self) -> None:
        """Drop whatever comes from now on, and close the connection once the peer has closed its direction."""
        self._stays_open_at_eof = False
        reader = self.reader
        if reader._received:
            reader._discard()
            reader._note_taken()
        reader.feed_eof()

    def wait_in_message(self) -> None:
        """Have the kernel acknowledge at once what came of a message: its peer may hold the rest back until then.

        A client that writes a length and then the body waits, by Nagle's algorithm, for the acknowledgement of the length, and
        the kernel delays it by 40 ms in the hope of a reply to send it with. Not again and again for a peer that only sends.
        """
        if self.unanswered <= QUICK_ACKS:
            self.unanswered += 1
            try:
                sock = self._socket_transport.get_extra_info("socket")
                sock.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)
            except (OSError, AttributeError):  # no TCP, or closed
                self.unanswered = QUICK_ACKS + 1

    @property
    def max_frame(self) -> int | None:  # type: ignore[override]
        """Limits.max_frame; None for a client's stream."""
        return self._limits.max_frame if self._limits is not None else None

    def note_input(self, size: int) -> None:
        """Let writes be collected while there is more to read, and let the loop run before it reads on after much."""
        self.needs_slow_path = True
        if size >= BIG:
            self.note_chunk(size)

    def note_chunk(self, size: int) -> None:
        """Let the loop run before it reads on, if it would do so at once: of TLS that is not known.

        Not after every such chunk, if the last turn of the loop was short: a pause takes four system calls, and a turn.
        """
        keep_large_blocks()
        if (
            (size >= FULL_READ or self.is_tls)
            and self.reader._transport is not None
            and self.transport.is_reading()
            and not isinstance(self._loop, asyncio.SelectorEventLoop)
            and self.is_breathing is not None
            and (now := monotonic()) > self._reads_on_until
        ):
            self.transport.pause_reading()
            self.is_breathing = True
            self._reads_on_until = now + SLICE
            self._loop.call_soon(self.read_on)

    def read_on(self) -> None:
        """End the pause that note_chunk() made."""
        if self.is_breathing:
            self.is_breathing = False
            # Not self.transport: TLS's reads on while it closes, for the peer's close_notify.
            if not (self.reader._paused or self.is_lost or self._socket_transport.is_closing()):
                self.transport.resume_reading()
                now = monotonic()
                if now <= self._reads_on_until:
                    self._reads_on_until = now + SLICE

    def share_transport(self) -> None:
        """Have note_chunk() pause the transport no more: read_on() would undo the pause_reading() of other code."""
        self.read_on()
        self.is_breathing = None

    def connection_lost(self, exc: Exception | None) -> None:
        """End the stream, with `exc` if the connection broke. A second call changes nothing."""
        if self.is_lost:
            return
        if self.wire is not None:
            self.wire.look()
            self.wire = None  # type: ignore[misc] # which may refer to this; where it is set, the class has the slot
        self.is_lost = True
        self.collected = None
        self.needs_slow_path = True
        reader = self.reader
        if exc is not None and reader.has_stopped_peer():
            reader.break_off(exc)  # it has sent more, and was answered by a reset
            exc = None
        self.lost_with = exc
        is_told = exc is not None and (reader.is_awaited() or bool(self._waiting_to_write))
        if exc is not None:
            reader.break_off(exc)
        elif self.aborted_for is not None:
            self.drop_received(self.aborted_for)
        elif not reader._eof and reader._exception is None:
            reader.feed_eof()
        if self.item is not None:
            reader._keep_item()
        if self.held:
            self.note_memory()
        if not self.held:  # else its reads are still to tell how much is left
            reader._news = None  # type: ignore[assignment] # without the cycle both go at once
        if self._waiting_to_write:
            self.end_drains(exc)
        for waiting in self._waiting_to_close:
            set_result(waiting)
        driver = self.driver
        if driver is not None:
            if exc is not None:
                driver.note_stream_end(is_told)
            driver.note_lost()

    def is_in_exchange(self, *, one_way: bool) -> bool:
        """Tell whether something that came is still to be read or, unless `one_way`, to be answered; or a handler has said that
        it is in the middle of an exchange.
        """
        return self.reader.is_held() or self.reader.is_in_record() or bool(self.unanswered and not one_way)

    def undo_cycles(self) -> None:
        """Let what was received go with the connection, and not when the garbage collector runs: the handler has ended.

        The frames in which the stream's error was raised refer to the stream, and it to the error.
        """
        self.release_memory()
        reader = self.reader
        reader._scan = None
        if reader._drain is not None:
            reader.suspend_drain()
        if reader._exception is not None:
            reader._exception.__traceback__ = None
        if self.lost_with is not None:
            self.lost_with.__traceback__ = None

    async def wait_lost(self) -> None:
        """Wait until the connection is closed, or broke."""
        if not self.is_lost:
            await self.make_close_waiter()

    def make_close_waiter(self) -> "asyncio.Future[None]":
        """Return a future that is done when the connection is closed, or broke."""
        waiting = self._loop.create_future()
        self._waiting_to_close += (waiting,)
        return waiting

    def drop_close_waiter(self, waiting: "asyncio.Future[None]") -> None:
        """Forget such a future: nothing waits for it any more."""
        self._waiting_to_close = tuple(each for each in self._waiting_to_close if each is not waiting)

    async def _get_close_waiter(self, writer: asyncio.StreamWriter) -> None:
        await self.wait_lost()
        if self.lost_with is not None:
            raise self.lost_with


class ReadCountingProtocol(StreamProtocol):
    """A StreamProtocol that counts the bytes that are read, which costs every message some time."""

    __slots__ = ("bytes_in",)

    def __init__(self, loop: asyncio.AbstractEventLoop, is_server_side: bool, *options: Any, **more: Any) -> None:
        super().__init__(loop, is_server_side, *options, **more)
        self.bytes_in = 0

    def data_received(self, data: bytes) -> bool:  # type: ignore[override]
        """Count, and do as for any stream."""
        self.bytes_in += len(data)
        return self.deliver(data)

    def note_read(self, size: int) -> None:
        """Count them."""
        self.bytes_in += size

    def uncount(self, size: int) -> None:
        """Take `size` bytes for not read, as they are no payload."""
        self.bytes_in -= size


class CountingStreamProtocol(ReadCountingProtocol):
    """A StreamProtocol that counts bytes in both directions and notes times, which costs every message some time more."""

    __slots__ = ("bytes_out", "endpoint", "first_at", "tls_at")

    counts = True

    def __init__(self, loop: asyncio.AbstractEventLoop, is_server_side: bool, *options: Any, **more: Any) -> None:
        super().__init__(loop, is_server_side, *options, **more)
        self.bytes_out = 0
        self.first_at = self.tls_at = None
        self.endpoint = ""

    def data_received(self, data: bytes) -> bool:  # type: ignore[override]
        """Count, note when the first byte came, and do as for any stream."""
        if not self.bytes_in:
            self.first_at = self._loop.time()
        self.bytes_in += len(data)
        return self.deliver(data)

    def note_read(self, size: int) -> None:
        """Count them, and note when the first of all came."""
        if not self.bytes_in:
            self.first_at = self._loop.time()
        self.bytes_in += size

    def uncount(self, size: int) -> None:
        """Take `size` bytes for not read; what is left has come just now, behind them."""
        super().uncount(size)
        self.first_at = self._loop.time() if self.bytes_in else None

    def replace_transport(self, transport: asyncio.Transport) -> None:
        """Note when, and do as for any stream."""
        super().replace_transport(transport)
        self.tls_at = self._loop.time()

    def note_write(self, data: Buffer) -> bool:
        """Count, and do as for any stream."""
        is_written = super().note_write(data)
        if is_written:
            self.bytes_out += memoryview(data).nbytes
        return is_written


class MeasuredStreamProtocol(StreamProtocol):
    """A StreamProtocol whose `wire` looks at its socket when it ends. A message costs no more."""

    __slots__ = ("wire",)


class MeasuredCountingStreamProtocol(CountingStreamProtocol):
    """The same, of a socket of which the kernel does not tell."""

    __slots__ = ("wire",)
