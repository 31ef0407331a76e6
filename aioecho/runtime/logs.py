"""Log records about a condition that repeats, at a bounded rate."""

import logging
import time

__all__ = ["BoundedLog"]


class BoundedLog:
    """Passes on a record at most every `every` seconds, and says in the next how many it kept back."""

    def __init__(self, logger: logging.Logger, level: int, every: float = 1.0) -> None:
        self._logger = logger
        self._level = level
        self._every = every
        self._last = float("-inf")
        self._kept_back = 0

    def report(self, message: str, *args: object, exc_info: BaseException | None = None) -> None:
        """Log ``message % args``, with the traceback of `exc_info`, unless the last record is too recent."""
        now = time.monotonic()
        if now - self._last < self._every:
            self._kept_back += 1
            return
        if self._kept_back:
            message += " (and %d times since the last such record)"
            args = (*args, self._kept_back)
        self._last, self._kept_back = now, 0
        self._logger.log(self._level, message, *args, exc_info=exc_info)
