"""What a peer could make a server do without end or measure, and what a mistake could; what was wrong is told at each."""

import asyncio
import contextlib
import gc
import itertools
import socket
import socketserver
import tracemalloc
import weakref
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ON_ONE_LOOP, ask, close, handler, reset

import aioecho
from aioecho.framing import Framing, LengthPrefixed, Lines
from aioecho.net.resets import reset_watch
from aioecho.runtime.logs import format_address
from aioecho.runtime.loops import loop_factory
from aioecho.serving import audience
from aioecho.streams.reader import StreamReader


# A framing that used nothing of what came was asked again, or its frames handed out, for ever, and the loop stood still.
class Wrong(Framing):
    def __init__(self, *split: Any) -> None:
        self.result = split

    def split(self, buffer: Any, scanned: int = 0, /) -> Any:
        return self.result

    def join(self, frame: bytes, /) -> bytes:
        return frame


MISTAKES = [
    (([], 0, 2), "no frames, used=0 and wanted=2 for 3 bytes, so it has to want more"),
    (([b"abc"], 0, 1), "1 frames with used=0, so it would return them for ever"),
    (([b"abc"], 4, 1), "used=4 of 3 bytes"),
]


@pytest.mark.parametrize("how", ["frames", "batches", "readframe"])
@pytest.mark.parametrize(("split", "said"), MISTAKES)
async def test_a_framing_that_never_comes_to_an_end_is_an_error_of_the_handler(split: Any, said: str, how: str) -> None:
    errors: list[BaseException] = []

    async def handle(self: Any) -> None:
        framing = Wrong(*split)
        try:
            if how == "readframe":
                while True:
                    await self.reader.readframe(framing)
            async for _ in getattr(self.reader, how)(framing):
                pass
        except Exception as error:
            errors.append(error)
            raise

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        assert await ask(server, b"abc") == b""
        await settle(lambda: not server.connections)
        assert server.stats.reasons["error"] == 1  # and not the peer's
    assert [type(error) for error in errors] == [RuntimeError]
    assert str(errors[0]) == f"the framing test_found3.Wrong is wrong: its split() returned {said}"


@pytest.mark.parametrize(("split", "said"), MISTAKES)
def test_a_framing_that_never_comes_to_an_end_is_an_error_for_datagrams_too(split: Any, said: str) -> None:
    with pytest.raises(RuntimeError, match=r"the framing test_found3\.Wrong is wrong") as caught:
        list(itertools.islice(Wrong(*split).split_datagram(b"abc"), 100))
    assert said in str(caught.value)


class Again(Lines):
    """Asks for another call, with `scanned` 0, where it has found the end of what came before: a framing may."""

    def split(self, buffer: Any, scanned: int = 0, /) -> Any:
        return ([], 0, 0) if scanned and b"\n" in buffer else super().split(buffer, scanned)


async def test_a_framing_may_ask_to_be_called_again_from_the_start() -> None:
    async def handle(self: Any) -> None:
        async for line in self.reader.frames(Again()):
            await self.send(line + b"!")

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        for part in (b"a", b"b", b"c\nd\n"):
            writer.write(part)
            await settle()
        assert await reader.readexactly(6) == b"abc!d!"
        await close(writer)


# It was called with fewer bytes, asked for more, and so on for ever.
@ON_ONE_LOOP
async def test_a_framing_may_ask_again_where_a_frame_is_longer_than_what_is_split_at_a_time() -> None:
    reader = StreamReader()
    reader.feed_data(b"a" * 50_000 + b"\nd\n")
    reader.feed_eof()
    assert [len(frame) async for frame in reader.frames(Again())] == [50_000, 1]


# All that was buffered was split at once: 60,000 frames of a client that waits took 50 bytes and more each, beside no limit.
@pytest.mark.parametrize("how", ["frames", "lines", "batches"])
async def test_short_records_take_little_more_than_their_bytes(how: str) -> None:
    clients, size = 4, 120_000
    goes_on = asyncio.Event()
    counts: list[int] = []

    async def handle(self: Any) -> None:
        await self.reader.readexactly(1)
        if how == "batches":
            records = self.reader.batches(LengthPrefixed(1))
        else:
            records = self.reader.frames(LengthPrefixed(1)) if how == "frames" else self.reader
        await settle(lambda: len(self.reader._received) >= len(data))
        first = await anext(records)
        counts.append(len(first) if how == "batches" else 1)
        await goes_on.wait()
        counts.append(counts.pop() + sum([len(found) if how == "batches" else 1 async for found in records]))

    record = b"a\n" if how == "lines" else b"\2ab"
    data = record * (size // len(record))
    writers = []
    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        for _ in range(clients):
            _, writer = await asyncio.open_connection(*server.server_address)
            writers.append(writer)
        await settle(lambda: len(server.connections) == clients)
        tracemalloc.start()
        try:
            for writer in writers:
                writer.write(b"x" + data)
                writer.write_eof()
            await settle(lambda: len(counts) == clients)
            held = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        goes_on.set()
        await settle(lambda: not server.connections)
        for writer in writers:
            await close(writer)
        check_identity(server)
    assert sum(counts) == clients * (size // len(record))
    # Of batches 64 KiB are split at a time, of frames 32, and of lines 16.
    most = {"batches": 20 * 2**16, "frames": 25 * 2**15, "lines": 30 * 2**14}[how]
    assert held < clients * (2 * size + most)


class Counted(Lines):
    """Counts the bytes that it is given."""

    looked_at = 0

    def split(self, buffer: Any, scanned: int = 0, /) -> Any:
        Counted.looked_at += len(buffer)
        return super().split(buffer, scanned)


# In a protocol of frames and counted bytes each read of bytes had all that was buffered split again, 17 times: 64 KiB of one
# client held the loop up for minutes.
@pytest.mark.parametrize("body", [0, 1])
async def test_frames_between_counted_bytes_cost_what_they_are_long(body: int) -> None:
    message = b"1\n" + bytes(body)
    count = 30_000 // len(message)
    Counted.looked_at = 0
    framing = Counted()

    async def handle(self: Any) -> None:
        await settle(lambda: len(self.reader._received) >= count * len(message))
        for _ in range(count):
            assert await self.reader.readframe(framing) == b"1"
            assert await self.reader.readexactly(body) == bytes(body)
        await self.send(b"all")

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        assert await ask(server, message * count) == b"all"
    assert Counted.looked_at < 500 * count * len(message)


# A connection that held up to twice max_buffer did not count for max_memory, however many there were.
async def test_many_connections_that_hold_little_each_are_bounded_together() -> None:
    most, each, clients = 2**20, 60_000, 40
    goes_on = asyncio.Event()

    async def handle(self: Any) -> None:
        await goes_on.wait()

    options: Any = {"limits": aioecho.Limits(max_memory=most), "timeouts": aioecho.Timeouts(idle=1.0)}
    async with aioecho.TCPServer(ANYWHERE, handler(handle), **options) as server:
        memory = server.admission.memory
        writers = []
        data = bytes(each)
        tracemalloc.start()
        try:
            for _ in range(clients):
                _, writer = await asyncio.open_connection(*server.server_address)
                writer.write(data)
                writers.append(writer)
            await settle(lambda: server.stats.accepted == clients)
            await settle(lambda: all(p.is_lost or len(p.reader._received) == each for p in protocols(server)))
            taken = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert taken < 2 * most  # all of it, with the connections and the clients
        assert memory.held == sum(len(p.reader._received) for p in protocols(server)) <= most
        assert sum(not p.is_lost for p in protocols(server)) == most // each  # no more went than had to
        goes_on.set()
        for writer in writers:
            writer.transport.abort()
        await settle(lambda: not server.connections)
        await settle(lambda: memory.held == 0)
        assert server.stats.reasons["memory"] == clients - most // each
        check_identity(server)


# What a lost connection had received, and its handler had not read yet, did not count: clients that sent, reset and came again
# went as far past max_memory as their handlers took long.
async def test_what_lost_connections_hold_counts_until_their_handlers_end() -> None:
    most, each, clients = 2**20, 60_000, 30
    goes_on = asyncio.Event()
    ends: list[object] = []

    async def handle(self: Any) -> None:
        await goes_on.wait()
        try:
            ends.append(len(await self.reader.readexactly(each)))
        except OSError as error:
            ends.append(str(error))

    limits = aioecho.Limits(max_memory=most)
    wait_all = handler(handle, cancel_on_lost=False)
    async with aioecho.TCPServer(ANYWHERE, wait_all, limits=limits) as server:
        memory = server.admission.memory
        for number in range(1, clients + 1):
            sock = socket.create_connection(server.server_address)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(sock, bytes(each))
            await settle(lambda number=number: server.stats.accepted == number)
            await settle(lambda: all(len(p.reader._received) in (0, each) for p in protocols(server)))
            reset(sock)
            await settle(lambda: all(p.is_lost for p in protocols(server)))
            assert sum(len(p.reader._received) for p in protocols(server)) <= most
            assert memory.held <= most
        assert len(server.connections) == clients
        goes_on.set()
        await settle(lambda: not server.connections)
        await settle(lambda: memory.held == 0)
    assert ends.count(each) == most // each  # whatever found room is read, though its client is gone
    assert set(ends) == {each, "the server aborted the connection: memory"}


@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "tls"])
async def test_a_connection_that_is_aborted_for_memory_gives_no_part_of_a_line(
    is_tls: bool, tls: SimpleNamespace
) -> None:
    lines = b"".join(b"line %06d\n" % number for number in range(20_000))
    seen: list[list[bytes]] = []

    async def handle(self: Any) -> None:
        mine: list[bytes] = []
        seen.append(mine)
        with contextlib.suppress(ConnectionAbortedError):
            async for line in self.reader:
                mine.append(line)
                if len(mine) % 50 == 0:
                    await asyncio.sleep(0)

    options: dict[str, Any] = {"ssl": tls.server} if is_tls else {}
    limits = aioecho.Limits(max_memory=300_000)
    async with aioecho.TCPServer(ANYWHERE, handler(handle), limits=limits, **options) as server:
        names: dict[str, Any] = {"ssl": tls.client, "server_hostname": "localhost"} if is_tls else {}
        writers = []
        for _ in range(8):
            _, writer = await asyncio.open_connection(*server.server_address, **names)
            writers.append(writer)
        for writer in writers:
            writer.write(lines)
            if writer.can_write_eof():
                writer.write_eof()
        await settle(lambda: server.stats.reasons["memory"] > 0)
        for writer in writers:
            await asyncio.wait([asyncio.create_task(close(writer))])
        await settle(lambda: not server.connections)
    for mine in seen:
        assert b"".join(mine) == lines[: 12 * len(mine)]


def protocols(server: aioecho.BaseServer) -> list[Any]:
    return [connection._protocol for connection in server.connections]


# Each piece that read(-1) gathered was an object of its own: 2 bytes a packet made 20 times as much of them.
@ON_ONE_LOOP
async def test_what_comes_in_small_pieces_is_gathered_in_few_objects() -> None:
    pieces = 5_000
    reader = aioecho.StreamReader(loop=asyncio.get_running_loop())
    reading = asyncio.create_task(reader.read())
    await settle()
    tracemalloc.start()
    try:
        for _ in range(pieces):
            reader.feed_data(b"ab")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    reader.feed_data(bytes(10_000))
    await settle()
    reader.feed_data(b"c")
    reader.feed_eof()
    assert await reading == b"ab" * pieces + bytes(10_000) + b"c"
    assert held < 10 * pieces


# A client that left while verify_request() of a server with blocking handlers waited kept its place: nothing looked at its
# socket.
class Careful(aioecho.TCPServer):
    verdict: "asyncio.Future[bool]"
    asked = 0

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        self.asked += 1
        return await asyncio.shield(self.verdict)


class Shout(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(self.request.recv(100).upper())


@contextlib.asynccontextmanager
async def careful() -> AsyncIterator[Careful]:
    server = Careful(
        ANYWHERE, Shout, timeouts=aioecho.Timeouts(handshake=None), limits=aioecho.Limits(max_connections=2)
    )
    server.verdict = asyncio.get_running_loop().create_future()
    async with server:
        yield server
        check_identity(server)


async def test_a_reset_ends_the_verification_of_a_blocking_handlers_client() -> None:
    async with careful() as server:
        first, second = (socket.create_connection(server.server_address) for _ in range(2))
        second.sendall(b"hello")
        await settle(lambda: server.asked == 2)
        reset(first)
        await settle(lambda: len(server.connections) == 1)
        assert server.stats.reasons["connection lost"] == 1
        # Its place is another's, and one that has only ended its stream stays.
        third = socket.create_connection(server.server_address)
        await settle(lambda: server.asked == 3)
        second.shutdown(socket.SHUT_WR)
        await settle()
        assert len(server.connections) == 2
        server.verdict.set_result(True)
        assert await asyncio.to_thread(second.recv, 100) == b"HELLO"
        second.close()
        reset(third)
        await settle(lambda: not server.connections)


async def test_a_reset_with_data_unread_ends_the_verification_too() -> None:
    async with careful() as server:
        client = socket.create_connection(server.server_address)
        client.sendall(bytes(1000))
        await settle(lambda: server.asked == 1)
        reset(client)
        await settle(lambda: not server.connections)
        assert server.stats.reasons["connection lost"] == 1


# What watches these clients referred to its loop, and so kept every loop that ever had one.
@pytest.mark.parametrize("name", ["asyncio", "uvloop"])
def test_a_loop_is_not_kept_by_its_watch_of_resets(name: str) -> None:
    async def watch() -> None:
        with socket.create_server(ANYWHERE) as sock:
            reset_watch().add(sock, lambda: None)()

    with asyncio.Runner(loop_factory=loop_factory(name)) as runner:
        runner.run(watch())
        loop = weakref.ref(runner.get_loop())
    del runner
    gc.collect()
    assert loop() is None


# Of broadcasts to more clients than are written to in a turn, more came in than went out, without end.
async def test_broadcasts_that_come_faster_than_they_go_are_written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audience, "PER_TURN", 1)
    most: list[int] = []

    async def handle(self: Any) -> None:
        if await self.reader.readline() == b"go\n":
            for number in range(300):
                self.server.broadcast(b"%d\n" % number)
                most.append(len(self.server.audience._under_way))
        await self.reader.read()

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        clients = [await asyncio.open_connection(*server.server_address) for _ in range(4)]
        await settle(lambda: len(server.connections) == 4)
        await settle(lambda: all(connection.is_listening() for connection in server.connections))
        clients[0][1].write(b"go\n")
        for reader, _ in clients:
            assert [await reader.readline() for _ in range(300)] == [b"%d\n" % number for number in range(300)]
        assert max(most) <= audience.MOST_UNDER_WAY
        for _, writer in clients:
            await close(writer)


# The client of a Unix socket chooses its name, and with a newline in it wrote log records of its own.
def test_an_address_is_one_line_of_text() -> None:
    assert format_address(b"\0a\nERROR forged") == "@a\\nERROR forged"
    assert format_address("/tmp/a\x1b[2J") == "/tmp/a\\x1b[2J"
    assert format_address("/tmp/é") == "/tmp/é"
