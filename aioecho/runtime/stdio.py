"""Standard streams that a program was started without."""

import os

__all__ = ["fill_standard_streams"]


def fill_standard_streams() -> None:
    """Open /dev/null on each of the descriptors 0, 1 and 2 that is closed, for this process and its children.

    A socket would take the number: what is printed, by a library or a handler's child, would go to a client. And when an
    event loop of libuv's closes one of its own on them it aborts the process, as it takes that for a mistake (uvloop 0.23).
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # It gets the number, as the least that is free.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
