"""One peer's datagrams and the handler that they all go to."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Generator, Hashable
from time import monotonic
from typing import Any

from aioecho.datagrams.run import DatagramRun
from aioecho.datagrams.serving import DatagramServing
from aioecho.net.datagram_transport import DatagramTransport
from aioecho.runtime.driver import Driver, Waiter
from aioecho.runtime.logs import format_address
from aioecho.runtime.steps import steps
from aioecho.serving.beside import AccompaniedRun
from aioecho.serving.ends import Reason

__all__ = ["Datagrams", "Session"]


class Datagrams:
    """What one peer sends: ``async for data in datagrams`` gives its datagrams in the order of their coming, as bytes.

    Made by the server. One coroutine at a time can wait for the next.
    """

    __slots__ = ("_has_ended", "_is_waited_for", "_news", "_queue", "_server", "_size", "holds", "last_active")

    holds: int
    """How many `unbroken()` blocks the handler is in."""

    last_active: float
    """When a datagram came or went last, by monotonic()."""

    def __init__(self, server: DatagramServing, first: bytes) -> None:
        self._server = server
        self._news = Waiter(asyncio.get_running_loop())
        self._queue = deque((first,))
        self._size = len(first)
        self._has_ended = self._is_waited_for = False
        self.holds, self.last_active = 0, monotonic()
        server.live_stats.queued += 1

    def __aiter__(self) -> "Datagrams":
        return self

    @steps
    def __anext__(self) -> Generator[Any, None, bytes]:
        """Return the peer's next datagram; end when the peer has been silent for too long, or the server stops.

        Raises:
            RuntimeError: another coroutine waits for it already.
        """
        news = self._news
        while not self._queue:
            if self._has_ended:
                if (session := self.session) is not None:
                    # Else, at a stop, what still comes would wait for a handler that reads no more.
                    session.note_over()
                raise StopAsyncIteration
            if self._is_waited_for:
                raise RuntimeError("another coroutine is already waiting for the next datagram: one at a time can")
            self._is_waited_for = True
            try:
                yield news
            except BaseException:
                data = news.take()
                if data is not None:
                    self._queue.appendleft(data)
                    self._size += len(data)
                    self._server.live_stats.queued += 1
                raise
            finally:
                self._is_waited_for = False
            data = news.item
            if data is not None:
                news.item = None
                self._server.live_stats.handled += 1
                return data  # type: ignore[no-any-return]
        data = self._queue.popleft()
        self._size -= len(data)
        counts = self._server.live_stats
        counts.queued -= 1
        counts.handled += 1
        return data

    def feed(self, data: bytes, now: float) -> None:
        """Give a datagram to the coroutine that waits, or queue it, or drop it if the queue is full."""
        queue = self._queue
        self.last_active = now
        if queue or not self._news.deliver(data):
            limits, counts = self._server.limits, self._server.live_stats
            if queue and (len(queue) >= limits.max_session_queue or self._size + len(data) > limits.max_buffer):
                counts.drops["session queue full"] += 1
                return
            queue.append(data)
            self._size += len(data)
            counts.queued += 1
            if self._is_waited_for:
                self._news.wake()

    def is_quiet(self) -> bool:
        """Return whether the handler waits for a datagram, and none has come."""
        return self._is_waited_for and not self._queue

    def end(self) -> None:
        """Let it end after what is queued."""
        self._has_ended = True
        if self._is_waited_for:
            self._news.wake()

    def hold(self, count: int) -> None:
        """Count the blocks in which a drain does not end the session: add `count` to them."""
        self.holds += count
        session = self.session
        if not self.holds and self._server.is_draining and session is not None:
            session.drain()

    @property
    def session(self) -> "Session | None":
        """The session of the handler that gets them; None once that has ended."""
        driver = self._news.driver
        return driver if isinstance(driver, Session) else None

    def set_driver(self, driver: Driver | None) -> None:
        """Let the handler's task be stepped by a datagram that comes."""
        self._news.driver = driver

    def take_unread(self) -> list[bytes]:
        """Take what is queued, to be served and counted elsewhere."""
        unread = list(self._queue)
        counts = self._server.live_stats
        counts.queued -= len(unread)
        counts.received -= len(unread)
        self._queue.clear()
        self._size = 0
        return unread

    def drop(self, reason: str) -> None:
        """Drop what is queued."""
        if self._queue:
            counts = self._server.live_stats
            counts.queued -= len(self._queue)
            counts.drops[reason] += len(self._queue)
        self._queue.clear()
        self._size = 0


# Seconds without a datagram after which a session's exchange is over, when the server stops.
QUIET = 1.0


class Session(AccompaniedRun, DatagramRun):
    """A peer with a handler that runs, in `server.connections`. `client_address` is the peer's.

    Its life: live, in which it is fed; over, from when its datagrams have ended or its handler has, in which what comes is kept
    for the peer's next session; and ended, when its task has.
    """

    __slots__ = (
        "_RequestHandlerClass",
        "_is_to_drain",
        "_server",
        "datagrams",
        "has_handled",
        "is_over",
        "key",
        "last_heard",
        "newcomer",
        "successor",
    )

    called = "session"

    def __init__(
        self,
        server: DatagramServing,
        key: Hashable,
        client_address: Any,
        transport: DatagramTransport,
        datagrams: Datagrams,
    ) -> None:
        self._server = server
        self._RequestHandlerClass = server.RequestHandlerClass
        self.key = key
        self.client_address = client_address
        self.datagrams = datagrams
        self.request = (datagrams, transport)
        self.handler: Any = None
        self.successor: Datagrams | None = None
        self.newcomer: Any = None
        """A peer that waits for the place of this one."""
        self.reason: Reason = "finished"
        self.was_aborted = self.is_over = self.has_handled = self._is_to_drain = False
        self.last_heard = 0
        self.place = self._since = self._cancelled_at = None
        datagrams.set_driver(self)
        self.begin("session")

    def __repr__(self) -> str:
        return f"<Session with {format_address(self.client_address)}, handler={self.handler!r}>"

    def feed(self, data: bytes) -> None:
        """Give the handler a datagram, or keep it for the peer's next session."""
        if not self.is_over:
            self.datagrams.feed(data, monotonic())
        elif self.newcomer is not None:
            self._server.live_stats.drops["too many sessions"] += 1
        elif self.successor is None:
            self.successor = Datagrams(self._server, data)
        else:
            self.successor.feed(data, monotonic())

    def expire(self) -> None:
        """Let the datagrams end: the peer has been silent for too long, or is gone, or another one needs its place."""
        self.note_over()
        self.datagrams.end()

    def note_over(self) -> None:
        """Keep what comes from now on for the peer's next session. The handler's time counts from now on too."""
        if not self.is_over:
            self.is_over = True
            self.count_time()  # its peer's silence does not end it any more

    # What runs beside its handler.

    def is_before_end(self) -> bool:
        """Tell whether handle() has not ended, or has not begun."""
        return not self.has_handled

    def cancel_handler(self) -> None:
        """Cancel the handler."""
        self.task.cancel()

    def finish_handler(self, end: BaseException | None) -> Awaitable[None] | None:
        """End the tasks that the handler has made, and then do as for any handler.

        What comes from now on is for the next session.
        """
        self.has_handled = True
        self.note_over()
        self.datagrams.end()  # finish() may read what is left
        return self._end_tasks(end) if self._server.beside else super().finish_handler(end)

    async def _end_tasks(self, end: BaseException | None) -> None:
        try:
            end = await self.end_beside(end)
            finishing = super().finish_handler(end)
        finally:
            del end  # its traceback refers to this frame
        if finishing is not None:
            await finishing

    def give_up(self) -> None:
        """Count it as ended, though its handler goes on."""
        self.cancel_beside()
        super().give_up()

    # Its end.

    def finish(self) -> None:
        """Drop what the handler, which has ended, left unread, and end it for a task that the handler left behind."""
        self.is_over = True
        self.datagrams.set_driver(None)
        self.datagrams.end()
        super().finish()
        if self.outcome != "cancelled" or not self._server.is_grace_over:  # else the server passes it on, or drops it
            self.datagrams.drop("refused" if self.outcome == "rejected" else "session ended")

    def drain(self) -> None:
        """Let the datagrams end after the last that has come, once none has come or gone for QUIET seconds.

        Not while the handler is in an `unbroken()` block. They end at once where nothing more comes: in a worker that leaves
        the socket to others, and has no successor that passes on what comes for it.
        """
        if not self._server.gets_datagrams:
            self.datagrams.end()
            return
        if self.is_over or self.datagrams.holds:
            return  # the end of the block asks again
        left = self.datagrams.last_active + QUIET - monotonic()
        if left <= 0:
            self.datagrams.end()
        elif not self._is_to_drain:  # one timer, though the end of every block asks
            self._is_to_drain = True
            # uvloop's clock has whole milliseconds: without one more it would come too early, again and again.
            asyncio.get_running_loop().call_later(left + 0.001, self._drain_later)

    def _drain_later(self) -> None:
        self._is_to_drain = False
        self.drain()
