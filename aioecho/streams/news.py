"""What a reader waits for, what it tells, and what was written and collected meanwhile."""

import asyncio
from io import BytesIO
from typing import Literal

from aioecho.runtime.driver import Waiter

__all__ = ["DEFAULT_LIMIT", "SLOW", "UNCOUNTED", "Buffer", "Collected", "News", "Slow"]

DEFAULT_LIMIT = 2**16
"""Bytes: asyncio's default for the longest line, and half of what a reader buffers before it pauses the transport."""

UNCOUNTED = 2**14
"""Bytes of a stream that the server's budget of memory does not count: most never hold more, and need not say so."""

Buffer = bytes | bytearray | memoryview


class Slow:
    """In place of a waiter where no read waits, and one has to look before it does; false, as None is."""

    def __bool__(self) -> Literal[False]:
        return False


SLOW = Slow()


class Collected(BytesIO):
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

    collected: Collected | None = None

    is_breathing: bool | None = False
    """Whether the transport is paused for a turn of the loop, after much has come; None: it never is."""

    held: int = 0
    """Bytes that the server's budget counts for this stream: 0 unless that is much."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        Waiter.__init__(self, loop)
        self.unanswered = False

    def update_slow_path(self) -> None:
        """Do nothing about what a write has to look at. To be overridden, as all here."""

    def note_all_read(self) -> None:
        """Do nothing about that either, where all that came is read and the reader has nothing to look at."""

    def mark_due(self) -> None:
        """Do nothing about a wait that has begun."""

    def wait_in_message(self) -> None:
        """Do nothing about a wait for the rest of what was read, or that was not answered."""

    def note_input(self, size: int) -> None:
        """Do nothing about `size` bytes that were buffered."""

    def note_read(self, size: int) -> None:
        """Do nothing about `size` bytes that were read past the transport."""

    def note_chunk(self, size: int) -> None:
        """Do nothing about a large chunk that was handed over as it came."""

    def note_memory(self) -> bool:
        """Do nothing about how much is buffered; return whether more may be."""
        return True

    def flush(self) -> None:
        """Write nothing."""
