"""Twisted: a Protocol and a Factory on its epoll reactor; LineReceiver for lines."""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call, unused-ignore"

from __future__ import annotations

from typing import Any

from twisted.internet import reactor as _reactor
from twisted.internet.protocol import Factory, Protocol
from twisted.protocols.basic import LineReceiver

from ._options import BACKLOG, HOST, read_options

options = read_options()
reactor: Any = _reactor  # its type depends on the platform


class Echo(Protocol):
    """Send back each chunk."""

    transport: Any

    def connectionMade(self) -> None:
        """Switch Nagle's algorithm off, which Twisted leaves on."""
        self.transport.setTcpNoDelay(True)

    def dataReceived(self, data: bytes) -> None:
        """Reply, later if told so."""
        if options.delay_s:
            reactor.callLater(options.delay_s, self.transport.write, data)
        else:
            self.transport.write(data)


class Lines(LineReceiver):
    """Send back each line."""

    delimiter = b"\n"
    transport: Any

    def connectionMade(self) -> None:
        """Switch Nagle's algorithm off, which Twisted leaves on."""
        self.transport.setTcpNoDelay(True)

    def lineReceived(self, line: bytes) -> None:
        """Reply."""
        self.sendLine(line)


if __name__ == "__main__":
    factory = Factory.forProtocol(Lines if options.mode == "lines" else Echo)
    reactor.listenTCP(options.port, factory, backlog=BACKLOG, interface=HOST)
    reactor.run()
