"""Stepping a task's coroutine straight from the event that it waits for.

A task that waits for data is usually resumed by a detour: the event sets a future's result, the future asks the loop to
call the task, and a turn later the task steps its coroutine. Most of what asyncio's streams cost is that detour. Here a
task that awaits a :class:`Waiter` is parked there with its wake-up, and the event steps the coroutine itself, as that task
and in its context. The task has a :class:`Driver` for this. As soon as the coroutine awaits anything else, the driver gives
the task's own wake-up to what is awaited, and the task goes on as any task does. A coroutine cannot observe the difference,
except for the turn of the loop that is saved.

The whole chain is native: the task's coroutine is a plain one that awaits plain ones. So everything that looks into a task
(``python -m asyncio ps``, asyncio.print_call_graph(), Task.get_stack(), sampling profilers) shows where a handler waits.

The rules of this module: either the task or the event steps the coroutine, and neither while another task is current. The
outermost coroutine never ends in an event's step: it calls :meth:`Driver.hand_back` before it returns. The one that it awaits
may: see aioecho.runtime.inner.
"""

import asyncio
from asyncio import current_task
from asyncio.tasks import (
    _enter_task,
    _leave_task,
)  # documented for code that steps coroutines: docs, "Extending asyncio"
from collections.abc import Callable
from contextvars import Context
from types import CoroutineType
from typing import Any, cast

from aioecho.runtime.awaited import (
    Failed,
    LooksLikeFuture,
    add_to_awaited_by,
    cancelled_error,
    discard_from_awaited_by,
    find_mistake,
)
from aioecho.runtime.inner import InnerSteps, raise_error, wake_task
from aioecho.runtime.steps import turn

__all__ = ["Driver", "Waiter"]

# As a method that is bound anew for each step, or kept by each driver, it would cost time or memory.
_send = CoroutineType.send


class Waiter(LooksLikeFuture):
    """What one coroutine at a time waits for, again and again, without a future for every time.

    ``yield waiter`` waits, in a function of :func:`steps`. After it :meth:`take` gives what :meth:`deliver` brought, or
    None: a wait can end without news. Any task can wait so, since a waiter has as much of a future as tasks use. The task
    of the `driver` is stepped by :meth:`deliver` itself.
    """

    __slots__ = (
        "_callback",
        "_context",
        "_driver",
        "_error",
        "_fired",
        "_loop",
        "driver",
        "item",
    )

    driver: "Driver | None"
    """The driver of the task that may be stepped from here."""

    item: Any
    """What was delivered and not yet taken."""

    # A task is parked here if there is a callback: its wake-up. It can be stepped if there is a _driver too.
    _callback: Callable[[Any], object] | None
    _context: Context | None
    _driver: "Driver | None"
    _error: BaseException | None

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.driver = self._driver = self._callback = self._context = self._error = self.item = None
        self._fired = False

    def deliver(self, item: Any) -> bool:
        """Resume the coroutine that waits, now, with an item for :meth:`take`, and return True.

        Where that is impossible, return what :meth:`buffer_unawaited` does: while another task is current, and when no
        coroutine waits or the one that does is about to be resumed for another reason.
        """
        driver = self._driver
        if driver is None:
            return self._resume_task(item) or self.buffer_unawaited(item)
        loop, task = self._loop, driver.task
        try:
            _enter_task(loop, task)
        except RuntimeError:
            return self.buffer_unawaited(item)
        # The task stays parked meanwhile, as its coroutine is about to wait for the same again. Nothing else can step it, as
        # its task is current.
        self.item = item
        try:
            yielded = self._context.run(_send, driver._stepped, None)  # type: ignore[union-attr]
        except BaseException as error:
            _leave_task(loop, task)
            if driver._stepped is driver._coroutine:
                driver._fail(error)
            else:
                self.note_hand_over()
                driver._end_inner(error)
            return True
        _leave_task(loop, task)
        if yielded is not self:
            self.note_hand_over()
            driver._hand_over(yielded)
        return True

    def note_hand_over(self) -> None:
        """Do nothing about a coroutine that awaits something else now. To be overridden."""

    def buffer_unawaited(self, item: Any) -> bool:
        """Do nothing with an item that no coroutine could be resumed with, and return False. To be overridden."""
        return False

    def _resume_task(self, item: Any) -> bool:
        if self._callback is None or current_task(self._loop) is not None:
            return False
        callback, self._callback = self._callback, None
        self.item = item
        wake_task(callback, self, self._context)
        return True

    def take(self) -> Any:
        """Return the item that was delivered, and forget it."""
        item, self.item = self.item, None
        return item

    def wake(self) -> None:
        """Resume the coroutine that waits, in the loop's next turn, without an item."""
        callback = self._callback
        if callback is None:
            # One is between being resumed and waiting again, and must not wait for what has already come.
            self._fired = True
        elif self._driver is not None and self._driver.is_running():
            # What it will wait for is not known yet.
            self._loop.call_soon(self._wake_if_parked)
        else:
            self._callback = None
            driver = self._driver or self.driver
            if driver is not None and driver._waiter is self:
                driver._waiter = None
            self._driver = None
            self._loop.call_soon(callback, self, context=self._context)

    def _wake_if_parked(self) -> None:
        if self._callback is not None:
            self.wake()

    def _park(self, callback: Callable[[Any], object], context: Context | None, driver: "Driver | None") -> None:
        self._callback, self._context, self._driver = callback, context, driver
        self._error = None
        if driver is not None:
            driver._waiter = self
        if self._fired:
            self._fired = False
            self.wake()

    # The part of asyncio.Future's interface that a task uses on what it awaits.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop. Its tasks may wait."""
        return self._loop

    def add_done_callback(self, callback: Callable[["Waiter"], object], *, context: Context | None = None) -> None:
        """Keep the one task's wake-up."""
        driver = self.driver
        self._park(
            callback, context, driver if driver is not None and current_task(self._loop) is driver.task else None
        )

    def cancel(self, msg: Any = None) -> bool:
        """Resume the task that waits with CancelledError; return False where nothing waits any more."""
        driver = self.driver
        if driver is not None and driver._wake_up is not None and driver._is_cancelled_anew():
            # The driver's task was parked here last, for all that it knows.
            return driver._cancel_awaited(msg)
        if self._callback is None:
            return False
        if self._driver is not None and self._driver.is_running():
            # It cancels itself, and remembers; it has to be resumed for the error to be thrown at its next wait.
            self._driver = None
            self._loop.call_soon(self._wake_if_parked)
            return False
        if driver is not None and driver._waiter is self and driver.is_running():
            return False  # it does so again
        self._error = cancelled_error(msg)
        self.wake()
        return True

    def result(self) -> None:
        """Raise CancelledError if the wait was cancelled."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback refers to this frame


class Driver(InnerSteps):
    """Has a coroutine run by a task, which :class:`Waiter` may step meanwhile.

    The outermost coroutine itself is given to :meth:`start`, and calls :meth:`hand_back` before it ends.
    """

    __slots__ = ("_is_abandoned",)

    _waiter: Waiter | None

    def start(
        self,
        coroutine: Any,
        loop: asyncio.AbstractEventLoop,
        context: Context,
        name: str,
        make_task: Callable[..., "asyncio.Task[Any]"] = asyncio.Task,
    ) -> None:
        """Make the task. It is of the plain kind, whatever the loop's task factory.

        A `name` that many share costs less than one for every task would.

        An eager task would run before its caller is ready, and a factory that wraps coroutines would hide the one that is
        to be stepped.
        """
        self._coroutine = self._stepped = coroutine
        self._waiter = self._wake_up = None
        self._is_abandoned = False
        self.task = make_task(coroutine, loop=loop, context=context, name=name)

    async def hand_back(self) -> None:
        """Let the task take over, if an event steps the coroutine.

        A cancellation that comes in between counts at the next wait, as for a coroutine that is about to end.
        """
        if self._waiter is not None and self._is_current():
            try:
                await turn()
            except asyncio.CancelledError as error:
                self.task.uncancel()
                self.task.cancel(*error.args)

    def abandon(self) -> None:
        """Close what the coroutine awaits, in the loop's next turn, as it swallows CancelledError. Cancel the task too.

        It meets GeneratorExit where it waits, as at the end of a program, and what awaits it meets an error. A second call
        does nothing: one that swallows even that was given up. If it has ended by then, :meth:`spare` is called instead.
        """
        if not self._is_abandoned:
            self.task.get_loop().call_soon(self._close_inner, self._coroutine.cr_await)

    def spare(self) -> None:
        """Do nothing about a coroutine of which what it awaited has ended by itself. To be overridden."""

    def mark_due(self) -> None:
        """Do nothing about timeouts that are to be looked at. To be overridden."""

    def note_stream_end(self, is_told: bool) -> None:
        """Do nothing about the end of what the coroutine reads. To be overridden."""

    def note_lost(self) -> None:
        """Do nothing about the loss of the connection that the coroutine reads. To be overridden."""

    def give_up(self) -> None:
        """Do nothing about one that swallows even that. To be overridden."""

    def _close_inner(self, inner: Any) -> None:
        task, loop = self.task, self.task.get_loop()
        if inner is not cast(Any, self._coroutine.cr_await) or getattr(inner, "cr_frame", inner) is None:
            self.spare()
        elif hasattr(inner, "close") and not self._is_abandoned:  # a future has no close()
            self._is_abandoned = True
            _enter_task(loop, task)
            try:
                inner.close()
            except BaseException as error:
                if getattr(inner, "cr_frame", None) is not None:
                    self.give_up()
                elif isinstance(error, SystemExit | KeyboardInterrupt):
                    raise
            finally:
                _leave_task(loop, task)
            task.cancel()  # if it has swallowed the last one, what it waits for may never come now

    def _is_current(self) -> bool:
        """Return whether the coroutine runs as its task; False while it is closed from outside."""
        return asyncio._get_running_loop() is not None and current_task() is self.task

    def is_running(self) -> bool:
        """Tell whether the coroutine runs right now."""
        return self._coroutine.cr_running or getattr(self._stepped, "cr_running", False)

    def _hand_over(self, yielded: Any) -> None:
        """Let the task wait for what its coroutine has yielded in an event's step."""
        waiter, task = self._waiter, self.task
        assert waiter is not None
        has_cancelled_itself = waiter._driver is None
        callback, waiter._callback = waiter._callback, None
        waiter._driver = self._waiter = None
        loop, context = waiter._loop, waiter._context
        if self._wake_up is None:
            self._wake_up = callback
            self._cancels = task.cancelling()
        if yielded is None:
            self._awaited = None
            loop.call_soon(self._resume, waiter, context=context)
            return
        if isinstance(yielded, Waiter) and yielded._loop is loop:
            if yielded.driver is self:  # where the task was parked last, for all that it knows
                callback, self._wake_up, self._awaited = self._wake_up, None, None
                yielded._park(cast(Callable[[Any], object], callback), context, self)
            else:
                self._awaited = yielded
                yielded._park(self._resume, context, self)
        else:
            mistake = find_mistake(yielded, task, loop)
            if mistake is not None:
                self._awaited = None
                loop.call_soon(self._resume, Failed(mistake), context=context)
                return
            self._awaited = yielded
            yielded._asyncio_future_blocking = False
            yielded.add_done_callback(self._resume, context=context)
            add_to_awaited_by(yielded, task)
        if has_cancelled_itself:
            yielded.cancel(msg=task._cancel_message)  # type: ignore[attr-defined]

    def _resume(self, awaited: Any) -> None:
        """Wake the task, as what it awaits would have."""
        wake_up = self._wake_up
        assert wake_up is not None
        self._wake_up = self._awaited = None
        discard_from_awaited_by(awaited, self.task)
        wake_up(awaited)

    def _is_cancelled_anew(self) -> bool:
        return self.task.cancelling() != self._cancels

    def _cancel_awaited(self, msg: Any) -> bool:
        """Do what cancelling a task does to what it awaits: return False if that is running or cannot be cancelled."""
        self._cancels = self.task.cancelling()
        if self._awaited is None:
            self.note_cancel()
            return False
        return bool(self._awaited.cancel(msg=msg))

    def _fail(self, error: BaseException) -> None:
        """Wake the task after its coroutine has ended in an event's step, which only an interrupt can do."""
        assert self._waiter is not None
        loop = self._waiter._loop
        self._waiter.wake()
        loop.call_soon(raise_error, error)
