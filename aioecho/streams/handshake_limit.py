"""How many TLS handshakes of a server are in progress at once, and what else holds for them."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

__all__ = ["HandshakeLimit", "Terms", "TermsOfConnection"]

# Seconds for which a handshake may be in progress while others wait. Then the oldest one is given up for them. By then its
# peer has had time for several round trips.
PATIENCE = 1.0


class Handshake(Protocol):
    """A handshake, as far as it is counted."""

    loop: asyncio.AbstractEventLoop

    def begin(self) -> None:
        """Begin, as there is room."""

    def has_more(self) -> bool:
        """Tell whether more has come of the peer, and only waits for the loop to read it."""

    def fail(self, error: Exception) -> None:
        """End it with `error`."""


class HandshakeLimit:
    """Bounds how many handshakes of a server are in progress at once: `most()`, or any number if that is None.

    The ones beyond it wait, in order. The oldest one in progress yields: while others wait it has PATIENCE seconds.
    """

    def __init__(self, most: Callable[[], int | None]) -> None:
        self._most = most
        self._running: dict[Handshake, float] = {}  # since when
        self._waiting: dict[Handshake, None] = {}
        self._next: asyncio.Handle | None = None  # for the next one that waits to begin
        self._timer: asyncio.TimerHandle | None = None  # for the oldest one to yield

    def enter(self, handshake: Handshake) -> bool:
        """Count a handshake, and return whether it may begin now. If not, its begin() is called later."""
        if not self._waiting and self._has_room():
            self._running[handshake] = handshake.loop.time()
            return True
        self._waiting[handshake] = None
        self._watch()
        return False

    def leave(self, handshake: Handshake) -> None:
        """Count a handshake no more. Does nothing if it is not counted."""
        self._running.pop(handshake, None)
        self._waiting.pop(handshake, None)
        self.admit()

    def admit(self) -> None:
        """Let one that waits begin, if there is room, and the others in later turns of the loop: each takes a millisecond."""
        if self._next is None and self._waiting and self._has_room():
            self._next = next(iter(self._waiting)).loop.call_soon(self._begin_next)

    def _has_room(self) -> bool:
        most = self._most()
        return most is None or len(self._running) < most

    def _begin_next(self) -> None:
        self._next = None
        if self._waiting and self._has_room():
            handshake = next(iter(self._waiting))
            del self._waiting[handshake]
            self._running[handshake] = handshake.loop.time()
            self.admit()
            handshake.begin()

    def _watch(self) -> None:
        if self._timer is None and self._running:
            oldest, since = next(iter(self._running.items()))
            self._timer = oldest.loop.call_at(since + PATIENCE, self._yield)

    def _yield(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        for handshake, since in self._running.items():
            if handshake.loop.time() < since + PATIENCE:
                break
            if not handshake.has_more():  # else the server is what is slow
                handshake.fail(ConnectionAbortedError("others waited for it to end: see Limits.max_handshakes"))
                break
        if self._waiting and self._timer is None and self._running:
            oldest = next(iter(self._running))
            # At least a turn later, in which the next one begins.
            self._timer = oldest.loop.call_at(
                max(self._running[oldest] + PATIENCE, oldest.loop.time() + 0.001), self._yield
            )


class Terms(NamedTuple):
    """What holds for the handshakes of a connection: timeout and linger, in seconds, and where they count."""

    timeout: float
    linger: float | None
    limit: HandshakeLimit


@runtime_checkable
class TermsOfConnection(Protocol):
    """What has terms for handshakes: a server's connection."""

    def handshake_terms(self) -> Terms:
        """Return the terms that hold for one that begins now."""
