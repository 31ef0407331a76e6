"""What a stop does to messages in progress: it never makes up an end of the stream."""

import asyncio
import contextlib
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from conftest import check_identity, settle
from helpers import reset, stopped_after
from timing import in_time

import aioecho
from aioecho.framing import FixedSize, LengthPrefixed
from aioecho.net.kernel import unacknowledged
from aioecho.streams import waiting

seen: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_seen_yet() -> None:
    seen.clear()


class Store(aioecho.StreamRequestHandler):
    """Stores an upload that ends with its stream."""

    async def handle(self) -> None:
        data = await self.reader.read()
        seen.append((len(data), self.reader.end))
        await self.send(b"stored %d\n" % len(data))


class StoreByPieces(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        size = 0
        while data := await self.reader.read(10_000):
            size += len(data)
        seen.append((size, self.reader.end))
        await self.send(b"stored %d\n" % size)


class Pay(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            seen.append(line)
            await self.send(b"done: " + line)


class Framed(aioecho.StreamRequestHandler):
    framing = LengthPrefixed(4)

    async def handle(self) -> None:
        async for frame in self.frames:
            seen.append(frame)
            await self.send_frame(frame)


class Exact(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                size = int.from_bytes(await self.reader.readexactly(4), "big")
                seen.append(await self.reader.readexactly(size))
                await self.send(b"ok")


@contextlib.asynccontextmanager
async def stopping(kind: Any, first: bytes, grace: float = 10) -> AsyncIterator[tuple[Any, Any, "asyncio.Task[Any]"]]:
    """Serve, send the first part of a message, and begin a stop; give the client's streams and the stop."""
    async with aioecho.TCPServer(("127.0.0.1", 0), kind) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        async with stopped_after(server, writer, first, grace) as stop:
            yield reader, writer, stop


@pytest.mark.parametrize("kind", [Store, StoreByPieces])
async def test_half_an_upload_is_not_taken_for_a_whole_one(kind: Any) -> None:
    async with stopping(kind, b"x" * 40_000) as (reader, writer, stop):
        writer.write(b"x" * 20_000)
        writer.write_eof()
        assert await reader.read() == b"stored 60000\n"
        assert seen == [(60_000, "peer")]
        report = await stop
    assert (report.completed, report.cancelled, report.unfinished) == (1, 0, 0)


@pytest.mark.parametrize("kind", [Store, StoreByPieces, Exact, Framed])
async def test_a_message_that_does_not_end_within_the_grace_is_cancelled_and_counted(kind: Any) -> None:
    async with stopping(kind, b"\0\0\0\x20half", grace=0.2) as (reader, _, stop):
        report = await stop
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    assert seen == []
    assert (report.completed, report.cancelled, report.unfinished) == (0, 1, 1)


# The report said that it was completed, nothing was logged, and a program ended with status 0.
@pytest.mark.parametrize("then", ["returns", "raises", "answers"])
@pytest.mark.parametrize("first", [b"\0\0\0\1x", b"\0\0"], ids=["not answered", "half of it"])
async def test_a_message_is_counted_as_cut_though_its_handler_catches_the_cancellation(first: bytes, then: str) -> None:
    class Catches(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            try:
                await self.reader.readexactly(5)
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                if then == "raises":
                    raise OSError("of something else") from None
                if then == "answers":
                    await self.send(b"in time")

    async with stopping(Catches, first, grace=0.2) as (reader, _, stop):
        report = await stop
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == (b"in time" if then == "answers" else b"")
    is_cut = then != "answers"
    assert (report.completed, report.cancelled, report.unfinished) == (not is_cut, is_cut, is_cut)


# Half a line counted as completed where that was caught, and a handler between two lines as unfinished, as it answers nothing.
@pytest.mark.parametrize("catches", [False, True])
@pytest.mark.parametrize("first", [b"line\n", b"line\nha"], ids=["between lines", "in a line"])
async def test_a_peer_that_only_sends_counts_as_unfinished_if_a_part_of_a_line_has_come(
    first: bytes, catches: bool
) -> None:
    class Sink(aioecho.StreamRequestHandler):
        one_way = True

        async def handle(self) -> None:
            with contextlib.suppress(*[asyncio.CancelledError] if catches else []):
                async for line in self.reader:
                    seen.append(line)

    async with stopping(Sink, first, grace=0.2) as (_, _, stop):
        report = await stop
    is_cut = first != b"line\n"
    assert seen == [b"line\n"]
    assert (report.completed, report.cancelled) == ((1, 0) if catches and not is_cut else (0, 1))
    assert report.unfinished == is_cut


async def test_a_line_in_progress_is_completed_and_answered() -> None:
    async with stopping(Pay, b"pay 10") as (reader, writer, stop):
        writer.write(b"00\n")
        assert await reader.readline() == b"done: pay 1000\n"
        assert await reader.read() == b""
        report = await stop
    assert seen == [b"pay 1000\n"]
    assert (report.completed, report.unfinished) == (1, 0)


@pytest.mark.parametrize(("kind", "answer"), [(Framed, b"\0\0\0\4body"), (Exact, b"ok")])
async def test_a_frame_whose_body_is_on_its_way_is_read(kind: Any, answer: bytes) -> None:
    async with stopping(kind, b"\0\0\0\4") as (reader, writer, stop):
        writer.write(b"body")
        assert await reader.read() == answer
        report = await stop
    assert seen == [b"body"]
    assert (report.completed, report.unfinished) == (1, 0)


@pytest.mark.parametrize("kind", [Pay, Framed, Exact, Store, StoreByPieces])
async def test_a_connection_between_messages_ends_at_once(kind: Any) -> None:
    async with stopping(kind, b"") as (reader, writer, stop):
        assert await reader.read() in (b"", b"stored 0\n")
        writer.close()
        report = await stop
    assert (report.completed, report.cancelled, report.unfinished) == (1, 0, 0)
    in_time(report.seconds, 0.3)  # and not the linger


# It was cancelled when the grace was over: its reads, which ran ahead of its answers, never found all answered.
async def test_a_handler_that_answers_in_another_task_ends_though_its_client_asks_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(waiting, "AHEAD_FOR", 0.05)
    gate = asyncio.Event()

    class Ahead(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            lines: asyncio.Queue[bytes] = asyncio.Queue()

            async def answer() -> None:
                while line := await lines.get():
                    await gate.wait()
                    await self.send(line)

            async with asyncio.TaskGroup() as group:
                group.create_task(answer())
                async for line in self.reader:
                    lines.put_nowait(line)
                lines.put_nowait(b"")

    async with stopping(Ahead, b"ask\n", grace=4) as (reader, writer, stop):
        gate.set()
        with contextlib.suppress(ConnectionError):
            while await reader.readline():
                writer.write(b"ask\n")
        report = await stop
    assert (report.completed, report.unfinished) == (1, 0)


async def test_an_exchange_in_steps_is_not_broken() -> None:
    class Steps(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.readline()
            async with self.unbroken():
                for number in range(20):
                    await self.send(b"%d\n" % number)
                    seen.append(await self.reader.readline())
            assert await self.reader.readline() == b""  # now it ends
            seen.append(self.reader.end)

    async with stopping(Steps, b"go\n") as (reader, writer, stop):
        for number in range(20):
            assert await reader.readline() == b"%d\n" % number
            writer.write(b"ack\n")
        assert await reader.read() == b""
        report = await stop
    assert seen == [*[b"ack\n"] * 20, "drain"]
    assert (report.completed, report.cancelled) == (1, 0)


async def test_a_peer_that_only_sends_is_told_first_and_loses_nothing_that_it_sent() -> None:
    class Sink(aioecho.StreamRequestHandler):
        one_way = True

        async def handle(self) -> None:
            async for line in self.reader:
                seen.append(line)

    sent = 0

    def send_until_told(address: Any) -> None:
        """Send lines as a logger does, which looks whether its peer has ended before each."""
        nonlocal sent
        with socket.create_connection(address) as sock:
            while not told.is_set():
                sock.sendall(b"line %d\n" % sent)
                sent += 1
                sock.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    if not sock.recv(1):
                        return
                sock.setblocking(True)

    told = threading.Event()
    server = aioecho.TCPServer(("127.0.0.1", 0), Sink)
    await server.start()
    sending = asyncio.create_task(asyncio.to_thread(send_until_told, server.server_address))
    await settle(lambda: len(seen) > 100)
    await asyncio.sleep(0.12)  # time is the subject: no fresh connection any more
    report = await server.shutdown(5)
    told.set()
    await sending
    assert report.seconds < 3
    assert report.cancelled == report.aborted == 0
    assert sent - len(seen) <= 1
    assert seen == [b"line %d\n" % number for number in range(len(seen))]


async def test_a_peer_that_only_sends_is_told_first_though_its_handler_is_in_setup() -> None:
    class Sink(aioecho.StreamRequestHandler):
        one_way = True

        async def setup(self) -> None:
            await ready.wait()

        async def handle(self) -> None:
            async for line in self.reader:
                seen.append(line)

    ready = asyncio.Event()
    timeouts = aioecho.Timeouts(linger=0.3)
    async with aioecho.TCPServer(("127.0.0.1", 0), Sink, timeouts=timeouts) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        async with stopped_after(server, writer, b"one\n", 10) as stop:
            assert await asyncio.wait_for(reader.read(), 5) == b""  # while setup() runs
            ready.set()
            writer.write(b"two\n")
            report = await stop
    assert seen == [b"one\n", b"two\n"]
    assert report.completed == 1


class Blocks(aioecho.DatagramSessionHandler):
    """Sends blocks, the next when the last was acknowledged, as TFTP does."""

    async def handle(self) -> None:
        await anext(self.datagrams)
        for number in range(20):
            await self.reply(b"block %d" % number)
            seen.append(await anext(self.datagrams))


async def test_a_session_whose_peer_acknowledges_step_by_step_is_not_cut() -> None:
    loop = asyncio.get_running_loop()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as newcomer,
    ):
        sock.setblocking(False)
        async with aioecho.UDPServer(("127.0.0.1", 0), Blocks) as server:
            address = server.server_address

            async def receive() -> bytes:
                received = loop.create_future()
                loop.add_reader(sock, lambda: received.done() or received.set_result(sock.recv(100)))
                try:
                    return await received  # type: ignore[no-any-return]
                finally:
                    loop.remove_reader(sock)

            sock.sendto(b"read", address)
            assert await receive() == b"block 0"
            stop = asyncio.create_task(server.shutdown(10))
            await settle(lambda: not server.is_serving())
            newcomer.sendto(b"read", address)
            for number in range(1, 20):
                sock.sendto(b"ack", address)
                assert await receive() == b"block %d" % number
            sock.sendto(b"ack", address)
            report = await stop
            assert server.stats.drops["stopped"] == 1
    assert seen == [b"ack"] * 20
    assert (report.completed, report.cancelled) == (1, 0)
    assert report.seconds < 5


async def test_a_session_ends_a_second_after_its_last_datagram_unless_it_is_unbroken() -> None:
    ends: list[float] = []

    class Waits(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            async with contextlib.AsyncExitStack() as stack:
                if await anext(self.datagrams) == b"unbroken":
                    await stack.enter_async_context(self.unbroken())
                async for _ in self.datagrams:
                    pass
            ends.append(asyncio.get_running_loop().time())

    async with aioecho.UDPServer(("127.0.0.1", 0), Waits) as server:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as held,
        ):
            began = asyncio.get_running_loop().time()
            sock.sendto(b"x", server.server_address)
            held.sendto(b"unbroken", server.server_address)
            await settle(lambda: len(server.connections) == 2)
            report = await server.shutdown(2)
    assert len(ends) == 1
    assert 0.9 < ends[0] - began < 1.8
    assert (report.completed, report.cancelled) == (1, 1)


class BlockingStore(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        data = self.rfile.read()
        seen.append(len(data))
        self.wfile.write(b"stored %d\n" % len(data))


class BlockingPay(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            seen.append(line)
            self.wfile.write(b"done: " + line)


async def test_a_blocking_handler_gets_the_whole_of_an_upload() -> None:
    async with stopping(BlockingStore, b"x" * 40_000) as (reader, writer, stop):
        writer.write(b"x" * 20_000)
        writer.write_eof()
        assert await reader.read() == b"stored 60000\n"
        report = await stop
    assert seen == [60_000]
    assert (report.completed, report.cancelled, report.aborted, report.unfinished) == (1, 0, 0, 0)


async def test_a_blocking_handler_completes_the_line_that_it_has_begun_and_then_ends() -> None:
    async with stopping(BlockingPay, b"pay 10") as (reader, writer, stop):
        writer.write(b"00\n")
        assert await reader.readline() == b"done: pay 1000\n"
        assert await reader.read() == b""
        report = await stop
    assert seen == [b"pay 1000\n"]
    assert report.seconds < 5


@pytest.mark.parametrize("kind", [BlockingStore, BlockingPay])
async def test_a_blocking_handler_meets_an_error_and_no_end_when_the_grace_is_over(kind: Any) -> None:
    async with stopping(kind, b"pay 10", grace=0.2) as (reader, _, stop):
        report = await stop
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    assert seen == []
    assert report.completed == 0
    assert report.unfinished == 1


@pytest.mark.parametrize("kind", [BlockingStore, BlockingPay])
async def test_a_blocking_handler_between_messages_ends_at_once(kind: Any) -> None:
    async with stopping(kind, b"") as (reader, writer, stop):
        assert await reader.read() in (b"", b"stored 0\n")
        writer.close()
        report = await stop
    assert (report.completed, report.unfinished) == (1, 0)
    in_time(report.seconds, 0.3)


# Clients that wait for a place when the server stops.


class CountedUpper(aioecho.StreamRequestHandler):
    """Knows how many of its kind are alive, and for how many of them an address, at the most."""

    live: ClassVar[Counter[str]] = Counter()
    most = most_of_a_host = 0

    async def handle(self) -> None:
        live, kind = self.live, CountedUpper
        live[self.client_address[0]] += 1
        kind.most = max(kind.most, live.total())
        kind.most_of_a_host = max(kind.most_of_a_host, *live.values())
        async for line in self.reader:
            await asyncio.sleep(0.01)  # they are many at once
            await self.send(line.upper())
        live[self.client_address[0]] -= 1


class BlockingUpper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.readline().upper())


def ask_and_close(sock: socket.socket) -> bytes:
    """Return the answer to what was sent already, and close when the server does."""
    with sock, contextlib.suppress(ConnectionResetError):
        sock.settimeout(30)
        answer = sock.makefile("rb").readline()
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        return answer
    return b"reset"


async def queue_clients(server: aioecho.BaseServer, count: int, hosts: int = 1) -> list["asyncio.Task[bytes]"]:
    socks = []
    for number in range(count):
        source = (f"127.0.0.{2 + number % hosts}", 0)
        socks.append(socket.create_connection(server.server_address, source_address=source))
        socks[-1].sendall(b"client %d\n" % number)
    return [asyncio.create_task(asyncio.to_thread(ask_and_close, sock)) for sock in socks]


@pytest.mark.parametrize(
    ("kind", "limit"),
    [(CountedUpper, "max_connections"), (BlockingUpper, "max_connections"), (BlockingUpper, "max_threads")],
)
async def test_clients_that_wait_for_a_place_are_served_in_turn(kind: Any, limit: str) -> None:
    CountedUpper.most = 0
    limits = aioecho.Limits(**{limit: 3})
    async with aioecho.TCPServer(("127.0.0.1", 0), kind, limits=limits) as server:
        asking = await queue_clients(server, 20)
        await settle(lambda: server.stats.accepted >= 3)
        report = await server.shutdown(10)
        assert await asyncio.gather(*asking) == [b"CLIENT %d\n" % number for number in range(20)]
        assert (server.stats.completed, report.cancelled, report.aborted) == (20, 0, 0)
        assert CountedUpper.most <= 3
        check_identity(server)


async def test_clients_in_the_queue_behind_max_per_host_are_served_in_turn() -> None:
    CountedUpper.most = CountedUpper.most_of_a_host = 0
    limits = aioecho.Limits(max_per_host=2)
    server = aioecho.TCPServer(("127.0.0.1", 0), CountedUpper, limits=limits)
    await server.start()
    server.pause()
    asking = await queue_clients(server, 20, hosts=3)
    report = await server.shutdown(10)
    assert await asyncio.gather(*asking) == [b"CLIENT %d\n" % number for number in range(20)]
    assert (report.completed, report.cancelled, report.aborted) == (20, 0, 0)
    assert CountedUpper.most_of_a_host == 2
    assert CountedUpper.most == 6
    check_identity(server)


async def test_clients_without_a_place_when_the_grace_is_over_are_reset_and_counted() -> None:
    class Stuck(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await asyncio.Event().wait()

    async with aioecho.TCPServer(("127.0.0.1", 0), Stuck, limits=aioecho.Limits(max_connections=2)) as server:
        asking = await queue_clients(server, 5)
        await settle(lambda: server.stats.accepted == 2)
        report = await server.shutdown(0.1)
        assert set(await asyncio.gather(*asking)) <= {b"", b"reset"}
        assert (report.completed, report.cancelled, report.aborted) == (0, 5, 0)
        assert server.stats.reasons == {"cancelled": 2, "overflow": 3}
        check_identity(server)


async def test_a_closed_server_serves_the_clients_that_were_in_its_queue() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), CountedUpper, limits=aioecho.Limits(max_connections=1)) as server:
        asking = await queue_clients(server, 5)
        await settle(lambda: server.stats.accepted == 1)
        server.close()
        assert await asyncio.gather(*asking) == [b"CLIENT %d\n" % number for number in range(5)]


# What came before a reset.


class SlowLines(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            seen.append(line)
            await asyncio.sleep(0)


class SlowReadline(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while line := await self.reader.readline():
            seen.append(line)
            await asyncio.sleep(0)


class SlowUntil(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while True:
            seen.append(await self.reader.readuntil(b"\n"))
            await asyncio.sleep(0)


class SlowExactly(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while True:
            seen.append(await self.reader.readexactly(100))
            await asyncio.sleep(0)


class SlowPieces(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while data := await self.reader.read(100):
            seen.append(data)
            await asyncio.sleep(0)


class SlowFrames(aioecho.StreamRequestHandler):
    framing = FixedSize(100)

    async def handle(self) -> None:
        async for frame in self.frames:
            seen.append(frame)
            await asyncio.sleep(0)


class AtLast(aioecho.StreamRequestHandler):
    """Begins to read when the connection is reset."""

    async def handle(self) -> None:
        await asyncio.sleep(0.05)
        async for line in self.reader:
            seen.append(line)


KINDS = [SlowLines, SlowReadline, SlowUntil, SlowExactly, SlowPieces, SlowFrames, AtLast]


@pytest.mark.parametrize("count", [100, 10_000])
@pytest.mark.parametrize("kind", KINDS)
async def test_what_came_before_a_reset_is_read_before_the_error(kind: Any, count: int) -> None:
    met: list[BaseException] = []

    class Server(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            met.append(sys.exception())  # type: ignore[arg-type]

    records = [b"%099d\n" % number for number in range(count)]
    async with Server(("127.0.0.1", 0), kind) as server:
        sock = socket.create_connection(server.server_address)
        await asyncio.to_thread(sock.sendall, b"".join(records))
        await settle(lambda: not unacknowledged(sock))  # so that all of it is at the server
        reset(sock)
        await settle(lambda: server.stats.accepted == 1 and not server.connections)
        assert server.stats.reasons == {"connection lost": 1}
    assert seen == records
    assert [type(error) for error in met] == [ConnectionResetError]


@pytest.mark.parametrize("kind", [SlowLines, AtLast])
async def test_what_a_client_sent_is_read_that_was_gone_before_it_was_accepted(kind: Any) -> None:
    records = [b"%099d\n" % number for number in range(100)]
    async with aioecho.TCPServer(("127.0.0.1", 0), kind) as server:
        server.pause()
        sock = socket.create_connection(server.server_address)
        sock.sendall(b"".join(records))
        reset(sock)
        server.resume()
        await settle(lambda: server.stats.accepted == 1 and not server.connections)
    assert seen == records
