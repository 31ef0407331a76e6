"""The error types of aioecho. The system's OSError passes through wherever nobody would catch it apart."""

__all__ = ["AioechoError", "EndpointError"]


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
