"""The error types of aioecho. The system's OSError passes through where no caller would catch it apart."""

from typing import ClassVar

__all__ = [
    "AioechoError",
    "CertificateError",
    "ConnectionClosed",
    "ConnectionTimeout",
    "EndpointError",
    "FrameTooLong",
    "FramingError",
    "LineTooLong",
]


class AioechoError(Exception):
    """The root of aioecho's own errors."""


class EndpointError(AioechoError, OSError):
    """An endpoint cannot be listened on, or connected to: the caller's or the system's fault.

    `errno` is the system's, or None. The message is one line that names the endpoint and the reason.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno
        self.message = message

    def __str__(self) -> str:
        return self.message


class CertificateError(AioechoError, ValueError):
    """A certificate, its key, or what goes with them cannot be used: the caller's or the system's fault. One line says why."""


class ConnectionClosed(AioechoError, ConnectionError):
    """The connection of a client has ended, or broke: the peer's or the system's fault. For `aioecho.connect()`.

    The message is one line that names the endpoint and the reason. `errno` is the system's, None where the peer has closed in
    good order. `partial` is what had come of a message that was not whole.
    """

    def __init__(self, message: str, errno: int | None = None, partial: bytes = b"") -> None:
        super().__init__(message)
        self.errno = errno
        self.message = message
        self.partial = partial

    def __str__(self) -> str:
        return self.message


class ConnectionTimeout(AioechoError, TimeoutError):
    """A timeout of a connection has passed: the peer's fault. Raised where a handler, or a client, reads or writes.

    In a server `which` names the field of Timeouts, "idle", "message", "write" or "max_age", and `seconds` is its value. In a
    client it is "timeout", and `message` names the endpoint. The stream can be used on: a timeout is raised once.
    """

    def __init__(self, which: str, seconds: float, message: str = "") -> None:
        super().__init__(which, seconds, message)
        self.which = which
        self.seconds = seconds
        self.message = message

    def __str__(self) -> str:
        return self.message or f"{_WHAT_PASSED[self.which]} {self.seconds:g} s (Timeouts.{self.which})"


class _RecordTooLong(AioechoError, ValueError):
    _record: ClassVar[str]

    peer = "the peer"
    """What the message calls the sender. A client has the endpoint's name there."""

    def __init__(self, size: int | None, limit: int, skip: int | None = None) -> None:
        super().__init__(size, limit, skip)
        self.size = size
        self.limit = limit
        self.skip = skip

    def __str__(self) -> str:
        what = f"more than {self.limit} bytes" if self.size is None else f"{self.size} bytes"
        return f"{self.peer} sent a {self._record} of {what}, over the limit of {self.limit} bytes"


class LineTooLong(_RecordTooLong):
    """The peer sent a line longer than the limit: the peer's fault.

    `size` is its length in bytes without its end, None if its end has not come, and `limit` what was allowed. `skip` is the
    number of bytes the line takes, with its end; None if that is not known yet. A stream that is read on skips the line.
    """

    _record = "line"


class FrameTooLong(_RecordTooLong):
    """The peer sent a frame longer than the limit, or announced one: the peer's fault.

    `size` is its length in bytes, None if its end has not come and is not announced, and `limit` what was allowed. `skip` is
    the number of bytes the frame takes from the start of what was split, with its header and its end. These bytes need not
    have come. None: only the framing's `resync()` finds the end. A stream that is read on skips the frame.
    """

    _record = "frame"


class FramingError(AioechoError, ValueError):
    """The peer sent what its framing does not allow: the peer's fault.

    `skip` is as in FrameTooLong: the number of bytes that the bad record takes, or None. It is 0 where nothing tells where
    the next frame begins: the stream is of no more use, and every later read raises this again.
    """

    def __init__(self, message: str, skip: int | None = 0) -> None:
        super().__init__(message, skip)
        self.message = message
        self.skip = skip

    def __str__(self) -> str:
        return self.message


_WHAT_PASSED = {
    "idle": "the peer sent nothing for",
    "message": "the peer did not complete a message within",
    "write": "the peer took nothing for",
    "max_age": "the connection is older than",
}
