"""asyncio.start_server: a callback with a reader and a writer, on asyncio's loop or uvloop."""

from __future__ import annotations

import asyncio
import contextlib

import uvloop

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back each chunk."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        while data := await reader.read(READ_BYTES):
            if options.delay_s:
                await asyncio.sleep(options.delay_s)
            writer.write(data)
            await writer.drain()


async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back each line."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        async for line in reader:
            writer.write(line)
            await writer.drain()


async def main() -> None:
    """Serve until killed."""
    handle = lines if options.mode == "lines" else echo
    server = await asyncio.start_server(handle, HOST, options.port, backlog=BACKLOG, ssl=options.tls)
    await server.serve_forever()


if __name__ == "__main__":
    if options.loop == "uvloop":
        uvloop.run(main())
    else:
        asyncio.run(main())
