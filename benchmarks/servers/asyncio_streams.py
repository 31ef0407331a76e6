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


async def frames(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back each frame."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
        while True:
            head = await reader.readexactly(4)
            writer.write(head + await reader.readexactly(int.from_bytes(head, "big")))
            await writer.drain()


async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Count lines."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        number = 0
        async for _ in reader:
            number += 1
        writer.write(b"%d\n" % number)
        await writer.drain()


async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request in upper case, and return: the server ends the connection."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        writer.write((await reader.read(1024)).upper())
        await writer.drain()


async def example(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request in upper case, after a while."""
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        data = await reader.read(1024)
        await asyncio.sleep(options.delay_s)
        writer.write(data.upper())
        await writer.drain()


async def broadcast(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Write each line to all clients, without waiting for any."""
    members.add(writer)
    with contextlib.suppress(ConnectionError), contextlib.closing(writer):
        writer.write(b".")
        async for line in reader:
            for member in members:
                member.write(line)
    members.discard(writer)


members: set[asyncio.StreamWriter] = set()
HANDLERS = {
    "echo": echo,
    "lines": lines,
    "frames": frames,
    "count": count,
    "once": once,
    "example": example,
    "broadcast": broadcast,
}


async def main() -> None:
    """Serve until killed."""
    server = await asyncio.start_server(HANDLERS[options.mode], HOST, options.port, backlog=BACKLOG, ssl=options.tls)
    await server.serve_forever()


if __name__ == "__main__":
    if options.loop == "uvloop":
        uvloop.run(main())
    else:
        asyncio.run(main())
