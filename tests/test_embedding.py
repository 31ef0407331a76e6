"""Servers inside applications: several in a loop, many in a process, and nothing of the application's touched."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ask

import aioecho
from aioecho.echo import Daytime, Echo, Upper


def handlers() -> dict[signal.Signals, Any]:
    """Return what is set for each signal, in this process."""
    return {number: signal.getsignal(number) for number in signal.valid_signals() if isinstance(number, signal.Signals)}


async def test_several_servers_live_in_one_loop() -> None:
    async with (
        aioecho.TCPServer(("127.0.0.1", 0), Echo) as echo,
        aioecho.TCPServer(("127.0.0.1", 0), Upper) as upper,
        aioecho.serve(Daytime, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0") as daytime,
    ):
        servers = [echo, upper, daytime]
        replies = await asyncio.gather(*(ask(server.server_address, b"hello\n") for server in servers))
        assert replies[:2] == [b"hello\n", b"HELLO\n"]
        assert replies[2].endswith(b"UTC\r\n")
        await upper.shutdown()
        assert not upper.is_serving()
        assert await ask(echo.server_address, b"still here") == b"still here"
        for server in servers:
            await settle(lambda server=server: server.stats.active == 0)  # type: ignore[misc]
            check_identity(server)
        assert [server.stats.accepted for server in servers] == [2, 1, 1]


async def test_an_address_serves_one_server_after_the_other() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        address = server.server_address
    for handler, reply in [(Upper, b"HELLO"), (Echo, b"hello")] * 10:
        async with aioecho.TCPServer(address, handler):
            assert await ask(address, b"hello") == reply


async def test_inside_an_application_no_signal_is_touched() -> None:
    def own(number: int, frame: FrameType | None) -> None:
        """The application's handler."""

    previous = signal.signal(signal.SIGTERM, own)
    try:
        before = handlers()
        server = aioecho.serve(Upper, "tcp://127.0.0.1:0")
        async with server:
            assert handlers() == before
            serving = asyncio.create_task(server.serve_forever())
            assert await ask(server.server_address, b"hello\n") == b"HELLO\n"
            assert handlers() == before
            await server.shutdown()
            await serving
        assert handlers() == before
        assert before[signal.SIGTERM] is own
    finally:
        signal.signal(signal.SIGTERM, previous)


async def test_a_signal_of_the_applications_can_shut_it_down() -> None:
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, told.set)
    try:
        async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
            signal.raise_signal(signal.SIGUSR1)
            await told.wait()
            assert await ask(server.server_address, b"hello\n") == b"HELLO\n"
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


async def test_beside_other_tasks_it_is_shut_down_when_one_of_them_fails() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Upper)
    await server.start()
    address = server.server_address

    async def fail() -> None:
        assert await ask(address, b"hello\n") == b"HELLO\n"
        raise LookupError("another part of the application")

    async def application() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.serve_forever())
            tasks.create_task(fail())

    with pytest.raises(ExceptionGroup) as caught:
        await application()
    assert caught.group_contains(LookupError)
    assert not server.is_serving()
    with pytest.raises(ConnectionRefusedError):
        await ask(address, b"")


async def test_serve_forever_returns_when_another_task_shuts_it_down() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Upper)
    serving = asyncio.create_task(server.serve_forever())
    await settle(server.is_serving)
    report = await server.shutdown()
    await serving
    assert (report.completed, report.cancelled, report.aborted) == (0, 0, 0)


def test_a_loop_in_another_thread_can_have_a_server() -> None:
    started: Any = None
    ready, over = threading.Event(), threading.Event()

    async def serve() -> None:
        nonlocal started
        async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
            started = (asyncio.get_running_loop(), server)
            address.append(server.server_address)
            ready.set()
            await server.serve_forever()
        over.set()

    address: list[Any] = []
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    with socket.create_connection(address[0]) as sock:
        sock.sendall(b"hello\n")
        assert sock.recv(100) == b"HELLO\n"
    loop, server = started
    asyncio.run_coroutine_threadsafe(server.shutdown(), loop).result(30)
    thread.join(30)
    assert over.is_set()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn", "ignore::DeprecationWarning:websockets")
async def test_in_the_lifespan_of_a_web_application_signals_stay_the_web_servers() -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    seen: list[dict[signal.Signals, Any]] = []
    started = asyncio.Event()
    upper = aioecho.TCPServer(("127.0.0.1", 0), Upper)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        seen.append(handlers())
        async with upper:
            seen.append(handlers())
            yield
        seen.append(handlers())

    async def accepted(request: object) -> PlainTextResponse:
        return PlainTextResponse(f"{upper.stats.accepted} accepted")

    class WebServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    app = Starlette(lifespan=lifespan, routes=[Route("/", accepted)])
    web = WebServer(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", ws="none"))
    before = handlers()
    running = asyncio.create_task(web.serve())
    await started.wait()
    during = handlers()
    assert await ask(upper.server_address, b"hello\n") == b"HELLO\n"
    address = web.servers[0].sockets[0].getsockname()
    reply = await ask(address, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert reply.endswith(b"1 accepted")
    web.should_exit = True
    await running
    assert not upper.is_serving()
    assert during[signal.SIGTERM] != before[signal.SIGTERM]  # uvicorn's
    assert seen == [during] * 3
    assert handlers() == before
