"""What a connection does while a coroutine of verify_request() decides about it."""

import asyncio
import contextlib
import inspect
from collections.abc import Awaitable
from typing import Any

from aioecho.serving.draining import DrainedConnection
from aioecho.serving.ends import Reason

__all__ = ["VerifiedConnection"]


class VerifiedConnection(DrainedConnection):
    """The part of a :class:`~aioecho.serving.connection.Connection` that waits for verify_request()."""

    __slots__ = ("reason",)

    reason: Reason

    async def _judge(self, verified: Any) -> None:
        if inspect.isawaitable(verified):
            verified = await self._await_verdict(verified)
            if verified is None:
                return
        await super()._judge(verified)

    async def _await_verdict(self, verdict: Awaitable[Any]) -> bool | None:
        """Return what verify_request() does, if its peer stays and Timeouts.handshake lasts so long, else None."""
        self.note_wait()
        protocol, seconds = self._protocol, self._timeouts().handshake
        lost = protocol.make_close_waiter()
        try:
            async with asyncio.timeout_at(None if seconds is None else self.since + seconds) as scope:
                lost.add_done_callback(lambda _: self._end_scope(scope))
                if protocol.is_lost:
                    scope.reschedule(0)
                return bool(await verdict)
        except TimeoutError:
            if not scope.expired():  # it is verify_request()'s own
                raise
            if protocol.is_lost:
                self.reason = "connection lost"
            else:
                self.reason = "handshake"
                self._server.report_slow_verification(self.client_address, seconds)
            return None
        finally:
            protocol.drop_close_waiter(lost)

    def _end_scope(self, scope: asyncio.Timeout) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended in the same turn
            scope.reschedule(0)
