"""One coarse timer for all of a server's timeouts: a stream then needs none of its own, and a read not even the time.

In each round everybody is looked at, which costs some 0.5 us, and those are visited for whom something may be due: who has done
something since the last visit, or whose time is over. Of 10,000 idle ones nobody is visited.
"""

import asyncio
from collections.abc import Iterable
from typing import Protocol

from aioecho.config import Timeouts

__all__ = ["Rounds"]

# Rounds made within the shortest timeout. One notices what has begun since the last: so a timeout is found to have passed
# after two rounds more at the most, which is a tenth of it.
ROUNDS_PER_TIMEOUT = 20

# Seconds between two rounds: not so often that they are all that the loop does, and not so seldom that nobody sees them.
SHORTEST, LONGEST = 0.005, 5.0

# Those looked at at a time, so that a round is spread over its time, and those visited in a turn of the loop: 0.1 ms.
LOOKS, VISITS = 128, 16

# Seconds between two times of visiting: event loops are not more exact.
BREATH = 0.001


class Visited(Protocol):
    """What is visited."""

    @property
    def due(self) -> float:
        """From when on to visit it, in the loop's time."""

    def visit(self, now: float) -> None:
        """Do what is due at `now`, the loop's time."""


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
            self._timer = asyncio.get_running_loop().call_later(self._every, self._make_round)

    def stop(self) -> None:
        """Make no more, until keep() is called again."""
        self._to_look_at.clear()
        self._to_visit.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_round(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._to_visit:
            if not self._to_look_at:
                self._to_look_at = list(self._visited)
                if not self._to_look_at:
                    self._timer = None
                    return
                times = max(1, min(len(self._to_look_at) // LOOKS, int(self._every / BREATH)))
                self._looks = -(-len(self._to_look_at) // times)
                self._pause = self._every / times
            some = self._to_look_at[-self._looks :]
            del self._to_look_at[-self._looks :]
            self._to_visit = [each for each in some if each.due <= now]
            self._next = now + self._pause
        some = self._to_visit[-VISITS:]
        del self._to_visit[-VISITS:]
        if self._to_visit:
            self._timer = loop.call_soon(self._make_round)  # the loop polls in between
        else:
            self._timer = loop.call_at(self._next, self._make_round)
        for each in some:
            each.visit(now)
