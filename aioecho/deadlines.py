"""One coarse timer for all of a server's timeouts: a stream then needs none of its own, and a read not even the time."""

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

# Those visited at a time, so that a round is spread over its time and holds nobody up.
AT_A_TIME = 64

# Seconds between two times of visiting: event loops are not more exact.
BREATH = 0.001


class Visited(Protocol):
    """What is visited in each round."""

    def visit(self, now: float) -> None:
        """Do what is due at `now`, the loop's time."""


class Rounds:
    """Visits all of `visited`, a collection that changes, again and again while there are any."""

    def __init__(self, visited: Iterable[Visited]) -> None:
        self._visited = visited
        self._every = LONGEST
        self._known: Timeouts | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._to_visit: list[Visited] = []  # the rest of a round that has begun
        self._at_a_time = AT_A_TIME
        self._pause = LONGEST  # between two times of a round

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
        self._to_visit.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _make_round(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._to_visit:
            self._to_visit = list(self._visited)
            times = max(1, min(len(self._to_visit) // AT_A_TIME, int(self._every / BREATH)))
            self._at_a_time = -(-len(self._to_visit) // times)
            self._pause = self._every / times
        now = loop.time()
        some = self._to_visit[-self._at_a_time :]
        del self._to_visit[-self._at_a_time :]
        for each in some:
            each.visit(now)
        is_over = not some
        self._timer = None if is_over else loop.call_later(self._pause, self._make_round)
