"""TLS endpoints: handshakes that fail, peers that are silent, certificates of clients, and the end in good order."""

import array
import asyncio
import contextlib
import functools
import gc
import logging
import resource
import select
import socket
import socketserver
import ssl
import struct
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from conftest import check_identity, settle
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from helpers import reset
from timing import in_time

import aioecho
from aioecho.cli.serve import _tls as command_lines_tls
from aioecho.cli.serve import serve_command
from aioecho.client import open_connection
from aioecho.echo import DatagramUpper, Echo, Upper
from aioecho.net.kernel import unacknowledged
from aioecho.serving.draining import FRESH


async def ask(server: aioecho.BaseServer, context: ssl.SSLContext, request: bytes, size: int) -> bytes:
    reader, writer = await open_connection(server.names[0], ssl=context)
    writer.write(request)
    answer = await reader.readexactly(size)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_lines_come_back_over_tls(tls: SimpleNamespace) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        assert await ask(server, tls.client, b"Hello, Server!\n", 15) == b"HELLO, SERVER!\n"
        await settle(lambda: server.stats.completed == 1)


class TellsOfTLS(aioecho.StreamRequestHandler):
    """Begins every line's reply with whether the connection has TLS, and begins that at STARTTLS."""

    async def handle(self) -> None:
        async for line in self.reader:
            if line == b"STARTTLS\n":
                await self.writer.start_tls(self.server.ssl)
            else:
                secure = self.writer.get_extra_info("ssl_object") is not None
                await self.send(b"%d %b" % (secure, line))


class BlockingTellsOfTLS(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(b"%d %b" % (isinstance(self.request, ssl.SSLSocket), line))


@pytest.mark.parametrize("proxy", ["", "&proxy=v1&proxy_from=127.0.0.1"])
@pytest.mark.parametrize("kind", [TellsOfTLS, BlockingTellsOfTLS])
async def test_an_endpoint_may_be_without_tls_beside_others_that_have_it(
    kind: Any, proxy: str, tls: SimpleNamespace, tmp_path: Path
) -> None:
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" if proxy else b""
    secure = f"tcp://127.0.0.1:0?{proxy[1:]}" if proxy else "tcp://127.0.0.1:0"
    plain = [f"tcp://127.0.0.1:0?tls=off{proxy}", f"unix:{tmp_path / 's'}?mode=600&tls=off{proxy}"]
    async with aioecho.serve({kind: [plain[0], secure, plain[1]]}, ssl=tls.server) as server:
        for name in (server.names[0], server.names[2]):
            reader, writer = await open_connection(name)
            writer.write(header + b"hello\n")
            assert await reader.readline() == b"0 hello\n"
            writer.close()
        reader, writer = await open_connection(server.names[1])
        writer.write(header)
        await writer.start_tls(tls.client, server_hostname="127.0.0.1")
        writer.write(b"hello\n")
        assert await reader.readline() == b"1 hello\n"
        writer.close()
        await settle(lambda: server.stats.completed == 3)
        check_identity(server)


async def test_a_handler_of_an_endpoint_without_tls_may_begin_it_with_what_the_server_has(
    tls: SimpleNamespace,
) -> None:
    certificates = aioecho.TLS(tls.files.server)
    async with aioecho.serve(TellsOfTLS, "tcp://127.0.0.1:0?tls=off", ssl=certificates) as server:
        reader, writer = await open_connection(server.names[0])
        writer.write(b"hello\n")
        assert await reader.readline() == b"0 hello\n"
        writer.write(b"STARTTLS\n")
        await writer.start_tls(tls.client, server_hostname="127.0.0.1")
        writer.write(b"hello\n")
        assert await reader.readline() == b"1 hello\n"
        writer.close()


def test_a_program_whose_endpoints_and_certificates_do_not_go_together_is_told(tls: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"tcp://\*:465\?tls=on needs a certificate: give ssl="):
        aioecho.serve(Upper, "tcp://*:25", "tcp://*:465?tls=on")
    with pytest.raises(ValueError, match="TLS does not go over datagrams"):
        aioecho.serve({DatagramUpper: "udp://*:53?tls=on"}, ssl=tls.server)
    with pytest.raises(
        ValueError, match=r"cannot connect to tcp://localhost:465\?tls=on: what follows \? is for servers"
    ):
        aioecho.connect("tcp://localhost:465?tls=on")


@pytest.mark.timed  # a client has FRESH from the end of its handshake on
@pytest.mark.parametrize("peer", ["slow", "silent"])
async def test_a_handshake_that_a_handler_begins_while_the_server_stops_counts_as_fresh(
    tls: SimpleNamespace, peer: str
) -> None:
    class Starts(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.readline()
            await self.send(b"go ahead\n")
            await self.writer.start_tls(tls.server)
            async for line in self.reader:
                await self.send(line.upper())

    async with aioecho.TCPServer(("127.0.0.1", 0), Starts) as server:
        with HalfCloser(server.server_address, tls) as client:
            client.sock.sendall(b"START")
            await settle(lambda: [each for each in server.connections if each.is_in_message()])
            await asyncio.sleep(2 * FRESH)  # time is the subject
            stopping = asyncio.create_task(server.shutdown(8))
            await asyncio.sleep(2 * FRESH)  # likewise
            client.sock.sendall(b"TLS\n")
            assert await asyncio.to_thread(client.sock.recv, 100) == b"go ahead\n"
            if peer == "slow":
                await asyncio.to_thread(client.shake_hands)
                client.flush()
                await asyncio.sleep(FRESH / 2)  # likewise
                assert await asyncio.to_thread(client.ask, b"hello\n") == b"HELLO\n"
            report = await stopping
    assert (report.cancelled, report.aborted) == (0, 0)
    in_time(report.seconds, 3)
    assert server.stats.completed == (peer == "slow")


class BlockingUpper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


@pytest.mark.parametrize("kind", [Upper, BlockingUpper])
async def test_a_context_that_leaves_the_versions_to_openssl_serves_tls_1_2(kind: Any, tls: SimpleNamespace) -> None:
    async with aioecho.serve(kind, "tcp://127.0.0.1:0", ssl=tls.as_debians()) as server:
        assert await ask(server, tls.client, b"hello\n", 6) == b"HELLO\n"
        assert server.ssl is not None
        assert server.ssl.minimum_version is ssl.TLSVersion.TLSv1_2


async def test_a_client_must_show_its_certificate_where_that_is_asked_for(tls: SimpleNamespace) -> None:
    class Names(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            certificate = self.writer.get_extra_info("peercert")
            await self.send(certificate["subjectAltName"][0][1].encode())

    async with aioecho.TCPServer(("127.0.0.1", 0), Names, ssl=tls.mutual) as server:
        assert await ask(server, tls.known_client, b"", 18) == b"client@example.org"
        reader, writer = await open_connection(server.names[0], ssl=tls.client)
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        await settle(lambda: not server.connections)
        assert (server.stats.completed, server.stats.rejected) == (1, 1)
        check_identity(server)


async def test_peers_that_do_not_speak_tls_hold_no_slot_and_disturb_nobody(
    tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    timeouts, began = aioecho.Timeouts(handshake=1), time.monotonic()
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo, ssl=tls.server, timeouts=timeouts) as server:
        address = server.server_address
        silent = [socket.create_connection(address) for _ in range(20)]
        garbage = []
        for _ in range(20):
            garbage.append(socket.create_connection(address))
            garbage[-1].sendall(b"GET / HTTP/1.0\r\n\r\n")
        gone = []
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = tls.client.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            session.do_handshake()
        hello = outgoing.read()
        for number in range(20):
            gone.append(socket.create_connection(address))
            gone[-1].sendall(hello if number % 2 else hello[:100])
            gone[-1].shutdown(socket.SHUT_WR)
        assert await ask(server, tls.client, b"healthy", 7) == b"healthy"
        for sock in gone:
            sock.close()
        await settle(lambda: not server.connections)
        assert (server.stats.rejected, server.stats.completed) == (60, 1)
        assert server.stats.reasons["handshake"] == 60
        check_identity(server)
        for sock in silent + garbage:
            sock.close()
    records = [r for r in caplog.records if r.name == "aioecho.server" and r.levelno == logging.WARNING]
    assert 1 <= len(records) <= 2 + time.monotonic() - began  # one a second at the most
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def test_a_large_reply_arrives_whole_though_its_handler_returns_at_once(tls: SimpleNamespace) -> None:
    size = 4 * 2**20

    async def handle(self: Any) -> None:
        self.writer.write(b"x" * size)

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    timeouts = aioecho.Timeouts(linger=0.05)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server, timeouts=timeouts) as server:

        def receive() -> int:
            # Not on this loop: what has been read but not taken when the end comes, uvloop's TLS drops at the client.
            with connect_plainly(server, tls.client) as sock:
                got = len(sock.recv(1000))
                time.sleep(0.3)  # time is the subject: well past the linger, with most of it unsent
                while data := sock.recv(2**16):
                    got += len(data)
                return got

        assert await asyncio.to_thread(receive) == size


async def test_a_drain_over_tls_answers_what_came_and_is_quick(tls: SimpleNamespace) -> None:
    def receive(sock: ssl.SSLSocket) -> bytes:
        with sock:
            return b"".join(iter(lambda: sock.recv(100), b""))

    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        socks = [await asyncio.to_thread(connect_plainly, server, tls.client) for _ in range(10)]
        for number, sock in enumerate(socks):  # not by this loop, which may send only when the server has stopped
            sock.sendall(b"client %d\n" % number)
        stopping = asyncio.create_task(server.shutdown(20))
        for number, sock in enumerate(socks):
            assert await asyncio.to_thread(receive, sock) == b"CLIENT %d\n" % number
        report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (10, 0, 0)
        in_time(report.seconds, 2)


async def test_a_handshake_under_way_does_not_hang_the_stop(tls: SimpleNamespace) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        with socket.create_connection(server.server_address) as sock:
            sock.sendall(b"\x16\x03\x01")  # the beginning of a ClientHello
            await settle(lambda: server.stats.active == 1)
            await settle()
            report = await server.shutdown(0.1)
        in_time(report.seconds, 1)
        assert (report.cancelled, report.aborted, report.unfinished) == (1, 0, 1)
        check_identity(server)


@pytest.mark.timed
async def test_a_deaf_tls_peer_is_aborted_at_the_end_of_the_grace(tls: SimpleNamespace) -> None:
    async def handle(self: Any) -> None:
        await self.send(b"x" * 8 * 2**20)

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:

        def deaf() -> ssl.SSLSocket:
            plain = socket.create_connection(server.server_address)
            return tls.client.wrap_socket(plain, server_hostname="127.0.0.1")

        sock = await asyncio.to_thread(deaf)
        await settle()
        report = await server.shutdown(0.2)
        sock.close()
        assert (report.completed, report.cancelled, report.aborted) == (0, 0, 1)
        in_time(report.seconds, 0.7)


def connect_plainly(server: aioecho.BaseServer, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return a client's blocking socket, whose kernel takes little that nobody reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    sock.settimeout(30)
    sock.connect(server.server_address)
    return context.wrap_socket(sock, server_hostname="127.0.0.1")


async def test_a_large_reply_arrives_whole_though_its_peer_sends_on(tls: SimpleNamespace) -> None:
    size = 8 * 2**20
    has_returned = asyncio.Event()

    async def handle(self: Any) -> None:
        await self.reader.readline()
        self.writer.write(b"x" * size)
        has_returned.set()

    def read_all(sock: ssl.SSLSocket) -> int:
        return sum(map(len, iter(functools.partial(sock.recv, 2**16), b"")))

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        with await asyncio.to_thread(connect_plainly, server, tls.client) as sock:
            await asyncio.to_thread(sock.sendall, b"go\n" + b"more\n" * 100)
            await has_returned.wait()
            await settle()
            for _ in range(3):
                await asyncio.to_thread(sock.sendall, b"and more\n" * 100)
                await settle()
            assert await asyncio.to_thread(read_all, sock) == size
        await settle(lambda: server.stats.completed == 1)


@pytest.mark.parametrize("how", ["returns", "closes twice", "waits"])
async def test_a_silent_peer_does_not_hold_a_handler_that_closes(tls: SimpleNamespace, how: str) -> None:
    async def handle(self: Any) -> None:
        await self.send(b"bye\n")
        self.writer.close()
        if how == "closes twice":
            self.writer.close()
        elif how == "waits":
            await self.writer.wait_closed()

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    timeouts = aioecho.Timeouts(linger=0.1, idle=1)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server, timeouts=timeouts) as server:
        with await asyncio.to_thread(connect_plainly, server, tls.client) as sock:
            await settle(lambda: server.stats.completed == 1)
            assert await asyncio.to_thread(sock.recv, 100) == b"bye\n"


@pytest.mark.parametrize("size", [200_000, 300_000, 500_000])
async def test_what_a_peer_sent_before_it_closed_is_read_however_late(tls: SimpleNamespace, size: int) -> None:
    may_read = asyncio.Event()
    got: list[int] = []

    async def handle(self: Any) -> None:
        await may_read.wait()
        got.append(len(await self.reader.read()))

    def send(sock: ssl.SSLSocket) -> None:
        sock.sendall(b"x" * size)
        sock.shutdown(socket.SHUT_WR)

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        with await asyncio.to_thread(connect_plainly, server, tls.client) as sock:
            sending = asyncio.create_task(asyncio.to_thread(send, sock))
            for _ in range(20):
                await settle()  # it is all there, as far as it is taken: the reader has paused
            may_read.set()
            await sending
            await settle(lambda: got)
            assert got == [size]


@pytest.mark.parametrize("how", ["class", "partial", "several classes"])
async def test_a_handshake_has_the_time_that_its_handler_class_says(tls: SimpleNamespace, how: str) -> None:
    kind = type("Quick", (Upper,), {"timeouts": aioecho.Timeouts(handshake=0.1)})
    options: Any = {"ssl": tls.server, "timeouts": aioecho.Timeouts(handshake=60)}
    endpoint = "tcp://127.0.0.1:0"
    if how == "several classes":
        server = aioecho.serve({kind: endpoint}, **options)
    else:
        server = aioecho.serve(kind if how == "class" else functools.partial(kind), endpoint, **options)
    async with server:
        with socket.create_connection(server.server_address):
            await settle(lambda: server.stats.rejected == 1)


# Peers that say that they send no more, and wait for the reply.

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged from WARNING on."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class HalfCloser:
    """A blocking TLS client that can close its sending side alone, and pack what it sends into one segment."""

    def __init__(self, address: Any, tls: SimpleNamespace, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> None:
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
        self.sock.settimeout(30)
        self.sock.connect(address)
        context = ssl.create_default_context(cafile=tls.files.ca)
        context.maximum_version = version
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_hostname="127.0.0.1")

    def __enter__(self) -> "HalfCloser":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def flush(self) -> None:
        self.sock.sendall(self.outgoing.read())

    def receive(self) -> None:
        data = self.sock.recv(2**16)
        if not data:
            raise ConnectionError("the connection ended without close_notify")
        self.incoming.write(data)

    def shake_hands(self) -> None:
        """Do the handshake. Its last flight goes out with what comes next."""
        while True:
            try:
                self.session.do_handshake()
                return
            except ssl.SSLWantReadError:
                self.flush()
                self.receive()

    def say(self, data: bytes, *then: str) -> None:
        """Send all in one go: the data, close_notify if asked for, and then the FIN."""
        for start in range(0, len(data), 2**14):
            self.session.write(data[start : start + 2**14])
        if "close_notify" in then:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.session.unwrap()
        self.flush()
        if "FIN" in then:
            self.sock.shutdown(socket.SHUT_WR)

    def read_some(self) -> bytes:
        while True:
            try:
                return self.session.read(2**16)
            except ssl.SSLWantReadError:
                self.receive()
            except ssl.SSLZeroReturnError:
                return b""

    def read(self) -> bytes:
        """Read up to the server's close_notify, which must come, and then the end of the connection."""
        data = b"".join(iter(self.read_some, b""))
        assert self.sock.recv(1) == b""
        return data

    def ask(self, request: bytes, *then: str) -> bytes:
        self.shake_hands()
        self.say(request, *then)
        return self.read()


ENDS = [("close_notify",), ("close_notify", "FIN"), ("FIN",)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("then", ENDS, ids="+".join)
async def test_who_sends_no_more_gets_the_reply_that_is_made_then(
    tls: SimpleNamespace, version: ssl.TLSVersion, then: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    piece, pieces, sent = b"x" * 2**18, 64, []

    async def handle(self: Any) -> None:
        request = await self.reader.read()
        await asyncio.sleep(0.02)  # time is the subject: the reply comes later than the end
        await self.send(b"%d\n" % len(request))
        for number in range(pieces):
            await self.send(piece)
            sent.append(number)

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls, version) as client:
            await asyncio.to_thread(client.shake_hands)
            client.say(b"request\n", *then)
            await settle(lambda: sent)
            await settle()
            assert len(sent) < pieces  # drain() waits
            assert await asyncio.to_thread(client.read) == b"8\n" + piece * pieces
        await settle(lambda: server.stats.completed == 1)
        check_identity(server)
    assert not complaints(caplog)


@pytest.mark.parametrize("then", ENDS, ids="+".join)
async def test_who_sends_no_more_gets_the_reply_of_a_blocking_handler(
    tls: SimpleNamespace, then: tuple[str, ...]
) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper() * 2**18)

    async with aioecho.TCPServer(("127.0.0.1", 0), Handler, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            assert await asyncio.to_thread(client.ask, b"request\n", *then) == b"REQUEST\n" * 2**18
        await settle(lambda: server.stats.completed == 1)


@pytest.mark.parametrize("then", ENDS, ids="+".join)
async def test_all_that_came_before_the_end_is_read_however_much_and_late(
    tls: SimpleNamespace, then: tuple[str, ...]
) -> None:
    may_read = asyncio.Event()

    async def handle(self: Any) -> None:
        await may_read.wait()
        await self.send(b"%d" % len(await self.reader.read()))

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        for size in (200_000, 300_000, 10_000_000):
            may_read.clear()
            with HalfCloser(server.server_address, tls) as client:
                asking = asyncio.create_task(asyncio.to_thread(client.ask, b"x" * size, *then))
                for _ in range(20):
                    await settle()  # it is all there, as far as it is taken: the reader has paused
                may_read.set()
                assert await asking == b"%d" % size
        await settle(lambda: server.stats.completed == 3)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("request_", [b"hello\n", b""])
async def test_the_end_may_come_in_one_segment_with_all_before_it(
    tls: SimpleNamespace, version: ssl.TLSVersion, request_: bytes
) -> None:
    """With TLS 1.3 it is in the handshake's last flight."""
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        for _ in range(3):
            with HalfCloser(server.server_address, tls, version) as client:
                assert await asyncio.to_thread(client.ask, request_, "close_notify") == request_.upper()
        await settle(lambda: server.stats.completed == 3)


async def test_the_end_may_come_with_the_handshake_that_a_handler_starts(tls: SimpleNamespace) -> None:
    async def handle(self: Any) -> None:
        await self.reader.readline()
        await self.send(b"go ahead\n")
        await self.writer.start_tls(tls.server)
        await asyncio.sleep(0)
        request = await self.reader.read()
        await asyncio.sleep(0.02)
        await self.send(request.upper())

    def ask(request: bytes) -> bytes:
        with HalfCloser(server.server_address, tls) as client:
            client.sock.sendall(b"STARTTLS\n")
            assert client.sock.recv(100) == b"go ahead\n"
            return client.ask(request, "close_notify")

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler) as server:
        assert await asyncio.to_thread(ask, b"hello\n") == b"HELLO\n"
        assert await asyncio.to_thread(ask, b"") == b""
        await settle(lambda: server.stats.completed == 2)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("then", ENDS, ids="+".join)
async def test_who_closes_at_once_is_done_with_at_once(
    tls: SimpleNamespace, version: ssl.TLSVersion, then: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    timeouts = aioecho.Timeouts(linger=60)

    def talk() -> None:
        with HalfCloser(server.server_address, tls, version) as client:
            client.shake_hands()
            client.say(b"hello\n")
            assert client.read_some() == b"HELLO\n"
            client.say(b"", *then)

    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server, timeouts=timeouts) as server:
        for number in range(1, 4):
            await asyncio.to_thread(talk)
            await settle(lambda number=number: server.stats.completed == number)  # type: ignore[misc]
        check_identity(server)
    assert not complaints(caplog)


@pytest.mark.parametrize("then", ENDS, ids="+".join)
async def test_a_drain_waits_for_the_reply_to_who_sends_no_more(tls: SimpleNamespace, then: tuple[str, ...]) -> None:
    has_ended, may_answer = asyncio.Event(), asyncio.Event()

    async def handle(self: Any) -> None:
        await self.reader.read()
        has_ended.set()
        await may_answer.wait()
        self.writer.write(b"x" * 2**22)

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            asking = asyncio.create_task(asyncio.to_thread(client.ask, b"hello\n", *then))
            await has_ended.wait()
            stopping = asyncio.create_task(server.shutdown(10))
            await settle()
            may_answer.set()
            assert len(await asking) == 2**22
            report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
        assert report.seconds < 5


@pytest.mark.parametrize("when", ["all is written", "the handler has returned", "the handler has closed"])
async def test_large_replies_arrive_though_their_peer_ends_its_side_meanwhile(
    tls: SimpleNamespace, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    size, pieces = 2**20, 8
    is_written, has_ended = asyncio.Event(), asyncio.Event()

    async def handle(self: Any) -> None:
        await self.reader.readline()
        for _ in range(pieces):
            self.writer.write(b"x" * size)
        if when == "the handler has closed":
            self.writer.close()
        is_written.set()
        if when == "all is written":
            await has_ended.wait()

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        for then in ENDS:
            is_written.clear()
            has_ended.clear()
            with HalfCloser(server.server_address, tls) as client:
                await asyncio.to_thread(client.shake_hands)
                await asyncio.to_thread(client.say, b"go\n")
                await is_written.wait()
                await settle()
                client.say(b"", *then)
                await settle()
                has_ended.set()
                await settle()
                assert len(await asyncio.to_thread(client.read)) == size * pieces
        await settle(lambda: server.stats.completed == 3)
    assert not complaints(caplog)


async def test_a_reply_that_a_reset_destroys_counts_as_failed(tls: SimpleNamespace) -> None:
    has_returned = asyncio.Event()

    async def handle(self: Any) -> None:
        await self.reader.readline()
        self.writer.write(b"x" * 2**23)
        has_returned.set()

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        for then in ((), *ENDS):
            has_returned.clear()
            with HalfCloser(server.server_address, tls) as client:
                await asyncio.to_thread(client.shake_hands)
                await asyncio.to_thread(client.say, b"go\n", *then)
                await has_returned.wait()
                await settle()
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await settle(lambda: not server.connections)
        assert server.stats.failed == server.stats.reasons["connection lost"] == 4
        check_identity(server)


async def test_others_who_use_the_same_context_meet_the_end_as_ever(tls: SimpleNamespace) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.read())
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        is_over.set()

    got: list[bytes] = []
    is_over = asyncio.Event()
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        assert await ask(server, tls.client, b"hello\n", 6) == b"HELLO\n"
        other = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=tls.server)
        with HalfCloser(other.sockets[0].getsockname(), tls) as client:
            assert await asyncio.to_thread(client.ask, b"hello\n", "close_notify") == b""
        await is_over.wait()
        assert got == [b"hello\n"]
        other.close()
        await other.wait_closed()


async def test_the_bound_on_what_is_unsent_holds_for_tls(tls: SimpleNamespace) -> None:
    async def handle(self: Any) -> None:
        while not self.writer.is_closing():
            self.writer.write(bytes(10_000))
            await asyncio.sleep(0)

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    limits = aioecho.Limits(max_write_buffer=1_000_000)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server, limits=limits) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.say(b"")
            await settle(lambda: server.stats.reasons["write buffer"])
        await settle(lambda: not server.connections)
        check_identity(server)


@pytest.mark.parametrize("drains", [True, False])
async def test_a_tls_peer_that_takes_nothing_is_given_up(tls: SimpleNamespace, drains: bool) -> None:
    async def handle(self: Any) -> None:
        self.writer.write(bytes(10_000_000))
        if drains:
            await self.writer.drain()

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    timeouts = aioecho.Timeouts(write=0.5)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server, timeouts=timeouts) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.say(b"")
            await settle(lambda: server.stats.failed == server.stats.reasons["write"] == 1)
        check_identity(server)


# What comes in unusual pieces.


@pytest.mark.parametrize("how", ["at once", "STARTTLS"])
async def test_a_client_is_read_on_though_much_came_with_the_end_of_its_handshake(
    tls: SimpleNamespace, how: str
) -> None:
    size = 10_000

    async def handle(self: Any) -> None:
        if how == "STARTTLS":
            await self.reader.readline()
            await self.send(b"go ahead\n")
            await self.writer.start_tls(tls.server)
        await self.send(b"%d" % len(await self.reader.readexactly(2 * size)))

    def talk() -> bytes:
        with HalfCloser(server.server_address, tls) as client:
            if how == "STARTTLS":
                client.sock.sendall(b"STARTTLS\n")
                assert client.sock.recv(100) == b"go ahead\n"
            client.shake_hands()
            client.say(b"x" * size)
            client.say(b"x" * size)
            return client.read()

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    options: Any = {} if how == "STARTTLS" else {"ssl": tls.server}
    timeouts, limits = aioecho.Timeouts(idle=5, message=5), aioecho.Limits(max_buffer=4096)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, timeouts=timeouts, limits=limits, **options) as server:
        assert await asyncio.to_thread(talk) == b"%d" % (2 * size)


@pytest.mark.parametrize("version", VERSIONS)
async def test_records_may_be_cut_and_joined_anywhere(tls: SimpleNamespace, version: ssl.TLSVersion) -> None:
    def read(client: HalfCloser, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += client.read_some()
        return data

    async with aioecho.TCPServer(("127.0.0.1", 0), Echo, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls, version) as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.to_thread(client.shake_hands)
            client.say(b"")
            cut = 0
            while True:
                cut += 1
                client.session.write(b"a" * 5)
                client.session.write(b"b" * 40)
                wire = client.outgoing.read()
                if cut == len(wire):
                    break
                client.sock.sendall(wire[:cut])
                await settle()
                client.sock.sendall(wire[cut:])
                assert await asyncio.to_thread(read, client, 45) == b"a" * 5 + b"b" * 40


async def test_all_kinds_of_buffers_are_sent_whole_over_tls(tls: SimpleNamespace) -> None:
    numbers = array.array("I", range(50_000))
    pieces: list[Any] = [b"", b"bytes", bytearray(b"x" * 100_000), memoryview(numbers), memoryview(numbers)[:5000], b""]

    async def handle(self: Any) -> None:
        for piece in pieces:
            self.writer.write(piece)
        self.writer.writelines(pieces)

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            got = await asyncio.to_thread(client.ask, b"")
        assert got == b"".join(map(bytes, pieces)) * 2


# What goes wrong.


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_client_is_told_by_an_alert_that_its_certificate_is_missing(
    tls: SimpleNamespace, version: ssl.TLSVersion
) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo, ssl=tls.mutual) as server:
        with HalfCloser(server.server_address, tls, version) as client, pytest.raises(ssl.SSLError, match="alert"):
            await asyncio.to_thread(client.ask, b"")
        await settle(lambda: server.stats.rejected == 1)


async def test_a_record_that_was_tampered_with_ends_the_connection(tls: SimpleNamespace) -> None:
    met: list[BaseException] = []

    async def handle(self: Any) -> None:
        try:
            await self.reader.read(100)
        except OSError as error:
            met.append(error)
            raise

    handler = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), handler, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.flush()
            client.session.write(b"hello")
            wire = bytearray(client.outgoing.read())
            wire[-1] ^= 1
            client.sock.sendall(wire)
            with pytest.raises(ssl.SSLError, match="alert bad record mac"):
                await asyncio.to_thread(client.read)
        await settle(lambda: server.stats.reasons["connection lost"] == server.stats.failed == 1)
        assert isinstance(met[0], ssl.SSLError)
        check_identity(server)


async def test_tls_begins_with_a_clients_first_byte(tls: SimpleNamespace) -> None:
    """Until then a connection costs what one without TLS does."""
    before = tls.server.session_stats()["accept"]
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        silent = [socket.create_connection(server.server_address) for _ in range(5)]
        await settle(lambda: server.stats.active == 5)
        await settle()
        assert tls.server.session_stats()["accept"] == before
        assert await ask(server, tls.client, b"hello\n", 6) == b"HELLO\n"
        assert tls.server.session_stats()["accept"] == before + 1
        for sock in silent:
            sock.close()
        await settle(lambda: server.stats.rejected == 5)


async def test_a_handler_learns_of_the_session_even_when_it_is_over(tls: SimpleNamespace) -> None:
    told: dict[str, Any] = {}

    class Tell(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.read()

        async def finish(self) -> None:
            self.writer.transport.abort()
            await asyncio.sleep(0.01)
            for name in ("ssl_object", "peercert", "cipher", "compression", "sslcontext", "peername", "none"):
                told[name] = self.writer.get_extra_info(name, "default")

    async with aioecho.TCPServer(("127.0.0.1", 0), Tell, ssl=tls.mutual) as server:
        _, writer = await open_connection(server.names[0], ssl=tls.known_client)
        cipher = writer.get_extra_info("cipher")
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)
        await settle(lambda: told)
    assert isinstance(told["ssl_object"], ssl.SSLObject)
    assert told["ssl_object"].version() == "TLSv1.3"
    assert told["peercert"]["subjectAltName"][0][1] == "client@example.org"
    assert told["cipher"] == cipher
    assert told["sslcontext"] is tls.mutual
    assert told["peername"][0] == "127.0.0.1"
    assert (told["compression"], told["none"]) == (None, "default")


@pytest.mark.parametrize("end", ["FIN", "close_notify", "garbage", "gone"])
async def test_a_tls_connection_leaves_no_reference_cycle(tls: SimpleNamespace, end: str) -> None:
    def talk() -> None:
        with HalfCloser(server.server_address, tls) as client:
            if end in ("garbage", "gone"):
                client.sock.sendall(b"GET / HTTP/1.0\r\n\r\n"[: 3 if end == "gone" else None])
                return
            client.shake_hands()
            client.say(b"hello\n")
            assert client.read_some() == b"HELLO\n"
            if end == "close_notify":
                client.say(b"", "close_notify")
                client.read()

    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        gc.collect()
        gc.disable()
        before = gc.get_objects()  # what other tests have left, as a failed one's frames
        known = {id(each) for each in before}
        try:
            await asyncio.to_thread(talk)
            await settle(lambda: server.stats.accepted == 1 and not server.connections)
            await settle()
            kinds = [type(each).__name__ for each in gc.get_objects() if id(each) not in known]
        finally:
            gc.enable()
        # A reader whose exception was raised is in a cycle with it, by its traceback, as asyncio's is.
        freed = {"TLSTransport", "SSLObject"} | (
            set() if end in ("garbage", "gone") else {"StreamProtocol", "StreamReader"}
        )
        assert not freed & set(kinds)


async def test_the_command_line_sends_no_session_tickets_which_make_of_a_clients_fin_a_reset(
    tls: SimpleNamespace,
) -> None:
    got: list[bytes] = []

    class Sink(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.reader:
                got.append(line)

    def write_and_close() -> None:
        sock = socket.create_connection(server.server_address)
        with tls.client.wrap_socket(sock, server_hostname="127.0.0.1") as secured:
            assert secured.version() == "TLSv1.3"
            secured.sendall(b"line\n" * 100)
            select.select([secured], [], [], 0.05)  # tickets would come

    options = serve_command.make_context("serve", ["--ssl-certfile", str(tls.files.server)]).params
    context = command_lines_tls(options)
    async with aioecho.TCPServer(("127.0.0.1", 0), Sink, ssl=context) as server:
        await asyncio.to_thread(write_and_close)
        await settle(lambda: server.stats.accepted == 1 and not server.connections)
        assert server.stats.reasons == {"finished": 1}
    assert got == [b"line\n"] * 100


# What a stop does to handshakes.


def shake_hands_by_half(client: HalfCloser) -> None:
    """Send the ClientHello, and receive the server's answer."""
    with contextlib.suppress(ssl.SSLWantReadError):
        client.session.do_handshake()
    client.flush()
    client.receive()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_client_in_mid_handshake_when_the_server_stops_gets_its_reply(
    tls: SimpleNamespace, version: ssl.TLSVersion
) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls, version) as client:
            await asyncio.to_thread(shake_hands_by_half, client)
            stopping = asyncio.create_task(server.shutdown(10))
            await asyncio.sleep(2 * FRESH)  # time is the subject: it is no fresh connection any more
            await asyncio.to_thread(client.shake_hands)
            client.flush()
            await settle()
            assert await asyncio.to_thread(client.ask, b"hello\n") == b"HELLO\n"
        report = await stopping
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    assert server.stats.reasons == {"finished": 1}


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_client_far_away_in_mid_handshake_gets_its_reply_too(
    tls: SimpleNamespace, version: ssl.TLSVersion
) -> None:
    """Its request comes a round trip after the server has completed the handshake."""
    trip = 3 * FRESH
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls, version) as client:
            await asyncio.to_thread(shake_hands_by_half, client)
            stopping = asyncio.create_task(server.shutdown(10))
            await asyncio.sleep(trip)  # time is the subject
            with contextlib.suppress(ssl.SSLWantReadError):
                client.session.do_handshake()
            client.flush()
            await asyncio.sleep(trip)
            assert await asyncio.to_thread(client.ask, b"hello\n") == b"HELLO\n"
        report = await stopping
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


async def test_a_handshake_that_a_handler_has_begun_counts_as_fresh_at_a_stop(tls: SimpleNamespace) -> None:
    class Starts(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.readline()
            await self.send(b"go ahead\n")
            await self.writer.start_tls(tls.server)
            async for line in self.reader:
                await self.send(line.upper())

    async with aioecho.TCPServer(("127.0.0.1", 0), Starts) as server:
        with HalfCloser(server.server_address, tls) as client:
            client.sock.sendall(b"STARTTLS\n")
            assert await asyncio.to_thread(client.sock.recv, 100) == b"go ahead\n"
            await asyncio.to_thread(shake_hands_by_half, client)
            stopping = asyncio.create_task(server.shutdown(10))
            await asyncio.sleep(2 * FRESH)  # time is the subject
            await asyncio.to_thread(client.shake_hands)
            client.flush()
            await settle()
            assert await asyncio.to_thread(client.ask, b"hello\n") == b"HELLO\n"
        report = await stopping
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


class BlockingUpper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


KINDS = pytest.mark.parametrize("kind", [Upper, BlockingUpper])


@KINDS
@pytest.mark.parametrize("sent", [0, 1, 100])
async def test_a_peer_that_is_silent_in_its_handshake_does_not_hold_a_stop_up(
    tls: SimpleNamespace, sent: int, kind: Any
) -> None:
    async with aioecho.serve(kind, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            with contextlib.suppress(ssl.SSLWantReadError):
                client.session.do_handshake()
            client.sock.sendall(client.outgoing.read(sent))
            await settle(lambda: server.stats.active == 1)
            report = await server.shutdown(9)
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
        in_time(report.seconds, 0.4 if not sent else 1)
        assert server.stats.reasons == {"handshake": 1}
        check_identity(server)


@KINDS
async def test_a_client_in_mid_handshake_over_a_unix_socket_gets_its_reply_too(
    tls: SimpleNamespace, kind: Any, tmp_path: Path
) -> None:
    async with aioecho.serve(kind, f"unix:{tmp_path / 's'}", ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(shake_hands_by_half, client)
            stopping = asyncio.create_task(server.shutdown(10))
            await asyncio.sleep(3 * FRESH)  # time is the subject: more than FRESH, and less than linger
            assert await asyncio.to_thread(client.ask, b"hello\n") == b"HELLO\n"
        report = await stopping
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    assert server.stats.reasons == {"finished": 1}


@KINDS
async def test_a_peer_that_is_silent_in_its_handshake_over_a_unix_socket_does_not_hold_a_stop_up(
    tls: SimpleNamespace, kind: Any, tmp_path: Path
) -> None:
    async with aioecho.serve(kind, f"unix:{tmp_path / 's'}", ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls), HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(shake_hands_by_half, client)
            report = await server.shutdown(9)
        in_time(report.seconds, 1)
        assert server.stats.reasons == {"handshake": 2}


# What a stop does to a record of which a part has come.


@KINDS
@pytest.mark.parametrize("size", [20, 40_000])
async def test_a_client_of_which_half_a_record_has_come_when_the_server_stops_gets_its_reply(
    tls: SimpleNamespace, kind: Any, size: int
) -> None:
    async with aioecho.serve(kind, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.flush()
            for start in range(0, size, 2**14):
                client.session.write(b"x" * min(size - start, 2**14))
            client.session.write(b"\n")
            record = client.outgoing.read()
            await settle(lambda: server.connections)
            await asyncio.sleep(2 * FRESH)  # time is the subject: it is no fresh connection any more
            client.sock.sendall(record[: len(record) // 2])
            stopping = asyncio.create_task(server.shutdown(10))
            await asyncio.sleep(FRESH)
            client.sock.sendall(record[len(record) // 2 :])
            assert await asyncio.to_thread(client.read) == b"X" * size + b"\n"
        report = await stopping
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


@KINDS
async def test_a_stop_does_not_wait_for_a_client_whose_records_have_all_come(tls: SimpleNamespace, kind: Any) -> None:
    async with aioecho.serve(kind, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.say(b"line\n" * 10_000)  # several records at once
            received = 0
            while received < 50_000:
                received += len(await asyncio.to_thread(client.read_some))
            await asyncio.sleep(0.6)  # time is the subject: longer than linger
            stopping = asyncio.create_task(server.shutdown(10))
            assert await asyncio.to_thread(client.read_some) == b""
        report = await stopping  # the client has closed too
    in_time(report.seconds, 0.3, "the stop")
    assert report.completed == 1


@KINDS
async def test_a_hello_that_comes_slowly_is_waited_for_at_a_stop(tls: SimpleNamespace, kind: Any) -> None:
    async with aioecho.serve(kind, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            with contextlib.suppress(ssl.SSLWantReadError):
                client.session.do_handshake()
            hello = client.outgoing.read()
            stopping = asyncio.create_task(server.shutdown(10))
            for start in range(0, len(hello), len(hello) // 4):
                client.sock.sendall(hello[start : start + len(hello) // 4])
                await asyncio.sleep(0.25)  # time is the subject: more than FRESH, and less than linger
            assert await asyncio.to_thread(client.ask, b"hello\n") == b"HELLO\n"
        report = await stopping
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    assert server.stats.reasons == {"finished": 1}


# What a stop does to clients that only send.


class Sink(aioecho.StreamRequestHandler):
    one_way = True
    taken: ClassVar[list[bytes]] = []

    async def handle(self) -> None:
        async for line in self.reader:
            self.taken.append(line)


class BlockingSink(socketserver.StreamRequestHandler):
    one_way = True

    def handle(self) -> None:
        for line in self.rfile:
            Sink.taken.append(line)


class BlockingSinkOfBytes(socketserver.BaseRequestHandler):
    one_way = True

    def handle(self) -> None:
        self.request.settimeout(20)
        received = b""
        while data := self.request.recv(1000):
            received += data
            Sink.taken[:] = received.splitlines(keepends=True)


@pytest.mark.parametrize("kind", [Sink, BlockingSink, BlockingSinkOfBytes])
@pytest.mark.parametrize("version", VERSIONS)
async def test_a_client_that_only_sends_is_told_the_end_first_and_read_on(
    tls: SimpleNamespace, version: ssl.TLSVersion, kind: Any
) -> None:
    Sink.taken.clear()
    timeouts = aioecho.Timeouts(linger=0.5)
    async with aioecho.TCPServer(("127.0.0.1", 0), kind, ssl=tls.server, timeouts=timeouts) as server:
        with HalfCloser(server.server_address, tls, version) as client:
            await asyncio.to_thread(client.shake_hands)
            client.say(b"one\n")
            await settle(lambda: Sink.taken)
            await asyncio.sleep(2 * FRESH)  # time is the subject
            stopping = asyncio.create_task(server.shutdown(10))
            assert await asyncio.to_thread(client.read_some) == b""  # close_notify, while the connection is open
            client.say(b"two\n")
            assert await asyncio.to_thread(client.sock.recv, 100) == b""  # FIN
            client.say(b"three\n")
            client.say(b"four\n", "close_notify", "FIN")
            report = await stopping
    assert Sink.taken == [b"one\n", b"two\n", b"three\n", b"four\n"]
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    assert server.stats.reasons == {"finished": 1}


async def test_a_blocking_sink_that_is_at_work_tells_its_client_when_it_reads_again(tls: SimpleNamespace) -> None:
    class Works(BlockingSink):
        def handle(self) -> None:
            for line in self.rfile:
                time.sleep(0.6)  # longer than linger
                Sink.taken.append(line)

    Sink.taken.clear()
    async with aioecho.serve(
        Works, "tcp://127.0.0.1:0", ssl=tls.server, timeouts=aioecho.Timeouts(linger=0.3)
    ) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.say(b"one\n")
            await settle(lambda: server.connections)
            await asyncio.sleep(2 * FRESH)  # time is the subject
            stopping = asyncio.create_task(server.shutdown(10))
            assert await asyncio.to_thread(client.read_some) == b""
            client.say(b"two\n", "close_notify", "FIN")
            report = await stopping
    assert Sink.taken == [b"one\n", b"two\n"]
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    assert server.stats.reasons == {"finished": 1}


@pytest.mark.parametrize("kind", [Sink, BlockingSink])
@pytest.mark.parametrize("version", VERSIONS)
async def test_one_that_looks_for_no_end_loses_one_line_at_the_most(
    tls: SimpleNamespace, version: ssl.TLSVersion, kind: Any
) -> None:
    Sink.taken.clear()
    sent = 0

    def send_until_refused(address: tuple[str, int]) -> None:
        nonlocal sent
        with HalfCloser(address, tls, version) as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.shake_hands()
            with contextlib.suppress(OSError):
                while True:
                    client.say(b"%d\n" % sent)
                    sent += 1
                    time.sleep(0.0005)

    class Slow(kind):  # type: ignore[misc]
        def finish(self) -> Any:
            time.sleep(0.05)  # what comes now is read no more
            return super().finish()

    timeouts = aioecho.Timeouts(linger=0.2)
    async with aioecho.TCPServer(("127.0.0.1", 0), Slow, ssl=tls.server, timeouts=timeouts) as server:
        sending = asyncio.create_task(asyncio.to_thread(send_until_refused, server.server_address))
        await settle(lambda: len(Sink.taken) > 100)
        report = await server.shutdown(10)
        await sending
    assert Sink.taken == [b"%d\n" % number for number in range(len(Sink.taken))]
    assert sent - len(Sink.taken) <= 1
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    in_time(report.seconds, 3)


# How many handshakes there are at once.


def hellos(tls: SimpleNamespace, server: aioecho.BaseServer, count: int, part: float) -> list[HalfCloser]:
    """Return clients that have sent so much of their ClientHello, and wait."""
    clients = []
    for _ in range(count):
        client = HalfCloser(server.server_address, tls)
        with contextlib.suppress(ssl.SSLWantReadError):
            client.session.do_handshake()
        hello = client.outgoing.read()
        client.sock.sendall(hello[: int(part * len(hello))])
        clients.append(client)
    return clients


async def test_no_more_handshakes_are_in_progress_than_the_limit_and_all_that_wait_are_served(
    tls: SimpleNamespace,
) -> None:
    limits = aioecho.Limits(max_handshakes=2)
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server, limits=limits) as server:
        before = tls.server.session_stats()

        def count(what: str) -> int:
            return int(tls.server.session_stats()[what] - before[what])

        clients = hellos(tls, server, 10, 1)
        await settle(lambda: server.stats.active == 10 and count("accept") == 2)
        await settle()
        for client in clients:
            assert count("accept") <= count("accept_good") + 2
            with client:
                assert await asyncio.to_thread(client.ask, b"hello\n", "close_notify") == b"HELLO\n"
        await settle(lambda: server.stats.completed == 10)


async def test_peers_that_stop_in_mid_handshake_keep_no_other_out(tls: SimpleNamespace) -> None:
    limits, timeouts = aioecho.Limits(max_handshakes=2), aioecho.Timeouts(handshake=30)
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server, limits=limits, timeouts=timeouts) as server:
        before = tls.server.session_stats()["accept"]
        half = hellos(tls, server, 20, 0.5)
        await settle(lambda: server.stats.active == 20)
        began = time.monotonic()
        assert await ask(server, tls.client, b"hello\n", 6) == b"HELLO\n"
        in_time(time.monotonic() - began, 0.5)
        assert tls.server.session_stats()["accept"] == before + 1  # half a hello is nothing to OpenSSL
        whole = hellos(tls, server, 2, 1)
        await settle(lambda: tls.server.session_stats()["accept"] == before + 3)
        began = time.monotonic()
        assert await ask(server, tls.client, b"hello\n", 6) == b"HELLO\n"
        in_time(time.monotonic() - began, 2)
        assert server.stats.reasons["handshake"] == 1  # the oldest
        for client in half + whole:
            client.sock.close()
        await settle(lambda: not server.connections)
        check_identity(server)


async def test_the_time_of_a_handshake_that_waits_counts_from_its_accepting(tls: SimpleNamespace) -> None:
    limits, timeouts = aioecho.Limits(max_handshakes=1), aioecho.Timeouts(handshake=0.5)
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server, limits=limits, timeouts=timeouts) as server:
        clients = hellos(tls, server, 5, 1)
        began = time.monotonic()
        await settle(lambda: server.stats.reasons["handshake"] == 5)
        in_time(time.monotonic() - began, 1)
        for client in clients:
            client.sock.close()


async def test_a_client_that_sends_on_though_its_handshake_waits_is_cut_off(tls: SimpleNamespace) -> None:
    limits = aioecho.Limits(max_handshakes=1)
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server, limits=limits) as server:
        with contextlib.ExitStack() as stack:
            _, waits = (stack.enter_context(client) for client in hellos(tls, server, 2, 1))
            await settle(lambda: server.stats.active == 2)
            await settle()
            with contextlib.suppress(ConnectionError):
                await asyncio.to_thread(waits.sock.sendall, bytes(2**20))
            await settle(lambda: server.stats.reasons["handshake"] == 1)


@pytest.mark.slow
@pytest.mark.parametrize("part", [0, 0.5])
async def test_a_silent_tls_connection_takes_as_little_memory_as_any(tls: SimpleNamespace, part: float) -> None:
    count = 500

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    limits = aioecho.Limits(backlog=2 * count)
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server, limits=limits) as server:
        hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc" + bytes(508)
        socks = [socket.create_connection(server.server_address) for _ in range(count)]
        await settle()
        gc.collect()
        before = resident()
        socks += [socket.create_connection(server.server_address) for _ in range(count)]
        for sock in socks:
            sock.sendall(hello[: int(part * len(hello))])
        await settle(lambda: server.stats.active == 2 * count)
        await settle()
        assert (resident() - before) / count < 20_000  # 50 MB for 5,000, and what else goes on
        for sock in socks:
            sock.close()
        await settle(lambda: not server.connections)


@pytest.mark.parametrize("size", [1, 3, 4, 5, 100, 10_000])
@pytest.mark.parametrize("how", ["segments", "records"])
async def test_a_hello_may_come_in_any_pieces(tls: SimpleNamespace, how: str, size: int) -> None:
    def talk() -> bytes:
        with HalfCloser(server.server_address, tls) as client:
            client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ssl.SSLWantReadError):
                client.session.do_handshake()
            hello = client.outgoing.read()
            if how == "segments":
                for start in range(0, len(hello), size):
                    client.sock.sendall(hello[start : start + size])
            else:
                message = hello[5:]
                parts = (message[start : start + size] for start in range(0, len(message), size))
                client.sock.sendall(b"".join(hello[:3] + struct.pack(">H", len(part)) + part for part in parts))
            return client.ask(b"hello\n", "close_notify")

    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        assert await asyncio.to_thread(talk) == b"HELLO\n"


# Key updates, which have to be made by hand.


def expand_label(secret: bytes, label: bytes, size: int) -> bytes:
    """Return what RFC 8446, 7.1, derives so, for SHA-384."""
    full = b"tls13 " + label
    info = struct.pack(">HB", size, len(full)) + full + b"\0"
    return HKDFExpand(algorithm=hashes.SHA384(), length=size, info=info).derive(secret)


def key_updates(secret: bytes, count: int) -> bytes:
    """Return so many records that ask for a key update in return, of a client that has sent nothing yet by this secret."""
    records = b""
    for _ in range(count):
        key, iv = expand_label(secret, b"key", 32), expand_label(secret, b"iv", 12)
        message = b"\x18\0\0\1\1" + b"\x16"  # update_requested, in a handshake record
        header = struct.pack(">BHH", 23, 0x0303, len(message) + 16)
        records += header + AESGCM(key).encrypt(iv, message, header)
        secret = expand_label(secret, b"traffic upd", 48)
    return records


@pytest.mark.parametrize("handler", ["reads", "has closed"])
async def test_a_client_that_floods_with_key_updates_and_reads_nothing_is_cut_off(
    tls: SimpleNamespace, handler: str, tmp_path: Path
) -> None:
    async def handle(self: Any) -> None:
        if handler == "has closed":
            await self.reader.read(1)
            self.writer.close()
            await self.writer.wait_closed()
        else:
            await self.reader.read()

    def flood() -> None:
        context = ssl.create_default_context(cafile=tls.files.ca)
        context.keylog_filename = str(tmp_path / "keys")
        with HalfCloser(server.server_address, tls) as client:
            client.session = context.wrap_bio(client.incoming, client.outgoing, server_hostname="127.0.0.1")
            client.shake_hands()
            client.flush()
            assert client.session.cipher()[0] == "TLS_AES_256_GCM_SHA384"  # type: ignore[index]
            keys = dict(line.split()[::2] for line in (tmp_path / "keys").read_text().splitlines()[1:])
            records = key_updates(bytes.fromhex(keys["CLIENT_TRAFFIC_SECRET_0"]), 20_000)
            with contextlib.suppress(ConnectionError):
                client.sock.sendall(records)
                while client.sock.recv(1000):
                    pass

    kind = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    timeouts = aioecho.Timeouts(linger=None)
    async with aioecho.TCPServer(("127.0.0.1", 0), kind, ssl=tls.server, timeouts=timeouts) as server:
        server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        flooding = asyncio.create_task(asyncio.to_thread(flood))
        await settle(lambda: server.stats.reasons["key updates"] == server.stats.failed == 1)
        await flooding


# Alerts, ends and timeouts.


@pytest.mark.parametrize("size", [1, 2**18])
async def test_the_alert_reaches_a_refused_client_that_sends_on(tls: SimpleNamespace, size: int) -> None:
    """With TLS 1.3 a client sends its request with the certificate that is refused."""
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo, ssl=tls.mutual) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            await asyncio.to_thread(client.say, b"x" * size)
            await settle()
            await asyncio.to_thread(client.say, b"x")  # when the server has sent the alert
            await settle()
            with pytest.raises(ssl.SSLError, match="alert certificate required"):
                await asyncio.to_thread(client.read)
        await settle(lambda: server.stats.rejected == server.stats.reasons["handshake"] == 1)


async def test_a_refused_client_that_does_not_close_is_dropped(tls: SimpleNamespace) -> None:
    timeouts = aioecho.Timeouts(linger=0.1)
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo, ssl=tls.mutual, timeouts=timeouts) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.flush()
            await settle(lambda: server.stats.rejected == 1, 2)


async def test_timeouts_handshake_holds_for_a_handshake_that_a_handler_begins(tls: SimpleNamespace) -> None:
    met: list[BaseException] = []

    class Starts(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.send(b"go ahead\n")
            try:
                await self.writer.start_tls(tls.server)
            except ConnectionError as error:
                met.append(error)
                raise

    timeouts = aioecho.Timeouts(handshake=0.2)
    async with aioecho.TCPServer(("127.0.0.1", 0), Starts, timeouts=timeouts) as server:
        with HalfCloser(server.server_address, tls) as client:
            assert await asyncio.to_thread(client.sock.recv, 100) == b"go ahead\n"
            await settle(lambda: server.stats.failed == server.stats.reasons["connection lost"] == 1, 5)
    assert [str(error) for error in met] == ["the TLS handshake took longer than 0.2 seconds"]


@pytest.mark.parametrize("secure", [False, True])
async def test_a_verify_request_that_waits_has_the_time_of_a_handshake(tls: SimpleNamespace, secure: bool) -> None:
    class Server(aioecho.TCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:  # type: ignore[override]
            await asyncio.Event().wait()
            return True

    timeouts = aioecho.Timeouts(handshake=0.3)
    context = tls.server if secure else None
    async with Server(("127.0.0.1", 0), Upper, ssl=context, timeouts=timeouts) as server:
        with HalfCloser(server.server_address, tls) as client:
            if secure:
                await asyncio.to_thread(client.shake_hands)
                client.flush()
            await settle(lambda: server.stats.rejected == server.stats.reasons["handshake"] == 1, 5)
            check_identity(server)


@pytest.mark.parametrize("secure", [False, True])
async def test_a_clients_reset_ends_a_verify_request_that_waits(tls: SimpleNamespace, secure: bool) -> None:
    is_waiting = asyncio.Event()

    class Server(aioecho.TCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:  # type: ignore[override]
            is_waiting.set()
            await asyncio.Event().wait()
            return True

    timeouts = aioecho.Timeouts(handshake=None)
    async with Server(("127.0.0.1", 0), Upper, ssl=tls.server if secure else None, timeouts=timeouts) as server:
        with HalfCloser(server.server_address, tls) as client:
            if secure:
                await asyncio.to_thread(client.shake_hands)
                client.flush()
            await is_waiting.wait()
            reset(client.sock)
            await settle(lambda: server.stats.failed == server.stats.reasons["connection lost"] == 1)
            check_identity(server)


async def test_a_verify_request_may_raise_a_timeout_of_its_own(
    tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    class Server(aioecho.TCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:  # type: ignore[override]
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
            return True

    async with Server(("127.0.0.1", 0), Upper) as server:
        with socket.create_connection(server.server_address):
            await settle(lambda: server.stats.failed == server.stats.reasons["error"] == 1)
    assert len(complaints(caplog)) == 1


async def test_what_came_before_a_reset_is_read_before_the_error_over_tls_too(tls: SimpleNamespace) -> None:
    got: list[bytes] = []
    met: list[BaseException] = []

    async def handle(self: Any) -> None:
        await asyncio.sleep(0.05)
        try:
            async for line in self.reader:
                got.append(line)
                await asyncio.sleep(0)
        except OSError as error:
            met.append(error)
            raise

    lines = [b"%099d\n" % number for number in range(1000)]
    kind = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    async with aioecho.TCPServer(("127.0.0.1", 0), kind, ssl=tls.server) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            await asyncio.to_thread(client.say, b"".join(lines))
            await settle(lambda: not unacknowledged(client.sock))
            reset(client.sock)
            await settle(lambda: server.stats.failed == server.stats.reasons["connection lost"] == 1)
    assert got == lines
    assert [type(error) for error in met] == [ConnectionResetError]


async def test_a_tls_connection_that_another_task_closes_ends_at_once_for_its_handler(tls: SimpleNamespace) -> None:
    handlers: list[Any] = []
    got: list[bytes] = []

    async def handle(self: Any) -> None:
        handlers.append(self)
        got.append(await self.reader.read())

    kind = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle})
    timeouts = aioecho.Timeouts(linger=None)
    async with aioecho.TCPServer(("127.0.0.1", 0), kind, ssl=tls.server, timeouts=timeouts) as server:
        with HalfCloser(server.server_address, tls) as client:
            await asyncio.to_thread(client.shake_hands)
            client.flush()
            await settle(lambda: handlers)
            await settle()
            handlers[0].writer.close()
            await settle()
            assert got == [b""]
            assert await asyncio.to_thread(client.read_some) == b""
        await settle(lambda: server.stats.completed == 1)
