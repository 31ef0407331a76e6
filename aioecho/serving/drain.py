"""A server's drain: the stages in which its connections come to their end, and how many ended at which stage.

A handler may finish until the grace is over. Then it is cancelled. If it swallows the cancellation, its connection is
aborted. If even that does not end it, the drain ends without it, so that nothing holds a stop up.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Any, Protocol

from aioecho.stats import DrainReport

__all__ = ["DEFAULT_GRACE", "OVER_GRACE", "Drain", "Served", "check_grace"]

logger = logging.getLogger("aioecho.drain")

DEFAULT_GRACE = 30.0
"""Seconds that handlers have to finish when a server stops."""

OVER_GRACE = 4.0
"""Seconds over the grace that the end of a program may take, if its tasks and its lifespan do not end when they are told to."""

STAGE_TIMEOUT = 0.25
"""Seconds, when the grace is over, from one of the three stages that follow to the next."""

# Connections that are ended in one turn of the loop, for others not to wait until thousands have been.
AT_A_TIME = 32

OVER = "when the grace was over"


class Served(Protocol):
    """A live connection, or a datagram's handler, as a drain sees it."""

    client_address: Any
    was_aborted: bool

    @property
    def outcome(self) -> str:
        """How it ended: "completed", "failed", "cancelled" or "rejected"."""

    @property
    def reason(self) -> str:
        """Why it ended."""

    @property
    def task(self) -> "asyncio.Task[Any] | None":
        """The task of its handler; None for a blocking handler."""

    def drain(self) -> None:
        """End it when there is nothing left to do."""

    def is_in_message(self) -> bool:
        """Tell whether a message is in progress: cancelling the handler cuts it."""

    def is_cut(self) -> bool:
        """Tell, at its end, whether a message that was in progress when the handler was cancelled was not answered since.

        Only asked if it has not ended as cancelled, as its handler has caught that.
        """

    def cancel(self) -> None:
        """Cancel the handler."""

    def abandon_handler(self) -> None:
        """End it, whatever its handler does: it has swallowed its cancellation."""


class Drain:
    """Drains a server in a task of its own, which the constructor starts. Until :meth:`shorten` is called the grace has no end.

    Args:
        served: the live connections, a collection that changes. The server calls :meth:`count` for each one that ends.
        close: accepts what the kernel has queued by now, and stops accepting.
        is_idle: returns whether no handler runs, and no request waits for one.
        drop_waiting: drops the requests that wait for a handler, when the grace is over, and returns how many of them were
            accepted connections.
        release: releases the server's other resources, at the end.
        level: the level of the log record of the end.
    """

    def __init__(
        self,
        served: Collection[Served],
        *,
        close: Callable[[], None],
        is_idle: Callable[[], bool],
        drop_waiting: Callable[[], int],
        release: Callable[[], Awaitable[None]],
        level: int,
    ) -> None:
        self._served = served
        self._close = close
        self._is_idle = is_idle
        self._drop_waiting = drop_waiting
        self._release = release
        self._level = level
        self._counts = {"completed": 0, "cancelled": 0, "aborted": 0, "unfinished": 0}
        self._in_message: set[Served] = set()  # when they were cancelled
        self._deadline = float("inf")
        self._why = OVER
        self._has_told_all = False
        self._timer: asyncio.TimerHandle | None = None  # for the next stage
        self.is_over = False
        """Whether the grace is over: handlers are cancelled, and nothing begins any more."""
        self._all_ended: asyncio.Future[None] | None = None  # None: it does not wait for that yet
        self._loop = loop = asyncio.get_running_loop()
        self._began = loop.time()
        # A plain task, whatever the loop's factory makes: an eager one would begin before the server knows that it drains.
        self.task = asyncio.Task(self._run(), loop=loop)

    def shorten(self, grace: float, why: str | None = None) -> None:
        """Set the deadline to `grace` seconds from now if that is earlier than the present one.

        The log says `why` handlers were cancelled then. None: the grace was over.
        """
        deadline = self._loop.time() + grace
        if deadline < self._deadline and not self.task.done():
            self._deadline = deadline
            self._why = OVER if why is None else why
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(deadline, self._cancel_all)

    def seconds_left(self) -> float:
        """Return the seconds until the grace is over; 0 from then on."""
        return max(0.0, self._deadline - self._loop.time())

    async def wait(self) -> DrainReport:
        """Return when the drain has ended. If the wait is cancelled, the grace is over at once."""
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError:
            self.shorten(0)
            with contextlib.suppress(asyncio.CancelledError):  # a further one: it can't be any faster
                await asyncio.wait([self.task])
            raise

    def count(self, ended: Served) -> None:
        """Count how a connection has ended; if it was the last one, end the drain."""
        if self._all_ended is not None and self._all_ended.done():
            return  # the drain has ended without it, and counted it then
        how = "aborted" if ended.was_aborted else "cancelled" if ended.outcome == "cancelled" else "completed"
        if ended in self._in_message:
            self._in_message.remove(ended)
            if how == "completed" and ended.is_cut():
                how = "cancelled"
            self._counts["unfinished"] += how != "completed"
        self._counts[how] += 1
        self.end_if_idle()

    def drain_late(self, connection: Served) -> None:
        """Tell a connection to drain that began after all others were told."""
        if self._has_told_all:
            connection.drain()

    def end_if_idle(self) -> None:
        """End the drain if nothing is left that it waits for."""
        if self._is_idle() and self._all_ended is not None and not self._all_ended.done():
            self._all_ended.set_result(None)

    async def _run(self) -> DrainReport:
        try:
            self._close()
            # By the second turn the loop has polled, and delivered all that had come before.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self._has_told_all = True
            rest = list(self._served)
            while rest:
                for connection in rest[-AT_A_TIME:]:
                    if connection in self._served:  # else it has ended meanwhile
                        connection.drain()
                # Not kept till the end: to free thousands at once takes long, and the more there are, the more the garbage
                # collector has to look at.
                del rest[-AT_A_TIME:], connection
                await asyncio.sleep(0)
            if not self._is_idle():
                self._all_ended = self._loop.create_future()
                await self._all_ended
        finally:
            await self._release()
        if self._timer is not None:
            self._timer.cancel()
        report = self.report()
        if report.cancelled or report.aborted:
            logger.warning("cut off %s: %d cancelled, %d aborted", self._why, report.cancelled, report.aborted)
        logger.log(self._level, "shut down in %.3f s", report.seconds)
        return report

    def report(self) -> DrainReport:
        """Return the counts as they stand now."""
        return DrainReport(**self._counts, seconds=self._loop.time() - self._began)

    # The stages after the grace.

    def _cancel_all(self) -> None:
        self.is_over = True
        self._counts["cancelled"] += self._drop_waiting()
        self.end_if_idle()
        self._do_with_all(list(self._served), self._cancel_one, self._abort_all)

    def _cancel_one(self, connection: Served) -> None:
        if connection.is_in_message():
            self._in_message.add(connection)
        connection.cancel()

    def _abort_all(self) -> None:
        self._do_with_all(list(self._served), self._abort_one, self._leave_behind)

    def _abort_one(self, connection: Served) -> None:
        if not connection.was_aborted:
            logger.warning("would not end when cancelled, and was cut off: %r", connection)
        connection.abandon_handler()

    def _do_with_all(self, rest: list[Served], act: Callable[[Served], None], next_stage: Callable[[], None]) -> None:
        """Do something with each connection that is live still, some in a turn; then set the timer for the next stage."""
        for connection in rest[-AT_A_TIME:]:
            if connection in self._served:
                act(connection)
        del rest[-AT_A_TIME:]
        if rest:
            self._timer = self._loop.call_later(0, self._do_with_all, rest, act, next_stage)
        else:
            self._timer = self._loop.call_later(STAGE_TIMEOUT, next_stage)

    def _leave_behind(self) -> None:
        if self._all_ended is None:  # the loop was blocked so long that _run() has not come this far
            self._timer = self._loop.call_later(STAGE_TIMEOUT, self._leave_behind)
        elif not self._all_ended.done():
            logger.error("left behind, as they would not end: %r", list(self._served))
            self._counts["aborted"] += len(self._served)
            self._counts["unfinished"] += len(self._in_message)
            self._all_ended.set_result(None)


def check_grace(grace: Any) -> None:
    """Raise ValueError unless `grace` is a number of seconds, from 0."""
    if not isinstance(grace, int | float) or isinstance(grace, bool) or not grace >= 0:
        raise ValueError(f"grace must be a number of seconds from 0, not {grace!r}")
