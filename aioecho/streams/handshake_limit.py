"""How many TLS handshakes of a server are in progress at once, and what else holds for them."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

__all__ = ["HandshakeLimit", "Terms", "TermsOfConnection"]

# Seconds for which a handshake may be in progress while others wait, to which four round trips are added, and the most that
# both make. Then it is given up for the others. With TLS 1.2 a client has to be waited for twice.
PATIENCE, ROUND_TRIPS, MOST_PATIENCE = 0.25, 4, 1.0

# Seconds between two looks at the ones in progress, while others wait.
BREATH = 0.05


class LimitedHandshake(Protocol):
    """A handshake, as far as it is counted."""

    loop: asyncio.AbstractEventLoop

    def begin(self) -> None:
        """Begin, as there is room."""

    def round_trip(self) -> float:
        """Return its peer's round trip, in seconds."""

    def has_more(self) -> bool:
        """Tell whether more has come of the peer, and only waits for the loop to read it."""

    def fail(self, error: Exception) -> None:
        """End it with `error`."""


class HandshakeLimit:
    """Bounds how many handshakes of a server are in progress at once: `most()`, or any number if that is None.

    The ones beyond it wait, in order. While any waits, the oldest in progress yield: see PATIENCE.
    """

    def __init__(self, most: Callable[[], int | None]) -> None:
        self._most = most
        self._running: dict[LimitedHandshake, float] = {}  # since when
        self._waiting: dict[LimitedHandshake, None] = {}
        self._next: asyncio.Handle | None = None  # for the next one that waits to begin
        self._timer: asyncio.TimerHandle | None = None

    def acquire(self, handshake: LimitedHandshake) -> bool:
        """Count a handshake, and return whether it may begin now. If not, its begin() is called later."""
        if not self._waiting and self._has_room():
            self._running[handshake] = handshake.loop.time()
            return True
        self._waiting[handshake] = None
        self._watch()
        return False

    def release(self, handshake: LimitedHandshake) -> None:
        """Count a handshake no more. Does nothing if it is not counted."""
        self._running.pop(handshake, None)
        self._waiting.pop(handshake, None)
        self.admit()

    def admit(self) -> None:
        """Let one that waits begin, if there is room, and the others in later turns of the loop: one takes a millisecond."""
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
        if self._timer is None and self._waiting and self._running:
            loop = next(iter(self._waiting)).loop
            self._timer = loop.call_later(BREATH, self._end_oldest, loop)

    def _end_oldest(self, loop: asyncio.AbstractEventLoop) -> None:
        """End as many as there are that wait, if they are old enough."""
        self._timer = None
        now = loop.time()
        late = [
            handshake
            for handshake, since in self._running.items()
            if now >= since + PATIENCE
            and now >= since + min(PATIENCE + ROUND_TRIPS * handshake.round_trip(), MOST_PATIENCE)
            and not handshake.has_more()  # else the server is what is slow
        ]
        for handshake in late[: len(self._waiting)]:
            handshake.fail(ConnectionAbortedError("others waited for it to end: see Limits.max_handshakes"))
        self._watch()


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
