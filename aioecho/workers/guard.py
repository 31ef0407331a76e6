"""Refusals to start servers where that would never end: a worker starts no workers of its own."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator

from aioecho.exceptions import AioechoError
from aioecho.workers.channel import Channel

__all__ = [
    "MARK",
    "StartedByImport",
    "check_can_start_workers",
    "importing",
    "loading",
    "refuse_start_in_worker",
    "remove_mark",
]

MARK = "AIOECHO_WORKER"
"""The environment variable that marks the start of a worker: the number of the descriptor of its channel."""

_WHAT_TO_DO = "use one worker, without reuse_port and max_requests, or run the program by a Python interpreter"

_is_loading = False
_imported = ""


class StartedByImport(RuntimeError):
    """run() was called by a module that a command imports for what it defines."""


def check_can_start_workers() -> None:
    """Check that ``sys.executable`` is a Python interpreter, which a worker process is started with.

    Raises:
        AioechoError: it is not: this is a frozen program, or Python is embedded in another one.
    """
    if getattr(sys, "frozen", False):
        raise AioechoError(
            f"a frozen program can't start worker processes, as its executable is no Python interpreter: {_WHAT_TO_DO}"
        )
    if not sys.executable:
        raise AioechoError(
            f"can't start worker processes, as sys.executable names no Python interpreter: {_WHAT_TO_DO}"
        )


def remove_mark() -> None:
    """Take the mark from the environment, so that the programs that a handler starts do not inherit it."""
    os.environ.pop(MARK, None)


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Refuse every start of a server as long as the ``with`` lasts, in which a worker imports its program."""
    global _is_loading
    _is_loading = True
    try:
        yield
    finally:
        _is_loading = False


@contextlib.contextmanager
def importing(module_name: str) -> Iterator[None]:
    """Refuse run() as long as the ``with`` lasts, in which a command imports a module for what it defines."""
    global _imported
    _imported = module_name
    try:
        yield
    finally:
        _imported = ""


def refuse_start_in_worker() -> None:
    """Raise SystemExit where a server is started by a worker that has no server yet.

    That is so while it imports its program, and where the executable runs the program in place of a worker. Raise
    StartedByImport where a command imports a module.
    """
    if _imported:
        raise StartedByImport(
            f"the module {_imported!r} starts its server whenever it is imported: call run() under"
            ' `if __name__ == "__main__":`'
        )
    if _is_loading:
        raise SystemExit(
            "the program starts its server whenever it is imported, as each worker process does: call run() under"
            ' `if __name__ == "__main__":`'
        )
    mark = os.environ.get(MARK)
    if mark is None:
        return
    why = f"{sys.executable} runs the program again in place of a worker process: {_WHAT_TO_DO}"
    try:
        channel = Channel(socket.socket(fileno=int(mark)))
    except (OSError, ValueError, OverflowError):  # something on the way here has closed it
        raise SystemExit(f"aioecho: {why}") from None
    with channel.sock:
        channel.send("failed", why=why, traceback=None)
    raise SystemExit(1)  # the supervisor prints the line, once
