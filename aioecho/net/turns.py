"""Taking turns at accept() where several processes accept from the same sockets, so that none gets most of the connections.

All of them wake when a client comes, and the quickest gets it: often the same one again and again. So every process writes down
how many connections it holds, in shared memory, and one that holds more than others steps back for a moment. No client waits
for a process that does not accept, or not enough: what has stepped back looks twice, and then accepts one that waits still.

Nothing is locked. A process writes to its own cell alone, and one that dies leaves a number there that does not change, which
the others disregard.
"""

import mmap
from collections.abc import Callable

__all__ = ["PAUSE", "AcceptCounts", "AcceptTurns"]

PAUSE = 0.005
"""Seconds that a process steps back. A client waits twice as long at the most, where all that hold fewer are busy."""

# A process accepts while it holds no more connections than another one has, and these: for few, and as a share for many.
# With none the work of short connections would go to and fro between processes without need.
AHEAD, AHEAD_SHARE = 8, 1 / 16

# Accepts in one turn of the loop: others look at the count only between turns, and busy processes may be back soon.
AT_ONCE = 8

# The cell of a process that does not accept.
ABSENT = 2**62

CELLS = mmap.PAGESIZE // 8


class AcceptCounts:
    """The shared memory: how many connections each process holds. Cell 0 has the number of cells that are in use.

    Args:
        descriptor: of a file of a page, which all of them have. It is not needed any more when this returns.

    Raises:
        OSError: there is no memory for it (system).
    """

    SIZE = mmap.PAGESIZE

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, self.SIZE)
        self.cells = memoryview(self._memory).cast("q")
        self._claimed: set[int] = set()

    def claim(self) -> int:
        """Return the number of a cell for another process; 0 if there is none left. One process alone gives them out."""
        number = next((number for number in range(1, CELLS) if number not in self._claimed), 0)
        if number:
            self._claimed.add(number)
            self.cells[number] = ABSENT
            self.cells[0] = max(self._claimed) + 1
        return number

    def release(self, number: int) -> None:
        """Take a cell back from a process that has ended."""
        if number in self._claimed:
            self._claimed.discard(number)
            self.cells[number] = ABSENT
            self.cells[0] = max(self._claimed, default=0) + 1

    def close(self) -> None:
        """Unmap the memory."""
        self.cells.release()
        self._memory.close()


class AcceptTurns:
    """Tells one process when to step back.

    Args:
        counts: of all processes.
        own: the number of this one's cell.
        count: returns how many connections it holds.
    """

    def __init__(self, counts: AcceptCounts, own: int, count: Callable[[], int]) -> None:
        self._cells = counts.cells
        self._own = own
        self._count = count
        # What the cells of the processes had that did not accept although it was their turn. While they have it they are busy.
        self._disregarded: dict[int, int] = {}

    def allowance(self) -> int:
        """Return how many connections this process may accept now; 0 or less: it is for others to accept."""
        cells, own = self._cells, self._own
        mine = cells[own] = self._count()
        others = cells[1 : cells[0]].tolist()
        if self._disregarded:
            self._look_again(others)
        others[own - 1] = ABSENT
        least = min(others)
        if least == ABSENT:
            return AT_ONCE if self._disregarded else ABSENT
        return min(AT_ONCE, least + AHEAD + int(least * AHEAD_SHARE) - mine)

    def note(self) -> None:
        """Write down how many connections it holds, after it has accepted some."""
        self._cells[self._own] = self._count()

    def leave(self) -> None:
        """Write down that it does not accept."""
        self._cells[self._own] = ABSENT

    def find_behind(self) -> dict[int, int]:
        """Return the cells of the processes that hold fewer connections, but for disregarded ones, and what is in them."""
        cells = self._cells
        mine = cells[self._own]
        return {
            number: count
            for number in range(1, cells[0])
            if (count := cells[number]) < mine and self._disregarded.get(number) != count
        }

    def has_moved(self, behind: dict[int, int]) -> bool:
        """Tell whether one of these has accepted since."""
        return any(self._cells[number] != count for number, count in behind.items())

    def disregard(self, behind: dict[int, int]) -> None:
        """Accept in place of these until they accept again."""
        self._disregarded.update(behind)

    def _look_again(self, others: list[int]) -> None:
        for number, count in list(self._disregarded.items()):
            if number <= len(others) and others[number - 1] == count:
                others[number - 1] = ABSENT
            else:
                del self._disregarded[number]
