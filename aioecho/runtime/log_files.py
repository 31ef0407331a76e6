"""The files that loggers write to: opening them anew when they were rotated, and giving them to another user."""

import contextlib
import logging
import os
import stat

__all__ = ["all_loggers", "give_log_files", "reopen_log_files"]

logger = logging.getLogger("aioecho.logs")


def all_loggers() -> list[logging.Logger]:
    """Return the loggers that there are, the root first."""
    root = logging.getLogger()
    return [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]


def reopen_log_files() -> None:
    """Open the files that loggers write to anew, where another file, or none, has their path now: they were rotated.

    One that cannot be opened is written on as it is, and an ERROR says so: else every record would raise an OSError.
    """
    for handler in _file_handlers():
        if not _was_moved(handler):
            continue
        try:
            open(handler.baseFilename, "ab").close()
        except OSError as error:
            logger.error("cannot open %s anew: %s", handler.baseFilename, error.strerror or error)
            continue
        handler.acquire()
        try:
            stream, handler.stream = handler.stream, None  # the handler opens it at its next record
            if stream is not None:
                stream.close()
        finally:
            handler.release()


def give_log_files(user: int | None, group: int | None) -> None:
    """Give the files that loggers write to, and that are open, to a user and a group, so that they can be opened again then.

    Not one to which a link has led: in a folder of that user's it may lead to any file, and root has opened it.
    """
    for handler in _file_handlers():
        with contextlib.suppress(OSError, ValueError):  # it is closed, or another's
            if handler.stream is not None and _is_at_its_path(handler.stream.fileno(), handler.baseFilename):
                os.fchown(handler.stream.fileno(), -1 if user is None else user, -1 if group is None else group)


def _is_at_its_path(descriptor: int, path: str) -> bool:
    found = os.lstat(path)
    return stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.fstat(descriptor))


def _file_handlers() -> list[logging.FileHandler]:
    handlers = {handler for each in all_loggers() for handler in each.handlers}
    return [handler for handler in handlers if isinstance(handler, logging.FileHandler)]


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
