"""One coarse timer for all of a server's timeouts: a stream then needs none of its own, and a read not even the time.

In each round everybody is looked at, which costs some 0.5 us, and those are visited for whom something may be due: who has done
something since the last visit, or whose time is over. Of 10,000 idle ones nobody is visited. Whose time will be over before the
next round is visited then, and not a round later.
"""

import asyncio
import itertools
from collections.abc import Iterable
from heapq import heappop, heappush
from typing import Protocol

from aioecho.config import Timeouts

__all__ = ["Rounds"]

# Rounds made within the shortest timeout. A wait whose beginning nobody has timed counts from the round that finds it: so it
# ends too late by a twentieth at the most.
ROUNDS_PER_TIMEOUT = 20

# Seconds between two rounds: not so often that they are all that the loop does, and not so seldom that nobody sees them.
SHORTEST, LONGEST = 0.005, 5.0

# Those looked at at a time, so that a round is spread over its time, and those visited in a turn of the loop: 0.1 ms.
LOOKS, VISITS = 128, 16

# Seconds between two times of visiting: event loops are not more exact, and uvloop's timers may be half of it early.
BREATH = 0.001


class Visited(Protocol):
    """What is visited."""

    @property
    def due(self) -> float:
        """From when on to visit it, in the loop's time."""

    def visit(self, now: float) -> float:
        """Do what is due at `now`, the loop's time; return when something will be next, or 0 if that is not known."""


class Rounds:
    """Visits all of `visited`, a collection that changes, again and again while there are any."""

    def __init__(self, visited: Iterable[Visited]) -> None:
        self._visited = visited
        self._every = LONGEST
        self._known: Timeouts | None = None
        self._timer: asyncio.Handle | None = None
        self._to_look_at: list[Visited] = []  # the rest of a round that has begun
        self._looks = LOOKS
        self._pause = LONGEST  # between two times of a round
        self._next = 0.0  # when the next such time is
        self._to_visit: list[Visited] = []
        self._soon: list[tuple[float, int, Visited]] = []  # a heap: when to visit whom, before the next round does
        self._numbers = itertools.count()  # to compare those of a time by

    def keep(self, timeouts: Timeouts) -> None:
        """Make rounds as often as `timeouts` need, from now on."""
        if timeouts is not self._known:
            self._known = timeouts
            wanted = [timeouts.idle, timeouts.message, timeouts.write, timeouts.max_age]
            shortest = min((each for each in wanted if each is not None), default=LONGEST * ROUNDS_PER_TIMEOUT)
            every = max(SHORTEST, shortest / ROUNDS_PER_TIMEOUT)
            if every < self._every:
                self._every = every
                self.stop()  # the next round is now too late
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._next = loop.time() + self._every
            self._timer = loop.call_at(self._next, self._go_on)

    def stop(self) -> None:
        """Make no more, until keep() is called again."""
        self._to_look_at.clear()
        self._to_visit.clear()
        self._soon.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on(self) -> None:
        """Look at some and visit some, as far as it is time for that, and come again when it is time for more."""
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
            for each in some:
                self._expect(each, each.visit(now), now)
        finally:
            if self._to_visit:
                self._timer = loop.call_soon(self._go_on)  # the loop polls in between
            else:
                until = min(self._next, self._soon[0][0]) if self._soon else self._next
                self._timer = loop.call_at(max(until, now + BREATH), self._go_on)

    def _look(self, now: float) -> bool:
        """Look at the next part of a round; return False if there is nobody to look at."""
        if not self._to_look_at:
            self._to_look_at = list(self._visited)
            if not self._to_look_at:
                return False
            times = max(1, min(len(self._to_look_at) // LOOKS, int(self._every / BREATH)))
            self._looks = -(-len(self._to_look_at) // times)
            self._pause = self._every / times
        for each in self._to_look_at[-self._looks :]:
            due = each.due
            if due <= now:
                self._to_visit.append(each)
            else:
                self._expect(each, due, now)
        del self._to_look_at[-self._looks :]
        self._next = now + self._pause
        return True

    def _expect(self, each: Visited, due: float, now: float) -> None:
        """Visit it when it is due, if no round comes before."""
        if now < due <= now + self._every:
            heappush(self._soon, (due, next(self._numbers), each))
