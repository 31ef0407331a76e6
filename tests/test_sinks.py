"""What a stop does to clients that only send, and do not look whether the server has ended its side: `one_way`."""

import asyncio
import contextlib
import logging
import socket
import socketserver
import ssl
import struct
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settle

import aioecho

QUICK = aioecho.Timeouts(linger=0.1)

taken: list[bytes] = []
ends: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_taken_yet() -> None:
    taken.clear()
    ends.clear()


class Sink(aioecho.StreamRequestHandler):
    one_way = True

    async def handle(self) -> None:
        async for line in self.reader:
            taken.append(line)
            await self.work()
        ends.append(self.reader.end)

    async def work(self) -> None:
        pass


class Waiting(Sink):
    """Slower than its client, as it waits for something else."""

    async def work(self) -> None:
        await asyncio.sleep(0.002)


class Busy(Sink):
    """Slower than its client, as it computes: the loop runs seldom."""

    async def work(self) -> None:
        time.sleep(0.0015)


class Blocking(socketserver.StreamRequestHandler):
    one_way = True

    def handle(self) -> None:
        for line in self.rfile:
            taken.append(line)
            time.sleep(0.002)


class BlockingByPieces(socketserver.BaseRequestHandler):
    one_way = True

    def handle(self) -> None:
        received = b""
        while piece := self.request.recv(100):
            received += piece
            time.sleep(0.002)
        taken[:] = received.splitlines(keepends=True)


class Lines:
    """A client that sends a line every so many seconds until that fails. It looks for no end of the server's."""

    def __init__(self, address: Any, seconds: float, context: ssl.SSLContext | None = None) -> None:
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        sock.connect(address)
        self.sock = sock
        self.context = context
        self.seconds = seconds
        self.sent = 0
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def _send(self) -> None:
        with self._shake_hands() as sock, contextlib.suppress(OSError):  # of TLS too
            while True:
                sock.sendall(b"line %d\n" % self.sent)
                self.sent += 1
                time.sleep(self.seconds)

    def _shake_hands(self) -> socket.socket:
        return self.sock if self.context is None else self.context.wrap_socket(self.sock, server_hostname="localhost")


@pytest.mark.timed
@pytest.mark.parametrize("where", ["tcp", "tls", "unix"])
@pytest.mark.parametrize("handler", [Sink, Waiting, Busy, Blocking, BlockingByPieces])
async def test_a_client_that_sends_on_loses_a_line_at_the_most_though_its_handler_is_slower(
    handler: Any, where: str, tmp_path: Path, tls: SimpleNamespace
) -> None:
    has_tls = where == "tls"
    endpoint = "tcp://127.0.0.1:0" if where != "unix" else f"unix:{tmp_path / 's'}"
    async with aioecho.serve(handler, endpoint, timeouts=QUICK, ssl=tls.server if has_tls else None) as server:
        client = Lines(server.server_address, 0.001, tls.client if has_tls else None)
        await settle(lambda: client.sent > 150)  # and the connection is no fresh one any more
        report = await server.shutdown(20)
        await asyncio.to_thread(client.thread.join)
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    assert taken == [b"line %d\n" % number for number in range(len(taken))]
    assert client.sent - len(taken) <= 1
    assert ends in ([], ["drain"])
    assert server.stats.reasons == {"finished": 1}


async def test_what_a_client_sends_to_a_handler_at_work_is_refused_and_half_a_line_is_not_handed_out() -> None:
    class Works(Sink):
        async def work(self) -> None:
            await is_stopped.wait()

    def send_until_refused(sock: socket.socket) -> None:
        assert sock.recv(1) == b""  # FIN
        with contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(b"o")
                time.sleep(0.001)
        loop.call_soon_threadsafe(is_stopped.set)

    loop, is_stopped = asyncio.get_running_loop(), asyncio.Event()
    async with aioecho.TCPServer(("127.0.0.1", 0), Works, timeouts=QUICK) as server:
        with socket.create_connection(server.server_address) as sock:
            sock.sendall(b"one\ntw")
            await settle(lambda: taken)
            stopping = asyncio.create_task(server.shutdown(1))
            await asyncio.to_thread(send_until_refused, sock)
            report = await stopping
    assert taken == [b"one\n"]
    assert not ends
    assert (
        report.completed + report.unfinished == 1
    )  # it meets the reset, where its loop tells of that, or is cancelled
    assert server.stats.failed == 0


async def test_a_client_that_sends_as_fast_as_it_can_is_stopped_though_its_handler_is_as_fast() -> None:
    class Counts(aioecho.StreamRequestHandler):
        one_way = True

        async def handle(self) -> None:
            while await self.reader.read(2**16):
                taken[:] = [b"some"]

    def send_until_refused(sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                sock.sendall(bytes(2**18))

    async with aioecho.TCPServer(("127.0.0.1", 0), Counts, timeouts=QUICK) as server:
        with socket.create_connection(server.server_address) as sock:
            sending = asyncio.create_task(asyncio.to_thread(send_until_refused, sock))
            await settle(lambda: taken)
            report = await server.shutdown(10)
            await sending
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


async def test_what_a_drain_reads_past_the_loop_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Turning(Sink):
        """In each turn of the loop something comes after the loop has polled, and before its timers run."""

        async def work(self) -> None:
            time.sleep(0.003)
            await asyncio.sleep(0)

    caplog.set_level(logging.DEBUG, logger="aioecho.connection")
    async with aioecho.TCPServer(("127.0.0.1", 0), Turning, timeouts=QUICK) as server:
        client = Lines(server.server_address, 0.001)
        await settle(lambda: client.sent > 50)
        await server.shutdown(20)
        await asyncio.to_thread(client.thread.join)
    assert f" {sum(map(len, taken))} bytes in, 0 out" in caplog.text


async def test_a_handler_that_keeps_up_meets_the_end_between_two_lines_that_come_in_pieces() -> None:
    class Works(Sink):
        async def work(self) -> None:
            await asyncio.sleep(0.02)

    def send_in_pieces(sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):
            for _ in range(9):  # each ends in mid-line, and is worked at for longer than it takes to look again
                sock.sendall(b"a line\n" * 6 + b"half")
                time.sleep(0.2)
                sock.sendall(b" a line\n")

    async with aioecho.TCPServer(("127.0.0.1", 0), Works, timeouts=QUICK) as server:
        with socket.create_connection(server.server_address) as sock:
            sending = asyncio.create_task(asyncio.to_thread(send_in_pieces, sock))
            await settle(lambda: taken)
            report = await server.shutdown(10)
            await sending
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    assert ends == ["drain"]


async def test_lines_before_a_reset_are_read_though_it_looks_again_whether_to_stop_the_client() -> None:
    class Works(Sink):
        async def work(self) -> None:
            if len(taken) == 1:
                async with self.unbroken():
                    await is_reset.wait()
                await asyncio.sleep(0.15)  # it looks meanwhile

    def reset(sock: socket.socket) -> None:
        assert sock.recv(1) == b""  # FIN
        time.sleep(0.7)  # linger is over, and it looks
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    is_reset = asyncio.Event()
    async with aioecho.TCPServer(("127.0.0.1", 0), Works, timeouts=QUICK) as server:
        sock = socket.create_connection(server.server_address)
        sock.sendall(b"one\ntwo\nthree\n")
        await settle(lambda: taken)
        stopping = asyncio.create_task(server.shutdown(10))
        await asyncio.to_thread(reset, sock)
        await asyncio.sleep(0.05)
        is_reset.set()
        await stopping
    assert taken == [b"one\n", b"two\n", b"three\n"]
    assert server.stats.reasons == {"connection lost": 1}


async def test_a_handler_at_work_in_mid_upload_reads_on_until_its_client_has_ended() -> None:
    class Store(aioecho.StreamRequestHandler):
        one_way = True

        async def handle(self) -> None:
            taken.append(await self.reader.read())
            ends.append(self.reader.end)

    async with aioecho.TCPServer(("127.0.0.1", 0), Store, timeouts=QUICK) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"half")
        await settle(lambda: server.stats.accepted)
        stopping = asyncio.create_task(server.shutdown(10))
        assert await reader.read() == b""
        for _ in range(20):  # for longer than it looks again
            writer.write(b".")
            await asyncio.sleep(0.02)
        writer.write_eof()
        report = await stopping
        writer.close()
        await writer.wait_closed()
    assert taken == [b"half" + b"." * 20]
    assert ends == ["peer"]
    assert (report.completed, report.unfinished) == (1, 0)


async def test_a_handler_that_waits_between_two_lines_is_not_unfinished_when_the_grace_is_shorter_than_linger() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Sink, timeouts=aioecho.Timeouts(linger=20)) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"one\n")
        await settle(lambda: taken)
        report = await server.shutdown(0.1)
        writer.close()
        await writer.wait_closed()
    assert taken == [b"one\n"]
    assert (report.cancelled, report.unfinished) == (1, 0)
