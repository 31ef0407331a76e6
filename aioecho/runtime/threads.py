"""Threads for blocking handlers: a bounded pool of them."""

import asyncio
import contextlib
import logging
import sys
import threading
import traceback
from collections import OrderedDict
from queue import SimpleQueue
from typing import Any, Protocol

from aioecho.runtime.logs import format_address

__all__ = ["Job", "ThreadPool", "report_end_of_thread"]

logger = logging.getLogger("aioecho.threads")


class Job(Protocol):
    """What a thread of the pool runs."""

    client_address: Any
    thread: threading.Thread | None

    def run(self) -> None:
        """Do the work, in a thread; raise nothing. The loop is told of the end, and calls ThreadPool.finished()."""


class ThreadPool:
    """At most `most` daemon threads, started as they are needed, and used again. Call its methods in the event loop.

    Not concurrent.futures': the interpreter waits for its threads at exit, so that one stuck handler keeps a process alive.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._loop = asyncio.get_running_loop()
        self._threads: set[threading.Thread] = set()
        self._busy: set[Job] = set()
        self._waiting: OrderedDict[Job, None] = OrderedDict()  # to remove any of them takes no longer for many
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._started = 0
        self._none_left: asyncio.Future[None] | None = None

    def submit(self, job: Job) -> None:
        """Run a job in an idle thread, in a new thread or, at the limit, in the first thread that comes free.

        Raises:
            RuntimeError: the system can start no thread, and the pool has none to wait for.
        """
        self._waiting[job] = None
        try:
            self._begin_waiting()
        except RuntimeError:
            del self._waiting[job]
            raise

    def resize(self, most: int) -> None:
        """Run at most `most` jobs at a time from now on. Threads beyond that finish their job, and idle."""
        self._most = most
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        while self._waiting and self._has_thread():
            following, _ = self._waiting.popitem(last=False)
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

    def withdraw(self, job: Job) -> bool:
        """Remove a job that waits for a thread, and return True; return False if it does not wait."""
        if job not in self._waiting:
            return False
        del self._waiting[job]
        return True

    def finished(self, job: Job) -> None:
        """Note that a job has ended, so that its thread may run another one."""
        self._busy.discard(job)
        self._begin_waiting()

    def owns_this_thread(self) -> bool:
        """Tell whether the caller runs in one of these threads. May be called in any thread."""
        return threading.current_thread() in self._threads

    @property
    def busy(self) -> frozenset[Job]:
        """The jobs that have a thread."""
        return frozenset(self._busy)

    def _report_stuck(self) -> None:
        """Log every busy thread with its stack."""
        frames = sys._current_frames()
        for job in self._busy:
            thread = job.thread
            if thread is None or (frame := frames.get(thread.ident or 0)) is None:
                continue
            stack = "".join(traceback.format_stack(frame)).rstrip()
            logger.error(
                "thread %s would not end, with the connection from %s, and is left behind:\n%s",
                thread.name,
                format_address(job.client_address),
                stack,
            )

    def end(self) -> None:
        """Tell all threads to exit when they have nothing to do. Jobs that wait for a thread still get one."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self) -> None:
        """Wait until all threads have exited, after end(). Call it in another thread than the loop's."""
        # copy() is atomic without the GIL too, tuple() is not.
        for thread in self._threads.copy():
            thread.join()

    async def close(self) -> None:
        """Tell idle threads to exit and wait for them. Threads that still run a handler are stuck: do not wait for them."""
        self._report_stuck()
        self.end()
        if len(self._threads) > len(self._busy):
            self._none_left = self._loop.create_future()
            await self._none_left

    def _work(self) -> None:
        # In a thread.
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # or an idle thread would hold on to it
        with contextlib.suppress(RuntimeError):  # the loop is closed: this thread was left behind
            self._loop.call_soon_threadsafe(self._forget, threading.current_thread())

    def _forget(self, thread: threading.Thread) -> None:
        # It has run its last job, and is about to exit: this takes microseconds.
        thread.join()
        self._threads.discard(thread)
        if self._none_left is not None and not self._none_left.done() and len(self._threads) <= len(self._busy):
            self._none_left.set_result(None)


def report_end_of_thread() -> None:
    """Report the exception that is being handled as if it had ended a thread of its own, though the pool's thread goes on."""
    kind, error, trace = sys.exc_info()
    assert kind is not None
    try:
        threading.excepthook(threading.ExceptHookArgs((kind, error, trace, threading.current_thread())))
    except Exception:  # it can't write to stderr, for instance
        logger.exception("threading.excepthook raised")
