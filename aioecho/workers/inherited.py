"""What all workers inherit besides their sockets: the order, and the memory by which they take turns at accept()."""

import os

from aioecho.net.turns import AcceptCounts
from aioecho.workers.order import store_order

__all__ = ["Inherited"]


class Inherited:
    """The supervisor's side of it.

    Args:
        packed_order: what a worker is to do.
        take_turns: whether workers accept from the same sockets, and so are to take turns.
    """

    def __init__(self, packed_order: bytes, *, take_turns: bool) -> None:
        self._packed_order = packed_order
        self._take_turns = take_turns
        self._counts: AcceptCounts | None = None
        self.descriptors: list[int] = []
        """For a worker: of the order, and of the counts, if they take turns."""

    def open(self) -> None:
        """Make it.

        Raises:
            AioechoError: the system gives no memory for it, and no folder for temporary files.
        """
        self.descriptors.append(store_order(self._packed_order))
        if self._take_turns:
            self.descriptors.append(store_order(bytes(AcceptCounts.SIZE)))
            self._counts = AcceptCounts(self.descriptors[1])

    def claim_cell(self) -> int:
        """Return the number of a cell for a worker that is about to start; 0 if it takes no turns."""
        return 0 if self._counts is None else self._counts.claim()

    def release_cell(self, number: int) -> None:
        """Take back the cell of a worker that has ended."""
        if self._counts is not None:
            self._counts.release(number)

    def close(self) -> None:
        """Close it. Workers keep theirs."""
        if self._counts is not None:
            self._counts.close()
            self._counts = None
        while self.descriptors:
            os.close(self.descriptors.pop())
