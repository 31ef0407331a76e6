"""What goes wrong at any moment: half-closes, resets, cancellations, stops. All is accounted for and nothing stays."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import queue
import select
import selectors
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Coroutine, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import check_identity, open_descriptors, settle
from helpers import ANYWHERE, LOOPS, ask_by_datagram, reset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aioecho
from aioecho.echo import DatagramUpper, Echo, Upper
from aioecho.runtime.loops import loop_factory

# Of the system


async def test_a_socket_that_refuses_an_option_is_served_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems that refuse TCP_NODELAY where the peer is gone already."""
    refused = []
    inherited = socket.socket.setsockopt

    def setsockopt(self: socket.socket, level: int, option: int, *value: Any) -> None:
        is_accepted = self.getsockname() == server.server_address
        if is_accepted and (level, option) == (socket.IPPROTO_TCP, socket.TCP_NODELAY):
            refused.append(self)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        inherited(self, level, option, *value)

    async with aioecho.TCPServer(ANYWHERE, Upper) as server:
        monkeypatch.setattr(socket.socket, "setsockopt", setsockopt, raising=False)
        for _ in range(5):
            reader, writer = await asyncio.open_connection(*server.server_address)
            writer.write(b"hello\n")
            assert await reader.readline() == b"HELLO\n"
            writer.close()
            await settle(lambda: not server.connections)
        assert server.stats.completed == 5
        if isinstance(asyncio.get_running_loop(), asyncio.SelectorEventLoop):
            assert len(refused) == 5  # uvloop asks the system itself


class FullSelector(selectors.EpollSelector):
    """One that has no room for another descriptor, as often as it is told."""

    refusals = 0
    error: Exception = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def register(self, *args: Any) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise self.error
        return super().register(*args)


def ask(address: Any) -> bytes:
    """Return the reply, b"" if there is none."""
    with socket.create_connection(address, timeout=10) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"hello\n")
        return sock.recv(100)
    return b""


def with_full_selector(test: Callable[[FullSelector], Coroutine[Any, Any, None]]) -> None:
    selector, errors = FullSelector(), []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
        await test(selector)

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())
    # A transport of 3.11.2, which is paused before it reads, watches its socket nonetheless, and reports that it could not.
    assert not [context for context in errors if "_SelectorTransport._add_reader" not in context["message"]]


def test_a_connection_that_can_not_be_watched_is_closed_and_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    """Epoll watches so many descriptors for a user, and no more."""

    async def test(selector: FullSelector) -> None:
        async with aioecho.TCPServer(ANYWHERE, Upper) as server:
            for refusals in (0, 1, 0, 1, 1, 0):
                selector.refusals = refusals * 100  # the client is in another thread, and so needs none
                reply = await asyncio.to_thread(ask, server.server_address)
                assert reply == (b"" if refusals else b"HELLO\n")
                await settle(lambda: not server.connections)
            assert (server.stats.completed, server.stats.rejected) == (3, 3)
            check_identity(server)

    with_full_selector(test)
    (record, *_) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "no transport with" in record.getMessage()


@pytest.mark.parametrize("error", [FullSelector.error, MemoryError()], ids=["system", "Python"])
@pytest.mark.parametrize("is_datagram", [False, True], ids=["stream", "datagram"])
def test_a_listener_that_can_not_be_watched_tries_again(
    is_datagram: bool, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(selector: FullSelector) -> None:
        selector.error = error
        server = aioecho.UDPServer(ANYWHERE, DatagramUpper) if is_datagram else aioecho.TCPServer(ANYWHERE, Upper)
        async with server:
            server.pause()
            selector.refusals = 2
            server.resume()
            reply = await asyncio.to_thread(ask_by_datagram if is_datagram else ask, server.server_address)
            assert reply == (b"HELLO" if is_datagram else b"HELLO\n")
            assert not selector.refusals

    with_full_selector(test)
    (record, *_) = [record for record in caplog.records if record.levelno == logging.WARNING]
    expected = error if isinstance(error, OSError) else "[Errno 12] Cannot allocate memory"
    assert f"for now: {expected}" in record.getMessage()


# The end of the stream


async def test_who_half_closes_behind_200_kib_gets_all_of_the_reply() -> None:
    data = os.urandom(200 * 1024)
    async with aioecho.TCPServer(ANYWHERE, Echo) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == data
        writer.close()
        await settle(lambda: not server.connections)
        assert server.stats.completed == 1


async def test_the_end_alone_is_a_clean_finish() -> None:
    results: list[bytes] = []

    class Line(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            results.append(await self.reader.readline())

    async with aioecho.TCPServer(ANYWHERE, Line) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await settle(lambda: not server.connections)
        assert results == [b""]
        assert dict(server.stats.reasons) == {"finished": 1}
        assert server.stats.completed == 1


@pytest.mark.parametrize("how", ["readuntil", "readexactly"])
async def test_the_end_in_the_middle_of_a_message_is_an_incomplete_read(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[BaseException] = []

    class Message(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            try:
                await (self.reader.readuntil(b"\n") if how == "readuntil" else self.reader.readexactly(10))
            except asyncio.IncompleteReadError as error:
                errors.append(error)
                raise

    async with aioecho.TCPServer(ANYWHERE, Message) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"half")
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        await settle(lambda: not server.connections)
        [error] = errors
        assert isinstance(error, asyncio.IncompleteReadError)
        assert error.partial == b"half"
        assert server.stats.failed == 1
        assert not [record for record in caplog.records if record.levelno > logging.DEBUG]


# One record for each that ended


async def test_each_ended_connection_makes_one_record_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    class Any_(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            line = await self.reader.readline()
            if line == b"fail\n":
                raise RuntimeError("on request")
            await self.send(line * 2)
            await self.reader.read()

    caplog.set_level(logging.DEBUG, logger="aioecho.connection")
    limits = aioecho.Limits(max_connections=1, overflow="reject")
    timeouts = aioecho.Timeouts(idle=0.5)  # longer than the others say nothing on a busy machine
    async with aioecho.TCPServer(ANYWHERE, Any_, limits=limits, timeouts=timeouts) as server:
        expected = []
        for sent, outcome, reason in (
            (b"hello\n", "completed", "finished"),
            (b"fail\n", "failed", "error"),
            (b"", "failed", "idle"),
            (b"reset\n", "failed", "connection lost"),
        ):
            reader, writer = await asyncio.open_connection(*server.server_address)
            address = writer.get_extra_info("sockname")
            writer.write(sent)
            if sent == b"hello\n":
                assert await reader.readexactly(2 * len(sent)) == sent * 2
                other_reader, other = await asyncio.open_connection(*server.server_address)  # one too many
                expected.append((other.get_extra_info("sockname"), "rejected", "overflow", 0, 0))
                assert await other_reader.read() == b""
                other.close()
                writer.write_eof()
            elif sent == b"reset\n":
                assert await reader.readexactly(2 * len(sent)) == sent * 2
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()
            await settle(lambda: not server.connections)
            answered = 2 * len(sent) if sent in (b"hello\n", b"reset\n") else 0
            expected.append((address, outcome, reason, len(sent), answered))
        records: list[Any] = [record for record in caplog.records if record.name == "aioecho.connection"]
        assert all(record.levelno == logging.DEBUG for record in records)
        found = [(r.client_address, r.outcome, r.reason, r.bytes_in, r.bytes_out) for r in records]
        assert found == expected
        for record in records:
            assert 0 <= record.seconds < 5
            for part in (record.client_address[1], record.outcome, record.reason, record.bytes_in, record.bytes_out):
                assert str(part) in record.getMessage()
        assert sum(server.stats.reasons.values()) == len(records)


async def test_handle_error_learns_of_a_timeout() -> None:
    errors: list[Any] = []

    class Server(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            errors.append(sys.exception())

    async with Server(ANYWHERE, Echo, timeouts=aioecho.Timeouts(idle=0.1)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.read() == b""
        writer.close()
        await settle(lambda: not server.connections)
        [error] = errors
        assert isinstance(error, aioecho.ConnectionTimeout)
        assert error.which == "idle"


# Cancelled at every await


@types.coroutine
def stepped(coroutine: Coroutine[Any, Any, Any], number: int) -> Generator[Any, Any, bool]:
    """Run a coroutine and cancel the task when it has suspended so many times; return whether it ended before."""
    steps, error = 0, None
    while True:
        try:
            suspended = coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration:
            return steps < number
        steps += 1
        if steps == number:
            current = asyncio.current_task()
            assert current is not None
            current.cancel()
        try:
            yield suspended
            error = None
        except BaseException as raised:
            error = raised


async def cancelled_at(coroutine: Coroutine[Any, Any, Any], number: int) -> bool:
    """As above, for a task to run."""
    result: bool = await stepped(coroutine, number)
    return result


class Stubborn(aioecho.StreamRequestHandler):
    """Does something at each stage of its end."""

    async def handle(self) -> None:
        async for line in self.reader:
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0)
            await self.send(line)

    async def finish(self) -> None:
        await asyncio.sleep(0)


class Unhurried(ThreadPoolExecutor):
    """Begins nothing before the loop turns, such as to resolve a name."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(1)
        self._loop = loop

    def submit(self, fn: Any, /, *arguments: Any, **options: Any) -> Any:
        turned = threading.Event()
        self._loop.call_soon(turned.set)
        return super().submit(lambda: (turned.wait(), fn(*arguments, **options))[1])


def what_is_there(folder: Path) -> Any:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    # Not the loops' own: epoll, eventfd, and the descriptor that libuv keeps in reserve from its first connection on.
    descriptors = {n: what for n, what in open_descriptors().items() if "event" not in what and what != "/dev/null"}
    return tasks, descriptors, sorted(folder.iterdir())


@pytest.mark.parametrize("method", ["start", "serve_forever", "shutdown", "async with"])
async def test_cancelled_at_any_await_it_leaves_nothing(method: str, tmp_path: Path) -> None:
    async def use(server: aioecho.BaseServer) -> None:
        async with server:
            await server.serve_forever()

    # A name that is resolved by the time it is awaited suspends nothing from 3.14 on, and so here it takes a turn of the loop.
    asyncio.get_running_loop().set_default_executor(Unhurried(asyncio.get_running_loop()))
    await asyncio.get_running_loop().getaddrinfo("localhost", 0)  # the thread that resolves names has descriptors
    has_ended, number, most = False, 0, 0
    while not has_ended:
        number += 1
        assert number < 200
        before = what_is_there(tmp_path)
        endpoints = ("tcp://localhost:0", "tcp://127.0.0.1:0", f"unix:{tmp_path / 'socket'}")
        server = aioecho.serve(Stubborn, *endpoints, grace=0.01)
        clients: list[socket.socket] = []

        def call(server: aioecho.BaseServer = server, clients: Any = clients) -> None:
            for endpoint in ("idle", "at work"):
                sock = socket.create_connection(server.server_address[:2])
                clients.append(sock)
                sock.sendall(b"x\n" if endpoint == "at work" else b"")

        if method == "shutdown":
            await server.start()
            call()
            await settle(lambda: server.stats.active == 2)  # noqa: B023
            coroutine: Any = server.shutdown(0.02)
        else:
            coroutine = use(server) if method == "async with" else getattr(server, method)()
        task = asyncio.create_task(cancelled_at(coroutine, number))
        if method in ("serve_forever", "async with"):
            await settle(lambda: server.is_serving() or task.done())  # noqa: B023
            if not task.done():
                call()
                await settle(lambda: server.stats.active == 2 or task.done())  # noqa: B023
            if not task.done():
                stopping = asyncio.create_task(server.shutdown(0.02))
                await asyncio.wait([task])
                await stopping
        await asyncio.wait([task])
        assert task.cancelled() or task.exception() is None
        has_ended = not task.cancelled() and task.result()
        if method == "start" and not task.cancelled():
            assert server.is_serving()
            await server.shutdown()
        assert not server.is_serving()
        assert not server.connections
        for sock in clients:
            sock.close()
        check_identity(server)
        for _ in range(1000):
            after = what_is_there(tmp_path)
            if after == before:
                break
            await asyncio.sleep(0.002)
        assert after == before, f"cancelled at suspension {number}"
        most = max(most, number)
    assert most > 1


# Starts and stops


@pytest.mark.slow
async def test_a_thousand_starts_and_stops_leave_nothing(tmp_path: Path) -> None:
    def measure() -> tuple[int, int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        memory = pages * os.sysconf("SC_PAGE_SIZE")
        return len(open_descriptors()), threading.active_count(), len(asyncio.all_tasks()), memory

    async def once() -> None:
        async with aioecho.serve(Upper, "tcp://127.0.0.1:0", f"unix:{tmp_path / 'socket'}") as server:
            reader, writer = await asyncio.open_connection(*server.server_address)
            writer.write(b"x\n")
            assert await reader.readline() == b"X\n"
            writer.close()
            _, writer = await asyncio.open_unix_connection(tmp_path / "socket")
            writer.close()
        check_identity(server)

    async def grown_by_500() -> int:
        before = measure()
        for _ in range(500):
            await once()
        await asyncio.sleep(0)
        after = measure()
        assert after[:3] == before[:3]
        return after[3] - before[3]

    await once()
    # The heap settles some time, and when depends on the Python and its C library. What is left behind grows each time.
    growths: list[int] = []
    while len(growths) < 2 or growths[-1] > 1_500_000:  # 3 KB each: less than a server and what belongs to it
        growths.append(await grown_by_500())
        assert len(growths) < 8, growths
    assert not list(tmp_path.iterdir())


# A model of echo


class Records(logging.Handler):
    """Hands on the record of each ended connection."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def emit(self, record: logging.LogRecord) -> None:
        self.queue.put(record)


@contextlib.contextmanager
def echoing(loop: str) -> Iterator[tuple[Any, Records, list[Any]]]:
    """Serve echo in a thread; give the server, the records of connections, and the loop's errors."""
    records, errors, ready = Records(), [], threading.Event()
    logger = logging.getLogger("aioecho.connection")
    level = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.DEBUG)
    shared: dict[str, Any] = {}

    async def serve() -> None:
        running = asyncio.get_running_loop()
        running.set_exception_handler(lambda loop, context: errors.append(context))
        stop = asyncio.Event()
        limits = aioecho.Limits(max_buffer=5_000)
        async with aioecho.TCPServer(ANYWHERE, Echo, limits=limits) as server:
            address = server.server_address
            shared.update(server=server, address=address, stop=lambda: running.call_soon_threadsafe(stop.set))
            ready.set()
            await stop.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=loop_factory(loop)) as runner:
            runner.run(serve())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(10)
        yield types.SimpleNamespace(**shared), records, errors
    finally:
        shared["stop"]()
        thread.join()
        logger.removeHandler(records)
        logger.setLevel(level)


class Model:
    """A client of an echo server that knows what it has sent, and so what may come back."""

    def __init__(self, address: Any) -> None:
        self.sock = socket.create_connection(address)
        self.address = self.sock.getsockname()
        self.sock.setblocking(False)
        self.sent = bytearray()
        self.received = bytearray()
        self.pattern = 0

    def send(self, size: int, reads: bool) -> None:
        """Send so many bytes, or, when it does not read, as many as are taken."""
        data = memoryview(b"".join(b"%07d\n" % (self.pattern + n) for n in range(size // 8 + 1))[:size])
        self.pattern += size // 8 + 1
        while data:
            readable, writable, _ = select.select([self.sock] if reads else [], [self.sock], [], 30 if reads else 0.05)
            if readable:
                self.read(2**16)
            if writable:
                count = self.sock.send(data)
                self.sent += data[:count]
                data = data[count:]
            elif not reads:
                return
            else:
                assert readable, "it neither takes nor answers"

    def read(self, size: int) -> None:
        with contextlib.suppress(BlockingIOError):
            chunk = self.sock.recv(size)
            assert chunk, "the stream ended, but nobody had ended it"
            self.received += chunk
            assert self.sent.startswith(self.received)

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)
        self.sock.settimeout(30)
        while chunk := self.sock.recv(2**16):
            self.received += chunk
        assert self.received == self.sent

    def settle(self) -> None:
        """Read until all that was sent has come back."""
        self.sock.settimeout(30)
        while len(self.received) < len(self.sent):
            self.received += self.sock.recv(2**16)
        assert self.received == self.sent
        self.sock.setblocking(False)


SIZES = st.one_of(st.integers(1, 20), st.integers(1, 20_000), st.integers(1, 700_000))
STEPS = st.one_of(
    st.tuples(st.just("send"), SIZES, st.booleans()),
    st.tuples(st.just("read"), SIZES),
    st.tuples(st.just("settle")),
    st.tuples(st.just("pause"), st.floats(0, 0.003)),
)


@LOOPS
def test_every_byte_is_accounted_for_whatever_the_client_does(loop: str) -> None:
    with echoing(loop) as (shared, records, errors):
        expected: dict[str, int] = {"completed": 0, "failed": 0}

        @settings(
            max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
        )
        @given(
            steps=st.lists(STEPS, max_size=12),
            end=st.sampled_from(["half-close", "reset", "settle and reset", "close"]),
        )
        def check(steps: list[Any], end: str) -> None:
            client = Model(shared.address)
            with client.sock as sock:
                for step in steps:
                    if step[0] == "send":
                        client.send(*step[1:])
                    elif step[0] == "read":
                        client.read(step[1])
                    elif step[0] == "settle":
                        client.settle()
                    else:
                        threading.Event().wait(step[1])
                if end == "half-close":
                    client.half_close()
                elif end == "settle and reset":
                    client.settle()
                    reset(sock)
                elif end == "reset":
                    reset(sock)
                sent, received = len(client.sent), len(client.received)
            record = records.queue.get(timeout=30)
            assert record.client_address == client.address
            assert received <= record.bytes_out <= record.bytes_in <= sent
            if end in ("half-close", "settle and reset"):
                assert record.bytes_out == record.bytes_in == sent == received
            if end in ("half-close", "reset", "settle and reset"):
                outcome = ("completed", "finished") if end == "half-close" else ("failed", "connection lost")
                assert (record.outcome, record.reason) == outcome
            else:  # unread data at the time of close() makes a reset of it
                assert (record.outcome, record.reason) in {("completed", "finished"), ("failed", "connection lost")}
            expected[record.outcome] += 1

        check()
        assert records.queue.empty()
        assert not errors
        stats = shared.server.stats
        assert (stats.completed, stats.failed) == (expected["completed"], expected["failed"])
        assert stats.accepted == stats.completed + stats.failed
        assert min(expected.values()) > 0
