"""No peer fills the log: bad peers of every kind make few records above DEBUG, with every kind of handler."""

import asyncio
import contextlib
import json
import logging
import math
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ask, reset

import aioecho
from aioecho import Limits, Timeouts
from aioecho.framing import Netstrings
from aioecho.runtime import logs
from aioecho.serving.end_record import MOST_KINDS, MistakeLog

# Seconds that a bad peer goes on; the figures of a longer run are printed with -rP.
SECONDS = float(os.environ.get("AIOECHO_ATTACK_SECONDS", 0.2))
# And how often it acts at the most, unless that is set: a record for each would be far too many.
ACTS = math.inf if "AIOECHO_ATTACK_SECONDS" in os.environ else 20

# Handlers


class Lines(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            await self.send(line)


class Undrained(aioecho.StreamRequestHandler):
    """Writes and writes, and drains never."""

    async def handle(self) -> None:
        async for line in self.reader:
            self.writer.write(line)


class Torrent(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.reader.readline()
        for _ in range(50):
            for _ in range(1000):
                self.writer.write(bytes(64))
            await asyncio.sleep(0)


class Frames(aioecho.StreamRequestHandler):
    framing = Netstrings(max_size=100)

    async def handle(self) -> None:
        async for frame in self.frames:
            await self.send_frame(frame)


class Exactly(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while True:
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            await self.send(await self.reader.readexactly(size))


class Group(aioecho.StreamRequestHandler):
    async def read(self) -> None:
        async for line in self.reader:
            await self.send(line)

    async def handle(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.read())
            tasks.create_task(asyncio.sleep(60))


class Upgrading(aioecho.StreamRequestHandler):
    context: ssl.SSLContext

    async def handle(self) -> None:
        await self.reader.readline()
        await self.writer.start_tls(self.context)
        await self.reader.readline()


class Mistaken(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            int(line)


class BlockingLines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class BlockingMistaken(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        int(self.rfile.readline())


class BlockingImpatient(socketserver.StreamRequestHandler):
    timeout = 0.01

    def handle(self) -> None:
        self.rfile.readline()


class Datagram(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        self.reply(self.data)


class DatagramFrames(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        Netstrings(max_size=10).split(self.data)


class DatagramMistaken(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        int(self.data)


class Session(aioecho.DatagramSessionHandler):
    async def handle(self) -> None:
        async for data in self.datagrams:
            int(data)


class BlockingDatagramMistaken(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        int(self.request[0])


# Peers: each does once what it does, and is called again and again, in a thread.


def sending(data: bytes, end: Callable[[socket.socket], None] = socket.socket.close) -> Callable[[Any], None]:
    def peer(address: Any) -> None:
        sock = socket.create_connection(address, timeout=5)
        with contextlib.suppress(OSError):
            sock.sendall(data)
        end(sock)

    return peer


def reads_on(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        while sock.recv(2**16):
            pass


def half_closes(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
    reads_on(sock)


def resets_after_a_bit(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.recv(1)
    reset(sock)


def ends_after_a_bit(sock: socket.socket) -> None:
    with sock, contextlib.suppress(OSError):
        sock.recv(1)


def resets_over_tls(context: ssl.SSLContext) -> Callable[[Any], None]:
    def peer(address: Any) -> None:
        sock = socket.create_connection(address, timeout=5)
        try:
            wrapped = context.wrap_socket(sock, server_hostname="127.0.0.1")
            wrapped.sendall(b"x\n" * 1000)
            reset(wrapped)
        except OSError:
            sock.close()

    return peer


def refusing_the_certificate(address: Any) -> None:
    context = ssl.create_default_context()
    with (
        socket.create_connection(address, timeout=5) as sock,
        contextlib.suppress(OSError),
        context.wrap_socket(sock, server_hostname="127.0.0.1"),
    ):
        pass


def without_a_certificate(context: ssl.SSLContext) -> Callable[[Any], None]:
    def peer(address: Any) -> None:
        with (
            socket.create_connection(address, timeout=5) as sock,
            contextlib.suppress(OSError),
            context.wrap_socket(sock, server_hostname="127.0.0.1") as wrapped,
        ):
            wrapped.recv(1)

    return peer


def datagrams(data: bytes, count: int = 50) -> Callable[[Any], None]:
    """Send from a new port, and be gone before the replies come."""

    def peer(address: Any) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            with contextlib.suppress(OSError):
                for _ in range(count):
                    sock.send(data)

    return peer


HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(60)

# Of each: a name, the handler, whether TLS is served, the options, the peer.
STREAMS: dict[str, tuple[Any, str, dict[str, Any], Any]] = {
    "long lines": (Lines, "", {}, sending(b"x" * 70_000, reads_on)),
    "long lines in a group": (Group, "", {}, sending(b"x" * 70_000, reads_on)),
    "long lines, reset": (Lines, "", {}, sending(b"x" * 70_000, reset)),
    "resets": (Lines, "", {}, sending(b"x\n" * 1000, reset)),
    "resets in a group": (Group, "", {}, sending(b"x\n" * 1000, resets_after_a_bit)),
    "resets of what is not drained": (Undrained, "", {}, sending(b"x\n" * 50_000, resets_after_a_bit)),
    "resets of a torrent": (Torrent, "", {}, sending(b"\n", resets_after_a_bit)),
    "ends in a torrent": (Torrent, "", {}, sending(b"\n", ends_after_a_bit)),
    "never reads a torrent": (Torrent, "", {"limits": Limits(max_write_buffer=10_000)}, sending(b"\n", half_closes)),
    "resets at once": (Lines, "", {}, sending(b"", reset)),
    "closes at once": (Lines, "", {}, sending(b"")),
    "ends in mid-message": (Exactly, "", {}, sending(b"\0\0\0\5hi", half_closes)),
    "announces too much": (Exactly, "", {}, sending(b"\xff\xff\xff\xff", half_closes)),
    "long frames": (Frames, "", {}, sending(b"999999:", half_closes)),
    "bad frames": (Frames, "", {}, sending(b"no number", half_closes)),
    "is silent": (Lines, "", {"timeouts": Timeouts(idle=0.02)}, sending(b"", reads_on)),
    "drips": (Lines, "", {"timeouts": Timeouts(message=0.02)}, sending(b"x", reads_on)),
    "is too old": (Lines, "", {"timeouts": Timeouts(max_age=0.02)}, sending(b"x\n", reads_on)),
    "takes too long": (Group, "", {"timeouts": Timeouts(handler=0.02)}, sending(b"x\n", reads_on)),
    "is one of too many": (Lines, "", {"limits": Limits(max_connections=1, overflow="reject")}, sending(b"x\n")),
    "is one of too many of a host": (Lines, "", {"limits": Limits(max_per_host=1)}, sending(b"x\n")),
    "fails to go over to TLS": (Upgrading, "upgrade", {}, sending(b"STARTTLS\nno TLS at all", half_closes)),
    "goes away before TLS": (Upgrading, "upgrade", {}, sending(b"STARTTLS\n")),
    "resets before TLS": (Upgrading, "upgrade", {}, sending(b"STARTTLS\n", reset)),
    "checks a TLS port's health": (Lines, "tls", {}, sending(b"")),
    "resets a TLS port": (Lines, "tls", {}, sending(b"", reset)),
    "half a hello": (Lines, "tls", {}, sending(HELLO)),
    "half a hello, reset": (Lines, "tls", {}, sending(HELLO, reset)),
    "half a hello, and waits": (Lines, "tls", {"timeouts": Timeouts(handshake=0.02)}, sending(HELLO, reads_on)),
    "no TLS": (Lines, "tls", {}, sending(b"GET / HTTP/1.1\r\n\r\n", reads_on)),
    "resets over TLS": (Lines, "tls", {}, "resets over TLS"),
    "resets a torrent over TLS": (Torrent, "tls", {}, "resets over TLS"),
    "refuses the certificate": (Lines, "tls", {}, refusing_the_certificate),
    "has no certificate": (Lines, "mutual", {}, "without a certificate"),
    "blocking: long lines, reset": (BlockingLines, "", {}, sending(b"x" * 70_000, reset)),
    "blocking: resets": (BlockingLines, "", {}, sending(b"x\n" * 1000, resets_after_a_bit)),
    "blocking: is silent": (BlockingImpatient, "", {}, sending(b"", reads_on)),
    "blocking: checks a TLS port's health": (BlockingLines, "tls", {}, sending(b"")),
    "blocking: resets a TLS port": (BlockingLines, "tls", {}, sending(b"", reset)),
    "blocking: no TLS": (BlockingLines, "tls", {}, sending(b"GET / HTTP/1.1\r\n\r\n", reads_on)),
    "blocking: resets over TLS": (BlockingLines, "tls", {}, "resets over TLS"),
    "meets a mistake": (Mistaken, "", {}, sending(b"no number\n", reads_on)),
    "blocking: meets a mistake": (BlockingMistaken, "", {}, sending(b"no number\n", reads_on)),
}

DATAGRAMS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "goes away": (Datagram, {}, datagrams(b"x")),
    "long datagrams": (Datagram, {"limits": Limits(max_datagram=10)}, datagrams(bytes(100))),
    "too many datagrams": (Datagram, {"limits": Limits(max_queue=1, max_handlers=1)}, datagrams(b"x")),
    "bad frames": (DatagramFrames, {}, datagrams(b"no number")),
    "long frames": (DatagramFrames, {}, datagrams(b"99999:")),
    "meets a mistake": (DatagramMistaken, {}, datagrams(b"no number")),
    "meets a mistake in a session": (Session, {}, datagrams(b"no number")),
    "too many sessions": (Session, {"limits": Limits(max_sessions=1)}, datagrams(b"1", count=1)),
    "too many of a session": (Session, {"limits": Limits(max_session_queue=1)}, datagrams(b"1")),
    "blocking: meets a mistake": (BlockingDatagramMistaken, {}, datagrams(b"no number")),
}


@contextlib.contextmanager
def records() -> Iterator[list[logging.LogRecord]]:
    """Collect what the default configuration would show, and INFO; it is not shown, which would take all the time."""

    class Collecting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record)

    found: list[logging.LogRecord] = []
    root, handler = logging.getLogger(), Collecting(logging.INFO)
    before, root.handlers[:] = root.handlers[:], [handler]
    level = root.level
    root.setLevel(logging.INFO)
    try:
        yield found
    finally:
        root.handlers[:] = before
        root.setLevel(level)


async def attack(server: aioecho.BaseServer, peer: Callable[[Any], None]) -> tuple[int, float]:
    """Let three such peers act at a time, for a while; return how often one did, and the seconds."""
    stop, counts = threading.Event(), [0, 0, 0]

    def act(number: int) -> None:
        while counts[number] < ACTS and not (stop.is_set() and counts[number]):
            peer(server.server_address)
            counts[number] += 1

    began = time.monotonic()
    acting = [asyncio.create_task(asyncio.to_thread(act, number)) for number in range(3)]
    await asyncio.wait(acting, timeout=SECONDS)
    stop.set()
    await asyncio.gather(*acting)
    await settle(lambda: not server.connections)
    return sum(counts), time.monotonic() - began


def judge(found: list[logging.LogRecord], name: str, count: int, seconds: float) -> None:
    print(f"{name}: {count} times in {seconds:.1f} s, {len(found)} records, {len(found) / seconds:.2f} a second")
    assert count >= 3  # of each of the three
    assert len(found) <= 1 + 2 * seconds, [record.getMessage() for record in found[:10]]


# The ssl module leaves a socket of a blocking handler's unclosed that is reset before it is wrapped.
@pytest.mark.filterwarnings("ignore:.*unclosed <.*SSLSocket:ResourceWarning")
@pytest.mark.filterwarnings("ignore:.*SSLSocket:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
async def test_a_bad_peer_of_a_stream_makes_few_records(name: str, tls: SimpleNamespace) -> None:
    kind, how, options, peer = STREAMS[name]
    asyncio.get_running_loop().set_debug(False)  # in which asyncio tells more, and not of peers alone
    if how == "upgrade":
        kind = type("U", (kind,), {"context": tls.server})
    elif how:
        options = {**options, "ssl": tls.server if how == "tls" else tls.mutual}
    if peer == "resets over TLS":
        peer = resets_over_tls(tls.client)
    elif peer == "without a certificate":
        peer = without_a_certificate(tls.client)
    async with aioecho.TCPServer(ANYWHERE, kind, grace=5, **options) as server:
        with records() as found:
            count, seconds = await attack(server, peer)
        check_identity(server)
    judge(found, name, count, seconds)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATAGRAMS)
async def test_a_bad_peer_of_a_datagram_server_makes_few_records(name: str) -> None:
    kind, options, peer = DATAGRAMS[name]
    asyncio.get_running_loop().set_debug(False)
    timeouts = Timeouts(session=0.05)
    async with aioecho.UDPServer(ANYWHERE, kind, grace=5, timeouts=timeouts, **options) as server:
        with records() as found:
            count, seconds = await attack(server, peer)
    judge(found, name, count, seconds)


# A handler's mistakes


class Several(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            if line == b"int\n":
                int(line)
            elif line == b"json\n":
                json.loads(line)
            else:
                self.look_up(line)

    def look_up(self, line: bytes) -> None:
        {}[line]


async def send_each(server: aioecho.BaseServer, lines: list[bytes]) -> None:
    for line in lines:
        assert await ask(server, line) == b""
    await settle(lambda: not server.connections)


async def test_mistakes_are_told_by_type_and_line_and_how_many_were_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(logs, "time", SimpleNamespace(monotonic=lambda: now))
    async with aioecho.TCPServer(ANYWHERE, Several) as server:
        with records() as found:
            await send_each(server, [b"int\n", b"json\n", b"key\n"] * 4)
            told = [type(record.exc_info[1]).__name__ for record in found if record.exc_info]
            assert told == ["ValueError", "JSONDecodeError", "KeyError"]
            now += 1.5
            await send_each(server, [b"key\n"])
            assert found[-1].getMessage().endswith("raised (and 3 times since the last such record)")
            now += 1.5
            await send_each(server, [b"key\n"])
            assert found[-1].getMessage().endswith("raised")
        assert server.stats.reasons == {"error": 14}


async def test_an_overridden_handle_error_is_called_every_time() -> None:
    class Own(aioecho.TCPServer):
        calls = 0

        def handle_error(self, request: Any, client_address: Any) -> None:
            self.calls += 1
            super().handle_error(request, client_address)

    async with Own(ANYWHERE, Several) as server:
        with records() as found:
            await send_each(server, [b"int\n"] * 10)
        assert server.calls == 10
    assert len([record for record in found if record.exc_info]) <= 2


async def test_kinds_of_mistakes_are_not_remembered_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    log = MistakeLog(logging.getLogger("aioecho.server"))
    for number in range(2 * MOST_KINDS):
        log.report(type(f"Error{number}", (Exception,), {})(), "raised")
    assert len(caplog.records) == 2 * MOST_KINDS
    assert len(log._kinds) == MOST_KINDS
