"""One datagram and its handler: a task for a handler that waits, and next to nothing for one that does not.

A handler that never waits, as most that serve datagrams, needs no task of its own but for :func:`asyncio.current_task` to be
one. So a server keeps a spare task that is parked, and datagrams that arrive step the task's own coroutine, as
:mod:`~aioecho.runtime.driver` does it. That coroutine reads a datagram, makes its handler and awaits it. If the handler ends in
that step, the coroutine goes on with the next datagram in the same step, and parks again when none is left. If the handler
waits, the task goes on with it as any task does, and ends with it.

The rule: what one handler has done to its task is never met by the next. A task that a handler has cancelled, named, kept,
also by a weak reference, or added a callback to ends with that handler. So does a task with a context in which a handler has
left a variable that was not set: a task has one context for its whole life, a handler starts in one that is as the server's,
and only the token of a variable can remove it. The value of a variable that the server's context has is set back.
"""

import asyncio
import inspect
import sys
from abc import ABCMeta
from asyncio.tasks import (
    _enter_task,
    _leave_task,
)  # documented for code that steps coroutines: docs, "Extending asyncio"
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextvars import Context
from functools import partial
from operator import is_
from types import CoroutineType
from typing import Any
from weakref import getweakrefcount

from aioecho.datagrams.run import DatagramRun
from aioecho.datagrams.serving import DatagramServing
from aioecho.net.datagram_transport import DatagramSource, DatagramTransport
from aioecho.runtime.driver import Waiter
from aioecho.runtime.logs import format_address
from aioecho.runtime.steps import steps
from aioecho.serving.datagram_handlers import DatagramRequestHandler
from aioecho.serving.ends import Reason
from aioecho.serving.handlers import BaseRequestHandler

try:
    from sys import getrefcount
except ImportError:
    message = f"aioecho runs on CPython alone: this Python, {sys.implementation.name}, has no sys.getrefcount()"
    raise ImportError(message, name="sys") from None

__all__ = ["NOT_STEPPED", "AtOnce", "DatagramTask", "OneDatagram"]

NOT_STEPPED: Any = object()
"""What :meth:`DatagramTask.step` returns if another task is current. None is what a coroutine yields to let the loop run."""

new_object: Any = object.__new__
_send: Any = CoroutineType.send


async def _await(awaitable: Awaitable[Any]) -> None:
    await awaitable


def _is_plain(kind: Any) -> bool:
    """Whether to make an object of a class is to store what DatagramRequestHandler.__init__() stores, and no more."""
    return (
        type(kind).__call__ is ABCMeta.__call__
        and kind.__new__ is object.__new__
        and kind.__init__ is DatagramRequestHandler.__init__
        and kind.__setattr__ is object.__setattr__
        and not any(hasattr(kind, name) for name in ("request", "client_address", "server", "data"))
    )


def _is_restored(context: Context, pristine: Context) -> bool:
    """Give the current context, which has as many variables as `pristine`, its values again; return whether that could be done.

    A variable that a handler has added cannot be removed again without its token.
    """
    if not all(map(is_, map(context.get, pristine), pristine.values())):  # `==` would take equal values for the same
        if not all(variable in context for variable in pristine):
            return False
        for variable, value in pristine.items():
            if context[variable] is not value:
                variable.set(value)
    return True


class AtOnce:
    """How many handlers have ended without waiting. The server's `live_stats` do not count them."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class OneDatagram:
    """A datagram that was read already, and is not too long, as the source of a task's datagrams."""

    __slots__ = ("client_address", "data", "is_reading", "transport")

    has_one_transport = True
    longest = sys.maxsize

    def __init__(self, data: Any, client_address: Any, transport: DatagramTransport) -> None:
        self.data, self.client_address, self.transport = data, client_address, transport
        self.is_reading = True

    def __iter__(self) -> Iterator[tuple[bytes, Any]]:
        return iter(((self.data, self.client_address),))


class _FirstStep:
    """In place of a loop while a task is made: keeps the task's first step, which the task asks the loop to call."""

    step: Callable[[], object]

    def call_soon(self, step: Callable[[], object], *, context: Context) -> None:
        """Keep the step."""
        self.step = step

    def get_debug(self) -> bool:
        """Return False: the task asks before it notes where it was made."""
        return False


def _make_parked_task(
    coroutine: Coroutine[Any, Any, None], *, loop: asyncio.AbstractEventLoop, context: Context, name: str
) -> "asyncio.Task[None]":
    """Make a task that has taken its first step. No other task may be current."""
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, context=context, name=name, eager_start=True)
    # Python 3.11 has no such option, and a datagram cannot step the coroutine of a task that has its first step before it: that
    # would resume the handler from its first wait.
    first: Any = _FirstStep()
    task = asyncio.Task(coroutine, loop=first, context=context, name=name)
    asyncio.Future.__init__(task, loop=loop)  # nothing else of a task refers to the loop
    context.run(first.step)
    return task


class _Parking(Waiter):
    """Where a spare task waits for its next datagram."""

    __slots__ = ()

    def cancel(self, msg: Any = None) -> bool:
        """Cancel the wait, or what the handler awaits, and let the task serve no other datagram."""
        driver = self.driver
        assert isinstance(driver, DatagramTask)
        driver.needs_slow_path = driver.is_retired = True
        return super().cancel(msg)


class DatagramTask(DatagramRun):
    """A datagram with a handler that runs, in `server.connections`; or the spare task, which serves the next datagrams.

    `client_address` is the sender's. To do anything with it is its handler's.

    With `only`, a new task serves that datagram from the loop's next turn on. Without it the task is parked, and :meth:`step`
    serves datagrams. If that returns `parking`, the task can serve others unless `needs_slow_path` was set meanwhile. In any
    other case call :meth:`settle`, for the last handler. No other task may be current where a task is made that is to be
    parked.
    """

    __slots__ = (
        "_at_once",
        "_datagrams",
        "_end",
        "_loop",
        "_server",
        "_short_kind",
        "_source",
        "is_counted",
        "is_retired",
        "needs_slow_path",
        "parking",
        "plain_kind",
        "read_error",
        "resume",
    )

    called = "datagram"

    _end: BaseException | None
    _datagrams: Any  # what step() was called with last, for the coroutine
    needs_slow_path: bool
    """Whether the next datagram must not simply be given to the task: it has to be counted first, or the task is retired."""
    read_error: OSError | MemoryError | None
    """What reading the last of the datagrams has raised."""
    resume: Callable[[], Any]
    """Steps the coroutine; returns what it waits for."""

    def __init__(self, server: DatagramServing, at_once: AtOnce, only: OneDatagram | None = None) -> None:
        self._server, self._at_once = server, at_once
        self.request = self.client_address = self.handler = self._datagrams = None
        self._source: DatagramSource | None = only
        if only is not None:
            self.request, self.client_address = (only.data, only.transport), only.client_address
            self._datagrams = iter(only)
        self.reason: Reason = "finished"
        self.was_aborted = self.is_counted = self.is_retired = False
        self.needs_slow_path = server.needs_slow_path
        self.plain_kind: type | None = None  # the last class that was found to be plain
        self._short_kind: type | None = None  # the last that has neither a setup() nor a finish() of its own
        self._end = self.read_error = None
        self.place = self._since = self._cancelled_at = None
        self._loop = loop = asyncio.get_running_loop()
        self.parking = _Parking(loop)
        self.parking.driver = self
        context = server.task_context.copy()
        coroutine = self._serve(context)
        self.resume = partial(context.run, _send, coroutine, None)
        self.start(coroutine, loop, context, self.called, asyncio.Task if only is not None else _make_parked_task)

    def __call__(self, task: "asyncio.Task[None]") -> None:
        """Count how it has ended."""
        self.parking.driver = None  # which refers to it: without the cycle both go at once
        if self.handler is None and self.reason == "finished":  # its task was cancelled before it began
            self.reason = "cancelled"
        self._server.task_ended(self, task)

    def __repr__(self) -> str:
        return f"<DatagramTask with {format_address(self.client_address)}, handler={self.handler!r}>"

    @steps
    def _serve(self, context: Context) -> Generator[Any, None, None]:
        """Serve datagrams until a handler waits, or does something to the task: the task's coroutine."""
        server, parking, at_once = self._server, self.parking, self._at_once
        task: Any = asyncio.current_task()
        self.task = task  # parking is told of it before the task's constructor has returned
        if self._datagrams is None:
            yield parking
        weak_references, name = getweakrefcount(task), task.get_name()
        pristine = server.task_context
        variables = len(pristine)
        while not self.is_retired:
            source: Any = self._source
            longest = source.longest
            references = getrefcount(task)
            try:
                # With as few operations as it goes: this is most of what a datagram costs.
                for data, client_address in self._datagrams:
                    if len(data) > longest:
                        server.drop("truncated", client_address)
                        continue
                    self.request = request = (data, source.transport)
                    self.client_address = client_address
                    try:
                        verified = server.verify_request(request, client_address)
                        if verified is True:
                            kind = server.RequestHandlerClass
                            if kind is self.plain_kind:
                                # The constructor written out: to call a class takes half as long again.
                                self.handler = handler = new_object(kind)
                                handler.request = request
                                handler.client_address = client_address
                                handler.server = server
                                handler.data = data
                                coro = handler.handle()
                            else:
                                coro = self._begin()
                            if type(coro) is not CoroutineType:
                                coro = _await(coro)
                        else:
                            coro = self._judge(verified)
                        yield from coro
                    except BaseException as error:
                        end = self._report(error)
                        if self._waiter is not parking and end is not None:
                            yield from self.hand_back()  # type: ignore[misc]
                            raise end from error.__cause__
                        if end is not None and not isinstance(end, asyncio.CancelledError):
                            self._end, self.is_retired = end, True
                    request = handler = coro = None  # type: ignore[assignment]
                    if (
                        getrefcount(task) == references
                        and getweakrefcount(task) == weak_references
                        and task.get_name() is name
                        and task._callbacks is None
                        and len(context) == variables
                        and (not variables or _is_restored(context, pristine))
                    ):
                        if not self.needs_slow_path:
                            self.handler = None
                            at_once.count += 1  # as nearly all do, so nothing else is done for a datagram
                            continue
                    else:
                        self.is_retired = True
                    if self._waiter is not parking:  # the handler has waited: the task itself goes on here, or what
                        yield from self.hand_back()  # type: ignore[misc] # it has waited for steps it, as a stream does
                        return
                    self.needs_slow_path = True
                    if not self.is_retired:
                        self.handler = None
                    break
            except (OSError, MemoryError) as error:
                self.read_error = error
            self.request = data = None
            yield parking
        parking.driver = None
        try:
            if self._end is not None:
                raise self._end
            if self.reason == "cancelled":
                raise asyncio.CancelledError
        finally:
            self._end = None  # its traceback refers to this frame

    def _report(self, error: BaseException) -> BaseException | None:
        """Report what a handler raised; return what its task is to end with, or None."""
        self.needs_slow_path = True
        # What awaits a coroutine that was closed meets an error of Python's.
        end = asyncio.CancelledError() if self._is_abandoned else error
        try:
            return None if self.report_end(end, self._server) else end
        except BaseException as worse:  # of handle_error(), and not an Exception: it ends the program
            return worse

    def _begin(self) -> Any:
        """Make the handler and call its methods, or let a coroutine do that; return what to await."""
        make = self._server.RequestHandlerClass
        self.handler = handler = make(self.request, self.client_address, self._server)
        kind = type(handler)
        if self._waiter is None:
            self._show_handler()
        if kind is not self._short_kind:
            if kind.setup is not BaseRequestHandler.setup or kind.finish is not BaseRequestHandler.finish:
                return self.run_methods(handler)
            self._short_kind = kind
            if kind is make and _is_plain(kind):
                self.plain_kind = kind
        # With no coroutine around it: that would be a tenth of what a datagram costs.
        return handler.handle()

    async def _judge(self, verified: Any) -> None:
        """Begin, if `verified` says so."""
        if inspect.isawaitable(verified):
            verified = await verified
        if verified:
            await self._begin()
        else:
            self.reason = "refused"
            self.needs_slow_path = True  # so that it is counted as such

    def _show_handler(self) -> None:
        """Name the coroutine, which names the task where a task is shown, after the handler: Upper.handle."""
        name = getattr(getattr(self.handler, "handle", None), "__qualname__", None)
        if isinstance(name, str):
            self._coroutine.__qualname__ = name

    # What the server does with it.

    def step(self, datagrams: Iterator[tuple[bytes, Any]], source: DatagramSource) -> Any:
        """Serve what the iterator reads from `source`, until a handler waits; return what the task waits for then.

        Return NOT_STEPPED if another task is current: then nothing was done.
        """
        loop, task = self._loop, self.task
        try:
            _enter_task(loop, task)
        except RuntimeError:
            return NOT_STEPPED
        self._datagrams, self._source = datagrams, source
        try:
            return self.resume()
        finally:
            _leave_task(loop, task)

    def is_stepping(self) -> bool:
        """Return whether the handler of a datagram takes its first step right now."""
        return self.request is not None

    def settle(self, yielded: Any) -> bool:
        """Let the task go on after :meth:`step` has returned `yielded`; return True if it can serve others instead."""
        if yielded is not self.parking:
            self._show_handler()
            self._hand_over(yielded)
        elif self.is_retired:
            self.parking.wake()
        else:
            return True
        return False

    def count_end(self) -> None:
        """Count it when its task has ended; its time counts from now on."""
        self.count_time()
        self.task.add_done_callback(self, context=self._server.task_context)

    def reset(self) -> None:
        """Forget the last handler."""
        self.reason, self.is_counted = "finished", False
        self.needs_slow_path = self._server.needs_slow_path

    def retire(self) -> None:
        """End a spare task."""
        self.needs_slow_path = self.is_retired = True
        self.parking.wake()

    # What the server asks of it when it stops.

    def drain(self) -> None:
        """Do nothing: it has all that it will get, and finishes."""
