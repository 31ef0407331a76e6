"""What runs beside a handler's handle(): the tasks that it has made, and draining()."""

import asyncio
from typing import Any, ClassVar

from aioecho.runtime.logs import format_address
from aioecho.serving.handlers import StreamRequestHandler
from aioecho.serving.liveness import ToldConnection
from aioecho.serving.tasks import LEAST, Tasks
from aioecho.serving.timeouts import FINISH, HANDLE

__all__ = ["AccompaniedConnection", "AccompaniedRun", "Beside"]

# Seconds that the end of a connection waits for draining().
GOODBYE = 1.0


class Beside:
    """What runs beside the handle() of one connection, or session. Few have it: the server keeps it, by the connection."""

    def __init__(self, run: "AccompaniedRun") -> None:
        self._run = run
        self.tasks = Tasks(f"the {run.called} from {format_address(run.client_address)}", self._on_error)
        self.goodbye: asyncio.Task[None] | None = None
        self.errors: list[Exception] = []
        self.has_cancelled = False
        self.seconds = LEAST  # for tasks that are cancelled to end

    def _on_error(self, error: Exception) -> None:
        self.errors.append(error)
        if not self.has_cancelled and self._run.is_before_end():
            self.has_cancelled = True
            self._run.cancel_handler()


class AccompaniedRun:
    """The part of the run of a handler, for a connection or a session, that ends what runs beside the handler."""

    __slots__ = ()

    called: ClassVar[str]
    _is_abandoned: bool
    _server: Any
    client_address: Any
    task: Any

    def is_before_end(self) -> bool:
        """Tell whether handle() has not ended, or has not begun."""
        raise NotImplementedError

    def cancel_handler(self) -> None:
        """Cancel what runs, the handler mostly."""
        raise NotImplementedError

    def get_tasks(self) -> Tasks:
        """Return what the handler makes tasks by; RuntimeError if the connection is at its end."""
        if not self.is_before_end():
            raise RuntimeError(f"the {self.called} ends, and has no tasks any more: make the task with server.tasks")
        return self._get_beside().tasks

    def _get_beside(self) -> Beside:
        beside: Beside | None = self._server.beside.get(self)
        if beside is None:
            beside = self._server.beside[self] = Beside(self)
        return beside

    async def end_beside(self, end: BaseException | None) -> BaseException | None:
        """Wait for draining() to return, a second at the most, and then cancel the tasks, and wait for them.

        `end` is what handle() has ended with. Return that, or the errors of tasks.
        """
        beside: Beside | None = self._server.beside.get(self)
        if beside is None:
            return end
        if self._is_abandoned:
            beside.seconds = 0
        try:
            if beside.has_cancelled and not isinstance(end, asyncio.CancelledError):
                await self._wait(asyncio.sleep(0))  # the cancellation is still to come: handle() has ended meanwhile
            if beside.goodbye is not None:
                end = await self._wait(self._end_goodbye(beside.goodbye)) or end
            end = await self._wait(beside.tasks.end(beside.seconds)) or end
        finally:
            self._server.beside.pop(self, None)
        if beside.has_cancelled:
            self.task.uncancel()
        if not beside.errors or not (end is None or isinstance(end, Exception | asyncio.CancelledError)):
            return end
        errors = [end, *beside.errors] if isinstance(end, Exception) else beside.errors
        return errors[0] if len(errors) == 1 else ExceptionGroup("errors of a handler and its tasks", errors)

    def release_beside(self) -> bool:
        """Wait no more for what runs beside the handler, if that has ended; return whether it has, and was waited for."""
        beside: Beside | None = self._server.beside.get(self)
        if beside is None or self.is_before_end():
            return False
        beside.seconds = 0  # the cancellation that follows ends the wait
        beside.tasks.give_up()
        return True

    async def _end_goodbye(self, goodbye: "asyncio.Task[None]") -> None:
        """Wait for draining(), and cancel it. Only connections have it."""

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


class AccompaniedConnection(AccompaniedRun, ToldConnection):
    """The part of a :class:`~aioecho.serving.connection.Connection` that ends what runs beside its handler."""

    __slots__ = ()

    called = "connection"

    def is_before_end(self) -> bool:
        """Tell whether handle() has not ended, or has not begun."""
        return self._stage < FINISH

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

    async def _end_goodbye(self, goodbye: "asyncio.Task[None]") -> None:
        try:
            if not self._is_cancelled and not self._protocol.is_lost:
                await asyncio.wait({goodbye}, timeout=GOODBYE)
        finally:
            goodbye.cancel()
