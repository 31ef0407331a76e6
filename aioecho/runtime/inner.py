"""The inner coroutine of a task: the one that its outermost one awaits, and that events step in its place.

It may end in an event's step. The task is then resumed when there is something to do for it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from types import CoroutineType
from typing import Any

from aioecho.runtime.awaited import OVER

__all__ = ["InnerSteps", "raise_error", "wake_task"]


class InnerSteps:
    """The part of a driver that has events step the inner coroutine. That saves a step of the outermost one for each."""

    __slots__ = ("_awaited", "_cancels", "_coroutine", "_stepped", "_waiter", "_wake_up", "task")

    _awaited: Any  # this, and _cancels, are set while there is a _wake_up
    _cancels: int  # and this once the inner coroutine has ended in an event's step: whether the task goes on by a cancellation
    _coroutine: "CoroutineType[Any, Any, Any]"
    _stepped: Any  # what an event steps: that, or the inner coroutine, or what that one has ended with in such a step
    # Where the task is parked, also while it is stepped from there; then the task's context, if the inner coroutine has ended
    # in such a step: another task may wait there before this one goes on.
    _waiter: Any
    _wake_up: Callable[[Any], object] | None  # the task's own, while what it awaits was told only of _resume()
    task: "asyncio.Task[Any]"

    def step_inner(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Have events step a coroutine that the outermost one is about to await.

        When it has ended, the outermost one calls :meth:`take_inner_end`.
        """
        self._stepped = coroutine

    def take_inner_end(self, error: BaseException | None) -> BaseException | None:
        """Return what the inner coroutine has raised, None if it returned. `error` is what awaiting it has raised."""
        end, self._stepped = self._stepped, self._coroutine
        if not isinstance(end, BaseException) or isinstance(error, GeneratorExit):
            return error  # GeneratorExit: the outermost one is closed where it waits, as the program has ended
        # It ended in an event's step, and awaiting it then raised Python's own error, in place of CancelledError too.
        if self._cancels:
            # The task was cancelled since: this counts at the next wait, as for a coroutine that is about to end.
            self.task.uncancel()
            self.task.cancel(msg=self.task._cancel_message)  # type: ignore[attr-defined]
        return None if isinstance(end, StopIteration) else end

    def note_inner_end(self, end: BaseException | None) -> None:
        """Resume the task as the inner coroutine has ended in an event's step. To be overridden: by a later :meth:`go_on`.

        If the task is cancelled before that, :meth:`note_cancel` is called.
        """
        self.go_on()

    def note_cancel(self) -> None:
        """Do nothing about a cancellation that counts when the task goes on. To be overridden."""

    def _end_inner(self, error: BaseException) -> None:
        waiter: Any = self._waiter
        traceback: Any = error.__traceback__
        error.__traceback__ = traceback.tb_next  # without deliver(), which has nothing to do with it
        self._stepped = error
        if self._wake_up is None:
            self._wake_up = waiter._callback
        waiter._driver = waiter._callback = self._awaited = None
        self._waiter = waiter._context
        self._cancels = self.task.cancelling()
        self.note_inner_end(None if isinstance(error, StopIteration) else error)

    def go_on(self) -> None:
        """Resume the task, now."""
        context, wake_up = self._waiter, self._wake_up
        self._waiter = self._wake_up = None
        self._cancels = self.task._must_cancel  # type: ignore[attr-defined]
        wake_task(wake_up, OVER, context)


def wake_task(wake_up: Any, awaited: Any, context: Context | None) -> None:
    """Call what wakes a task that was parked, in its context. `awaited` is what it waited for, as far as it is told."""
    try:
        context.run(wake_up, awaited)  # type: ignore[union-attr]
    except (SystemExit, KeyboardInterrupt) as error:
        # A task lets these through to the loop, which ends. From here they would meet a transport instead.
        asyncio.get_running_loop().call_soon(raise_error, error)


def raise_error(error: BaseException) -> None:
    """Raise an error, where the loop meets it."""
    raise error
