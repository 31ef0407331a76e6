"""What a stop does to blocking handlers in the middle of a message: plain, over TLS, over Unix sockets, and in the queue."""

import asyncio
import contextlib
import functools
import select
import socket
import socketserver
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import close, stopped_after
from timing import in_time

import aioecho

GRACE = 10.0  # much longer than what any test waits for

QUICK = aioecho.Timeouts(linger=0.2)  # of silence after which a client has nothing more to say

seen: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_seen_yet() -> None:
    seen.clear()


class Store(socketserver.StreamRequestHandler):
    """Stores an upload that ends with its stream."""

    def handle(self) -> None:
        data = self.rfile.read()
        seen.append(len(data))
        self.wfile.write(b"stored %d\n" % len(data))


class StoreByRecv(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        size = 0
        while data := self.request.recv(10_000):
            size += len(data)
        seen.append(size)
        self.request.sendall(b"stored %d\n" % size)


class StoreByRecvInto(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        size, buffer = 0, bytearray(10_000)
        while count := self.request.recv_into(buffer):
            size += count
        seen.append(size)
        self.request.sendall(b"stored %d\n" % size)


class Lines(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            seen.append(line)
            self.wfile.write(b"done: " + line)


class TextLines(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with self.request.makefile("r") as file:
            for line in file:
                seen.append(line.encode())
                self.request.sendall(b"done: " + line.encode())


class LinesOfPair(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with self.request.makefile("rwb") as file:
            for line in file:
                seen.append(line)
                file.write(b"done: " + line)
                file.flush()


class TextLinesOfPair(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with self.request.makefile("rw", newline="\n") as file:
            while line := file.readline():
                seen.append(line.encode())
                file.write("done: " + line)
                file.flush()


class Frames(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while header := self.rfile.read(4):
            size = int.from_bytes(header, "big")
            frame = self.rfile.read(size)
            seen.append(frame)
            self.wfile.write(b"done: %d of %d\n" % (len(frame), size))


def frame(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


@contextlib.asynccontextmanager
async def stopping(
    kind: Any, first: bytes, *, endpoint: str = "tcp://127.0.0.1:0", ssl: Any = None, grace: float = GRACE
) -> AsyncIterator[tuple[Any, Any, "asyncio.Task[Any]"]]:
    """Serve, send the first part of a message, and begin a stop; give the client's streams and the stop."""
    server_ssl, client_ssl = ssl if ssl is not None else (None, None)
    async with aioecho.serve(kind, endpoint, ssl=server_ssl, timeouts=QUICK) as server:
        if endpoint.startswith("unix"):
            reader, writer = await asyncio.open_unix_connection(server.server_address)
        else:
            tls = {"ssl": client_ssl, "server_hostname": "localhost"} if client_ssl else {}
            reader, writer = await asyncio.open_connection(*server.server_address, **tls)
        async with stopped_after(server, writer, first, grace) as stop:
            yield reader, writer, stop
    check_identity(server)


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except (OSError, ssl.SSLError):  # cut off, perhaps without the end of TLS
        return b""


# A message in progress goes on.


@pytest.mark.parametrize("kind", [Store, StoreByRecv, StoreByRecvInto])
async def test_over_tls_half_an_upload_is_not_taken_for_a_whole_one(kind: Any, tls: SimpleNamespace) -> None:
    async with aioecho.serve(kind, "tcp://127.0.0.1:0", ssl=tls.server) as server:

        def upload() -> bytes:
            with (
                socket.create_connection(server.server_address) as plain,
                tls.client.wrap_socket(plain, server_hostname="localhost") as sock,
            ):
                sock.sendall(b"x" * 40_000)
                asyncio.run_coroutine_threadsafe(begin_stop(), loop).result()
                time.sleep(0.7)  # time is the subject: longer than linger
                sock.sendall(b"x" * 20_000)
                with contextlib.suppress(OSError, ValueError):
                    sock.settimeout(0)
                    sock.unwrap()  # the client's end; TLS 1.3 has half-closed connections
                sock.settimeout(None)
                return socket.socket.recv(sock, 100)  # there is an answer, whatever it says: encrypted

        loop = asyncio.get_running_loop()
        stops: list[Any] = []

        async def begin_stop() -> None:
            await asyncio.sleep(0.12)
            stops.append(asyncio.create_task(server.shutdown(GRACE)))
            await settle(lambda: not server.is_serving())

        assert await asyncio.to_thread(upload)
        report = await stops[0]
    assert seen == [60_000]
    assert (report.completed, report.cancelled, report.unfinished) == (1, 0, 0)


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize(
    ("kind", "first", "rest", "replies"),
    [
        (Lines, b"pay 10", b"00\n", b"done: pay 1000\n"),
        # The buffer of the file has more than was answered.
        (Lines, b"pay 5\npay 10", b"00\n", b"done: pay 5\ndone: pay 1000\n"),
        (TextLines, b"pay 5\npay 10", b"00\n", b"done: pay 5\ndone: pay 1000\n"),
        # The half line was handed out as a whole one.
        (LinesOfPair, b"pay 5\npay 10", b"00\n", b"done: pay 5\ndone: pay 1000\n"),
        # Of more in one chunk such a file loses what is behind the line, at the first write: the standard library's does so.
        (TextLinesOfPair, b"pay 10", b"00\n", b"done: pay 1000\n"),
        (Frames, frame(b"body")[:6], b"dy", b"done: 4 of 4\n"),
        (Frames, frame(b"one") + frame(b"body")[:6], b"dy", b"done: 3 of 3\ndone: 4 of 4\n"),
        (Frames, frame(b"one") + frame(b"body")[:4], b"body", b"done: 3 of 3\ndone: 4 of 4\n"),
        (Frames, frame(b"one") + frame(b"body")[:2], frame(b"body")[2:], b"done: 3 of 3\ndone: 4 of 4\n"),
    ],
)
async def test_a_message_of_which_a_part_has_come_is_read_to_its_end(
    kind: Any, first: bytes, rest: bytes, replies: bytes, has_tls: bool, tls: SimpleNamespace
) -> None:
    async with stopping(kind, first, ssl=(tls.server, tls.client) if has_tls else None) as (reader, writer, stop):
        answered = replies[: replies.rindex(b"done")]
        assert await reader.readexactly(len(answered)) == answered
        await asyncio.sleep(0.3)  # time is the subject: longer than linger
        assert not stop.done()
        writer.write(rest)
        assert await reader.read() == replies[len(answered) :]  # and then the end
        report = await stop
    assert (report.completed, report.cancelled, report.unfinished) == (1, 0, 0)
    in_time(report.seconds, 5, "the stop")


async def test_a_message_over_a_unix_socket_is_read_to_its_end(tmp_path: Path) -> None:
    async with stopping(Lines, b"pay 5\npay 10", endpoint=f"unix:{tmp_path / 's'}") as (reader, writer, stop):
        await asyncio.sleep(0.3)  # time is the subject: longer than linger
        writer.write(b"00\n")
        assert await reader.read() == b"done: pay 5\ndone: pay 1000\n"
        report = await stop
    assert (report.completed, report.unfinished) == (1, 0)
    in_time(report.seconds, 5, "the stop")


async def test_a_message_over_tls_of_the_handlers_own_is_read_to_its_end(tls: SimpleNamespace) -> None:
    class Wraps(Lines):
        def setup(self) -> None:
            self.request = tls.server.wrap_socket(self.request, server_side=True)
            super().setup()

        def finish(self) -> None:
            super().finish()
            self.request.close()

    async with aioecho.serve(Wraps, "tcp://127.0.0.1:0", timeouts=QUICK) as server:
        reader, writer = await asyncio.open_connection(
            *server.server_address, ssl=tls.client, server_hostname="localhost"
        )
        writer.write(b"pay 5\n")
        assert await reader.readline() == b"done: pay 5\n"
        await asyncio.sleep(0.12)  # time is the subject: the kernel's clocks tell what came last
        writer.write(b"pay 10")
        await asyncio.sleep(0.02)
        stop = asyncio.create_task(server.shutdown(GRACE))
        await asyncio.sleep(0.5)  # longer than linger
        writer.write(b"00\n")
        assert await reader.readline() == b"done: pay 1000\n"
        report = await stop
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    assert seen == [b"pay 5\n", b"pay 1000\n"]
    assert (report.completed, report.cancelled) == (1, 0)
    in_time(report.seconds, 5, "the stop")


# When the grace is over there is an error, and no end.


@pytest.mark.parametrize("way", ["plain", "TLS", "unix"])
@pytest.mark.parametrize("kind", [Store, StoreByRecv, StoreByRecvInto, Lines, Frames])
async def test_the_end_of_the_grace_is_an_error_in_the_middle_of_a_message(
    kind: Any, way: str, tls: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Catches(kind):  # type: ignore[misc]
        def handle(self) -> None:
            try:
                super().handle()
            except Exception as error:
                seen.append((type(error), str(error)))
                raise

    options: dict[str, Any] = {"ssl": (tls.server, tls.client)} if way == "TLS" else {}
    if way == "unix":
        options["endpoint"] = f"unix:{tmp_path / 's'}"
    async with stopping(Catches, b"\0\0\0\x20half", grace=0.2, **options) as (reader, _, stop):
        report = await stop
        assert await read_all(reader) == b""
    assert seen == [(ConnectionAbortedError, "[Errno 103] the server stops")]
    assert (report.completed, report.cancelled, report.unfinished) == (0, 1, 1)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# Between messages there is an end.


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize(
    ("kind", "first", "reply"),
    [(Lines, b"pay 10\n", b"done: pay 10\n"), (Frames, frame(b"body"), b"done: 4 of 4\n"), (Lines, b"", b"")],
)
async def test_between_messages_a_stop_ends_the_stream(
    kind: Any, first: bytes, reply: bytes, has_tls: bool, tls: SimpleNamespace
) -> None:
    async with stopping(kind, first, ssl=(tls.server, tls.client) if has_tls else None) as (reader, _, stop):
        assert await reader.read() == reply
        report = await stop
    assert (report.completed, report.cancelled, report.unfinished) == (1, 0, 0)
    in_time(report.seconds, 2, "the stop")  # linger at the most


async def test_a_client_that_is_idle_ends_at_once() -> None:
    async with aioecho.serve(Lines, "tcp://127.0.0.1:0") as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"one\n")
        assert await reader.readline() == b"done: one\n"
        await asyncio.sleep(0.12)  # time is the subject: past FRESH
        report = await server.shutdown(GRACE)
        writer.close()
        await writer.wait_closed()
    in_time(report.seconds, 0.3, "the stop")  # and not linger


@pytest.mark.parametrize("where", ["plain", "TLS", "unix"])
async def test_a_client_that_asks_without_a_pause_ends_at_the_next_wait(
    where: str, tls: SimpleNamespace, tmp_path: Path
) -> None:
    asked = answered = 0
    async with aioecho.serve(
        Lines,
        f"unix:{tmp_path / 's'}" if where == "unix" else "tcp://127.0.0.1:0",
        ssl=tls.server if where == "TLS" else None,
    ) as server:
        if where == "unix":
            reader, writer = await asyncio.open_unix_connection(server.server_address)
        else:
            options = {"ssl": tls.client, "server_hostname": "localhost"} if where == "TLS" else {}
            reader, writer = await asyncio.open_connection(*server.server_address, **options)

        async def ask() -> None:
            nonlocal asked, answered
            with contextlib.suppress(OSError):
                while True:
                    writer.write(b"line\n")
                    asked += 1
                    if await reader.readline() != b"done: line\n":
                        break
                    answered += 1

        asking = asyncio.create_task(ask())
        await asyncio.sleep(0.2)  # time is the subject: past FRESH
        report = await server.shutdown(GRACE)
        await asking
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    assert answered >= asked - 1 > 10
    assert len(seen) == answered  # what was read was answered
    assert (report.completed, report.cancelled) == (1, 0)
    in_time(report.seconds, 0.4, "the stop")  # and not linger


@pytest.mark.timed
async def test_an_upload_with_acknowledgements_is_not_cut_while_it_comes() -> None:
    class Acknowledges(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(1000):
                seen.append(data)
                self.request.sendall(b"ok")

    async with stopping(Acknowledges, b"block 0") as (reader, writer, stop):
        assert await reader.readexactly(2) == b"ok"
        for number in range(1, 10):
            await asyncio.sleep(0.05)  # time is the subject: less than linger
            writer.write(b"block %d" % number)
            assert await reader.readexactly(2) == b"ok"
        assert await reader.read() == b""
        report = await stop
    assert seen == [b"block %d" % number for number in range(10)]
    assert (report.completed, report.cancelled) == (1, 0)


async def test_a_handler_that_waits_in_select_meets_the_end_too() -> None:
    class Selects(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while True:
                select.select([self.request], [], [])
                if not (data := self.request.recv(100)):
                    seen.append("end")
                    return
                self.request.sendall(data)

    async with stopping(Selects, b"x") as (reader, _, stop):
        assert await reader.read() == b"x"
        report = await stop
    assert seen == ["end"]
    assert report.completed == 1
    in_time(report.seconds, 5, "the stop")


# Sinks.


class Sink(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            seen.append(line)


class OneWaySink(Sink):
    one_way = True


@pytest.mark.parametrize("has_tls", [False, True])
async def test_a_sink_for_lines_ends_when_its_client_has_been_silent(has_tls: bool, tls: SimpleNamespace) -> None:
    async with stopping(Sink, b"one\ntwo\n", ssl=(tls.server, tls.client) if has_tls else None) as (
        reader,
        writer,
        stop,
    ):
        writer.write(b"three\n")
        assert await reader.read() == b""
        report = await stop
    assert seen == [b"one\n", b"two\n", b"three\n"]
    assert (report.completed, report.cancelled, report.unfinished) == (1, 0, 0)
    in_time(report.seconds, 3, "the stop")


async def test_a_sink_does_not_get_half_a_line_when_the_grace_is_over() -> None:
    async with stopping(Sink, b"one\ntw", grace=0.6) as (_, _, stop):
        report = await stop
    assert seen == [b"one\n"]
    assert (report.completed, report.unfinished) == (0, 1)


# It counted as completed, and as rejected for its handshake, as if that had been its client's doing.
async def test_a_tls_handshake_in_progress_is_cancelled_and_counted_when_the_grace_is_over(
    tls: SimpleNamespace,
) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Store, ssl=tls.server) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        async with stopped_after(server, writer, b"\x16\x03\x01", 0.2) as stop:
            report = await stop
        assert (report.completed, report.cancelled, report.unfinished) == (0, 1, 1)
        assert server.stats.reasons == {"cancelled": 1}
        check_identity(server)


@pytest.mark.parametrize("kind", [OneWaySink, functools.partial(OneWaySink)])
async def test_a_one_way_sink_is_told_first_and_loses_nothing_that_it_was_sent(kind: Any) -> None:
    async with stopping(kind, b"one\ntw") as (reader, writer, stop):
        assert await reader.read() == b""  # while the handler reads on
        assert not stop.done()
        writer.write(b"o\nthree\n")
        report = await stop
    assert seen == [b"one\n", b"two\n", b"three\n"]
    assert (report.completed, report.cancelled) == (1, 0)
    in_time(report.seconds, 3, "the stop")


# It was not told, as the server has certificates.
async def test_a_one_way_sink_of_an_endpoint_without_tls_is_told_too(tls: SimpleNamespace) -> None:
    async with aioecho.serve(OneWaySink, "tcp://127.0.0.1:0?tls=off", ssl=tls.server, timeouts=QUICK) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        async with stopped_after(server, writer, b"one\ntw", GRACE) as stop:
            assert await reader.read() == b""
            assert not stop.done()
            writer.write(b"o\nthree\n")
            report = await stop
    assert seen == [b"one\n", b"two\n", b"three\n"]
    assert (report.completed, report.cancelled) == (1, 0)


async def test_a_one_way_sink_waits_for_the_rest_of_a_line_and_does_not_get_half() -> None:
    async with stopping(OneWaySink, b"one\ntw", grace=0.6) as (reader, _, stop):
        assert await reader.read() == b""
        report = await stop
    assert seen == [b"one\n"]
    assert (report.completed, report.unfinished) == (0, 1)


@pytest.mark.parametrize("has_tls", [False, True])
async def test_a_one_way_sink_whose_client_does_not_stop_ends_all_the_same(has_tls: bool, tls: SimpleNamespace) -> None:
    options = {"ssl": tls.client, "server_hostname": "localhost"} if has_tls else {}
    server = aioecho.serve(OneWaySink, "tcp://127.0.0.1:0", ssl=tls.server if has_tls else None)
    await server.start()
    _, writer = await asyncio.open_connection(*server.server_address, **options)

    async def send() -> None:
        with contextlib.suppress(OSError):
            while True:
                writer.write(b"line\n" * 100)
                await writer.drain()
                await asyncio.sleep(0.001)

    sending = asyncio.create_task(send())
    await settle(lambda: len(seen) > 100)
    await asyncio.sleep(0.12)  # time is the subject: past FRESH
    report = await server.shutdown(GRACE)
    sending.cancel()
    await asyncio.wait([sending])
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    assert set(seen) == {b"line\n"}
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    in_time(report.seconds, 5, "the stop")


@pytest.mark.parametrize("where", ["tcp", "unix"])
async def test_a_one_way_sink_loses_a_line_at_the_most_of_a_client_that_looks_for_no_end(
    where: str, tmp_path: Path
) -> None:
    class Ends(OneWaySink):
        def finish(self) -> None:
            time.sleep(0.05)  # what comes now is read no more

    sent = 0

    def send_until_refused() -> None:
        nonlocal sent
        with socket.socket(socket.AF_INET if where == "tcp" else socket.AF_UNIX) as sock:
            sock.connect(server.server_address)
            if where == "tcp":  # or lines would wait in the client's own kernel
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ConnectionError):
                while True:
                    sock.sendall(b"line %d\n" % sent)
                    sent += 1
                    time.sleep(0.0005)

    endpoint = "tcp://127.0.0.1:0" if where == "tcp" else f"unix:{tmp_path / 's'}"
    async with aioecho.serve(Ends, endpoint, timeouts=QUICK) as server:
        sending = asyncio.create_task(asyncio.to_thread(send_until_refused))
        await settle(lambda: len(seen) > 100)
        report = await server.shutdown(GRACE)
        await sending
    assert seen == [b"line %d\n" % number for number in range(len(seen))]
    assert sent - len(seen) <= 1
    assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
    in_time(report.seconds, 5, "the stop")


# Clients without a thread.


@pytest.mark.timed  # a client has FRESH from the end of its handshake on
@pytest.mark.parametrize("has_tls", [False, True])
async def test_clients_that_wait_for_a_thread_at_a_stop_are_all_answered_in_turn(
    has_tls: bool, tls: SimpleNamespace
) -> None:
    class Slow(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline()
            seen.append(1)
            assert sum(seen) == 1  # never over the limit
            time.sleep(0.02)
            seen.append(-1)
            self.wfile.write(line.upper())

    def ask(number: int) -> bytes:
        with contextlib.ExitStack() as stack:
            sock: socket.socket = stack.enter_context(socket.create_connection(server.server_address))
            if has_tls:
                sock = stack.enter_context(tls.client.wrap_socket(sock, server_hostname="localhost"))
            sock.sendall(b"client ")
            begun.append(number)
            time.sleep(0.3)  # time is the subject: past FRESH, and half a request is there when the stop begins
            sock.sendall(b"%d\n" % number)
            received = b""
            while data := sock.recv(100):
                received += data
            return received

    begun: list[int] = []
    server = aioecho.serve(
        Slow, "tcp://127.0.0.1:0", ssl=tls.server if has_tls else None, limits=aioecho.Limits(max_threads=1)
    )
    await server.start()
    asking = [asyncio.create_task(asyncio.to_thread(ask, number)) for number in range(6)]
    await settle(lambda: server.stats.active == 6)
    await asyncio.sleep(0.12)
    report = await server.shutdown(GRACE)
    assert await asyncio.gather(*asking) == [b"CLIENT %d\n" % number for number in range(6)]
    assert (report.completed, report.cancelled, report.aborted) == (6, 0, 0)
    check_identity(server)


class Greets(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"hello\n")
        self.wfile.write(self.rfile.readline().upper())


@pytest.mark.timed  # a client has FRESH from the beginning of its handler on
async def test_clients_that_wait_for_a_thread_and_for_the_first_word_are_answered_at_a_stop() -> None:
    async def ask(is_first: bool) -> bytes:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.readline() == b"hello\n"
        writer.write(b"li")
        if is_first:
            await stopped.wait()
        writer.write(b"ne\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    stopped = asyncio.Event()
    server = aioecho.serve(Greets, "tcp://127.0.0.1:0", limits=aioecho.Limits(max_threads=1))
    await server.start()
    asking = [asyncio.create_task(ask(True))]
    await settle(lambda: server.stats.active == 1)
    asking += [asyncio.create_task(ask(False)) for _ in range(3)]
    await settle(lambda: server.stats.active == 4)
    await asyncio.sleep(0.15)  # time is the subject: past FRESH
    stop = asyncio.create_task(server.shutdown(GRACE))
    await settle(lambda: not server.is_serving())
    stopped.set()
    assert await asyncio.gather(*asking) == [b"LINE\n"] * 4
    assert (await stop).completed == 4


# Its time counted from when it was accepted, if it got its thread before the stop.
@pytest.mark.timed  # likewise
async def test_a_client_that_has_waited_for_a_thread_has_time_to_speak_when_it_has_one() -> None:
    async with aioecho.serve(Greets, "tcp://127.0.0.1:0", limits=aioecho.Limits(max_threads=1)) as server:
        _, first = await asyncio.open_connection(*server.server_address)
        await settle(lambda: server.stats.active == 1)
        reader, second = await asyncio.open_connection(*server.server_address)
        await settle(lambda: server.stats.active == 2)
        await asyncio.sleep(0.15)  # time is the subject: past FRESH
        first.write(b"line\n")
        assert await reader.readline() == b"hello\n"
        stop = asyncio.create_task(server.shutdown(GRACE))
        await settle(lambda: not server.is_serving())
        await settle()
        second.write(b"line\n")
        assert await reader.read() == b"LINE\n"
        assert (await stop).completed == 2
        for writer in (first, second):
            await close(writer)


async def test_a_silent_peer_does_not_hold_up_the_stop_of_a_server_with_tls(tls: SimpleNamespace) -> None:
    async with aioecho.serve(Lines, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        with socket.create_connection(server.server_address):
            await settle(lambda: server.connections)
            await asyncio.sleep(0.12)
            report = await server.shutdown(GRACE)
    in_time(report.seconds, 2, "the stop")
    assert server.stats.rejected == 1
    check_identity(server)
