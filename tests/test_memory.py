"""Limits.max_memory: what all connections hold together."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, reset

import aioecho
from aioecho.framing import LengthPrefixed

MOST = 2**20
ANNOUNCED = 2**22

Handle = Callable[[aioecho.StreamRequestHandler], Awaitable[Any]]


async def read_exactly(self: aioecho.StreamRequestHandler) -> object:
    return await self.reader.readexactly(ANNOUNCED)


async def read_all(self: aioecho.StreamRequestHandler) -> object:
    return await self.reader.read()


async def read_a_frame(self: aioecho.StreamRequestHandler) -> object:
    return await anext(self.reader.frames(LengthPrefixed(4)))


def uploads(read: Handle) -> type[aioecho.StreamRequestHandler]:
    class Upload(aioecho.StreamRequestHandler):
        stored: list[object] = []  # noqa: RUF012

        async def handle(self) -> None:
            self.stored.append(await read(self))

    return Upload


async def offer(server: aioecho.TCPServer, size: int) -> asyncio.StreamWriter:
    """Send the beginning of an upload."""
    _, writer = await asyncio.open_connection(*server.server_address)
    writer.write(ANNOUNCED.to_bytes(4, "big") + bytes(size - 4))
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return writer


@pytest.mark.parametrize("read", [read_exactly, read_all, read_a_frame])
async def test_the_connection_that_holds_most_goes_and_what_it_sent_is_no_upload(
    read: Handle, caplog: pytest.LogCaptureFixture
) -> None:
    upload = uploads(read)
    async with aioecho.TCPServer(ANYWHERE, upload, limits=aioecho.Limits(max_memory=MOST)) as server:
        memory = server.admission.memory
        small = await offer(server, 300_000)
        await settle(lambda: memory.held > 250_000)
        largest = await offer(server, 600_000)
        await settle(lambda: memory.held > 800_000)
        assert server.stats.active == 2
        late = await offer(server, 400_000)
        await settle(lambda: server.stats.reasons["memory"])
        assert (server.stats.active, server.stats.failed) == (2, 1)
        assert memory.held <= MOST
        assert upload.stored == []
        # The others go on.
        server.limits = aioecho.Limits(max_memory=None)
        for writer, sent in ((small, 300_000), (late, 400_000)):
            writer.write(bytes(ANNOUNCED + 4 - sent))
            writer.write_eof()
        await settle(lambda: not server.connections)
        assert len(upload.stored) == 2
        assert memory.held == 0
        warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert ["memory" in r.getMessage() for r in warnings] == [True]
        for writer in (small, largest, late):
            writer.transport.abort()
        check_identity(server)


async def test_what_is_not_sent_counts_too() -> None:
    class Flood(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            while await self.reader.readline():
                await self.send(bytes(600_000))

    limits = aioecho.Limits(max_memory=MOST)
    async with aioecho.TCPServer(ANYWHERE, Flood, limits=limits) as server:
        connections = [await asyncio.open_connection(*server.server_address, limit=1000) for _ in range(12)]
        for reader, writer in connections:  # they read next to nothing: what the kernel does not take stays here
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(b"\n" * 10)
        await settle(lambda: server.stats.reasons["memory"])
        assert server.admission.memory.held <= MOST
        for _, writer in connections:
            writer.transport.abort()
        await settle(lambda: not server.connections)
        assert server.admission.memory.held == 0
        check_identity(server)


async def test_a_connection_that_was_aborted_for_what_it_wrote_gets_no_end_of_stream() -> None:
    ends: list[object] = []

    class Heedless(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            try:
                for _ in range(100):
                    self.writer.write(bytes(2**20))
                ends.append(await self.reader.read())
            except ConnectionAbortedError as error:
                ends.append(str(error))
                raise

    async with aioecho.TCPServer(ANYWHERE, Heedless, limits=aioecho.Limits(max_write_buffer=1000)) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"half of what")
        await settle(lambda: server.stats.accepted == 1 and not server.connections)
        assert ends == ["the server aborted the connection: write buffer"]
        assert server.stats.reasons["write buffer"] == server.stats.failed == 1
        writer.transport.abort()


# All that it had received counted until its handler ended, however much of it the handler had read.
async def test_what_a_lost_connection_holds_counts_less_as_its_handler_reads() -> None:
    size = 120_000
    steps: asyncio.Queue[int] = asyncio.Queue()
    read: list[int] = []

    class Late(aioecho.StreamRequestHandler):
        cancel_on_lost = False

        async def handle(self) -> None:
            while count := await steps.get():
                read.append(len(await self.reader.readexactly(count)))

    async with aioecho.TCPServer(ANYWHERE, Late, limits=aioecho.Limits(max_memory=MOST)) as server:
        memory = server.admission.memory
        sock = socket.create_connection(server.server_address)
        await asyncio.to_thread(sock.sendall, bytes(size))
        await settle(lambda: memory.held == size)
        (connection,) = server.connections
        reset(sock)
        await settle(lambda: connection._protocol.is_lost)
        assert memory.held == size
        steps.put_nowait(80_000)
        await settle(lambda: len(read) == 1)
        assert memory.held == size - 80_000
        steps.put_nowait(40_000)
        await settle(lambda: len(read) == 2)
        assert memory.held == 0
        assert server.connections
        steps.put_nowait(0)
        await settle(lambda: not server.connections)
    assert memory.held == 0
