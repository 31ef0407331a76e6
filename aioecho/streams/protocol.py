"""The one asyncio protocol of streams: it feeds a reader, and is what the writer goes by.

What a handler writes while it has more of its peer's requests to read is collected, and goes to the transport in one piece:
uvloop makes a system call of every write.
"""

import asyncio
import contextlib
import socket
import struct
from time import monotonic
from typing import Any

from aioecho.config import Limits
from aioecho.streams.news import DEFAULT_LIMIT, Buffer, Collected, News
from aioecho.streams.reader import StreamReader
from aioecho.streams.records import BIG

__all__ = ["CountingStreamProtocol", "StreamProtocol", "reset_when_closed"]

# The most that asyncio's transports read at a time. By themselves they ask for 256 KiB, for which malloc() maps memory at each
# read and unmaps it, as it does from 128 KiB on unless its heap happens to have room. That was measured as twice the processor
# time of a short message, and 3.5 KiB more for an idle connection.
READ_BYTES = 2**17 - 2**12

# Waits in mid-message, with nothing written in between, for which the kernel is asked to acknowledge at once. It is Linux's.
QUICK_ACKS = 16
TCP_QUICKACK = getattr(socket, "TCP_QUICKACK", 12)

# Bytes that are collected at the most, and seconds for which they are.
COLLECTED, COLLECTED_FOR = 2**16, 0.001


class StreamProtocol(News, asyncio.Protocol):
    """Connects a transport with a reader and a writer, and is what the reader waits for.

    `is_server_side` says which side start_tls() takes; `limits` are a server's. `reader` is there from the
    start, `transport` from the time that it calls connection_made(). `is_lost`
    and `lost_with` tell whether and how it ended, `cut_for` why this side has cut it off, and `peer_has_closed` whether the
    peer has sent its last. `due` is when its timeouts are looked at next, and `paused_since` since when drain() waits, if it
    does, in the loop's time. `bytes_in` and `bytes_out` count what is read and written, with `counts`.

    The methods with an underscore are the ones that asyncio.StreamWriter expects of its protocol.
    """

    __slots__ = (
        "_collected",
        "_is_special",
        "_limits",
        "_socket_transport",
        "_stays_open_at_eof",
        "_waiting_to_close",
        "_waiting_to_write",
        "cut_for",
        "due",
        "is_breathing",
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
        limits: Limits | None = None,
        is_server_side: bool,
    ) -> None:
        News.__init__(self, loop)
        self.reader = StreamReader(limit, loop, _news=self)
        self._limits = limits
        if limits is not None and limits.max_frame is not None and limits.max_frame < DEFAULT_LIMIT:
            self.reader._unchecked = limits.max_frame
        self.is_server_side = is_server_side
        self.lost_with: Exception | None = None
        self.cut_for: str | None = None
        self.peer_has_closed = self.is_lost = self.is_tls = self.is_breathing = False
        self.due = 0.0
        # What a write and a drain() look at: nothing if False, which is cheaper to test than 0; 1: whether to collect; 2: all.
        self._is_special: int = 2 if self.counts else False
        self._collected = None
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
        """Tell whether the loop reads the socket: not while the transport is paused."""
        return self._socket_transport.is_reading()

    def replace_transport(self, transport: asyncio.Transport) -> None:
        """Take the TLS transport in place of the one under it."""
        self.is_tls = True
        self._stays_open_at_eof = False  # it complains of a protocol that wants to stay half open
        self.transport = self.reader._transport = transport

    data_received = News.deliver  # type: ignore[assignment] # resumes whoever waits for data

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
        self.reader._end()
        # A handler that ends then, as most do, has its connection closed by the time that this returns.
        self.deliver(None)
        return self._stays_open_at_eof

    def discard(self) -> None:
        """Drop whatever comes from now on, and close the connection once the peer has closed its direction."""
        self._stays_open_at_eof = False
        self.reader._drop(len(self.reader._buffer))
        self.reader.feed_eof()

    def note_write(self, data: Buffer) -> bool:
        """Return whether to write `data`; if too much waits to be sent already, cut the connection off.

        Called where that is possible, or the connection lost: then loops would warn for every write, or raise.
        """
        if self.due:
            self.stir()
        if self.is_lost or self.cut_for is not None:
            return False
        most = self._limits.max_write_buffer if self._limits is not None else None
        if most is not None and self.unsent() > most:
            self.cut("write buffer")
            return False
        return True

    def cut(self, reason: str) -> None:
        """Cut the connection off: throw away what is unsent. `cut_for` is the first such reason."""
        if not self.is_lost:
            self.cut_for = self.cut_for or reason
            self._collected = None
            self.stir()
            if self.paused_since is not None:
                reset_when_closed(self.transport)
            self.transport.abort()

    def unsent(self) -> int:
        """Return how many bytes wait that the kernel has not taken."""
        # The TLS transport of a server's stream holds nothing back but for moments: aioecho.streams.tls.
        size = self._socket_transport.get_write_buffer_size()
        return size if self._collected is None else size + COLLECTED - self._collected.room

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

    # Collecting.

    def note_input(self, size: int) -> None:
        """Let writes be collected while there is more to read, and let the loop run before it reads on after much."""
        if not self._is_special:
            self._is_special = 1
        if (
            size >= BIG
            and self.reader._transport is not None
            and self.transport.is_reading()
            and not isinstance(self._loop, asyncio.SelectorEventLoop)
        ):
            self.transport.pause_reading()
            self.is_breathing = True
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        is_breathing, self.is_breathing = self.is_breathing, False
        # Not self.transport: TLS's reads on while it closes, for the peer's close_notify.
        if is_breathing and not (self.reader._paused or self.is_lost or self._socket_transport.is_closing()):
            self.transport.resume_reading()

    def write(self, data: Buffer) -> None:
        """Write what the writer does not hand to the transport itself: collect it, look at everything, or both."""
        if not isinstance(data, Buffer):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")  # as asyncio's
        collected = self._collected
        if len(data) >= COLLECTED or (collected is None and not self.reader._has_input()):
            self.write_through(data)
            return
        self.unanswered = False
        if collected is None:
            self._collected = collected = Collected(COLLECTED, monotonic() + COLLECTED_FOR)
            driver = self._driver
            if driver is None or not driver.is_running():  # else note_hand_over() comes at the latest
                self._loop.call_soon(self.note_hand_over)
            if not self._is_special:
                self._is_special = 1
        collected.append(bytes(data))  # what is no bytes object may be changed by its owner
        collected.room -= len(data)
        if collected.room < 0 or monotonic() > collected.flush_at:
            self.flush()

    def write_through(self, data: Buffer) -> None:
        """Hand `data` to the transport now, after what was collected."""
        self.unanswered = False
        if self._collected is not None:
            self.flush()
        if self.note_write(data):
            self.transport.write(data)

    def flush(self) -> None:
        """Hand what was collected to the transport."""
        collected, self._collected = self._collected, None
        if collected:
            data = collected[0] if len(collected) == 1 else b"".join(collected)
            if self.note_write(data):
                self.transport.write(data)
        self.heed()

    def note_hand_over(self) -> None:
        """Flush for a handler that waits for something else than its stream."""
        if self._collected is not None:
            self.flush()

    def interrupt_drains(self, exc: Exception) -> bool:
        """Raise `exc` in every drain() that waits; return whether any does."""
        waiting = [each for each in self._waiting_to_write if not each.done()]
        for each in waiting:
            each.set_exception(exc)
        return bool(waiting)

    def heed(self) -> None:
        """Find out what writes and drain() have to look at."""
        if (
            self.counts
            or self.due > 0
            or self.paused_since is not None
            or self.is_lost
            or self.cut_for is not None
            or self.reader._exception is not None
        ):
            self._is_special = 2
        else:
            self._is_special = 1 if self._collected is not None or self.reader._received else False

    def rest(self, until: float) -> None:
        """Leave its timeouts alone until then, or until a read comes to wait or something is written."""
        self.due = until
        self._is_special = 2  # for the next write to tell

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
        self._collected = None
        self._is_special = 2
        self.lost_with = exc
        reader = self.reader
        if exc is not None:
            reader.break_off(exc)
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
