"""What a connection does when its server stops: how it ends between messages, or in its TLS handshake, or is cut off."""

from aioecho.net.kernel import acknowledge_at_once, round_trip, silence_of
from aioecho.serving.beside import AccompaniedConnection
from aioecho.serving.handler_types import undo_partial
from aioecho.streams.ending import OneWayDrain, StreamDrain
from aioecho.streams.handshake import Handshake
from aioecho.streams.handshake_limit import Terms
from aioecho.streams.outgoing import reset_when_closed
from aioecho.streams.tls import FOR_EVER, TLSTransport

__all__ = ["FRESH", "FRESH_AMONG_OTHERS", "MOST_ROUND_TRIP", "DrainedConnection"]

# Seconds. A client that has been connected for no longer when the server stops is still given the time to speak.
FRESH = 0.1

# The same where other processes serve on (`keep_backlog`): no client waits for it, and a stalled one is not lost either.
FRESH_AMONG_OTHERS = 0.5

# Seconds: the most of a client's round trip that counts in this.
MOST_ROUND_TRIP = 1.0


class DrainedConnection(AccompaniedConnection):
    """The part of a :class:`~aioecho.serving.connection.Connection` that ends it when the server stops."""

    __slots__ = ("_has_sent_eof", "was_aborted")

    _has_sent_eof: bool
    was_aborted: bool

    def drain(self) -> None:
        """Let the handler meet the end of the stream once it has read what its peer has sent by now.

        One that has only just connected, or completed its TLS handshake, is about to send its request: it has until it is
        FRESH seconds old, and a round trip more. A handshake goes on while its peer is at it.
        """
        handshake = self._handshake()
        if handshake is not None:
            if self.request is not None:  # else it comes here again when it has one
                handshake.done.add_done_callback(lambda _: self.drain())
            self._drain_handshake()
        if self.request is None or handshake is not None:
            return
        self.say_goodbye()
        age = self._loop.time() - self._fresh_from()
        left = self._fresh() - age if age < FRESH_AMONG_OTHERS + MOST_ROUND_TRIP else 0
        if left > 0:
            self._loop.call_later(left, self._end_stream)
        else:
            self._end_stream()

    def _fresh_from(self) -> float:
        """Return when its peer could begin to speak."""
        transport = self._protocol.transport
        return transport.open_from if isinstance(transport, TLSTransport) else self.since

    def _fresh(self) -> float:
        fresh = FRESH_AMONG_OTHERS if self._server.keep_backlog else FRESH
        return fresh + min(round_trip(self._sock), MOST_ROUND_TRIP)

    def _handshake(self) -> Handshake | None:
        """Return the TLS handshake that is in progress."""
        protocol = self._protocol.get_socket_protocol()
        return protocol if isinstance(protocol, Handshake) and not protocol.is_over else None

    def _drain_handshake(self, count: int = -1) -> None:
        """End the TLS handshake if its peer is silent: has sent nothing when it is FRESH seconds old, or stopped for `linger`.

        `count` is how many bytes had come at the last look, where the system does not tell for how long the peer is silent.
        """
        handshake = self._handshake()
        linger = self._timeouts().linger
        if handshake is None or (handshake.count and linger is None):
            return
        fresh = self._fresh()
        if not handshake.count:
            left = handshake.began + fresh - self._loop.time()
            if left <= 0 and handshake.has_more():
                left = fresh
        else:
            patience = max(linger or 0, fresh)
            silence = silence_of(self._sock)
            if silence is None:
                silence = patience if handshake.count == count else 0
            # What a client said while it waited to be accepted may be old. Since it was answered, it had no time to speak.
            silence = min(silence, self._loop.time() - handshake.asked_at)
            left = patience if handshake.is_waiting or handshake.has_more() else patience - silence
        if left > 0:
            self._loop.call_later(left, self._drain_handshake, handshake.count)
        else:
            handshake.fail(ConnectionAbortedError("the server stops"))

    def _end_stream(self) -> None:
        """Let reads that wait between messages get the end of the stream; tell a peer that only sends to stop first."""
        protocol, linger = self._protocol, self._timeouts().linger
        if self.request is None or protocol.is_lost:
            return
        # In its setup() it is not known yet.
        handler = undo_partial(self._RequestHandlerClass) if self.handler is None else self.handler
        one_way = bool(getattr(handler, "one_way", False))
        if one_way and not self._has_sent_eof:
            self._has_sent_eof = True
            if isinstance(protocol.transport, TLSTransport):
                protocol.transport.end_writing()
            else:
                self.request[1].write_eof()
            if linger is not None:
                # close_notify is about to be sent, after which its peer would be left waiting; as some would after a greeting.
                self._loop.call_later(linger / 2, acknowledge_at_once, self._sock)
                self._loop.call_later(linger, self._end_stream)
            return
        protocol.reader.begin_drain((OneWayDrain if one_way else StreamDrain)(self._sock, linger))

    def is_in_message(self) -> bool:
        """Tell whether a message, or a TLS handshake, is in progress: cancelling the handler cuts it."""
        handshake = self._handshake()
        if handshake is not None:
            return handshake.count > 0
        if self.request is None:
            return False
        reader = self._protocol.reader
        # A handler that only reads answers nothing.
        return reader.is_in_record() if getattr(self.handler, "one_way", False) else reader.is_in_message()

    def cancel_handler(self) -> None:
        """Cancel what runs, the handler mostly."""
        self.task.cancel()

    def cancel(self) -> None:
        """Cancel the handler; what is still unsent when it has ended is thrown away."""
        self._is_cancelled = True
        self.cancel_handler()

    def abort(self) -> None:
        """Close at once, throw away what is unsent, and cancel the handler; one that goes on is ended a second later."""
        self._abort_stream()
        super().abort()

    def abandon_handler(self) -> None:
        """Close at once, throw away what is unsent, and end the handler, which has swallowed its cancellation."""
        self._abort_stream()
        super().abandon_handler()

    def _abort_stream(self) -> None:
        if self.request is not None and not self._protocol.is_lost:
            if self._is_unsent(self._protocol):
                reset_when_closed(self._protocol.transport)
            self._protocol.transport.abort()

    def handshake_terms(self) -> Terms:
        """Return what holds for a TLS handshake that begins now: one before the handler is timed from the accepting on.

        One that a handler begins after the server has begun to stop makes its client fresh, as any other does.
        """
        timeouts = self._timeouts()
        seconds = timeouts.handshake
        if seconds is None:
            seconds = FOR_EVER
        elif self.request is None:
            seconds = max(self.since + seconds - self._loop.time(), 0.001)
        if self.request is not None and self._server.is_draining:
            self._protocol.reader.suspend_drain()
            self._loop.call_soon(self.drain)  # by then it has begun
        return Terms(seconds, timeouts.linger, self._server.handshake_limit)
