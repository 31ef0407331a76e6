"""Ready-made handlers: the small services that sockets are tried out with.

The default endpoint is on the loopback interface. Think before you offer these to a network: `chargen` sends as fast as its
peer reads, to whoever asks.
"""

import asyncio
import time
from datetime import UTC, datetime

from aioecho.handlers import StreamRequestHandler

__all__ = ["HANDLERS", "Chargen", "Daytime", "Discard", "Echo", "Time", "Upper"]

CHUNK = 2**16
"""Bytes that are read at a time, at most."""


class Echo(StreamRequestHandler):
    """Send back what comes (RFC 862)."""

    async def handle(self) -> None:
        """Echo until the peer has sent its last."""
        while data := await self.reader.read(CHUNK):
            await self.send(data)


class Upper(StreamRequestHandler):
    """Send back each line in upper case: ASCII letters, all other bytes as they are."""

    async def handle(self) -> None:
        """Answer line by line; a last line may lack its end."""
        async for line in self.reader:
            await self.send(line.upper())


class Discard(StreamRequestHandler):
    """Throw away what comes and send nothing (RFC 863)."""

    async def handle(self) -> None:
        """Read until the peer has sent its last."""
        while await self.reader.read(CHUNK):
            pass


class Chargen(StreamRequestHandler):
    """Send lines of 72 characters as fast as the peer reads, and throw away what comes (RFC 864).

    Other than in the RFC, it ends when the peer has sent its last, and so also when the server stops.
    """

    async def handle(self) -> None:
        """Send the rotating pattern."""
        listening = asyncio.create_task(self._discard())
        try:
            while not listening.done():
                await self.send(CHARGEN_LINES)
                await asyncio.sleep(0)  # a peer that keeps up must not have the loop for itself
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    async def _discard(self) -> None:
        while await self.reader.read(CHUNK):
            pass


class Daytime(StreamRequestHandler):
    """Send the date and time in UTC as one line for people, and close (RFC 867)."""

    async def handle(self) -> None:
        """Send it."""
        await self.send(datetime.now(UTC).strftime("%A, %B %d, %Y %H:%M:%S-UTC\r\n").encode("ascii"))


class Time(StreamRequestHandler):
    """Send the seconds since 1900-01-01 00:00 UTC as 4 bytes, high byte first, and close (RFC 868)."""

    async def handle(self) -> None:
        """Send it. The count wraps in 2036, as the RFC's does."""
        await self.send(((int(time.time()) + SECONDS_FROM_1900_TO_1970) % 2**32).to_bytes(4, "big"))


SECONDS_FROM_1900_TO_1970 = 2_208_988_800  # RFC 868 names this figure

PRINTABLE = bytes(range(32, 127))

# One turn of the pattern: line n starts at the n-th printable character.
CHARGEN_LINES = b"".join((PRINTABLE * 2)[start : start + 72] + b"\r\n" for start in range(len(PRINTABLE)))

HANDLERS: dict[str, type[StreamRequestHandler]] = {
    "echo": Echo,
    "upper": Upper,
    "discard": Discard,
    "chargen": Chargen,
    "daytime": Daytime,
    "time": Time,
}
"""The handlers by the names that the command line knows them by."""
