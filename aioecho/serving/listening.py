"""What a server has for each socket that it listens on, of streams or of datagrams."""

import socket
from typing import Protocol

from aioecho.config import Limits

__all__ = ["ListeningSocket"]


class ListeningSocket(Protocol):
    """What a server has for each socket that it listens on. Its methods may be called in any state, and more than once."""

    @property
    def sock(self) -> socket.socket:
        """The socket."""

    def resume(self) -> None:
        """Accept, or read, from now on, as long as there is room."""

    def pause(self) -> None:
        """Leave what comes to the kernel, until resume()."""

    def stop(self, *, keep_backlog: bool) -> None:
        """Accept, or read, what the kernel has queued, and no more from then on.

        With `keep_backlog` do not: other processes have the same socket, and are to get what is queued.
        """

    def set_limits(self, limits: Limits) -> None:
        """Apply other limits than the socket was made with."""

    def set_timeouts(self) -> None:
        """Apply the timeouts that hold now."""
