"""Reading the frames of a stream, one by one or in lists."""

import asyncio
from asyncio import IncompleteReadError
from collections.abc import AsyncIterator, Generator
from typing import Any

from aioecho.exceptions import FrameTooLong, FramingError
from aioecho.framing import Framing
from aioecho.framing.base import check_split
from aioecho.runtime.steps import steps
from aioecho.streams.records import BIG, LEAST_WINDOW, MANY, WINDOW, RecordReader

__all__ = ["Batches", "Frames", "read_frames", "read_one_frame"]

# Bytes by which what is buffered may exceed the most that a frame may have, before a framing is taken to have overlooked that.
SLACK = 2**16


class _Reading:
    """What reads frames."""

    __slots__ = ("_framing", "_reader")

    def __init__(self, reader: RecordReader, framing: Framing) -> None:
        self._reader = reader
        self._framing = framing

    def _window(self) -> int:
        """Return how many bytes to split at a time, if no frame is longer."""
        raise NotImplementedError

    def _split(self) -> Generator[Any, None, tuple[list[bytes], int]]:
        """Wait until there are frames; return them, and how many bytes of the buffer they take. None: the stream has ended.

        Where much is buffered only its front is split: a frame of two bytes takes 50 as an object, and a peer that sends such
        while the handler is busy decides how many there are.
        """
        reader, framing = self._reader, self._framing
        yield from reader._look()
        if len(reader._received) > self._window() and reader._is_slice_over():
            yield from reader._breathe()
            yield from reader._look()
        received = reader._received
        while True:
            scan = reader._scan
            _, scanned, wanted = scan if scan is not None and scan[0] is self else (self, 0, 1)
            if len(received) >= wanted:
                size = max(wanted, self._window())
                front: bytearray | bytes = received if size >= len(received) else bytes(memoryview(received)[:size])
                size = len(front)
                try:
                    frames, used, wanted = framing.split(front, scanned)
                    if not used and framing.max_size is not None and size > framing.max_size + SLACK:
                        raise FrameTooLong(None, framing.max_size)
                except (FrameTooLong, FramingError) as error:
                    if error.skip != 0:
                        reader._skip_from_now(framing if error.skip is None else error.skip)
                    raise
                if not 0 < used <= size:
                    if scanned and wanted <= size and not (frames or used):
                        reader._scan = (self, 0, size)  # it asks for a call with `scanned` 0, and no fewer bytes
                        continue
                    check_split(framing, size, frames, used, wanted)
                if frames:
                    return frames, used
                if used:
                    reader._drop(used)
                    size -= used
                if wanted > size:
                    # One more than was there: nothing is known. So look at the more that is there, or wait.
                    more = min(4 * size, len(received)) if wanted == size + 1 else 0
                    reader._scan = (self, size, max(wanted, more))
                    wanted = max(wanted, more)
                if wanted <= len(received):
                    continue
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
        frames, used = yield from self._split()
        if len(frames) == 1:
            reader._drop(used)
            return frames[0]
        if not frames:
            raise StopAsyncIteration
        self._last = frames.pop()
        frames.reverse()
        reader._split, reader._holder = used, self
        reader._message_began = reader._scan = None
        batch = reader._batch
        if len(frames) > batch:
            self._further = frames[:-batch]
            frames = frames[-batch:]
        self._frames = frames
        if self._further and len(self._further) > MANY:
            reader._note_objects(len(self._further))
        return frames.pop()

    def forget(self) -> None:
        """Forget what was not handed out."""
        self._frames, self._further, self._last = [], [], None

    def has_more(self) -> bool:
        """Tell whether there is one that was not handed out."""
        return self._last is not None

    def _window(self) -> int:
        return self._reader._window

    def put_back(self, received: bytearray, used: int) -> int:
        """Forget what was not handed out, for another to read; return how many bytes the ones take that were."""
        reader = self._reader
        if self._last is None:
            reader._window = min(4 * reader._window, WINDOW)
            return used
        # A protocol of frames and counted bytes. To split all anew after every read of bytes would be quadratic.
        reader._window = max(reader._window // 4, LEAST_WINDOW)
        left = len(self._frames) + len(self._further) + 1
        self.forget()
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

    def _window(self) -> int:
        return BIG

    def __aiter__(self) -> "Batches":
        return self

    @steps
    def __anext__(self) -> Generator[Any, None, list[bytes]]:
        frames, used = yield from self._split()
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
        if not 0 < used <= len(received):
            check_split(framing, len(received), frames, used, wanted)
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
