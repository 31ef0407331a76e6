"""Serving over real sockets: handlers, hooks, accounting, and connections that end badly."""

import asyncio
import contextlib
import contextvars
import errno
import functools
import gc
import logging
import os
import socket
import struct
import sys
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ask, handler, reset

import aioecho
from aioecho.client import open_connection
from aioecho.echo import DatagramEcho, Echo, Upper
from aioecho.net import acceptor, endpoints
from aioecho.net.acceptor import Acceptor
from aioecho.net.datagram_socket import DatagramSocket
from aioecho.net.kernel import accept_queue


async def test_a_line_comes_back_in_upper_case() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
        assert await ask(server, b"Hello, Server!\n") == b"HELLO, SERVER!\n"
        await settle(lambda: server.stats.completed == 1)
        check_identity(server)


async def test_a_handler_has_what_socketservers_has_and_its_methods_are_called_in_order() -> None:
    calls: list[Any] = []

    class Full(aioecho.StreamRequestHandler):
        async def setup(self) -> None:
            calls.append("setup")

        async def handle(self) -> None:
            calls.append((self.client_address, self.server, self.request == (self.reader, self.writer)))
            assert isinstance(self.reader, aioecho.StreamReader)
            assert isinstance(self.writer, aioecho.StreamWriter)
            await self.send(await self.reader.read(10))

        async def finish(self) -> None:
            calls.append("finish")

    async with aioecho.TCPServer(("127.0.0.1", 0), Full) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        address = writer.get_extra_info("sockname")
        writer.write(b"x")
        assert await reader.read() == b"x"
        writer.close()
    assert calls == ["setup", (address, server, True), "finish"]


@pytest.mark.parametrize("where", ["__init__", "setup", "handle", "finish"])
async def test_a_method_that_raises_is_reported_and_stops_nothing(where: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def method(name: str) -> Any:
        async def do(self: Any) -> None:
            calls.append(name)
            if name == where:
                raise ValueError(f"in {name}")

        return do

    methods = {name: method(name) for name in ("setup", "handle", "finish")}
    if where == "__init__":

        def fails(self: Any, *arguments: Any) -> None:
            raise ValueError("in __init__")

        methods["__init__"] = fails
    async with aioecho.TCPServer(("127.0.0.1", 0), type("Bad", (aioecho.StreamRequestHandler,), methods)) as server:
        assert await ask(server, b"") == b""
        server.RequestHandlerClass = Echo
        assert await ask(server, b"still here") == b"still here"
        await settle(lambda: not server.connections)
        assert (server.stats.failed, server.stats.completed) == (1, 1)
        check_identity(server)
    expected = {"__init__": [], "setup": ["setup"]}.get(where, ["setup", "handle", "finish"])
    assert calls == expected
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == f"in {where}"


async def test_any_callable_makes_handlers() -> None:
    class Greeter(aioecho.StreamRequestHandler):
        def __init__(self, greeting: bytes, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.greeting = greeting

        async def handle(self) -> None:
            await self.send(self.greeting)

    async with aioecho.TCPServer(("127.0.0.1", 0), functools.partial(Greeter, b"hi")) as server:
        assert await ask(server, b"") == b"hi"
    async with aioecho.serve(lambda *arguments: Greeter(b"lo", *arguments), "tcp://127.0.0.1:0") as server:
        assert await ask(server, b"") == b"lo"


async def test_a_handler_without_a_method_that_it_must_have_ends_its_connection_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Bare:
        def __init__(self, request: Any, client_address: Any, server: Any) -> None:
            self.reader, self.writer = request

        async def setup(self) -> None:
            pass

        async def handle(self) -> None:
            self.writer.write(await self.reader.read())

    async with aioecho.TCPServer(("127.0.0.1", 0), lambda *arguments: Bare(*arguments)) as server:
        assert await ask(server, b"hello") == b"hello"
        await settle(lambda: not server.connections)
        assert server.stats.failed == server.stats.reasons["error"] == 1
        check_identity(server)
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "finish" in str(record.exc_info and record.exc_info[1])


@pytest.mark.parametrize("is_async", [False, True])
async def test_verify_request_refuses_before_a_handler_is_made(is_async: bool) -> None:
    made = []

    class Picky(aioecho.TCPServer):
        if is_async:

            async def verify_request(self, request: Any, client_address: Any) -> bool:  # type: ignore[override]
                reader, _ = request
                return bool(await reader.readline() == b"friend\n")
        else:

            def verify_request(self, request: Any, client_address: Any) -> bool:
                assert client_address[0] == "127.0.0.1"
                return not self.stats.rejected

    class Made(Echo):
        def __init__(self, *arguments: Any) -> None:
            made.append(1)
            super().__init__(*arguments)

    async with Picky(("127.0.0.1", 0), Made) as server:
        if is_async:
            assert await ask(server, b"foe\nx") == b""
            assert await ask(server, b"friend\nx") == b"x"
        else:
            server.stats.rejected += 0
            assert await ask(server, b"x") == b"x"
        await settle(lambda: not server.connections)
        assert (server.stats.rejected, server.stats.completed, len(made)) == (int(is_async), 1, 1)
        check_identity(server)


@pytest.mark.parametrize("error", [ValueError("of the hook"), "false"])
async def test_verify_request_that_says_no_or_raises_serves_nobody(error: Any) -> None:
    class Closed(aioecho.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            if isinstance(error, Exception):
                raise error
            return False

    async with Closed(("127.0.0.1", 0), Echo) as server:
        assert await ask(server, b"") == b""
        await settle(lambda: not server.connections)
        assert server.stats.completed == 0
        assert server.stats.failed + server.stats.rejected == 1


async def test_a_handle_that_is_no_coroutine_is_an_error_which_says_so(caplog: pytest.LogCaptureFixture) -> None:
    finished = []

    async def finish(self: Any) -> None:
        finished.append(self)

    async with aioecho.TCPServer(
        ("127.0.0.1", 0), handler(lambda self: self.writer.write(b"reply\n"), finish=finish)
    ) as server:
        assert await ask(server, b"x\n") == b"reply\n"
        await settle(lambda: server.stats.failed == 1)
        assert len(finished) == 1
        check_identity(server)
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert "async def handle(self)" in str(record.exc_info[1])


async def test_a_handle_may_return_whatever_can_be_awaited() -> None:
    async def answer(self: Any) -> None:
        await self.send(await self.reader.readline())

    class Awaitable:
        def __init__(self, handler: Any) -> None:
            self.handler = handler

        def __await__(self) -> Any:
            return answer(self.handler).__await__()

    for handle in (answer, lambda self: Awaitable(self), lambda self: asyncio.ensure_future(answer(self))):
        async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
            assert await ask(server, b"x\n") == b"x\n"
            await settle(lambda server=server: server.stats.completed == 1)


class Failed(BaseException):
    """As pytest.fail() raises one: no Exception, and not the program's end."""


@pytest.mark.parametrize("kind", ["stream", "datagram", "session"])
async def test_what_a_handler_raises_is_logged_whatever_it_is(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def fail(self: Any) -> None:
        raise Failed

    if kind == "stream":
        async with aioecho.TCPServer(("127.0.0.1", 0), handler(fail)) as server:
            assert await ask(server, b"") == b""
            await settle(lambda: server.stats.failed == 1)
    else:
        base = aioecho.DatagramRequestHandler if kind == "datagram" else aioecho.DatagramSessionHandler
        async with aioecho.UDPServer(("127.0.0.1", 0), type("Failing", (base,), {"handle": fail})) as datagrams:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", datagrams.server_address)
                await settle(lambda: datagrams.stats.failed == 1)
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], Failed)


async def test_handle_error_is_called_in_the_except_block_and_may_fail_itself(caplog: pytest.LogCaptureFixture) -> None:
    import sys

    seen = []

    class Own(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            seen.append((request[0], client_address[0], repr(sys.exception())))
            raise LookupError("in the hook")

    async def handle(self: Any) -> None:
        raise ValueError("in the handler")

    async with Own(("127.0.0.1", 0), handler(handle)) as server:
        await ask(server, b"")
        await settle(lambda: not server.connections)
    [(reader, host, error)] = seen
    assert (type(reader), host, error) == (aioecho.StreamReader, "127.0.0.1", "ValueError('in the handler')")
    assert any(r.exc_info and isinstance(r.exc_info[1], LookupError) for r in caplog.records)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
async def test_thousands_that_raise_and_thousands_that_are_cancelled(count: int) -> None:
    errors = 0

    class Quiet(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            nonlocal errors
            errors += 1

    async def handle(self: Any) -> None:
        if await self.reader.read(1) == b"r":
            raise ValueError("raised")
        asyncio.current_task().cancel()  # type: ignore[union-attr]
        await self.reader.read(1)

    async with Quiet(("127.0.0.1", 0), handler(handle)) as server:

        def clients() -> None:
            for number in range(2 * count):
                with socket.create_connection(server.server_address) as sock:
                    sock.sendall(b"rc"[number % 2 : number % 2 + 1])
                    assert sock.recv(1) == b""

        await asyncio.to_thread(clients)
        await settle(lambda: not server.connections)
        check_identity(server)
        assert (server.stats.failed, server.stats.cancelled, errors) == (count, count, count)


async def test_collecting_garbage_all_the_while_loses_no_parked_handler() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        pairs = [await asyncio.open_connection(*server.server_address) for _ in range(200)]
        for _ in range(3):
            for _, writer in pairs:
                writer.write(b"x")
            gc.collect()
            for reader, _ in pairs:
                assert await reader.readexactly(1) == b"x"
            gc.collect()
        for _, writer in pairs:
            writer.close()


@pytest.mark.parametrize("how", ["answered", "too long", "reset in mid-reply", "raises"])
async def test_an_ended_connection_leaves_nothing_for_the_garbage_collector(how: str) -> None:
    """What it has read, up to 100 kB here, would wait for it as well."""

    class Raises(Upper):
        async def handle(self) -> None:
            await self.reader.readline()
            raise ConnectionResetError("made up")

    async with aioecho.TCPServer(("127.0.0.1", 0), Raises if how == "raises" else Upper) as server:

        def clients() -> None:
            for _ in range(20):
                with socket.create_connection(server.server_address) as sock, contextlib.suppress(ConnectionError):
                    match how:
                        case "answered" | "raises":
                            sock.sendall(b"x\n")
                            assert sock.recv(2) == (b"" if how == "raises" else b"X\n")
                        case "too long":
                            sock.sendall(b"x" * 100_000)
                            assert sock.recv(1) == b""
                        case _:
                            sock.sendall(b"a line\n" * 10_000)
                            reset(sock)

        await asyncio.to_thread(clients)
        await settle(lambda: not server.connections)
        gc.collect()
        gc.disable()
        try:
            await asyncio.to_thread(clients)
            await settle(lambda: not server.connections)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            ours = {type(each).__name__ for each in gc.garbage if type(each).__module__.startswith("aioecho.")}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    # asyncio's own transport is in a cycle, which holds the socket.
    assert ours <= {"_AcceptedSocket"}


async def test_each_connection_has_its_own_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")

    async def handle(self: Any) -> None:
        before = variable.get()
        variable.set("set by a handler")
        await self.reader.read(1)
        await self.send(f"{before}/{variable.get()}".encode())

    variable.set("set before the start")
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        for _ in range(2):
            assert await ask(server, b"x") == b"set before the start/set by a handler"
    assert variable.get() == "set before the start"


async def test_who_is_let_in_by_a_handler_does_not_inherit_its_context() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen = []

    async def handle(self: Any) -> None:
        seen.append(variable.get())
        variable.set("a handler's")
        if await self.reader.read(1):
            self.server.limits = aioecho.Limits(max_connections=2)
            await self.reader.read()

    limits = aioecho.Limits(max_connections=1)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), limits=limits) as server:
        with socket.create_connection(server.server_address) as first:
            await settle(lambda: seen)
            with socket.create_connection(server.server_address):
                first.send(b"x")
                await settle(lambda: len(seen) == 2)
    assert seen == ["unset", "unset"]


async def test_the_peer_that_half_closes_gets_all_of_a_large_reply() -> None:
    data = bytes(range(256)) * 800
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        assert await ask(server, data) == data


async def test_a_reply_is_not_destroyed_by_what_the_peer_still_sends() -> None:
    """The handler answers and returns with the peer in full flow: a reset would take the answer with it."""

    async def handle(self: Any) -> None:
        await self.reader.readexactly(10)
        await self.send(b"enough")

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:

        def client() -> bytes:
            with socket.create_connection(server.server_address, timeout=30) as sock:
                for _ in range(40):
                    sock.sendall(b"x" * 100_000)
                got = b"".join(iter(functools.partial(sock.recv, 100), b""))
                sock.sendall(b"more")
                return got

        assert await asyncio.to_thread(client) == b"enough"


async def test_a_peer_that_stays_after_the_reply_is_left_after_the_linger() -> None:
    async def handle(self: Any) -> None:
        await self.send(b"bye")

    timeouts = aioecho.Timeouts(linger=0.05)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), timeouts=timeouts) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.read() == b"bye"
        await settle(lambda: server.stats.completed == 1 and not server.connections)
        writer.close()


async def test_the_linger_may_be_the_handler_classs_own() -> None:
    async def handle(self: Any) -> None:
        await self.send(b"bye")

    kind = handler(handle, timeouts=aioecho.Timeouts(linger=0.05))
    async with aioecho.TCPServer(("127.0.0.1", 0), kind, timeouts=aioecho.Timeouts(linger=60)) as server:
        with socket.create_connection(server.server_address):
            await settle(lambda: server.stats.completed == 1)


async def test_who_lingers_is_not_idle_and_has_its_reply_whatever_comes_then() -> None:
    async def handle(self: Any) -> None:
        await self.send(b"bye")

    timeouts = aioecho.Timeouts(idle=0.05, linger=60)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), timeouts=timeouts) as server:
        with socket.create_connection(server.server_address) as sock:
            await settle(lambda: server.connections)
            (connection,) = server.connections
            await asyncio.sleep(0.2)  # time is the subject: some sweeps of the shortest timeout
            assert connection in server.connections
            assert connection.idle_since(asyncio.get_running_loop().time()) is None
            await server.shutdown(grace=0.05)
            assert not server.connections
            sock.settimeout(5)
            assert (sock.recv(100), sock.recv(100)) == (b"bye", b"")
        assert server.stats.completed == server.stats.reasons["finished"] == 1
        check_identity(server)


@pytest.mark.parametrize("how", ["linger", "reset"])
@pytest.mark.parametrize("is_cancelled", [False, True], ids=["left", "cancelled"])
async def test_a_connection_ends_though_its_handler_has_left_another_task_waiting_in_its_reader(
    how: str, is_cancelled: bool
) -> None:
    helpers = []

    async def handle(self: Any) -> None:
        helpers.append(asyncio.create_task(self.reader.read(100)))
        await settle()
        await self.send(b"bye")
        if is_cancelled:
            helpers[0].cancel()

    timeouts = aioecho.Timeouts(linger=0.1 if how == "linger" else 60)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), timeouts=timeouts) as server:
        with socket.create_connection(server.server_address) as sock:
            await settle(lambda: helpers and helpers[0].done())
            if how == "reset":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            await settle(lambda: not server.connections)
        assert server.stats.completed == 1
        check_identity(server)
        await asyncio.wait(helpers)


async def test_what_a_handler_hands_on_and_returns_is_still_written() -> None:
    """Its writer's task has its turn before the connection begins to close, as the handler was resumed by what came."""
    writers = []

    async def handle(self: Any) -> None:
        queue: asyncio.Queue[bytes] = asyncio.Queue()

        async def write() -> None:
            self.writer.write(await queue.get())

        writers.append(asyncio.create_task(write()))
        queue.put_nowait(await self.reader.readline())

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: writers)
        await settle()
        writer.write(b"hello\n")
        assert await reader.read() == b"hello\n"
        writer.close()
        await asyncio.wait(writers)


async def test_clients_that_come_at_once_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def count(sock: socket.socket) -> Any:
        nonlocal looks
        looks += 1
        return accept_queue(sock)

    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        monkeypatch.setattr(acceptor, "accept_queue", count)
        with contextlib.ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(socket.create_connection(server.server_address))
            await settle(lambda: server.stats.accepted == 40)
            assert looks <= 2
        await settle(lambda: server.stats.completed == 40)


@pytest.mark.parametrize("told", [1, 100], ids=["too few", "too many"])
async def test_all_clients_are_accepted_however_many_the_system_tells_of(
    told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may have accepted some of them, and others may have come since."""
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        monkeypatch.setattr(acceptor, "accept_queue", lambda sock: (told, 128))
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(socket.create_connection(server.server_address))
            await settle(lambda: server.stats.accepted == 5)
        await settle(lambda: server.stats.completed == 5)
        assert server.stats.accept_errors == 0


async def test_nothing_is_written_to_a_connection_that_its_handler_has_left() -> None:
    """Its peer was told that this was all: so a task that goes on learns that it is too late, as from any ended stream."""
    writers: list[Any] = []

    async def handle(self: Any) -> None:
        writers.append(self.writer)
        await self.send(await self.reader.readline())

    timeouts = aioecho.Timeouts(linger=60)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), timeouts=timeouts) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"hello\n")
        assert await reader.read() == b"hello\n"
        writer.write(b"dropped\n")
        await settle()
        for write in (lambda data: writers[0].write(data), lambda data: writers[0].writelines([data])):
            with pytest.raises(RuntimeError, match="write_eof"):
                write(b"late")
        assert server.stats.active == 1
        writer.close()
        await settle(lambda: server.stats.completed == 1)
        # Asyncio's transport would drop it once the connection is lost, and warn of many.
        with pytest.raises(RuntimeError, match="write_eof"):
            writers[0].write(b"later")


@pytest.mark.parametrize("how", ["cancel", "abort", "task"])
async def test_a_connection_that_waits_for_its_peer_to_close_too_can_be_ended(how: str) -> None:
    timeouts = aioecho.Timeouts(linger=60)

    async def handle(self: Any) -> None:
        await self.send(await self.reader.readline())

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), timeouts=timeouts) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"hello\n")
        assert await reader.read() == b"hello\n"
        (connection,) = server.connections
        if how == "task":
            connection.task.cancel()
        else:
            getattr(connection, how)()
        await settle(lambda: not server.connections)
        assert server.stats.completed == 1
        check_identity(server)
        writer.close()


# It was told to go on twice, by the loss and by itself, and then never did: the connection stayed for ever.
async def test_a_connection_ends_whose_setup_met_the_end_and_whose_handler_has_nothing_to_wait_for() -> None:
    class Greeted(Upper):
        async def setup(self) -> None:
            await self.reader.readline()

    async with aioecho.TCPServer(("127.0.0.1", 0), Greeted) as server:
        with socket.create_connection(server.server_address):
            await settle(lambda: [each for each in server.connections if each.request is not None])
        await settle(lambda: not server.connections)
        assert server.stats.completed == server.stats.reasons["finished"] == 1
        check_identity(server)


@pytest.mark.parametrize("is_first", [False, True], ids=["its peer closes first", "it closes first"])
async def test_a_handler_that_waits_for_another_stream_last_ends_as_any_other(is_first: bool) -> None:
    """It is stepped by what comes there, and so ends there, but has its own peer to wait for."""

    async def relay(self: Any) -> None:
        line = await self.reader.readline()
        reader, writer = await open_connection(behind.names[0])
        writer.write(line)
        await self.send(await reader.readline())
        writer.close()
        await reader.read()

    async with (
        aioecho.TCPServer(("127.0.0.1", 0), Upper) as behind,
        aioecho.TCPServer(("127.0.0.1", 0), handler(relay), timeouts=aioecho.Timeouts(linger=60)) as server,
    ):
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"hello\n")
        if is_first:
            assert await reader.read() == b"HELLO\n"
        else:
            writer.write_eof()
            assert await reader.readline() == b"HELLO\n"
        writer.close()
        await settle(lambda: not server.connections)
        assert server.stats.completed == server.stats.reasons["finished"] == 1
        check_identity(server)


# It went on in the context of the task that had come to wait for that stream since.
async def test_finish_runs_in_its_own_context_though_another_handler_waits_for_the_stream_by_then() -> None:
    name: contextvars.ContextVar[str | None] = contextvars.ContextVar("name")
    lock, may_reply = asyncio.Lock(), asyncio.Event()
    waiting: list[str] = []
    seen: list[tuple[str | None, str | None]] = []

    async def reply_late(self: Any) -> None:
        async for line in self.reader:
            await may_reply.wait()
            await self.send(line)

    class Relay(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            line = await self.reader.readline()
            self.label = line.decode()
            name.set(self.label)
            waiting.append(self.label)
            async with lock:
                writer.write(line)
                await reader.readline()

        async def finish(self) -> None:
            seen.append((self.label, name.get()))

    async with (
        aioecho.TCPServer(("127.0.0.1", 0), handler(reply_late)) as behind,
        aioecho.TCPServer(("127.0.0.1", 0), Relay) as server,
    ):
        reader, writer = await open_connection(behind.names[0])
        with contextlib.ExitStack() as clients:
            for number, line in enumerate((b"a\n", b"b\n")):
                client = clients.enter_context(socket.create_connection(server.server_address))
                client.sendall(line)
                await settle(lambda number=number: len(waiting) > number)
            may_reply.set()
            await settle(lambda: len(seen) == 2)
        writer.close()
        await settle(lambda: not (server.connections or behind.connections))
    assert seen == [("a\n", "a\n"), ("b\n", "b\n")]


async def test_who_piles_up_what_it_writes_and_returns_is_cut_off_and_counted_so() -> None:
    async def handle(self: Any) -> None:
        await self.reader.read()
        for _ in range(100):
            self.writer.write(bytes(2**20))

    limits = aioecho.Limits(max_write_buffer=1000)
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), limits=limits) as server:
        with socket.create_connection(server.server_address) as sock:
            sock.shutdown(socket.SHUT_WR)
            await settle(lambda: server.stats.accepted == 1 and not server.connections)
        assert server.stats.failed == server.stats.reasons["write buffer"] == 1
        check_identity(server)


@pytest.mark.parametrize("is_known", [False, True])
async def test_to_end_a_reply_to_one_who_is_gone_is_no_error(is_known: bool, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        await self.reader.readline()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        if is_known:  # to the loop
            with contextlib.suppress(OSError):
                await self.reader.read()
            await settle()
        self.writer.write_eof()

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        client = socket.create_connection(server.server_address)
        client.sendall(b"go\n")
        await settle(lambda: server.stats.accepted == 1 and not server.connections)
        assert server.stats.completed == 1
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_a_peer_whose_host_has_vanished_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: server.stats.active == 1)
        [connection] = server.connections
        await settle(lambda: connection.request is not None)
        transport = connection.request[1].transport
        # No host can be made to vanish here: what the loops do when the kernel has given it up.
        transport.get_protocol().connection_lost(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
        transport.abort()
        assert await reader.read() == b""
        writer.close()
        await settle(lambda: not server.connections)
        assert server.stats.failed == server.stats.reasons["connection lost"] == 1
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_resets_in_mid_reply_make_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        await self.reader.readexactly(1)
        while True:
            await self.send(b"x" * 100_000)

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:

        def client() -> None:
            for _ in range(50):
                sock = socket.create_connection(server.server_address)
                sock.sendall(b"x")
                sock.recv(1000)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

        await asyncio.to_thread(client)
        await settle(lambda: not server.connections)
        check_identity(server)
        assert server.stats.failed == 50
        assert server.stats.reasons["connection lost"] == 50
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("aioecho")]


async def test_a_peer_that_resets_behind_its_request_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        await self.reader.readline()

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        for _ in range(20):
            sock = socket.create_connection(server.server_address)
            sock.sendall(b"quit\n")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        await settle(lambda: server.stats.accepted == 20 and not server.connections)
        check_identity(server)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("aioecho")]


@pytest.mark.parametrize("kind", ["wrapping", "eager"])
async def test_the_task_factory_of_an_application_disturbs_no_connection(kind: str) -> None:
    loop = asyncio.get_running_loop()

    async def wrap(coro: Any) -> Any:
        return await coro

    def wrapping(loop: Any, coro: Any, **options: Any) -> Any:
        return asyncio.Task(wrap(coro), loop=loop, **options)

    factory: Any = wrapping
    if kind == "eager":
        if sys.version_info < (3, 12) or type(loop).__module__.startswith("uvloop"):
            pytest.skip("there are no eager tasks on this Python, or on uvloop")
        factory = asyncio.eager_task_factory
    loop.set_task_factory(factory)
    try:
        async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
            for _ in range(3):
                assert await ask(server, b"one\ntwo\n") == b"ONE\nTWO\n"
            await settle(lambda: not server.connections)
            assert server.stats.completed == 3
            check_identity(server)
    finally:
        loop.set_task_factory(None)


async def test_a_socket_that_somebody_has_shut_down_does_not_keep_the_loop_busy() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
        with server.sockets[0].dup() as same:  # as another process may have it
            same.shutdown(socket.SHUT_RDWR)
        await asyncio.sleep(0.5)  # time is the subject
        assert server.stats.accept_errors < 10


@pytest.mark.parametrize("how", ["address", "sock"])
async def test_small_writes_are_sent_at_once(how: str) -> None:
    """Without Nagle's algorithm, as from asyncio.start_server()."""

    async def handle(self: Any) -> None:
        with socket.socket(fileno=os.dup(self.writer.get_extra_info("socket").fileno())) as same:
            await self.send(b"%d" % bool(same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))

    if how == "sock":
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        server = aioecho.TCPServer(None, handler(handle), sock=sock)
    else:
        server = aioecho.TCPServer(("localhost", 0), handler(handle))
    async with server:
        for listening in server.sockets:
            assert await ask(listening.getsockname(), b"") == b"1"


async def test_the_registry_shows_who_is_connected() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        assert not server.connections
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"x")
        await reader.read(1)
        [connection] = server.connections
        assert connection.client_address == writer.get_extra_info("sockname")
        assert isinstance(connection.handler, Echo)
        connection.abort()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        await settle(lambda: not server.connections)
        check_identity(server)
        writer.close()


async def test_never_more_connections_than_the_limit_and_all_are_served() -> None:
    most = 0

    class Counting(Upper):
        async def handle(self) -> None:
            nonlocal most
            most = max(most, len(self.server.connections))
            await super().handle()

    limits = aioecho.Limits(max_connections=5)
    async with aioecho.TCPServer(("127.0.0.1", 0), Counting, limits=limits) as server:
        answers = await asyncio.gather(*(ask(server, b"x\n") for _ in range(60)))
        assert answers == [b"X\n"] * 60
        assert most <= 5


async def test_it_starts_once_and_knows_whether_it_serves() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Echo)
    assert not server.is_serving()
    assert server.sockets == ()
    assert server.server_address == ("127.0.0.1", 0)
    await server.start()
    assert server.is_serving()
    assert server.server_address[1] == server.sockets[0].getsockname()[1] != 0
    with pytest.raises(RuntimeError, match="once"):
        await server.start()
    await server.shutdown()
    assert not server.is_serving()
    with pytest.raises(RuntimeError, match="once"):
        await server.start()


async def test_a_server_that_was_closed_is_not_started() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Echo)
    server.close()
    with pytest.raises(RuntimeError, match="once"):
        await server.start()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "udp://127.0.0.1:0"])
async def test_a_server_that_is_closed_while_it_starts_does_not_serve(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_resolve = asyncio.Event()
    resolve = endpoints.resolve

    async def resolve_late(endpoint: Any) -> Any:
        await may_resolve.wait()
        return await resolve(endpoint)

    monkeypatch.setattr("aioecho.net.binding.resolve", resolve_late)
    server = aioecho.serve(Echo if endpoint.startswith("tcp") else DatagramEcho, endpoint)
    starting = asyncio.create_task(server.start())
    await settle()
    server.close()
    may_resolve.set()
    with pytest.raises(RuntimeError, match="while it was starting"):
        await starting
    assert not server.is_serving()
    assert server.sockets == ()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "udp://127.0.0.1:0"])
async def test_a_server_whose_sockets_the_loop_cannot_watch_leaves_none_open(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a user watches more than fs.epoll.max_user_watches: the second of two fails."""
    resumed = []
    for kind in (Acceptor, DatagramSocket):

        def resume(self: Any, resume: Any = kind.resume) -> None:
            if resumed:
                raise OSError(errno.ENOSPC, "No space left on device")
            resumed.append(self)
            resume(self)

        monkeypatch.setattr(kind, "resume", resume)
    server = aioecho.serve(Echo if endpoint.startswith("tcp") else DatagramEcho, endpoint, endpoint)
    with pytest.raises(OSError, match="No space left"):
        await server.start()
    assert not server.is_serving()
    assert server.sockets == ()
    server.stats  # noqa: B018 - of datagrams it asks the sockets
    await server.shutdown()


async def test_close_stops_accepting_and_serves_on() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Echo) as server:
        address = server.server_address
        reader, writer = await asyncio.open_connection(*address)
        server.close()
        server.close()
        assert not server.is_serving()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*address)
        writer.write(b"still")
        assert await reader.read(10) == b"still"
        writer.close()


async def test_serve_forever_returns_when_another_task_shuts_down() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Echo)
    serving = asyncio.create_task(server.serve_forever())
    await settle(server.is_serving)
    assert await ask(server, b"x") == b"x"
    await server.shutdown()
    assert await serving is None


async def test_serve_forever_that_is_cancelled_shuts_down() -> None:
    server = aioecho.TCPServer(("127.0.0.1", 0), Echo)
    serving = asyncio.create_task(server.serve_forever())
    await settle(server.is_serving)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert not server.is_serving()
