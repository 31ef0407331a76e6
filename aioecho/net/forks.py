"""Sockets in a process that was forked: the child closes the server's, which it has open as well.

Otherwise a client would not see the end of its connection while the child lives, and a port would stay taken after the stop.
A child is forked by ``os.fork()``, and so by ``multiprocessing`` and ``ProcessPoolExecutor`` with the start method "fork",
which is the default on Linux up to Python 3.13.
"""

import os
import sys
import weakref
from collections.abc import Iterable
from typing import Protocol

__all__ = ["close_in_forked_children", "is_forked_by_multiprocessing"]


class _Owner(Protocol):
    """What has sockets that no forked child is to keep."""

    def sockets_to_close_in_child(self) -> Iterable[int]:
        """Return the descriptors of the sockets that are open now. Called in the child."""


_owners: "weakref.WeakSet[_Owner]" = weakref.WeakSet()
_is_registered = False


def close_in_forked_children(owner: _Owner) -> None:
    """Close the owner's sockets in every child that is forked from now on, as long as the owner exists."""
    global _is_registered
    if not _is_registered:
        _is_registered = True
        os.register_at_fork(after_in_child=_close_in_child)
    _owners.add(owner)


def is_forked_by_multiprocessing() -> bool:
    """Tell, in a child while it closes sockets, whether multiprocessing has forked it: such a child serves no connection."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith("multiprocessing.")


def _close_in_child() -> None:
    # A subprocess.Popen with a preexec_fn calls this too. Its sockets close when the program begins, and one of them may be
    # what the program is to have as its stdin.
    if sys._getframe(1).f_globals.get("__name__") == "subprocess":
        return
    descriptors = [number for owner in _owners for number in owner.sockets_to_close_in_child() if number >= 0]
    if not descriptors:
        return
    # /dev/null takes their numbers. The socket and transport objects that were copied would close the numbers once more,
    # when they are collected, and so a file that the child has opened in the meantime.
    null = os.open(os.devnull, os.O_RDWR)
    try:
        for number in descriptors:
            os.dup2(null, number, inheritable=False)
    finally:
        os.close(null)
