"""The one way in which a task runs a request's handler: verify the request, make the handler, setup, handle, finish, report."""

import asyncio
import inspect
import sys
from collections.abc import Awaitable, Callable
from types import CoroutineType
from typing import Any

from aioecho.runtime.driver import Driver
from aioecho.serving.ends import Ended
from aioecho.serving.handlers import BaseRequestHandler
from aioecho.serving.live import Live

__all__ = ["SWALLOWED_FOR", "HandlerRun"]

SWALLOWED_FOR = 1.0
"""Seconds from a handler's cancellation until it is ended though it swallows that."""


class HandlerRun(Live, Ended, Driver):
    """A request whose handler runs in a task of its own: a connection, a session.

    Its task's coroutine calls :meth:`prepare`, and if there is a `handler` then, :meth:`handle`, and awaits what they
    return. At the end it calls :meth:`finish_handler`, likewise. The coroutine is not here: while a handler waits its frame
    stays, and a connection's has to be as small as can be.
    """

    __slots__ = ()

    handler: Any
    _server: Any  # a BaseServer, which the handler gets too
    _RequestHandlerClass: Callable[..., Any]

    was_aborted: bool

    def abort(self) -> None:
        """Cancel the handler, and end it SWALLOWED_FOR seconds later if it goes on."""
        self.was_aborted = True  # type: ignore[misc] # see Ended
        self.cancel()
        self.task.get_loop().call_later(SWALLOWED_FOR, self._abandon_if_live)

    def _abandon_if_live(self) -> None:
        if not self.task.done():
            self.abandon_handler()

    def abandon_handler(self) -> None:
        """End the handler, which has swallowed its cancellation.

        If it has ended, and a task beside it goes on, do not wait for that: finish() comes, and has SWALLOWED_FOR seconds.
        """
        self.was_aborted = True  # type: ignore[misc] # see Ended
        if self.release_beside():
            self.spare()
        else:
            self.abandon()
        self.cancel()

    def spare(self) -> None:
        """Give what comes after the handler, which has obeyed in the end, as much time again."""
        self.task.get_loop().call_later(SWALLOWED_FOR, self._abandon_if_live)

    def release_beside(self) -> bool:
        """Wait no more for what runs beside the handler; return whether that is what goes on. To be overridden."""
        return False

    def cancel(self) -> None:
        """Cancel the handler. To be overridden."""
        raise NotImplementedError

    def note_wait(self) -> None:
        """Do what is to be done before a hook or a handler's method may wait. To be overridden."""

    def prepare(self) -> Awaitable[None] | None:
        """Verify the request, make its handler, and call setup(); return what has to be awaited for that, if anything.

        `handler` is None until setup() has returned, so that finish() is called only then.
        """
        verified = self._server.verify_request(self.request, self.client_address)
        return self._make_handler() if verified is True else self._judge(verified)

    async def _judge(self, verified: Any) -> None:
        if inspect.isawaitable(verified):
            self.note_wait()
            verified = await verified
        if not verified:
            self.reason = "refused"  # type: ignore[misc] # see Ended
            return
        making = self._make_handler()
        if making is not None:
            await making

    def _make_handler(self) -> Awaitable[None] | None:
        handler = self._RequestHandlerClass(self.request, self.client_address, self._server)
        if type(handler).setup is not BaseRequestHandler.setup:
            return self._set_up(handler)
        self.handler = handler
        self.note_wait()
        return None

    async def _set_up(self, handler: Any) -> None:
        self.note_wait()
        await handler.setup()
        self.handler = handler
        self.note_wait()

    def handle(self) -> Awaitable[Any]:
        """Call handle(), and return what is to be awaited.

        Raises:
            TypeError: handle() is no coroutine function.
        """
        handling: Awaitable[Any] = self.handler.handle()
        if type(handling) is CoroutineType:
            # What names the task, where a task is shown: Upper.handle.
            self._coroutine.__qualname__ = handling.__qualname__
            return handling
        if inspect.isawaitable(handling):
            return handling
        raise TypeError(
            f"{type(self.handler).__qualname__}.handle() returned {handling!r}, which can't be awaited: define it"
            " as `async def handle(self)`"
        )

    def end_with(self, error: BaseException | None) -> BaseException | None:
        """Return what handle(), or what comes before it, has ended with, given the exception that it raised."""
        if isinstance(error, GeneratorExit) and not self._is_current():
            raise error  # the program has ended
        # What awaits a coroutine that was closed meets an error of Python's.
        return asyncio.CancelledError() if self._is_abandoned else error

    def raise_if_abandoned(self) -> None:
        """Raise CancelledError, in place of Python's error, if what comes after handle() was closed as it took too long."""
        if self._is_abandoned:
            raise asyncio.CancelledError from None

    async def run_methods(self, handler: Any) -> None:
        """Await setup(), handle() and finish() of a handler that was made, where nothing is to be done in between."""
        await self._set_up(handler)
        try:
            await self.handle()
        finally:
            if self._is_to_finish():
                await handler.finish()

    def _is_to_finish(self) -> bool:
        handler = self.handler
        return handler is not None and not self._is_abandoned and type(handler).finish is not BaseRequestHandler.finish

    def finish_handler(self, end: BaseException | None) -> Awaitable[None] | None:
        """Call finish(), if there is a handler; set the reason, and report what went wrong.

        `end` is what was raised before. Return what has to be awaited for that, if anything. That raises what the task is to
        end with.
        """
        handler = self.handler
        if end is None and (handler is None or type(handler).finish is BaseRequestHandler.finish):
            if handler is not None:
                self.reason = "finished"  # type: ignore[misc] # see Ended
            return None
        return self._finish_handler(end)

    async def _finish_handler(self, end: BaseException | None) -> None:
        try:
            try:
                if self.handler is not None:
                    self.reason = "finished"  # type: ignore[misc] # see Ended
                if end is not None:
                    raise end
            finally:
                if self._is_to_finish():
                    await self.handler.finish()
        except BaseException:
            error = sys.exception()
            assert error is not None
            if self._is_abandoned and isinstance(error, Exception):  # finish() was closed
                error = asyncio.CancelledError()
            try:
                if not self.report_end(error, self._server):
                    raise error from error.__cause__
            finally:
                del error  # its traceback refers to this frame
        finally:
            del end
