"""Short full collections of the garbage collector, in a program that holds very many connections.

A full collection looks at every object that lives, some twenty for each connection, and the loop stands still meanwhile: 190 ms
with 10,000 connections, where asyncio's streams take 360 ms (Python 3.11, two processors, both busy). One is made whenever what
lives has grown by a quarter, so while a crowd connects there are several. What has survived one is set aside here, so that the
next looks only at what came since. They come sooner for that: what gathers by itself took 35 ms at a time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

__all__ = ["collect_little", "short_collections"]

# Seconds. What a full collection that takes longer leaves behind is set aside.
LONG = 0.004

# New objects after which a full one may be made, where Python's own numbers make it 85,000 to 240,000; and while the program
# ends, as nothing is gained then by looking at what is about to go. 3.14.0 to 3.14.4 look at the older ones bit by bit anyway.
NEW, NEW_AT_END = 20_000, 2_000_000

# What Python begins with. A program that has set other thresholds is left with them.
PYTHONS_OWN = ((700, 10, 10), (2_000, 10, 10))

# Seconds after which a full collection looks at everything again: of what was set aside, garbage that refers to itself stays.
WHOLE_EVERY = 600.0


@contextmanager
def short_collections() -> Iterator[None]:
    """Set aside what long full collections have found to be alive. For a program that has the process to itself.

    At the end nothing is set aside any more.
    """
    thresholds = gc.get_threshold()
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
    if thresholds in PYTHONS_OWN:
        gc.set_threshold(*thresholds[:2], _full_after(NEW))
    try:
        yield
    finally:
        gc.callbacks.remove(look)
        gc.set_threshold(*thresholds)
        if set_aside_at is not None:
            gc.unfreeze()


def collect_little() -> None:
    """Make full collections rare: the program is about to end, and what it holds to go by itself. Until it has, that is.

    To be called inside of short_collections().
    """
    young, middle, old = gc.get_threshold()
    if young > 0 <= middle:  # else it is off
        gc.set_threshold(young, middle, max(old, _full_after(NEW_AT_END)))


def _full_after(objects: int) -> int:
    """Return the third threshold for a full collection after so many new objects."""
    young, middle, _ = gc.get_threshold()
    return max(0, objects // (young * (middle + 1)) - 1)
