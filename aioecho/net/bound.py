"""A socket that was bound, and where."""

import contextlib
import os
import socket

from aioecho.net.endpoints import HostEndpoint
from aioecho.net.proxy_protocol import ProxyProtocol
from aioecho.net.refusing import drop_connection_requests

__all__ = ["BoundSocket"]


class BoundSocket:
    """A listening socket, or one bound for datagrams, and where that is.

    `close()` also removes its path, while that is still ours to remove.
    """

    proxy: ProxyProtocol | None = None
    """The PROXY headers that come first: see note_options()."""
    is_in_clear = False
    """Whether no TLS is spoken there though the server has certificates."""

    def __init__(
        self, sock: socket.socket, name: str, path: str | None = None, endpoint: HostEndpoint | None = None
    ) -> None:
        self.sock = sock
        self.name = name
        self.endpoint = endpoint
        # Absolute: the program may change its folder meanwhile.
        self._path = os.path.abspath(path) if path is not None else None
        self._identity = _identity(path) if path is not None else None

    def refuse_clients(self) -> None:
        """Let no more clients connect, as far as the system can do that, and keep the ones that have connected by now."""
        self._remove_path()
        # Not a socket that others have too, such as a supervisor or systemd: it would refuse their clients as well.
        if self.endpoint is not None and self.sock.type == socket.SOCK_STREAM:
            drop_connection_requests(self.sock)

    def close(self) -> None:
        """Close the socket, after removing its path unless another process has put another file there."""
        self._remove_path()
        self.sock.close()

    def _remove_path(self) -> None:
        path, self._path = self._path, None
        if path is not None:
            # Unlink before closing: while the socket listens, no other process can take the path for stale and bind there.
            with contextlib.suppress(OSError):
                if _identity(path) == self._identity:
                    os.unlink(path)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
