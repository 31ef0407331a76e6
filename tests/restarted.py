"""What is served while its workers are replaced, and the clients of it: each kind keeps account of what it was told.

The handlers note in the file that RESTARTED_NOTES names what they have taken, so that it can be compared.
"""

import asyncio
import contextlib
import os
import socket
from collections import Counter
from typing import Any, ClassVar

import aioecho

__all__ = ["CLIENTS", "Client", "Idle", "OneWay", "Request", "Session", "Step", "Upload"]


def note(*what: object) -> None:
    """Append a line to the notes, whole."""
    line = " ".join(str(each) for each in what)
    descriptor = os.open(os.environ["RESTARTED_NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode() + b"\n")
    os.close(descriptor)


# Handlers


class Request(aioecho.StreamRequestHandler):
    """Answers each line with itself."""

    async def handle(self) -> None:
        async for line in self.reader:
            note("request", line.decode().strip())
            await self.send(line)


class Upload(aioecho.StreamRequestHandler):
    """Reads to the end of the stream, and tells how much that was."""

    async def handle(self) -> None:
        size = len(await self.reader.read())
        await self.send(b"stored %d" % size)


class OneWay(aioecho.StreamRequestHandler):
    """Only reads: lines, which it notes."""

    one_way = True

    async def handle(self) -> None:
        async for line in self.reader:
            if line.endswith(b"\n"):
                note("line", line.decode().strip())


class Step(aioecho.StreamRequestHandler):
    """Acknowledges each of the blocks that the first line announces."""

    async def handle(self) -> None:
        async with self.unbroken():
            count = int(await self.reader.readline())
            for number in range(count):
                assert await self.reader.readline() == b"block %d\n" % number
                await self.send(b"ack %d\n" % number)
        await self.send(b"OK\n")


class Idle(aioecho.StreamRequestHandler):
    """Waits for what does not come."""

    async def handle(self) -> None:
        await self.reader.read(1)


class Session(aioecho.DatagramSessionHandler):
    """As Step, by datagrams. What does not begin at the beginning is told so."""

    async def handle(self) -> None:
        async with self.unbroken():
            expected = 0
            async for data in self.datagrams:
                if data != b"block %d" % expected:
                    self.reply(b"unknown")
                    return
                self.reply(b"ack %d" % expected)
                expected += 1
                if expected == STEPS:
                    return


STEPS = 10

# Clients


class Client:
    """One of a kind, which goes on until it is stopped; `outcomes` counts what came of it."""

    KIND: ClassVar[str]

    def __init__(self, endpoint: str, number: int) -> None:
        host, _, port = endpoint.rpartition("//")[2].rpartition(":")
        self.address = host, int(port)
        self.number = number
        self.outcomes: Counter[str] = Counter()
        self.serial = 0
        self.is_stopped = False

    @property
    def name(self) -> str:
        self.serial += 1
        return f"{self.number}-{self.serial}"

    async def run(self) -> None:
        while not self.is_stopped:
            try:
                async with asyncio.timeout(20):
                    await self.act()
            except (OSError, EOFError) as error:
                self.outcomes[f"failed: {error!r}"] += 1

    async def act(self) -> None:
        raise NotImplementedError

    def check(self, notes: list[list[str]]) -> None:
        """Assert that what it was told is so, given the notes."""


@contextlib.asynccontextmanager
async def connection(address: tuple[str, int]) -> Any:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Requests(Client):
    """Every other time one request on a connection, else one after another until the server closes it."""

    KIND = "Request"

    def __init__(self, endpoint: str, number: int) -> None:
        super().__init__(endpoint, number)
        self.answered: list[str] = []
        self.unanswered: list[str] = []

    async def act(self) -> None:
        async with connection(self.address) as (reader, writer):
            is_first = True
            while is_first or (self.number % 2 and not self.is_stopped):
                name = self.name
                reply = b""
                with contextlib.suppress(ConnectionError):
                    writer.write(f"{name}\n".encode())
                    reply = await reader.readline()
                if reply == f"{name}\n".encode():
                    self.answered.append(name)
                    self.outcomes["answered"] += 1
                elif reply:
                    self.outcomes[f"cut: {reply!r}"] += 1
                else:
                    self.unanswered.append(name)
                    # It came when the connection was closed already, as that was idle: to be sent again. The first on a
                    # connection never does.
                    self.outcomes["failed: the first was not answered" if is_first else "closed before it came"] += 1
                    return
                is_first = False
                await asyncio.sleep(0.002)

    def check(self, notes: list[list[str]]) -> None:
        taken = Counter(what for kind, what in notes if kind == "request" and what.startswith(f"{self.number}-"))
        assert all(taken[name] == 1 for name in self.answered)
        assert not [name for name in self.unanswered if taken[name]]


class Uploads(Client):
    """Sends in pieces, with pauses in between."""

    KIND = "Upload"

    async def act(self) -> None:
        async with connection(self.address) as (reader, writer):
            for _ in range(20):
                writer.write(bytes(3000))
                await writer.drain()
                await asyncio.sleep(0.01)
            writer.write_eof()
            reply = await reader.read()
        self.outcomes["stored" if reply == b"stored 60000" else f"cut: {reply!r}"] += 1


class Lines(Client):
    """As logging's SocketHandler or logger: sends a line when there is one, and connects anew when that fails."""

    KIND = "OneWay"

    def __init__(self, endpoint: str, number: int) -> None:
        super().__init__(endpoint, number)
        self.sent: list[tuple[int, str]] = []  # on which connection, and what
        self.connections = 0

    async def run(self) -> None:
        sock: socket.socket | None = None
        while not self.is_stopped:
            name = self.name
            while True:
                if sock is None:
                    sock = socket.create_connection(self.address)
                    self.connections += 1
                try:
                    sock.sendall(f"{name}\n".encode())
                    break
                except OSError:
                    sock.close()
                    sock = None
            self.sent.append((self.connections, name))
            await asyncio.sleep(0.002)
        assert sock is not None
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # a restart has closed it since the last line
            sock.shutdown(socket.SHUT_WR)
            await loop.sock_recv(sock, 1)  # the server has read to the end
        sock.close()

    def check(self, notes: list[list[str]]) -> None:
        taken = Counter(what for kind, what in notes if kind == "line" and what.startswith(f"{self.number}-"))
        assert max(taken.values()) == 1
        lost = Counter(connection for connection, name in self.sent if not taken[name])
        self.outcomes["sent"] = len(self.sent)
        self.outcomes["lost"] = lost.total()
        self.outcomes["connections closed"] = self.connections - 1
        self.outcomes["at most lost of one, summed over the clients"] = max(lost.values(), default=0)
        assert not lost[self.connections]
        # One is on its way when the server's system answers it with a reset.
        assert max(lost.values(), default=0) <= 1, lost


class Steps(Client):
    """Sends a block when the one before is acknowledged."""

    KIND = "Step"

    async def act(self) -> None:
        async with connection(self.address) as (reader, writer):
            writer.write(b"%d\n" % STEPS)
            for number in range(STEPS):
                await asyncio.sleep(0.03)
                writer.write(b"block %d\n" % number)
                reply = await reader.readline()
                if reply != b"ack %d\n" % number:
                    self.outcomes[f"cut after {number}: {reply!r}"] += 1
                    return
            self.outcomes["OK" if await reader.read() == b"OK\n" else "cut"] += 1


class Idles(Client):
    """Waits until the server closes the connection in good order."""

    KIND = "Idle"

    async def act(self) -> None:
        async with connection(self.address) as (reader, _):
            reading = asyncio.create_task(reader.read(1))
            try:
                while not reading.done() and not self.is_stopped:
                    await asyncio.wait([reading], timeout=0.05)
                if reading.done():
                    self.outcomes["closed" if reading.result() == b"" else "failed: got data"] += 1
            finally:
                reading.cancel()
                await asyncio.wait([reading])

    async def run(self) -> None:
        while not self.is_stopped:
            try:
                await self.act()
            except OSError as error:
                self.outcomes[f"failed: {error!r}"] += 1


class Sessions(Client):
    """As Steps, by datagrams, from a port of its own for each exchange."""

    KIND = "Session"

    async def act(self) -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.connect(self.address)
            for number in range(STEPS):
                await asyncio.sleep(0.02)
                await loop.sock_sendall(sock, b"block %d" % number)
                try:
                    async with asyncio.timeout(5):
                        reply = await loop.sock_recv(sock, 100)
                except TimeoutError:
                    reply = b"nothing"
                if reply != b"ack %d" % number:
                    self.outcomes[f"cut: {reply.decode()}"] += 1
                    return
        self.outcomes["OK"] += 1


CLIENTS: tuple[type[Client], ...] = (Requests, Uploads, Lines, Steps, Idles, Sessions)
