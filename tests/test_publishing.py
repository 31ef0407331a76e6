"""Messages to the clients of all worker processes: over real channels in this process, and in a program."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, close
from programs import Program, connect, read_line

import aioecho
from aioecho.echo import DatagramEcho
from aioecho.workers import publishing as publishing_module
from aioecho.workers.channel import Channel
from aioecho.workers.publishing import Publishing, Relay


class Subscriber(aioecho.StreamRequestHandler):
    """Joins the group of its client's first line, and publishes the others there."""

    async def handle(self) -> None:
        topic = (await self.reader.readline()).decode().strip()
        self.join(topic)
        await self.send(b"joined\n")
        async for line in self.reader:
            self.server.publish(topic, line, but=self)


async def member(server: aioecho.BaseServer, topic: bytes = b"news\n") -> Any:
    reader, writer = await asyncio.open_connection(*server.server_address[:2])
    writer.write(topic)
    assert await reader.readline() == b"joined\n"
    return reader, writer


class _Process:
    may_have_clients = True
    read_theirs: Any

    def __init__(self, channel: Channel, theirs: Channel) -> None:
        self.channel, self.theirs = channel, theirs


@contextlib.asynccontextmanager
async def workers(count: int) -> AsyncIterator[tuple[list[aioecho.TCPServer], list[Any]]]:
    """Give servers that publish to one another as worker processes do, and what their supervisor has of each."""
    loop = asyncio.get_running_loop()
    processes: list[Any] = []
    relay: Any = Relay(processes)
    async with contextlib.AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(aioecho.TCPServer(ANYWHERE, Subscriber)) for _ in range(count)]
        for server in servers:
            ours, theirs = (Channel(sock) for sock in socket.socketpair())
            process = _Process(ours, theirs)
            processes.append(process)
            side = Publishing(server, theirs)

            def read_ours(process: _Process = process) -> None:
                for message in process.channel.receive():
                    relay.on_publish(process, message)

            def read_theirs(theirs: Channel = theirs, side: Publishing = side) -> None:
                for message in theirs.receive():
                    (side.on_published if message[""] == "published" else side.on_unpublished)(message)

            process.read_theirs = read_theirs
            for channel, read in ((ours, read_ours), (theirs, read_theirs)):
                channel.attach(loop)
                loop.add_reader(channel.sock.fileno(), read)
                stack.callback(channel.close)
                stack.callback(loop.remove_reader, channel.sock.fileno())
        yield servers, processes


async def test_what_is_published_reaches_the_group_in_all_processes_in_order() -> None:
    async with workers(3) as (servers, _):
        members = [await member(server) for server in servers]
        elsewhere = await member(servers[1], b"weather\n")
        assert servers[0].publish("news", b"0\n") == 1
        for number in range(1, 100):
            servers[0].publish("news", b"%d\n" % number)
        servers[0].publish("weather", bytes(range(11, 256)) + b"\n")
        for reader, _ in members:
            assert [await reader.readline() for _ in range(100)] == [b"%d\n" % number for number in range(100)]
        assert await elsewhere[0].readline() == bytes(range(11, 256)) + b"\n"
        # The speaker itself is left out, and no other.
        members[2][1].write(b"hello\n")
        assert await members[0][0].readline() == b"hello\n"
        servers[1].publish("news", b"end\n")
        assert await members[2][0].readline() == b"end\n"
        for _, writer in (*members, elsewhere):
            await close(writer)
        assert [server.stats.unpublished for server in servers] == [0, 0, 0]


async def test_what_a_process_that_hangs_misses_is_counted_there_once_it_reads_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing_module, "MOST_UNSENT", 2**17)
    loop = asyncio.get_running_loop()
    async with workers(3) as (servers, processes):
        members = [await member(server) for server in servers]
        loop.remove_reader(processes[1].theirs.sock.fileno())  # it hangs
        sent, data = 0, b"x" * 2**15 + b"\n"
        while processes[1].channel.unsent <= 2**17 or sent < 20:
            servers[0].publish("news", data)
            sent += 1
            assert await members[0][0].readline() == data
            assert await members[2][0].readline() == data
        servers[0].publish("news", b"missed\n")
        assert await members[2][0].readline() == b"missed\n"  # the relay has passed it on, as far as it does
        loop.add_reader(processes[1].theirs.sock.fileno(), processes[1].read_theirs)
        await settle(lambda: servers[1].stats.unpublished)
        got = sent + 1 - servers[1].stats.unpublished
        servers[0].publish("news", b"end\n")
        lines = []
        while (line := await members[1][0].readline()) != b"end\n":
            lines.append(line)
        assert len(lines) == got < sent
        assert [server.stats.unpublished for server in servers][::2] == [0, 0]
        for _, writer in members:
            await close(writer)


async def test_what_does_not_reach_the_parent_is_counted_where_it_was_published(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publishing_module, "MOST_UNSENT", 2**17)
    async with workers(2) as (servers, processes):
        count = 0
        while processes[0].theirs.unsent <= 2**17:  # no turn of the loop, so that the parent does not read
            servers[0].publish("news", b"x" * 2**15)
            count += 1
        servers[0].publish("news", b"x")
        assert servers[0].stats.unpublished == 1
        assert "aioecho_published_dropped_total 1" in servers[0].metrics().text()


async def test_without_workers_it_is_a_broadcast_to_the_group() -> None:
    handlers: Any = {Subscriber: "tcp://127.0.0.1:0", DatagramEcho: "udp://127.0.0.1:0"}
    async with aioecho.serve(handlers) as server:
        reader, writer = await member(server)
        parts: Any = server
        assert [part.publish("news", b"hello\n") for part in (server, *parts.parts)] == [1, 1, 1]
        assert parts.parts[1].broadcast(b"hello\n") == 1
        assert await reader.readexactly(24) == b"hello\n" * 4
        await close(writer)
        with pytest.raises(TypeError, match="a topic is a str"):
            server.publish(b"news", b"x")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="is more than the 1048576"):
            server.publish("news", b"x" * (2**20 + 1))
    async with aioecho.serve(DatagramEcho, "udp://127.0.0.1:0") as server:
        with pytest.raises(TypeError, match="is for streams"):
            server.publish("news", b"x")


PROGRAM = """
import contextlib
import os
import aioecho

class Member(aioecho.StreamRequestHandler):
    async def handle(self):
        self.join("news")
        await self.send(b"%d\\n" % os.getpid())
        async for line in self.reader:
            if line == b"broadcast\\n":
                try:
                    self.server.broadcast(line, to="news")
                except RuntimeError as error:
                    await self.send(f"{error}\\n".encode())
                self.server.broadcast(b"local\\n", to="news", local=True)
            else:
                self.server.publish("news", line)

if __name__ == "__main__":
    aioecho.run(Member, "unix:s", workers=2)
"""


def test_in_a_program_it_reaches_the_other_worker_and_a_broadcast_says_that_it_would_not(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with Program(sys.executable, "program.py", cwd=tmp_path) as program, contextlib.ExitStack() as stack:
        by_process: dict[bytes, Any] = {}
        while len(by_process) < 2:
            with contextlib.suppress(OSError):
                sock = stack.enter_context(connect(f"unix:{tmp_path / 's'}"))
                by_process.setdefault(read_line(sock), sock)
        one, other = by_process.values()
        one.sendall(b"hello\n")
        assert read_line(other) == b"hello\n"
        assert read_line(one) == b"hello\n"
        one.sendall(b"broadcast\n")
        assert b"use server.publish(group, data), or broadcast(..., local=True)" in read_line(one)
        assert read_line(one) == b"local\n"
        one.sendall(b"end\n")
        assert read_line(other) == b"end\n"
        stack.close()
        assert program.stop() == 0, program.stderr()
