"""socketserver: the handler classes of the standard library, under each of its servers (`--server`)."""

from __future__ import annotations

import socket
import socketserver
import ssl
import sys
import time

from ._options import BACKLOG, HOST, READ_BYTES, read_options


def take(name: str) -> str:
    """Take `name VALUE` off the command line, which is this module's own option."""
    at = sys.argv.index(name)
    value = sys.argv[at + 1]
    del sys.argv[at : at + 2]
    return value


kind = take("--server")
options = read_options()


class Echo(socketserver.StreamRequestHandler):
    """Send back each chunk."""

    disable_nagle_algorithm = True

    def setup(self) -> None:
        """Shake hands here, in the connection's own thread or process, and not in the accept loop."""
        if options.tls:
            self.request: socket.socket | ssl.SSLSocket = options.tls.wrap_socket(self.request, server_side=True)
        super().setup()

    def handle(self) -> None:
        """Serve one connection."""
        while data := self.request.recv(READ_BYTES):
            if options.delay_s:
                time.sleep(options.delay_s)
            self.request.sendall(data)


class Lines(Echo):
    """Send back each line."""

    def handle(self) -> None:
        """Serve one connection."""
        for line in self.rfile:
            self.wfile.write(line)


base: type[socketserver.TCPServer] = getattr(socketserver, kind)


class Server(base):  # type: ignore[misc, valid-type]
    """The chosen server, its queue as long as everyone's and its processes as many as there are clients."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = BACKLOG
    max_children = 10_000

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that leave; report anything else."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


if __name__ == "__main__":
    with Server((HOST, options.port), Lines if options.mode == "lines" else Echo) as server:
        server.serve_forever()
