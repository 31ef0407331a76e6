"""Bugs that were found by running the same handlers on asyncio's streams: what was wrong is told at each."""

import asyncio
import contextlib
import dataclasses
import gc
import socket
import weakref
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, Stubborn, close, handler

import aioecho
from aioecho.framing import COBS, SLIP, Framing, LengthPrefixed, Lines
from aioecho.streams.writer import StreamWriter


def tidy(base: type[Any], seen: list[str]) -> type[Any]:
    """Return a handler class whose handlers wait, and then clean up in all the ways that there are."""

    class Tidy(base):
        async def handle(self) -> None:
            try:
                seen.append("waits")
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                await asyncio.sleep(0)
                seen.append("cancelled")
                raise
            finally:
                await asyncio.sleep(0)
                seen.append("finally")

        async def finish(self) -> None:
            await asyncio.sleep(0)
            seen.append("finish")

    return Tidy


# Such a handler met GeneratorExit in place of CancelledError, could await nothing, and its finish() was not called.
@pytest.mark.parametrize("how", ["kick", "abort"])
@pytest.mark.parametrize(
    "base", [aioecho.StreamRequestHandler, aioecho.DatagramRequestHandler, aioecho.DatagramSessionHandler]
)
async def test_a_handler_that_is_kicked_is_cancelled_and_cleans_up(base: type[Any], how: str) -> None:
    seen: list[str] = []
    is_stream = base is aioecho.StreamRequestHandler
    kind = aioecho.TCPServer if is_stream else aioecho.UDPServer
    async with kind(ANYWHERE, tidy(base, seen)) as server:
        with socket.socket(type=socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM) as sock:
            sock.connect(server.server_address)
            sock.send(b"x")
            await settle(lambda: seen)
            (connection,) = server.connections
            getattr(connection, how)()
            await settle(lambda: not server.connections)
        assert seen == ["waits", "cancelled", "finally", "finish"]
        assert server.stats.reasons == {"kicked" if how == "kick" else "cancelled": 1}


# The log had it that aioecho itself had failed.
@pytest.mark.parametrize("base", [aioecho.StreamRequestHandler, aioecho.DatagramSessionHandler])
async def test_a_kicked_handler_whose_finish_takes_too_long_ends_as_any_that_was_kicked(
    base: type[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aioecho.serving.running.SWALLOWED_FOR", 0.05)
    seen: list[str] = []

    class Slow(base):  # type: ignore[misc]
        async def handle(self) -> None:
            seen.append("waits")
            await asyncio.Event().wait()

        async def finish(self) -> None:
            seen.append("finish")
            await asyncio.Event().wait()

    is_stream = base is aioecho.StreamRequestHandler
    async with (aioecho.TCPServer if is_stream else aioecho.UDPServer)(ANYWHERE, Slow) as server:
        with socket.socket(type=socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM) as sock:
            sock.connect(server.server_address)
            sock.send(b"x")
            await settle(lambda: seen)
            (connection,) = server.connections
            connection.kick()
            await settle(lambda: not server.connections)
    assert seen == ["waits", "finish"]
    assert server.stats.reasons == {"kicked": 1}
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# It counted as an error of the handler's, of which no log told, and a session as finished.
@pytest.mark.parametrize("base", [aioecho.StreamRequestHandler, aioecho.DatagramSessionHandler])
async def test_an_aborted_handler_with_a_task_that_would_not_end_counts_as_cancelled(
    base: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioecho.serving.running.SWALLOWED_FOR", 0.05)
    stubborn = Stubborn()

    class Accompanied(base):  # type: ignore[misc]
        async def handle(self) -> None:
            self.tasks.create_task(stubborn.run())
            await asyncio.Event().wait()

    is_stream = base is aioecho.StreamRequestHandler
    async with stubborn, (aioecho.TCPServer if is_stream else aioecho.UDPServer)(ANYWHERE, Accompanied) as server:
        with socket.socket(type=socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM) as sock:
            sock.connect(server.server_address)
            sock.send(b"x")
            await settle(lambda: stubborn.tasks)
            await settle()
            (connection,) = server.connections
            connection.abort()
            await settle(lambda: not server.connections)
    assert server.stats.reasons == {"cancelled": 1}


# What it was cut off by came a turn after it had ended, and hit what came next: its task then waited for ever, for what nothing
# was to bring, or finish() was not called.
@pytest.mark.parametrize("cancels", [2, 3])
@pytest.mark.parametrize(
    "base", [aioecho.StreamRequestHandler, aioecho.DatagramRequestHandler, aioecho.DatagramSessionHandler]
)
async def test_a_handler_that_is_aborted_ends_whenever_it_obeys(
    base: type[Any], cancels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioecho.serving.running.SWALLOWED_FOR", 0.05)
    seen: list[str] = []

    class Busy(base):  # type: ignore[misc]
        """Obeys the last of so many cancellations. At the second one it is about to be stepped by the loop."""

        async def handle(self) -> None:
            if base is not aioecho.DatagramRequestHandler:
                self.tasks.create_task(asyncio.sleep(1000))
            while True:
                try:
                    await asyncio.sleep(0 if len(seen) < 2 else 1000)
                except asyncio.CancelledError:
                    seen.append("cancelled")
                    if len(seen) == cancels:
                        raise

        async def finish(self) -> None:
            seen.append("finish")
            await asyncio.sleep(0.01)
            seen.append("finished")

    is_stream = base is aioecho.StreamRequestHandler
    async with (aioecho.TCPServer if is_stream else aioecho.UDPServer)(ANYWHERE, Busy) as server:
        with socket.socket(type=socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM) as sock:
            sock.connect(server.server_address)
            sock.send(b"x")
            await settle(lambda: server.connections)
            await settle()
            (connection,) = server.connections
            connection.kick()
            await settle(lambda: not server.connections, 5)
    # The methods of a datagram's handler are run by one coroutine, which is closed as a whole.
    last = ["finish"] if base is aioecho.DatagramRequestHandler else ["finish", "finished"]
    assert seen == ["cancelled", "cancelled", *(last if cancels == 2 else [])]
    assert server.stats.reasons == {"kicked": 1}
    check_identity(server)


# The second one counted the end of the same connection again.
async def test_a_connection_that_is_aborted_again_and_again_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioecho.serving.running.SWALLOWED_FOR", 0.05)
    is_over = asyncio.Event()

    async def swallow(self: Any) -> None:
        while not is_over.is_set():
            with contextlib.suppress(BaseException):  # also GeneratorExit
                await is_over.wait()

    async with aioecho.TCPServer(ANYWHERE, handler(swallow)) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: server.connections)
        (connection,) = server.connections
        await settle(lambda: connection.handler is not None)
        writer.write(bytes(60_000))
        await settle(lambda: server.admission.memory.held)
        for _ in range(3):
            connection.abort()
        await settle(lambda: not server.connections)
        assert server.admission.memory.held == 0  # what it had received was counted for ever
        connection.abort()
        await asyncio.sleep(0.1)
        check_identity(server)
        is_over.set()
        await settle(connection.task.done)
        await close(writer)


# What was split of 128 KiB and put back was split again for each frame: this took half a minute.
@pytest.mark.parametrize("framing", [Lines(), LengthPrefixed(1), SLIP(), COBS()])
async def test_frames_between_counted_bytes_are_split_in_linear_time(framing: Framing) -> None:
    split = 0

    class Counting(type(framing)):  # type: ignore[misc]
        def split(self, buffer: bytes | bytearray, scanned: int = 0, /) -> tuple[list[bytes], int, int]:
            nonlocal split
            split += len(buffer)
            return super().split(buffer, scanned)  # type: ignore[no-any-return]

    counting = Counting(**dataclasses.asdict(framing))
    command = framing.join(b"set x 2") + b"\n\n" + framing.join(b"a" * 200) + b"\n\n"
    reader = aioecho.StreamReader()
    reader.feed_data(command * 3000)
    for _ in range(3000):
        for frame in (b"set x 2", b"a" * 200):
            assert await reader.readframe(counting) == frame
            assert await reader.readexactly(2) == b"\n\n"
    assert split < 30 * len(command) * 3000
    # Lists are of what has come, 64 KiB at a time.
    reader.feed_data(framing.join(b"a" * 200) * 1000)
    taken = 0
    while taken < 1000:
        taken += len(await anext(reader.batches(framing)))
    assert taken == 1000


# anyio asks what a task waits for whether the wait is over, and cancels no task then. It could not ask: what a future
# had brought in the same turn of the loop was lost, and wait_all_tasks_blocked() raised AttributeError.
async def test_what_a_future_has_brought_is_not_lost_to_a_cancel_scope_of_anyio() -> None:
    anyio = pytest.importorskip("anyio")
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        loop = asyncio.get_running_loop()
        for wait in (self.reader.readline(), asyncio.sleep(0)):  # from the stream's event, and from the task itself
            await wait
            future = loop.create_future()
            with anyio.CancelScope() as scope:

                def finish(future: Any = future, scope: Any = scope) -> None:
                    future.set_result("result")
                    scope.cancel()

                loop.call_soon(finish)
                seen.append(await future)
            with anyio.CancelScope() as scope:
                loop.call_soon(scope.cancel)
                await self.reader.readline()
            seen.append(scope.cancelled_caught)
            with anyio.CancelScope() as scope:
                loop.call_soon(scope.cancel)
                while True:
                    await asyncio.sleep(0)
            seen.append(scope.cancelled_caught)
        await self.reader.readline()

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"x\n")
        await settle(lambda: len(seen) == 6)
        assert seen == ["result", True, True] * 2
        await asyncio.wait_for(anyio.wait_all_tasks_blocked(), 5)
        await close(writer)


# The error of a task that was cancelled refers to the connection's frames, and the connection to the task: all of it, with what
# it had received, stayed until the garbage collector ran.
async def test_a_connection_that_was_cancelled_goes_at_once() -> None:
    gone: list[Any] = []

    async def handle(self: Any) -> None:
        gone.append(weakref.ref(self.reader))
        await self.reader.readexactly(1000)

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"x")
        await settle(lambda: gone)
        gc.disable()
        try:
            for connection in server.connections:
                connection.cancel()
            del connection
            await settle(lambda: not server.connections)
            await settle(lambda: gone[0]() is None)
        finally:
            gc.enable()
        assert server.stats.reasons == {"cancelled": 1}
        await close(writer)


# It waited for ever, and kept its place of `max_connections`; a stop met a task that nothing resumed.
@pytest.mark.parametrize("ends_in", ["an event's step", "a task's step"])
async def test_a_connection_that_cannot_be_closed_in_the_quick_way_is_closed_all_the_same(
    ends_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[Any] = []

    def shut(*_: Any) -> bool:
        raise MemoryError

    async def handle(self: Any) -> None:
        await self.reader.readline()
        if ends_in == "a task's step":
            await asyncio.sleep(0)
        await self.send(b"answer\n")

    monkeypatch.setattr(StreamWriter, "shut", shut)
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: raised.append(context["exception"]))
    try:
        limits = aioecho.Limits(max_connections=1)
        async with aioecho.TCPServer(ANYWHERE, handler(handle), limits=limits) as server:
            for _ in range(2):
                reader, writer = await asyncio.open_connection(*server.server_address)
                writer.write(b"request\n")
                assert await reader.read() == b"answer\n"
                await close(writer)
            await settle(lambda: not server.connections)
            assert server.stats.reasons == {"finished": 2}
    finally:
        loop.set_exception_handler(before)
    assert raised
    assert {type(error) for error in raised} == {MemoryError}
