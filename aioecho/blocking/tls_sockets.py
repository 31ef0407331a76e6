"""The socket with TLS that a blocking handler gets, and how it tells a peer that only sends of its server's stop.

OpenSSL cannot write while another thread waits in its read. So a thread whose peer is to be told first waits here, for its
socket or for the event loop, and calls OpenSSL to read what has come.
"""

import contextlib
import functools
import os
import select
import socket
import ssl
from typing import Any

from aioecho.blocking.sockets import MOST_AHEAD, WatchedSocket

__all__ = ["EndSignal", "send_close_notify", "with_tls_of_requests"]

# Bytes of data that a record of TLS has at the most.
RECORD = 2**14


class EndSignal:
    """Has a handler's thread send the end of its side, though it may be waiting to read.

    Raises:
        OSError: there is no descriptor left.
    """

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._heard, self._asking = os.pipe()
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._poll.register(self._heard, 0)  # POLLHUP comes unasked

    @property
    def is_given(self) -> bool:
        """Whether it was asked for."""
        return self._asking < 0

    def give(self) -> None:
        """Ask for it, in the event loop. May be called more than once, and at the end has to be."""
        asking, self._asking = self._asking, -1
        if asking >= 0:
            os.close(asking)

    def wait(self, seconds: float | None) -> bool:
        """Wait until there is something to read, in the handler's thread; return True once it was asked for.

        Raises:
            TimeoutError: there was neither within so many seconds.
        """
        ready = self._poll.poll(None if seconds is None else seconds * 1000)
        if not ready:
            raise TimeoutError("The read operation timed out")  # as ssl says it
        return any(descriptor == self._heard for descriptor, _ in ready)

    def close(self) -> None:
        """Wait no more, in the handler's thread. May be called more than once."""
        heard, self._heard = self._heard, -1
        if heard >= 0:
            os.close(heard)


class _WatchedTLS(WatchedSocket):
    """The part of a request's socket with TLS that tells whether a message is in progress: a mix-in for ssl.SSLSocket."""

    _error: OSError | None = None  # what has ended the reading ahead

    end_signal: EndSignal | None = None
    """What tells when the peer is to be told of the end; None if it is not to be, or has been."""

    def read(self, len: int = 1024, buffer: Any = None) -> Any:
        """Read, into `buffer` if there is one. Raises ConnectionAbortedError if the server stops in mid-message."""
        if self.end_signal is not None and self.end_signal.is_given:
            self._end_writing()  # first: the loop hears of it before it hears of the read
        if (self.unanswered or self.is_draining) and self._may_not_read():
            return b"" if buffer is None else 0
        if self.end_signal is not None:
            self._wait_to_read(self.end_signal)
        try:
            got = self._read(len, buffer) if not (self._ahead or self._error) else self._get_ahead(len, buffer)
        except ssl.SSLZeroReturnError:  # what ssl makes of the peer's end once this side has sent its own
            got = b"" if buffer is None else 0
        count = got if buffer is not None else got.__len__()
        if not count and len:
            self.end_signal = None  # the peer has ended its stream: there is nothing to tell it
        if self._note_read(count, len):
            return b"" if buffer is None else 0
        return got

    def _read(self, size: int, buffer: Any = None) -> Any:
        return super().read(size, buffer)  # type: ignore[misc]

    def _get_ahead(self, size: int, buffer: Any) -> Any:
        if not self._ahead:
            assert self._error is not None
            raise self._error
        data = self._take_ahead(size, 0)
        if buffer is None:
            return data
        buffer[: len(data)] = data
        return len(data)

    def _read_ahead(self) -> None:
        # As a plain socket's, for the same reason. Its unread bytes may be no whole record.
        sock: Any = self
        seconds = sock.gettimeout()
        sock.settimeout(0)
        try:
            while len(self._ahead) < MOST_AHEAD and (data := self._read(RECORD)):
                self._ahead = memoryview(b"".join([self._ahead, data]))
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            pass
        except OSError as error:
            self._error = error  # which is told once
        finally:
            sock.settimeout(seconds)

    def _wait_to_read(self, signal: EndSignal) -> None:
        sock: Any = self
        seconds = sock.gettimeout()
        if seconds != 0 and sock.fileno() >= 0 and not sock.pending() and signal.wait(seconds):
            self._end_writing()

    def _end_writing(self) -> None:
        sock: Any = self
        # What OpenSSL has decrypted it takes for a mistake of the peer's once it has said its own end: that is read before.
        if sock.fileno() >= 0 and not sock.pending():
            self.end_signal = None
            if self.owner is not None:
                self.owner.end_writing(sock)

    def write(self, data: Any) -> int:
        """Write some of the data."""
        count: int = super().write(data)  # type: ignore[misc]
        if self.unanswered or self.has_left:
            self._note_write()
        return count

    def send(self, data: Any, flags: int = 0) -> int:
        """Write some of the data."""
        count: int = super().send(data, flags)  # type: ignore[misc]
        if self.unanswered or self.has_left:
            self._note_write()
        return count


@functools.cache  # one class is enough for one of theirs
def with_tls_of_requests(sslsocket_class: Any) -> type[ssl.SSLSocket]:
    """Return the class to derive a request's socket with TLS from a context's `sslsocket_class`."""
    return type("RequestSSLSocket", (_WatchedTLS, sslsocket_class), {})


def send_close_notify(sock: ssl.SSLSocket, kept: socket.socket) -> None:
    """Send the end of this side of TLS, and read nothing: what the peer sends is still to be read. `kept` is the same socket.

    unwrap() goes on to read, and what the peer has sent would break the connection ("application data after close notify").
    So for that moment the descriptor is another socket's, from which nothing comes, and what was written there is passed on.

    Raises:
        OSError: it could not be sent.
    """
    seconds = sock.gettimeout()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        os.dup2(theirs.fileno(), sock.fileno(), inheritable=False)
        try:
            sock.settimeout(0)
            with contextlib.suppress(ssl.SSLError, ValueError):  # there is none of the peer's
                sock.unwrap()
            sock.settimeout(seconds)
        finally:
            os.dup2(kept.fileno(), sock.fileno(), inheritable=False)
        ours.setblocking(False)
        kept.send(ours.recv(2**10))
