"""What runs beside a connection's handle(): the tasks that its handler has made, and draining()."""

import asyncio
from typing import Any

from aioecho.runtime.logs import format_address
from aioecho.serving.handlers import StreamRequestHandler
from aioecho.serving.liveness import ToldConnection
from aioecho.serving.tasks import LEAST, Tasks
from aioecho.serving.timeouts import FINISH, HANDLE

__all__ = ["AccompaniedConnection", "Beside"]

# Seconds that the end of a connection waits for draining().
GOODBYE = 1.0


class Beside:
    """What runs beside the handle() of one connection. Few connections have it: the server keeps it, by the connection."""

    def __init__(self, connection: "AccompaniedConnection") -> None:
        self._connection = connection
        self.tasks = Tasks(f"the connection from {format_address(connection.client_address)}", self._on_error)
        self.goodbye: asyncio.Task[None] | None = None
        self.errors: list[Exception] = []
        self.has_cancelled = False

    def _on_error(self, error: Exception) -> None:
        self.errors.append(error)
        if not self.has_cancelled and self._connection.is_before_end():
            self.has_cancelled = True
            self._connection.cancel_handler()


class AccompaniedConnection(ToldConnection):
    """The part of a :class:`~aioecho.serving.connection.Connection` that ends what runs beside its handler."""

    __slots__ = ()

    def is_before_end(self) -> bool:
        """Tell whether handle() has not ended, or has not begun."""
        return self._stage < FINISH

    def get_tasks(self) -> Tasks:
        """Return what the handler makes tasks by; RuntimeError if the connection is at its end."""
        if self._stage >= FINISH:
            raise RuntimeError("the connection ends, and has no tasks any more: make the task with server.tasks")
        return self._get_beside().tasks

    def _get_beside(self) -> Beside:
        beside: Beside | None = self._server.beside.get(self)
        if beside is None:
            beside = self._server.beside[self] = Beside(self)
        return beside

    def say_goodbye(self) -> None:
        """Call draining(), if the handler has one of its own, in a task of its own."""
        handler = self.handler
        if (
            self._stage == HANDLE
            and isinstance(handler, StreamRequestHandler)
            and type(handler).draining is not StreamRequestHandler.draining
        ):
            beside = self._get_beside()
            if beside.goodbye is None:
                saying = self._call_draining(handler)
                beside.goodbye = self._loop.create_task(saying, context=self._server.task_context.copy())

    async def _call_draining(self, handler: StreamRequestHandler) -> None:
        try:
            await handler.draining()
        except Exception:
            self._server.call_handle_error(self.request, self.client_address, self)

    async def end_beside(self, end: BaseException | None) -> BaseException | None:
        """Wait for draining() to return, a second at the most, and then cancel the tasks, and wait for them.

        `end` is what handle() has ended with. Return that, or the errors of tasks.
        """
        beside: Beside | None = self._server.beside.pop(self, None)
        if beside is None:
            return end
        goodbye = beside.goodbye
        if beside.has_cancelled and not isinstance(end, asyncio.CancelledError):
            await self._wait(asyncio.sleep(0))  # the cancellation is still to come: handle() has ended meanwhile
        if goodbye is not None:
            if not self._is_cancelled and not self._protocol.is_lost:
                end = await self._wait(asyncio.wait({goodbye}, timeout=GOODBYE)) or end
            goodbye.cancel()
        end = await self._wait(beside.tasks.end(0 if self._is_abandoned else LEAST)) or end
        if beside.has_cancelled:
            self.task.uncancel()
        if not beside.errors or not (end is None or isinstance(end, Exception | asyncio.CancelledError)):
            return end
        errors = [end, *beside.errors] if isinstance(end, Exception) else beside.errors
        return errors[0] if len(errors) == 1 else ExceptionGroup("errors of a handler and its tasks", errors)

    def cancel_beside(self) -> None:
        """Cancel what runs beside a handler that swallows everything, and wait for nothing."""
        beside: Beside | None = self._server.beside.pop(self, None)
        if beside is not None:
            beside.tasks.cancel()
            if beside.goodbye is not None:
                beside.goodbye.cancel()

    async def _wait(self, waiting: Any) -> BaseException | None:
        """Await something, and return the cancellation that comes meanwhile."""
        try:
            await waiting
        except asyncio.CancelledError as error:
            return error
        return None
