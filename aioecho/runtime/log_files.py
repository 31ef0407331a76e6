"""The files that loggers write to, which are opened anew when they were rotated."""

import logging
import os

__all__ = ["all_loggers", "reopen_log_files"]


def all_loggers() -> list[logging.Logger]:
    """Return the loggers that there are, the root first."""
    root = logging.getLogger()
    return [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]


def reopen_log_files() -> None:
    """Open the files that loggers write to anew, where another file, or none, has their path now: they were rotated."""
    for handler in {handler for each in all_loggers() for handler in each.handlers}:
        if isinstance(handler, logging.FileHandler) and _was_moved(handler):
            handler.acquire()
            try:
                stream, handler.stream = handler.stream, None  # the handler opens it at its next record
                if stream is not None:
                    stream.close()
            finally:
                handler.release()


def _was_moved(handler: logging.FileHandler) -> bool:
    if handler.stream is None:  # it opens the file at its next record
        return False
    try:
        is_open = os.fstat(handler.stream.fileno())
        return not os.path.samestat(os.stat(handler.baseFilename), is_open)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):  # it is closed, or not to be looked at
        return False
