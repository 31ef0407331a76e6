"""What a task may wait for: what makes a future of something, and what a task does with what it cannot wait for."""

import asyncio
from collections.abc import Callable
from typing import Any

__all__ = [
    "ALWAYS_AWAITED",
    "OVER",
    "Failed",
    "LooksLikeFuture",
    "add_to_awaited_by",
    "cancelled_error",
    "discard_from_awaited_by",
    "find_mistake",
]

# What tells a task that it is given a future to wait for. A future's own __await__ sets this and the task clears it, to
# tell `await` from `yield`; what is yielded here is always awaited.
ALWAYS_AWAITED = property(lambda self: True, lambda self, value: None)


class LooksLikeFuture:
    """The part of a waiter for libraries that look at what a task waits for. anyio cancels no task whose wait is over, as it
    would lose what that has brought; it asks a future alone, and so a waiter says that it is one.
    """

    __slots__ = ()

    _asyncio_future_blocking = ALWAYS_AWAITED

    driver: Any
    _callback: Any
    _error: Any

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return asyncio.Future

    def done(self) -> bool:
        """Tell whether the task that waits is about to be resumed."""
        driver = self.driver
        if driver is None or driver._wake_up is None:
            return self._callback is None
        return isinstance(driver._awaited, asyncio.Future) and driver._awaited.done()

    def cancelled(self) -> bool:
        """Tell whether it is about to be resumed with CancelledError."""
        driver = self.driver
        if driver is None or driver._wake_up is None:
            return self._error is not None
        return isinstance(driver._awaited, asyncio.Future) and driver._awaited.cancelled()


class Failed:
    """In place of a future, for a task to be woken with an error."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def result(self) -> None:
        """Raise the error."""
        raise self._error


class _Over:
    """In place of a future, for a task to be woken with nothing."""

    def result(self) -> None:
        """Return."""


OVER = _Over()


def find_mistake(yielded: Any, task: "asyncio.Task[Any]", loop: asyncio.AbstractEventLoop) -> RuntimeError | None:
    """Return what a task raises in a coroutine that has yielded something for which it cannot wait."""
    blocking = getattr(yielded, "_asyncio_future_blocking", None)
    if blocking is None:
        return RuntimeError(f"Task got bad yield: {yielded!r}")
    if not blocking:
        return RuntimeError(f"yield was used instead of yield from in task {task!r} with {yielded!r}")
    if yielded.get_loop() is not loop:
        return RuntimeError(f"Task {task!r} got Future {yielded!r} attached to a different loop")
    if yielded is task:
        return RuntimeError(f"Task cannot await on itself: {task!r}")
    return None


def _note_nothing(*_: object) -> None:
    pass


# What tells the tools of 3.14 and newer which task awaits which.
add_to_awaited_by: Callable[..., None] = getattr(asyncio, "future_add_to_awaited_by", _note_nothing)
discard_from_awaited_by: Callable[..., None] = getattr(asyncio, "future_discard_from_awaited_by", _note_nothing)


def cancelled_error(msg: Any) -> asyncio.CancelledError:
    """Return the error for a cancellation with this message, or None for none."""
    return asyncio.CancelledError() if msg is None else asyncio.CancelledError(msg)
