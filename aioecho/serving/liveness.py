"""What a connection does for a handler that waits elsewhere, when its peer has gone or has ended its stream."""

from typing import Any

from aioecho.net.kernel import BYTES_ACKED, has_hung_up, tcp_info
from aioecho.serving.timeouts import HANDLE, TimedConnection

__all__ = ["ToldConnection"]


class ToldConnection(TimedConnection):
    """The part of a :class:`~aioecho.serving.connection.Connection` that ends a handler which no read tells of the end."""

    __slots__ = ()

    def note_stream_end(self, is_told: bool) -> None:
        """See what the end of the stream, or of the connection, means for the handler.

        `is_told`: the handler learns of it by what it awaits, or some task of its own does.
        """
        protocol = self._protocol
        if self._stage != HANDLE or protocol.aborted_for is not None:
            return
        if protocol.lost_with is not None:
            self._loop.call_soon(self._note_lost, is_told)  # the handler may be what runs
        elif not (protocol.is_lost or protocol.transport.is_closing()):
            self._watch_half_closed(None)

    def _note_lost(self, is_told: bool) -> None:
        """Cancel the handler of a connection that broke, or give it time for the message in progress."""
        if self._stage != HANDLE or not getattr(self.handler, "cancel_on_lost", True):
            return
        if not (is_told or self._is_in_exchange()):
            self._cancel_for("connection lost")
        else:
            self._call_later(self._timeouts().lost, self._cancel_for, "connection lost")

    def _watch_half_closed(self, acked: int | None) -> None:
        """Cancel the handler of a peer that ended its stream, if for Timeouts.half_closed nothing is in progress or sent.

        `acked` is how many bytes the peer had acknowledged at the last look; None before the first one.
        """
        protocol, seconds = self._protocol, self._timeouts().half_closed
        if self._stage != HANDLE or protocol.is_lost or seconds is None:
            return
        now_acked = tcp_info(self._sock, BYTES_ACKED)
        if now_acked is None:  # no TCP: the peer of a Unix socket may have closed it altogether
            now_acked, is_quiet = 0, has_hung_up(self._sock)
        else:
            is_quiet = now_acked == acked
        if acked is None or not is_quiet or self._is_in_exchange() or protocol.unsent():
            self._call_later(seconds, self._watch_half_closed, now_acked)
        else:
            self._cancel_for("half_closed")

    def _is_in_exchange(self) -> bool:
        return self._protocol.is_in_exchange(one_way=bool(getattr(self.handler, "one_way", False)))

    def _call_later(self, seconds: float | None, callback: Any, argument: Any) -> None:
        # In the slot of the timer that comes after the handler's end, which cancels this one.
        if self._linger is not None:
            self._linger.cancel()
        self._linger = None if seconds is None else self._loop.call_later(seconds, callback, argument)
