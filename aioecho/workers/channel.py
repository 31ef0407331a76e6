"""The channel between the supervisor and a worker: a socket pair that carries lines of JSON."""

import contextlib
import json
import socket
from typing import Any

__all__ = ["Channel"]


class Channel:
    """Messages over one socket of a pair: a message is a name with values. Neither side ever waits for the other."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.has_ended = False
        self._incomplete = b""
        sock.setblocking(False)

    def send(self, name: str, **values: Any) -> None:
        """Send a message. It is lost if the other side is gone, or has not read thousands of messages before it."""
        with contextlib.suppress(OSError):
            self.sock.send(json.dumps({"": name, **values}).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come, the name under "". `has_ended` tells whether they were the last."""
        while True:
            try:
                data = self.sock.recv(2**16)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.has_ended = True
                break
            self._incomplete += data
        *lines, self._incomplete = self._incomplete.split(b"\n")
        return [json.loads(line) for line in lines]
