"""The stream that a handler reads.

It is asyncio's with the same behaviour to the letter. Two things differ. Data gets to a coroutine that waits for it at once,
through a Waiter of aioecho.runtime.driver, and as the chunk that the transport made, with no copy into a buffer and out of
it again. And where a chunk holds many lines, it is split once: lines are handed out of a list. What is split and not handed
out is still in the buffer, so that every other method reads the same bytes.
"""

import asyncio
from asyncio import IncompleteReadError, LimitOverrunError
from collections.abc import Generator
from time import monotonic
from typing import Any

from aioecho.exceptions import FrameTooLong, LineTooLong
from aioecho.framing import Framing
from aioecho.runtime.steps import steps
from aioecho.streams.frames import Batches, Frames
from aioecho.streams.news import DEFAULT_LIMIT, Buffer, News
from aioecho.streams.records import BIG, SLICE, Gathered, find_separator
from aioecho.streams.waiting import WaitingReader

__all__ = ["StreamReader"]


class StreamReader(WaitingReader, asyncio.StreamReader):
    """asyncio's StreamReader, faster, and with :meth:`frames` and :meth:`batches`.

    Made by the server. Any code may call :meth:`feed_data`, :meth:`feed_eof` and :meth:`set_exception`, as with asyncio's.
    On every version of Python `readuntil` takes a tuple of separators too, as it does in 3.13's.
    """

    # What a read touches that waits at once is not in the dictionary: among thousands of connections, it would be in no cache.
    # Nor is what an idle one has. Where there are slots, 3.13 makes a dictionary of 300 bytes for a single attribute more.
    __slots__ = (
        "_awaited",
        "_eof",
        "_exception",
        "_limit",
        "_loop",
        "_news",
        "_paused",
        "_received",
        "_seen",
        "_transport",
        "_unawaited",
    )

    _unchecked: int = DEFAULT_LIMIT  # bytes that readexactly() reads without looking at max_frame

    def __init__(
        self,
        limit: int = DEFAULT_LIMIT,
        loop: asyncio.AbstractEventLoop | None = None,
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
        self._awaited = self._unawaited = None
        self._seen = None  # not as the class's: the first visit would add 100 bytes to every reader on 3.11

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
                        waiter.note_chunk(len(chunk))
                    return chunk
                self._keep(memoryview(chunk)[n:])
                waiter.unanswered = waiter.unanswered or True
                return chunk[:n]
            if self._interruption is not None:
                self._raise_interruption()
            if self._eof and not self._received and self._exception is None and self._overdue is None:
                return b""  # as most connections end
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
        gathered = Gathered()
        most = self._news.max_frame if self._news is not None else None
        try:
            while block := (yield from self._read(self._limit, gathered.size > 0)):
                gathered.add(block)
                if most is not None and gathered.size > most:
                    self._skip_from_now(None)
                    raise FrameTooLong(None, most)
                self._gathered = gathered.size
                if self._news is not None:
                    self._news.note_memory()
        finally:
            self._gathered = 0
            if self._news is not None:
                self._news.note_memory()
        return gathered.join()

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
        if self._awaited is not None:
            # As in _buffered_line(), with no call of it: a line in a protocol that has counted bytes between lines.
            if self._singles and self._left > 0 and (piece := self._piece):
                at = self._at
                end = piece.find(b"\n", at, at + self._limit + 1) + 1
                if 0 < end < len(piece):
                    self._singles -= 1
                    self._left -= 1
                    self._at = end
                    return piece[at:end]
            if line := self._buffered_line():
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
                if line := self._keep_lines(chunk):
                    return line
            elif self._interruption is not None:
                self._raise_interruption()
        return (yield from self._readline())

    @steps
    def __anext__(self) -> Generator[Any, None, bytes]:
        if self._lines:
            return self._lines.pop()
        if self._awaited is not None:
            # As in _buffered_line(), with no call of it: a line in a protocol that has counted bytes between lines.
            if self._singles and self._left > 0 and (piece := self._piece):
                at = self._at
                end = piece.find(b"\n", at, at + self._limit + 1) + 1
                if 0 < end < len(piece):
                    self._singles -= 1
                    self._left -= 1
                    self._at = end
                    return piece[at:end]
            if line := self._buffered_line():
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
                if line := self._keep_lines(chunk):
                    return line
            elif self._interruption is not None:
                self._raise_interruption()
        line = yield from self._readline()
        if line:
            return line
        raise StopAsyncIteration

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
        piece = self._piece
        if piece:
            at = self._at
            if at + n < len(piece) and self._left > 0 <= n <= self._unchecked:
                self._left -= 1
                self._at = at + n
                return piece[at : at + n]
            if at + n == len(piece) == len(self._received) and self._left > 0 <= n <= self._unchecked:
                self._left -= 1
                return self._take_rest()
        elif self._awaited is not None and not self._received:
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
                if n < len(chunk) and self._piece and self._left > 0:
                    self._left -= 1
                    self._at = n
                    return chunk[:n]
            elif self._interruption is not None:
                self._raise_interruption()
        elif n < 0:
            raise ValueError("readexactly size can not be less than zero")
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
        return Frames(self, self._bound(framing), framing)

    async def readframe(self, framing: Framing) -> bytes:
        """Return the next frame, for protocols that go on in steps: at the end of the stream raise IncompleteReadError.

        Its `partial` is b"" if the stream ended between two frames. It raises what :meth:`frames` does besides.
        """
        held = self._holder
        try:
            if held is not None and held.asked_for is framing and held.has_more():
                return await anext(held)
            return await anext(self.frames(framing))
        except StopAsyncIteration:
            raise IncompleteReadError(b"", None) from None

    def batches(self, framing: Framing) -> Batches:
        """As :meth:`frames`, but ``async for frames in ...`` gives lists: the whole frames that have come, at least one.

        Of more than 64 KiB that have come, the first ones. For ingest: a list costs about as much as a frame.
        """
        return Batches(self, self._bound(framing))
