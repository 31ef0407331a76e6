"""Few collections of the garbage collector, and short full ones, in a program that holds very many connections.

A connection is some twenty objects that the collector looks at, and that go without it. By itself, Python up to 3.12 looks at
the young ones whenever there are 700 more than before: with 64 clients that come and go, after each 75 connections, for a
tenth of what these cost. Python 3.13 does from 2,000 on.

A full collection looks at every object that lives, and the loop stands still meanwhile: 190 ms with 10,000 connections, where
asyncio's streams take 360 ms (Python 3.11, two processors, both busy). One is made whenever what lives has grown by a
quarter, so while a crowd connects there are several. What has survived one is set aside here, so that the next looks only at
what came since. They come sooner for that: what gathers by itself took 35 ms at a time.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

__all__ = ["collect_little", "short_collections"]

# The thresholds that Python begins with, by its version. A program that has set others is left with them; so are 3.14.0 to
# 3.14.4, which go through the older objects bit by bit.
PYTHONS_OWN = ((700, 10, 10), (2_000, 10, 10))

# Instead: young objects are looked at from 10,000 on, those of 500 connections that come at once, which takes a millisecond;
# and all of them after 40,000 new ones, if that is a quarter.
SERVING = (10_000, 1, 0)

# The same while the program ends: nothing is gained by looking at what is about to go. Two million new ones.
ENDING = (10_000, 10, 20)

# Seconds. What a full collection that takes longer leaves behind is set aside.
LONG = 0.004

# Seconds after which a full collection looks at everything again: of what was set aside, garbage that refers to itself stays.
WHOLE_EVERY = 600.0


@contextmanager
def short_collections() -> Iterator[None]:
    """Look at young objects less often, and set aside what long full collections have found to be alive.

    For a program that has the process to itself. At the end all is as it was.
    """
    before = gc.get_threshold()
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
    if before in PYTHONS_OWN:
        gc.set_threshold(*SERVING)
    try:
        yield
    finally:
        gc.callbacks.remove(look)
        gc.set_threshold(*before)
        if set_aside_at is not None:
            gc.unfreeze()


def collect_little() -> None:
    """Make collections rare: the program is about to end, and what it holds to go by itself.

    To be called inside of :func:`short_collections`, whose end ends it. Thresholds that the program has set stay.
    """
    if gc.get_threshold() == SERVING:
        gc.set_threshold(*ENDING)
