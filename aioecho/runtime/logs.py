"""What log records have in common: a peer's address as text, and a bounded rate for a condition that repeats."""

import logging
import socket
import time
from types import TracebackType
from typing import Any

from aioecho.runtime.addresses import unmapped

__all__ = ["BoundedLog", "ErrorInfo", "format_address"]

ErrorInfo = BaseException | tuple[type[BaseException], BaseException, TracebackType | None] | None
"""What logging takes as `exc_info`."""


def format_address(address: Any) -> str:
    """Return a peer's address as text: 127.0.0.1:52240, [::1]:52240, [fe80::1%eth0]:52240, a path, @name, or "unix socket".

    `address` is as accept() or recvfrom() gave it. Anything else is given as str() has it. An IPv4 address of a socket for
    both families is shown as one. Line ends and other control characters, which the client of a Unix socket may put into its
    name, are given as escapes.
    """
    address = unmapped(address)
    if isinstance(address, tuple) and len(address) in (2, 4):
        host, port = address[:2]
        if ":" not in str(host):
            return f"{host}:{port}"
        if len(address) == 4 and address[3] and "%" not in host:
            host += f"%{_name_of_interface(address[3])}"
        return f"[{host}]:{port}"
    if isinstance(address, bytes):  # a name in Linux's abstract namespace, mostly
        name = address.decode("utf-8", "backslashreplace")
        return _printable(f"@{name[1:]}") if name.startswith("\0") else _printable(name) or "unix socket"
    return _printable(str(address)) if address else "unix socket"


def _printable(text: str) -> str:
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def _name_of_interface(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it is gone
        return str(index)


class BoundedLog:
    """Passes on a record at most every `every` seconds, and says in the next how many it kept back."""

    def __init__(self, logger: logging.Logger, level: int, every: float = 1.0) -> None:
        self._logger = logger
        self._level = level
        self._every = every
        self._last = float("-inf")
        self._kept_back = 0

    def report(self, message: str, *args: object, exc_info: ErrorInfo = None) -> None:
        """Log ``message % args``, with the traceback of `exc_info`, unless the last record is too recent."""
        if self.count():
            self.log(message, *args, exc_info=exc_info)

    def count(self) -> bool:
        """Return whether a record may be logged now, by :meth:`log`; if not, count it as kept back."""
        now = time.monotonic()
        if now - self._last < self._every:
            self._kept_back += 1
            return False
        self._last = now
        return True

    def log(self, message: str, *args: object, exc_info: ErrorInfo = None) -> None:
        """Log ``message % args``, and how many were kept back."""
        kept_back, self._kept_back = self._kept_back, 0
        if kept_back:
            message += " (and %d times since the last such record)"
            args = (*args, kept_back)
        self._logger.log(self._level, message, *args, exc_info=exc_info)
