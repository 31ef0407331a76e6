"""The memory that the streams of one server hold together: Limits.max_memory."""

from typing import Literal, Protocol

__all__ = ["MemoryBudget"]


class Holder(Protocol):
    """A connection whose stream holds much."""

    def abort_for(self, reason: Literal["memory"]) -> None:
        """Abort it."""


class MemoryBudget:
    """Keeps the sum of what streams hold under a limit: over it, the connection that holds most is aborted.

    Of several that hold as much, up to an eighth, it is any one: to find it takes no longer for many.

    A stream says what it holds only while that is much, so that most never have to. `most` is Limits.max_memory in bytes, None
    for no limit; it may be set at any time. `held` is the sum in bytes.
    """

    __slots__ = ("_levels", "_sizes", "held", "most")

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.held = 0
        self._sizes: dict[Holder, int] = {}
        self._levels: dict[int, dict[Holder, None]] = {}  # by how much they hold, about

    def note(self, holder: Holder, size: int) -> None:
        """Count `size` bytes for `holder`, in place of what was counted for it before; 0 when it holds little again."""
        self._remove(holder)
        if size:
            self.held += size
            self._sizes[holder] = size
            self._levels.setdefault(_level(size), {})[holder] = None
        while self.most is not None and self.held > self.most and self._sizes:
            largest = next(iter(self._levels[max(self._levels)]))
            self._remove(largest)
            largest.abort_for("memory")

    def _remove(self, holder: Holder) -> None:
        size = self._sizes.pop(holder, 0)
        if size:
            self.held -= size
            level = _level(size)
            holders = self._levels[level]
            del holders[holder]
            if not holders:
                del self._levels[level]


def _level(size: int) -> int:
    """Return a number that is larger for a larger size, and the same for sizes that differ by less than an eighth."""
    shift = max(size.bit_length() - 4, 0)
    return (shift << 4) + (size >> shift)
