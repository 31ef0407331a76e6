"""The latencies of a run: how many messages took how many microseconds, and the percentiles of that.

The counts are kept as they are, so a percentile is exact to the step in which the engine counts: 1 us, from 131 ms on 128 us.
That is within the three digits of an HdrHistogram everywhere, and needs no package for it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["Interval", "Latencies"]


class Latencies:
    """Counts of latencies. `counts` maps microseconds (int, 0 counts as 1) to messages, and is not changed after.

    `min_us`, `max_us`, `mean_us`: None where nothing was counted.
    """

    def __init__(self, counts: Mapping[int, int]) -> None:
        merged: dict[int, int] = {}
        for value, count in counts.items():
            merged[max(1, value)] = merged.get(max(1, value), 0) + count
        self.counts = dict(sorted(merged.items()))
        self._values = list(self.counts)
        self._at_most = list(accumulate(self.counts.values()))  # messages that took at most so long
        self.total = self._at_most[-1] if self._at_most else 0
        self.min_us = float(self._values[0]) if self.total else None
        self.max_us = float(self._values[-1]) if self.total else None
        self.mean_us = sum(v * n for v, n in self.counts.items()) / self.total if self.total else None

    def percentile(self, percent: float) -> float | None:
        """Return the smallest latency (us) that `percent` of the messages did not exceed; None if none was counted."""
        if not self.total:
            return None
        return float(self._values[bisect_left(self._at_most, _rank(percent, self.total))])

    def corrected_percentile(self, percent: float, interval_us: int) -> float | None:
        """Return the percentile (us) after the correction for coordinated omission; None if nothing was counted.

        A closed loop sends nothing while it waits for a reply. For a message that took longer than `interval_us`, at least
        1, the correction counts the messages that would have fallen due meanwhile: they would have taken `interval_us`
        less, twice that less, and so on. See https://hdrhistogram.github.io/HdrHistogram/.
        """
        if not self.total:
            return None
        # How many messages one latency stands for: itself, and one for each further interval in it. They are not listed:
        # a long pause and a short interval would make millions.
        numbers = [(value, max(1, value // interval_us), count) for value, count in self.counts.items()]
        rank = _rank(percent, sum(number * count for _, number, count in numbers))
        low, high = 1, self._values[-1]
        while low < high:  # for the smallest value that enough of them do not exceed
            middle = (low + high) // 2
            # The first -((middle - value) // interval_us) of a latency's messages exceed `middle`.
            found = sum(max(0, n - max(0, -((middle - value) // interval_us))) * count for value, n, count in numbers)
            low, high = (low, middle) if found >= rank else (middle + 1, high)
        return float(low)


@dataclass(frozen=True)
class Interval:
    """A part of what was measured, about a second: the latencies of the replies that came in it."""

    start_s: float
    """Seconds from the start of what is measured."""

    seconds: float
    latencies: Latencies


def _rank(percent: float, total: int) -> int:
    """Return which message, counted from 1 in order of latency, a percentile is, rounded as HdrHistogram does."""
    return max(1, int(percent / 100 * total + 0.5))
