"""A bounded pool of daemon threads, and what is said of a thread that would not end."""

import asyncio
import contextlib
import logging
import sys
import threading
import traceback
from collections import deque
from queue import SimpleQueue
from typing import Any, Protocol

__all__ = ["Job", "ThreadPool", "report_end_of_thread"]

logger = logging.getLogger("aioecho.threads")


class Job(Protocol):
    """What a thread runs, once."""

    client_address: Any

    thread: threading.Thread | None
    """The thread that runs it, as soon as there is one."""

    def run(self) -> None:
        """Do it; raises nothing."""


class ThreadPool:
    """At most so many daemon threads, started as they are needed, and used again. Its methods are for the event loop.

    Not concurrent.futures': its threads are waited for when the process exits, so that one stuck handler keeps it alive.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._threads: set[threading.Thread] = set()
        self._busy: set[Job] = set()
        self._waiting: deque[Job] = deque()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._started = 0
        self._none_left: asyncio.Future[None] | None = None

    def submit(self, connection: Job) -> None:
        """Let a thread run it, one of ours that is idle, or a new one, or, at the limit, the first that comes free.

        Raises:
            RuntimeError: the system has no thread to give, and there is none to wait for.
        """
        if len(self._busy) == len(self._threads) and not self._can_start():
            self._waiting.append(connection)
            return
        self._busy.add(connection)
        self._jobs.put(connection)

    def _can_start(self) -> bool:
        if len(self._threads) >= self._most:
            return False
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

    def withdraw(self, connection: Job) -> bool:
        """Take back one that waits for a thread; return False if it has one."""
        if connection in self._busy:
            return False
        self._waiting.remove(connection)
        return True

    def finished(self, connection: Job) -> None:
        """Be told that a connection has no more use for its thread."""
        self._busy.discard(connection)
        if self._waiting:
            following = self._waiting.popleft()
            self._busy.add(following)
            self._jobs.put(following)

    def owns_this_thread(self) -> bool:
        """Tell whether the caller runs in one of these threads. May be called in any thread."""
        return threading.current_thread() in self._threads

    @property
    def busy(self) -> frozenset[Job]:
        """Those that have a thread."""
        return frozenset(self._busy)

    def report_stuck(self) -> None:
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

    async def close(self) -> None:
        """Let each thread end, and return when those have that are not stuck."""
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


def report_end_of_thread() -> None:
    """Report the exception that is being handled as that of a thread that it ends, though ours goes on."""
    kind, error, trace = sys.exc_info()
    assert kind is not None
    threading.excepthook(threading.ExceptHookArgs((kind, error, trace, threading.current_thread())))
