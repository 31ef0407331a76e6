"""The sockets that a blocking handler gets for a stream: what they have in common, and the plain one.

The descriptor of a plain one stays the server's, which alone closes it. All tell whether a message is in progress, as far as
they are read and written by their own methods and by files made of them, and meet the server's stop: see ending.py.
"""

import contextlib
import io
import select
import socket
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from aioecho.blocking.files import RequestFile, RequestPair, RequestReader
from aioecho.net.kernel import HELD, TCP_QUICKACK, has_unread, unread
from aioecho.net.proxy_header import ProxyHeader
from aioecho.streams.protocol import QUICK_ACKS

__all__ = ["MOST_AHEAD", "RequestSocket", "WatchedSocket"]

# A read that gets as many bytes as it asks for leaves more in the kernel, mostly. One that asks for so few reads a header.
FEW = 2**11

# Bytes of a peer that only sends that are read ahead when it is to be stopped.
MOST_AHEAD = 2**20

# How often it is looked at whether more has come meanwhile.
MOST_LOOKS = 16


class SocketOwner(Protocol):
    """The connection that the socket is of. A handler's thread calls its methods."""

    was_shut: bool
    is_left_open: bool

    def note_change(self) -> None:
        """Look again whether the stream is to end, while the server stops: the handler waits, or has answered."""

    def check_end(self, sock: "WatchedSocket") -> None:
        """Raise ConnectionAbortedError if a read that has met an end must not: the server has made it."""

    def end_if_nothing_came(self, sock: "WatchedSocket") -> bool:
        """End the stream, and return True, unless something waits to be read. Between messages, before a read."""

    def stop_receiving(self) -> bool:
        """Have the kernel refuse what the peer sends from now on. Return whether nothing is left to be read."""

    def end_writing(self, sock: Any) -> None:
        """Tell the peer of a TLS socket, which only sends, that the server stops."""

    def keep(self) -> None:
        """Keep a copy of the socket, which is about to be detached."""

    def give_back(self, left: socket.socket) -> None:
        """Close what the handler has closed, in the event loop."""


class WatchedSocket:
    """The part of a blocking handler's socket that tells whether a message is in progress: a mix-in."""

    owner: SocketOwner | None = None
    """The connection; None for a copy, made with dup()."""

    proxy: ProxyHeader | None = None
    """What the connection's PROXY header says, where the server expects one."""

    bytes_in = bytes_out = 0
    """The bytes read; and the bytes written, which CountingRequestSocket alone counts."""

    first_at: float | None = None
    """When the first byte was read; CountingRequestSocket alone notes it."""

    tls_at: float | None = None
    """When the server's own TLS began."""

    heard_at: float | None = None
    """When something came last in the handshake of the server's own TLS, by monotonic()."""

    endpoint = ""
    """Where the client came in."""

    unanswered = 0
    """Above 0 if something was read since something was written last, and by as much as the kernel was asked for an
    acknowledgement meanwhile."""

    has_left = False
    """Whether a file had something buffered when something was written last."""

    is_draining = False
    """Whether the server stops."""

    reading_file: RequestFile | None = None
    """The RequestFile for which it is read; None if it is read by itself, or not at all."""

    has_ended = False
    """Whether the server has ended the stream, between messages. What still comes is dropped."""

    may_end = False
    """Whether the stream ends at the next wait between two lines."""

    ends_at: int | None = None
    """Read no more, once `bytes_in` is this, than has come by then and the rest of a record. For peers that only send."""

    _ahead: bytes | memoryview = b""  # what was read ahead
    _was_full = False  # whether the last read has got as much as it asked for
    _file: "Callable[[], RequestReader | None] | None" = None

    def is_in_message(self) -> bool:
        """Tell whether a message is in progress: something was read, or has come and is buffered, that was not answered."""
        return bool(self.unanswered or self.has_left)

    def is_in_record(self) -> bool:
        """Tell whether a part of what a file reads at the moment has come. Without a file that is not known, and False."""
        file = self.reading_file
        return file is not None and file.is_in_record()

    def is_between_lines(self) -> bool:
        """Tell whether a file waits for a line, of which nothing has come."""
        file = self.reading_file
        return file is not None and file.reads_since is None and file.ends_line

    def makes_files(self) -> bool:
        """Tell whether it is read by a file that knows what it has buffered."""
        return self._file is not None

    # What derived classes call at reads and writes, in the handler's thread. They do the common case without a call: it would
    # cost more than the rest.

    def _may_not_read(self) -> bool:
        """Do what comes before a read in mid-message, or as the server stops. Return True if there is an end in its place."""
        if self.unanswered and self.unanswered <= QUICK_ACKS and not self._was_full:
            self._acknowledge()
        self._was_full = False
        if self.has_ended or not self.is_draining or self.owner is None:
            return self.has_ended
        if self.ends_at is None:
            has_ended = (
                self.may_end
                and self.is_between_lines()
                and not self.is_in_message()
                and self.owner.end_if_nothing_came(self)
            )
        else:
            has_ended = not self._ahead and self.bytes_in >= self.ends_at and not self.is_in_record()
            if has_ended:
                self._read_all_ahead()
                has_ended = self.owner.stop_receiving() and not self._ahead
        if not has_ended:
            self.owner.note_change()
        return has_ended

    def _read_all_ahead(self) -> None:
        """Read all that the peer has sent by now, for the reads to come.

        It holds small writes back until the kernel acknowledges what came before (Nagle's algorithm), which may be HELD seconds
        after that was read. These come all together then, and it has nothing else to say at that moment.
        """
        self._read_ahead()
        descriptor: int = self.fileno()  # type: ignore[attr-defined]
        if descriptor >= 0:
            arrival = select.poll()
            arrival.register(descriptor, select.POLLIN)
            arrival.poll(HELD * 1000)
        for _ in range(MOST_LOOKS):
            self._read_ahead()
            if not has_unread(self):  # type: ignore[arg-type]  # it has waited for the interpreter's lock since
                break

    def _read_ahead(self) -> None:
        """Read all that waits, for the reads to come. To be overridden."""

    def _take_ahead(self, size: int, flags: int) -> bytes:
        data = bytes(self._ahead[:size])
        if not flags & socket.MSG_PEEK:
            self._ahead = self._ahead[size:]  # of a view, which copies nothing
        return data

    def _acknowledge(self) -> None:
        # As StreamProtocol.wait_in_message() does, and for the same reason: the rest of a message may wait for it.
        self.unanswered += 1
        try:
            self.setsockopt(socket.IPPROTO_TCP, TCP_QUICKACK, 1)  # type: ignore[attr-defined]
        except OSError:  # no TCP, or closed
            self.unanswered = QUICK_ACKS + 1

    def _note_read(self, count: int, size: int, flags: int = 0) -> bool:
        """Note that so many bytes were read of at most `size`. Return True if these are to be dropped, for the end.

        Raises:
            ConnectionAbortedError: there is an end, which the server has made in the middle of a message.
        """
        if not count:
            if size and self.owner is not None:
                self.owner.check_end(self)
        elif self.has_ended:
            return True
        elif not flags & socket.MSG_PEEK:
            self.bytes_in += count
            if not self.unanswered:
                self.unanswered = 1
            if count == size > FEW:
                self._was_full = True
        return False

    def _note_write(self) -> None:
        """Note that something was written after something was read."""
        self.unanswered = 0
        file = self._file() if self._file is not None else None
        self.has_left = file is not None and file.has_left()
        if self.is_draining and self.owner is not None:
            self.owner.note_change()

    def makefile(self, mode: str = "r", buffering: int | None = None, **options: Any) -> Any:
        """Return a file, as socket.makefile() does. One to read from knows what it has buffered."""
        if buffering == 0 or "r" not in mode or not set(mode) <= {"r", "w", "b"}:
            return super().makefile(mode, buffering, **options)  # type: ignore[misc]
        raw = RequestFile(self, "r")  # type: ignore[arg-type]
        self._io_refs += 1  # type: ignore[attr-defined]  # as makefile() does; RequestFile.close() takes it back
        size = io.DEFAULT_BUFFER_SIZE if buffering is None or buffering < 0 else buffering
        reader = RequestReader(raw, size)
        self._file = weakref.ref(reader)  # the file has the socket: a cycle would keep both
        file: Any = reader
        if "w" in mode:
            file = RequestPair(reader, super().makefile("wb", buffering))  # type: ignore[misc]
        if "b" in mode:
            return file
        raw.is_text = True
        text = io.TextIOWrapper(file, **options)
        text.mode = mode  # type: ignore[misc]
        return text


class RequestSocket(WatchedSocket, socket.socket):
    """The socket that a blocking handler gets. Closing it gives its descriptor back to the server."""

    def _read_ahead(self) -> None:
        # A peer holds small writes back until what waits was read (Nagle's algorithm), and once it is stopped all of these are
        # refused. One that sends as fast as it can is not read for ever.
        while (waiting := unread(self)) and len(self._ahead) < MOST_AHEAD:
            self._ahead = memoryview(b"".join([self._ahead, socket.socket.recv(self, waiting)]))

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """Read. Raises ConnectionAbortedError if the server stops in the middle of a message."""
        if (self.unanswered or self.is_draining) and self._may_not_read():
            return b""
        data = super().recv(bufsize, flags) if not self._ahead else self._take_ahead(bufsize, flags)
        count = len(data)
        if 0 < count < FEW and not (flags or self.is_draining):
            self.bytes_in += count
            if not self.unanswered:
                self.unanswered = 1
        elif self._note_read(count, bufsize, flags):
            return b""
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Read into a buffer. Raises ConnectionAbortedError if the server stops in the middle of a message."""
        if (self.unanswered or self.is_draining) and self._may_not_read():
            return 0
        if self._ahead:
            data = self._take_ahead(nbytes or memoryview(buffer).nbytes, flags)
            count = len(data)
            memoryview(buffer).cast("B")[:count] = data
        else:
            count = super().recv_into(buffer, nbytes, flags)
        if 0 < count < FEW and not (flags or self.is_draining):
            self.bytes_in += count
            if not self.unanswered:
                self.unanswered = 1
        elif self._note_read(count, nbytes or memoryview(buffer).nbytes, flags):
            return 0
        return count

    # What follows is seldom called, and waits for more where recv() would give the end of a one_way handler's stream at once.

    def recvfrom(self, bufsize: int, flags: int = 0) -> tuple[bytes, Any]:
        """Read, with the address. Raises as recv() does."""
        self._may_not_read()
        if self._ahead:
            return self.recv(bufsize, flags), None
        data, address = super().recvfrom(bufsize, flags)
        self._note_read(len(data), bufsize, flags)
        return data, address

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """Read into a buffer, with the address. Raises as recv() does."""
        self._may_not_read()
        if self._ahead:
            return self.recv_into(buffer, nbytes, flags), None
        count, address = super().recvfrom_into(buffer, nbytes, flags)
        self._note_read(count, nbytes or memoryview(buffer).nbytes, flags)
        return count, address

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0) -> Any:
        """Read, with ancillary data. Raises as recv() does."""
        self._may_not_read()
        if self._ahead:
            return self.recv(bufsize, flags), [], 0, None
        received = super().recvmsg(bufsize, ancbufsize, flags)
        self._note_read(len(received[0]), bufsize, flags)
        return received

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0) -> Any:
        """Read into buffers, with ancillary data. Raises as recv() does."""
        buffers = list(buffers)
        self._may_not_read()
        if self._ahead:
            return self.recv_into(next(filter(len, buffers), bytearray()), 0, flags), [], 0, None
        received = super().recvmsg_into(buffers, ancbufsize, flags)
        self._note_read(received[0], sum(memoryview(buffer).nbytes for buffer in buffers), flags)
        return received

    def send(self, data: Any, flags: int = 0) -> int:
        """Write some of the data."""
        count = super().send(data, flags)
        if self.unanswered or self.has_left:
            self._note_write()
        return count

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Write all of the data."""
        super().sendall(data, flags)
        if self.unanswered or self.has_left:
            self._note_write()

    def sendmsg(self, *arguments: Any) -> int:
        """Write some of the data, with ancillary data."""
        count = super().sendmsg(*arguments)
        self._note_write()
        return count

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Write what is in a file."""
        sent = super().sendfile(file, offset, count)
        self._note_write()
        return sent

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
