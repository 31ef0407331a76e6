"""The stream that a handler reads.

It is asyncio's with the same behaviour to the letter. Two things differ. Data gets to a coroutine that waits for it at once,
through a Waiter of aioecho.runtime.driver, and as the chunk that the transport made, with no copy into a buffer and out of
it again. And where a chunk holds many lines, it is split once: lines are handed out of a list. What is split and not handed
out is still in the buffer, so that every other method reads the same bytes.
"""

import asyncio
from asyncio import IncompleteReadError, LimitOverrunError
from collections.abc import Generator, Iterable
from io import BytesIO
from time import monotonic
from typing import Any, Literal, SupportsIndex

from aioecho.exceptions import FrameTooLong, LineTooLong
from aioecho.framing import Framing
from aioecho.runtime.driver import Waiter, steps
from aioecho.streams.ending import StreamDrain
from aioecho.streams.frames import Batches, Frames
from aioecho.streams.records import ALL, BATCH, BIG, LEAST_BATCH, SLICE, find_separator, skip_record

__all__ = ["DEFAULT_LIMIT", "Buffer", "Collected", "News", "StreamReader"]

DEFAULT_LIMIT = 2**16
"""Bytes: asyncio's default for the longest line, and half of what a reader buffers before it pauses the transport."""

Buffer = bytes | bytearray | memoryview


class _Slow:
    """In place of a waiter where no read waits, and one has to look before it does; false, as None is."""

    def __bool__(self) -> Literal[False]:
        return False


_SLOW = _Slow()


class Collected(list[bytes]):
    """What was written and is not handed to the transport yet: `room` bytes more, and until `flush_at` by monotonic()."""

    __slots__ = ("flush_at", "room")

    def __init__(self, room: int, flush_at: float) -> None:
        self.room = room
        self.flush_at = flush_at


class News(Waiter):
    """What a reader waits for, and what it tells. Here nothing listens: for a reader without a transport."""

    __slots__ = ("unanswered",)

    unanswered: int
    """Above 0 if something was read since something was written last, and by as much as :meth:`wait_in_message` was called."""

    max_frame: int | None = None
    """The most bytes of what readexactly() and read(-1) read, and of a frame that comes after its length."""

    _collected: "Collected | None" = None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.unanswered = False

    def heed(self) -> None:
        """Do nothing about what a write has to look at. To be overridden, as all here."""

    def stir(self) -> None:
        """Do nothing about a wait that has begun."""

    def wait_in_message(self) -> None:
        """Do nothing about a wait for the rest of what was read, or that was not answered."""

    def note_input(self, size: int) -> None:
        """Do nothing about `size` bytes that were buffered."""

    def flush(self) -> None:
        """Write nothing."""


# Bytes that are split at a time, so that what is split is not much more than what is handed out soon.
PIECE = 2**14

# Bytes of a read after which more such are expected.
SHORT = 2**11


class StreamReader(asyncio.StreamReader):
    """asyncio's StreamReader, faster, and with :meth:`frames` and :meth:`batches`.

    Made by the server. Any code may call :meth:`feed_data`, :meth:`feed_eof` and :meth:`set_exception`, as with asyncio's.
    On every version of Python `readuntil` takes a tuple of separators too, as it does in 3.13's.
    """

    # asyncio's own names: its methods that are inherited (repr, at_eof, ...) go by them.
    _eof: bool
    _exception: BaseException | None
    _limit: int
    _loop: asyncio.AbstractEventLoop
    _paused: bool
    _transport: asyncio.ReadTransport | None

    _news: News
    _awaited: "News | _Slow | None"  # what a read waits for; else None if the next may wait without looking further
    _unawaited: "_Slow | None"  # what _awaited is, or will be, when no read waits

    _received: bytearray  # what asyncio calls its buffer, and more: bytes at its front that were handed out
    _piece: bytes = b""  # a copy of its front to read from
    _at: int = 0  # and so many bytes of that were handed out
    _split: int = 0  # or so many bytes of it were split into records
    _lines: list[bytes] = []  # noqa: RUF012 - of these the next to hand out, in reverse, all but the last,
    _further_lines: list[bytes] = []  # noqa: RUF012 - and the ones after them
    _holder: Frames | None = None  # or what holds them, if they are frames
    _scan: tuple[Frames | Batches, int, int] | None = None  # how far which of these has looked at what is buffered

    _unchecked: int = DEFAULT_LIMIT  # bytes that readexactly() reads without looking at max_frame
    _skip: Any = None  # what is to be skipped before the next record: see skip_record()
    _batch: int = LEAST_BATCH  # records between two looks at the clock
    _left: int = LEAST_BATCH  # records to hand out before the next look at the clock
    _slice_end: float = 0.0  # when the loop is to run

    _drain: StreamDrain | None = None  # while the server stops
    _holds: int = 0  # the unbroken() blocks that the handler is in
    _is_ended_by_drain: bool = False
    _interruption: Exception | None = None
    _message_began: float | None = None  # when a read came to wait for the rest of what it has begun to read
    _seen: float | None = None  # when a visitor first found the wait that goes on, or that there is none

    def __init__(
        self,
        limit: int = DEFAULT_LIMIT,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        _news: News | None = None,
    ) -> None:
        if loop is None or limit <= 0:
            super().__init__(limit, loop)  # which finds the one, or raises for the other
            loop = self._loop
        # What asyncio's does, without the two calls for each connection: of it and of a property.
        self._loop = loop
        self._limit = limit
        self._received = bytearray()
        self._eof = self._paused = False
        self._transport = self._exception = None
        self._news = _news if _news is not None else News(loop)
        self._awaited = self._unawaited = None  # not as the class's, which 3.11 would look up anew for every read

    @property
    def _waiter(self) -> "News | _Slow | None":  # what asyncio's own methods look for
        return self._awaited or None

    @_waiter.setter
    def _waiter(self, waiter: News | None) -> None:
        self._awaited = waiter

    @property
    def _buffer(self) -> bytearray:  # likewise
        self._settle()
        return self._received

    @_buffer.setter
    def _buffer(self, buffer: bytearray) -> None:
        self._received = buffer

    def _slow_down(self) -> None:
        """Let every read look at everything before it waits, until :meth:`_speed_up` finds nothing to look at any more."""
        self._unawaited = _SLOW
        if self._awaited is None:
            self._awaited = _SLOW

    def _speed_up(self) -> None:
        if self._unawaited is not None and not (
            self._received
            or self._eof
            or self._paused
            or self._exception is not None
            or self._interruption is not None
            or self._drain is not None
            or self._seen is not None
            or self._skip is not None
            or self._news._collected is not None
        ):
            self._unawaited = None
            if self._awaited is _SLOW:
                self._awaited = None
            self._news.heed()

    def feed_data(self, data: Iterable[SupportsIndex]) -> None:
        """Buffer `data`, and wake the coroutine that waits for it."""
        assert not self._eof, "feed_data after feed_eof"
        if data:
            self._keep(data)  # type: ignore[arg-type]
            self._wakeup_waiter()

    def feed_eof(self) -> None:
        """End the stream after what is buffered."""
        self._end()
        self._wakeup_waiter()

    def _end(self) -> None:
        self._eof = True
        self._slow_down()

    def set_exception(self, exc: BaseException) -> None:
        """Make this and every later read raise `exc`."""
        self._settle()
        self._exception = exc
        self._slow_down()
        if self._news is not None:  # the connection is not lost
            self._news.heed()  # for drain(), which raises it too
        self._wakeup_waiter()

    def begin_drain(self, drain: StreamDrain) -> None:
        """Let `drain` decide, from now on, whether a read that waits gets the end of the stream."""
        if self._drain is not None:
            self._drain.stop()
        drain.holds = self._holds
        self._drain = drain
        self._slow_down()
        self._wakeup_waiter()  # a read that waits already asks too

    def hold(self, count: int) -> None:
        """Count the blocks in which a drain does not end the stream: add `count` to them."""
        self._holds += count
        if self._drain is not None:
            self._drain.holds = self._holds
            if not self._holds:
                self._wakeup_waiter()

    @property
    def end(self) -> str | None:
        """What has ended the stream: "peer", or "drain", as the server stops. None if it has not ended.

        What the peer had sent may still be buffered.
        """
        return None if not self._eof else "drain" if self._is_ended_by_drain else "peer"

    def is_in_message(self) -> bool:
        """Tell whether a message is in progress: a part of a record has come, or a request was not answered yet."""
        news = self._news
        return self._has_input() or self._skip is not None or bool(news is not None and news.unanswered)

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
        clock; "message" for the rest, counted from the first byte. When it is another wait, the protocol's stir() is called.
        """
        if self._seen is None:
            self._seen = now
            self._slow_down()  # for the next read to forget it; so a read that nobody has seen need not
        if not self._awaited:
            return None
        return ("idle", self._seen) if self._message_began is None else ("message", self._message_began)

    def _wakeup_waiter(self) -> None:
        if self._awaited:
            self._awaited.wake()

    def _wait(self, func_name: str, began: bool = False) -> Generator[Any, None, None]:
        """Wait for news, and then look: at the buffer, at the end of the stream. Wakes without news are possible."""
        if self._awaited:
            raise RuntimeError(f"{func_name}() called while another coroutine is already waiting for incoming data")
        if self._exception is not None:
            raise self._exception
        if self._interruption is not None:  # of a read that was cancelled before it met it
            self._take_interruption()
        news = self._news
        if news._collected is not None:
            news.flush()
        if self._paused:
            # To wait while the transport is paused would be for ever: readexactly() of more than the limit.
            self._paused = False
            assert self._transport is not None
            self._transport.resume_reading()
            if self._drain is not None:
                # A TLS transport may hold data of its own, which it delivers in the next turn.
                self._loop.call_soon(self._loop.call_soon, self._wakeup_waiter)
        elif self._drain is not None and self._drain.may_end(func_name, began):
            self._eof = self._is_ended_by_drain = True
            return
        if self._message_began is None:  # else the wait that a visitor has seen goes on, though some more has come
            if self._seen is not None:
                self._seen = None
                news.stir()
            if self._received or self._skip is not None:
                self._message_began = self._loop.time()
        self._speed_up()
        self._awaited = news
        if news.unanswered or self._received:
            news.wait_in_message()
        try:
            yield news
        finally:
            self._awaited = self._unawaited
            self._keep_item()
        self._settle()  # another coroutine may have read meanwhile
        self._slice_end = monotonic() + SLICE
        if self._interruption is not None:
            self._raise_interruption()
        if self._exception is not None and not self._received:
            raise self._exception

    @steps
    def _wait_for_data(self, func_name: str) -> Generator[Any, None, None]:
        """Wait for news, for code that calls what asyncio's own methods do: its future would be no waiter."""
        yield from self._wait(func_name)

    def _keep(self, chunk: bytes | memoryview) -> None:
        """Buffer a chunk that was handed over, or the rest of one."""
        self._slow_down()
        if not self._received and type(chunk) is bytes and self._exception is None and self._skip is None:
            self._piece = chunk  # and _at is 0
        self._received += chunk
        news = self._news
        if news is not None:  # the connection is not lost
            news.note_input(len(chunk))
        if len(self._received) > 2 * self._limit and not self._paused and self._transport is not None:
            try:
                self._transport.pause_reading()
            except NotImplementedError:
                self._transport = None  # as asyncio: it can't be paused, so never ask again
            else:
                self._paused = True

    def _keep_item(self) -> None:
        """Buffer a chunk that was handed over to a read that has not taken it, before anything that came later."""
        news = self._news
        if news is not None and (chunk := news.take()) is not None:
            self._keep(chunk)

    def _take(self, size: int) -> bytes:
        """Take `size` bytes, or as many as there are, from the front of the settled buffer."""
        received = self._received
        if size >= len(received):
            data = bytes(received)
            received.clear()
        elif size <= SHORT:
            self._piece = piece = bytes(memoryview(received)[:PIECE])
            self._at = size
            data = piece[:size]
        else:
            data = bytes(memoryview(received)[:size])
            del received[:size]
        self._note_taken()
        return data

    def _drop(self, size: int) -> None:
        """Remove `size` bytes from the front of the settled buffer."""
        del self._received[:size]
        self._note_taken()

    def _note_taken(self) -> None:
        self._message_began = self._scan = None
        news = self._news
        if news is not None:
            news.unanswered = news.unanswered or True
        if self._paused and len(self._received) <= self._limit:
            assert self._transport is not None
            self._paused = False
            self._transport.resume_reading()
        if not self._received:
            self._speed_up()

    def _settle(self) -> None:
        """Make the buffer what it is for asyncio: remove what was handed out, and forget what was split off."""
        if self._piece:
            self._piece = b""
            at, self._at = self._at, 0
            if at:
                self._drop(at)
        elif self._split:
            split, self._split = self._split, 0
            if self._holder is not None:
                holder, self._holder = self._holder, None
                split = holder.put_back(self._received, split)
            elif self._lines or self._further_lines:
                split -= sum(map(len, self._lines)) + sum(map(len, self._further_lines))
            self._lines = self._further_lines = []
            self._drop(split)

    def _catch_up(self) -> None:
        """Write what was collected, as all that was buffered is read; then the next read may wait without looking further."""
        if self._news is not None and self._news._collected is not None:
            self._news.flush()
            self._speed_up()

    def _has_input(self) -> bool:
        """Tell whether more is buffered than was handed out."""
        return len(self._received) > (self._split or self._at) or bool(
            self._lines or self._further_lines or (self._holder is not None and self._holder.has_more())
        )

    def _is_due(self) -> bool:
        """Tell whether the loop is to run before another record is handed out; asked for every one that is buffered."""
        self._left -= 1
        if self._left > 0:
            return False
        self._left = self._batch
        return self._is_slice_over()

    def _is_slice_over(self) -> bool:
        """Tell whether the loop is to run; the next look at the clock comes after more records, or fewer."""
        if monotonic() > self._slice_end:
            self._batch = max(self._batch // 2, LEAST_BATCH)
            return True
        self._batch = min(self._batch * 2, BATCH)
        return False

    def _breathe(self) -> Generator[Any, None, None]:
        """Let the loop run: other connections have their turn."""
        yield
        self._slice_end = monotonic() + SLICE

    def _look(self) -> Generator[Any, None, None]:
        """Do what comes before a read that does not find its way short."""
        self._settle()
        if self._received and self._exception is None and self._skip is None and self._is_due():
            yield from self._breathe()
            self._settle()  # another coroutine may have read meanwhile
        if self._exception is not None:
            raise self._exception
        if self._skip is not None:
            yield from skip_record(self)

    # In read(), readline(), its twin __anext__() and readexactly(), the way that most calls go comes first: nothing is
    # buffered, so wait, and return the chunk that is handed over. It is _wait() written out, and saves its generator.

    @steps
    def read(self, n: int = -1) -> Generator[Any, None, bytes]:
        """Read up to `n` bytes, as soon as there are any; until the end of the stream if `n` is negative.

        Return b"" at the end of the stream, and at once if `n` is 0.

        Raises:
            RuntimeError: another coroutine waits for data already.
            FrameTooLong: `n` is negative, and more comes than Limits.max_frame: the peer's fault.
            OSError: the connection broke.
        """
        if self._awaited is None and n > 0:
            self._awaited = waiter = self._news
            if waiter.unanswered:
                waiter.wait_in_message()
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
                    if not waiter.unanswered:
                        waiter.unanswered = True
                    if n > BIG and len(chunk) >= BIG:
                        waiter.note_input(len(chunk))
                    return chunk
                self._keep(memoryview(chunk)[n:])
                waiter.unanswered = waiter.unanswered or True
                return chunk[:n]
            if self._interruption is not None:
                self._raise_interruption()
        return (yield from self._read(n))

    def _read(self, n: int, began: bool = False) -> Generator[Any, None, bytes]:
        piece = self._piece
        if piece:
            at = self._at
            if n > 0 and at + n < len(piece) and self._left > 0:
                self._left -= 1
                self._at = at + n
                return piece[at : at + n]
        yield from self._look()
        if n == 0:
            return b""
        if n < 0:
            return (yield from self._read_all())
        while not self._received and not self._eof:
            yield from self._wait("read", began)
        return self._take(n) if self._received else b""

    def _read_all(self) -> Generator[Any, None, bytes]:
        blocks: list[bytes] = []
        size = 0
        most = self._news.max_frame if self._news is not None else None
        while block := (yield from self._read(self._limit, bool(blocks))):
            blocks.append(block)
            size += len(block)
            if most is not None and size > most:
                self._skip_from_now(None)
                raise FrameTooLong(None, most)
        return b"".join(blocks)

    @steps
    def readline(self) -> Generator[Any, None, bytes]:
        r"""Read up to and with the next b"\n"; at the end of the stream, what is left, which may be b"".

        Raises:
            LineTooLong, a ValueError: the line is longer than the limit: the peer's fault. The next read skips the rest of it.
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        if self._lines:
            return self._lines.pop()
        if self._awaited is not None and (line := self._buffered_line()):
            return line
        if self._awaited is None:
            self._awaited = waiter = self._news
            if waiter.unanswered:
                waiter.wait_in_message()
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
                if chunk.find(b"\n") + 1 == len(chunk) <= self._limit:
                    waiter.unanswered = waiter.unanswered or True
                    return chunk
                self._keep(chunk)
                self._slice_end = monotonic() + SLICE
                if line := self._buffered_line():
                    return line
            elif self._interruption is not None:
                self._raise_interruption()
        return (yield from self._readline())

    @steps
    def __anext__(self) -> Generator[Any, None, bytes]:
        if self._lines:
            return self._lines.pop()
        if self._awaited is not None and (line := self._buffered_line()):
            return line
        if self._awaited is None:
            self._awaited = waiter = self._news
            if waiter.unanswered:
                waiter.wait_in_message()
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
                if chunk.find(b"\n") + 1 == len(chunk) <= self._limit:
                    waiter.unanswered = waiter.unanswered or True
                    return chunk
                self._keep(chunk)
                self._slice_end = monotonic() + SLICE
                if line := self._buffered_line():
                    return line
            elif self._interruption is not None:
                self._raise_interruption()
        line = yield from self._readline()
        if line:
            return line
        raise StopAsyncIteration

    def _buffered_line(self) -> bytes:
        """Hand out a whole line of the buffer, or nothing if that takes more than a look."""
        further = self._further_lines
        if further:
            if self._is_slice_over():
                return b""
            batch = self._batch
            self._lines = lines = further[-batch:]
            del further[-batch:]
            return lines.pop()
        if self._split:
            self._settle()
        if not self._received:
            self._catch_up()
            return b""
        if self._exception is not None or self._skip is not None or self._is_due():
            return b""
        piece, at = self._piece, self._at
        if not piece:
            piece = bytes(memoryview(self._received)[:PIECE])
        most = at + self._limit + 1
        end = piece.find(b"\n", at, most) + 1
        if not end:
            return b""
        # Where three lines or more are there, split all but the last: after that one it can be told whether a reply was
        # written since the handler read.
        last = piece.rfind(b"\n", end, most)
        if last > end:
            before_last = piece.rfind(b"\n", end, last) + 1
            if before_last:
                lines = BytesIO(piece[at:before_last]).readlines()
                lines.reverse()
                self._piece, self._at = b"", 0
                self._split = before_last
                self._message_began = self._scan = None
                batch = self._batch
                if len(lines) > batch:
                    self._further_lines, lines = lines, lines[-batch:]
                    del self._further_lines[-batch:]
                self._lines = lines
                return lines.pop()
        self._settle()
        return self._take(end - at)

    def _readline(self) -> Generator[Any, None, bytes]:
        while self._received and monotonic() > self._slice_end:
            yield from self._breathe()
            if self._lines:  # another coroutine has read meanwhile
                return self._lines.pop()
            if line := self._buffered_line():
                return line
        try:
            return (yield from self._read_until([b"\n"], "readuntil"))
        except IncompleteReadError as error:
            return error.partial
        except LimitOverrunError as error:
            size = error.consumed
            if self._received.startswith(b"\n", size):
                self._drop(size + 1)
                raise LineTooLong(size, self._limit, size + 1) from None
            self._drop(len(self._received))
            self._skip_from_now(b"\n")
            raise LineTooLong(None, self._limit) from None

    @steps
    def readuntil(self, separator: Buffer | tuple[Buffer, ...] = b"\n") -> Generator[Any, None, bytes]:  # type: ignore[override]
        """Read up to and with `separator`, or with the one of a tuple of separators that ends first.

        Raises:
            IncompleteReadError: the stream ended before; its `partial` holds what came.
            LimitOverrunError: more than the limit came before a separator. All of it stays in the buffer.
            ValueError: the separator is empty.
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        piece = self._piece
        if piece and type(separator) is bytes and separator:
            at = self._at
            end = piece.find(separator, at, at + self._limit + len(separator)) + len(separator)
            if len(separator) <= end < len(piece) and self._left > 0:
                self._left -= 1
                self._at = end
                return piece[at:end]
        separators = sorted(separator, key=len) if isinstance(separator, tuple) else [separator]
        if not separators:
            raise ValueError("Separator should contain at least one element")
        if not separators[0]:
            raise ValueError("Separator should be at least one-byte string")
        return (yield from self._read_until(separators, "readuntil"))

    def _read_until(self, separators: list[Buffer], func_name: str) -> Generator[Any, None, bytes]:
        yield from self._look()
        received = self._received
        searched = 0  # before this offset no separator starts
        while True:
            found = find_separator(received, separators, searched)
            if found is not None:
                start, end = found
                if start > self._limit:
                    raise LimitOverrunError("Separator is found, but chunk is longer than limit", start)
                return self._take(end)
            if len(received) - searched >= len(separators[0]):
                searched = max(0, len(received) + 1 - len(separators[-1]))
                if searched > self._limit:
                    raise LimitOverrunError("Separator is not found, and chunk exceed the limit", searched)
            if self._eof:
                raise IncompleteReadError(self._take(len(received)) if received else b"", None)
            yield from self._wait(func_name)

    @steps
    def readexactly(self, n: int) -> Generator[Any, None, bytes]:
        """Read exactly `n` bytes. Limits.max_frame bounds them in a server.

        Raises:
            IncompleteReadError: the stream ended before; its `partial` holds what came.
            FrameTooLong, a ValueError: `n` is over Limits.max_frame: the peer's fault, if `n` is its. The next read skips them.
            ValueError: `n` is negative.
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        if self._awaited is not None and not self._received:
            self._catch_up()
        if self._awaited is None and 0 < n <= self._unchecked:
            self._awaited = waiter = self._news
            if waiter.unanswered:
                waiter.wait_in_message()
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
                    waiter.unanswered = waiter.unanswered or True
                    return chunk
                self._keep(chunk)
                self._slice_end = monotonic() + SLICE
            elif self._interruption is not None:
                self._raise_interruption()
        elif n < 0:
            raise ValueError("readexactly size can not be less than zero")
        piece = self._piece
        if piece:
            at = self._at
            if at + n < len(piece) and self._left > 0 <= n <= self._unchecked:
                self._left -= 1
                self._at = at + n
                return piece[at : at + n]
        yield from self._look()
        if n > self._unchecked:
            self._check_size(n)
        received = self._received
        if n == 0:
            return b""
        while len(received) < n:
            if self._eof:
                raise IncompleteReadError(self._take(len(received)) if received else b"", n)
            yield from self._wait("readexactly")
        return self._take(n)

    def _check_size(self, n: int) -> None:
        most = self._news.max_frame if self._news is not None else None
        if most is not None and n > most:
            self._skip_from_now(n)
            raise FrameTooLong(n, most, n)

    def _skip_from_now(self, what: Any) -> None:
        """Have the next read skip what skip_record() calls `what`; None is all that comes."""
        self._skip = ALL if what is None else what
        self._slow_down()

    def frames(self, framing: Framing) -> Frames:
        """Return what ``async for frame in reader.frames(framing)`` goes through: the frames of the stream, as bytes.

        It ends where the stream ends between two frames. Raises, where the loop asks for a frame:

            FrameTooLong: a frame is longer than the framing's `max_size`, or else than the server's limit that
                `framing.limit` names: the peer's fault. The next read skips the rest of it.
            FramingError: the peer sent what the framing does not allow.
            IncompleteReadError: the stream ended in mid-frame; its `partial` holds what came of it.
            ConnectionTimeout: see Timeouts; `message` counts from a frame's first byte.
            RuntimeError: another coroutine waits for data already.
            OSError: the connection broke.
        """
        return Frames(self, self._bound(framing))

    def batches(self, framing: Framing) -> Batches:
        """As :meth:`frames`, but ``async for frames in ...`` gives lists: all whole frames that have come, at least one.

        For ingest: a list costs about as much as a frame.
        """
        return Batches(self, self._bound(framing))

    def _bound(self, framing: Framing) -> Framing:
        if not isinstance(framing, Framing):
            raise TypeError(f"framing must be an aioecho.framing.Framing, as Lines(), not {framing!r}")
        if framing.limit == "max_buffer":
            return framing.limited(self._limit)
        most = self._news.max_frame if self._news is not None else None
        return framing if most is None else framing.limited(most)
