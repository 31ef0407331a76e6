"""The error types of aioecho. The system's OSError passes through wherever nobody would catch it apart."""

__all__ = ["AioechoError", "ConnectionTimeout", "EndpointError"]


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


class ConnectionTimeout(AioechoError, TimeoutError):
    """One of the server's timeouts has passed: the peer's fault. Raised where a handler reads or drains.

    `which` names the field of Timeouts, "idle", "message", "write" or "max_age", and `seconds` is its value. The stream
    can be used on, for a last word: each is raised once.
    """

    def __init__(self, which: str, seconds: float) -> None:
        super().__init__(which, seconds)
        self.which = which
        self.seconds = seconds

    def __str__(self) -> str:
        return f"{_WHAT_PASSED[self.which]} {self.seconds:g} s (Timeouts.{self.which})"


_WHAT_PASSED = {
    "idle": "the peer sent nothing for",
    "message": "the peer did not complete a message within",
    "write": "the peer took nothing for",
    "max_age": "the connection is older than",
}
