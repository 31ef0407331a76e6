"""Tasks that end with what they belong to, a connection or a server."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVar

__all__ = ["LEAST", "Tasks"]

logger = logging.getLogger("aioecho.server")

T = TypeVar("T")

LEAST = 1.0
"""Seconds that tasks which are cancelled have to end."""


class Tasks:
    """The tasks of a connection, `self.tasks` in its handler, or of a server, `server.tasks`. They are cancelled at its end.

    Not for users to make. `on_error` is called with what a task has raised, other than CancelledError.
    """

    def __init__(self, of: str, on_error: Callable[[Exception], object]) -> None:
        self._of = of
        self._on_error = on_error
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_ended = False

    def __len__(self) -> int:
        """Return how many have not ended."""
        return len(self._tasks)

    def __contains__(self, task: object) -> bool:
        """Tell whether this is one of them, and has not ended."""
        return task in self._tasks

    def create_task(
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: Context | None = None
    ) -> "asyncio.Task[T]":
        """Run a coroutine in a task, and return the task, as asyncio.TaskGroup.create_task() does.

        Raises:
            RuntimeError: the connection, or the server, ends: its tasks were cancelled. Or no event loop runs here.
        """
        if self._has_ended:
            coro.close()
            raise RuntimeError(f"{self._of} ends, and has no tasks any more: make no task in its end")
        task = asyncio.get_running_loop().create_task(coro, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):  # anything else ends the program
            self._on_error(error)

    def cancel(self) -> "set[asyncio.Task[Any]]":
        """Cancel all but the current one, allow no others, and return them."""
        self._has_ended = True
        tasks = self._tasks - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        return tasks

    async def end(self, seconds: float) -> None:
        """Cancel all, and wait until they have ended, for `seconds` at the most. One that has not is named in the log."""
        tasks = self.cancel()
        if tasks:
            _, stubborn = await asyncio.wait(tasks, timeout=seconds)
            self._tell_of(stubborn)
            await asyncio.sleep(0)  # for _done() of the last one

    def give_up(self) -> None:
        """Name the ones in the log that were cancelled and have not ended. The caller ends the wait for them."""
        if self._has_ended:
            self._tell_of(self._tasks)

    def _tell_of(self, stubborn: "set[asyncio.Task[Any]]") -> None:
        for task in stubborn:
            logger.error("a task of %s would not end when cancelled: %r", self._of, task)
