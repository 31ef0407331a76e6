"""What a server counts."""

from collections import Counter
from copy import copy
from dataclasses import dataclass, field
from typing import Self

__all__ = ["DatagramStats", "DrainReport", "ServiceStats", "Stats"]


@dataclass
class Stats:
    """A server's counters since it started, in connections.

    At any moment ``accepted == active + completed + failed + cancelled + rejected``.
    """

    accepted: int = 0
    active: int = 0
    """Connections that have not ended yet."""
    completed: int = 0
    """The handler returned and everything it wrote was sent."""
    failed: int = 0
    """The handler raised, or its connection broke."""
    cancelled: int = 0
    """The handler was cancelled, or what it wrote was thrown away."""
    rejected: int = 0
    """No handler was made: verify_request returned False, or the TLS handshake failed, or a limit was reached."""

    reasons: Counter[str] = field(default_factory=Counter)
    """Why connections ended: counts by reason, which add up to `accepted - active`."""

    skipped: int = 0
    """Messages of broadcasts that were not written to one client, as too much waited for it already."""

    unpublished: int = 0
    """Messages of publish() that did not reach the clients of another worker process, as too much waited for it already."""

    accept_errors: int = 0
    """Times that accepting failed, for lack of descriptors or memory or because of one incoming connection."""

    def copy(self) -> Self:
        """Return the counts as they stand now."""
        copied = copy(self)
        for name, value in vars(copied).items():
            if isinstance(value, Counter):
                setattr(copied, name, value.copy())
        return copied


@dataclass
class DatagramStats(Stats):
    """A datagram server's counters. What :class:`Stats` counts in connections is counted in handlers here: one for every
    datagram, every session, or every batch.

    Besides, at any moment ``received == handled + queued + sum(drops.values())``, in datagrams. What was sent to the server
    is `received`, `kernel_drops` and what the kernel still holds.
    """

    received: int = 0
    """Datagrams read from the server's sockets."""
    handled: int = 0
    """Datagrams that were given to a handler."""
    queued: int = 0
    """Datagrams that wait for a handler, or in a session's queue."""
    drops: Counter[str] = field(default_factory=Counter)
    """Datagrams that no handler was given, by reason: "queue full" (``Limits.max_queue``), "session queue full"
    (``Limits.max_session_queue``), "too many sessions" (``Limits.max_sessions``), "per host"
    (``Limits.max_per_host``), "accept rate" (``Limits.accept_rate``), "truncated" (longer than
    ``Limits.max_datagram``), "refused" (by verify_request), "no thread" (the
    system had none for a blocking handler), "session ended" (its handler left them unread), "stopped" (they
    still waited when the grace was over)."""

    kernel_drops: int = 0
    """Datagrams that found no room in a socket (``Limits.receive_buffer``). 0 where the system does not tell; Linux does.
    Where worker processes share a socket, every process counts all of its drops."""
    receive_errors: int = 0
    """Times that reading failed: an ICMP error that was waiting, lack of memory."""
    send_drops: int = 0
    """Replies for which the socket had no room, and which were not awaited, or not sent within ``Timeouts.send``."""
    send_errors: int = 0
    """Replies that the system would not send, as their peer is unreachable or nowhere."""


@dataclass
class ServiceStats(DatagramStats):
    """The counters of a server for streams and datagrams: for either kind, and their sums."""

    streams: Stats = field(default_factory=Stats)
    """In connections."""
    datagrams: DatagramStats = field(default_factory=DatagramStats)
    """In handlers, and in datagrams."""

    def add(self, stats: Stats) -> None:
        """Add the counters of a server of one kind."""
        of_kind = self.datagrams if isinstance(stats, DatagramStats) else self.streams
        for total in (self, of_kind):
            for name, value in vars(stats).items():
                if isinstance(value, Counter):
                    getattr(total, name).update(value)
                else:
                    setattr(total, name, getattr(total, name) + value)


@dataclass(frozen=True)
class DrainReport:
    """How the connections ended that were open when a shutdown began. Every connection counts once.

    `completed` ended by themselves within the grace; `cancelled` were cancelled when it was over, or were accepted and waited
    for room still; `aborted` were aborted with data unsent, or did not end when cancelled. `seconds` is how long the shutdown
    took. `unfinished` says how many of the cancelled and aborted ones were in the middle of a message.
    """

    completed: int
    cancelled: int
    aborted: int
    seconds: float
    unfinished: int = 0
