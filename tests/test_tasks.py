"""Tasks beside a handler, which end with its connection, and tasks of a server, which end with it."""

import asyncio
import logging
import socket
import sys
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, Stubborn, ask, close, handler

import aioecho


class Ticking:
    """Makes coroutines that note how they end."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    async def tick(self, name: Any = "tick") -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.events.append((name, type(asyncio.current_task()).__name__))


async def test_the_tasks_of_a_connection_end_with_it_before_finish() -> None:
    events: list[str] = []

    async def beside() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            events.append("task ended")

    class WithTask(aioecho.StreamRequestHandler):
        async def setup(self) -> None:
            self.task = self.tasks.create_task(beside(), name="beside")
            assert self.task.get_name() == "beside"

        async def handle(self) -> None:
            await self.send(await self.reader.readline())
            events.append("handle ended")

        async def finish(self) -> None:
            assert self.task.cancelled()
            events.append("finish")
            coroutine = beside()
            with pytest.raises(RuntimeError, match="the connection ends"):
                self.tasks.create_task(coroutine)
            coroutine.close()

    async with aioecho.TCPServer(ANYWHERE, WithTask) as server:
        assert await ask(server) == b"x\n"
        await settle(lambda: not server.connections)
        assert events == ["handle ended", "task ended", "finish"]
        assert not server.beside
        check_identity(server)
        assert server.stats.completed == 1


@pytest.mark.parametrize("waits_for", ["reader", "event", "setup"])
async def test_what_a_task_raises_ends_the_connection_and_is_the_handlers_error_once(
    waits_for: str, caplog: pytest.LogCaptureFixture
) -> None:
    fail = asyncio.Event()
    errors: list[Any] = []

    async def failing() -> None:
        await fail.wait()
        raise ValueError("no more")

    class WithTask(aioecho.StreamRequestHandler):
        async def setup(self) -> None:
            self.tasks.create_task(failing())
            if waits_for == "setup":
                await asyncio.Event().wait()

        async def handle(self) -> None:
            await (asyncio.Event().wait() if waits_for == "event" else self.reader.readline())

    class Server(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append((sys.exception(), client_address))
            super().handle_error(request, client_address)

    async with Server(ANYWHERE, WithTask) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: bool(server.beside))
        fail.set()
        assert await reader.read() == b""
        await close(writer)
        await settle(lambda: not server.connections)
        [(error, address)] = errors
        assert isinstance(error, ValueError)
        assert address[0] == "127.0.0.1"
        assert server.stats.reasons == {"error": 1}
        check_identity(server)
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "no more" in caplog.text
    assert "in failing" in caplog.text
    assert "beside.py" not in caplog.text
    assert record.name == "aioecho.server"


async def test_errors_of_the_handler_and_of_tasks_are_reported_as_one_group() -> None:
    errors: list[Any] = []

    async def failing_at_its_end() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise KeyError("task")

    async def handle(self: Any) -> None:
        self.tasks.create_task(failing_at_its_end())
        await self.reader.readline()
        raise ValueError("handler")

    class Server(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(sys.exception())

    async with Server(ANYWHERE, handler(handle)) as server:
        await ask(server)
        await settle(lambda: not server.connections)
    [group] = errors
    assert [type(error) for error in group.exceptions] == [ValueError, KeyError]


async def test_a_task_that_meets_the_lost_connection_is_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        async def talk() -> None:
            while True:
                await self.send(b"x" * 2**16)
                await asyncio.sleep(0)

        self.tasks.create_task(talk())
        await asyncio.Event().wait()

    async with aioecho.TCPServer(ANYWHERE, handler(handle, cancel_on_lost=False)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await reader.readexactly(10)
        writer.transport.abort()
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"connection lost": 1}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_task_that_swallows_its_cancellation_is_named_and_holds_nothing_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aioecho.serving.beside.LEAST", 0.05)
    stubborn = Stubborn()

    async def handle(self: Any) -> None:
        self.tasks.create_task(stubborn.run())
        await self.reader.readline()

    async with stubborn, aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        assert await ask(server) == b""
        await settle(lambda: not server.connections)
        assert server.stats.completed == 1
    assert "would not end when cancelled" in caplog.text


async def test_a_stop_lets_draining_speak_and_then_ends_the_tasks() -> None:
    heard: list[str] = []

    async def beside() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            heard.append("task")

    class WithTask(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            self.tasks.create_task(beside())
            await self.send(b"hello\n")
            await self.closed()

        async def draining(self) -> None:
            await asyncio.sleep(0.01)
            await self.send(b"goodbye\n")
            heard.append("draining")

    async with aioecho.TCPServer(ANYWHERE, WithTask) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.readline() == b"hello\n"
        report = await server.shutdown()
        assert await reader.read() == b"goodbye\n"
        await close(writer)
    assert heard == ["draining", "task"]
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


async def test_at_the_end_of_the_grace_tasks_are_cancelled_with_the_handler() -> None:
    ticking = Ticking()

    async def handle(self: Any) -> None:
        self.tasks.create_task(ticking.tick())
        await self.send(b"hello\n")
        await asyncio.Event().wait()

    async with aioecho.TCPServer(ANYWHERE, handler(handle), grace=0.05) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.readline() == b"hello\n"
        report = await server.shutdown()
        assert ticking.events == [("tick", "Task")]
        await close(writer)
    assert (report.cancelled, report.aborted) == (1, 0)
    assert server.stats.reasons == {"cancelled": 1}


async def test_a_server_without_tasks_keeps_nothing_for_a_connection() -> None:
    async def handle(self: Any) -> None:
        await self.send(await self.reader.readline())

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        assert await ask(server) == b"x\n"
        assert not server.beside
        assert "tasks" not in vars(server)


async def test_a_handler_may_call_something_else_tasks() -> None:
    async def handle(self: Any) -> None:
        self.tasks = [b"mine"]
        await self.send(self.tasks[0])

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        assert await ask(server) == b"mine"


async def test_the_tasks_of_a_server_outlive_connections_and_end_after_the_drain() -> None:
    ticking = Ticking()

    async def handle(self: Any) -> None:
        self.server.tasks.create_task(ticking.tick(await self.reader.readline()))

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        await ask(server)
        await settle(lambda: not server.connections)
        assert len(server.tasks) == 1
        assert not ticking.events
    assert [name for name, _ in ticking.events] == [b"x\n"]
    with pytest.raises(RuntimeError, match="the server ends"):
        server.tasks.create_task(ticking.tick())


@pytest.mark.parametrize("of_server", [True, False])
async def test_a_task_may_stop_the_server_which_does_not_wait_for_it_then(of_server: bool) -> None:
    reports: list[aioecho.DrainReport] = []

    async def stop(server: aioecho.BaseServer) -> None:
        reports.append(await server.shutdown())

    async def handle(self: Any) -> None:
        (self.server if of_server else self).tasks.create_task(stop(self.server))
        await self.closed()
        await self.send(b"done")

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        serving = asyncio.create_task(server.serve_forever())
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.read() == b"done"
        await close(writer)
        await serving
        assert [report.completed for report in reports] == [0]
        report = await server.shutdown()
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


async def test_what_a_task_of_the_server_raises_is_logged_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def failing() -> None:
        raise ValueError("no more")

    async def handle(self: Any) -> None:
        self.server.tasks.create_task(failing())
        await self.send(await self.reader.readline())

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        assert await ask(server) == b"x\n"
        assert await ask(server) == b"x\n"
        assert server.is_serving()
    assert "a task of the server raised" in caplog.text
    assert "no more" in caplog.text
    assert not server.has_failed()


# Its time to end was as long as that of the handler: the two were cut off together, before finish() was called.
@pytest.mark.parametrize("how", ["kick", "grace"])
@pytest.mark.parametrize("base", [aioecho.StreamRequestHandler, aioecho.DatagramSessionHandler])
async def test_finish_is_called_though_a_task_would_not_end(
    base: type[Any], how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aioecho.serving.running.SWALLOWED_FOR", 0.3)  # and a stage of a drain has 0.25
    stubborn = Stubborn()
    finished: list[int] = []

    class Accompanied(base):  # type: ignore[misc]
        async def handle(self) -> None:
            self.tasks.create_task(stubborn.run())
            await asyncio.Event().wait()

        async def finish(self) -> None:
            await asyncio.sleep(0)
            finished.append(len(self.server.connections))

    is_stream = base is aioecho.StreamRequestHandler
    async with stubborn:
        async with (aioecho.TCPServer if is_stream else aioecho.UDPServer)(ANYWHERE, Accompanied) as server:
            with socket.socket(type=socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM) as sock:
                sock.connect(server.server_address)
                sock.send(b"x")
                await settle(lambda: stubborn.tasks)
                await settle()
                if how == "kick":
                    for connection in server.connections:
                        connection.kick()
                    await settle(lambda: not server.connections)
                report = await server.shutdown(0)
        assert finished == [1]
        assert server.stats.reasons == {"kicked" if how == "kick" else "cancelled": 1}
        assert report.aborted == (how == "grace")
        assert caplog.text.count("would not end when cancelled") == 1 + (how == "grace")
        assert not server.beside
