"""The outgoing side of a stream's protocol: what was written and is not sent yet.

What a handler writes while it has more of its peer's requests to read is collected, and goes to the transport in one piece:
uvloop makes a system call of every write.
"""

import asyncio
import contextlib
import socket
import struct
from time import monotonic

from aioecho.config import Limits
from aioecho.streams.memory import MemoryBudget
from aioecho.streams.news import UNCOUNTED, Buffer, Collected, News
from aioecho.streams.reader import StreamReader
from aioecho.streams.records import OBJECT

__all__ = ["Outgoing", "reset_when_closed", "set_result"]

# Bytes that are collected at the most, and seconds for which they are.
COLLECTED, COLLECTED_FOR = 2**16, 0.001


class Outgoing(News):
    """The part of StreamProtocol that writes, drains, and aborts a connection whose peer takes nothing.

    `is_lost` tells whether the connection ended, `aborted_for` why this side aborted it. `due` is when its timeouts are looked
    at next, and `paused_since` since when drain() waits, if it does, in the loop's time.

    `needs_slow_path` is True while a write or a drain() has something to look at. `collected` is what was written and is not
    handed to the transport yet: while it is not None, a drain() has nothing to wait for.
    """

    __slots__ = (
        "_budget",
        "_limits",
        "_socket_transport",
        "_waiting_to_write",
        "aborted_for",
        "collected",
        "due",
        "held",
        "is_lost",
        "needs_slow_path",
        "paused_since",
        "reader",
        "transport",
    )

    reader: StreamReader
    transport: asyncio.Transport
    _socket_transport: asyncio.Transport
    _limits: Limits | None
    _budget: MemoryBudget | None

    counts = False  # bytes

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        News.__init__(self, loop)
        self.aborted_for: str | None = None
        self.is_lost = False
        self.due = 0.0
        self.held = 0
        self.needs_slow_path = self.counts
        self.collected: Collected | None = None
        self.paused_since: float | None = None
        self._waiting_to_write: tuple[asyncio.Future[None], ...] = ()

    # Writing.

    def write(self, data: Buffer) -> None:
        """Write what the writer does not hand to the transport itself: collect it, or look at everything first."""
        if type(data) is not bytes and not isinstance(data, Buffer):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")  # as asyncio's
        if (
            len(data) >= COLLECTED
            or not self.reader._has_input()
            or self._is_disturbed()
            or self.transport.is_closing()
        ):
            self.write_through(data)
            return
        driver = self._driver
        if driver is None or not driver.is_running():  # else note_hand_over() comes at the latest
            self._loop.call_soon(self.note_hand_over)
        self.unanswered = False
        self.collected = collected = Collected(COLLECTED, monotonic() + COLLECTED_FOR)
        self.needs_slow_path = True
        collected.room -= collected.write(data)

    def write_through(self, data: Buffer) -> None:
        """Hand `data` to the transport now, after what was collected."""
        if self.unanswered:
            self.unanswered = False
            if self.reader._drain is not None:
                self.reader.note_answer()
        if self.collected is not None:
            self.flush()
        if self.note_write(data):
            self.transport.write(data)

    def push(self, data: bytes, most: int) -> bool:
        """Write a message that answers nothing, unless more than `most` bytes would wait to be sent then: return False.

        What goes nowhere, as the connection is lost or this side has ended its stream, counts as written.
        """
        if self.collected is not None:
            self.flush()
        if self.is_lost or self.aborted_for is not None or self.transport.is_closing():  # the loops would warn
            return True
        socket_transport = self._socket_transport
        unsent = socket_transport.get_write_buffer_size()
        if unsent and unsent + len(data) > most:
            return False
        if self.counts and not self.note_write(data):
            return True
        try:
            self.transport.write(data)
        except RuntimeError:  # after write_eof()
            return True
        if self.due and socket_transport.get_write_buffer_size():
            self.mark_due()
        return True

    def flush(self) -> None:
        """Hand what was collected to the transport."""
        collected, self.collected = self.collected, None
        if collected is not None:
            data = collected.getvalue()
            if self.note_write(data):
                self.transport.write(data)

    def note_hand_over(self) -> None:
        """Flush for a handler that waits for something else than its stream."""
        if self.collected is not None:
            self.flush()

    def note_write(self, data: Buffer) -> bool:
        """Return whether to write `data`; if too much waits to be sent already, abort the connection.

        Called where that is possible, or the connection lost: then loops would warn for every write, or raise.
        """
        if self.due:
            self.mark_due()
        if self.is_lost or self.aborted_for is not None or self.is_write_lost():
            return False
        most = self._limits.max_write_buffer if self._limits is not None else None
        if most is not None and self.unsent() > most:
            self.abort_for("write buffer")
            return False
        if self.paused_since is not None:
            self.note_memory()
        return True

    def is_write_lost(self) -> bool:
        """Tell whether what is written goes nowhere, as the connection broke and connection_lost() was not called yet.

        The loops warn of every such write, "socket.send() raised exception".
        """
        transport = self.transport
        return transport.is_closing() and not transport.get_write_buffer_size()

    def unsent(self) -> int:
        """Return how many bytes wait that the kernel has not taken."""
        # The TLS transport of a server's stream holds nothing back but for moments: aioecho.streams.tls.
        size = self._socket_transport.get_write_buffer_size()
        return size if self.collected is None else size + COLLECTED - self.collected.room

    def note_memory(self) -> bool:
        """Tell the server's budget how much is buffered in either direction, if that is much.

        Return False if the connection was aborted, for this or something else.
        """
        budget, reader = self._budget, self.reader
        if budget is not None:
            held = len(reader._received) + reader._gathered + OBJECT * reader._objects
            if self.paused_since is not None and not self.is_lost:
                held += self.unsent()
            if held <= UNCOUNTED:
                held = 0
            if held != self.held:
                self.held = held
                budget.note(self, held)
                if self.is_lost and not held:
                    self._part_from_reader()
        return self.aborted_for is None

    def release_memory(self) -> None:
        """Count nothing more for the server's budget: the handler has ended. Until then it may read what is buffered."""
        budget, self._budget = self._budget, None
        if budget is not None and self.held:
            self.held = 0
            budget.note(self, 0)
            if self.is_lost:
                self._part_from_reader()

    def _part_from_reader(self) -> None:
        """Have the reader of a lost connection, which waits no more, tell nothing from now on: it holds little."""
        self.reader._news = None  # type: ignore[assignment]

    def abort_for(self, reason: str) -> None:
        """Abort the connection: what is unsent is thrown away. `aborted_for` is the first such reason."""
        if not self.is_lost:
            self.aborted_for = self.aborted_for or reason
            self.collected = None
            self.mark_due()
            if self.paused_since is not None:
                reset_when_closed(self.transport)
            if reason == "memory":
                self.reader.discard(_aborted(reason))  # at once: many may be aborted in one turn of the loop
            self.transport.abort()
        elif reason == "memory":  # its handler has not ended
            self.drop_received(reason)

    def drop_received(self, reason: str) -> None:
        """Let reads fail at once, and what was received and not read go."""
        # No end of the stream that the peer has not sent: what it sent was not all.
        self.reader.discard(_aborted(reason))
        self.reader.set_exception(_aborted(reason))

    # What writes and drain() look at.

    def _is_disturbed(self) -> bool:
        """Tell whether drain() has something to wait for, or to raise."""
        return (
            self.paused_since is not None
            or self.is_lost
            or self.aborted_for is not None
            or self.reader._exception is not None
            or self.reader.overdue_since is not None
        )

    def note_all_read(self) -> None:
        """Find out the same where the reader has nothing to look at, and nothing is collected: that takes less."""
        self.needs_slow_path = (
            self.counts or self.due > 0 or self.paused_since is not None or self.is_lost or self.aborted_for is not None
        )

    def update_slow_path(self) -> None:
        """Find out whether writes and drain() have something to look at."""
        self.needs_slow_path = (
            self.collected is not None
            or bool(self.reader._received)
            or self.reader._drain is not None
            or self.counts
            or self.due > 0
            or self._is_disturbed()
        )

    def postpone(self, until: float) -> None:
        """Look at its timeouts no sooner than then, unless a read comes to wait, or something is written."""
        if self.collected is None:  # else something is about to be written
            self.due = until
            self.needs_slow_path = True  # for the next write to tell

    def mark_due(self) -> None:
        """Look at its timeouts soon."""
        if self.due:
            self.due = 0.0
            if self.driver is not None:
                self.driver.mark_due()
        self.update_slow_path()

    # Draining.

    def pause_writing(self) -> None:
        """Let drain() wait."""
        if self.collected is not None:
            self.flush()
        self.paused_since = self._loop.time()
        self.note_memory()
        self.mark_due()

    def resume_writing(self) -> None:
        """Let drain() return."""
        self.paused_since = None
        self.note_memory()
        self.update_slow_path()
        for waiting in self._waiting_to_write:
            set_result(waiting)

    def interrupt_drains(self, exc: Exception) -> bool:
        """Raise `exc` in every drain() that waits; return whether any does."""
        waiting = [each for each in self._waiting_to_write if not each.done()]
        for each in waiting:
            each.set_exception(exc)
        return bool(waiting)

    def end_drains(self, exc: Exception | None) -> None:
        """Let drain() return, or raise `exc`: the connection ended."""
        for waiting in self._waiting_to_write:
            if exc is None or waiting.done():
                set_result(waiting)
            else:
                waiting.set_exception(exc)

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


def _aborted(reason: str) -> ConnectionAbortedError:
    return ConnectionAbortedError(f"the server aborted the connection: {reason}")


def reset_when_closed(transport: asyncio.BaseTransport) -> None:
    """Let a connection end with a reset: for one that is closed over data that its peer has not taken.

    Otherwise the kernel goes on offering the peer what it has in its own buffer, megabytes and for minutes, and then tells it
    that this was all.
    """
    sock = transport.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):  # it is closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def set_result(future: "asyncio.Future[None]") -> None:
    """End a wait that has not ended otherwise."""
    if not future.done():
        future.set_result(None)
