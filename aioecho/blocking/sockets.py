"""The socket that a blocking handler gets for a stream. Its descriptor stays the server's, which alone closes it."""

import contextlib
import errno
import socket
from typing import Any, Protocol

__all__ = ["CountingRequestSocket", "RequestSocket"]


class SocketOwner(Protocol):
    """The connection whose socket it is. A handler's thread calls its methods."""

    was_shut: bool
    is_left_open: bool
    awaits_answer: bool

    def note_answer(self) -> None:
        """Go on with the drain, which waited until what was read is answered."""

    def has_made_end(self) -> bool:
        """Tell whether it is the server that has ended the stream, as it stops."""

    def keep(self) -> None:
        """Keep a copy of the socket, which is about to be detached."""

    def give_back(self, left: socket.socket) -> None:
        """Close what the handler has closed, in the event loop."""


class RequestSocket(socket.socket):
    """The socket that a blocking handler gets. Closing it gives its descriptor back to the server."""

    owner: SocketOwner | None = None
    """The connection; None for a copy, made with dup()."""

    bytes_in = bytes_out = 0  # they are counted by CountingRequestSocket alone

    unanswered = False
    """Whether something was read since something was written last. Then a stop does not end the stream."""

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Read. Raises ConnectionAbortedError if the server stops in the middle of a message."""
        data = super().recv(bufsize, flags)
        if data:
            self.unanswered = self.unanswered or not flags & socket.MSG_PEEK
        elif bufsize and self.unanswered:
            self._check_end()
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Read into a buffer. Raises ConnectionAbortedError if the server stops in the middle of a message."""
        count = super().recv_into(buffer, nbytes, flags)
        if count:
            self.unanswered = self.unanswered or not flags & socket.MSG_PEEK
        elif self.unanswered:
            self._check_end()
        return count

    def send(self, data: Any, flags: int = 0) -> int:
        """Write some of the data."""
        count = super().send(data, flags)
        if self.unanswered:
            self._note_answer()
        return count

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Write all of the data."""
        super().sendall(data, flags)
        if self.unanswered:
            self._note_answer()

    def _note_answer(self) -> None:
        self.unanswered = False
        if self.owner is not None and self.owner.awaits_answer:
            self.owner.note_answer()

    def _check_end(self) -> None:
        if self.owner is not None and self.owner.has_made_end():
            raise ConnectionAbortedError(errno.ECONNABORTED, "the server stops")

    def shutdown(self, how: int) -> None:
        """Shut down one or both sides."""
        super().shutdown(how)
        if self.owner is not None and how != socket.SHUT_RD:
            self.owner.was_shut = True

    def detach(self) -> int:
        """Give up the descriptor, mostly to wrap it in TLS."""
        if self.owner is not None and self.fileno() >= 0:
            # So that the server can still shut it when it stops. Without, if there is no descriptor for that: were this to
            # fail in the middle of wrap_socket(), two would own the one there is, and close it twice.
            with contextlib.suppress(OSError):
                self.owner.keep()
        return super().detach()

    def _real_close(
        self, _ss: Any = socket.socket
    ) -> None:  # what close() calls, as soon as no file made of it is open
        if self.owner is None:
            super()._real_close()  # type: ignore[misc]
        elif (left := self.take()) is not None:
            self.owner.give_back(left)

    def leave_open(self) -> None:
        """Have the server forget it when the handler returns, and not close it; unless it has been closed."""
        if self.owner is not None and not self._closed:  # type: ignore[attr-defined]  # socket.socket's own
            self.owner.is_left_open = True

    def take(self) -> socket.socket | None:
        """Return a socket with the descriptor, which is then no longer this one's; None if it has none."""
        family, kind, proto = self.family, self.type, self.proto
        fd = super().detach()
        return None if fd < 0 else socket.socket(family, kind, proto, fileno=fd)


class CountingRequestSocket(RequestSocket):
    """A request socket that counts what is read and written with it, files made of it included.

    It does not count what TLS, or a copy made with dup(), reads and writes.
    """

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Read."""
        data = super().recv(bufsize, flags)
        self._count_in(len(data), flags)
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Read into a buffer."""
        count = super().recv_into(buffer, nbytes, flags)
        self._count_in(count, flags)
        return count

    def send(self, data: Any, flags: int = 0) -> int:
        """Write some of the data."""
        count = super().send(data, flags)
        self.bytes_out += count
        return count

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Write all of the data."""
        super().sendall(data, flags)
        self.bytes_out += memoryview(data).nbytes

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Write what is in a file."""
        before = self.bytes_out
        sent = super().sendfile(file, offset, count)
        self.bytes_out = before + sent  # where os.sendfile() can't be used, send() has counted too
        return sent

    def _count_in(self, count: int, flags: int) -> None:
        if not flags & socket.MSG_PEEK:
            self.bytes_in += count
