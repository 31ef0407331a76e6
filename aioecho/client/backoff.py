"""How long a client waits before it connects again: Backoff."""

import random
from dataclasses import dataclass

__all__ = ["Backoff"]

MOST_DOUBLINGS = 64  # a float has no room for many more


@dataclass(frozen=True)
class Backoff:
    """Pauses between attempts to connect: random ones (full jitter), from a range that doubles with every failure, up to a cap.

    Full jitter keeps the clients of a server that restarts from coming back all at once. Raises ValueError, naming the value,
    if one makes no sense.
    """

    base: float = 0.1
    """Seconds: the pause after the first failure is at most so long. 0: no pause at all."""

    cap: float = 30.0
    """Seconds: no pause is longer. A connection that lasted for so long ends the series: the next pause is a first one."""

    attempts: int | None = None
    """Attempts in a row that may fail; the error of the last is raised. None: there is no bound."""

    def __post_init__(self) -> None:
        if not 0 <= self.base <= self.cap:
            raise ValueError(f"base and cap must be seconds, 0 <= base <= cap, not {self.base!r} and {self.cap!r}")
        if self.attempts is not None and self.attempts < 1:
            raise ValueError(f"attempts must be a number above 0, or None, not {self.attempts!r}")

    def pause(self, failures: int) -> float:
        """Return the seconds to wait after so many failures in a row, at least 1: another random number at every call."""
        return random.uniform(0, min(self.cap, self.base * 2 ** min(failures - 1, MOST_DOUBLINGS)))
