"""gevent: StreamServer, blocking style in a greenlet per connection."""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call, unused-ignore"

from __future__ import annotations

import socket
from typing import Any

import gevent
from gevent.server import StreamServer

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()


def echo(sock: Any, address: tuple[str, int]) -> None:
    """Send back each chunk."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        while data := sock.recv(READ_BYTES):
            if options.delay_s:
                gevent.sleep(options.delay_s)
            sock.sendall(data)
    except ConnectionError:
        pass


def lines(sock: Any, address: tuple[str, int]) -> None:
    """Send back each line."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        for line in sock.makefile("rb"):
            sock.sendall(line)
    except ConnectionError:
        pass


if __name__ == "__main__":
    StreamServer((HOST, options.port), lines if options.mode == "lines" else echo, backlog=BACKLOG).serve_forever()
