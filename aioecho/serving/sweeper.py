"""One timer for all timeouts of a server: a stream needs no timer of its own, and a read does not look at the clock.

A connection is visited when one of its timeouts is due, and in the next sweep after it has read or written. Between these it
costs nothing: of 40,000 idle connections none is looked at. What is due is kept in buckets: near ones of a hundredth of a
second, and far ones of seconds, whose connections are visited when their seconds begin and then are near.
"""

import asyncio
from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf
from typing import Protocol

from aioecho.config import Timeouts

__all__ = ["SHORTEST", "SWEEPS_PER_TIMEOUT", "TimeoutSweeper"]

# Sweeps within the shortest timeout. A wait whose beginning was not timed counts from the sweep that finds it: so it ends
# too late by a twentieth at the most.
SWEEPS_PER_TIMEOUT = 20

# Seconds between two sweeps: not so often that the loop does little else, and not so seldom that an end is found late.
SHORTEST, LONGEST = 0.005, 5.0

# Seconds of a near bucket, and near buckets in a far one.
TICK, SPAN = 0.01, 500

# Visits in one turn of the loop: 0.1 ms. And connections that are marked in one turn when the timeouts change: likewise.
VISITS, MARKS = 16, 256

# Seconds between two turns that visit: event loops are not more exact, and uvloop's timers may be half of it early.
BREATH = 0.001

# Seconds by which a timer is late when the process was stopped, or its loop held up: what has run out meanwhile is not the
# peers' doing. So they get as many more, up to LENIENT, and at the most once in so many seconds: a loop that is held up all
# the time has timeouts too.
STANDSTILL, LENIENT, LENIENT_EVERY = 1.0, 5.0, 60.0


class Visited(Protocol):
    """What is visited. It is kept in dicts without values, which are half as large as sets."""

    place: "dict[Visited, None] | None"
    """Where the sweeper keeps it: for nothing else to use."""

    def visit(self, now: float) -> float:
        """Apply the timeouts at `now`, the loop's time; return when to visit it next: `now` or less is the next sweep."""


class TimeoutSweeper:
    """Visits connections when their timeouts are due. It is not for threads."""

    def __init__(self) -> None:
        self._interval = LONGEST
        self._known: Timeouts | None = None
        self._timer: asyncio.Handle | None = None
        self._wakes_at = inf
        self._changed: dict[Visited, None] = {}  # to visit in the next sweep
        self._next_sweep = inf
        self._resting: dict[Visited, None] = {}  # not to visit until they are marked
        self._buckets: dict[int, dict[Visited, None]] = {}  # to visit at the key's time, in ticks
        self._ticks: list[int] = []  # a heap of the keys
        self._due: list[dict[Visited, None]] = []  # to visit now
        self._marking: asyncio.Handle | None = None
        self._lenient_until = -inf

    def watch(self, visited: Visited, timeouts: Timeouts) -> None:
        """Visit it from now on, as often as `timeouts` need."""
        if timeouts is not self._known:
            self.keep(timeouts)
        self.mark_due(visited)

    def keep(self, timeouts: Timeouts) -> None:
        """Sweep as often as `timeouts` need, from now on."""
        self._known = timeouts
        of_streams = timeouts.idle, timeouts.message, timeouts.write, timeouts.max_age, timeouts.handler
        wanted = [*of_streams, timeouts.datagram_handler]
        shortest = min((seconds for seconds in wanted if seconds is not None), default=inf)
        self._interval = min(self._interval, max(SHORTEST, shortest / SWEEPS_PER_TIMEOUT))
        if self._next_sweep != inf:
            self._next_sweep = min(self._next_sweep, asyncio.get_running_loop().time() + self._interval)
            self._wake(self._next_sweep)

    def mark_due(self, visited: Visited) -> None:
        """Visit it in the next sweep."""
        changed = self._changed
        if visited.place is not changed:
            if visited.place is not None:
                visited.place.pop(visited, None)
            changed[visited] = None
            visited.place = changed
            if self._next_sweep == inf:
                self._next_sweep = asyncio.get_running_loop().time() + self._interval
                self._wake(self._next_sweep)

    def mark_all(self, watched: Iterable[Visited], timeouts: Timeouts) -> None:
        """Visit all of `watched` soon, as other timeouts hold for them. They are marked a few at a time."""
        self.keep(timeouts)
        if self._marking is not None:
            self._marking.cancel()
        self._mark(list(watched))

    def _mark(self, rest: list[Visited]) -> None:
        for visited in rest[-MARKS:]:
            if visited.place is not None:
                self.mark_due(visited)
        del rest[-MARKS:]
        self._marking = asyncio.get_running_loop().call_soon(self._mark, rest) if rest else None

    def remove(self, visited: Visited) -> None:
        """Visit it no more."""
        if visited.place is not None:
            visited.place.pop(visited, None)
            visited.place = None

    def stop(self) -> None:
        """Visit nothing more."""
        for handle in (self._timer, self._marking):
            if handle is not None:
                handle.cancel()
        self._timer = self._marking = None
        self._wakes_at = self._next_sweep = inf
        for places in ([self._changed, self._resting], self._buckets.values(), self._due):
            for place in places:
                while place:
                    place.popitem()[0].place = None
        self._buckets.clear()
        self._ticks.clear()
        self._due.clear()

    def _wake(self, when: float) -> None:
        if when < self._wakes_at:
            if self._timer is not None:
                self._timer.cancel()
            self._wakes_at = when
            self._timer = asyncio.get_running_loop().call_at(when, self._go_on)

    def _go_on(self) -> None:
        """Visit some of what is due, and set the timer for more."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        late, self._wakes_at, self._timer = now - self._wakes_at, inf, None
        if late > STANDSTILL and now > self._lenient_until + LENIENT_EVERY:
            self._lenient_until = now + min(late, LENIENT)
        if now < self._lenient_until:
            self._wake(self._lenient_until)
            return
        if not self._due:
            self._collect(now)
        due = self._due
        try:
            for _ in range(VISITS):
                while due and not due[-1]:
                    due.pop()
                if not due:
                    break
                visited, _ = due[-1].popitem()
                visited.place = None
                when = visited.visit(now)
                if visited.place is None:  # else it was marked
                    self._put(visited, when, now)
        finally:
            while due and not due[-1]:
                due.pop()
            if due:
                self._wakes_at = now
                self._timer = loop.call_soon(self._go_on)  # the loop polls in between
            else:
                while self._ticks and not self._buckets[self._ticks[0]]:
                    del self._buckets[heappop(self._ticks)]
                when = min(self._next_sweep, self._ticks[0] * TICK if self._ticks else inf)
                if when != inf:
                    self._wake(max(when, now + BREATH))

    def _collect(self, now: float) -> None:
        """Find what is due."""
        if now > self._next_sweep - BREATH:
            if self._changed:
                self._due.append(self._changed)
                self._changed = {}
                # Also if none is marked until then: a timer for each time that one is would cost more.
                self._next_sweep = now + self._interval
            else:
                self._next_sweep = inf
        while self._ticks and self._ticks[0] * TICK <= now:
            self._due.append(self._buckets.pop(heappop(self._ticks)))

    def _put(self, visited: Visited, when: float, now: float) -> None:
        """Keep it where it is found at its time."""
        if when <= now:
            self.mark_due(visited)
        elif when == inf:
            self._resting[visited] = None
            visited.place = self._resting
        else:
            # A far one is visited in time to become a near one.
            tick = int(when / TICK) + 1 if when < now + 2 * SPAN * TICK else int(when / (SPAN * TICK)) * SPAN
            bucket = self._buckets.get(tick)
            if bucket is None:
                bucket = self._buckets[tick] = {}
                heappush(self._ticks, tick)
            bucket[visited] = None
            visited.place = bucket
