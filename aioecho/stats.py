"""What a server counts."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["DrainReport", "Stats"]


@dataclass
class Stats:
    """A server's counters since it started, in connections.

    At any moment ``accepted == active + completed + failed + cancelled + rejected``.
    """

    accepted: int = 0
    active: int = 0
    """Those that have not ended yet."""
    completed: int = 0
    """The handler returned and everything it wrote was sent."""
    failed: int = 0
    """The handler raised, or its connection broke."""
    cancelled: int = 0
    """Cut off: the handler was cancelled, or what it wrote was thrown away."""
    rejected: int = 0
    """No handler was made: refused by verify_request, a TLS handshake that failed."""

    reasons: Counter[str] = field(default_factory=Counter)
    """Why connections ended: counts by reason, which add up to those that ended."""

    accept_errors: int = 0
    """Times that accepting failed, for want of descriptors or memory or because of one incoming connection."""


@dataclass(frozen=True)
class DrainReport:
    """How the connections ended that were open when a shutdown began. Each counts once.

    `completed` ended by themselves within the grace; `cancelled` were cancelled when it was over; `aborted` were cut off
    with data unsent, or would not end when cancelled. `seconds` is how long it took.
    """

    completed: int
    cancelled: int
    aborted: int
    seconds: float
