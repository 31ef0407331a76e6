"""Handlers of the standard library's socketserver, for its own servers and for others that take them as they are."""

from __future__ import annotations

import socket
import socketserver
import ssl
import time

from ._options import READ_BYTES, read_options

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


class Example(socketserver.BaseRequestHandler):
    """Answer one request in upper case, after a while."""

    def handle(self) -> None:
        """Serve one connection."""
        data = self.request.recv(1024)
        time.sleep(options.delay_s)
        self.request.sendall(data.upper())


class DatagramEcho(socketserver.BaseRequestHandler):
    """Send back a datagram."""

    def handle(self) -> None:
        """Serve one datagram."""
        data, sock = self.request
        sock.sendto(data, self.client_address)


HANDLERS: dict[str, type[socketserver.BaseRequestHandler]] = {
    "echo": Echo,
    "lines": Lines,
    "example": Example,
    "udp": DatagramEcho,
}
