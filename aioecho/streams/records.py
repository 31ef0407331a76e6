"""What reading records has beside the reader itself: how long it goes on without the loop, how it searches and skips."""

from collections.abc import Generator, Sequence
from typing import Any, Protocol

from aioecho.framing import Framing
from aioecho.framing.separated import skip_to

__all__ = [
    "ALL",
    "BATCH",
    "BIG",
    "LEAST_BATCH",
    "LEAST_WINDOW",
    "MANY",
    "OBJECT",
    "PIECE",
    "SLICE",
    "WINDOW",
    "Gathered",
    "RecordReader",
    "find_separator",
    "skip_record",
]

SLICE = 0.00025
"""Seconds that a handler is given records that are buffered, before the loop runs: other connections have their turn."""

LEAST_BATCH, BATCH = 4, 64
"""Records that are handed out between two looks at the clock: the fewer, the longer a handler takes for them."""

PIECE = 2**14
"""Bytes that are split into records at a time, so that what is split is not much more than what is handed out soon."""

WINDOW, LEAST_WINDOW = 2**15, 2**6
"""The same of frames; and after some that were split had to be put back for another kind of read, again and again."""

MANY, OBJECT = 2**9, 48
"""Records that count for the server's budget of memory where more are split at a time, and the bytes that one counts: as an
object even an empty one takes so many, and a place in a list."""

BIG = 2**16
"""Bytes: a chunk after which the loop has a turn before it reads on. libuv reads a socket up to 32 times in a row."""

ALL: Any = object()
"""To skip all that comes, up to the end of the stream."""

# Bytes that are searched at first.
SEARCHED_FIRST = 256

# Bytes: shorter blocks are gathered in one object. As objects of their own they would take many times their bytes.
SHORT_BLOCK = 2**12


class Gathered:
    """The blocks that read(-1) has read so far, which are `size` bytes."""

    def __init__(self) -> None:
        self.size = 0
        self._blocks: list[bytes] = []
        self._short = bytearray()  # what came after these

    def add(self, block: bytes) -> None:
        """Add a block."""
        self.size += len(block)
        if len(block) < SHORT_BLOCK:
            self._short += block
            return
        if self._short:
            self._blocks.append(bytes(self._short))
            self._short.clear()
        self._blocks.append(block)

    def join(self) -> bytes:
        """Return all of them."""
        return b"".join((*self._blocks, self._short))


class RecordReader(Protocol):
    """What code that reads records needs of a reader."""

    _received: bytearray
    _eof: bool
    _split: int
    _holder: Any
    _scan: Any
    _skip: Any
    _batch: int
    _window: int
    _message_began: float | None

    def _look(self) -> Generator[Any, None, None]: ...
    def _wait(self, func_name: str, began: bool = False) -> Generator[Any, None, None]: ...
    def _is_slice_over(self) -> bool: ...
    def _breathe(self) -> Generator[Any, None, None]: ...
    def _settle(self) -> None: ...
    def _take(self, size: int) -> bytes: ...
    def _drop(self, size: int) -> None: ...
    def _skip_from_now(self, what: Any) -> None: ...
    def _note_objects(self, count: int) -> None: ...


def find_separator(buffer: bytearray, separators: Sequence[Any], searched: int) -> tuple[int, int] | None:
    """Return where the separator starts and ends that ends first, from `searched` on; None if there is none.

    `separators` is sorted by length. Of two that end together the later start counts, which is the shorter's.
    """
    if len(separators) == 1:
        start = buffer.find(separators[0], searched)
        return None if start < 0 else (start, start + len(separators[0]))
    # In windows that grow, so that a separator that is far away, or not there, is not searched for to the end each time.
    window, longest = SEARCHED_FIRST, len(separators[-1])
    while searched < len(buffer):
        stop = searched + window
        found = [
            (start + len(separator), start)
            for separator in separators
            if (start := buffer.find(separator, searched, stop)) >= 0
        ]
        if found:
            end, start = min(found, key=_end_of)
            return start, end
        if stop >= len(buffer):
            break
        searched, window = max(searched, stop - longest + 1), 4 * window
    return None


def _end_of(match: tuple[int, int]) -> int:
    return match[0]


def skip_record(reader: RecordReader) -> Generator[Any, None, None]:
    """Skip the rest of a record that was too long or malformed, without buffering it.

    `reader._skip` is a number of bytes, the separator that ends the record, a framing that finds its end, or ALL.
    """
    while True:
        skip, received = reader._skip, reader._received
        if isinstance(skip, int):
            done = min(skip, len(received))
            reader._skip = skip - done
            has_ended = done == skip
        elif isinstance(skip, Framing):
            done, has_ended = skip.resync(received)
        elif skip is ALL:
            done, has_ended = len(received), False
        else:
            done, has_ended = skip_to(skip, received)
        if has_ended or reader._eof:
            reader._skip = None
        began = reader._message_began
        reader._drop(done if has_ended or not reader._eof else len(received))
        if reader._skip is None:
            return
        reader._message_began = began  # what is skipped is one message
        yield from reader._wait("read")
