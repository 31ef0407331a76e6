"""A request with a blocking handler: verified in the event loop, handled in a thread of a bounded pool, ended in the loop."""

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from aioecho.blocking.view import BlockingServerView
from aioecho.runtime.logs import format_address
from aioecho.runtime.threads import ThreadPool, report_end_of_thread
from aioecho.serving.base import BaseServer
from aioecho.serving.ends import Ended, Reason
from aioecho.serving.live import Live
from aioecho.serving.measures import Wire

__all__ = ["Threaded"]


class Threaded(Live, Ended):
    """A request and its blocking handler, in a thread or waiting for one, in `server.connections`.

    `handler` is always None: its constructor returns when all is done. `thread` is None until it has one.
    """

    task = None  # it has a thread
    _was_lost = False  # whether the connection broke before it was cut off

    __slots__ = (
        "RequestHandlerClass",
        "_context",
        "_has_returned",
        "_is_cancelled",
        "_loop",
        "_pool",
        "_server",
        "_verifying",
        "client_address",
        "handler",
        "reason",
        "request",
        "thread",
        "was_aborted",
        "wire",
    )

    def __init__(
        self,
        server: BaseServer,
        pool: ThreadPool,
        request: Any,
        client_address: Any,
        RequestHandlerClass: Callable[..., Any],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._server, self._pool = server, pool
        self.RequestHandlerClass = RequestHandlerClass
        self.request = request
        self.client_address = client_address
        self.handler: Any = None
        self.thread: threading.Thread | None = None
        self.reason: Reason = "error"
        self.wire: Wire | None = None  # set for a connection of a server that is measured
        self.was_aborted = self._is_cancelled = self._has_returned = False
        self._context = contextvars.copy_context()  # what a handler sets there no other handler sees
        self._verifying: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        thread = "no thread yet" if self.thread is None else f"thread={self.thread.name!r}"
        return f"<{type(self).__name__} from {format_address(self.client_address)}, {thread}>"

    # In the loop: what is measured of it.

    def look_at_wire(self, sock: Any = None) -> int:
        """Count the bytes of a connection up to now. `sock` is its socket, unless it is the request.

        Return 0: nothing waits here for the kernel to take it.
        """
        if self.wire is not None:
            self.wire.look(sock or self.request)
        return 0

    def _note_handshake(self, seconds: float | None) -> None:
        if self._server.measures is not None:
            self._server.measures.note_handshake(seconds)

    # In the loop: its beginning.

    def begin(self) -> None:
        """Verify it, and have it run in a thread."""
        try:
            verified = self._server.verify_request(self.request, self.client_address)
            if verified is not True and inspect.isawaitable(verified):
                self._verifying = self._loop.create_task(self._verify(verified))
                self._verifying.add_done_callback(self._when_verified)
                self._watch_peer()
                return
        except Exception as error:
            self.report_end(error, self._server)
            self._return()
        else:
            self._go_on(verified)

    def _get_verification_limit(self) -> tuple[float | None, Reason]:
        """Return the seconds that a coroutine of verify_request() has, and the reason of what takes longer."""
        return self._server.timeouts.handshake, "handshake"

    async def _verify(self, verified: Awaitable[bool]) -> None:
        seconds, reason = self._get_verification_limit()
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                verdict = await verified
            self._go_on(verdict)
        except Exception as error:
            if scope.expired() and isinstance(error, TimeoutError):
                self.reason = reason
                self._server.report_slow_verification(self.client_address, seconds)
                self._return()
                return
            self.report_end(error, self._server)
            self._return()

    def _watch_peer(self) -> None:
        """Have the verification cancelled if the peer is lost meanwhile. To be overridden, as the next."""

    def _forget_peer(self) -> None:
        """Watch for that no longer."""

    def _when_verified(self, task: asyncio.Task[None]) -> None:
        self._verifying = None
        self._forget_peer()
        if task.cancelled():
            self.reason = "connection lost" if self._was_lost else "cancelled"
        if task.cancelled() or task.exception() is not None:
            self._return()

    def _go_on(self, verified: Any) -> None:
        if self._is_cancelled:
            self._return()
            return
        if not verified:
            self.reason = "refused"
            self._return()
            return
        try:
            self._pool.submit(self)
        except RuntimeError as error:
            self.reason = "no thread"
            self._server.report_no_thread(self.client_address, error)
            self._return()

    # In the loop: what the server asks of it when it stops.

    def drain(self) -> None:
        """Let the handler end when there is nothing left to do."""

    def is_in_message(self) -> bool:
        """Return False: a datagram is a whole message."""
        return False

    def is_cut(self) -> bool:
        """Return False: whatever its handler does, it ends as cancelled."""
        return False

    def cancel(self) -> None:
        """Do without the handler if it has not begun; else interrupt it, as far as that is possible."""
        self._is_cancelled = True
        if self._verifying is not None and not self._verifying.done():
            self._verifying.cancel()
        elif self._pool.withdraw(self):
            self._return()
        else:
            self._interrupt()

    def _interrupt(self) -> None:
        """Make what the handler waits for end, where that can be done."""

    def abort(self) -> None:
        """Cut it off. Its thread can't be ended: what else the handler waits for, it goes on waiting for."""
        self.was_aborted = True
        if not self._has_returned:
            self.cancel()

    def abandon_handler(self) -> None:
        """Do the same: nothing ends a thread."""
        self.abort()

    # In its thread.

    def run(self) -> None:
        """Serve the connection; raises nothing."""
        self.thread = threading.current_thread()
        try:
            self._context.run(self._serve)
        except BaseException:
            report_end_of_thread()  # as if the thread was this handler's alone; nothing is said of SystemExit
        if not self._post(self._returned):
            self._leave()

    def _serve(self) -> None:
        """Make the handler, which does the work, and set the reason."""
        self._call_handler(self.request)

    def _call_handler(self, request: Any) -> None:
        try:
            self.RequestHandlerClass(request, self.client_address, BlockingServerView(self._server))
            self.reason = "finished"
        except Exception as error:
            if self.is_servers_doing(error):
                self.reason = "cancelled"
            else:
                self.report_end(error, self._server, request)

    def is_servers_doing(self, error: BaseException) -> bool:
        """Tell whether the handler has met that error because the server has cut it off."""
        return self._is_cancelled and isinstance(error, OSError)

    def _leave(self) -> None:
        """Clean up in the thread, as the loop is closed."""

    def _post(self, callback: Callable[..., object], *arguments: Any) -> bool:
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop is closed: this handler was left behind
            return False
        return True

    # In the loop again.

    def _returned(self) -> None:
        self._pool.finished(self)
        self._return()

    def _return(self) -> None:
        """The handler has returned, or there will be none."""
        self._has_returned = True
        if self._is_cancelled and self.outcome != "rejected" and self.reason != "connection lost":
            self.reason = "connection lost" if self._was_lost else "cancelled"
