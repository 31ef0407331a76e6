"""The stream that a handler reads.

It is asyncio's with the same behaviour to the letter. What differs is how data gets to a coroutine that waits for it: at
once, through a Waiter of aioecho.runtime.driver, and as the chunk that the transport made, with no copy into a buffer and out
of it again.
"""

import asyncio
from asyncio import IncompleteReadError, LimitOverrunError
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal, SupportsIndex

from aioecho.runtime.driver import Waiter, steps

__all__ = ["DEFAULT_LIMIT", "Buffer", "StreamReader"]

DEFAULT_LIMIT = 2**16
"""Bytes: asyncio's default for the longest line, and half of what a reader buffers before it pauses the transport."""

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
    _seen: float | None = None  # when a visitor first found the wait that goes on, or that there is none

    def __init__(
        self,
        limit: int = DEFAULT_LIMIT,
        loop: asyncio.AbstractEventLoop | None = None,
        *,
        _news: Waiter | None = None,
    ) -> None:
        if loop is None or limit <= 0:
            super().__init__(limit, loop)  # which finds the one, or raises for the other
            loop = self._loop
        # What asyncio's does, without the two calls for each connection: of it and of a property.
        self._loop = loop
        self._limit = limit
        self._buffer = bytearray()
        self._eof = self._paused = False
        self._transport = self._exception = None
        self._news = _news if _news is not None else Waiter(loop)
        self._awaited = self._unawaited = None  # not as the class's, which 3.11 would look up anew for every read

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
            or self._seen is not None
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
        self._end()
        self._wakeup_waiter()

    def _end(self) -> None:
        self._eof = True
        self._slow_down()

    def set_exception(self, exc: BaseException) -> None:
        """Make this and every later read raise `exc`."""
        self._exception = exc
        self._slow_down()
        if self._news is not None:  # the connection is not lost
            self._news.heed()  # for drain(), which raises it too
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
        clock; "message" for the rest, counted from the first byte. When it is another wait, the protocol's stir() is called.
        """
        if self._seen is None:
            self._seen = now
            self._slow_down()  # for the next read to forget it; so a read that nobody has seen need not
        if not self._awaited:
            return None
        return ("idle", self._seen) if self._message_began is None else ("message", self._message_began)

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
        if self._message_began is None:  # else the wait that a visitor has seen goes on, though some more has come
            if self._seen is not None:
                self._seen = None
                self._news.stir()
            if self._buffer:
                self._message_began = self._loop.time()
        self._speed_up()
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

    def _keep(self, chunk: bytes | memoryview) -> None:
        """Buffer a chunk that was handed over, or the rest of one."""
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
                self._keep(memoryview(chunk)[n:])
                return chunk[:n]
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
        return self._take(n) if self._buffer else b""

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
