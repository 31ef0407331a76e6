"""The memory that the streams of one server hold together: Limits.max_memory."""

from typing import Literal, Protocol

__all__ = ["MemoryBudget"]


class Holder(Protocol):
    """A connection whose stream holds much."""

    def abort_for(self, reason: Literal["memory"]) -> None:
        """Abort it."""


class MemoryBudget:
    """Keeps the sum of what streams hold under a limit: over it, the connection that holds most is aborted.

    A stream says what it holds only while that is much, so that most never have to. `most` is Limits.max_memory in bytes, None
    for no limit; it may be set at any time. `held` is the sum in bytes.
    """

    __slots__ = ("_sizes", "held", "most")

    def __init__(self, most: int | None) -> None:
        self.most = most
        self.held = 0
        self._sizes: dict[Holder, int] = {}

    def note(self, holder: Holder, size: int) -> None:
        """Count `size` bytes for `holder`, in place of what was counted for it before; 0 when it holds little again."""
        sizes = self._sizes
        self.held += size - sizes.pop(holder, 0)
        if size:
            sizes[holder] = size
        while self.most is not None and self.held > self.most and sizes:
            largest = max(sizes, key=sizes.__getitem__)
            self.held -= sizes.pop(largest)
            largest.abort_for("memory")
