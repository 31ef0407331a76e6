"""Tornado: TCPServer and its IOStream, on asyncio's loop as Tornado runs by default."""

# mypy: disable-error-code="import-not-found, import-untyped, misc, no-untyped-call, unused-ignore"

from __future__ import annotations

import asyncio
from typing import Any

from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpserver import TCPServer

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()


class Echo(TCPServer):
    """Send back each chunk."""

    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Serve one connection."""
        stream.set_nodelay(True)
        try:
            while True:
                data = await stream.read_bytes(READ_BYTES, partial=True)
                if options.delay_s:
                    await asyncio.sleep(options.delay_s)
                await stream.write(data)
        except StreamClosedError:
            pass


class Lines(TCPServer):
    """Send back each line."""

    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Serve one connection."""
        stream.set_nodelay(True)
        try:
            while True:
                await stream.write(await stream.read_until(b"\n"))
        except StreamClosedError:
            pass


async def main() -> None:
    """Serve until killed."""
    server = (Lines if options.mode == "lines" else Echo)()
    server.listen(options.port, HOST, backlog=BACKLOG)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
