"""A server in a thread of its own, for synchronous programs and tests."""

import asyncio
import contextlib
import inspect
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from aioecho.choice import serve
from aioecho.runtime.interpreters import is_subinterpreter
from aioecho.runtime.loops import end_other_tasks, loop_factory
from aioecho.serving.base import BaseServer
from aioecho.stats import DrainReport, Stats

__all__ = ["BackgroundServer", "run_in_thread", "running"]

NO_THREADS = (
    "run_in_thread() needs a daemon thread, which a subinterpreter does not have: use `async with aioecho.serve(...)` in"
    " a loop of the subinterpreter's own, or run_in_thread() in the main interpreter"
)


class BackgroundServer:
    """A server that serves in a thread of its own, as :func:`run_in_thread` returns it.

    `server` is the server itself. Its coroutines and its `close()` belong to that thread. Everything here may be used in any
    thread.

    Raises:
        ValueError, ImportError: as :func:`run_in_thread`.
        RuntimeError: this interpreter has no daemon threads, as a subinterpreter.
    """

    def __init__(self, server: BaseServer, loop: str) -> None:
        self.server = server
        self._make_loop = loop_factory(loop)
        self._is_ready = threading.Event()
        self._report: DrainReport | None = None
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # of the four below, which several threads look at
        self._task: asyncio.Task[None] | None = None
        self._is_called_off = self._has_ended = False
        self._calls: set[Future[Any]] = set()
        self._own = threading.local()  # with an attribute in the loop's thread and its executor's
        try:
            self._thread = threading.Thread(target=self._run, name="aioecho", daemon=True)
        except RuntimeError as error:  # from 3.12 on
            raise RuntimeError(NO_THREADS) from error

    @property
    def server_address(self) -> Any:
        """Where the first socket listens, as getsockname() tells it."""
        return self.server.server_address

    @property
    def names(self) -> Sequence[str]:
        """The endpoint strings of where it listens, in order and without doubles, with real ports."""
        return self.server.names

    @property
    def connections(self) -> Collection[Any]:
        """The live connections."""
        return self.server.connections

    @property
    def stats(self) -> Stats:
        """The server's counters; they go on counting."""
        return self.server.stats

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop that it serves in, for asyncio.run_coroutine_threadsafe() and ``call_soon_threadsafe()``."""
        assert self.server.event_loop is not None
        return self.server.event_loop

    def call(self, what: Callable[..., Any] | Coroutine[Any, Any, Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function in the server's thread, await what it returns if that can be awaited, and return the result.

        Or with a coroutine in place of a function: await that. What it raises is raised here.

        Raises:
            RuntimeError: this is the server's thread, which would wait for itself; or the server has ended.
            TypeError: `what` is neither.
        """
        if not (callable(what) or inspect.iscoroutine(what)):
            raise TypeError(f"call() takes a function with its arguments, or a coroutine, not {what!r}")
        calling = _call(what, args, kwargs)
        try:
            if asyncio._get_running_loop() is self.loop:
                raise RuntimeError(
                    "call() is for other threads than the server's, which would wait for itself: await it"
                )
            return self._wait_for(asyncio.run_coroutine_threadsafe(calling, self.loop))
        except RuntimeError:
            if inspect.getcoroutinestate(calling) == inspect.CORO_CREATED:  # the loop will not come to it
                calling.close()
                if inspect.iscoroutine(what):
                    what.close()
            raise

    def _wait_for(self, future: "Future[Any]") -> Any:
        """Return the result of a call. Raises RuntimeError if the server ends before."""
        with self._lock:
            self._calls.add(future)
            has_ended = self._has_ended
        if has_ended:
            future.cancel()
        try:
            return future.result()
        except CancelledError:
            if not self.server.is_draining:
                raise
            raise RuntimeError("the server has ended, and the call with it") from None
        finally:
            with self._lock:
                self._calls.discard(future)

    def shutdown(self, grace: float | None = None) -> DrainReport | None:
        """Do what :meth:`aioecho.BaseServer.shutdown` does, and return its report when all is over.

        In one of the server's own threads, in a handler for instance or where asyncio.to_thread() has it called, it begins
        that, and returns None at once.
        """
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.server.begin_shutdown(grace)
        if hasattr(self._own, "is_one") or self.server.owns_this_thread():
            return None
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._report

    def _start(self) -> None:
        try:
            self._start_thread()
            self._is_ready.wait()
        except BaseException:  # KeyboardInterrupt
            self._call_off()
            raise
        if self._error is not None:
            self._thread.join()
            raise self._error

    def _start_thread(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:
            if is_subinterpreter():  # up to 3.11 a subinterpreter has no threads at all
                raise RuntimeError(NO_THREADS) from error
            raise

    def _call_off(self) -> None:
        """End it, wherever it is in its start, and wait for that."""
        with self._lock:
            self._is_called_off = True
            task = self._task
        if task is not None:  # else it looks before it starts
            with contextlib.suppress(RuntimeError):  # the loop is closed
                task.get_loop().call_soon_threadsafe(task.cancel)
        if self._thread.ident is not None:  # it was started
            self._thread.join()

    def _mark_thread(self) -> None:
        self._own.is_one = True

    def _run(self) -> None:
        self._mark_thread()
        try:
            with asyncio.Runner(loop_factory=self._make_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # of the start, or SystemExit of a handler; it is raised in the caller's thread
            self._error = error
        finally:
            self._is_ready.set()
            with self._lock:
                self._has_ended = True
                calls = list(self._calls)
            for call in calls:
                call.cancel()

    async def _serve(self) -> None:
        # asyncio waits for its threads when it closes the loop. shutdown(), called in one of them, must not wait for that.
        executor = ThreadPoolExecutor(thread_name_prefix="aioecho-executor", initializer=self._mark_thread)
        asyncio.get_running_loop().set_default_executor(executor)
        with self._lock:
            self._task = asyncio.current_task()
            if self._is_called_off:
                return
        await self.server.start()
        self._is_ready.set()
        await self.server.serve_forever()
        self._report = await self.server.shutdown()
        await end_other_tasks()


async def _call(what: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    found = what(*args, **kwargs) if callable(what) else what
    return await found if inspect.isawaitable(found) else found


def run_in_thread(
    RequestHandlerClass: Callable[..., Any] | Mapping[Callable[..., Any], Any],
    *endpoints: str,
    loop: str = "auto",
    **options: Any,
) -> AbstractContextManager[BackgroundServer]:
    """Serve in a thread, as long as the ``with`` lasts; it serves as soon as that begins, and is shut down at its end.

    Args:
        RequestHandlerClass, endpoints: as for :func:`aioecho.serve`, and `options` are :class:`aioecho.BaseServer`'s.
        loop: "uvloop", "asyncio", or "auto", which is uvloop if it is installed.

    The thread is a daemon: a program that ends without leaving the ``with`` does not wait for it. A subinterpreter has no such
    threads; serve in its event loop with :func:`aioecho.serve`.

    Raises:
        ValueError, TypeError: an argument makes no sense.
        ImportError: "uvloop" was asked for, and is not installed or cannot be loaded in this interpreter.
        RuntimeError: this is a subinterpreter.
        EndpointError: when the ``with`` begins: an endpoint can't be listened on.
    """
    return running(BackgroundServer(serve(RequestHandlerClass, *endpoints, **options), loop))


@contextlib.contextmanager
def running(background: BackgroundServer) -> Iterator[BackgroundServer]:
    """Serve as long as the ``with`` lasts; raise what the start raises, and the end."""
    background._start()
    try:
        yield background
    finally:
        background.shutdown()
