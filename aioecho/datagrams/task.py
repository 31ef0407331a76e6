"""One datagram and its handler: a task for those handlers that wait, and next to nothing for those that do not.

A handler that never waits, as most that serve datagrams, needs no task of its own but for :func:`asyncio.current_task` to be
one. So a server keeps a task that is parked, and the event of a datagram's coming steps the handler's coroutine as that
task, as :mod:`~aioecho.runtime.driver` does it. If the coroutine ends in that step, the task is still parked, and there for
the next datagram. If it waits for anything, the task is the handler's from then on, and goes on with it as any task does.

The rule: what one handler has done to its task is never met by the next. A task that a handler has cancelled, named, kept,
also by a weak reference, or hung a callback on ends with that handler. And each handler has a context of its own.
"""

import asyncio
import contextlib
import functools
import inspect
from abc import ABCMeta
from asyncio.tasks import _enter_task, _leave_task  # documented for whoever steps coroutines: docs, "Extending asyncio"
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import Context
from sys import getrefcount
from types import CoroutineType
from typing import Any, cast
from weakref import getweakrefcount

from aioecho.datagrams.serving import DatagramServing
from aioecho.runtime.driver import ALWAYS_AWAITED, as_raised, cancelled_error, is_future
from aioecho.serving.ends import Ended, Reason
from aioecho.serving.handlers import BaseRequestHandler, DatagramRequestHandler

__all__ = ["Exchange", "serve"]

new_object: Any = object.__new__

_NOTHING: Any = object()
_ENDED: Any = object()


async def _run_handler(exchange: "Exchange", verified: bool | Awaitable[bool]) -> None:
    """Make the handler, if `verified` says so, and await its methods."""
    if verified is not True:
        if inspect.isawaitable(verified):
            verified = await verified
        if not verified:
            exchange.reason = "refused"
            return
    server = exchange.server
    exchange.handler = handler = server.RequestHandlerClass(exchange.request, exchange.client_address, server)
    await _run_methods(exchange, handler)


async def _run_methods(exchange: "Exchange", handler: Any) -> None:
    await handler.setup()
    try:
        await handler.handle()
    finally:
        if not exchange._abandoned:
            await handler.finish()


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


def serve(exchange: "Exchange", request: Any, client_address: Any) -> bool | None:
    """Serve a datagram, as far as that goes without waiting, in the current context, which is to be of its own.

    Return whether it was served and nothing has been done to the task, so that it can serve another; None if there is
    another current task, where nothing can be done. In the first case the task stays the current one, as another datagram
    mostly follows, until :meth:`Exchange.leave`. :meth:`Exchange.settle` is to follow unless nothing is special about it.
    """
    # All in one function, and with as few operations as it goes: this is most of what a datagram costs.
    loop, task, server = exchange._loop, exchange.task, exchange.server
    if not exchange.is_entered:
        try:
            _enter_task(loop, task)  # type: ignore[arg-type]
        except RuntimeError:
            return None
        exchange.is_entered = True
    references = getrefcount(task)
    exchange.request = request
    exchange.client_address = client_address
    try:
        verified = server.verify_request(request, client_address)
        if verified is True:
            kind = server.RequestHandlerClass
            if kind is exchange.plain_kind:
                # The constructor written out: to call a class takes half as long again.
                exchange.handler = handler = new_object(kind)
                handler.request = request
                handler.client_address = client_address
                handler.server = server
                handler.data = request[0]
                coro = handler.handle()
            else:
                coro = exchange.begin()
            if type(coro) is not CoroutineType:
                coro = _await(coro)
        else:
            coro = _run_handler(exchange, verified)
        # Like coro.send(None), but no StopIteration is made to tell of its end.
        yielded = next(coro.__await__(), _ENDED)
    except BaseException as error:
        exchange.report(error)
        yielded = _ENDED
    if yielded is _ENDED:
        if (
            getrefcount(task) == references
            and getweakrefcount(task) == exchange._weak_references
            and task.get_name() is exchange._name  # type: ignore[union-attr]
            and task._callbacks is None  # type: ignore[union-attr]
        ):
            exchange.request = exchange.handler = None
            return True
    else:
        exchange._coro = coro
        exchange._yielded = yielded
    exchange.leave()
    return False


class Exchange(Ended, Coroutine[Any, Any, None]):
    """A datagram whose handler runs, in `server.connections`; and what the server's next datagrams are served with.

    `client_address` is the sender's. To do anything with it is its handler's. To its task it is both the coroutine that it
    runs and, while it is parked, what it waits for.
    """

    __slots__ = (
        "_abandoned",
        "_callback",
        "_cancelled",
        "_context",
        "_coro",
        "_end",
        "_loop",
        "_name",
        "_parked_in",
        "_short_kind",
        "_weak_references",
        "_yielded",
        "client_address",
        "handler",
        "is_counted",
        "is_entered",
        "is_retired",
        "is_special",
        "plain_kind",
        "pristine",
        "reason",
        "request",
        "server",
        "task",
        "was_aborted",
    )

    _asyncio_future_blocking = ALWAYS_AWAITED

    _callback: Callable[["Exchange"], object] | None
    _cancelled: asyncio.CancelledError | None
    _coro: Coroutine[Any, Any, None] | None
    _end: BaseException | None
    _parked_in: Context | None
    task: "asyncio.Task[None] | None"

    def __init__(self, server: DatagramServing) -> None:
        self.server = server
        self.request = self.client_address = self.handler = None
        self.reason: Reason = "finished"
        self.was_aborted = self.is_counted = self.is_entered = False
        self._callback = self._cancelled = self._coro = self._end = self._parked_in = None
        self.plain_kind: type | None = None  # the last class that was found to be plain
        self._short_kind: type | None = None  # the last that has neither a setup() nor a finish() of its own
        self._yielded = _NOTHING
        self._abandoned = self.is_retired = False
        self.is_special = True  # until it is parked
        self._context = self.pristine = server.task_context
        self._loop = loop = asyncio.get_running_loop()
        self.task = task = asyncio.Task(self, loop=loop, context=server.task_context.copy())
        self._name = task.get_name()
        self._weak_references = getweakrefcount(task)

    def __repr__(self) -> str:
        return f"<Exchange with {self.client_address!r}, handler={self.handler!r}>"

    # What the server does with it.

    def settle(self, context: Context, is_intact: bool) -> bool:
        """Let the task go on after serve(), which ran in `context`, unless it can serve another; return whether it can."""
        self._context = context
        if self._yielded is _NOTHING:
            task = self.task
            # cancelling() is 0 if a cancellation was taken back, and this stays.
            if is_intact and self._end is None and not self.is_retired and not task._must_cancel:  # type: ignore[union-attr]
                return True
            if self._end is None:
                self._end = asyncio.CancelledError() if self.reason == "cancelled" else StopIteration()
        self._wake()
        return False

    def serve_later(self, request: Any, client_address: Any) -> None:
        """Let the task serve a datagram."""
        self.request, self.client_address = request, client_address
        self._context = self.pristine.copy()
        self._coro = self._begin_later()
        self._wake()

    def report(self, error: BaseException) -> None:
        """Take note that the handler has ended with an error."""
        self.is_special = True
        try:
            if not self.report_end(error, self.server) and not isinstance(error, asyncio.CancelledError):
                self._end = error
        except BaseException as end:  # of handle_error(), and not an Exception: for the task to end the program with
            self._end = end

    def leave(self) -> None:
        """Let the task be the current one no longer, which serve() has made it."""
        if self.is_entered:
            self.is_entered = False
            _leave_task(self._loop, self.task)  # type: ignore[arg-type]

    def begin(self) -> Any:
        """Make the handler and call its methods, or let a coroutine do that; return what to await."""
        make = self.server.RequestHandlerClass
        self.handler = handler = make(self.request, self.client_address, self.server)
        kind = type(handler)
        if kind is not self._short_kind:
            if kind.setup is not BaseRequestHandler.setup or kind.finish is not BaseRequestHandler.finish:
                return _run_methods(self, handler)
            self._short_kind = kind
            if kind is make and _is_plain(kind):
                self.plain_kind = kind
        # With no coroutine around it: that would be a tenth of what a datagram costs.
        return handler.handle()

    def is_stepping(self) -> bool:
        """Whether its handler takes its first step right now."""
        return self.is_entered and self.request is not None

    async def _begin_later(self) -> None:
        await _run_handler(self, self.server.verify_request(self.request, self.client_address))

    def _resume(self, error: BaseException | None) -> Any:
        coro = self._coro
        assert coro is not None
        try:
            if error is None:
                return coro.send(None)
            if not self._abandoned:
                return coro.throw(error)
            with contextlib.suppress(Exception):  # it may swallow even that
                coro.close()
            raise error
        except StopIteration:
            raise
        except BaseException as end:
            if not self.report_end(end, self.server):
                raise
        raise StopIteration

    def count_end(self) -> None:
        """Let the server count it when its task has ended."""
        assert self.task is not None
        self.task.add_done_callback(functools.partial(self.server.task_ended, self), context=self.server.task_context)

    def reset(self) -> None:
        """Forget the last handler."""
        self.request = self._coro = self.handler = None
        self.reason, self.is_counted = "finished", False
        self.is_special = self._callback is None or self.server.is_special

    def retire(self) -> "asyncio.Task[None] | None":
        """End the task, of one that is free; return it if it takes a while to."""
        self.is_retired = True
        self._wake()
        return self.task

    # What the server asks of those that wait when it stops.

    def drain(self) -> None:
        """Do nothing: it has all that it will get, and finishes."""

    def cut_off(self) -> None:
        """Cancel the handler."""
        if self.task is not None:
            self.task.cancel()

    def abort(self) -> None:
        """End the handler even if it swallows its cancellation."""
        self.was_aborted = self._abandoned = True
        self.cut_off()

    # The part of asyncio.Future's interface that a task uses on what it awaits.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the task's loop."""
        return self._loop

    def add_done_callback(self, callback: Callable[["Exchange"], object], *, context: Context | None = None) -> None:
        """Keep the task's wake-up."""
        self._callback, self._parked_in = callback, context
        if self.is_retired:
            self._wake()
        else:
            self.is_special = self.server.is_special

    def cancel(self, msg: Any = None) -> bool:
        """Do as that for which the handler waits would do: return False if it can't be cancelled, or just runs."""
        if self.is_stepping():
            self.is_special = self.is_retired = True
            return False  # it cancels itself, and the task remembers
        if self._callback is None:
            yielded = self._yielded
            return bool(is_future(yielded) and yielded.cancel(msg=msg))
        self._cancelled = cancelled_error(msg)
        self.is_retired = True
        self._wake()
        return True

    def result(self) -> None:
        """Raise CancelledError if the task was cancelled while it was parked."""
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            raise cancelled

    def _wake(self) -> None:
        callback, self._callback = self._callback, None
        if callback is not None:
            self._loop.call_soon(callback, self, context=self._parked_in)

    # A coroutine's interface, by which the task resumes it.

    def send(self, value: Any) -> Any:
        """Go on; return what to wait for."""
        return self._proceed(None)

    __next__ = cast(Callable[["Exchange"], Any], lambda self: self._proceed(None))

    def throw(self, *error: Any) -> Any:
        """Go on with an error; return what to wait for."""
        return self._proceed(as_raised(error))

    def close(self) -> None:
        """Close the handler's coroutine."""
        if self._coro is not None:
            self._coro.close()

    def __await__(self) -> Any:
        return self

    def _proceed(self, error: BaseException | None) -> Any:
        try:
            if self._end is not None:
                raise self._end if error is None else error  # it had asked for its cancellation before it ended
            if self._coro is None:
                if error is not None:
                    raise error
                if self.is_retired:
                    raise StopIteration
                return self  # and the task is parked
            yielded, self._yielded = self._yielded, _NOTHING
            if yielded is not _NOTHING:
                if error is None:
                    if yielded is not None:
                        return yielded
                    # It wanted to sleep a turn, and that turn is over.
                elif is_future(yielded) and yielded.cancel(msg=error.args[0] if error.args else None):
                    return yielded  # and the error comes from there, as for any task that is cancelled while it runs
            return self._context.run(self._resume, error)
        except BaseException:
            self.is_retired = True
            # The task has this, and this the task: without the cycle both go as soon as nobody needs them.
            self.task = self._coro = self._end = None
            raise
