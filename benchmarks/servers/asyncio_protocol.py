"""A bare asyncio.Protocol on uvloop, no coroutine and no object but the protocol: the floor for Python on this loop."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import uvloop

from ._options import BACKLOG, HOST, read_options

options = read_options()
members: set[asyncio.Transport] = set()


class Echo(asyncio.Protocol):
    """Send back each chunk."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; uvloop's is no subclass of asyncio.Transport, hence the cast."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Reply, later if told so."""
        if options.delay_s:
            asyncio.get_running_loop().call_later(options.delay_s, self.transport.write, data)
        else:
            self.transport.write(data)


class Lines(Echo):
    """Send back each line."""

    rest = b""

    def data_received(self, data: bytes) -> None:
        """Cut what came into lines, and reply to each."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.transport.write(line + b"\n")


class Once(Echo):
    """Answer one request in upper case, and end the connection."""

    def data_received(self, data: bytes) -> None:
        """Reply, and close."""
        self.transport.write(data.upper())
        self.transport.close()


class Example(Echo):
    """Answer one request in upper case, after a while, and end the connection."""

    def data_received(self, data: bytes) -> None:
        """Reply later."""
        asyncio.get_running_loop().call_later(options.delay_s, self.reply, data.upper())

    def reply(self, data: bytes) -> None:
        """Reply, and close."""
        self.transport.write(data)
        self.transport.close()


class Broadcast(Echo):
    """Write each chunk, which is a line, to all clients."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Greet."""
        super().connection_made(transport)
        members.add(self.transport)
        self.transport.write(b".")

    def connection_lost(self, error: Exception | None) -> None:
        """Forget the client."""
        members.discard(self.transport)

    def data_received(self, data: bytes) -> None:
        """Write to all."""
        for transport in members:
            transport.write(data)


class DatagramEcho(asyncio.DatagramProtocol):
    """Send back each datagram."""

    transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Reply."""
        self.transport.sendto(data, addr)


PROTOCOLS: dict[str, type[Echo]] = {"lines": Lines, "once": Once, "example": Example, "broadcast": Broadcast}


async def main() -> None:
    """Serve until killed."""
    protocol = PROTOCOLS.get(options.mode, Echo)
    loop = asyncio.get_running_loop()
    if options.mode == "udp":
        await loop.create_datagram_endpoint(DatagramEcho, (HOST, options.port))
        await asyncio.Event().wait()
    server = await loop.create_server(protocol, HOST, options.port, backlog=BACKLOG, ssl=options.tls)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
