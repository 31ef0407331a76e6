"""Bugs that were found by trying what the docs promise, with clients of the tests' own: what was wrong is told at each."""

import asyncio
import gc
import socket
import ssl
import tracemalloc
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, close, handler, reset

import aioecho
from aioecho.framing import FixedSize


# A client that waited to be accepted for longer than `linger` counted as silent since its ClientHello, and was dropped as
# soon as it was looked at, while it was about to complete its handshake.
async def test_a_handshake_from_the_queue_has_its_time_at_a_stop(tls: SimpleNamespace) -> None:
    linger = 0.5

    async def handle(self: Any) -> None:
        async for line in self.reader:
            await self.send(line.upper())

    server = aioecho.TCPServer(
        ANYWHERE,
        handler(handle),
        ssl=tls.server,
        limits=aioecho.Limits(max_connections=1),
        timeouts=aioecho.Timeouts(linger=linger),
    )
    async with server:
        first_reader, first = await asyncio.open_connection(*server.server_address, ssl=tls.client)
        first.write(b"half a ")
        await settle(lambda: server.stats.active == 1)
        reader, writer = await asyncio.open_connection(*server.server_address)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = tls.client.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        try:
            client.do_handshake()
        except ssl.SSLWantReadError:
            writer.write(outgoing.read())
        await asyncio.sleep(linger + 0.1)  # in the queue
        stop = asyncio.create_task(server.shutdown(30))
        first.write(b"line\n")
        assert await first_reader.readline() == b"HALF A LINE\n"
        await close(first)
        incoming.write(await reader.read(2**16))  # the server has answered
        await asyncio.sleep(linger / 2)  # the client's way is long
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                incoming.write(await reader.read(2**16))
        client.write(b"hello\n")
        writer.write(outgoing.read())
        while True:
            try:
                assert client.read() == b"HELLO\n"
                break
            except ssl.SSLWantReadError:
                chunk = await reader.read(2**16)
                assert chunk, "the connection ended before the reply"
                incoming.write(chunk)
        await close(writer)
        assert (await stop).completed == 2
        assert server.stats.rejected == 0


# What a handler's errors were raised in stayed, in cycles of an error, its traceback and the reader, until the garbage
# collector ran: beside Limits.max_memory of 20 MB, 144 MB of connections that had ended.
@pytest.mark.parametrize("ending", ["end", "reset"])
@pytest.mark.parametrize("how", ["exactly", "all", "frames", "raise"])
async def test_what_was_received_goes_with_the_connection(how: str, ending: str) -> None:
    size = 2**20

    async def handle(self: Any) -> None:
        reader = self.reader
        if how == "exactly":
            await reader.readexactly(4 * size)
        elif how == "all":
            await reader.read()
            raise KeyError("mistake")
        elif how == "frames":
            async for _ in reader.frames(FixedSize(4 * size)):
                pass
        else:
            data = await reader.readexactly(size)
            raise KeyError(len(data))

    class Server(aioecho.TCPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            pass

    def send() -> None:
        with socket.create_connection(server.server_address) as sock:
            sock.sendall(bytes(size))
            if ending == "reset":
                reset(sock)

    server = Server(ANYWHERE, handler(handle))
    async with server:
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for number in range(4):
                await asyncio.to_thread(send)
                await settle(lambda number=number: server.stats.failed == number + 1)
            assert tracemalloc.get_traced_memory()[0] < size
        finally:
            tracemalloc.stop()
            gc.enable()
