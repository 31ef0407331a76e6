"""An event loop that tells when it has nothing to do, and that a handler which never waits cannot stop for good.

It is asyncio's, with a selector that looks before it waits: that the loop has nothing to do is then an event, and no guess by
the clock. So a conversation goes on as soon as the server has done all that it can, and goes on alike on a slow machine.
"""

import asyncio
import contextlib
import ctypes
import selectors
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["HandlerStuck", "QuietLoop", "interrupt"]

STUCK = 3.0
"""Seconds that one callback may take before the handler in it counts as stuck."""

LOOKS = 8
"""How often the loop is looked at within these."""


class HandlerStuck(Exception):
    """Raised in a handler that has kept the loop, or its thread, for too long."""


class _StuckForGood(BaseException):
    """Raised in a handler that catches HandlerStuck and goes on."""


class _Selector(selectors.DefaultSelector):
    """Looks what is ready, and if that is nothing tells the loop's waiters before it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waiters: list[asyncio.Future[None]] = []
        self.turns = 0
        self.is_waiting = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return what is ready, as any selector does; nothing, at once, where a waiter was told."""
        self.turns += 1
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if self.waiters:
            waiters, self.waiters = self.waiters, []
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)
            return []
        self.is_waiting = True
        try:
            return super().select(timeout)
        finally:
            self.is_waiting = False


class QuietLoop(asyncio.SelectorEventLoop):
    """asyncio's loop, with :meth:`quiet`."""

    def __init__(self) -> None:
        self.quiet_selector = _Selector()
        self.was_stuck = False
        super().__init__(self.quiet_selector)

    async def quiet(self, seconds: float) -> bool:
        """Wait until the loop would wait for something from outside; return whether it was within so many seconds."""
        waiter = self.create_future()
        self.quiet_selector.waiters.append(waiter)
        return bool((await asyncio.wait({waiter}, timeout=seconds))[0])

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Raise HandlerStuck in what keeps the loop for longer than STUCK seconds, as long as this lasts."""
        over = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(threading.get_ident(), over), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch(self, ident: int, over: threading.Event) -> None:
        # Looks are counted, and not seconds: while the machine or this process is suspended, no look is taken.
        selector, turns, looks, tries = self.quiet_selector, -1, 0, 0
        while not over.wait(STUCK / LOOKS):
            looks += 1
            if selector.is_waiting or selector.turns != turns:
                turns, looks, tries = selector.turns, 0, 0
            elif looks >= LOOKS:
                self.was_stuck = True
                interrupt(ident, HandlerStuck if tries < 2 else _StuckForGood)
                tries, looks = tries + 1, LOOKS // 2


def interrupt(ident: int, error: Any = HandlerStuck) -> None:
    """Raise an exception in a thread, at the next line of Python that it runs. Does nothing if there is no such thread."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(error))
