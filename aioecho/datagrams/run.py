"""What the runs of a datagram's handler and of a session have in common: how long they may take, and how they are ended."""

import asyncio
import sys
from math import inf
from typing import Any

from aioecho.serving.ends import Reason
from aioecho.serving.running import SWALLOWED_FOR, HandlerRun

__all__ = ["DatagramRun"]


class DatagramRun(HandlerRun):
    """A handler of one datagram, or of a peer's datagrams, that runs in a task of its own.

    ``Timeouts.datagram_handler`` counts from :meth:`count_time` on. The server's timeout sweeper applies it.
    """

    __slots__ = ("_cancelled_at", "_since", "client_address", "handler", "place", "reason", "request", "was_aborted")

    place: Any
    """The timeout sweeper's."""

    was_aborted: bool
    _cancelled_at: float | None  # as it took too long
    _since: float | None  # when it was first visited

    @property
    def since(self) -> float | None:
        """When it began, up to a twentieth of its timeout late; None until the timeouts are looked at first."""
        return self._since

    def count_time(self) -> None:
        """Let the time count from the next sweep on, a twentieth of it later at the most: nothing looks at the clock here."""
        self._server.timeout_sweeper.watch(self, self._server.handler_timeouts)

    def visit(self, now: float) -> float:
        """Cancel the handler if it takes too long, and later end it if it goes on; return when to visit it next."""
        if self._cancelled_at is not None:
            if now >= self._cancelled_at + SWALLOWED_FOR:
                self.abandon_handler()
                return inf
            return self._cancelled_at + SWALLOWED_FOR
        self._since = self._since or now
        timeout: float | None = self._server.handler_timeouts.datagram_handler
        if timeout is None:
            return inf
        if now >= self._since + timeout:
            self._cancelled_at = now
            self._server.report_timeout(self)
            self.cancel()
            return now + SWALLOWED_FOR
        return self._since + timeout

    def _find_reason(self, error: BaseException) -> Reason:
        reason = super()._find_reason(error)
        return "datagram_handler" if reason == "cancelled" and self._cancelled_at is not None else reason

    def begin(self, name: str) -> None:
        """Make the task, which runs the handler. `name` is for people: of this kind."""
        self.start(self._run(), asyncio.get_running_loop(), self._server.task_context.copy(), name)
        self.task.add_done_callback(self, context=self._server.task_context)

    async def _run(self) -> None:
        end: BaseException | None = None
        try:
            try:
                awaitable = self.prepare()
                if awaitable is not None:
                    await awaitable
                if self.handler is not None:
                    await self.handle()
            except BaseException:
                end = self.end_with(sys.exception())
            finishing = self.finish_handler(end)
            if finishing is not None:
                await finishing
        except RuntimeError:
            self.raise_if_abandoned()
            raise
        finally:
            del end  # its traceback refers to this frame
            self.finish()
            await self.hand_back()

    # Its end.

    def finish(self) -> None:
        """Note that its handler has ended, or has never begun. May be called more than once."""
        if self.handler is None and self.reason == "finished":  # its task was cancelled before it began
            self.reason = "cancelled"

    def __call__(self, task: "asyncio.Task[None]") -> None:
        """Count how it has ended. To be overridden."""
        self._server.task_ended(self, task)

    def give_up(self) -> None:
        """Count it as ended, though its handler goes on."""
        self.reason = "cancelled" if self._cancelled_at is None else "datagram_handler"
        self.task.remove_done_callback(self)
        self._server.replace(self)
        self._server.unregister_connection(self)

    # What the server asks of it when it stops.

    def is_in_message(self) -> bool:
        """Return False: a datagram is a whole message."""
        return False

    def is_cut(self) -> bool:
        """Return False, likewise."""
        return False

    def cancel(self) -> None:
        """Cancel the handler."""
        self.task.cancel()
