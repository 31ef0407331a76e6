"""EasyNetwork on uvloop: a stream protocol of packets and a request handler that receives them by `yield`."""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call, unused-ignore"

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any

import uvloop
from easynetwork.protocol import StreamProtocol
from easynetwork.serializers import StringLineSerializer
from easynetwork.serializers.abc import AbstractIncrementalPacketSerializer
from easynetwork.servers import AsyncTCPNetworkServer
from easynetwork.servers.handlers import AsyncStreamClient, AsyncStreamRequestHandler

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()


class Chunks(AbstractIncrementalPacketSerializer[bytes, bytes]):
    """Whatever has come is a packet: an echo needs no framing."""

    def serialize(self, packet: bytes) -> bytes:
        """Give the packet as it is."""
        return packet

    def deserialize(self, data: bytes) -> bytes:
        """Give the data as they are."""
        return data

    def incremental_serialize(self, packet: bytes) -> Generator[bytes]:
        """Give the packet in one piece."""
        yield packet

    def incremental_deserialize(self) -> Generator[None, bytes, tuple[bytes, bytes]]:
        """Take one chunk for a packet, nothing left over."""
        data = yield
        return data, b""


class Echo(AsyncStreamRequestHandler[Any, Any]):
    """Send back each packet."""

    async def handle(self, client: AsyncStreamClient[Any]) -> AsyncGenerator[None, Any]:
        """Serve one packet."""
        packet = yield
        if options.delay_s:
            await asyncio.sleep(options.delay_s)
        await client.send_packet(packet)


async def main() -> None:
    """Serve until killed."""
    serializer: Any = StringLineSerializer() if options.mode == "lines" else Chunks()
    async with AsyncTCPNetworkServer(
        HOST,
        options.port,
        StreamProtocol(serializer),
        Echo(),
        backlog=BACKLOG,
        max_recv_size=READ_BYTES,
        log_client_connection=False,
    ) as server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
