"""Reading the frames of a stream, one by one or in lists."""

import asyncio
from asyncio import IncompleteReadError
from collections.abc import AsyncIterator, Generator
from typing import Any

from aioecho.exceptions import FrameTooLong, FramingError
from aioecho.framing import Buffer, Framing
from aioecho.runtime.steps import steps
from aioecho.streams.records import RecordReader

__all__ = ["Batches", "Frames", "read_frames", "read_one_frame"]

# Bytes that are split at first, after frames that were split had to be put back for another kind of read.
LITTLE = 64

# Bytes that are buffered behind a lone little frame, and are no frames, after which no more than LITTLE are split.
MUCH = 2**12

# Bytes by which what is buffered may exceed the most that a frame may have, before a framing is taken to have overlooked that.
SLACK = 2**16


class _Reading:
    """What reads frames."""

    __slots__ = ("_framing", "_reader")

    def __init__(self, reader: RecordReader, framing: Framing) -> None:
        self._reader = reader
        self._framing = framing

    def _split(self, is_little: bool) -> Generator[Any, None, tuple[list[bytes], int]]:
        """Wait until there are frames; return them, and how many bytes of the buffer they take. None: the stream has ended.

        If `is_little`, split no more of the buffer than it takes to find some.
        """
        reader, framing = self._reader, self._framing
        yield from reader._look()
        received = reader._received
        while True:
            scan = reader._scan
            _, scanned, wanted = scan if scan is not None and scan[0] is self else (self, 0, 1)
            if len(received) >= wanted:
                part: Buffer = received
                if is_little and len(received) > max(wanted, LITTLE):
                    part = bytes(memoryview(received)[: max(wanted, LITTLE)])
                try:
                    frames, used, wanted = framing.split(part, scanned)
                    if not used and framing.max_size is not None and len(part) > framing.max_size + SLACK:
                        raise FrameTooLong(None, framing.max_size)
                except (FrameTooLong, FramingError) as error:
                    if error.skip != 0:
                        reader._skip_from_now(framing if error.skip is None else error.skip)
                    raise
                if frames:
                    return frames, used
                if used:
                    reader._drop(used)
                if part is not received:
                    is_at_once = used or wanted <= len(part)
                    reader._scan = (
                        None if is_at_once else (self, len(part), max(wanted, min(4 * len(part), len(received))))
                    )
                    continue
                if wanted <= len(received):
                    continue
                reader._scan = (self, len(received), wanted)
            if reader._eof:
                if received:
                    partial = reader._take(len(received))
                    raise IncompleteReadError(partial, wanted if wanted > len(partial) + 1 else None)
                return [], 0
            yield from reader._wait("frames")
            if reader._skip is not None:
                yield from reader._look()


class Frames(_Reading):
    """``async for frame in reader.frames(framing)``: see :meth:`StreamReader.frames`."""

    __slots__ = ("_frames", "_further", "_last", "asked_for")

    def __init__(self, reader: RecordReader, framing: Framing, asked_for: Framing) -> None:
        super().__init__(reader, framing)
        self.asked_for = asked_for
        """The framing as the caller gave it, without the limit that the server has set."""
        # What was split off the reader's buffer and not handed out: in reverse, and the last of all.
        self._frames: list[bytes] = []
        self._further: list[bytes] = []
        self._last: bytes | None = None

    def __aiter__(self) -> "Frames":
        return self

    @steps
    def __anext__(self) -> Generator[Any, None, bytes]:
        if self._frames:
            return self._frames.pop()
        reader = self._reader
        if self._last is not None:
            if self._further:
                if reader._is_slice_over():
                    yield from reader._breathe()
                    if self._frames:  # another coroutine has read meanwhile
                        return self._frames.pop()
                if self._further:  # no other read came in between
                    self._frames = self._further[-reader._batch :]
                    del self._further[-reader._batch :]
                    return self._frames.pop()
            if self._last is not None:
                last, self._last = self._last, None
                reader._settle()
                return last
        frames, used = yield from self._split(reader._singles > 0)
        if len(frames) == 1:
            reader._drop(used)
            if reader._received and used < LITTLE and len(reader._received) > MUCH:
                reader._expect_singles()
            return frames[0]
        if not frames:
            raise StopAsyncIteration
        self._last = frames.pop()
        frames.reverse()
        reader._split, reader._holder = used, self
        if reader._singles:
            reader._singles = max(0, reader._singles - len(frames) - 1)
        reader._message_began = reader._scan = None
        batch = reader._batch
        if len(frames) > batch:
            self._further = frames[:-batch]
            frames = frames[-batch:]
        self._frames = frames
        return frames.pop()

    def has_more(self) -> bool:
        """Tell whether there is one that was not handed out."""
        return self._last is not None

    def put_back(self, received: bytearray, used: int) -> int:
        """Forget what was not handed out, for another to read; return how many bytes the ones take that were."""
        if self._last is None:
            return used
        left = len(self._frames) + len(self._further) + 1
        self._frames, self._further, self._last = [], [], None
        split = self._framing.split
        count = len(split(bytes(received[:used]))[0]) - left
        # The shortest beginning that holds so many frames: a frame tells nothing of how long it was.
        shortest, longest = 0, used
        while shortest < longest:
            middle = (shortest + longest) // 2
            frames = split(bytes(received[:middle]))[0]
            if len(frames) >= count:
                longest = middle
            else:
                shortest = middle + 1
        return shortest


class Batches(_Reading):
    """``async for frames in reader.batches(framing)``: see :meth:`StreamReader.batches`."""

    __slots__ = ()

    def __aiter__(self) -> "Batches":
        return self

    @steps
    def __anext__(self) -> Generator[Any, None, list[bytes]]:
        frames, used = yield from self._split(False)
        if not frames:
            raise StopAsyncIteration
        self._reader._drop(used)
        return frames


async def read_frames(reader: asyncio.StreamReader, framing: Framing) -> AsyncIterator[bytes]:
    """Yield the frames of a stream of asyncio's own. Nothing is read that is not of the frame, so that other reads may follow.

    That is slow where a frame ends with a separator: it is read byte by byte.
    """
    received = bytearray()
    while True:
        frames, used, wanted = framing.split(received)
        del received[:used]
        for frame in frames:
            yield frame
        if wanted > len(received):
            try:
                received += await reader.readexactly(wanted - len(received))
            except IncompleteReadError as error:
                received += error.partial
                if received:
                    raise IncompleteReadError(bytes(received), None) from None
                return


async def read_one_frame(reader: asyncio.StreamReader, framing: Framing) -> bytes:
    """Return the next frame of a stream of asyncio's own. Raises IncompleteReadError at the end of the stream."""
    async for frame in read_frames(reader, framing):
        return frame
    raise IncompleteReadError(b"", None)
