"""Ready-made handlers: the small services that sockets are tried out with.

The default endpoint is on the loopback interface. Think before you offer these to a network: `chargen` sends as fast as any
peer reads.

A datagram's source address can be forged. Two such services that answer each other never stop (CERT CA-1996-01), and neither
does one that answers itself. So no handler here answers a datagram from the server's own address, or from the port of a small
service (:data:`SMALL_SERVICES`). Services of your own on other ports are not recognised: do not let two of them echo. A reply
is never longer than its datagram, except for `daytime` (a line) and `time` (4 bytes).
"""

import asyncio
import time
from datetime import UTC, datetime

from aioecho.serving.datagram_handlers import DatagramRequestHandler
from aioecho.serving.handlers import StreamRequestHandler

__all__ = [
    "DATAGRAM_HANDLERS",
    "FRAME_HANDLERS",
    "HANDLERS",
    "SMALL_SERVICES",
    "Agent",
    "Chargen",
    "DatagramChargen",
    "DatagramDaytime",
    "DatagramDiscard",
    "DatagramEcho",
    "DatagramTime",
    "DatagramUpper",
    "Daytime",
    "Discard",
    "Echo",
    "EchoFrames",
    "Time",
    "Upper",
    "UpperFrames",
]

CHUNK = 2**18
"""Bytes that are read at a time, at most: what either loop's transport hands over in one piece, which then is not copied."""

SMALL_SERVICES = frozenset({7, 9, 13, 17, 19, 37})
"""The UDP ports of echo, discard, daytime, quote of the day, chargen and time, which no handler here answers."""


class Echo(StreamRequestHandler):
    """Send back what is read (RFC 862)."""

    async def handle(self) -> None:
        """Echo until the end of the stream."""
        reader = self.reader
        while data := await reader.read(CHUNK):
            await self.send(data)
            del data  # or it would be held until the next comes


class Upper(StreamRequestHandler):
    """Send back every line in upper case: ASCII letters, all other bytes as they are."""

    async def handle(self) -> None:
        """Reply line by line; the last line may lack its end."""
        async for line in self.reader:
            await self.send(line.upper())


class EchoFrames(StreamRequestHandler):
    """Send back every frame. A class derived from this one, or the object, has a `framing`."""

    async def handle(self) -> None:
        """Reply frame by frame."""
        async for frame in self.frames:
            await self.send_frame(frame)


class UpperFrames(StreamRequestHandler):
    """Send back every frame in upper case: ASCII letters, all other bytes as they are. It needs a `framing`, as EchoFrames."""

    async def handle(self) -> None:
        """Reply frame by frame."""
        async for frame in self.frames:
            await self.send_frame(frame.upper())


class Discard(StreamRequestHandler):
    """Discard what is read and send nothing (RFC 863)."""

    one_way = True

    async def handle(self) -> None:
        """Read until the end of the stream."""
        while await self.reader.read(CHUNK):
            pass


class Chargen(StreamRequestHandler):
    """Send lines of 72 characters as fast as the peer reads, and discard what is read (RFC 864).

    Unlike the RFC's, it ends at the end of the stream, and so also when the server stops.
    """

    async def handle(self) -> None:
        """Send the rotating pattern."""
        listening = asyncio.create_task(self._discard())
        try:
            while not listening.done():
                await self.send(CHARGEN_LINES)
                await asyncio.sleep(0)  # a peer that reads fast enough must not keep the loop to itself
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
        await self.send(_daytime())


class Time(StreamRequestHandler):
    """Send the seconds since 1900-01-01 00:00 UTC as 4 bytes, high byte first, and close (RFC 868)."""

    async def handle(self) -> None:
        """Send it. The count wraps in 2036, as the RFC's does."""
        await self.send(_time())


class Agent(StreamRequestHandler):
    """Answer HAProxy's agent-check with a line, and close: how much of its weight this server is to get.

    `up ready 75%` where ``Limits.max_connections`` leaves a quarter of them in use, besides the agent's own; `up ready` without
    such a limit; `drain` when the server stops. What is read is ignored.

    A class for other figures overrides :meth:`percent`.
    """

    def percent(self) -> int | None:
        """Return the part of its weight that the server is to get, from 1 to 100, or None to say nothing of it."""
        most = self.server.limits.max_connections
        if most is None:
            return None
        others = len(self.server.connections) - 1
        return max(1, round(100 * (most - others) / most))

    async def handle(self) -> None:
        """Send the line."""
        if self.server.is_draining:
            await self.send(b"drain\n")
            return
        percent = self.percent()
        # "ready" undoes the "drain" of a server that was stopped and has been started again.
        await self.send(b"up ready\n" if percent is None else b"up ready %d%%\n" % percent)


def _daytime() -> bytes:
    return datetime.now(UTC).strftime("%A, %B %d, %Y %H:%M:%S-UTC\r\n").encode("ascii")


def _time() -> bytes:
    return ((int(time.time()) + SECONDS_FROM_1900_TO_1970) % 2**32).to_bytes(4, "big")


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
    "agent": Agent,
}
"""The handlers by the names that the command line knows them by."""

FRAME_HANDLERS: dict[str, type[StreamRequestHandler]] = {"echo": EchoFrames, "upper": UpperFrames}
"""The handlers that the command line uses in their place where a framing is given."""


class _SmallService(DatagramRequestHandler):
    """Does not answer a peer that would answer the answer: a small service, or the server itself."""

    async def answer(self, data: bytes) -> None:
        """Send `data`, unless the peer's port is one of SMALL_SERVICES, or its address the server's."""
        address, transport = self.client_address, self.request[1]
        if address != transport.local_address and not (isinstance(address, tuple) and address[1] in SMALL_SERVICES):
            await self.reply(data)


class DatagramEcho(_SmallService):
    """Send back the datagram (RFC 862), but not to a port of SMALL_SERVICES, nor to itself."""

    async def handle(self) -> None:
        """Echo."""
        # answer() and reply() written out: most of what an echo costs is the calls.
        address, transport = self.client_address, self.request[1]
        if address != transport.local_address and not (isinstance(address, tuple) and address[1] in SMALL_SERVICES):
            await transport.sendto(self.data, address)


class DatagramUpper(_SmallService):
    """Send back the datagram in upper case: ASCII letters, all other bytes as they are."""

    async def handle(self) -> None:
        """Answer with as many bytes."""
        await self.answer(self.data.upper())


class DatagramDiscard(DatagramRequestHandler):
    """Discard the datagram and send nothing (RFC 863)."""

    async def handle(self) -> None:
        """Do nothing."""


class DatagramChargen(_SmallService):
    """Send characters (RFC 864): as many as came, and 512 at most: a larger reply could be aimed at a third host."""

    async def handle(self) -> None:
        """Send the beginning of the pattern."""
        await self.answer(CHARGEN_LINES[: min(len(self.data), 512)])


class DatagramDaytime(_SmallService):
    """Send the date and time in UTC as one line for people (RFC 867), whatever was received."""

    async def handle(self) -> None:
        """Send it."""
        await self.answer(_daytime())


class DatagramTime(_SmallService):
    """Send the seconds since 1900-01-01 00:00 UTC as 4 bytes, high byte first (RFC 868), whatever was received."""

    async def handle(self) -> None:
        """Send it."""
        await self.answer(_time())


DATAGRAM_HANDLERS: dict[str, type[DatagramRequestHandler]] = {
    "echo": DatagramEcho,
    "upper": DatagramUpper,
    "discard": DatagramDiscard,
    "chargen": DatagramChargen,
    "daytime": DatagramDaytime,
    "time": DatagramTime,
}
"""The handlers for datagrams by the names that the command line knows them by."""
