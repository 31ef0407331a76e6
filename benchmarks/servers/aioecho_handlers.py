"""aioecho: one handler object per connection, a coroutine reads and replies."""

from __future__ import annotations

import asyncio

import aioecho

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()


class Echo(aioecho.StreamRequestHandler):
    """Send back each chunk."""

    async def handle(self) -> None:
        """Serve one connection."""
        while data := await self.reader.read(READ_BYTES):
            if options.delay_s:
                await asyncio.sleep(options.delay_s)
            await self.send(data)


class Lines(aioecho.StreamRequestHandler):
    """Send back each line."""

    async def handle(self) -> None:
        """Serve one connection."""
        async for line in self.reader:
            await self.send(line)


if __name__ == "__main__":
    aioecho.run(
        Lines if options.mode == "lines" else Echo,
        f"tcp://{HOST}:{options.port}",
        loop=options.loop,
        ssl=options.tls,
        limits=aioecho.Limits(backlog=BACKLOG),
    )
