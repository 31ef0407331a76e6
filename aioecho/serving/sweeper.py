"""One coarse timer for all timeouts of a server: a stream needs no timer of its own, and a read does not look at the clock.

A sweep looks at every connection, which costs some 0.5 us, and visits a connection for which something may be due: it has
read or written since its last visit, or a timeout of its ends. Of 10,000 idle connections it visits none. A connection whose
timeout ends before the next sweep is visited when the timeout ends, and not a sweep later.
"""

import asyncio
import itertools
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Protocol

from aioecho.config import Timeouts

__all__ = ["TimeoutSweeper"]

# Sweeps within the shortest timeout. A wait whose beginning was not timed counts from the sweep that finds it: so it ends
# too late by a twentieth at the most.
SWEEPS_PER_TIMEOUT = 20

# Seconds between two sweeps: not so often that the loop does little else, and not so seldom that an end is found late.
SHORTEST, LONGEST = 0.005, 5.0

# Connections that a sweep looks at in one turn of the loop, so that it is spread over its time, and visits in one: 0.1 ms.
LOOKS, VISITS = 128, 16

# Seconds between two turns that visit: event loops are not more exact, and uvloop's timers may be half of it early.
BREATH = 0.001


class Visited(Protocol):
    """What a sweep visits."""

    @property
    def due(self) -> float:
        """When to visit it next, in the loop's time."""

    def visit(self, now: float) -> float:
        """Apply the timeouts at `now`, the loop's time; return when the next one ends, or 0 if that is not known."""


class TimeoutSweeper:
    """Sweeps all of `visited`, a collection that changes, again and again while there are any."""

    def __init__(self, visited: Iterable[Visited]) -> None:
        self._visited = visited
        self._interval = LONGEST
        self._known: Timeouts | None = None
        self._timer: asyncio.Handle | None = None
        self._to_look_at: list[Visited] = []  # the rest of a sweep that has begun
        self._looks = LOOKS
        self._pause = LONGEST  # between two turns of a sweep
        self._next = 0.0  # when the next such turn is
        self._to_visit: list[Visited] = []
        self._soon: list[tuple[float, int, Visited]] = []  # a heap: visits that come before the next sweep
        self._numbers = itertools.count()  # to compare visits at the same time by

    @property
    def is_on(self) -> bool:
        """Whether it sweeps."""
        return self._timer is not None

    def keep(self, timeouts: Timeouts) -> None:
        """Sweep as often as `timeouts` need, from now on."""
        if timeouts is not self._known:
            self._known = timeouts
            wanted = [timeouts.idle, timeouts.message, timeouts.write, timeouts.max_age, timeouts.datagram_handler]
            shortest = min((seconds for seconds in wanted if seconds is not None), default=LONGEST * SWEEPS_PER_TIMEOUT)
            interval = max(SHORTEST, shortest / SWEEPS_PER_TIMEOUT)
            if interval < self._interval:
                self._interval = interval
                self.stop()  # the next sweep is now too late
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._next = loop.time() + self._interval
            self._timer = loop.call_at(self._next, self._go_on)

    def stop(self) -> None:
        """Sweep no more, until keep() is called again."""
        self._to_look_at.clear()
        self._to_visit.clear()
        self._soon.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on(self) -> None:
        """Look at some and visit some, as far as it is time for that, and set the timer for more."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._to_visit:
            while self._soon and self._soon[0][0] <= now:
                self._to_visit.append(heappop(self._soon)[2])
            if now > self._next - BREATH and not self._look(now):
                self.stop()
                return
        some = self._to_visit[-VISITS:]
        del self._to_visit[-VISITS:]
        try:
            for visited in some:
                self._expect(visited, visited.visit(now), now)
        finally:
            if self._to_visit:
                self._timer = loop.call_soon(self._go_on)  # the loop polls in between
            else:
                until = min(self._next, self._soon[0][0]) if self._soon else self._next
                self._timer = loop.call_at(max(until, now + BREATH), self._go_on)

    def _look(self, now: float) -> bool:
        """Look at the next part of a sweep; return False if there is nothing to look at."""
        if not self._to_look_at:
            self._to_look_at = list(self._visited)
            if not self._to_look_at:
                return False
            turns = max(1, min(len(self._to_look_at) // LOOKS, int(self._interval / BREATH)))
            self._looks = -(-len(self._to_look_at) // turns)
            self._pause = self._interval / turns
        for visited in self._to_look_at[-self._looks :]:
            due = visited.due
            if due <= now:
                self._to_visit.append(visited)
            else:
                self._expect(visited, due, now)
        del self._to_look_at[-self._looks :]
        self._next = now + self._pause
        return True

    def _expect(self, visited: Visited, due: float, now: float) -> None:
        """Visit it when it is due, if no sweep comes before."""
        if now < due <= now + self._interval:
            heappush(self._soon, (due, next(self._numbers), visited))
