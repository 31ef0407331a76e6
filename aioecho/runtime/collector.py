"""Few collections of the garbage collector, and short full ones, in a program that holds very many connections.

A connection is some twenty objects that the collector looks at. None of them needs it to go. By itself, Python up to 3.12 looks
at young objects whenever there are 700 more than before: with 64 clients that come and go, after each 75 connections, for a
tenth of what these cost. Python 3.13 does from 2,000 on.

A full collection looks at every object that lives, some twenty for each connection, and the loop stands still meanwhile: 190 ms
with 10,000 connections, where asyncio's streams take 360 ms (Python 3.11, two processors, both busy). One is made whenever what
lives has grown by a quarter, so while a crowd connects there are several. What has survived one is set aside here, so that the
next looks only at what came since.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

__all__ = ["short_collections"]

# Young objects from which on they are looked at: those of 500 connections that come at once. It takes a millisecond.
YOUNG = 10_000

# Seconds. What a full collection that takes longer leaves behind is set aside.
LONG = 0.01

# Seconds after which a full collection looks at everything again: of what was set aside, garbage that refers to itself stays.
WHOLE_EVERY = 600.0


@contextmanager
def short_collections() -> Iterator[None]:
    """Look at young objects less often, and set aside what long full collections have found to be alive.

    For a program that has the process to itself. At the end all is as it was. A collector that was disabled, or that looks less
    often, is left so.
    """
    before = gc.get_threshold()
    if before[0] > 0:
        gc.set_threshold(max(before[0], YOUNG), *before[1:])
    began = 0.0
    set_aside_at: float | None = None

    def look(phase: str, info: dict[str, int]) -> None:
        nonlocal began, set_aside_at
        if info["generation"] < 2:
            return
        now = monotonic()
        if phase == "start":
            began = now
            if set_aside_at is not None and now >= set_aside_at + WHOLE_EVERY:
                gc.unfreeze()
                set_aside_at = None
        elif now - began >= LONG:
            gc.freeze()
            set_aside_at = set_aside_at or now

    gc.callbacks.append(look)
    try:
        yield
    finally:
        gc.callbacks.remove(look)
        gc.set_threshold(*before)
        if set_aside_at is not None:
            gc.unfreeze()
