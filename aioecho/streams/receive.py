"""The buffer of a reader: what was received and not read yet, whole or split into lines and frames."""

import asyncio
from io import BytesIO
from time import monotonic
from typing import Any

from aioecho.framing import Framing
from aioecho.streams.frames import Batches, Frames
from aioecho.streams.news import UNCOUNTED, News, Slow
from aioecho.streams.records import BATCH, LEAST_BATCH, MANY, PIECE, SLICE, WINDOW

__all__ = ["ReceiveBuffer"]

# Lines that are handed out one by one, after lines that were split had to be put back for another kind of read: at first, and
# at the most, as it is four times as many each time that it happens.
SINGLES, MOST_SINGLES = 64, 2**16

# Bytes of a read after which more such are expected.
SHORT = 2**11


class ReceiveBuffer:
    """The part of StreamReader that keeps what was received, and hands out whole lines of it."""

    # asyncio's own names: its methods that are inherited (repr, at_eof, ...) go by them.
    _eof: bool
    _exception: BaseException | None
    _is_broken_off: bool = False  # it counts after all that is buffered
    _limit: int
    _loop: asyncio.AbstractEventLoop
    _paused: bool
    _transport: asyncio.ReadTransport | None

    _news: News
    _awaited: News | Slow | None  # what a read waits for; else None if the next may wait without looking further
    _unawaited: Slow | None  # what _awaited is, or will be, when no read waits

    _received: bytearray  # what asyncio calls its buffer, and more: bytes at its front that were handed out
    _piece: bytes = b""  # a copy of its front to read from
    _at: int = 0  # and so many bytes of that were handed out
    _singles: int = 0  # lines to hand out one by one before the next are split ahead,
    _next_singles: int = SINGLES  # and how many these will be the next time
    _split: int = 0  # or so many bytes of it were split into records
    _lines: list[bytes] = []  # noqa: RUF012 - of these the next to hand out, in reverse,
    _further_lines: list[bytes] = []  # noqa: RUF012 - the ones after them,
    _last_line: bytes | None = None  # and the last, after which it can be told whether a reply was written since
    _holder: Frames | None = None  # or what holds them, if they are frames
    _scan: tuple[Frames | Batches, int, int] | None = None  # how far which of these has looked at what is buffered

    _window: int = WINDOW  # bytes of it that are split into frames at a time

    _skip: Any = None  # what is to be skipped before the next record: see skip_record()
    _batch: int = LEAST_BATCH  # records between two looks at the clock
    _left: int = LEAST_BATCH  # records to hand out before the next look at the clock
    _slice_end: float = 0.0  # when the loop is to run

    _gathered: int = 0  # bytes that read(-1) has taken and not returned yet
    _objects: int = 0  # records that were split at a time, if many

    _message_began: float | None = None  # when a read came to wait for the rest of what it has begun to read

    @property
    def _buffer(self) -> bytearray:  # likewise
        self._settle()
        return self._received

    @_buffer.setter
    def _buffer(self, buffer: bytearray) -> None:
        self._received = buffer

    def _slow_down(self) -> None:
        """Let every read look at everything before it waits. To be overridden, as the next."""
        raise NotImplementedError

    def _speed_up(self) -> None:
        """Let reads wait without looking, if there is nothing to look at."""
        raise NotImplementedError

    def _keep(self, chunk: bytes | memoryview) -> None:
        """Buffer a chunk that was handed over, or the rest of one."""
        self._slow_down()
        # Not a large one: it would be in memory twice until it is read.
        if (
            not self._received
            and type(chunk) is bytes
            and len(chunk) <= PIECE
            and self._exception is None
            and self._skip is None
        ):
            self._piece = chunk  # and _at is 0
        self._received += chunk
        size = len(self._received)
        news = self._news
        if news is not None:  # the connection is not lost
            news.note_input(len(chunk))
        if size > 2 * self._limit and not self._paused and self._transport is not None:
            try:
                self._transport.pause_reading()
            except NotImplementedError:
                self._transport = None  # as asyncio: it can't be paused, so never ask again
            else:
                self._paused = True
        if size > UNCOUNTED and news is not None and size > news.held:
            news.note_memory()

    def _keep_lines(self, chunk: bytes) -> bytes:
        """Buffer a chunk that came while nothing was buffered. Hand out its first line, or nothing if that takes more."""
        self._slice_end = monotonic() + SLICE
        split = chunk.rfind(b"\n") + 1
        if (
            split != chunk.find(b"\n") + 1  # two lines at least
            and len(chunk) <= PIECE
            and len(chunk) <= self._limit
            and type(chunk) is bytes
            and not self._singles
            and self._exception is None
        ):
            self._slow_down()
            self._received += chunk
            self._news.note_input(split)
            return self._hand_out_lines(chunk if split == len(chunk) else chunk[:split], split)
        self._keep(chunk)
        return self._buffered_line()

    def _hand_out_lines(self, piece: bytes, split: int) -> bytes:
        """Split what has come, two lines at least, and hand out the first. They end after `split` bytes of the buffer."""
        lines = BytesIO(piece).readlines()
        self._last_line = lines.pop()
        lines.reverse()
        self._split = split
        batch = self._batch
        if len(lines) > batch:
            self._further_lines, lines = lines, lines[-batch:]
            del self._further_lines[-batch:]
        self._lines = lines
        if self._further_lines and len(self._further_lines) > MANY:
            self._note_objects(len(self._further_lines))  # which may abort the connection
        return lines.pop()

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

    def _take_rest(self) -> bytes:
        """Take all that is buffered, where all of it is in the piece."""
        piece, at = self._piece, self._at
        self._piece, self._at = b"", 0
        self._received.clear()
        self._note_taken()
        return piece[at:]

    def _drop(self, size: int) -> None:
        """Remove `size` bytes from the front of the settled buffer."""
        del self._received[:size]
        self._note_taken()

    def _note_taken(self) -> None:
        self._message_began = self._scan = None
        news = self._news
        if news is not None:
            news.unanswered = news.unanswered or True
            if news.held and (self._objects or len(self._received) <= news.held // 2):  # not at every record
                self._objects = 0
                news.note_memory()
        if self._paused and len(self._received) <= self._limit:
            assert self._transport is not None
            self._paused = False
            if news is None or not news.is_breathing:  # else the loop has its turn before
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
            elif self._last_line is not None:
                # A protocol of lines and counted bytes. To split all lines anew after each read of bytes would be quadratic.
                self._singles = self._next_singles
                self._next_singles = min(4 * self._next_singles, MOST_SINGLES)
                split -= sum(map(len, self._lines)) + sum(map(len, self._further_lines)) + len(self._last_line)
                self._lines = self._further_lines = []
                self._last_line = None
            self._drop(split)

    def _note_objects(self, count: int) -> None:
        """Have so many records that were split off, and are many, counted until they are handed out or put back."""
        self._objects = count
        if self._news is not None:
            self._news.note_memory()

    def _discard(self) -> None:
        """Forget all that was received and not handed out."""
        if self._holder is not None:
            self._holder.forget()
            self._holder = None
        self._lines = self._further_lines = []
        self._last_line = self._scan = None
        self._piece, self._at, self._split, self._objects = b"", 0, 0, 0
        self._received.clear()

    def _catch_up(self) -> None:
        """Write what was collected, as all that was buffered is read; then the next read may wait without looking further."""
        if self._news is not None and self._news.collected is not None:
            self._news.flush()
            self._speed_up()

    def _has_input(self) -> bool:
        """Tell whether more is buffered than was handed out."""
        return len(self._received) > (self._split or self._at) or bool(
            self._last_line is not None or (self._holder is not None and self._holder.has_more())
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

    def _buffered_line(self) -> bytes:
        """Hand out a whole line of the buffer, or nothing if that takes more than a look."""
        if self._last_line is not None:
            further = self._further_lines
            if further:
                if self._is_slice_over():
                    return b""
                batch = self._batch
                self._lines = lines = further[-batch:]
                del further[-batch:]
                return lines.pop()
            line, self._last_line = self._last_line, None
            split, self._split = self._split, 0
            self._drop(split)
            return line
        if self._split:
            self._settle()
        if not self._received:
            self._catch_up()
            return b""
        if (self._exception is not None and not self._is_broken_off) or self._skip is not None or self._is_due():
            return b""
        piece, at = self._piece, self._at
        if not piece:
            piece = bytes(memoryview(self._received)[:PIECE])
        most = at + self._limit + 1
        end = piece.find(b"\n", at, most) + 1
        if not end:
            return b""
        split = 0 if self._singles else piece.rfind(b"\n", end, most) + 1
        if not split:
            self._settle()
            return self._take(end - at)
        self._piece, self._at = b"", 0
        self._message_began = self._scan = None
        return self._hand_out_lines(piece[at:split], split)

    def _bound(self, framing: Framing) -> Framing:
        """Return `framing` with the server's limit, if it has none of its own."""
        if not isinstance(framing, Framing):
            raise TypeError(f"framing must be an aioecho.framing.Framing, as Lines(), not {framing!r}")
        if framing.limit == "max_buffer":
            return framing.limited(self._limit)
        most = self._news.max_frame if self._news is not None else None
        return framing if most is None else framing.limited(most)
