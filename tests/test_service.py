"""Streams and datagrams in one server: one start, one drain, one set of signals, one report."""

import asyncio
import signal
import socket
import ssl
import sys
from pathlib import Path

import pytest
from conftest import check_identity, settle
from helpers import ask, ask_by_datagram, close
from programs import Program, connect, read_line
from programs import ask as ask_endpoint

import aioecho
from aioecho.choice import Service
from aioecho.echo import DatagramEcho, DatagramUpper, Echo, Upper
from aioecho.server import StreamServer

TCP, UDP = "tcp://127.0.0.1:0", "udp://127.0.0.1:0"


async def test_streams_and_datagrams_are_served_by_one_server() -> None:
    async with aioecho.serve({Upper: TCP, DatagramEcho: [UDP], DatagramUpper: UDP}) as server:
        assert isinstance(server, Service)
        assert [name.partition(":")[0] for name in server.names] == ["tcp", "udp", "udp"]
        assert server.is_serving()
        streams, echo, upper = (sock.getsockname() for sock in server.sockets)
        assert streams == server.server_address
        assert await ask(streams, b"a\n") == b"A\n"
        assert await asyncio.to_thread(ask_by_datagram, echo, b"b") == b"b"
        assert await asyncio.to_thread(ask_by_datagram, upper, b"c") == b"C"
        await settle(lambda: server.stats.active == 0)
        stats = server.stats
        assert (stats.streams.accepted, stats.datagrams.accepted, stats.datagrams.received) == (1, 2, 2)
        assert (stats.accepted, stats.completed, stats.received, stats.handled) == (3, 3, 2, 2)
        check_identity(server)
    assert not server.is_serving()
    assert server.connections == frozenset()


async def test_the_kind_of_the_server_follows_from_the_endpoints_of_each_class() -> None:
    assert type(aioecho.serve({Echo: TCP, Upper: TCP})) is StreamServer
    assert type(aioecho.serve({Echo: TCP, DatagramEcho: UDP})) is Service
    assert type(aioecho.serve({DatagramEcho: UDP, DatagramUpper: UDP})) is Service
    with pytest.raises(ValueError, match=r"tcp://127\.0\.0\.1:0 is for streams and udp://127\.0\.0\.1:0 is for datagr"):
        aioecho.serve({Echo: [TCP, UDP]})
    with pytest.raises(TypeError, match="give the endpoints of several handler classes with them"):
        aioecho.serve({Echo: TCP, DatagramEcho: UDP}, TCP)
    with pytest.raises(ValueError, match="ssl is for streams"):
        aioecho.serve({DatagramEcho: UDP, DatagramUpper: UDP}, ssl=ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
    with pytest.raises(ValueError, match="grace must be"):
        aioecho.serve({Echo: TCP, DatagramEcho: UDP}, grace=-1)


async def test_all_are_listened_on_or_none() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken, socket.socket() as free:
        taken.bind(("127.0.0.1", 0))
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        server = aioecho.serve(
            {Echo: f"tcp://127.0.0.1:{port}", DatagramEcho: "udp://{}:{}".format(*taken.getsockname())}
        )
        with pytest.raises(aioecho.EndpointError, match=r"udp://.*in use"):
            await server.start()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
    assert (await server.shutdown()).completed == 0


class Waits(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.send(b"begun\n")
        await asyncio.Event().wait()


class DatagramWaits(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        await self.reply(b"begun")
        await asyncio.Event().wait()


async def test_one_drain_reports_both_kinds() -> None:
    server = aioecho.serve({Waits: TCP, DatagramWaits: UDP}, grace=30)
    await server.start()
    serving = asyncio.create_task(server.serve_forever())
    streams, datagrams = (sock.getsockname() for sock in server.sockets)
    reader, writer = await asyncio.open_connection(*streams)
    assert await reader.readline() == b"begun\n"
    assert await asyncio.to_thread(ask_by_datagram, datagrams, b"x") == b"begun"
    assert len(server.connections) == 2
    stopping = asyncio.create_task(server.shutdown())
    await settle(lambda: server.is_draining and not server.is_serving())
    report = await server.shutdown(0)
    assert await stopping == report
    assert (report.completed, report.cancelled, report.aborted) == (0, 2, 0)
    await serving
    await close(writer)
    check_identity(server)


class Stops(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        assert (await self.server.shutdown()).cancelled == 0
        await self.reply(b"stopping")


async def test_a_handler_of_one_kind_stops_both() -> None:
    server = aioecho.serve({Echo: TCP, Stops: UDP})
    await server.start()
    serving = asyncio.create_task(server.serve_forever())
    reader, writer = await asyncio.open_connection(*server.server_address)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    assert await asyncio.to_thread(ask_by_datagram, server.sockets[1].getsockname(), b"stop") == b"stopping"
    assert await reader.read() == b""
    await serving
    await close(writer)


async def test_what_is_set_holds_for_all_parts() -> None:
    async with aioecho.serve({Echo: TCP, DatagramEcho: UDP}) as server:
        assert isinstance(server, Service)
        server.limits = aioecho.Limits(max_connections=7)
        server.timeouts = aioecho.Timeouts(send=3)
        assert {part.limits.max_connections for part in server.parts} == {7}
        assert {part.timeouts.send for part in server.parts} == {3}
        server.pause()
        asking = asyncio.create_task(asyncio.to_thread(ask_by_datagram, server.sockets[1].getsockname(), b"x"))
        asking_stream = asyncio.create_task(ask(server, b"y"))
        await settle()
        assert server.stats.accepted == 0
        server.resume()
        assert (await asking, await asking_stream) == (b"x", b"y")


async def test_limits_may_be_set_in_the_drain_of_a_service_that_was_closed() -> None:
    async with aioecho.serve({Echo: TCP, DatagramEcho: UDP}) as server:
        server.close()
        stopping = asyncio.create_task(server.shutdown())
        await settle(lambda: server.is_draining)
        server.limits = aioecho.Limits(max_connections=7)
        server.resume()
        await stopping


async def test_a_service_without_streams_has_no_broadcasts() -> None:
    async with aioecho.serve({DatagramEcho: UDP, DatagramUpper: UDP}) as server:
        assert isinstance(server, Service)
        for one in (server, *server.parts):
            with pytest.raises(TypeError, match="is for streams"):
                one.broadcast(b"x")
            with pytest.raises(TypeError, match="is for streams"):
                one.publish("news", b"x")


def test_run_in_thread_serves_both() -> None:
    with aioecho.run_in_thread({Echo: TCP, DatagramEcho: UDP}) as background:
        stream, datagram = background.names
        assert ask_endpoint(stream, b"a") == b"a"
        assert ask_by_datagram(datagram, b"b") == b"b"


@pytest.mark.parametrize(("loop", "workers"), [("asyncio", 1), ("uvloop", 2)])
def test_run_serves_both_with_one_exit(tmp_path: Path, loop: str, workers: int) -> None:
    (tmp_path / "both.py").write_text(
        "import logging, sys, aioecho\n"
        "from aioecho.echo import DatagramUpper, Upper\n"
        "logging.basicConfig(level='INFO')\n"
        "if __name__ == '__main__':\n"
        f"    report = aioecho.run({{Upper: {TCP!r}, DatagramUpper: {UDP!r}}}, loop={loop!r}, workers={workers})\n"
        "    print(report.cancelled, report.aborted)\n"
    )
    with Program(sys.executable, tmp_path / "both.py") as program:
        names = [program.says(rf"{kind}://[\d.]+:\d+")[0] for kind in ("tcp", "udp")]
        with connect(names[0]) as sock:
            sock.sendall(b"a\n")
            assert read_line(sock) == b"A\n"
            assert ask_by_datagram(names[1], b"b") == b"B"
            program.signal(signal.SIGUSR1)
            program.says("datagrams")
            program.signal(signal.SIGTERM)
            assert sock.recv(1) == b""
        assert program.end()[:2] == (0, b"0 0\n")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_command_line_takes_a_handler_for_each_endpoint(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "a=b"
    binds = ["--bind", f"upper={TCP}", "--bind", f"upper={UDP}", "--bind", f"unix:{path}?mode=600"]
    with Program.aioecho("serve", "echo", *binds, "--workers", workers) as server:
        names = sorted(server.listening() for _ in range(3))
        assert ask_endpoint(names[0], b"a\n") == b"A\n"
        assert ask_by_datagram(names[1], b"b") == b"B"
        assert ask_endpoint(f"unix:{path}", b"c\n") == b"c\n"
        assert server.stop() == 0


def test_the_command_line_serves_one_name_on_both_kinds() -> None:
    with Program.aioecho("serve", "upper", "--bind", TCP, "--bind", UDP) as server:
        names = sorted(server.listening() for _ in range(2))
        assert (ask_endpoint(names[0], b"a\n"), ask_by_datagram(names[1], b"b")) == (b"A\n", b"B")
        assert server.stop() == 0
