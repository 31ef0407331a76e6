"""The socket of a blocking handler, made of the accepted one: the kind that counts bytes where these are asked for."""

import socket
from time import monotonic
from typing import Any

from aioecho.blocking.sockets import RequestSocket

__all__ = ["make_request_socket"]


class CountingRequestSocket(RequestSocket):
    """A request socket that counts what is written with it, files made of it included.

    It does not count what TLS, or a copy made with dup(), writes.
    """

    _bytes_in = 0

    @property
    def bytes_in(self) -> int:
        """The bytes read. To set it for the first time notes when that was."""
        return self._bytes_in

    @bytes_in.setter
    def bytes_in(self, count: int) -> None:
        if not self._bytes_in:
            self.first_at = monotonic()
        self._bytes_in = count

    def send(self, data: Any, flags: int = 0) -> int:
        """Write some of the data."""
        count = super().send(data, flags)
        self.bytes_out += count
        return count

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Write all of the data."""
        super().sendall(data, flags)
        self.bytes_out += memoryview(data).nbytes

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Write what is in a file."""
        before = self.bytes_out
        sent = super().sendfile(file, offset, count)
        self.bytes_out = before + sent  # where os.sendfile() can't be used, send() has counted too
        return sent


def make_request_socket(sock: socket.socket, *, counts: bool) -> RequestSocket:
    """Return a blocking request socket in place of an accepted one, which is detached; one that counts bytes if `counts`.

    Raises:
        OSError: the system does not let it block.
    """
    make = CountingRequestSocket if counts else RequestSocket
    request = make(sock.family, sock.type, sock.proto, fileno=sock.detach())
    try:
        if request.gettimeout() is None:  # as in socket.accept(): else socket.setdefaulttimeout() holds for it
            request.setblocking(True)
    except OSError:
        socket.socket.close(request)
        raise
    return request
