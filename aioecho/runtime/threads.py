"""Threads for blocking handlers: a bounded pool of them, and what runs in it."""

import asyncio
import contextlib
import contextvars
import inspect
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the server is above, and makes these
    from aioecho.server import BaseServer

__all__ = ["Begun", "ThreadPool", "Threaded", "report_end_of_thread"]

logger = logging.getLogger("aioecho.threads")

T = TypeVar("T")


class ThreadPool:
    """At most so many daemon threads, started as they are needed, and used again. Its methods are for the event loop.

    Not concurrent.futures': its threads are waited for when the process exits, so that one stuck handler keeps it alive.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._threads: set[threading.Thread] = set()
        self._busy: set[Threaded] = set()
        self._waiting: deque[Threaded] = deque()
        self._jobs: SimpleQueue[Threaded | None] = SimpleQueue()
        self._started = 0
        self._none_left: asyncio.Future[None] | None = None

    def submit(self, connection: "Threaded") -> None:
        """Let a thread run it, one of ours that is idle, or a new one, or, at the limit, the first that comes free.

        Raises:
            RuntimeError: the system has no thread to give, and there is none to wait for.
        """
        self._waiting.append(connection)
        try:
            self._begin_waiting()
        except RuntimeError:
            self._waiting.remove(connection)
            raise

    def resize(self, most: int) -> None:
        """Let there be at most so many at work from now on. Threads that are too many finish what they do, and idle."""
        self._most = most
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        while self._waiting and self._has_thread():
            following = self._waiting.popleft()
            self._busy.add(following)
            self._jobs.put(following)

    def _has_thread(self) -> bool:
        if len(self._busy) >= self._most:
            return False
        return len(self._busy) < len(self._threads) or self._can_start()

    def _can_start(self) -> bool:
        self._started += 1
        thread = threading.Thread(target=self._work, name=f"aioecho-{self._started}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system's limit
            if not self._threads:
                raise
            return False
        self._threads.add(thread)
        return True

    def withdraw(self, connection: "Threaded") -> bool:
        """Take back one that waits for a thread; return False if it does not."""
        if connection not in self._waiting:
            return False
        self._waiting.remove(connection)
        return True

    def finished(self, connection: "Threaded") -> None:
        """Be told that a connection has no more use for its thread."""
        self._busy.discard(connection)
        self._begin_waiting()

    def owns_this_thread(self) -> bool:
        """Tell whether the caller runs in one of these threads. May be called in any thread."""
        return threading.current_thread() in self._threads

    @property
    def busy(self) -> frozenset["Threaded"]:
        """Those that have a thread."""
        return frozenset(self._busy)

    def _report_stuck(self) -> None:
        """Log each busy thread with its stack."""
        frames = sys._current_frames()
        for connection in self._busy:
            thread = connection.thread
            if thread is None or (frame := frames.get(thread.ident or 0)) is None:
                continue
            stack = "".join(traceback.format_stack(frame)).rstrip()
            logger.error(
                "thread %s would not end, with the connection from %s, and is left behind:\n%s",
                thread.name,
                connection.client_address,
                stack,
            )

    def end(self) -> None:
        """Let each thread end when it has nothing to do. Those who wait for one still get it."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self) -> None:
        """Wait until each thread has ended, after end(). For another thread than the loop's."""
        # copy() is atomic without the GIL too, tuple() is not.
        for thread in self._threads.copy():
            thread.join()

    async def close(self) -> None:
        """Let each thread end, and return when those have that are not stuck, as those are by now that are busy."""
        self._report_stuck()
        self.end()
        if len(self._threads) > len(self._busy):
            self._none_left = self._loop.create_future()
            await self._none_left

    def _work(self) -> None:
        # In a thread.
        while (connection := self._jobs.get()) is not None:
            connection.run()
            del connection  # or an idle thread would hold on to it
        with contextlib.suppress(RuntimeError):  # the loop is closed: this thread was left behind
            self._loop.call_soon_threadsafe(self._forget, threading.current_thread())

    def _forget(self, thread: threading.Thread) -> None:
        # It has done its last work, and is about to end: this takes no time worth speaking of.
        thread.join()
        self._threads.discard(thread)
        if self._none_left is not None and not self._none_left.done() and len(self._threads) <= len(self._busy):
            self._none_left.set_result(None)


class Threaded:
    """A request and its blocking handler, in a thread or waiting for one, in `server.connections`.

    `handler` is always None: its constructor returns when all is done. `thread` is None until it has one.
    """

    __slots__ = (
        "RequestHandlerClass",
        "_context",
        "_has_returned",
        "_is_cut_off",
        "_loop",
        "_pool",
        "_server",
        "_verifying",
        "client_address",
        "handler",
        "outcome",
        "reason",
        "request",
        "thread",
        "was_aborted",
    )

    def __init__(
        self,
        server: "BaseServer",
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
        self.outcome, self.reason = "failed", "error"
        self.was_aborted = self._is_cut_off = self._has_returned = False
        self._context = contextvars.copy_context()  # what a handler sets there is nobody else's
        self._verifying: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        thread = "no thread yet" if self.thread is None else f"thread={self.thread.name!r}"
        return f"<{type(self).__name__} from {self.client_address!r}, {thread}>"

    # In the loop: its beginning.

    def begin(self) -> None:
        """Verify it, and have it run in a thread."""
        try:
            verified = self._server.verify_request(self.request, self.client_address)
            if verified is not True and inspect.isawaitable(verified):
                self._verifying = self._loop.create_task(self._verify(verified))
                self._verifying.add_done_callback(self._when_verified)
                return
        except Exception:
            self._server._call_handle_error(self.request, self.client_address)
            self._return()
        else:
            self._go_on(verified)

    async def _verify(self, verified: Awaitable[bool]) -> None:
        try:
            self._go_on(await verified)
        except Exception:
            self._server._call_handle_error(self.request, self.client_address)
            self._return()

    def _when_verified(self, task: asyncio.Task[None]) -> None:
        self._verifying = None
        if task.cancelled():
            self.outcome = self.reason = "cancelled"
        if task.cancelled() or task.exception() is not None:
            self._return()

    def _go_on(self, verified: Any) -> None:
        if self._is_cut_off:
            self._return()
            return
        if not verified:
            self.outcome, self.reason = "rejected", "refused"
            self._return()
            return
        try:
            self._pool.submit(self)
        except RuntimeError as error:
            self.outcome, self.reason = "rejected", "no thread"
            logger.error("no thread for %s: %s", self.client_address, error)
            self._return()

    # In the loop: what the server asks of it when it stops.

    def drain(self) -> None:
        """Let the handler end when there is nothing left to do."""

    def cut_off(self) -> None:
        """Do without the handler if it has not begun; else interrupt it, as far as that is possible."""
        self._is_cut_off = True
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
            self.cut_off()

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
        """Make the handler, which does the work, and set the outcome."""
        raise NotImplementedError

    def _leave(self) -> None:
        """The loop is closed: there is nobody else to clean up."""

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
        if self._is_cut_off and self.outcome != "rejected":
            self.outcome = self.reason = "cancelled"


class Begun(Coroutine[Any, Any, T]):
    """A coroutine that need not be awaited, as it only waits for what has begun. It is made by `make` when it is stepped."""

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._make = make
        self._coro: Coroutine[Any, Any, T] | None = None

    def send(self, value: Any) -> Any:
        """Go on."""
        self._coro = self._coro or self._make()
        return self._coro.send(value)

    def throw(self, *error: Any) -> Any:
        """Go on with an error."""
        self._coro = self._coro or self._make()
        return self._coro.throw(*error)

    def close(self) -> None:
        """End it."""
        if self._coro is not None:
            self._coro.close()

    def __await__(self) -> Generator[Any, Any, T]:
        return self._make().__await__()


def report_end_of_thread() -> None:
    """Report the exception that is being handled as that of a thread that it ends, though ours goes on."""
    kind, error, trace = sys.exc_info()
    assert kind is not None
    try:
        threading.excepthook(threading.ExceptHookArgs((kind, error, trace, threading.current_thread())))
    except Exception:  # it can't write to stderr, for instance
        logger.exception("threading.excepthook raised")
