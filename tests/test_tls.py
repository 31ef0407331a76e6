"""TLS endpoints: handshakes that fail, peers that are silent, certificates of clients, and the end in good order."""

import asyncio
import functools
import logging
import socket
import ssl
import time
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle

import aioecho
from aioecho.client import connect
from aioecho.echo import Echo, Upper


async def ask(server: aioecho.BaseServer, context: ssl.SSLContext, request: bytes, size: int) -> bytes:
    reader, writer = await connect(server.names[0], ssl=context)
    writer.write(request)
    answer = await reader.readexactly(size)
    writer.close()
    await writer.wait_closed()
    return answer


async def test_lines_come_back_over_tls(tls: SimpleNamespace) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        assert await ask(server, tls.client, b"Hello, Server!\n", 15) == b"HELLO, SERVER!\n"
        await settle(lambda: server.stats.completed == 1)


async def test_a_client_must_show_its_certificate_where_that_is_asked_for(tls: SimpleNamespace) -> None:
    class Names(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            certificate = self.writer.get_extra_info("peercert")
            await self.send(certificate["subjectAltName"][0][1].encode())

    async with aioecho.TCPServer(("127.0.0.1", 0), Names, ssl=tls.mutual) as server:
        assert await ask(server, tls.known_client, b"", 18) == b"client@example.org"
        reader, writer = await connect(server.names[0], ssl=tls.client)
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
    timeouts = aioecho.Timeouts(handshake=0.3)
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
    assert 1 <= len(records) <= 4  # one a second at the most
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
        stopping = asyncio.create_task(server.shutdown(10))
        for number, sock in enumerate(socks):
            assert await asyncio.to_thread(receive, sock) == b"CLIENT %d\n" % number
        report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (10, 0, 0)
        assert report.seconds < 2


async def test_a_handshake_under_way_does_not_hang_the_stop(tls: SimpleNamespace) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper, ssl=tls.server) as server:
        with socket.create_connection(server.server_address):
            await settle(lambda: server.stats.active == 1)
            report = await server.shutdown(0.1)
        assert report.seconds < 1
        assert report.cancelled + report.aborted == 1
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
        assert report.seconds < 0.7
        assert (report.completed, report.cancelled, report.aborted) == (0, 0, 1)


def connect_plainly(server: aioecho.BaseServer, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return a client's blocking socket, whose kernel takes little that nobody reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    sock.settimeout(10)
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
