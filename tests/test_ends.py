"""How requests end: whose doing it was, the one reason for each end, and what the log tells of it."""

import asyncio
import contextlib
import logging
import re
import socket
import socketserver
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ask, close, handler, reset

import aioecho
from aioecho.exceptions import LineTooLong
from aioecho.framing import LengthPrefixed, Netstrings
from aioecho.runtime.logs import format_address
from aioecho.serving.ends import OUTCOMES, Outcome, Reason

PAGE = Path(__file__).parent.parent / "docs" / "pages" / "logging.md"

# What goes wrong


class ReadLines(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            await self.send(line)


class InGroup(aioecho.StreamRequestHandler):
    """One task reads, another waits to push."""

    async def read(self) -> None:
        async for line in self.reader:
            await self.send(line)

    async def handle(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.read())
            tasks.create_task(asyncio.Event().wait())


class ReadFrames(aioecho.StreamRequestHandler):
    framing = Netstrings(max_size=10)

    async def handle(self) -> None:
        async for frame in self.frames:
            await self.send_frame(frame)


class ReadExactly(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while True:
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            await self.send(await self.reader.readexactly(size))


class ReadUntil(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while True:
            await self.send(await self.reader.readuntil(b";"))


class BlockingLines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class BlockingSocket(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(100):
            self.request.sendall(data)


class ImpatientFile(BlockingLines):
    timeout = 0.05


class ImpatientSocket(BlockingSocket):
    def setup(self) -> None:
        self.request.settimeout(0.05)


async def talk(server: aioecho.BaseServer, sent: bytes, received: int, end: str) -> None:
    reader, writer = await asyncio.open_connection(*server.server_address)
    writer.write(sent)
    if received:
        await reader.readexactly(received)
    if end == "reset":
        reset(writer.get_extra_info("socket").dup())
        writer.transport.abort()
    elif end == "close":
        writer.write_eof()
    with contextlib.suppress(ConnectionError):
        await reader.read()
    await close(writer)


@pytest.mark.parametrize(
    ("kind", "sent", "received", "end", "reason"),
    [
        (ReadLines, b"x\n", 2, "reset", "connection lost"),
        (InGroup, b"x\n", 2, "reset", "connection lost"),
        (BlockingLines, b"x\n", 2, "reset", "connection lost"),
        (BlockingSocket, b"x\n", 2, "reset", "connection lost"),
        (ReadLines, b"x" * 70_000, 0, "close", "too long"),
        (InGroup, b"x" * 70_000, 0, "close", "too long"),
        (ReadUntil, b"x" * 70_000, 0, "close", "too long"),
        (ReadExactly, b"\x7f\xff\xff\xff", 0, "close", "too long"),
        (ReadFrames, b"9999999:x", 0, "close", "too long"),
        (ReadFrames, b"no number", 0, "close", "framing"),
        (ReadFrames, b"5:hi", 0, "close", "incomplete"),
        (ReadExactly, b"\0\0", 0, "close", "incomplete"),
        (ReadExactly, b"\0\0\0\2", 0, "close", "incomplete"),
        (ReadExactly, b"\0\0\0\2hi\0", 2, "close", "incomplete"),
        (ReadUntil, b"x", 0, "close", "incomplete"),
        (ReadExactly, b"", 0, "close", "finished"),
        (ReadExactly, b"\0\0\0\2hi", 2, "close", "finished"),
        (ReadUntil, b"x;", 2, "close", "finished"),
        (ImpatientFile, b"", 0, "wait", "timeout"),
        (ImpatientSocket, b"x", 1, "wait", "timeout"),
    ],
)
async def test_what_the_peer_does_has_a_reason_of_its_own_and_is_no_error(
    kind: Any, sent: bytes, received: int, end: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="aioecho")
    async with aioecho.TCPServer(ANYWHERE, kind) as server:
        await talk(server, sent, received, end)
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {reason: 1}
        assert getattr(server.stats, OUTCOMES[reason]) == 1
        check_identity(server)
        told = [
            record for record in caplog.records if record.name == "aioecho.server" and "listening" not in record.msg
        ]
    assert not [record for record in told if record.levelno > logging.DEBUG or record.exc_info]
    assert len(told) == (reason != "finished")


async def test_ten_ordinary_clients_of_a_length_prefixed_protocol_are_completed() -> None:
    async with aioecho.TCPServer(ANYWHERE, ReadExactly) as server:
        for _ in range(10):
            await talk(server, b"\0\0\0\2hi", 2, "close")
        await settle(lambda: not server.connections)
        assert (server.stats.completed, server.stats.failed) == (10, 0)


async def test_a_sink_that_is_one_way_may_be_left_between_two_frames() -> None:
    class Sink(aioecho.StreamRequestHandler):
        one_way = True

        async def handle(self) -> None:
            while True:
                await self.reader.readexactly(4)

    async with aioecho.TCPServer(ANYWHERE, Sink) as server:
        await talk(server, b"full", 0, "close")
        await talk(server, b"fullhalf"[:6], 0, "close")
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"finished": 1, "incomplete": 1}


# Mistakes


class WaitsTooLong(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()


class MixesBoth(InGroup):
    async def read(self) -> None:
        try:
            await super().read()
        finally:
            raise LookupError("a mistake")


class RaisesInGroup(InGroup):
    async def read(self) -> None:
        try:
            await super().read()
        except ConnectionError as error:
            raise ExceptionGroup("of both", [error, LookupError("a mistake")]) from None


class LosesADatabase(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.reader.read(100)
        raise ConnectionResetError("by the database")


class BlockingLosesADatabase(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(100)
        raise ConnectionResetError("by the database")


class BlockingWaitsForOthers(socketserver.StreamRequestHandler):
    timeout = 10

    def handle(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, ours.makefile("rb") as file:
            ours.settimeout(0.01)
            file.read(1)


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        (WaitsTooLong, "wait"),
        (MixesBoth, "reset"),
        (RaisesInGroup, "reset"),
        (LosesADatabase, "close"),
        (BlockingLosesADatabase, "close"),
        (BlockingWaitsForOthers, "wait"),
    ],
)
async def test_a_mistake_of_the_handlers_is_an_error_with_its_own_frames(
    kind: Any, end: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with aioecho.TCPServer(ANYWHERE, kind) as server:
        await talk(server, b"x\n", 2 if issubclass(kind, InGroup) else 0, end)
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"error": 1}
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert re.search(r"connection from 127\.0\.0\.1:\d+ raised$", record.getMessage())
    assert record.exc_info is not None
    assert record.exc_info[2] is not None
    assert record.exc_info[2].tb_frame.f_code.co_name == "handle"
    assert record.exc_info[2].tb_frame.f_code.co_filename == __file__


async def test_a_traceback_without_a_frame_of_the_handlers_stays_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(aioecho.StreamRequestHandler):
        def handle(self) -> Any:  # what it returns cannot be told at the start
            return self.label

    async with aioecho.TCPServer(ANYWHERE, Plain) as server:
        await ask(server)
        await settle(lambda: not server.connections)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert record.exc_info[2] is not None
    assert "define it as `async def handle(self)`" in caplog.text


# Of other connections


class Room(aioecho.StreamRequestHandler):
    listeners: ClassVar[list[Any]]

    async def handle(self) -> None:
        if await self.reader.readline() == b"listen\n":
            self.listeners.append(self)
            await asyncio.Event().wait()
        while True:
            await self.listeners[0].send(b"x" * 2**16)


@pytest.mark.parametrize("how", ["reset", "silent", "closed by its handler"])
async def test_an_error_of_another_connection_is_not_blamed_on_this_one(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    room: Any = type("Own", (Room,), {"listeners": []})
    async with aioecho.TCPServer(ANYWHERE, room, grace=0, timeouts=aioecho.Timeouts(write=0.1)) as server:
        with socket.create_connection(server.server_address) as listener:
            address = format_address(listener.getsockname())
            listener.sendall(b"listen\n")
            await settle(lambda: room.listeners)
            if how == "reset":
                reset(listener)
            elif how != "silent":
                room.listeners[0].writer.close()
            assert await ask(server, b"speak\n") == b""
            await settle(lambda: server.stats.reasons["error"])
        [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
        assert f"raised what the connection with {address} met" in record.getMessage()
        check_identity(server)


# What handle_error() can tell


@pytest.mark.parametrize(
    ("kind", "sent", "end", "is_peers"),
    [
        (InGroup, b"x\n", "reset", True),
        (BlockingSocket, b"x\n", "reset", True),
        (ReadLines, b"x" * 70_000, "close", True),
        (LosesADatabase, b"x\n", "close", False),
        (BlockingLosesADatabase, b"x\n", "close", False),
    ],
)
async def test_handle_error_can_tell_whose_fault_it_is(kind: Any, sent: bytes, end: str, is_peers: bool) -> None:
    told: list[bool] = []

    class Own(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            error = sys.exception()
            assert error is not None
            told.append(self.is_peers_fault(error))

    async with Own(ANYWHERE, kind) as server:
        await talk(server, sent, 2 if end == "reset" else 0, end)
        await settle(lambda: not server.connections)
    assert told == [is_peers]


def test_elsewhere_the_type_alone_tells_whose_fault_it_is() -> None:
    server = aioecho.TCPServer(ANYWHERE, ReadLines)
    assert server.is_peers_fault(LineTooLong(None, 10))
    assert server.is_peers_fault(ExceptionGroup("", [aioecho.ConnectionTimeout("idle", 1)]))
    assert not server.is_peers_fault(ConnectionResetError())
    assert not server.is_peers_fault(ExceptionGroup("", [aioecho.ConnectionTimeout("idle", 1), ValueError()]))


# Datagrams


class SplitsDatagram(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        frames, _, _ = LengthPrefixed(1, max_size=10).split(self.data)
        self.reply(b"".join(frames))


class SplitsInSession(aioecho.DatagramSessionHandler):
    async def handle(self) -> None:
        async for data in self.datagrams:
            LengthPrefixed(1, max_size=10).split(data)


class BlockingDatagram(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        LengthPrefixed(1, max_size=10).split(self.request[0])


@pytest.mark.parametrize("kind", [SplitsDatagram, SplitsInSession, BlockingDatagram])
async def test_a_datagram_that_its_framing_does_not_allow_is_the_peers_doing(
    kind: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with aioecho.UDPServer(ANYWHERE, kind) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"\xffx", server.server_address)
            await settle(lambda: server.stats.failed == 1)
        assert server.stats.reasons == {"too long": 1}
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


# A lost peer in a drain


async def test_a_lost_peer_is_not_counted_as_cancelled_by_a_stop() -> None:
    class Waits(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.readline()
            await asyncio.Event().wait()

    server = aioecho.TCPServer(ANYWHERE, Waits)
    await server.start()
    there, lost = (socket.create_connection(server.server_address) for _ in range(2))
    for sock in (there, lost):
        sock.sendall(b"x\n")
    await settle(lambda: len(server.connections) == 2)
    reset(lost)
    await settle(lambda: any(connection.is_peer_lost() for connection in server.connections))
    report = await server.shutdown(grace=0)
    there.close()
    assert (report.completed, report.cancelled, report.aborted) == (1, 1, 0)
    assert server.stats.reasons == {"connection lost": 1, "cancelled": 1}
    check_identity(server)


async def test_a_lost_peer_of_a_blocking_handler_is_not_counted_as_cancelled_by_a_stop() -> None:
    began, may_end = threading.Semaphore(0), threading.Event()

    class Waits(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            began.release()
            may_end.wait()

    server = aioecho.TCPServer(ANYWHERE, Waits)
    await server.start()
    there, lost = (socket.create_connection(server.server_address) for _ in range(2))
    for _ in range(2):
        await settle(lambda: began.acquire(blocking=False))
    reset(lost)
    loop = asyncio.get_running_loop()
    stop = loop.create_task(server.shutdown(grace=0))
    loop.call_later(0.05, may_end.set)
    report = await stop
    there.close()
    assert (report.completed, report.cancelled, report.aborted) == (1, 1, 0)
    assert server.stats.reasons == {"connection lost": 1, "cancelled": 1}


# TLS


@pytest.mark.parametrize("kind", [ReadLines, BlockingLines])
async def test_a_health_check_of_a_tls_port_is_no_warning(
    kind: Any, tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="aioecho")
    async with aioecho.TCPServer(ANYWHERE, kind, ssl=tls.server) as server:
        for end in (socket.socket.close, reset if kind is ReadLines else socket.socket.close):
            # Of a blocking handler's, the ssl module leaves a socket unclosed that is reset before it is wrapped.
            end(socket.create_connection(server.server_address))
        await settle(lambda: server.stats.rejected == 2)
        told = [record for record in caplog.records if "no TLS handshake with 127.0.0.1:" in record.getMessage()]
        assert [record.levelname for record in told] == ["DEBUG", "DEBUG"]
        caplog.clear()
        with socket.create_connection(server.server_address) as sock:  # but what is no TLS is one
            sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await settle(lambda: server.stats.rejected == 3)
        [record] = [record for record in caplog.records if "no TLS handshake with" in record.getMessage()]
        assert record.levelname == "WARNING"


# The table, and addresses


def test_the_table_of_reasons_has_them_all_with_their_outcomes() -> None:
    table = PAGE.read_text("utf-8").partition("## Outcomes and reasons")[2]
    rows = re.findall(r"^\| (`.*`) \| (\w+) \|", table, re.MULTILINE)
    found = [(reason, outcome) for reasons, outcome in rows for reason in re.findall(r"`([^`]*)`", reasons)]
    assert sorted(found) == sorted(OUTCOMES.items())


def test_the_reasons_and_outcomes_are_those_of_their_types() -> None:
    assert list(OUTCOMES) == list(get_args(Reason))
    assert set(OUTCOMES.values()) == set(get_args(Outcome))


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("127.0.0.1", 52240), "127.0.0.1:52240"),
        (("::1", 52240, 0, 0), "[::1]:52240"),
        (("fe80::1", 52240, 0, 1), f"[fe80::1%{socket.if_indextoname(1)}]:52240"),
        (("fe80::1%lo", 52240, 0, 1), "[fe80::1%lo]:52240"),
        (("fe80::1", 52240, 0, 999_999), "[fe80::1%999999]:52240"),
        ("", "unix socket"),
        (b"", "unix socket"),
        (None, "unix socket"),
        ("/run/client", "/run/client"),
        (b"\0name", "@name"),
    ],
)
def test_an_address_is_told_as_users_write_it(address: Any, text: str) -> None:
    assert format_address(address) == text


@pytest.mark.parametrize("unread", [b"", b"b\nc"], ids=["all is read", "not all is read"])
async def test_what_is_written_once_the_handler_has_ended_raises(unread: bytes) -> None:
    writers: list[Any] = []

    async def handle(self: Any) -> None:
        await self.reader.readline()
        writers.append(self.writer)

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"a\n" + unread)
        assert await reader.read() == b""
        with pytest.raises(RuntimeError, match="after write_eof"):
            writers[0].write(b"late")
        await close(writer)
        await settle(lambda: not server.stats.active)
        assert server.stats.completed == 1


# It went to the socket: on asyncio's loop it broke the connection, and raised nothing.
async def test_what_is_written_to_the_transport_once_the_handler_has_ended_raises_and_breaks_nothing() -> None:
    transports: list[Any] = []

    async def handle(self: Any) -> None:
        transports.append(self.writer.transport)
        await self.send(await self.reader.readline())

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"a\n")
        assert await reader.read() == b"a\n"
        for _ in range(2):
            with pytest.raises(RuntimeError, match="after write_eof"):
                transports[0].write(b"late")
            await settle()
        assert server.stats.active == 1
        await close(writer)
        await settle(lambda: not server.stats.active)
        assert server.stats.reasons == {"finished": 1}
