"""aioecho: one handler object per connection, or per datagram; a coroutine reads and replies."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aioecho
from aioecho.framing import LengthPrefixed
from aioecho.framing import Lines as LineFraming

from ._options import BACKLOG, HOST, READ_BYTES, read_options

options = read_options()
LINES = LineFraming()


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


class Frames(aioecho.StreamRequestHandler):
    """Send back each frame."""

    framing = LengthPrefixed(4)

    async def handle(self) -> None:
        """Serve one connection."""
        async for frame in self.frames:
            await self.send_frame(frame)


class FramesByReadexactly(aioecho.StreamRequestHandler):
    """Send back each frame: its length is read, then its body."""

    async def handle(self) -> None:
        """Serve one connection."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await self.reader.readexactly(4)
                await self.send(head + await self.reader.readexactly(int.from_bytes(head, "big")))


class Count(aioecho.StreamRequestHandler):
    """Count lines."""

    async def handle(self) -> None:
        """Serve one connection."""
        count = 0
        async for _ in self.reader:
            count += 1
        await self.send(b"%d\n" % count)


class CountByBatches(aioecho.StreamRequestHandler):
    """Count lines, all that have come at a time."""

    async def handle(self) -> None:
        """Serve one connection."""
        count = 0
        async for lines in self.reader.batches(LINES):
            count += len(lines)
        await self.send(b"%d\n" % count)


class Once(aioecho.StreamRequestHandler):
    """Answer one request in upper case, and return: the server ends the connection."""

    async def handle(self) -> None:
        """Serve one connection."""
        await self.send((await self.reader.read(1024)).upper())


class Example(aioecho.StreamRequestHandler):
    """Answer one request in upper case, after a while."""

    async def handle(self) -> None:
        """Serve one connection."""
        data = await self.reader.read(1024)
        await asyncio.sleep(options.delay_s)
        await self.send(data.upper())


class Broadcast(aioecho.StreamRequestHandler):
    """Write each line to all clients."""

    async def handle(self) -> None:
        """Serve one connection."""
        await self.send(b".")
        async for line in self.reader:
            self.server.broadcast(line)


class DatagramEcho(aioecho.DatagramRequestHandler):
    """Send back a datagram."""

    async def handle(self) -> None:
        """Serve one datagram."""
        self.reply(self.data)


HANDLERS: dict[str, Any] = {
    "echo": Echo,
    "lines": Lines,
    "example": Example,
    "once": Once,
    "udp": DatagramEcho,
    "broadcast": Broadcast,
    "frames": FramesByReadexactly if options.reads == "readexactly" else Frames,
    "count": CountByBatches if options.reads == "batches" else Count,
}


def main() -> None:
    """Serve until killed."""
    more: dict[str, Any] = {"workers": options.workers} if options.workers > 1 else {}
    if (seconds := options.timeouts_s) is not None:
        more["timeouts"] = aioecho.Timeouts(idle=seconds, message=seconds, write=seconds)
    aioecho.run(
        HANDLERS[options.mode],
        f"{'udp' if options.mode == 'udp' else 'tcp'}://{HOST}:{options.port}",
        loop=options.loop,
        ssl=options.tls,
        limits=aioecho.Limits(backlog=BACKLOG),
        **more,
    )


if __name__ == "__main__":
    main()
