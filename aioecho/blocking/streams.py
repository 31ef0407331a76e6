"""Blocking handlers: one connection's life in a thread of a bounded pool.

A handler class of socketserver's does all its work in its constructor, on a blocking socket. It is called in a thread; all
else about its connection, as of any other, is done in the event loop: accepting it, verifying it, counting it, draining it,
reading on for a while after the reply, and closing its descriptor.

The rule of this module: only the loop closes a connection's descriptor, as the loop also shuts it from outside when the
server stops, and that must never hit another connection, which has got the same number in the meantime.

What handlers do to the loop is hold the interpreter's lock. Those that wait, in I/O or sleeping, don't: with 1,000 async
clients beside 32 of them the loop's lag at the 99th percentile was 2 to 6 ms on uvloop, 5 to 15 ms on asyncio (two processors,
Python 3.11). One that computes gives the lock away every 5 ms, `sys.setswitchinterval`, and the loop waits that long each time
that it wants it back, which is after any system call: beside one such handler 290 ms on uvloop and 5 s on asyncio, beside
four 680 ms and 25 s, beside 32 it stood still. After `sys.setswitchinterval(0.0005)` it was 7 ms beside one, on uvloop.
"""

import asyncio
import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import Any

from aioecho.blocking.counting import make_request_socket
from aioecho.blocking.ending import ThreadDrain
from aioecho.blocking.sockets import RequestSocket, WatchedSocket
from aioecho.blocking.tls import end_tls, wrap
from aioecho.blocking.tls_sockets import EndSignal, send_close_notify
from aioecho.blocking.verified import VerifiedRequest
from aioecho.net.kernel import acknowledge_at_once, has_peer_ended, is_broken, round_trip, unread
from aioecho.runtime.threads import ThreadPool
from aioecho.serving.base import BaseServer
from aioecho.serving.draining import FRESH, FRESH_AMONG_OTHERS, MOST_ROUND_TRIP
from aioecho.serving.end_record import is_recorded, log_end
from aioecho.serving.handler_types import undo_partial

__all__ = ["ThreadedConnection"]


class ThreadedConnection(VerifiedRequest):
    """A live connection of a server with a blocking handler, in `server.connections`.

    `client_address` is as accept() gave it, `request` is the socket. `thread` is None until it has one. `handler` is always
    None: its constructor returns when all is done. Call :meth:`abort` to cut it off.
    """

    request: RequestSocket

    __slots__ = (
        "_drain",
        "_end_signal",
        "_handlers_socket",
        "_handshake_error",
        "_has_made_end",
        "_has_met_stop",
        "_has_said_end",
        "_is_draining",
        "_is_handshaking",
        "_kept",
        "_speaks_since",
        "is_left_open",
        "one_way",
        "since",
        "was_shut",
    )

    def __init__(
        self,
        server: BaseServer,
        pool: ThreadPool,
        sock: socket.socket,
        client_address: Any,
        RequestHandlerClass: Callable[..., Any],
    ) -> None:
        is_measured = server.measures is not None and not server.measures.counts(sock)
        request = make_request_socket(sock, counts=is_measured or is_recorded(server.access_log))
        request.owner = self
        super().__init__(server, pool, request, client_address, RequestHandlerClass)
        self.since = self._loop.time()
        self.wire = server.measures.watch(request, request) if server.measures is not None else None
        self.was_shut = self.is_left_open = False
        self._handlers_socket: socket.socket = request  # or what TLS was wrapped around it
        self._handshake_error: OSError | None = None
        self._is_handshaking = self.get_tls() is not None
        self._is_draining = self._has_made_end = self._has_met_stop = self._has_said_end = False
        self._end_signal: EndSignal | None = None  # where the handler's thread sends the end of TLS at a stop
        self.one_way = bool(getattr(undo_partial(RequestHandlerClass), "one_way", False))
        self._drain: ThreadDrain | None = None
        self._kept: socket.socket | None = None  # the same connection as the socket that was detached
        # When its peer could begin to speak, by monotonic(): when it got its thread, or when TLS's handshake was over.
        self._speaks_since: float | None = None

    # In the loop: what the server asks of it while it lives.

    def idle_since(self, now: float) -> None:
        """Return None: what a thread waits for can't be told."""

    def note_endpoint(self, endpoint: str) -> None:
        """Note where the client came in."""
        self.request.endpoint = endpoint

    def log_end(self) -> None:
        """Make the one record of a connection that has ended, if it is to be made."""
        server, now = self._server, self._loop.time()
        log_end(server.access_log, self.client_address, self.reason, began=self.since, ended=now, counts=self.request)

    # In the loop: what the server asks of it when it stops.

    def drain(self) -> None:
        """Let the handler meet the end of the stream between messages, once it has read what its peer has sent by now.

        One that has only just got its thread, or completed TLS's handshake, is about to send its request: it has FRESH seconds
        from then on, and a round trip more. One that has not even begun the handshake has as long from now.
        """
        if self._has_returned:
            return
        self._is_draining = True
        self._watch(self._handlers_socket)
        since = self._speaks_since  # now that the thread can see that the server stops
        age = 0 if since is None or self._is_handshaking else monotonic() - since
        self._drain = ThreadDrain(
            self,
            self._loop,
            fresh_for=inf if since is None else self._get_fresh_time() - age,
            linger=self._server.timeouts.linger,
            one_way=self.one_way,
        )
        self._drain.decide()

    def _watch(self, stream: socket.socket) -> None:
        """Have the handler's socket tell what it does from now on, as the server stops."""
        if self._is_draining and isinstance(stream, WatchedSocket):
            stream.is_draining = True

    def _get_fresh_time(self) -> float:
        fresh = FRESH_AMONG_OTHERS if self._server.keep_backlog else FRESH
        return fresh + min(round_trip(self.get_socket()), MOST_ROUND_TRIP)

    def _decide(self) -> None:
        if self._drain is not None:
            self._drain.decide()

    def get_socket(self) -> socket.socket:
        """Return a socket with its descriptor."""
        return self._kept or self.request

    def get_tls(self) -> ssl.SSLContext | None:
        """Return what TLS is served with, None for none."""
        context: ssl.SSLContext | None = self._server.ssl
        return context

    def is_handshaking(self) -> bool:
        """Tell whether the handshake of the server's own TLS goes on, or has not begun."""
        return self._is_handshaking

    def say_end(self) -> None:
        """Send FIN: the handler of a peer that only sends has nothing to say. With TLS its thread does, by end_writing()."""
        if self.get_tls() is None:
            self._has_said_end = True
            self._shut(socket.SHUT_WR)
        elif self._end_signal is not None:
            self._end_signal.give()

    def has_said_end(self) -> bool:
        """Tell whether FIN was sent."""
        return self._has_said_end

    def is_about_to_say_end(self) -> bool:
        """Tell whether the handler's thread is to end its side of TLS, and has not tried yet."""
        return getattr(self._handlers_socket, "end_signal", None) is not None

    def shut_reading(self) -> None:
        """End the handler's stream. What has been received stays readable, and replies can be sent."""
        self._has_shut_reading = True
        self._note_end_made()
        self._shut(socket.SHUT_RD)

    def _note_end_made(self) -> None:
        # Before: a peer that sees the server's FIN closes too, and then it could not be told which came first.
        self._has_made_end = self._has_made_end or not has_peer_ended(self.get_socket())

    def is_in_message(self) -> bool:
        """Tell whether a message, or a TLS handshake, is in progress; not known where the handler has made the TLS itself."""
        stream = self._handlers_socket
        if self._has_returned or not isinstance(stream, WatchedSocket):
            return False
        if self._is_handshaking:
            return stream.heard_at is not None
        return stream.is_in_record() if self.one_way else stream.is_in_message()

    def cancel(self) -> None:
        """End both directions, so that a handler that waits for its peer meets an end or an error."""
        if self._has_returned:
            self._is_cancelled = True
            self._close()
        else:
            super().cancel()

    def _interrupt(self) -> None:
        self._was_lost = is_broken(self.get_socket()) is True
        self._note_end_made()
        self._shut(socket.SHUT_RDWR)

    def abort(self) -> None:
        """Cut it off. Its thread can't be ended: what else the handler waits for, it goes on waiting for."""
        self.was_aborted = True
        if not self._is_over:
            self.cancel()

    def _shut(self, how: int) -> None:
        for sock in (self.request, self._kept):
            if sock is not None:
                with contextlib.suppress(OSError):  # it is not connected any more, or closed
                    socket.socket.shutdown(sock, how)

    # In its thread.

    def note_change(self) -> None:
        """Look again whether the stream is to end: the handler waits, or has answered."""
        self._post(self._decide)

    def end_if_nothing_came(self, sock: WatchedSocket) -> bool:
        """End the stream, and return True, unless something waits to be read. Between messages, before a read.

        The thread that reads knows what it has read: it waits for no silence, unlike the loop.
        """
        if unread(self.get_socket()) or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            return False
        sock.has_ended = True
        self.shut_reading()
        return True

    def stop_receiving(self) -> bool:
        """Have the kernel refuse what a peer that only sends does from now on. Return whether nothing is left to be read.

        Without, it would accept what comes between the handler's last read and the closing of the socket, and discard it. It
        refuses by a reset, where FIN has been sent before.
        """
        if not self._has_said_end:  # over TLS
            return True
        self.shut_reading()
        return unread(self.get_socket()) == 0

    def end_writing(self, sock: Any) -> None:
        """Send TLS's end, and FIN, to a peer that only sends."""
        with contextlib.suppress(OSError):  # there is no descriptor left, or the connection broke
            send_close_notify(sock, self.get_socket())
            acknowledge_at_once(self.get_socket())
            self._has_said_end = True
            self._shut(socket.SHUT_WR)
            self._post(self._linger_anew)

    def check_end(self, sock: WatchedSocket) -> None:
        """Raise ConnectionAbortedError if a read has met an end that the server has made in the middle of a message."""
        if not self._has_made_end:
            return
        if self.one_way:
            is_cut = sock.is_in_record()
        else:
            is_cut = sock.is_in_message() and (self._is_cancelled or not sock.is_between_lines())
        if is_cut:
            self._has_met_stop = True
            raise ConnectionAbortedError(errno.ECONNABORTED, "the server stops")

    def is_servers_doing(self, error: BaseException) -> bool:
        """Tell whether the handler has met that error because the server stops, or has cut it off."""
        return super().is_servers_doing(error) or (self._has_met_stop and isinstance(error, ConnectionAbortedError))

    def get_stream(self) -> socket.socket:
        """Return the socket that the handler has."""
        return self._handlers_socket

    def is_peer_lost(self) -> bool:
        """Tell whether the connection broke; True where the system does not tell, as of Unix sockets."""
        return is_broken(self.get_socket()) is not False

    def _serve(self) -> None:
        self._speaks_since = monotonic()  # before it looks whether the server stops: see drain()
        if self._is_draining:
            self._post(self._renew_drain)
        request: socket.socket = self.request
        context = self.get_tls()
        if context is not None:
            try:
                self.keep()
                began = monotonic()
                request = wrap(context, self.request, self._server.timeouts.handshake)
            except OSError as error:
                if self._is_cancelled:
                    self.reason = "cancelled"
                else:  # the peer's fault or bad luck: garbage, silence, gone. It may be a flood of them
                    self.reason = "handshake"
                    self._handshake_error = error
                return
            if self.one_way:
                self._make_end_signal(request)
            self._post(self._handshaken, monotonic() - began)
            self._handlers_socket = request
            self._watch(request)  # drain() may have looked before
        try:
            self._call_handler(request)
        finally:
            if isinstance(request, ssl.SSLSocket):
                if self._end_signal is not None:
                    self._end_signal.close()
                end_tls(request)
                self._shut(socket.SHUT_WR)
                request.close()
                request.owner = None  # type: ignore[attr-defined]  # which refers to it

    def _make_end_signal(self, request: Any) -> None:
        with contextlib.suppress(OSError):  # there is no descriptor left
            self._end_signal = request.end_signal = EndSignal(request)

    def keep(self) -> None:
        """Keep a copy of the socket, for the server to shut it with when it has been detached.

        Raises:
            OSError: there is no descriptor left.
        """
        if self._kept is None:
            sock = self.request
            self._kept = socket.socket(sock.family, sock.type, sock.proto, fileno=os.dup(sock.fileno()))

    def give_back(self, left: socket.socket) -> None:
        """Have the loop close what the handler has closed. May be called in any thread."""
        try:
            is_in_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_in_loop = False
        if is_in_loop:  # a hook has closed it
            self._take_back(left)
        elif not self._post(self._take_back, left):
            left.close()

    def _leave(self) -> None:
        if self._end_signal is not None:
            self._end_signal.give()
        left = None if self.is_left_open else self.request.take()
        self.request.owner = None
        for sock in (left, self._kept):
            if sock is not None:
                sock.close()

    # In the loop again: its end.

    def _linger_anew(self) -> None:
        if self._drain is not None:
            self._drain.linger_anew()

    def _handshaken(self, seconds: float) -> None:
        self._is_handshaking = False
        self._speaks_since = monotonic()
        self.request.tls_at = self._loop.time()
        self._note_handshake(seconds)
        self._renew_drain()  # its request comes only now, however old it is

    def _renew_drain(self) -> None:
        if self._drain is not None:
            self._drain.renew(self._get_fresh_time())

    def _take_back(self, left: socket.socket) -> None:
        if self._is_over:
            left.close()
            return
        self._left = left
        if self.was_shut:
            self._read_on()
        else:
            self._close()  # the handler wants it closed: it may have passed on a copy, to which it is not to be shut

    def _return(self) -> None:
        super()._return()
        if self._drain is not None:
            self._drain.stop()
            self._drain = None
        if self._end_signal is not None:
            self._end_signal.give()
        if self._handshake_error is not None:
            self._server.report_not_begun(self.client_address, "TLS handshake", self._handshake_error)
            self._handshake_error = None  # its traceback holds on to us
            self._note_handshake(None)
        left = None if self.is_left_open else self.request.take()
        if self._kept is not None:
            if self.get_tls() is not None and left is None:
                left = self._kept
            else:  # the handler itself has wrapped it in TLS, and closes it
                self._kept.close()
            self._kept = None
        if left is not None:
            self._left = left
            with contextlib.suppress(OSError):
                left.shutdown(socket.SHUT_WR)
            self._read_on()
        elif self._left is None:
            self._end()
