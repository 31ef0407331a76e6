"""One message to the clients of many connections, without waiting for any of them."""

import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, close, handler, reset

import aioecho
from aioecho import testing
from aioecho.echo import DatagramEcho


class Room(aioecho.StreamRequestHandler):
    """Joins the groups that its client names in the first line, and broadcasts the others: `GROUP TEXT`."""

    async def handle(self) -> None:
        for group in (await self.reader.readline()).decode().split():
            self.join(group)
        await self.send(b"joined\n")
        async for line in self.reader:
            group, _, text = line.decode().partition(" ")
            if group == "leave":
                self.leave(text.strip())
                await self.send(b"left\n")
            else:
                self.server.broadcast(text.encode(), to=group, but=self)


class Member:
    """A client that has joined its groups."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def of(cls, server: aioecho.BaseServer, groups: bytes = b"", **options: Any) -> "Member":
        member = cls(*await asyncio.open_connection(*server.server_address[:2], **options))
        member.writer.write(groups + b"\n")
        assert await member.reader.readline() == b"joined\n"
        return member

    async def hear(self) -> bytes:
        return await asyncio.wait_for(self.reader.readline(), 20)


async def test_a_broadcast_is_for_a_group_a_class_or_all_but_one() -> None:
    async with aioecho.TCPServer(ANYWHERE, Room) as server:
        members = [await Member.of(server, groups) for groups in (b"a", b"a b", b"b", b"")]
        assert server.broadcast(b"to a\n", to="a") == 2
        assert server.broadcast(b"to b\n", to="b") == 2
        assert server.broadcast(b"to none\n", to="c") == 0
        assert server.broadcast(b"to rooms\n", to=Room) == 4
        assert server.broadcast(b"to no class\n", to=int) == 0
        [but] = [connection.handler for connection in server.connections][:1]
        assert server.broadcast(b"to all but one\n", but=but) == 3
        assert server.broadcast(b"end\n") == 4
        heard = []
        for member in members:
            lines = []
            while (line := await member.hear()) != b"end\n":
                lines.append(line)
            heard.append(lines)
            await close(member.writer)
        assert [lines[: lines.index(b"to rooms\n")] for lines in heard] == [
            [b"to a\n"],
            [b"to a\n", b"to b\n"],
            [b"to b\n"],
            [],
        ]
        assert sum(b"to all but one\n" in lines for lines in heard) == 3


async def test_groups_are_left_at_once_and_at_the_end() -> None:
    async with aioecho.TCPServer(ANYWHERE, Room) as server:
        one, two = await Member.of(server, b"a b"), await Member.of(server, b"a")
        one.writer.write(b"leave b\n")
        assert await one.hear() == b"left\n"
        assert server.broadcast(b"x\n", to="b") == 0
        one.writer.write(b"leave c\n")  # it was not in it
        assert await one.hear() == b"left\n"
        await close(two.writer)
        await settle(lambda: len(server.connections) == 1)
        assert server.broadcast(b"x\n", to="a") == 1
        await close(one.writer)
        await settle(lambda: not server.connections)
        assert server.broadcast(b"x\n", to="a") == 0
        assert not server.audience._groups
        assert not server.audience._memberships


async def test_what_is_broadcast_comes_in_order_with_what_the_handler_sends() -> None:
    class Counting(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.reader:
                self.writer.write(b"mine " + line)
                self.server.broadcast(b"all " + line)

    async with testing.connect(Counting) as client:
        await client.send(b"".join(b"%d\n" % number for number in range(500)))
        client.write_eof()
        assert await client.read() == b"".join(b"mine %d\nall %d\n" % (number, number) for number in range(500))


async def test_thousands_of_clients_are_written_to_over_several_turns_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioecho.serving.audience.PER_TURN", 3)
    async with aioecho.TCPServer(ANYWHERE, Room) as server:
        members = [await Member.of(server, b"a") for _ in range(10)]
        for number in range(5):
            assert server.broadcast(b"%d\n" % number, to="a") == 10
        await settle()
        for member in members:
            assert [await member.hear() for _ in range(5)] == [b"%d\n" % number for number in range(5)]
            await close(member.writer)


async def test_a_program_that_broadcasts_faster_than_that_is_slowed_down_and_no_message_falls_far_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aioecho.serving.audience.PER_TURN", 3)
    async with aioecho.TCPServer(ANYWHERE, Room) as server:
        members = [await Member.of(server, b"a") for _ in range(10)]
        for number in range(100):  # in one turn of the loop
            server.broadcast(b"%03d\n" % number, to="a")
            assert len(server.audience._under_way) <= 16  # the kernel does not tell at once what has arrived
        for member in members:
            assert await member.reader.readexactly(400) == b"".join(b"%03d\n" % number for number in range(100))
            await close(member.writer)


def deaf(server: aioecho.BaseServer) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(server.server_address[:2])
    sock.sendall(b"a\n")
    assert sock.recv(7) == b"joined\n"
    return sock


@pytest.mark.parametrize("full", ["close", "skip"])
async def test_a_client_that_does_not_read_keeps_nothing_up(full: Any) -> None:
    async with aioecho.TCPServer(ANYWHERE, Room) as server:
        member = await Member.of(server, b"a")
        sock = await asyncio.to_thread(deaf, server)
        message = b"x" * 2**15 + b"\n"
        count = 0
        while not (server.stats.skipped or server.stats.reasons["broadcast"]):
            server.broadcast(message, to="a", most=2**17, full=full)
            count += 1
            assert await member.hear() == message
            await settle()
        if full == "skip":
            assert (server.stats.skipped, len(server.connections)) == (1, 2)
            server.broadcast(b"more\n", to="a", most=2**10 * 200, full=full)
        else:
            await settle(lambda: len(server.connections) == 1)
            server.broadcast(b"more\n", to="a")
        assert await member.hear() == b"more\n"
        if full == "skip":  # whole messages, all but the one that was skipped
            data = b""
            while not data.endswith(b"more\n"):
                data += await asyncio.to_thread(sock.recv, 2**16)
            assert data == message * (count - 1) + b"more\n"
        sock.close()
        await close(member.writer)


async def test_the_reset_of_one_client_does_not_concern_the_speaker() -> None:
    async with aioecho.TCPServer(ANYWHERE, Room) as server:
        speaker, listener = await Member.of(server, b"a"), await Member.of(server, b"a")
        lost = [await asyncio.to_thread(deaf, server) for _ in range(5)]
        for sock in lost:
            reset(sock)
        for number in range(5):
            speaker.writer.write(b"a %d\n" % number)
            assert await listener.hear() == b"%d\n" % number
        await settle(lambda: len(server.connections) == 2)
        assert server.stats.reasons["connection lost"] == 5
        for member in (speaker, listener):
            await close(member.writer)
    assert server.stats.completed == 2


async def test_a_broadcast_is_no_answer() -> None:
    event = asyncio.Event()

    async def handle(self: Any) -> None:
        line = await self.reader.readline()
        await event.wait()
        await self.send(line)

    async with aioecho.TCPServer(ANYWHERE, handler(handle), grace=60) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"question\n")
        [connection] = await settle_connections(server)
        await settle(lambda: bool(connection.is_in_message()))
        assert server.broadcast(b"news\n") == 1
        assert connection.is_in_message()
        event.set()
        assert await reader.read() == b"news\nquestion\n"
        await close(writer)


async def settle_connections(server: aioecho.BaseServer) -> Any:
    await settle(lambda: any(connection.handler is not None for connection in server.connections))
    return server.connections


async def test_clients_whose_setup_waits_and_handlers_that_have_ended_get_none(tmp_path: Path) -> None:
    event = asyncio.Event()

    class Waits(aioecho.StreamRequestHandler):
        async def setup(self) -> None:
            self.join("a")
            await event.wait()

        async def handle(self) -> None:
            await self.send(b"hello\n")
            await self.reader.readline()

        async def finish(self) -> None:
            assert self.server.broadcast(b"left\n", to="a") == 0

    async with aioecho.UnixStreamServer(str(tmp_path / "s"), Waits) as server:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        await settle(lambda: bool(server.audience._memberships))
        assert server.broadcast(b"early\n", to="a") == 0
        event.set()
        assert await reader.readline() == b"hello\n"
        assert server.broadcast(b"news\n", to="a") == 1
        writer.write(b"\n")
        assert await reader.read() == b"news\n"
        await close(writer)
    assert server.stats.completed == 1


async def test_a_broadcast_goes_over_tls_too(tls: SimpleNamespace) -> None:
    async with aioecho.TCPServer(ANYWHERE, Room, ssl=tls.server) as server:
        options = {"ssl": tls.client, "server_hostname": "127.0.0.1"}
        members = [await Member.of(server, b"a", **options) for _ in range(3)]
        for number in range(100):
            server.broadcast(b"%d\n" % number, to="a")
        for member in members:
            assert [await member.hear() for _ in range(100)] == [b"%d\n" % number for number in range(100)]
            await close(member.writer)


async def test_mistakes_are_told() -> None:
    async with aioecho.TCPServer(ANYWHERE, Room) as server:
        with pytest.raises(TypeError, match="bytes, not str"):
            server.broadcast("text")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="more than the 3 that may wait"):
            server.broadcast(b"text", most=3)
        with pytest.raises(ValueError, match="'close' or 'skip', not 'drop'"):
            server.broadcast(b"text", full="drop")  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="event loop: elsewhere use"):
            await asyncio.to_thread(server.broadcast, b"text")
    async with aioecho.serve(DatagramEcho, "udp://127.0.0.1:0") as datagrams:
        with pytest.raises(TypeError, match="for streams"):
            datagrams.broadcast(b"text")


async def test_a_service_of_streams_and_datagrams_broadcasts_to_the_streams() -> None:
    handlers: Any = {Room: "tcp://127.0.0.1:0", DatagramEcho: "udp://127.0.0.1:0"}
    async with aioecho.serve(handlers) as server:
        reader, writer = await asyncio.open_connection(*server.server_address[:2])
        writer.write(b"a\n")
        assert await reader.readline() == b"joined\n"
        assert server.broadcast(b"news\n", to="a") == 1
        assert await reader.readline() == b"news\n"
        await close(writer)
