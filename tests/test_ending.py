"""When a stream ends at a stop: not before all that had come by then was read, whatever wakes a read meanwhile."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, close, handler, stopped_after

import aioecho
from aioecho.framing import FixedSize

MESSAGE = bytes(50_000)


async def hold(self: Any, reading: "asyncio.Task[bytes]") -> None:
    for _ in range(3):
        async with self.unbroken():
            await asyncio.sleep(0)
        await asyncio.sleep(0)


async def read_again(self: Any, reading: "asyncio.Task[bytes]") -> None:
    reading.cancel()
    await asyncio.wait([reading])
    for _ in range(3):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.reader.read(1), 0.001)


async def time_out(self: Any, reading: "asyncio.Task[bytes]") -> None:
    reading.cancel()
    await asyncio.wait([reading])
    for _ in range(3):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                await anext(self.reader.frames(FixedSize(len(MESSAGE))))


# Each such wake counted as a read of what was unread, and the third had made an end of it.
@pytest.mark.parametrize("wake", [hold, read_again, time_out])
async def test_a_wake_without_a_read_does_not_bring_the_end_over_what_is_unread(
    wake: Callable[[Any, Any], Awaitable[None]],
) -> None:
    paused, goes_on = asyncio.Event(), asyncio.Event()
    seen: list[bytes] = []

    async def handle(self: Any) -> None:
        self.writer.transport.pause_reading()
        paused.set()
        await goes_on.wait()
        reading = asyncio.create_task(self.reader.readexactly(len(MESSAGE)))
        await asyncio.sleep(0)
        await wake(self, reading)
        self.writer.transport.resume_reading()
        seen.append(await (self.reader.readexactly(len(MESSAGE)) if reading.done() else reading))
        seen.append(await self.reader.read(1))

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        await paused.wait()
        async with stopped_after(server, writer, MESSAGE, 5) as stop:
            goes_on.set()
            await settle(lambda: seen)
            writer.write_eof()
            report = await stop
    assert seen == [MESSAGE, b""]
    assert (report.completed, report.unfinished) == (1, 0)


# A handler that had answered all it was given met the end while TLS was just handing over the rest, piece by piece.
async def test_what_tls_has_read_and_hands_over_piece_by_piece_is_all_read(tls: SimpleNamespace) -> None:
    # Four records of TLS 1.3 that carry so much are as many bytes as are decrypted at a time. All fit into the first window.
    count, size = 14, 4202
    paused, goes_on = asyncio.Event(), asyncio.Event()
    seen: list[int] = []

    async def handle(self: Any) -> None:
        self.writer.transport.pause_reading()
        paused.set()
        await goes_on.wait()
        self.writer.transport.resume_reading()
        async for frame in self.reader.frames(FixedSize(size)):
            seen.append(frame[0])
            await self.send(b"x")

    async with aioecho.TCPServer(ANYWHERE, handler(handle), ssl=tls.server) as server:
        reader, writer = await asyncio.open_connection(
            *server.server_address, ssl=tls.client, server_hostname="localhost"
        )
        await paused.wait()
        for number in range(count - 1):
            writer.write(bytes([number]) * size)
        async with stopped_after(server, writer, bytes([count - 1]) * size, 5) as stop:
            goes_on.set()
            assert await reader.read() == b"x" * count
            writer.close()
            report = await stop
    assert seen == list(range(count))
    assert (report.completed, report.unfinished) == (1, 0)


# Over TLS the end that its client made after that of the stop was taken for one of a connection that its handler had left.
async def test_a_client_that_closes_after_the_end_by_a_stop_ends_a_handler_that_goes_on(tls: SimpleNamespace) -> None:
    has_ended = asyncio.Event()

    async def handle(self: Any) -> None:
        assert await self.reader.readline() == b""
        has_ended.set()
        await asyncio.Event().wait()

    timeouts = aioecho.Timeouts(half_closed=0.05)
    async with aioecho.TCPServer(ANYWHERE, handler(handle), ssl=tls.server, timeouts=timeouts) as server:
        _, writer = await asyncio.open_connection(*server.server_address, ssl=tls.client, server_hostname="localhost")
        stop = asyncio.create_task(server.shutdown(10))
        await has_ended.wait()
        closing = asyncio.create_task(close(writer))
        await stop
        await closing
    assert server.stats.reasons == {"half_closed": 1}
