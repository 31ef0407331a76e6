"""Handlers of the standard library's socketserver, for its own servers and for others that take them as they are."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
import time
from typing import ClassVar

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


class Frames(Echo):
    """Send back each frame."""

    def handle(self) -> None:
        """Serve one connection."""
        while head := self.rfile.read(4):
            self.wfile.write(head + self.rfile.read(int.from_bytes(head, "big")))


class Count(Echo):
    """Count lines."""

    def handle(self) -> None:
        """Serve one connection."""
        count = 0
        for _ in self.rfile:
            count += 1
        self.wfile.write(b"%d\n" % count)


class Once(socketserver.BaseRequestHandler):
    """Answer one request in upper case, and return: the server ends the connection."""

    def handle(self) -> None:
        """Serve one connection."""
        self.request.sendall(self.request.recv(1024).upper())


class Example(socketserver.BaseRequestHandler):
    """Answer one request in upper case, after a while."""

    def handle(self) -> None:
        """Serve one connection."""
        data = self.request.recv(1024)
        time.sleep(options.delay_s)
        self.request.sendall(data.upper())


class Broadcast(Echo):
    """Write each line to all clients."""

    members: ClassVar[set[socket.socket]] = set()
    lock = threading.Lock()

    def handle(self) -> None:
        """Serve one connection."""
        with self.lock:
            self.members.add(self.request)
            self.wfile.write(b".")
        try:
            for line in self.rfile:
                with self.lock:
                    for member in self.members:
                        member.sendall(line)
        finally:
            with self.lock:
                self.members.discard(self.request)


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
    "once": Once,
    "frames": Frames,
    "count": Count,
    "broadcast": Broadcast,
    "udp": DatagramEcho,
}
