"""What the runs of a datagram's handler and of a session have in common: how long they may take, and how they are ended."""

import asyncio
from math import inf

from aioecho.serving.ends import Reason
from aioecho.serving.running import HandlerRun

__all__ = ["DatagramRun"]

# Seconds from a handler's cancellation until it is ended though it swallows that.
SWALLOWED_FOR = 1.0


class DatagramRun(HandlerRun):
    """A handler of one datagram, or of a peer's datagrams, that runs in a task of its own.

    ``Timeouts.datagram_handler`` counts from :meth:`count_time` on. The server's timeout sweeper applies it: it visits what is
    `due`.
    """

    __slots__ = ("_cancelled_at", "_since", "client_address", "due", "handler", "reason", "request", "was_aborted")

    due: float
    """When the sweeper visits it next, in the loop's time: 0 if it is to find that out, infinity if its time does not count."""

    was_aborted: bool
    _cancelled_at: float | None  # as it took too long
    _since: float | None  # when it was first visited

    def count_time(self) -> None:
        """Let the time count from the next sweep on, a twentieth of it later at the most: nothing looks at the clock here."""
        self.due = 0.0
        if not self._server.timeout_sweeper.is_on:
            self.keep_time()

    def keep_time(self) -> None:
        """Have the sweeper run, if there is a timeout."""
        timeouts = self._server.handler_timeouts
        if timeouts.datagram_handler is not None:
            self._server.timeout_sweeper.keep(timeouts)

    def timeouts_changed(self) -> None:
        """Apply timeouts that were replaced."""
        if self._cancelled_at is None and (self._since is not None or self.due == 0):
            self.due = 0.0
            self.keep_time()

    def visit(self, now: float) -> float:
        """Cancel the handler if it takes too long, and later end it if it goes on; return when to visit it next."""
        if now < self.due:  # a sweep may find it twice
            return self.due
        if self._cancelled_at is not None:
            self.due = inf
            self.abort()
            return inf
        self._since = self._since or now
        timeout = self._server.handler_timeouts.datagram_handler
        self.due = inf if timeout is None else self._since + timeout
        if self.due <= now:
            self._cancelled_at = now
            self.due = now + SWALLOWED_FOR
            self._server.report_timeout(self)
            self.cut_off()
        return self.due

    def _find_reason(self, error: BaseException) -> Reason:
        reason = super()._find_reason(error)
        return "datagram_handler" if reason == "cancelled" and self._cancelled_at is not None else reason

    # Its end.

    def __call__(self, task: "asyncio.Task[None]") -> None:
        """Count how it has ended. To be overridden."""
        self._server.task_ended(self, task)

    def forget(self) -> None:
        """Do what is to be done before a handler is counted as ended that goes on. To be overridden."""

    def give_up(self) -> None:
        """Count it as ended, though its handler goes on."""
        self.reason = "cancelled" if self._cancelled_at is None else "datagram_handler"
        self.task.remove_done_callback(self)
        self.forget()
        self._server.unregister_connection(self)

    # What the server asks of it when it stops.

    def is_in_message(self) -> bool:
        """Return False: a datagram is a whole message."""
        return False

    def cut_off(self) -> None:
        """Cancel the handler."""
        self.task.cancel()

    def abort(self) -> None:
        """End the handler even if it swallows its cancellation."""
        self.was_aborted = True
        self.abandon()
        self.cut_off()
