"""What a server measures besides its stats, from the first call of metrics() on: times, handshakes, and bytes on the wire.

Nothing here is called for a message. A connection is looked at when it ends, and when the metrics are asked for.
"""

import asyncio
import socket
from typing import Any

from aioecho.metrics import FAMILIES, Histogram
from aioecho.net.kernel import wire_bytes
from aioecho.streams.protocol import MeasuredCountingStreamProtocol, MeasuredStreamProtocol, StreamProtocol

__all__ = ["Measures", "Wire"]

# Seconds between two looks at how late the loop's timers are.
LAG_EVERY = 0.5


def _histogram_of(name: str) -> Histogram:
    return Histogram(FAMILIES[name].bounds)


class Measures:
    """The counters of one server. They only grow."""

    def __init__(self) -> None:
        self.durations = _histogram_of("aioecho_connection_duration_seconds")
        self.handshakes = _histogram_of("aioecho_tls_handshake_seconds")
        self.lags = _histogram_of("aioecho_loop_lag_seconds")
        self.failed_handshakes = 0
        self.received = self.sent = 0
        self.unsent = 0  # at the last look
        self._counts: dict[int, bool] = {}  # by the family of a socket
        self._timer: asyncio.TimerHandle | None = None

    # A connection.

    def counts(self, sock: socket.socket) -> bool:
        """Tell whether the kernel counts the bytes of a connection. It is asked once for each family of addresses."""
        family = sock.family
        if family not in self._counts:
            self._counts[family] = wire_bytes(sock) is not None
        return self._counts[family]

    def choose_protocol(self, sock: socket.socket, counts: bool) -> type[StreamProtocol]:
        """Return the class of the protocol for an accepted socket; `counts` asks for one that counts bytes in any case."""
        return MeasuredCountingStreamProtocol if counts or not self.counts(sock) else MeasuredStreamProtocol

    def attach(self, sock: socket.socket, protocol: StreamProtocol) -> None:
        """Have the bytes of a connection counted whose protocol is of that class."""
        protocol.wire = self.watch(sock, protocol)  # type: ignore[misc] # of which the class has the slot

    def watch(self, sock: socket.socket, source: Any) -> "Wire":
        """Return what counts the bytes of a connection. `source` counts where the kernel does not."""
        return Wire(self, sock, None if self.counts(sock) else source)

    def note_handshake(self, seconds: float | None) -> None:
        """Count a TLS handshake that took so long, or has failed if it is None."""
        if seconds is None:
            self.failed_handshakes += 1
        else:
            self.handshakes.note(seconds)

    # The loop.

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to measure the loop's lag. Does nothing if that has begun."""
        if self._timer is None:
            self._loop = loop
            self._look_later()

    def stop(self) -> None:
        """Measure the loop's lag no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_later(self) -> None:
        due = self._loop.time() + LAG_EVERY
        self._timer = self._loop.call_at(due, self._look, due)

    def _look(self, due: float) -> None:
        self.lags.note(max(0.0, self._loop.time() - due))
        self._look_later()


class Wire:
    """What was counted of one connection's bytes so far. Every look adds what has come since to the server's counters.

    `source` is what counts bytes itself where the kernel does not: it has `bytes_in` and `bytes_out`.
    """

    __slots__ = ("_measures", "_received", "_sent", "_sock", "_source")

    def __init__(self, measures: Measures, sock: socket.socket, source: Any) -> None:
        self._measures = measures
        self._sock = sock
        self._source = source
        self._received = self._sent = 0

    def look(self, sock: socket.socket | None = None) -> None:
        """Add what has come since the last look; nothing, once the socket is closed. `sock` is another one of the same."""
        source = self._source
        found = wire_bytes(sock or self._sock) if source is None else (source.bytes_in, source.bytes_out)
        if found is not None:
            received, sent = found
            measures = self._measures
            # Never less: the kernel counts a segment as sent anew before it counts it as one that was lost.
            if received > self._received:
                measures.received += received - self._received
                self._received = received
            if sent > self._sent:
                measures.sent += sent - self._sent
                self._sent = sent
