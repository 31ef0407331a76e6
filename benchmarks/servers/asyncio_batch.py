"""A bare asyncio.Protocol on uvloop that splits a whole chunk at once and replies by one write: the floor for records."""

from __future__ import annotations

import asyncio
from typing import cast

import uvloop

from ._options import BACKLOG, HOST, read_options

options = read_options()


class Lines(asyncio.Protocol):
    """Send back all lines that came, in one piece."""

    transport: asyncio.Transport
    rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; uvloop's is no subclass of asyncio.Transport, hence the cast."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Split and reply."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        if lines:
            self.transport.write(b"\n".join(lines) + b"\n")


class Count(Lines):
    """Count lines."""

    count = 0

    def data_received(self, data: bytes) -> None:
        """Split and count."""
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.count += len(lines)

    def eof_received(self) -> None:
        """Say how many; the transport then closes."""
        self.transport.write(b"%d\n" % self.count)


class Frames(Lines):
    """Send back all frames that came, in one piece."""

    def data_received(self, data: bytes) -> None:
        """Split and reply."""
        data = self.rest + data
        frames, start = [], 0
        while len(data) - start >= 4:
            end = start + 4 + int.from_bytes(data[start : start + 4], "big")
            if end > len(data):
                break
            frames.append(data[start:end])
            start = end
        self.rest = data[start:]
        if frames:
            self.transport.write(b"".join(frames))


async def main() -> None:
    """Serve until killed."""
    protocol = {"lines": Lines, "frames": Frames, "count": Count}[options.mode]
    server = await asyncio.get_running_loop().create_server(protocol, HOST, options.port, backlog=BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
