"""A server's class that run() is given, and the servers that a factory gives, as one program."""

import asyncio
import contextlib
import functools
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ask, ask_by_datagram, check_mistake, close, invoke, needs_ipv6
from programs import Program, can_connect, eventually
from programs import ask as ask_program

import aioecho
from aioecho.echo import DatagramUpper, Echo, Upper
from aioecho.several import is_factory, make_servers
from aioecho.workers.program import make_servers_in_worker
from aioecho.workers.single import run_server


class Choosy(aioecho.TCPServer):
    def verify_request(self, request: Any, client_address: Any) -> bool:
        return False


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=needs_ipv6)])
async def test_a_server_is_of_the_class_that_is_asked_for(count: int) -> None:
    endpoints = ["tcp://127.0.0.1:0", "tcp://[::1]:0"][:count]
    async with aioecho.serve(Echo, *endpoints, server_class=Choosy) as server:
        assert type(server) is Choosy
        assert len(server.sockets) == count
        reader, writer = await asyncio.open_connection(*server.server_address[:2])
        assert await reader.read() == b""
        await close(writer)
        await settle(lambda: server.stats.rejected == 1)


async def test_a_class_of_unix_or_datagram_servers_takes_endpoints_too(tmp_path: Path) -> None:
    class Unix(aioecho.UnixStreamServer):
        pass

    class UDP(aioecho.UDPServer):
        pass

    async with aioecho.serve(Upper, f"unix:{tmp_path / 's'}?mode=600", server_class=Unix) as server:
        assert server.names == (f"unix:{tmp_path / 's'}",)
    async with aioecho.serve(DatagramUpper, "udp://127.0.0.1:0", server_class=UDP) as server:
        assert await asyncio.to_thread(ask_by_datagram, server.names[0]) == b"HELLO"


def test_a_class_that_is_none_of_servers_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="server_class is a subclass of"):
        aioecho.serve(Echo, "tcp://127.0.0.1:0", server_class=Echo)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="server_class=Choosy"):
        aioecho.run(Choosy, "tcp://127.0.0.1:0")


def two() -> list[aioecho.BaseServer]:
    return [
        aioecho.TCPServer(ANYWHERE, Upper, limits=aioecho.Limits(max_connections=7)),
        aioecho.TCPServer(ANYWHERE, Echo, limits=aioecho.Limits(max_connections=1)),
        aioecho.serve({Upper: "tcp://127.0.0.1:0", DatagramUpper: "udp://127.0.0.1:0"}),
    ]


async def test_servers_of_a_factory_are_one_program_with_limits_of_their_own() -> None:
    program: Any = make_servers(two)
    async with program:
        upper, echo, service = program._parts
        assert len(program.names) == 4
        assert await ask(upper) == b"X\n"
        assert await ask(echo) == b"x\n"
        assert await ask(service) == b"X\n"
        assert await asyncio.to_thread(ask_by_datagram, service.names[1]) == b"HELLO"
        assert (upper.limits.max_connections, echo.limits.max_connections) == (7, 1)
        program.limits = aioecho.Limits(max_connections=5)
        assert (upper.limits.max_connections, echo.limits.max_connections) == (5, 1)
        await settle(lambda: not program.connections)
        assert program.stats.streams.accepted == 3
        assert program.stats.datagrams.received == 1
        assert "aioecho_connections_total 3" in program.metrics().text()
        for server in (upper, echo, *service.parts):
            check_identity(server)
    assert not program.is_serving()


async def test_a_stop_of_one_stops_all_and_lifespans_are_left_when_all_have_drained() -> None:
    events: list[Any] = []
    servers: list[aioecho.BaseServer] = []

    @contextlib.asynccontextmanager
    async def lifespan(name: str, server: aioecho.BaseServer) -> AsyncIterator[str]:
        events.append(f"{name} begins")
        yield name
        events.append((f"{name} ends", [len(each.connections) for each in servers]))

    class Slow(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.readline()
            await asyncio.sleep(0.05)
            await self.send(self.state.encode())

    servers += [
        aioecho.TCPServer(ANYWHERE, Echo, lifespan=functools.partial(lifespan, "one")),
        aioecho.TCPServer(ANYWHERE, Slow, lifespan=functools.partial(lifespan, "two")),
    ]
    program = make_servers(lambda: servers)
    serving = asyncio.create_task(program.serve_forever())
    await settle(lambda: all(server.is_serving() for server in servers))
    reader, writer = await asyncio.open_connection(*servers[1].server_address)
    writer.write(b"x\n")
    await settle(lambda: bool(servers[1].connections))
    servers[0].begin_shutdown()
    await serving
    assert await reader.read() == b"two"
    await close(writer)
    assert events[:2] == ["one begins", "two begins"]
    assert sorted(events[2:]) == [("one ends", [0, 0]), ("two ends", [0, 0])]
    assert not program.has_failed()


async def test_messages_between_workers_that_fit_no_server_are_dropped_and_lost_ones_count_for_streams() -> None:
    servers = [aioecho.UDPServer(ANYWHERE, DatagramUpper), aioecho.TCPServer(ANYWHERE, Echo)]
    program: Any = make_servers(lambda: servers)
    async with program:
        for topic in ("1:news", "7:news", "news"):  # as a worker sends that has other servers
            program.deliver(topic, b"x", "close")
        program.note_unpublished(2)
        assert program.stats.streams.unpublished == servers[1].stats.unpublished == 2


async def test_where_one_cannot_start_none_serves_and_lifespans_are_left() -> None:
    events: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(server: aioecho.BaseServer) -> AsyncIterator[None]:
        yield
        events.append("left")

    async with aioecho.TCPServer(ANYWHERE, Echo) as other:
        servers = [
            aioecho.TCPServer(ANYWHERE, Echo, lifespan=lifespan),
            aioecho.TCPServer(other.server_address, Echo),
        ]
        program = make_servers(lambda: servers)
        with pytest.raises(aioecho.EndpointError):
            await program.start()
        assert events == ["left"]
        assert not program.is_serving()


async def test_a_server_that_is_paused_or_resumed_while_the_program_starts_stays_so() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(server: aioecho.BaseServer) -> AsyncIterator[None]:
        servers[0].pause()
        servers[1].resume()
        assert not program.is_serving()
        yield

    servers = [
        aioecho.TCPServer(ANYWHERE, Echo),
        aioecho.TCPServer(ANYWHERE, Echo),
        aioecho.TCPServer(ANYWHERE, Echo, lifespan=lifespan),
    ]
    program = make_servers(lambda: servers)
    servers[1].pause()
    async with program:
        assert [server.is_paused for server in servers] == [True, False, False]
        assert await ask(servers[1]) == await ask(servers[2]) == b"x\n"


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (None, "returned None"),
        ([], "returned no server"),
        ([Echo], "returned "),
        (lambda: aioecho.TCPServer(ANYWHERE, Echo), None),
    ],
)
def test_what_a_factory_gives_is_checked(found: Any, error: str | None) -> None:
    if error is None:
        assert isinstance(make_servers(found), aioecho.TCPServer)
        return
    with pytest.raises((TypeError, ValueError), match=error):
        make_servers(lambda: found)


def test_a_factory_that_has_other_endpoints_by_now_is_not_served() -> None:
    with pytest.raises(aioecho.AioechoError, match="has 4 endpoints now, and had 1 when the program started"):
        make_servers_in_worker(two, None, [["fd://0"]])


def test_a_factory_is_told_from_what_makes_handlers() -> None:
    async def handle(reader: Any, writer: Any) -> None: ...

    assert is_factory(two)
    assert is_factory(functools.partial(lambda text: two(), "x"))
    for other in (Echo, handle, {}, lambda request, client_address, server: None, functools.partial(Echo)):
        assert not is_factory(other)
    with pytest.raises(TypeError, match="limits: with a factory"):
        aioecho.run(two, limits=aioecho.Limits())


PROGRAM = """
import os
import aioecho
from aioecho.echo import Upper

class Admin(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(f"{self.server.limits.max_connections} {self.server.state}".encode())

class Server(aioecho.TCPServer):
    pass

def make():
    return [
        Server(["unix:a"], Upper),
        aioecho.serve(Admin, "unix:b", limits=aioecho.Limits(max_connections=3)),
    ]

if __name__ == "__main__":
    aioecho.run(make, workers=2)
"""


@pytest.mark.parametrize("by", ["run", "shell", "shell with workers"])
def test_a_factory_is_served_by_run_and_from_the_shell(tmp_path: Path, by: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    shell = ["-m", "aioecho", "serve", "program:make", "--factory"]
    command = ["program.py"] if by == "run" else [*shell, "--workers", "2"] if by.endswith("workers") else shell
    with Program(sys.executable, *command, cwd=tmp_path) as program:
        if by != "run":
            assert [program.listening() for _ in range(2)] == ["unix:a", "unix:b"]
        for name, expected in (("a", b"HELLO\n"), ("b", b"3 None")):
            eventually(lambda: can_connect(f"unix:{tmp_path / name}"))  # noqa: B023 - at once
            assert ask_program(f"unix:{tmp_path / name}", b"hello\n") == expected
        assert program.stop() == 0, program.stderr()


def test_options_of_servers_do_not_go_with_a_factory(tmp_path: Path) -> None:
    (tmp_path / "factories.py").write_text("def make():\n    return None\n")
    check_mistake(invoke("serve", "factories:make", "--factory", "--port", "0", cwd=tmp_path), "--port and --factory")
    check_mistake(invoke("serve", "factories:make", "--factory", cwd=tmp_path), "make returned None")


def test_one_server_of_a_factory_is_run_as_it_is() -> None:
    server = make_servers(lambda: aioecho.TCPServer(ANYWHERE, Echo))
    report = run_server(server, loop="asyncio", when_serving=lambda server: server.begin_shutdown())
    assert report.completed == 0
