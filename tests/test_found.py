"""Bugs that were found by reading and by scripts of random calls: what was wrong is told at each."""

import asyncio
import contextlib
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, ask, close, handler

import aioecho
from aioecho.framing import Lines


# A read that let the loop run went on with the buffer as it was before. What another coroutine had read meanwhile was read
# twice (readexactly, readuntil), and lines or frames that it had split off were lost.
@pytest.mark.parametrize("how", ["exactly", "line", "next", "until", "frames"])
async def test_coroutines_that_read_in_turn_get_every_byte_once(how: str) -> None:
    lines = [b"%06d\n" % number for number in range(1500)]
    got: list[bytes] = []

    async def handle(self: Any) -> None:
        reader = self.reader
        frames = reader.frames(Lines(keep_end=True))
        read: dict[str, Callable[[], Any]] = {
            "exactly": lambda: reader.readexactly(7),
            "line": reader.readline,
            "next": lambda: anext(reader),
            "until": lambda: reader.readuntil(b"\n"),
            "frames": lambda: anext(frames),
        }

        async def read_all(turns: int) -> None:
            while len(got) < len(lines):
                got.append(await read[how]())
                until = time.perf_counter() + 0.0001
                while time.perf_counter() < until:
                    pass
                if len(got) % turns == 0:
                    await asyncio.sleep(0)

        assert await reader.readline() == b"begin\n"
        await asyncio.gather(*map(read_all, (2, 3, 5)))

    # The coroutine that comes last waits beside another at the end of the stream, so there are two lines more than are read.
    await ask_all(handle, b"begin\n" + b"".join(lines) + b"%06d\n" % 0 * 2)
    assert sorted(got[: len(lines)]) == lines


async def ask_all(handle: Any, request: bytes) -> bytes:
    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        answer = await ask(server, request)
        await settle(lambda: server.stats.active == 0)
        assert server.stats.failed == 0
        return answer


# Taking what was buffered for the beginning of a handshake counted as reading a message, also where nothing was buffered. So a
# stop waited for the whole grace for every idle TLS client whose handler was in read() or readexactly().
@pytest.mark.parametrize("size", [1, 100])
async def test_a_stop_does_not_wait_for_a_tls_client_that_has_sent_nothing(size: int, tls: Any) -> None:
    is_reading = asyncio.Event()

    async def handle(self: Any) -> None:
        is_reading.set()
        with contextlib.suppress(asyncio.IncompleteReadError):
            await (self.reader.readexactly(size) if size > 1 else self.reader.read(size))

    async with aioecho.TCPServer(ANYWHERE, handler(handle), ssl=tls.server) as server:
        _, writer = await asyncio.open_connection(*server.server_address, ssl=tls.client)
        await is_reading.wait()
        [connection] = server.connections
        assert not connection.is_in_message()
        await asyncio.wait_for(server.shutdown(grace=60), 30)
        assert server.stats.completed == 1
        await close(writer)


# What finish() wrote while more was buffered to read was collected, and not handed to the transport before that was closed.
@pytest.mark.parametrize("with_tls", [False, True])
async def test_what_finish_writes_is_sent_although_there_is_more_to_read(with_tls: bool, tls: Any) -> None:
    async def handle(self: Any) -> None:
        assert await self.reader.readline() == b"a\n"
        while self.reader.end is None and not with_tls:
            await asyncio.sleep(0)

    async def finish(self: Any) -> None:
        self.writer.write(b"bye")

    kind = handler(handle, finish=finish)
    async with aioecho.TCPServer(ANYWHERE, kind, ssl=tls.server if with_tls else None) as server:
        assert await ask(server, b"a\nb\n", ssl=tls.client if with_tls else None) == b"bye"
        await settle(lambda: server.stats.active == 0)


# readexactly() handed out what was buffered without a look at the limit: a peer that sent at once more than it got through.
async def test_readexactly_refuses_what_is_over_max_frame_though_it_is_buffered() -> None:
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        seen.append(await self.reader.readexactly(4))
        with pytest.raises(aioecho.FrameTooLong):
            await self.reader.readexactly(2000)
        seen.append(await self.reader.readexactly(2))

    async with aioecho.TCPServer(ANYWHERE, handler(handle), limits=aioecho.Limits(max_frame=1000)) as server:
        await ask(server, b"head" + b"z" * 2000 + b"ok" + b"more")
    assert seen == [b"head", b"ok"]


# asyncio's own put a future where the reader has a waiter: the data that came next met an AttributeError in the protocol, and
# the loop cut the connection off.
async def test_code_that_calls_wait_for_data_as_asyncios_methods_do_is_served() -> None:
    async def handle(self: Any) -> None:
        reader = self.reader
        while not reader._buffer and not reader.at_eof():
            await reader._wait_for_data("peek")
        await self.send(bytes(reader._buffer) + await reader.readexactly(4))

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: any(connection.handler for connection in server.connections))
        await settle()
        writer.write(b"data")
        assert await reader.read() == b"datadata"
        await close(writer)


async def test_wait_for_data_of_a_reader_alone_returns_when_it_is_fed() -> None:
    reader = aioecho.StreamReader()
    waiting = asyncio.create_task(reader._wait_for_data("peek"))
    await settle()
    assert not waiting.done()
    reader.feed_data(b"data")
    await waiting
    assert await reader.read(9) == b"data"


# What was written to a transport that the handler had kept overtook what it had written to the writer before, if that was
# collected.
async def test_what_is_written_to_the_transport_comes_after_what_was_written_before() -> None:
    async def handle(self: Any) -> None:
        transport = self.writer.transport
        assert await self.reader.readline() == b"a\n"
        self.writer.write(b"1")
        transport.write(b"2")
        await self.send(b"3")
        transport.write(b"4")

    assert await ask_all(handle, b"a\nb\n") == b"1234"


# On uvloop a transport reads no more for a turn of the loop after a chunk that filled its buffer. The end of that undid what
# the handler had asked for, also of a transport that it got before the chunk came.
@pytest.mark.parametrize("is_kept", [False, True])
async def test_a_handlers_pause_reading_holds_after_a_large_chunk(is_kept: bool, tmp_path: Path) -> None:
    is_reading: list[bool] = []
    is_paused = asyncio.Event()

    async def handle(self: Any) -> None:
        transport = self.writer.transport if is_kept else None
        full = 2**16 if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop) else 256_000
        while len(await self.reader.read(2**20)) < full:
            pass
        transport = transport or self.writer.transport
        transport.pause_reading()
        await settle()
        is_reading.append(transport.is_reading())
        is_paused.set()
        transport.resume_reading()

    path = str(tmp_path / "s")
    async with aioecho.UnixStreamServer(path, handler(handle)):
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
            sock.connect(path)
            sock.setblocking(False)
            while not is_paused.is_set():
                try:
                    await asyncio.wait_for(loop.sock_sendall(sock, b"x" * 2**19), 5)
                except OSError:
                    break
                await settle()
    assert is_reading == [False]


# After a read that fills its buffer libuv reads on at once, up to 32 times: eight megabytes of one peer, and nothing else.
@pytest.mark.parametrize(
    "method", ["read", "readexactly"]
)  # which has to resume the transport that too much has paused
async def test_a_peer_that_has_sent_much_gets_one_read_in_a_turn_of_the_loop(tmp_path: Path, method: str) -> None:
    turns, is_over, read_in = 0, False, Counter[int]()
    loop = asyncio.get_running_loop()

    def turn() -> None:
        nonlocal turns
        turns += 1
        if not is_over:
            loop.call_soon(turn)

    async def handle(self: Any) -> None:
        time.sleep(0.05)  # not the loop's sleep: what comes meanwhile is all there when the loop reads
        while data := await getattr(self.reader, method)(2**20 if method == "read" else 300_000):
            read_in[turns] += len(data)
            time.sleep(0.001)  # a slow handler: a fast one may get more, as long as that does not take longer

    path = str(tmp_path / "s")
    async with aioecho.UnixStreamServer(path, handler(handle)):
        turn()
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**22)
            sock.connect(path)

            def send() -> int:
                sock.setblocking(False)
                sent = 0
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += sock.send(b"x" * 2**15)
                return sent

            sent = await asyncio.to_thread(send)
            await settle(lambda: sum(read_in.values()) > sent - 300_000)
            is_over = True
    assert sent > 300_000
    # What uvloop reads at a time; or two records, where two such reads and their rest have these: there were four and more.
    assert max(read_in.values()) <= (256_000 if method == "read" else 600_000)


# On uvloop a TLS transport that was closed in the turn after a large chunk was never read again: it met its peer's close_notify
# only when the time to linger was over.
async def test_a_tls_stream_that_is_closed_after_a_large_chunk_hears_its_peer_close(tls: Any) -> None:
    async def handle(self: Any) -> None:
        await self.reader.readexactly(1)
        time.sleep(0.2)  # the loop reads nothing meanwhile, so that there is a large piece to read
        last, size = b"", 0
        while len(last) < 2**16 and size < 2**17:  # it may come in smaller pieces
            last = await self.reader.read(2**20)
            size += len(last)
        self.writer.close()

    def send(address: Any) -> float:
        with (
            socket.create_connection(address) as plain,
            tls.client.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(b"x")
            sock.sendall(b"x" * 2**17)
            assert sock.recv(1) == b""
            with contextlib.suppress(OSError):
                sock.unwrap()
            return time.monotonic()

    async with aioecho.TCPServer(
        ANYWHERE, handler(handle), ssl=tls.server, timeouts=aioecho.Timeouts(linger=20)
    ) as server:
        ended = await asyncio.to_thread(send, server.server_address)
        await settle(lambda: server.stats.active == 0, 30)
        assert time.monotonic() - ended < 10


# TLS can't end one direction alone. The error of write_eof() left a writer that no limit held for any more.
async def test_limits_hold_after_a_write_eof_that_tls_does_not_support(tls: Any) -> None:
    async def handle(self: Any) -> None:
        with pytest.raises(NotImplementedError):
            self.writer.write_eof()
        assert await self.reader.readline() == b"a\n"
        for _ in range(200):  # of a size that no kernel takes, to a client that reads nothing
            self.writer.write(b"x" * 2**18)

    limits = aioecho.Limits(max_write_buffer=2**20)
    async with aioecho.TCPServer(ANYWHERE, handler(handle), ssl=tls.server, limits=limits) as server:
        _, writer = await asyncio.open_connection(*server.server_address, ssl=tls.client)
        writer.write(b"a\nb")
        await settle(lambda: server.stats.failed == 1)
        assert server.stats.reasons["write buffer"] == 1
        writer.transport.abort()
        await settle()


# A connection whose task was cancelled before its first step stayed open on uvloop, until the garbage collector came.
async def test_a_connection_that_is_cancelled_before_it_begins_is_closed() -> None:
    async def handle(self: Any) -> None:
        """Never called."""

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        server.on_accept = lambda _: [connection.task.cancel() for connection in server.connections]
        with socket.create_connection(server.server_address) as sock:
            sock.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.to_thread(sock.recv, 1) == b""
            await settle(lambda: server.stats.accepted == 1 and not server.connections)
        assert server.stats.active == 0
