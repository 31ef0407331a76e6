"""The shutdown contract: nothing that was asked for in time is lost, and nothing can hold the stop up."""

import asyncio
import contextlib
import gc
import logging
import os
import selectors
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import programs
import pytest
from conftest import check_identity, settle
from timing import in_time, within

import aioecho
from aioecho.echo import Echo, Upper
from aioecho.runtime.threads import ThreadPool
from aioecho.serving.drain import AT_A_TIME, Drain
from aioecho.serving.draining import FRESH


async def connect(server: aioecho.BaseServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(*server.server_address[:2])


class Gated(aioecho.StreamRequestHandler):
    """Answers each line once the server's gate is open."""

    async def handle(self) -> None:
        async for line in self.reader:
            self.server.working += 1  # type: ignore[attr-defined]
            await self.server.gate.wait()  # type: ignore[attr-defined]
            await self.send(line.upper())


def gated(**options: Any) -> aioecho.TCPServer:
    server = aioecho.TCPServer(("127.0.0.1", 0), Gated, **options)
    server.gate, server.working = asyncio.Event(), 0  # type: ignore[attr-defined]
    return server


async def test_a_handler_that_shuts_its_server_down_does_not_wait_for_itself() -> None:
    reports = []

    class Quit(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            assert await self.reader.readline() == b"quit\n"
            reports.append(await self.server.shutdown(20))
            await self.send(b"good bye\n")

    async with aioecho.TCPServer(("127.0.0.1", 0), Quit) as server:
        idle_reader, idle_writer = await connect(server)
        reader, writer = await connect(server)
        writer.write(b"quit\n")
        assert await reader.read() == b"good bye\n"
        writer.close()
        with contextlib.suppress(asyncio.IncompleteReadError):
            assert await idle_reader.read() == b""
        idle_writer.close()
        report = await server.shutdown()
        assert report.seconds < 5
        assert reports[0].completed == 0
        assert server.stats.completed == 1  # the idle one failed, as it asserts a line
        check_identity(server)


async def test_the_end_of_a_server_that_never_served_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = aioecho.TCPServer(("127.0.0.1", 0), Upper)
    await server.shutdown()
    assert not [r for r in caplog.records if r.name.startswith("aioecho")]


async def test_an_idle_connection_meets_its_end_and_counts_as_completed() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
        reader, writer = await connect(server)
        writer.write(b"x\n")
        assert await reader.readline() == b"X\n"
        stopping = asyncio.create_task(server.shutdown(20))
        assert await reader.read() == b""
        writer.close()
        report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
        assert report.seconds < 5
        assert server.stats.completed == 1
        check_identity(server)


async def test_a_handler_at_work_finishes_and_answers() -> None:
    async with gated() as server:
        reader, writer = await connect(server)
        writer.write(b"one\ntwo\n")
        await settle(lambda: server.working == 1)  # type: ignore[attr-defined]
        stopping = asyncio.create_task(server.shutdown(5))
        await settle()
        assert not stopping.done()
        server.gate.set()  # type: ignore[attr-defined]
        assert await reader.read() == b"ONE\nTWO\n"
        writer.close()
        assert (await stopping).completed == 1


async def test_what_was_sent_before_is_answered_however_much_it_is() -> None:
    """More than the server has read when it stops: its reader has paused, the rest is in the kernel."""
    async with gated() as server:
        reader, writer = await connect(server)
        request = b"".join(b"%d %s\n" % (n, b"x" * 2000) for n in range(400))
        writer.write(b"first\n")
        await settle(lambda: server.working == 1)  # type: ignore[attr-defined]
        writer.write(request)
        await writer.drain()
        await settle(lambda: writer.transport.get_write_buffer_size() == 0)
        stopping = asyncio.create_task(server.shutdown(10))
        await settle()
        server.gate.set()  # type: ignore[attr-defined]
        assert await reader.read() == b"FIRST\n" + request.upper()
        writer.close()
        report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


async def test_a_peer_that_never_stops_sending_is_cancelled_when_the_grace_is_over() -> None:
    """Nothing tells whether its message is over: an end would be made up."""
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        stop = False

        def flood() -> None:
            with socket.create_connection(server.server_address) as sock, contextlib.suppress(OSError):
                sock.setblocking(False)
                with selectors.DefaultSelector() as selector:
                    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE)
                    while not stop:
                        for _, events in selector.select(1):
                            if events & selectors.EVENT_READ and not sock.recv(1_000_000):
                                return
                            if events & selectors.EVENT_WRITE:
                                with contextlib.suppress(BlockingIOError):
                                    sock.send(b"x" * 1000)

        flooding = asyncio.create_task(asyncio.to_thread(flood))
        await settle(lambda: server.stats.active == 1)
        await asyncio.sleep(0.2)  # time is the subject: past FRESH, in full flood
        report = await server.shutdown(1)
        stop = True
        await flooding
        assert 1 <= report.seconds < 5
        assert report.completed == 0
        assert report.cancelled + report.aborted == 1


async def test_clients_in_the_accept_queue_are_served() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Upper)
    await server.start()
    # Connected and asked in one go, while the loop could not accept any.
    clients = []
    for number in range(50):
        sock = socket.create_connection(server.server_address)
        sock.sendall(b"client %d\n" % number)
        clients.append(sock)
    report = await server.shutdown(5)
    assert report.completed == server.stats.accepted == 50
    for number, sock in enumerate(clients):
        with sock:
            sock.settimeout(30)
            assert sock.recv(100) == b"CLIENT %d\n" % number
            assert sock.recv(100) == b""


async def test_a_client_that_has_just_connected_may_still_ask() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
        with socket.create_connection(server.server_address) as sock:
            sock.setblocking(False)
            with within(FRESH):
                stopping = asyncio.create_task(server.shutdown(5))
                await settle(lambda: server.stats.active == 1)
                sock.send(b"late\n")
            loop = asyncio.get_running_loop()
            assert await loop.sock_recv(sock, 100) == b"LATE\n"
            assert await loop.sock_recv(sock, 100) == b""
        assert (await stopping).completed == 1


async def test_what_a_new_client_asks_while_the_loop_is_busy_is_answered() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
        with socket.create_connection(server.server_address) as sock:
            sock.setblocking(False)
            with within(FRESH):
                stopping = asyncio.create_task(server.shutdown(5))
                await settle(lambda: server.stats.active == 1)
                await settle()
                sock.send(b"late\n")
            time.sleep(0.15)  # until the time that a new client has is over: uvloop looks at its timers before it reads
            loop = asyncio.get_running_loop()
            assert await loop.sock_recv(sock, 100) == b"LATE\n"
            assert await loop.sock_recv(sock, 100) == b""
        assert (await stopping).completed == 1


@pytest.mark.timed
async def test_at_the_end_of_the_grace_handlers_are_cancelled() -> None:
    async with gated() as server:
        reader, writer = await connect(server)
        writer.write(b"x\n")
        await settle(lambda: server.working == 1)  # type: ignore[attr-defined]
        report = await server.shutdown(0.1)
        assert report.seconds >= 0.09  # uvloop counts in milliseconds
        assert (report.completed, report.cancelled, report.aborted) == (0, 1, 0)
        assert server.stats.cancelled == 1
        check_identity(server)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
    in_time(report.seconds, 0.5)


@pytest.mark.timed
async def test_peers_that_never_read_are_aborted_and_the_rest_is_unharmed() -> None:
    class Large(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            if await self.reader.readline() == b"drain\n":
                await self.send(b"x" * 8 * 2**20)
            else:
                self.writer.write(b"x" * 8 * 2**20)

    async with aioecho.TCPServer(("127.0.0.1", 0), Large) as server, contextlib.AsyncExitStack() as stack:
        for number in range(10):
            sock = stack.enter_context(socket.create_connection(server.server_address))
            sock.sendall(b"drain\n" if number % 2 else b"just write\n")
        reader, writer = await connect(server)
        stack.callback(writer.close)
        writer.write(b"drain\n")
        assert len(await reader.readexactly(1000)) == 1000
        with within(0.5):
            stopping = asyncio.create_task(server.shutdown(0.5))
            assert len(await reader.read()) == 8 * 2**20 - 1000
        report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 10)
        check_identity(server)
    in_time(report.seconds, 1)


@pytest.mark.parametrize("swallows", ["for ever", "in finish", "even the end"])
async def test_a_handler_that_swallows_cancellation_is_named_and_does_not_hang_the_stop(
    swallows: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def swallow() -> None:
        while True:
            try:
                await asyncio.sleep(1000)
            except BaseException as error:
                if not isinstance(error, asyncio.CancelledError) and swallows != "even the end":
                    raise
                if isinstance(error, GeneratorExit):
                    raise RuntimeError("no") from None

    class Stubborn(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            self.server.working = True  # type: ignore[attr-defined]
            if swallows != "in finish":
                await swallow()

        async def finish(self) -> None:
            if swallows == "in finish":
                await swallow()

    async with aioecho.TCPServer(("127.0.0.1", 0), Stubborn) as server:
        _, writer = await connect(server)
        await settle(lambda: hasattr(server, "working"))
        report = await server.shutdown(0.05)
        assert (report.completed, report.cancelled, report.aborted) == (0, 0, 1)
        check_identity(server)
        writer.close()
    in_time(report.seconds, 1)
    assert any("Stubborn" in r.getMessage() and r.levelno == logging.WARNING for r in caplog.records)


# One that was in the middle of a message did not count as unfinished.
@pytest.mark.parametrize("asked", [b"", b"x"])
async def test_a_handler_that_ends_after_it_was_left_behind_counts_once(
    asked: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the threads of the others end, for instance."""
    has_read, may_end = threading.Event(), threading.Event()

    class Stuck(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if asked:
                self.request.recv(1)
            has_read.set()
            may_end.wait(30)

    close = ThreadPool.close

    async def close_late(pool: ThreadPool) -> None:
        may_end.set()
        await settle(lambda: server.stats.active == 0)
        await close(pool)

    monkeypatch.setattr(ThreadPool, "close", close_late)
    server = aioecho.TCPServer(("127.0.0.1", 0), Stuck)
    await server.start()
    with socket.create_connection(server.server_address) as client:
        client.sendall(asked)
        await settle(has_read.is_set)
        report = await server.shutdown(0)
    assert (report.completed, report.cancelled, report.aborted, report.unfinished) == (0, 0, 1, len(asked))
    check_identity(server)


async def test_a_cancelled_handler_may_clean_up() -> None:
    cleaned = []

    class Careful(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(0.01)
                cleaned.append("handle")

        async def finish(self) -> None:
            await asyncio.sleep(0.01)
            cleaned.append("finish")

    async with aioecho.TCPServer(("127.0.0.1", 0), Careful) as server:
        _, writer = await connect(server)
        await settle(lambda: server.stats.active == 1)
        await settle()
        report = await server.shutdown(0)
        assert (report.completed, report.cancelled, report.aborted) == (0, 1, 0)
        writer.close()
    assert cleaned == ["handle", "finish"]


async def test_the_shorter_grace_wins_and_both_get_the_same_report() -> None:
    async with gated() as server:
        _, writer = await connect(server)
        writer.write(b"x\n")
        await settle(lambda: server.working == 1)  # type: ignore[attr-defined]
        first = asyncio.create_task(server.shutdown(60))
        await settle()
        second = await server.shutdown(0.05)
        assert await first is second
        assert await server.shutdown(60) is second
        assert second.seconds < 20
        writer.close()


async def test_a_second_shutdown_cuts_off_even_one_that_swallows_its_cancellation() -> None:
    class Stubborn(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(1000)

    async with aioecho.TCPServer(("127.0.0.1", 0), Stubborn) as server:
        _, writer = await connect(server)
        await settle(lambda: server.stats.active == 1)
        await settle()
        first = asyncio.create_task(server.shutdown(60))
        await settle()
        began = asyncio.get_running_loop().time()
        await server.shutdown(0)
        assert (await first).aborted == 1
        assert asyncio.get_running_loop().time() - began < 20
        writer.close()


async def test_a_shutdown_after_the_end_starts_nothing_again(caplog: pytest.LogCaptureFixture) -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Echo, grace=0)
    await server.start()
    first = await server.shutdown(30)
    assert await server.shutdown() is first
    await asyncio.sleep(0.6)  # time is the subject: past all the patience there is
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_shutdown_that_is_cancelled_ends_at_once_and_leaves_nothing() -> None:
    async with gated() as server:
        _, writer = await connect(server)
        writer.write(b"x\n")
        await settle(lambda: server.working == 1)  # type: ignore[attr-defined]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await server.shutdown(60)
        assert not server.connections
        assert server.stats.cancelled == 1
        writer.close()


@pytest.mark.parametrize("step", ["start", "serve_forever", "shutdown"])
async def test_cancelled_at_every_await_nothing_is_left(step: str) -> None:
    for count in range(25):
        server = aioecho.serve(Upper, "tcp://localhost:0", "tcp://127.0.0.1:0", grace=1)
        if step == "shutdown":
            await server.start()
            with socket.create_connection(server.server_address[:2]) as sock:
                sock.sendall(b"x\n")
                await settle(lambda: server.stats.active == 1)  # noqa: B023
                task = asyncio.create_task(server.shutdown(1))
                for _ in range(count):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                if count == 0:  # cancelled before it did anything
                    await server.shutdown()
        else:
            task = asyncio.create_task(getattr(server, step)())
            for _ in range(count):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if step == "start" and not task.cancelled():
                await server.shutdown()
        assert not server.is_serving()
        assert not server.connections


async def test_shutdown_before_the_start_prevents_it() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Echo)
    report = await server.shutdown()
    assert (report.completed, report.cancelled, report.aborted) == (0, 0, 0)
    with pytest.raises(RuntimeError, match="once"):
        await server.start()


PROGRAM = """
import asyncio, random, sys
import aioecho

class Slow(aioecho.StreamRequestHandler):
    async def handle(self):
        async for line in self.reader:
            await asyncio.sleep(random.random() / 2)
            await self.send(line.upper())

from aioecho.workers.single import run_server
server = aioecho.serve(Slow, "tcp://127.0.0.1:0", grace=20)
report = run_server(server, loop=sys.argv[1], when_serving=lambda s: print(s.names[0], flush=True))
print(report, flush=True)
sys.exit(bool(report.cancelled or report.aborted))
"""


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_two_thousand_requests_in_flight_at_sigterm_are_all_answered(loop: str) -> None:
    count = 2_000
    server = subprocess.Popen([sys.executable, "-c", PROGRAM, loop], stdout=subprocess.PIPE, text=True)
    clients: list[socket.socket] = []
    try:
        assert server.stdout is not None
        host, port = server.stdout.readline().strip().removeprefix("tcp://").split(":")
        for number in range(count):
            sock = socket.create_connection((host, int(port)))
            clients.append(sock)
            sock.sendall(b"request %d\n" % number)
        began = time.monotonic()
        os.kill(server.pid, signal.SIGTERM)
        for number, sock in enumerate(clients):
            sock.settimeout(30)
            with sock.makefile("rb") as file:
                assert file.read() == b"REQUEST %d\n" % number
        assert server.wait(30) == 0
        took = time.monotonic() - began
        assert f"completed={count}, cancelled=0, aborted=0" in server.stdout.read()
        in_time(took, 5)
    finally:
        for sock in clients:
            sock.close()
        if server.poll() is None:
            server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_program_ends_though_a_task_of_its_handlers_never_does(loop: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(f"""
import asyncio, logging, socket, aioecho

class Parent(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(b"x")
        await asyncio.create_task(self.stay(), name="stays for ever")

    async def stay(self):
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

logging.basicConfig()
with socket.create_server(("127.0.0.1", 0)) as sock:
    print("listening on tcp://{{}}:{{}}".format(*sock.getsockname()), flush=True)
    print(aioecho.run(Parent, sock=sock, loop="{loop}", grace=0.05).aborted, flush=True)
""")
    with (
        programs.Program(sys.executable, "-W", "error", "program.py", cwd=tmp_path) as program,
        programs.connect(program.listening()) as sock,
    ):
        assert sock.recv(1) == b"x"
        program.signal()
        code, output, errors = program.end()
    assert (code, output.split()[-1:]) == (0, [b"1"])
    assert "left behind, as it would not end when cancelled" in errors
    assert "stays for ever" in errors


async def test_thousands_are_drained_and_cut_off_a_few_in_a_turn_of_the_loop() -> None:
    class Stubborn:
        was_aborted = False
        calls: ClassVar[Counter[str]] = Counter()

        def is_in_message(self) -> bool:
            return False

        def drain(self) -> None:
            self.calls["drain"] += 1

        def cancel(self) -> None:
            self.calls["cancel"] += 1

        def abandon_handler(self) -> None:
            self.calls["abandon"] += 1
            self.was_aborted = True

    async def release() -> None:
        pass

    served: set[Any] = {Stubborn() for _ in range(1000)}
    drain = Drain(
        served,
        close=lambda: None,
        is_idle=lambda: not served,
        drop_waiting=lambda: 0,
        release=release,
        level=logging.DEBUG,
    )
    most = before = 0
    while Stubborn.calls["abandon"] < 1000:
        await asyncio.sleep(0)
        now = Stubborn.calls.total()
        most, before = max(most, now - before), now
        if Stubborn.calls["drain"] == 1000:
            drain.shorten(0)
    assert Stubborn.calls == {"drain": 1000, "cancel": 1000, "abandon": 1000}
    assert most <= 2 * AT_A_TIME
    served.clear()
    drain.end_if_idle()
    await drain.wait()


@pytest.mark.parametrize("read", ["readline", "readexactly", "read"])
async def test_a_drained_connection_leaves_nothing_for_the_garbage_collector(read: str) -> None:
    class Reads(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.send(b"ready\n")
            arguments = (4,) if read != "readline" else ()
            with contextlib.suppress(asyncio.IncompleteReadError):
                while await getattr(self.reader, read)(*arguments):
                    pass  # so that what "read" takes is not answered, and a wait for silence begins

    async with aioecho.TCPServer(("127.0.0.1", 0), Reads) as server:
        gc.collect()
        before = gc.get_objects()
        known = {id(each) for each in before}
        gc.disable()
        try:
            (silent, first), (speaking, second) = await connect(server), await connect(server)
            for reader in (silent, speaking):
                assert await reader.readline() == b"ready\n"
            second.write(b"1234" if read != "readline" else b"123\n")
            await settle(lambda: server.stats.active == 2)
            stopping = asyncio.ensure_future(server.shutdown(0.2))
            for reader, writer in ((silent, first), (speaking, second)):
                assert await reader.read() == b""
                writer.close()
                await writer.wait_closed()
            await stopping
            await settle()
            left = [type(each).__name__ for each in gc.get_objects() if id(each) not in known]
        finally:
            gc.enable()
    assert not {"StreamDrain", "StreamProtocol", "Connection", "Reads"} & set(left)
