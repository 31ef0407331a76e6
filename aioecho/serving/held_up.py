"""In the loop's debug mode: names the handler that holds the event loop up, and its line, while it does.

asyncio's own message comes afterwards, and names what had called the handler: a transport, or a task.
"""

import asyncio
import logging
import math
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["HeldUpWatch", "watch_in_debug_mode"]

logger = logging.getLogger("aioecho.server")

LIBRARY = str(Path(asyncio.__file__).parent.parent)

# How often the loop gives a sign of life, in the shortest time that is to be noticed.
BEATS = 4

# The methods of a handler.
METHODS = ("handle", "setup", "finish", "draining")


def watch_in_debug_mode(loop: asyncio.AbstractEventLoop) -> "HeldUpWatch | None":
    """Begin to watch a loop, if it is in debug mode."""
    seconds = getattr(loop, "slow_callback_duration", math.inf)
    if not loop.get_debug() or not 0 < seconds < math.inf:
        return None
    watch = HeldUpWatch(loop, seconds)
    watch.start()
    return watch


class HeldUpWatch:
    """Looks from a thread of its own whether the loop runs, and logs which handler holds it up for more than `seconds`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._over = threading.Event()

    def start(self) -> None:
        """Watch from now on. Called in the loop's thread."""
        self._thread = threading.get_ident()
        self._beat()
        threading.Thread(target=self._watch, name="aioecho-debug", daemon=True).start()

    def stop(self) -> None:
        """Watch no more."""
        self._over.set()
        self._timer.cancel()

    def _beat(self) -> None:
        self._last = time.monotonic()
        self._timer = self._loop.call_later(self._seconds / BEATS, self._beat)

    def _watch(self) -> None:
        told = 0.0
        while not (self._over.wait(self._seconds / BEATS) or self._loop.is_closed()):
            last = self._last
            if time.monotonic() - last < self._seconds or last == told:
                continue
            told = last  # once for every time
            frame = sys._current_frames().get(self._thread)
            found = None if frame is None else _find_handler(frame)
            del frame  # it has all that the handler has
            if found is not None:
                logger.warning(
                    "%s holds the event loop up for more than %g s, at %s: use await, or asyncio.to_thread()",
                    found[0], self._seconds, found[1],
                )  # fmt: skip


def _find_handler(frame: FrameType) -> tuple[str, str] | None:
    """Return the method of a handler that a thread runs, and the innermost line of it or of what is beside it."""
    inner: FrameType | None = None
    outer: FrameType | None = frame
    while outer is not None:
        if inner is None and not _is_library_code(outer):
            inner = outer
        me: Any = outer.f_locals.get("self")
        if inner is not None and hasattr(type(me), "serves") and outer.f_code.co_name in METHODS:
            return f"{type(me).__qualname__}.{outer.f_code.co_name}()", f"{inner.f_code.co_filename}:{inner.f_lineno}"
        outer = outer.f_back
    return None


def _is_library_code(frame: FrameType) -> bool:
    """Tell whether a frame is the standard library's, or aioecho's: the line to name is the one that called it."""
    name = frame.f_globals.get("__name__", "")
    is_library = (
        frame.f_code.co_filename.startswith((LIBRARY, "<frozen")) and "-packages" not in frame.f_code.co_filename
    )
    return is_library or name.partition(".")[0] == "aioecho"
