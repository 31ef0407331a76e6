"""One process of the crowd's clients: holds connections, and obeys a line on stdin with a line of JSON on stdout.

``python -m benchmarks.crowd_clients PORT COUNT NUMBER``. NUMBER makes its source addresses.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import random
import select
import socket
import sys
import time
from typing import Any

__all__: list[str] = []

_BIND_ADDRESS_NO_PORT = 24  # Linux's IP_BIND_ADDRESS_NO_PORT: the port is chosen by connect()
_AT_A_TIME = 64


class Clients:
    """The connections of this process, by their descriptors."""

    def __init__(self, port: int, number: int) -> None:
        self.port = port
        # Each has 28,000 ports towards the server.
        self.sources = itertools.cycle(f"127.1.{number}.{last}" for last in (1, 2))
        self.sockets: dict[int, socket.socket] = {}
        self.poll = select.epoll()
        self.serial = 0
        self.doing = ""
        self.wrong: collections.Counter[str] = collections.Counter()  # replies that were wrong or lost: when, and how

    def open(self, count: int) -> None:
        """Connect so many more; each has echoed a message of its own when this returns."""
        while count > 0:
            sent = {}
            for _ in range(min(count, _AT_A_TIME)):
                sock = socket.socket()
                sock.settimeout(60)
                sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
                sock.bind((next(self.sources), 0))
                sock.connect(("127.0.0.1", self.port))
                # At once: a worker that is being replaced waits half a second for it.
                sent[sock] = self._send(sock)
            self._compare(sent)
            for sock in sent:
                self.sockets[sock.fileno()] = sock
                self.poll.register(sock.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
            count -= len(sent)

    def echo(self, sockets: list[socket.socket]) -> None:
        """Send every one a message that no other gets, and compare the replies."""
        self._compare({sock: self._send(sock) for sock in sockets})

    def _send(self, sock: socket.socket) -> bytes:
        self.serial += 1
        message = b"%08d" % self.serial
        with contextlib.suppress(OSError):  # recv() says it again
            sock.sendall(message)
        return message

    def _compare(self, sent: dict[socket.socket, bytes]) -> None:
        for sock, message in sent.items():
            try:
                reply = sock.recv(8, socket.MSG_WAITALL)
            except OSError as error:
                self.wrong[f"{self.doing}: {type(error).__name__}"] += 1
            else:
                if reply != message:
                    self.wrong[f"{self.doing}: " + ("another" if reply else "ended without")] += 1

    def talk(self, rate: float, seconds: float) -> list[int]:
        """Send at fixed times on connections by chance; return the latencies from when a message was due, in microseconds."""
        found = []
        sockets = list(self.sockets.values())
        began = time.perf_counter()
        for index in range(int(rate * seconds)):
            due = began + index / rate
            time.sleep(max(0.0, due - time.perf_counter()))
            self.echo([random.choice(sockets)])
            found.append(int((time.perf_counter() - due) * 1e6))
        return found

    def watch(self, *, reopens: bool, seconds: float, least: int) -> dict[str, Any]:
        """Close connections that the server ends, until `least` have been or the time is over; `reopens` them if so told."""
        ended = reset = 0
        end = time.monotonic() + seconds
        while ended + reset < least and time.monotonic() < end:
            gone = []
            for number, _ in self.poll.poll(0.2):
                sock = self.sockets.pop(number)
                try:
                    ended += sock.recv(1) == b""
                except OSError:
                    reset += 1
                gone.append(sock)
            for sock in gone:
                self.poll.unregister(sock.fileno())
                sock.close()
            if reopens and gone:
                self.open(len(gone))
        return {"ended": ended, "reset": reset}


def main(port: str, count: str, number: str) -> None:
    """Obey until stdin ends."""
    clients = Clients(int(port), int(number))
    for line in sys.stdin:
        order = json.loads(line)
        answer: Any = None
        clients.doing = order["do"]
        match order["do"]:
            case "open":
                clients.open(int(count))
            case "echo":
                sockets = list(clients.sockets.values())
                for first in range(0, len(sockets), _AT_A_TIME):
                    clients.echo(sockets[first : first + _AT_A_TIME])
            case "talk":
                answer = clients.talk(order["rate"], order["seconds"])
            case "watch":
                answer = clients.watch(reopens=order["reopens"], seconds=order["seconds"], least=int(count))
        print(json.dumps({"answer": answer, "wrong": clients.wrong, "held": len(clients.sockets)}), flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
