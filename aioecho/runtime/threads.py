"""Threads for blocking handlers: a bounded pool of them."""

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
    """What a thread of the pool runs."""

    client_address: Any
    thread: threading.Thread | None

    def run(self) -> None:
        """Do the work, in a thread; raise nothing. The loop is told of the end, and calls ThreadPool.finished()."""


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

    def submit(self, job: Job) -> None:
        """Let a thread run it, one of ours that is idle, or a new one, or, at the limit, the first that comes free.

        Raises:
            RuntimeError: the system has no thread to give, and there is none to wait for.
        """
        self._waiting.append(job)
        try:
            self._begin_waiting()
        except RuntimeError:
            self._waiting.remove(job)
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

    def withdraw(self, job: Job) -> bool:
        """Take back one that waits for a thread; return False if it does not."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def finished(self, job: Job) -> None:
        """Be told that a job has no more use for its thread."""
        self._busy.discard(job)
        self._begin_waiting()

    def owns_this_thread(self) -> bool:
        """Tell whether the caller runs in one of these threads. May be called in any thread."""
        return threading.current_thread() in self._threads

    @property
    def busy(self) -> frozenset[Job]:
        """Those that have a thread."""
        return frozenset(self._busy)

    def _report_stuck(self) -> None:
        """Log each busy thread with its stack."""
        frames = sys._current_frames()
        for job in self._busy:
            thread = job.thread
            if thread is None or (frame := frames.get(thread.ident or 0)) is None:
                continue
            stack = "".join(traceback.format_stack(frame)).rstrip()
            logger.error(
                "thread %s would not end, with the connection from %s, and is left behind:\n%s",
                thread.name,
                job.client_address,
                stack,
            )

    def end(self) -> None:
        """Let each thread end when it has nothing to do. Those who wait for one still get it."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self) -> None:
        """Wait until each thread has ended, after end(). For another thread than the loop's."""
        for thread in tuple(self._threads):
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
        while (job := self._jobs.get()) is not None:
            job.run()
            del job  # or an idle thread would hold on to it
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
    try:
        threading.excepthook(threading.ExceptHookArgs((kind, error, trace, threading.current_thread())))
    except Exception:  # it can't write to stderr, for instance
        logger.exception("threading.excepthook raised")
