"""The order: what a worker is to do, and how it gets from the supervisor's process to the worker's."""

import dataclasses
import os
import pickle
import sys
import tempfile
from collections.abc import Callable

from aioecho.exceptions import AioechoError
from aioecho.serving.base import BaseServer
from aioecho.workers.main_module import find_main, import_main

__all__ = ["Order", "read_order", "store_order"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker is to do; it is pickled."""

    make_server: Callable[[list[list[str]]], BaseServer]
    """Called with endpoints of inherited sockets: a list for every endpoint of the supervisor's, as a host may have several
    addresses."""
    loop: str
    max_requests: int | None
    max_requests_jitter: int
    is_measured: bool = False

    def pack(self) -> bytes:
        """Return everything that a fresh interpreter needs to obey this.

        Raises:
            TypeError: the handler or an option can't be sent to another process.
        """
        try:
            pickled = pickle.dumps(self)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            # Every version of Python has another error for the same mistake, and none says what to do.
            message = (
                f"worker processes import the handler and its options, and these can't be: {error}. Define them at the top of"
                " a module"
            )
            raise TypeError(message) from error
        # In a process of multiprocessing's the program is called by the second name.
        needs_main = b"__main__" in pickled or b"__mp_main__" in pickled
        return pickle.dumps((list(sys.path), list(sys.argv), find_main() if needs_main else None, pickled))


def store_order(packed: bytes) -> int:
    """Return a descriptor of a file without a name that holds a packed order, for the workers to inherit.

    Raises:
        AioechoError: the system gives no memory for it, and no folder for temporary files.
    """
    try:
        # Needs no file system: in a container it is often read-only.
        descriptor = os.memfd_create("aioecho-order")
    except (AttributeError, OSError):  # not on Linux, or forbidden
        try:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise AioechoError(
                f"cannot store what workers are to do: {error.strerror}: set TMPDIR to a writable folder"
            ) from error
    with open(descriptor, "wb", closefd=False) as file:
        file.write(packed)
    return descriptor


def read_order(descriptor: int) -> Order:
    """Return the order from an inherited descriptor, and close that. It imports the program if the order needs it."""
    # Not read(), which would move the position that all workers share.
    packed = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    os.close(descriptor)
    sys.path[:], sys.argv[:], program, pickled = pickle.loads(packed)
    if program is not None:
        import_main(*program)
    order: Order = pickle.loads(pickled)
    return order
