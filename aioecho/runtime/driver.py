"""Stepping a handler's coroutine straight from the event that it waits for.

A task that waits for data is usually resumed by a detour: the event sets a future's result, the future asks the loop to
call the task, and a turn later the task steps its coroutine. Most of what asyncio's streams cost is that detour. Here
the task awaits a :class:`Driver`, which steps the coroutine on the task's behalf. Whenever the coroutine waits for a
:class:`Waiter`, the task parks on the driver, and the event steps the coroutine itself, as that task and in its context.
As soon as the coroutine waits for anything else, ends or is cancelled, the driver wakes its task, which carries on as any
task does. Nothing that a coroutine can observe tells the two apart, except for the turn of the loop that is saved.

The rule of this module: at most one of the task and the event steps the coroutine, and neither while another task is
current.
"""

import asyncio
import functools
import inspect
from asyncio import current_task
from asyncio.tasks import _enter_task, _leave_task  # documented for whoever steps coroutines: docs, "Extending asyncio"
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from types import CodeType, CoroutineType, FrameType, FunctionType
from typing import Any, ParamSpec, TypeVar, cast

__all__ = ["ALWAYS_AWAITED", "Driver", "Waiter", "as_raised", "cancelled_error", "is_future", "steps"]

P = ParamSpec("P")
T = TypeVar("T")

# What a driven coroutine waits for when it waits for its waiter; None is taken: it is what asyncio.sleep(0) yields.
_THE_WAITER: Any = object()


# What tells a task that it is given a future to wait for. A future's own __await__ sets this and the task clears it, to
# tell `await` from `yield`; what is yielded here is always awaited.
ALWAYS_AWAITED = property(lambda self: True, lambda self, value: None)


def steps(function: Callable[P, Generator[Any, None, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Make a generator function a coroutine function, in which ``yield x`` waits for x, as in types.coroutine().

    Its calls give real coroutines. An ``await`` in their place would look for an iterator, which costs half as much again
    as all else that a coroutine does which waits once.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__
    code = code.replace(co_flags=code.co_flags & ~inspect.CO_GENERATOR | inspect.CO_COROUTINE)
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return cast("Callable[P, Coroutine[Any, Any, T]]", functools.update_wrapper(made, function))


class Waiter:
    """What one coroutine at a time waits for, again and again, without a future for each time.

    ``yield waiter`` waits, in a function of :func:`steps`. After it :meth:`take` gives what :meth:`deliver` brought, or
    None: one can be woken without news. A driven coroutine can wait so, and any task, for which it has as much of a future
    as tasks use.
    """

    __slots__ = (
        "_callback",
        "_cancelled",
        "_context",
        "_driver",
        "_fired",
        "_loop",
        "item",
    )

    _asyncio_future_blocking = ALWAYS_AWAITED

    item: Any
    """What was delivered and not yet taken."""

    _callback: Callable[["Waiter"], object] | None
    _cancelled: asyncio.CancelledError | None
    _context: Context | None
    _driver: "Driver[Any] | None"

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._driver = self._callback = self._context = self._cancelled = self.item = None
        self._fired = False

    def deliver(self, item: Any) -> bool:
        """Resume whoever waits, now, with an item for :meth:`take`, and return True.

        Where that is impossible, return what :meth:`refuse` does: while another task is current, and when nobody waits or the
        one who does is about to be resumed for another reason.
        """
        driver = self._driver
        if driver is None:
            return self._resume_task(item) or self.refuse(item)
        loop, task = driver._loop, driver._task
        try:
            _enter_task(loop, task)  # type: ignore[arg-type]
        except RuntimeError:
            return self.refuse(item)
        # The driver stays parked meanwhile, as its coroutine is about to wait for the same again; nobody else can step it,
        # as its task is current.
        self.item = item
        try:
            yielded = driver._context.run(driver._send, None)  # type: ignore[union-attr]
        except BaseException as end:  # whatever it is, StopIteration too, it belongs to the task
            driver._end = end
            yielded = None
        _leave_task(loop, task)  # type: ignore[arg-type]
        if yielded is not self:
            if driver._end is not None:
                driver.note_end(driver._end)
            driver._yielded = yielded
            driver.wake()
        return True

    def refuse(self, item: Any) -> bool:
        """Do nothing with an item that nobody could be resumed with, and return False. To be overridden."""
        return False

    def heed(self) -> None:
        """Do nothing about an error that whoever waits will meet. To be overridden."""

    def stir(self) -> None:
        """Do nothing about a wait that has begun. To be overridden."""

    def _resume_task(self, item: Any) -> bool:
        callback = self._callback
        if callback is None or current_task(self._loop) is not None:
            return False
        self._callback = None
        self.item = item
        try:
            self._context.run(callback, self)  # type: ignore[union-attr]
        except (SystemExit, KeyboardInterrupt) as error:
            # A task lets these through to the loop, which ends. From here they would meet a transport instead.
            self._loop.call_soon(_raise, error)
        return True

    def take(self) -> Any:
        """Return the item that was delivered, and forget it."""
        item, self.item = self.item, None
        return item

    def wake(self) -> None:
        """Resume whoever waits, in the loop's next turn, without an item."""
        if self._driver is not None:
            self._driver.wake()
        elif self._callback is not None:
            callback, self._callback = self._callback, None
            self._loop.call_soon(callback, self, context=self._context)
        else:
            # Someone is between being resumed and waiting again, and must not wait for what has already come.
            self._fired = True

    # The part of asyncio.Future's interface that a task uses on what it awaits.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the loop whose tasks may wait."""
        return self._loop

    def add_done_callback(self, callback: Callable[["Waiter"], object], *, context: Context | None = None) -> None:
        """Keep the one task's wake-up."""
        self._callback, self._context = callback, context
        self._cancelled = None
        if self._fired:
            self._fired = False
            self.wake()

    def cancel(self, msg: Any = None) -> bool:
        """Resume the task that waits with CancelledError; return False where nothing waits any more."""
        if self._callback is None:
            return False
        self._cancelled = cancelled_error(msg)
        self.wake()
        return True

    def result(self) -> None:
        """Raise CancelledError if the wait was cancelled."""
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            raise cancelled


class Driver(Coroutine[Any, Any, T]):
    """A coroutine that runs another, which :class:`Waiter` may step meanwhile. A task runs it, or a coroutine awaits it.

    To the task it is also the future that is waited for while the inner coroutine waits for a :class:`Waiter`.
    To be overridden: :meth:`after`, to run several coroutines one after the other, and :meth:`note_end`.
    """

    __slots__ = (
        "_abandoned",
        "_callback",
        "_cancelled",
        "_context",
        "_coro",
        "_end",
        "_is_parked",
        "_loop",
        "_send",
        "_task",
        "_waiter",
        "_yielded",
    )

    _asyncio_future_blocking = ALWAYS_AWAITED
    _callback: Callable[["Driver[T]"], object] | None
    _cancelled: asyncio.CancelledError | None
    _context: Context | None
    _end: BaseException | None
    _loop: asyncio.AbstractEventLoop
    _task: "asyncio.Task[Any] | None"
    _waiter: Waiter

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        # A coroutine of Cython's, as uvloop's are, has the same attributes.
        self._coro, self._send = cast("CoroutineType[Any, Any, Any]", coroutine), coroutine.send
        self._callback = self._cancelled = self._context = self._end = self._task = None
        self._yielded = _THE_WAITER
        self._abandoned = self._is_parked = False

    def start_early(self) -> None:
        """Run the coroutine up to where it first waits, for a future, before a task does; so it is not in its task there."""
        send = self._send
        try:
            self._yielded = send(None)
        except BaseException as end:  # whatever it is, it belongs to the task
            self._end = end

    def after(self, end: BaseException) -> Awaitable[Any] | None:
        """Return what to run when the coroutine has ended: with `end`, which is StopIteration if it returned.

        None, as here: nothing, and the driver ends likewise.
        """
        return None

    def note_end(self, end: BaseException) -> None:
        """Do nothing about the end of the coroutine, which the task meets a turn later with :meth:`after`. To be overridden."""

    def wake(self) -> None:
        """Let the task take over in the loop's next turn."""
        self._unpark()
        callback, self._callback = self._callback, None
        if callback is not None:
            self._loop.call_soon(callback, self, context=self._context)

    def _unpark(self) -> None:
        waiter = self._waiter
        if waiter._driver is self:
            waiter._driver = None

    def abandon(self) -> None:
        """Close the coroutine, instead of throwing it in, with the next error that its task is resumed with.

        For a coroutine that swallows CancelledError. It meets GeneratorExit where it waits, as at the end of a program.
        """
        self._abandoned = True

    # The part of asyncio.Future's interface that a task uses on what it awaits.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the task's loop."""
        return self._loop

    def add_done_callback(self, callback: Callable[["Driver[T]"], object], *, context: Context | None = None) -> None:
        """Keep the task's wake-up, and its context, in which the coroutine has to be stepped."""
        assert context is not None
        self._callback, self._context = callback, context

    def cancel(self, msg: Any = None) -> bool:
        """Do as that for which the coroutine waits would do: return False if it can't be cancelled, or just runs."""
        if self._coro.cr_running:
            # It cancels itself. The task remembers, and if this is a step, must be resumed for the error to be thrown.
            if self._is_parked:
                self.wake()
            return False
        if self._callback is None:
            yielded = self._yielded
            return bool(is_future(yielded) and yielded.cancel(msg=msg))
        self._cancelled = cancelled_error(msg)
        self.wake()
        return True

    def result(self) -> None:
        """Raise CancelledError if the task was cancelled while it was parked."""
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            raise cancelled

    # A coroutine's interface, by which the task resumes it: here the task steps the inner coroutine itself.

    def send(self, value: Any) -> Any:
        """Go on; return what to wait for."""
        return self._proceed()

    def throw(self, *error: Any) -> Any:
        """Go on with an error; return what to wait for."""
        return self._proceed(as_raised(error))

    def close(self) -> None:
        """Close the coroutine."""
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return cast("Generator[Any, Any, T]", self)

    # For those who show where a task stands: its get_stack(), and its repr.

    @property
    def cr_code(self) -> CodeType:
        """The code of the coroutine that is run."""
        return self._coro.cr_code

    @property
    def cr_frame(self) -> FrameType | None:
        """The frame of the coroutine that is run."""
        return self._coro.cr_frame

    @property
    def cr_running(self) -> bool:
        """Whether the coroutine runs right now."""
        return self._coro.cr_running

    def _proceed(self, error: BaseException | None = None) -> Any:
        if self._is_parked:
            self._is_parked = False
            self._unpark()
            yielded, self._yielded = self._yielded, _THE_WAITER
            if self._end is not None:
                self._go_on(error)
                return self._step_here(None)
            if yielded is not _THE_WAITER:
                if error is None:
                    # None: it wanted to sleep a turn, and that turn is over.
                    if yielded is not None and (waits_for := self._wait_for(yielded)) is not None:
                        return waits_for
                elif is_future(yielded) and yielded.cancel(msg=error.args[0] if error.args else None):
                    return yielded  # and the error comes from there, as for any task that is cancelled while it runs
        elif self._task is None:
            self._task = task = current_task()
            assert task is not None, "a driver is run by a task"
            self._loop = task.get_loop()
        elif self._end is not None:
            self._go_on(error)
            return self._step_here(None)
        elif self._yielded is not _THE_WAITER:
            started_with, self._yielded = self._yielded, _THE_WAITER
            if error is None and not started_with.done():
                return started_with
        return self._step_here(error)

    __next__ = _proceed

    def _step_here(self, error: BaseException | None) -> Any:
        """Step the coroutine, and those that come after it; return what to wait for."""
        while True:
            try:
                if error is None:
                    send = self._send
                    yielded = send(None)
                elif self._abandoned:
                    self._coro.close()
                    raise error
                else:
                    thrown, error = error, None
                    yielded = self._coro.throw(thrown)
            except BaseException as end:
                # The error is there if it was abandoned: close() may have failed, as the coroutine swallowed even that.
                self._end = end if error is None else error
                error = None
            else:
                if yielded is None:
                    return None
                waits_for = self._wait_for(yielded)
                if waits_for is not None:
                    return waits_for
                continue
            self._go_on(None)

    def _wait_for(self, yielded: Any) -> Any:
        """Park, if that is possible, and return what the task has to wait for; None if there is news already."""
        if not isinstance(yielded, Waiter) or yielded._loop is not self._loop:
            return yielded
        if yielded._fired:
            yielded._fired = False
            return None
        self._waiter = yielded
        yielded._driver = self
        self._is_parked = True
        return self

    def _go_on(self, error: BaseException | None) -> None:
        """Take up what comes after the coroutine that has ended, or end."""
        end: Any = self._end
        self._end = None
        try:
            if error is not None:
                # The coroutine had ended when its task was cancelled: this is for what comes after it, at the next thing
                # that is waited for. Undone and done again, since to throw an error used the request up.
                assert self._task is not None
                self._task.uncancel()
                self._task.cancel(*error.args)
            following = self.after(end)
            if following is None:
                del self._send
                self._task = None  # which has this: in a cycle they would wait for the garbage collector
                raise end
            coro: Any = following if type(following) is CoroutineType else _await(following)
            self._coro, self._send = coro, coro.send
        finally:
            del end, error  # the traceback refers to this frame


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable


def is_future(thing: Any) -> bool:
    """Return whether a task could wait for `thing`."""
    return getattr(thing, "_asyncio_future_blocking", None) is not None


def cancelled_error(msg: Any) -> asyncio.CancelledError:
    """Return the error for a cancellation with this message, or None for none."""
    return asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)


def as_raised(error: tuple[Any, ...]) -> BaseException:
    """Return the exception that throw() was given, as an instance or in three parts."""
    kind, value = error[0], error[1] if len(error) > 1 else None
    if isinstance(value, BaseException):
        return value
    raised: BaseException = kind if isinstance(kind, BaseException) else kind() if value is None else kind(value)
    return raised


def _raise(error: BaseException) -> None:
    raise error
