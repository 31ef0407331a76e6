"""When the stream of a blocking handler ends because the server stops: never in the middle of a message.

The rules are those of aioecho.streams.ending. But a thread that waits in recv() can be woken in one way alone: the read side of
its socket is shut, for good. So the event loop decides, and only then shuts it. It looks when the drain begins, when the
handler begins to wait, when it has answered, and when its peer has been silent for long enough. A handler may have read what it
has not noted yet, as it waits for the interpreter's lock: the kernel's count tells, or the time since something came. A thread
that is about to wait between two lines decides for itself.
"""

import asyncio
import socket
import ssl
from math import inf
from time import monotonic
from typing import Protocol

from aioecho.blocking.sockets import WatchedSocket
from aioecho.net.kernel import BYTES_RECEIVED, HELD, LAST_DATA_RECV, LAST_DATA_SENT, silence_of, tcp_info, unread

__all__ = ["ThreadDrain"]

# Seconds since something came, after which a handler that waits between two lines has seen all of it.
SETTLED = 0.02

# Seconds after which it looks again at a socket that tells nothing by itself.
LOOK_AGAIN = 0.5

# More bytes than a thread reads at a time, which it may have read and not noted yet.
UNNOTED = 2**16

# Seconds for which a handler may work at what has come until a peer that only sends is stopped all the same.
PATIENCE = 3.0


class _Connection(Protocol):
    """What it asks of the connection."""

    def get_stream(self) -> socket.socket:
        """Return the socket that the handler has."""

    def get_socket(self) -> socket.socket:
        """Return a socket with the connection's descriptor."""

    def shut_reading(self) -> None:
        """End the handler's stream."""

    def say_end(self) -> None:
        """Send FIN, or have the handler's thread send TLS's end and FIN as soon as it can."""

    def has_said_end(self) -> bool:
        """Tell whether FIN was sent."""

    def is_about_to_say_end(self) -> bool:
        """Tell whether the handler's thread does so when it reads next, and leads here again."""

    def is_handshaking(self) -> bool:
        """Tell whether there is no stream yet, as TLS's handshake goes on."""


class ThreadDrain:
    """Decides for one connection, from the beginning of a drain on, when its handler meets the end of the stream.

    Args:
        connection: the connection.
        fresh_for: seconds from now for which it is left alone: its client is about to speak. Infinity: until :meth:`renew`.
        linger: seconds of silence after which a peer is taken to have nothing more to say; None for ever.
        one_way: whether the peer only sends, and waits for no reply.
    """

    def __init__(
        self,
        connection: _Connection,
        loop: asyncio.AbstractEventLoop,
        *,
        fresh_for: float,
        linger: float | None,
        one_way: bool,
    ) -> None:
        self._connection = connection
        self._loop = loop
        self._not_before = loop.time() + fresh_for
        self._fresh_for = fresh_for
        self._linger = inf if linger is None else linger
        self._one_way = one_way
        self._has_said_end = False
        self._ends_by = inf  # when a peer that only sends is stopped, though its handler is at work, by monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._counted: int | None = None  # the bytes that had come when it last looked
        self._quiet_since = 0.0  # when it first counted as many
        self.is_over = False

    def stop(self) -> None:
        """Decide no more."""
        self.is_over = True
        self._cancel_timer()

    def renew(self, fresh_for: float) -> None:
        """Leave the connection alone for so many seconds from now on: it has a thread now, or TLS's handshake is over."""
        self._not_before = self._loop.time() + fresh_for
        self._fresh_for = fresh_for
        self.decide()

    def linger_anew(self) -> None:
        """Count the time that a peer that only sends is read on from now on: its TLS was ended only now."""
        self._not_before = self._loop.time() + self._linger
        stream = self._connection.get_stream()
        if isinstance(stream, WatchedSocket):
            stream.ends_at = None
        self.decide()

    def decide(self) -> None:
        """End the stream if that may be; or look again when it may."""
        self._cancel_timer()
        if self.is_over:
            return
        left = self._not_before - self._loop.time()
        if left <= 0:
            left = self._find_time_left()
        if left <= 0:
            self.stop()
            stream = self._connection.get_stream()
            if isinstance(stream, WatchedSocket) and not self._one_way:
                stream.has_ended = True
            self._connection.shut_reading()
        elif left < inf:
            self._timer = self._loop.call_later(left, self.decide)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _find_time_left(self) -> float:
        """Return the seconds until the stream may end; infinity if something has to happen first that leads here again."""
        stream, sock = self._connection.get_stream(), self._connection.get_socket()
        if self._connection.is_handshaking():
            # A peer that has said nothing has begun no message; any other may be silent for `linger`, and no less than FRESH.
            if unread(sock):
                return LOOK_AGAIN
            assert isinstance(stream, WatchedSocket)  # the server has it still
            needed = max(self._linger, self._fresh_for)
            if tcp_info(sock, BYTES_RECEIVED) is None:
                return 0 if stream.heard_at is None else needed - (monotonic() - stream.heard_at)
            return self._find_silence_left(needed, stream, sock)
        if not isinstance(stream, WatchedSocket) or stream.fileno() < 0:
            return self._judge_by_kernel(sock)
        is_tls = stream is not sock
        if self._one_way:
            return self._judge_one_way(stream, sock)
        stream.may_end = True
        is_line, is_in_message = stream.is_between_lines(), stream.is_in_message()
        if (is_in_message and not is_line) or unread(sock):
            return inf
        received = tcp_info(sock, BYTES_RECEIVED)
        if received is None:
            # Only (b) waits for silence, and TLS: OpenSSL may have a part of a record, and then its thread waits as it does
            # for a whole one. Else what a peer on this machine has sent is here.
            return self._find_silence_left(self._linger if is_in_message or is_tls else SETTLED, stream, sock)
        if is_line and not is_in_message and not is_tls and received == stream.bytes_in:
            return 0
        return self._find_silence_left(self._linger, stream, sock)

    def _judge_one_way(self, stream: WatchedSocket, sock: socket.socket) -> float:
        if not self._has_said_end:
            self._has_said_end = True
            self._connection.say_end()
            self._not_before = self._loop.time() + self._linger
            if self._linger > 0:
                return self._linger
        if self._connection.is_about_to_say_end():
            return inf
        if stream.ends_at is None:
            # A peer that never stops sending does not put the end off. Where its side of TLS could not be ended, the kernel
            # can refuse nothing.
            stream.ends_at = 0 if self._connection.has_said_end() else stream.bytes_in + unread(sock) + UNNOTED
            self._ends_by = monotonic() + PATIENCE if self._connection.has_said_end() else inf
        if stream.is_in_record():
            return inf
        if unread(sock) or (stream.makes_files() and stream.reading_file is None):
            return self._ends_by - monotonic()  # when it reads next it decides for itself, and loses nothing
        # A thread that reads only now is about to tell its peer.
        return self._find_silence_left(HELD if self._connection.has_said_end() else self._linger, stream, sock)

    def _find_silence_left(self, needed: float, stream: WatchedSocket, sock: socket.socket) -> float:
        silence = silence_of(sock)
        if silence is not None:
            return 0 if silence == inf else needed - silence
        if not (stream.bytes_in or isinstance(stream, ssl.SSLSocket)):  # which may have a part of a record
            return 0
        if self._counted != stream.bytes_in:
            self._counted, self._quiet_since = stream.bytes_in, self._loop.time()
        return needed - (self._loop.time() - self._quiet_since)

    def _judge_by_kernel(self, sock: socket.socket) -> float:
        """Judge a socket that the handler has wrapped itself, in TLS mostly: by what the kernel has seen last."""
        received, sent = tcp_info(sock, LAST_DATA_RECV), tcp_info(sock, LAST_DATA_SENT)
        if received is None or sent is None or not tcp_info(sock, BYTES_RECEIVED):
            return 0
        if received < sent and not self._one_way:
            return LOOK_AGAIN  # what came last was not answered yet
        return self._linger - received / 1000
