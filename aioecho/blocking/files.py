"""The files that a blocking handler makes of its socket to read from: they know what they have buffered, and how they are read.

A handler's end at a stop depends on that: a line of which the beginning is in a file's buffer is a message in progress.
BufferedReader itself does not tell. But its tell() subtracts what it has buffered from what the raw file below says. It takes
no lock, and so never waits for a thread that reads. The methods that read lines are C's own. The others, which read so many
bytes, are overridden: they tell the raw file that they wait for bytes.
"""

import io
import socket
from typing import Any

__all__ = ["RequestFile", "RequestPair", "RequestReader"]

NEWLINE = 10

tell = io.BufferedReader.tell


class RequestFile(socket.SocketIO):
    """The raw file below a :class:`RequestReader`."""

    given = 0
    """The bytes that it has given so far."""

    ends_line = True
    """Whether the last of these ended a line."""

    reads_since: int | None = None
    """While a number of bytes is read, how many bytes came before these; None while a line is read."""

    is_text = False
    """Whether a text file has the reader, and buffers what that has given."""

    _has_timed_out = False

    def readinto(self, buffer: Any) -> int | None:
        """Read from the socket, as SocketIO does."""
        sock: Any = self._sock  # type: ignore[attr-defined]  # SocketIO's own
        if sock is None:
            raise ValueError("I/O operation on closed socket.")
        if self._has_timed_out:
            raise OSError("cannot read from timed out object")
        sock.reading_file = self
        try:
            count: int = sock.recv_into(buffer)
        except TimeoutError:
            self._has_timed_out = True
            raise
        except BlockingIOError:
            return None
        finally:
            sock.reading_file = None
        if count:
            self.given += count
            self.ends_line = buffer[count - 1] == NEWLINE
        return count

    def tell(self) -> int:
        """Return `given`, for the reader. The file can't be sought in."""
        return self.given

    def is_in_record(self) -> bool:
        """Tell whether a part of what is being read has come, while the socket is read for it.

        A line is waited for only when no end of a line is buffered. So the last chunk ends as what is buffered does.
        """
        return not self.ends_line if self.reads_since is None else self.given > self.reads_since


class RequestReader(io.BufferedReader):
    """What ``makefile("rb")`` gives, as `rfile`: a BufferedReader with a raw file that knows what is read."""

    raw: RequestFile

    def has_left(self) -> bool:
        """Tell whether something is buffered, in the thread that reads: what a text file has of a line is guessed."""
        raw = self.raw
        try:
            return raw.given != tell(self) or (raw.is_text and not raw.ends_line)
        except ValueError:  # closed
            return False

    def tell(self) -> int:
        """Raise UnsupportedOperation: it is no file on a disk."""
        raise io.UnsupportedOperation("underlying stream is not seekable")

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes, less at the end of the stream; up to that if `size` is negative or None."""
        raw = self.raw
        raw.reads_since = tell(self)
        try:
            return super().read(size)
        finally:
            raw.reads_since = None

    def read1(self, size: int = -1, /) -> bytes:
        """Read at most `size` bytes, with at most one read of the socket."""
        raw = self.raw
        raw.reads_since = raw.given  # it waits for the first byte alone
        try:
            return super().read1(size)
        finally:
            raw.reads_since = None

    def readinto(self, buffer: Any, /) -> int:
        """Read as many bytes as `buffer` has, less at the end of the stream."""
        raw = self.raw
        raw.reads_since = tell(self)
        try:
            return super().readinto(buffer)
        finally:
            raw.reads_since = None

    def readinto1(self, buffer: Any, /) -> int:
        """Read at most as many bytes as `buffer` has, with at most one read of the socket."""
        raw = self.raw
        raw.reads_since = raw.given
        try:
            return super().readinto1(buffer)
        finally:
            raw.reads_since = None

    def peek(self, size: int = 0, /) -> bytes:
        """Return what is buffered, and read the socket once if nothing is."""
        raw = self.raw
        raw.reads_since = raw.given
        try:
            return super().peek(size)
        finally:
            raw.reads_since = None

    def readlines(self, hint: int | None = -1, /) -> list[bytes]:
        """Read lines up to the end of the stream, or until `hint` bytes are there."""
        raw = self.raw
        raw.reads_since = tell(self)
        try:
            return super().readlines(-1 if hint is None else hint)
        finally:
            raw.reads_since = None


class RequestPair(io.BufferedIOBase):
    """What ``makefile("rwb")`` gives: an io.BufferedRWPair with a reader that tells what it has buffered."""

    def __init__(self, reader: RequestReader, writer: io.BufferedWriter) -> None:
        self._reader, self._writer = reader, writer
        # The methods of the two, without a call more. Iterating calls readline().
        self.read, self.read1, self.peek = reader.read, reader.read1, reader.peek  # type: ignore[method-assign]
        self.readinto, self.readinto1 = reader.readinto, reader.readinto1  # type: ignore[method-assign]
        self.readline, self.readlines = reader.readline, reader.readlines  # type: ignore[method-assign]
        self.write, self.flush = writer.write, writer.flush  # type: ignore[method-assign]

    def readable(self) -> bool:
        """Return whether it can be read: until it is closed."""
        return self._reader.readable()

    def writable(self) -> bool:
        """Return whether it can be written."""
        return self._writer.writable()

    def close(self) -> None:
        """Write what is buffered, and close both directions."""
        try:
            self._writer.close()
        finally:
            self._reader.close()

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._writer.closed
