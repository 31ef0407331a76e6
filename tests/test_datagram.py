"""Datagram servers over real sockets: a handler for each datagram, limits, replies, and what a stop does."""

import asyncio
import contextlib
import contextvars
import errno
import functools
import gc
import logging
import os
import resource
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from conftest import check_identity, settle
from helpers import ON_ONE_LOOP, needs_ipv6

import aioecho
from aioecho.client import open_connection
from aioecho.echo import DATAGRAM_HANDLERS, SMALL_SERVICES, DatagramDiscard, DatagramEcho, DatagramUpper, Echo
from aioecho.framing import Framing, LengthPrefixed, Lines, Netstrings
from aioecho.net.pktinfo import IP_PKTINFO


class Peer:
    """A datagram socket whose other end may be anywhere."""

    def __init__(self, family: int = socket.AF_INET, address: Any = None) -> None:
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        if address is not None:
            self.sock.bind(address)

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.sock.close()

    def send(self, data: bytes, to: Any) -> None:
        self.sock.sendto(data, to)

    async def receive(self) -> tuple[bytes, Any]:
        """Return the next datagram and where it came from."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            while True:
                try:
                    return self.sock.recvfrom(2**17)
                except BlockingIOError:
                    readable = asyncio.Event()
                    loop.add_reader(self.sock.fileno(), readable.set)
                    try:
                        await readable.wait()
                    finally:
                        loop.remove_reader(self.sock.fileno())

    async def ask(self, data: bytes, to: Any) -> bytes:
        self.send(data, to)
        return (await self.receive())[0]


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer(address=("127.0.0.1", 0)) as peer:
        yield peer


class Session(aioecho.DatagramSessionHandler):
    async def handle(self) -> None:
        async for data in self.datagrams:
            await self.reply(data)


def handler(handle: Callable[[Any], Any], **methods: Any) -> type[aioecho.DatagramRequestHandler]:
    return type("Handler", (aioecho.DatagramRequestHandler,), {"handle": handle, **methods})


def check(server: aioecho.DatagramServer) -> None:
    """Both identities hold."""
    check_identity(server)
    stats = server.stats
    assert stats.received == stats.handled + stats.queued + sum(stats.drops.values())


@contextlib.asynccontextmanager
async def serving(handler_class: Any, **options: Any) -> AsyncIterator[tuple[aioecho.UDPServer, Any]]:
    """Serve on a UDP port, check the counts at the end, and that nothing is left."""
    async with aioecho.UDPServer(("127.0.0.1", 0), handler_class, **options) as server:
        yield server, server.server_address
        check(server)
    check(server)
    assert not server.connections
    assert server.stats.queued == 0


def blocked(gate: asyncio.Event) -> type[aioecho.DatagramRequestHandler]:
    """Return a handler that echoes when the gate is open."""

    async def handle(self: Any) -> None:
        await gate.wait()
        await self.reply(self.data)

    return handler(handle)


# The handler's life


async def test_a_datagram_comes_back_in_upper_case(peer: Peer) -> None:
    async with serving(DatagramUpper) as (server, address):
        peer.send(b"Hello, Server!\n", address)
        assert await peer.receive() == (b"HELLO, SERVER!\n", address)
        assert (server.stats.received, server.stats.handled, server.stats.completed) == (1, 1, 1)
        assert server.stats.reasons == {"finished": 1}


async def test_a_handler_has_what_socketservers_has_and_its_methods_are_called_in_order(peer: Peer) -> None:
    calls: list[Any] = []

    class Full(aioecho.DatagramRequestHandler):
        async def setup(self) -> None:
            calls.append("setup")

        async def handle(self) -> None:
            data, transport = self.request
            calls.append((data == self.data, self.client_address, self.server))
            assert transport.get_extra_info("sockname") == self.server.server_address
            assert [each.handler for each in self.server.connections] == [self]
            check(self.server)
            assert self.server.stats.active == 1
            await transport.sendto(b"by the transport", self.client_address)
            await self.reply(self.data)

        async def finish(self) -> None:
            calls.append("finish")

    async with serving(Full) as (server, address):
        assert await peer.ask(b"x", address) == b"by the transport"
        assert await peer.receive() == (b"x", address)
    assert calls == ["setup", (True, peer.sock.getsockname(), server), "finish"]


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("where", ["verify_request", "__init__", "setup", "handle", "finish"])
async def test_a_method_that_raises_is_reported_and_stops_nothing(
    where: str, waits: bool, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def method(name: str) -> Any:
        async def do(self: Any) -> None:
            calls.append(name)
            if waits:
                await asyncio.sleep(0)
            if name == where:
                raise ValueError(f"in {name}")

        return do

    def fails(self: Any, *arguments: Any) -> None:
        raise ValueError(f"in {where}")

    methods = {name: method(name) for name in ("setup", "handle", "finish")}
    if where == "__init__":
        methods["__init__"] = fails
    async with serving(type("Bad", (aioecho.DatagramRequestHandler,), methods)) as (server, address):
        if where == "verify_request":
            server.verify_request = functools.partial(fails, server)
        peer.send(b"", address)
        await settle(lambda: server.stats.failed == 1)
        if where == "verify_request":
            del server.verify_request
        server.RequestHandlerClass = DatagramEcho
        assert await peer.ask(b"still here", address) == b"still here"
        assert (server.stats.failed, server.stats.completed) == (1, 1)
        assert server.stats.reasons == {"error": 1, "finished": 1}
    expected = {"verify_request": [], "__init__": [], "setup": ["setup"]}.get(where, ["setup", "handle", "finish"])
    assert calls == expected
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == f"in {where}"


class Metrics(aioecho.DatagramRequestHandler):
    """As statsd: several lines in a datagram."""

    framing: Framing | None = Lines()

    async def handle(self) -> None:
        for line in self.frames:
            await self.reply(line)


async def test_a_datagram_may_hold_several_frames(peer: Peer) -> None:
    async with serving(Metrics) as (server, address):
        assert await peer.ask(b"a:1|c\nb:2|c", address) == b"a:1|c"
        assert (await peer.receive())[0] == b"b:2|c"
        peer.send(b"", address)  # holds none
        await settle(lambda: server.stats.completed == 2)


@pytest.mark.parametrize(
    ("framing", "datagram", "reason"),
    [
        (LengthPrefixed(2), b"\0\1a\0\5b", "framing"),
        (Netstrings(), b"1:a,x", "framing"),
        (Lines(max_size=3), b"a\nlong", "too long"),
    ],
)
async def test_a_datagram_that_its_framing_does_not_allow_is_its_senders_fault(
    framing: Framing, datagram: bytes, reason: str, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aioecho.datagram")
    async with serving(type("Own", (Metrics,), {"framing": framing})) as (server, address):
        assert await peer.ask(datagram, address) == b"a"  # the frame before it
        await settle(lambda: server.stats.failed == 1)
        assert server.stats.reasons == {reason: 1}
    assert [(r.levelno, r.exc_info) for r in caplog.records if r.name == "aioecho.datagram"] == [(logging.DEBUG, None)]


async def test_a_handler_of_datagrams_without_a_framing_is_told_so(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(type("Own", (Metrics,), {"framing": None})) as (server, address):
        peer.send(b"x", address)
        await settle(lambda: server.stats.failed == 1)
    assert "Own has no framing: set the class attribute, as `framing = Lines()`" in caplog.text


async def test_errors_are_logged_at_a_bounded_rate(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        raise ValueError("whatever anybody sends")

    began = asyncio.get_running_loop().time()
    async with serving(handler(handle)) as (server, address):
        for _ in range(100):
            peer.send(b"", address)
        await settle(lambda: server.stats.failed == 100)
    seconds = asyncio.get_running_loop().time() - began
    assert 1 <= len([r for r in caplog.records if r.levelno == logging.ERROR]) <= 3 + seconds


def refuse(*arguments: Any) -> Any:
    raise ValueError("whatever comes")


async def raises(self: Any) -> None:
    refuse()


async def raises_base(self: Any) -> None:
    class Odd(BaseException):
        pass

    await asyncio.sleep(0)
    raise Odd


async def replies_with_too_much(self: Any) -> None:
    await self.reply(bytes(70_000))


async def broadcasts(self: Any) -> None:
    await self.request[1].sendto(b"", ("255.255.255.255", 9))


class BlockingRaises(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        raise ValueError("whatever comes")


class SessionRaises(aioecho.DatagramSessionHandler):
    handle = raises


RAISING = handler(raises)
BAD_PEERS: dict[str, tuple[Any, bytes, dict[str, Any]]] = {
    "an error in handle()": (RAISING, b"x", {}),
    "an error in __init__()": (handler(raises, __init__=refuse), b"x", {}),
    "an error of a session": (SessionRaises, b"x", {}),
    "an error of a blocking handler": (BlockingRaises, b"x", {}),
    "no exception of Exception's": (handler(raises_base), b"x", {}),
    "an error in verify_request()": (DatagramEcho, b"x", {"verify_request": refuse}),
    "an error in handle_error()": (RAISING, b"x", {"handle_error": refuse}),
    "an error in a blocking handler's handle_error()": (BlockingRaises, b"x", {"handle_error": refuse}),
    "a reply that is too large": (handler(replies_with_too_much), b"x", {}),
    "a reply that is forbidden": (handler(broadcasts), b"x", {}),
    "too long": (DatagramEcho, b"x" * 2000, {}),
    "too long for a session": (Session, b"x" * 2000, {}),
    "too long for a blocking handler": (BlockingRaises, b"x" * 2000, {}),
    "no thread": (BlockingRaises, b"x", {"get_handler_threads": lambda: NoThreads()}),
}


class NoThreads:
    def submit(self, job: Any) -> None:
        raise RuntimeError("can't start new thread")

    def withdraw(self, job: Any) -> bool:
        return True


@pytest.mark.parametrize("kind", list(BAD_PEERS))
async def test_no_peer_makes_more_than_two_records_a_second(
    kind: str, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    handler_class, data, hooks = BAD_PEERS[kind]
    began = time.monotonic()
    async with serving(handler_class, limits=aioecho.Limits(max_datagram=1000)) as (server, address):
        for name, hook in hooks.items():
            setattr(server, name, hook)
        for number in range(1, 401):
            peer.send(data, address)
            if number % 20 == 0:
                await settle(lambda: server.stats.received == number)  # noqa: B023
        await settle(lambda: not server.connections)
    seconds = time.monotonic() - began
    records = [r for r in caplog.records if r.levelno > logging.INFO]
    assert 1 <= len(records) <= 1 + 2 * seconds, "\n".join(r.getMessage() for r in records)


async def test_handle_error_can_be_overridden_and_may_fail_itself(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    class Server(aioecho.UDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            seen.append((request[0], client_address, sys.exception()))
            raise RuntimeError("the hook's own")

    async def handle(self: Any) -> None:
        raise LookupError

    async with Server(("127.0.0.1", 0), handler(handle)) as server:
        peer.send(b"x", server.server_address)
        await settle(lambda: seen)
        check(server)
    [(data, address, error)] = seen
    assert (data, address) == (b"x", peer.sock.getsockname())
    assert isinstance(error, LookupError)
    assert "handle_error raised, for the datagram from" in caplog.text


async def test_a_handle_that_is_no_coroutine_function_is_reported(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(handler(lambda self: self.data or None)) as (server, address):
        peer.send(b"", address)
        await settle(lambda: server.stats.failed == 1)
    assert "TypeError" in caplog.text


@pytest.mark.parametrize("is_async", [False, True])
async def test_verify_request_refuses_before_a_handler_is_made(is_async: bool, peer: Peer) -> None:
    class Server(aioecho.UDPServer):
        def verify_request(self, request: Any, client_address: Any) -> Any:
            async def verify() -> bool:
                await asyncio.sleep(0)
                return bool(request[0].startswith(b"please"))

            return verify() if is_async else request[0].startswith(b"please")

    async with Server(("127.0.0.1", 0), DatagramEcho) as server:
        peer.send(b"give me", server.server_address)
        assert await peer.ask(b"please", server.server_address) == b"please"
        await settle(lambda: server.stats.rejected == 1)
        assert server.stats.reasons == {"refused": 1, "finished": 1}
        assert server.stats.drops == {"refused": 1}
        check(server)


async def test_a_datagram_that_is_refused_after_others_were_served_is_counted_as_refused(peer: Peer) -> None:
    class Server(aioecho.UDPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return bool(request[0] != b"no")

    async with Server(("127.0.0.1", 0), DatagramEcho) as server:
        for data in (b"1", b"no", b"2", b"no", b"no", b"3"):
            peer.send(data, server.server_address)
        assert [(await peer.receive())[0] for _ in range(3)] == [b"1", b"2", b"3"]
        assert server.stats.reasons == {"finished": 3, "refused": 3}
        assert server.stats.drops == {"refused": 3}
        check(server)


async def test_any_callable_makes_handlers(peer: Peer) -> None:
    class Greeter(aioecho.DatagramRequestHandler):
        def __init__(self, *arguments: Any, greeting: bytes) -> None:
            super().__init__(*arguments)
            self.greeting = greeting

        async def handle(self) -> None:
            await self.reply(self.greeting)

    async with serving(functools.partial(Greeter, greeting=b"hi")) as (_, address):
        assert await peer.ask(b"", address) == b"hi"
    async with serving(lambda *arguments: Greeter(*arguments, greeting=b"lo")) as (_, address):
        assert await peer.ask(b"", address) == b"lo"


@pytest.mark.parametrize("size", [0, 1, 1472, 9000, 65_507])
async def test_a_datagram_of_any_size_is_whole(size: int, peer: Peer) -> None:
    data = os.urandom(size)
    async with serving(DatagramEcho) as (_, address):
        assert await peer.ask(data, address) == data


# Tasks and contexts


async def test_handlers_run_side_by_side(peer: Peer) -> None:
    gate = asyncio.Event()

    async def handle(self: Any) -> None:
        if self.data != b"go":
            await gate.wait()
        gate.set()
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for number in range(5):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.active == 5)
        peer.send(b"go", address)
        assert (await peer.receive())[0] == b"go"
        assert sorted([(await peer.receive())[0] for _ in range(5)]) == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_handler_runs_in_one_task_and_has_a_timeout_if_it_wants_one(waits: bool, peer: Peer) -> None:
    tasks: list[Any] = []

    async def handle(self: Any) -> None:
        task = asyncio.current_task()
        async with asyncio.timeout(10):
            if waits:
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.001):
                if waits:
                    await asyncio.sleep(10)
        tasks.append((task, asyncio.current_task()))
        async with asyncio.TaskGroup() as group:
            if waits:
                group.create_task(asyncio.sleep(0))
        await asyncio.wait_for(self.reply(self.data), 10)

    async with serving(handler(handle)) as (_, address):
        assert [await peer.ask(b"%d" % n, address) for n in range(3)] == [b"0", b"1", b"2"]
    assert all(before is after for before, after in tasks)
    assert len({task for task, _ in tasks}) == 3, "kept by this test, no task served twice"


@pytest.mark.parametrize("waits", [False, True])
async def test_what_a_handler_sets_in_its_context_is_its_own(waits: bool, peer: Peer) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    seen = []

    async def handle(self: Any) -> None:
        before = variable.get()
        variable.set(self.data.decode())
        if waits:
            await asyncio.sleep(0.001)
            assert await asyncio.create_task(asyncio.sleep(0, variable)) is variable
        seen.append((before, variable.get()))
        await self.reply(b"")

    token = variable.set("server's")
    async with serving(handler(handle)) as (_, address):
        for text in (b"a", b"b", b"c"):
            await peer.ask(text, address)
    variable.reset(token)
    assert seen == [("server's", "a"), ("server's", "b"), ("server's", "c")]


async def test_a_handler_that_cancels_itself_cancels_nobody_else(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        await self.reply(self.data)
        if self.data == b"at once":
            asyncio.current_task().cancel()
        elif self.data == b"twice":
            asyncio.current_task().cancel()
            asyncio.current_task().cancel()
        elif self.data == b"and waits":
            asyncio.current_task().cancel("why")
            with pytest.raises(asyncio.CancelledError, match="why"):
                await asyncio.sleep(10)
            raise asyncio.CancelledError
        elif self.data == b"raises":
            raise asyncio.CancelledError
        elif self.data == b"takes it back":
            asyncio.current_task().cancel()
            asyncio.current_task().uncancel()
        elif self.data == b"waits":
            await asyncio.sleep(0.001)

    async with serving(handler(handle)) as (server, address):
        for text in (b"at once", b"twice", b"1", b"and waits", b"2", b"raises", b"3", b"takes it back", b"waits", b"4"):
            assert await peer.ask(text, address) == text
        await settle(lambda: not server.connections)
        assert server.stats.cancelled == 2
        assert server.stats.completed == 8


# It was stepped by what came there, parked as if it were to serve another datagram, and never ended.
@pytest.mark.parametrize("outcome", ["completed", "failed", "cancelled"])
async def test_a_handler_that_waits_for_a_stream_alone_ends_as_any_other(outcome: str, peer: Peer) -> None:
    async def handle(self: Any) -> None:
        writer.write(self.data)
        await self.reply(await reader.readline())
        if outcome == "failed":
            raise ValueError("on purpose")
        if outcome == "cancelled":
            raise asyncio.CancelledError

    async with (
        aioecho.TCPServer(("127.0.0.1", 0), Echo) as behind,
        serving(handler(handle)) as (server, address),
    ):
        reader, writer = await open_connection(behind.names[0])
        for data in (b"a\n", b"b\n", b"c\n"):
            assert await peer.ask(data, address) == data
            await settle(lambda: not server.connections)
        assert getattr(server.stats, outcome) == 3
        writer.close()
        await writer.wait_closed()


async def test_a_task_that_was_kept_ends_with_its_handler(peer: Peer) -> None:
    kept: list[asyncio.Task[None]] = []
    called: list[bytes] = []

    async def handle(self: Any) -> None:
        task = asyncio.current_task()
        if self.data == b"keep":
            kept.append(task)
        elif self.data == b"callback":
            task.add_done_callback(lambda task: called.append(b"done"))
        await self.reply(self.data)

    async with serving(handler(handle)) as (_, address):
        assert await peer.ask(b"keep", address) == b"keep"
        await settle(lambda: kept[0].done())
        kept[0].cancel()  # too late, and so nobody's business
        assert await peer.ask(b"callback", address) == b"callback"
        await settle(lambda: called)
        assert await peer.ask(b"another", address) == b"another"


async def test_what_is_noted_of_a_task_is_not_met_by_the_next_handler(peer: Peer) -> None:
    notes: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        task = asyncio.current_task()
        seen.append((task.get_name() == "named", notes.get(task)))
        if self.data == b"name":
            task.set_name("named")
        elif self.data == b"note":
            notes[task] = self.data
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for data in (b"", b"name", b"", b"note", b"", b""):
            await peer.ask(data, address)
        await settle(lambda: not server.connections)
    assert seen == [(False, None)] * 6


async def test_a_value_that_is_equal_to_the_servers_is_not_met_by_the_next_handler(peer: Peer) -> None:
    class Same:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    variable = contextvars.ContextVar[Any]("variable")
    servers = Same()
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        seen.append(variable.get() is servers)
        if self.data == b"set":
            asyncio.get_running_loop().call_soon(int)  # keeps a copy of the context as it was
            variable.set(Same())
        await self.reply(self.data)

    token = variable.set(servers)
    async with serving(handler(handle)) as (_, address):
        for data in (b"", b"set", b"", b"set", b""):
            await peer.ask(data, address)
    variable.reset(token)
    assert seen == [True] * 5


async def test_handlers_that_leave_another_value_of_the_servers_variable_share_one_task(peer: Peer) -> None:
    variable = contextvars.ContextVar[Any]("variable")
    seen, tasks = [], set()

    async def handle(self: Any) -> None:
        tasks.add(id(asyncio.current_task()))
        seen.append(variable.get())
        variable.set(self)
        asyncio.get_running_loop().call_soon(lambda: seen.append(variable.get()))  # it has the handler's own
        await self.reply(self.data)

    token = variable.set("server's")
    async with serving(handler(handle)) as (_, address):
        for _ in range(10):
            await peer.ask(b"", address)
            await settle()
    variable.reset(token)
    assert len(tasks) == 1
    assert seen[::2] == ["server's"] * 10
    assert all(isinstance(value, aioecho.DatagramRequestHandler) for value in seen[1::2])


async def test_handlers_that_reset_what_they_set_share_one_task(peer: Peer) -> None:
    unset, ours = contextvars.ContextVar[Any]("unset"), contextvars.ContextVar[Any]("ours")
    seen = set()

    async def handle(self: Any) -> None:
        seen.add(id(asyncio.current_task()))
        tokens = [(variable, variable.set(object())) for variable in (unset, ours)]
        await self.reply(self.data)
        for variable, token in tokens:
            variable.reset(token)

    token = ours.set([])
    async with serving(handler(handle)) as (_, address):
        for _ in range(20):
            await peer.ask(b"", address)
    ours.reset(token)
    assert len(seen) <= 2


@pytest.mark.parametrize("waits", [False, True])
async def test_a_handlers_context_is_its_tasks_from_the_start(waits: bool, peer: Peer) -> None:
    variable = contextvars.ContextVar[Any]("variable")

    async def handle(self: Any) -> None:
        token = variable.set(self.data)
        if waits:
            await asyncio.sleep(0)
        if sys.version_info >= (3, 12):
            assert asyncio.current_task().get_context()[variable] == self.data
        variable.reset(token)  # of the same context still
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for _ in range(3):
            assert await peer.ask(b"x", address) == b"x"
        await settle(lambda: server.stats.completed == 3)


async def test_a_task_factory_that_wraps_coroutines_changes_nothing(peer: Peer) -> None:
    def factory(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> Any:
        async def wrapped() -> Any:
            return await coro

        return asyncio.Task(wrapped(), loop=loop, **options)

    async def handle(self: Any) -> None:
        if self.data != b"at once":
            await asyncio.sleep(0.001)
        await self.reply(self.data)

    loop = asyncio.get_running_loop()
    loop.set_task_factory(factory)
    try:
        async with serving(handler(handle), limits=aioecho.Limits(max_handlers=2)) as (server, address):
            for number in range(6):
                peer.send(b"%d" % number, address)
            assert sorted([(await peer.receive())[0] for _ in range(6)]) == [b"%d" % number for number in range(6)]
            for data in (b"at once", b"waits", b"at once"):
                assert await peer.ask(data, address) == data
            await settle(lambda: server.stats.completed == 9)
    finally:
        loop.set_task_factory(None)


async def test_some_that_wait_among_many_that_do_not_are_each_served_once(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        if int(self.data) % 7 == 3:
            await asyncio.sleep(0)
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for start in range(0, 300, 60):
            for number in range(start, start + 60):
                peer.send(b"%d" % number, address)
            replies = [int((await peer.receive())[0]) for _ in range(60)]
            assert sorted(replies) == list(range(start, start + 60))
            at_once = [number for number in replies if number % 7 != 3]
            assert at_once == sorted(at_once)
        await settle(lambda: server.stats.completed == 300)


def test_a_handle_error_that_ends_the_program_ends_it() -> None:
    class Server(aioecho.UDPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            raise SystemExit(f"cannot live with {request[0]!r}")

    async def handle(self: Any) -> None:
        raise ValueError

    async def main() -> None:
        async with Server(("127.0.0.1", 0), handler(handle)) as server:
            with Peer() as peer:
                peer.send(b"x", server.server_address)
                await server.serve_forever()

    for make_loop in (asyncio.SelectorEventLoop, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=make_loop) as runner, pytest.raises(SystemExit, match="cannot live with b'x'"):
            runner.run(main())


async def test_handlers_that_do_not_wait_share_one_task(peer: Peer) -> None:
    seen = set()

    async def handle(self: Any) -> None:
        seen.add(id(asyncio.current_task()))
        await self.reply(self.data)

    async with serving(handler(handle)) as (_, address):
        await peer.ask(b"", address)
        before = asyncio.all_tasks()
        for _ in range(20):
            await peer.ask(b"", address)
        assert asyncio.all_tasks() == before
    assert len(seen) <= 2


async def test_an_idle_server_that_its_loop_cancels_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import asyncio, socket, aioecho\nfrom aioecho.echo import DatagramEcho\n"
        "async def main():\n"
        "    asyncio.get_running_loop().slow_callback_duration = 60\n"  # a busy machine makes any callback slow
        "    server = aioecho.UDPServer(('127.0.0.1', 0), DatagramEcho)\n"
        "    await server.start()\n"
        "    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:\n"
        "        sock.connect(server.server_address); sock.send(b'x'); sock.setblocking(False)\n"
        "        assert await asyncio.get_running_loop().sock_recv(sock, 9) == b'x'\n"
        "        await asyncio.sleep(0)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::ResourceWarning", "-c", program]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


async def test_a_handler_leaves_no_reference_cycle(peer: Peer) -> None:
    class Marked(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            if self.data:
                await asyncio.sleep(0)
            await self.reply(b"")

    async with serving(Marked) as (server, address):
        await peer.ask(b"", address)
        gc.collect()
        gc.disable()
        try:
            for data in (b"", b"x", b"", b"x"):
                await peer.ask(data, address)
            await settle(lambda: not server.connections)
            await settle()
            assert not [each for each in gc.get_objects() if isinstance(each, Marked)]
        finally:
            gc.enable()


async def test_whatever_a_class_does_when_a_handler_is_made_is_done_for_each(peer: Peer) -> None:
    made: list[str] = []

    class Plain(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            assert (self.request[0], self.server) == (self.data, server)
            assert self.client_address == peer.sock.getsockname()
            await self.reply(self.data)

    class WithInit(Plain):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append("__init__")

    class WithNew(Plain):
        def __new__(cls, *arguments: Any) -> Any:
            made.append("__new__")
            return super().__new__(cls)

    class WithSetattr(Plain):
        def __setattr__(self, name: str, value: Any) -> None:
            made.append(f"__setattr__ {name}")
            super().__setattr__(name, value)

    class WithProperty(Plain):
        @property
        def data(self) -> Any:
            return self.__dict__["data"]

        @data.setter
        def data(self, value: Any) -> None:
            made.append("property")
            self.__dict__["data"] = value

    class Meta(type(Plain)):  # type: ignore[misc]
        def __call__(cls, *arguments: Any) -> Any:
            made.append("metaclass")
            return super().__call__(*arguments)

    class WithMeta(Plain, metaclass=Meta):
        pass

    names = [f"__setattr__ {name}" for name in ("request", "client_address", "server", "data")]
    expected: dict[Any, list[str]] = {Plain: [], WithInit: ["__init__"], WithNew: ["__new__"], WithSetattr: names}
    expected |= {WithProperty: ["property"], WithMeta: ["metaclass"]}
    async with serving(Plain) as (server, address):
        for kind, does in expected.items():
            server.RequestHandlerClass = kind
            made.clear()
            for _ in range(3):
                assert await peer.ask(b"x", address) == b"x"
            assert made == does * 3


async def test_the_counts_are_right_whenever_a_handler_looks(peer: Peer) -> None:
    looked: list[int] = []

    async def handle(self: Any) -> None:
        if self.data == b"look":
            assert [each.handler for each in self.server.connections] == [self]
            stats = self.server.stats
            assert (stats.active, stats.completed) == (1, stats.received - 1)
            check(self.server)
            looked.append(stats.received)
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for _ in range(3):
            for data in (b"", b"", b"look"):
                peer.send(data, address)
            for _ in range(3):
                await peer.receive()
            assert server.stats.completed == server.stats.received
    assert looked == [3, 6, 9]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_handler_that_shuts_its_server_down_does_not_wait_for_itself(waits: bool, peer: Peer) -> None:
    async def handle(self: Any) -> None:
        if waits:
            await asyncio.sleep(0)
        report = await self.server.shutdown(20)
        assert (report.completed, report.cancelled) == (0, 0)
        await self.reply(b"good bye")

    async with serving(handler(handle)) as (server, address):
        assert await peer.ask(b"quit", address) == b"good bye"
        report = await server.shutdown()
        assert (server.stats.completed, report.cancelled) == (1, 0)
        assert report.seconds < 5


async def test_reading_the_counts_and_the_connections_changes_nothing(peer: Peer) -> None:
    read: list[aioecho.DatagramStats] = []

    async def handle(self: Any) -> None:
        if self.data == b"look":
            first = self.server.stats
            assert self.server.connections == self.server.connections
            assert self.server.stats == first
            read.append(first)
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for _ in range(2):
            assert await peer.ask(b"look", address) == b"look"
            assert server.stats.completed == len(read)
    assert [(stats.active, stats.completed) for stats in read] == [(1, 0), (1, 1)]


@pytest.mark.parametrize("where", ["verify_request", "handle"])
async def test_what_is_read_in_the_midst_of_another_datagrams_handler_is_served_after_it(
    where: str, peer: Peer
) -> None:
    served: list[bytes] = []

    class Server(aioecho.UDPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            if where == "verify_request" and request[0] == b"close":
                self.close()
            return True

    class Handler(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            if where == "handle" and self.data == b"close":
                self.server.close()
            served.append(self.data)
            await self.reply(self.data)

    async with Server(("127.0.0.1", 0), Handler) as server:
        address = server.server_address
        for data in (b"1", b"2"):
            assert await peer.ask(data, address) == data
        for data in (b"3", b"close", b"4", b"5"):
            peer.send(data, address)
        for _ in range(4):
            await peer.receive()
        await settle(lambda: not server.connections)
        check(server)
    assert served == [b"1", b"2", b"3", b"close", b"4", b"5"]


async def test_no_task_is_current_after_datagrams_were_served(peer: Peer) -> None:
    loop = asyncio.get_running_loop()
    async with serving(DatagramEcho) as (server, address):
        for _ in range(3):
            current: asyncio.Future[Any] = loop.create_future()
            before = server.stats.completed
            for _ in range(3):
                peer.send(b"x", address)
            for _ in range(3):
                await peer.receive()
            loop.call_soon(lambda current=current: current.set_result(asyncio.current_task()))
            assert await current is None
            assert server.stats.completed == before + 3


# Limits


async def test_what_does_not_fit_is_dropped_and_counted(peer: Peer) -> None:
    gate = asyncio.Event()
    limits = aioecho.Limits(max_handlers=2, max_queue=3)
    async with serving(blocked(gate), limits=limits) as (server, address):
        for number in range(10):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.received == 10)
        check(server)
        assert (server.stats.active, server.stats.queued) == (2, 3)
        assert server.stats.drops == {"queue full": 5}
        gate.set()
        assert [(await peer.receive())[0] for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        await settle(lambda: not server.connections)
        assert server.stats.handled == 5


async def test_a_queue_of_handlers_that_do_not_wait_is_served_to_its_end(peer: Peer) -> None:
    gate = asyncio.Event()

    async def handle(self: Any) -> None:
        if self.data == b"slow":
            await gate.wait()

    async with serving(handler(handle), limits=aioecho.Limits(max_handlers=1, max_queue=200)) as (server, address):
        peer.send(b"slow", address)
        for _ in range(150):
            peer.send(b"", address)
        await settle(lambda: server.stats.queued == 150)
        gate.set()
        await settle(lambda: server.stats.completed == 151)


async def test_a_datagram_that_is_too_long_is_dropped_and_counted(peer: Peer) -> None:
    async with serving(DatagramEcho, limits=aioecho.Limits(max_datagram=100)) as (server, address):
        peer.send(b"x" * 101, address)
        peer.send(b"x" * 65_000, address)
        assert await peer.ask(b"y" * 100, address) == b"y" * 100
        assert server.stats.drops == {"truncated": 2}


async def test_the_first_datagram_that_is_too_long_is_told_of(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    for handler_class in (DatagramEcho, Session):
        caplog.clear()
        async with serving(handler_class, limits=aioecho.Limits(max_datagram=100)) as (server, address):
            for _ in range(100):
                peer.send(b"x" * 101, address)
            await settle(lambda: server.stats.drops == {"truncated": 100})
        host, port = peer.sock.getsockname()
        assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == [
            f"dropped a datagram from {host}:{port} that is longer than Limits.max_datagram, 100 bytes; others are only counted"
        ]


async def test_a_receive_buffer_that_the_system_cuts_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    most = int(Path("/proc/sys/net/core/rmem_max").read_text())
    async with aioecho.serve(DatagramEcho, "udp://*:0", limits=aioecho.Limits(receive_buffer=2**31 - 1)) as server:
        server.limits = aioecho.Limits(receive_buffer=2**31 - 1, max_handlers=7)
        server.limits = aioecho.Limits(receive_buffer=most)
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == [
        f"receive_buffer is {most} bytes, as the system allows no more (net.core.rmem_max), not {2**31 - 1}"
    ]


async def test_max_connections_holds_for_handlers_of_datagrams(peer: Peer) -> None:
    gate = asyncio.Event()
    async with serving(blocked(gate), limits=aioecho.Limits(max_connections=2, max_queue=3)) as (server, address):
        for number in range(10):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.received == 10)
        assert (server.stats.active, server.stats.queued) == (2, 3)
        assert server.stats.drops == {"queue full": 5}
        gate.set()
        await settle(lambda: server.stats.completed == 5)


async def test_max_per_host_holds_for_handlers_of_datagrams(peer: Peer) -> None:
    gate = asyncio.Event()

    async def handle(self: Any) -> None:
        if self.data != b"quick":
            await gate.wait()
        await self.reply(self.data)

    with Peer(address=("127.0.0.2", 0)) as other, Peer(address=("127.0.0.2", 0)) as same:
        async with serving(handler(handle)) as (server, address):
            assert await peer.ask(b"quick", address) == b"quick"
            server.limits = aioecho.Limits(max_per_host=3, max_handlers=4)  # set while there is a spare task
            for number in range(5):
                other.send(b"%d" % number, address)
            await settle(lambda: server.stats.received == 6)
            assert await peer.ask(b"quick", address) == b"quick"
            for number in range(4):
                peer.send(b"%d" % number, address)
            same.send(b"x", address)
            await settle(lambda: server.stats.received == 12)
            # The peer has one handler, and two that wait in the queue.
            assert (server.stats.active, server.stats.queued) == (4, 2)
            assert server.stats.drops == {"per host": 4}
            check(server)
            gate.set()
            await settle(lambda: not server.connections)
            for _ in range(10):
                assert await same.ask(b"quick", address) == b"quick"
            assert server.stats.drops == {"per host": 4}


async def test_max_per_host_holds_for_blocking_handlers_of_datagrams(peer: Peer) -> None:
    gate = threading.Event()

    class Blocking(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            gate.wait(30)
            self.request[1].sendto(self.request[0], self.client_address)

    with Peer(address=("127.0.0.2", 0)) as other:
        async with serving(Blocking, limits=aioecho.Limits(max_per_host=2)) as (server, address):
            for number in range(5):
                peer.send(b"%d" % number, address)
            other.send(b"x", address)
            await settle(lambda: server.stats.received == 6)
            assert server.stats.drops == {"per host": 3}
            gate.set()
            await settle(lambda: server.stats.completed == 3)
            assert await peer.ask(b"again", address) in (b"0", b"1")


def test_a_rate_that_no_handler_can_have_is_refused(tmp_path: Path) -> None:
    limits = aioecho.Limits(accept_rate=10)
    message = (
        r"^accept_rate is for connections and for sessions, and this server has a handler for each datagram: leave it"
    )
    with pytest.raises(ValueError, match=message):
        aioecho.UDPServer(("127.0.0.1", 0), DatagramEcho, limits=limits)
    with pytest.raises(ValueError, match=message):
        aioecho.serve({DatagramEcho: "udp://127.0.0.1:0", DatagramUpper: "udp://127.0.0.1:0"}, limits=limits)
    with pytest.raises(ValueError, match=message):
        aioecho.run(DatagramEcho, "udp://127.0.0.1:0", limits=limits)
    server = aioecho.UDPServer(("127.0.0.1", 0), DatagramEcho)
    with pytest.raises(ValueError, match=message):
        server.limits = limits
    assert server.limits == aioecho.Limits()
    # One that can is enough.
    aioecho.serve({Echo: "tcp://127.0.0.1:0", DatagramUpper: "udp://127.0.0.1:0"}, limits=limits).limits = limits
    aioecho.serve({Session: "udp://127.0.0.1:0", DatagramUpper: "udp://127.0.0.1:0"}, limits=limits).limits = limits
    aioecho.UDPServer(("127.0.0.1", 0), Session, limits=limits).limits = limits


# Timeouts.datagram_handler


@pytest.mark.parametrize("of", ["server", "class"])
@pytest.mark.parametrize("where", ["verify_request", "setup", "handle"])
async def test_a_handler_that_takes_too_long_is_cancelled(
    where: str, of: str, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    timeouts = aioecho.Timeouts(datagram_handler=0.2)
    calls = []

    async def waits(self: Any, *arguments: Any) -> bool:
        if self is server or self.data == b"slow":
            await asyncio.sleep(100)
        return True

    async def handle(self: Any) -> None:
        await self.reply(self.data)

    async def finish(self: Any) -> None:
        calls.append(self.data)

    methods: dict[str, Any] = {"handle": handle, "finish": finish}
    if where != "verify_request":
        methods[where] = waits
    if of == "class":
        methods["timeouts"] = timeouts
    options = {"timeouts": timeouts} if of == "server" else {}
    async with serving(type("Slow", (aioecho.DatagramRequestHandler,), methods), **options) as (server, address):
        if where == "verify_request":
            server.verify_request = functools.partial(waits, server)
        began = time.monotonic()
        for _ in range(20):
            peer.send(b"slow", address)
        await settle(lambda: server.stats.reasons["datagram_handler"] == 20)
        assert time.monotonic() - began >= 0.2
        assert server.stats.cancelled == 20
        assert calls == ([b"slow"] * 20 if where == "handle" else [])
    messages = [r.getMessage() for r in caplog.records if r.levelno > logging.INFO]
    assert len(messages) == 1
    assert messages[0].startswith(f"cancelled <DatagramTask with 127.0.0.1:{peer.sock.getsockname()[1]}, handler=")
    assert messages[0].endswith(">: it took longer than Timeouts.datagram_handler, 0.2 s")


async def test_a_handler_that_swallows_the_end_of_its_time_is_ended(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioecho.datagrams.run.SWALLOWED_FOR", 0.05)

    async def handle(self: Any) -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)

    async with serving(handler(handle), timeouts=aioecho.Timeouts(datagram_handler=0.1)) as (server, address):
        peer.send(b"", address)
        await settle(lambda: server.stats.reasons["datagram_handler"] == 1)
        await settle(lambda: not server.connections)


async def test_the_time_of_a_handler_can_be_changed_while_it_runs(peer: Peer) -> None:
    gate = asyncio.Event()
    async with serving(blocked(gate), timeouts=aioecho.Timeouts(datagram_handler=None)) as (server, address):
        peer.send(b"", address)
        await settle(lambda: server.stats.active == 1)
        server.timeouts = aioecho.Timeouts(datagram_handler=0.05)  # also for the one that runs
        peer.send(b"", address)
        await settle(lambda: server.stats.reasons["datagram_handler"] == 2)
        peer.send(b"", address)
        await settle(lambda: server.stats.active == 1)
        server.timeouts = aioecho.Timeouts(datagram_handler=None)
        gate.set()
        await settle(lambda: server.stats.active == 0)


async def test_limits_can_be_changed_at_any_time(peer: Peer) -> None:
    gate = asyncio.Event()
    async with serving(blocked(gate), limits=aioecho.Limits(max_handlers=1, max_queue=2)) as (server, address):
        for number in range(4):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.received == 4)
        assert (server.stats.active, server.stats.queued) == (1, 2)
        # Nobody has ended, and yet there is room.
        server.limits = aioecho.Limits(max_handlers=4, max_queue=2, receive_buffer=50_000, max_datagram=2)
        await settle(lambda: server.stats.active == 3)
        assert server.stats.queued == 0
        assert server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) in (50_000, 100_000)
        peer.send(b"long", address)
        await settle(lambda: server.stats.received == 5)
        assert server.stats.drops == {"queue full": 1, "truncated": 1}
        server.limits = aioecho.Limits(max_datagram=4)
        peer.send(b"long", address)
        await settle(lambda: server.stats.active == 4)
        gate.set()
        assert {(await peer.receive())[0] for _ in range(4)} == {b"0", b"1", b"2", b"long"}


async def test_a_longer_datagram_that_is_read_as_the_limit_grows_is_whole_or_dropped(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        if self.data == b"grow":
            self.server.limits = aioecho.Limits(max_datagram=100)
        await self.reply(self.data)

    async with serving(handler(handle), limits=aioecho.Limits(max_datagram=4)) as (server, address):
        for data in (b"1", b"2", b"3", b"grow", b"x" * 50, b"4"):
            peer.send(data, address)
        replies = []
        while not replies or replies[-1] != b"4":
            replies.append((await peer.receive())[0])
        assert replies in ([b"1", b"2", b"3", b"grow", b"4"], [b"1", b"2", b"3", b"grow", b"x" * 50, b"4"])
        assert server.stats.drops["truncated"] == 6 - len(replies)
        assert await peer.ask(b"x" * 50, address) == b"x" * 50


async def test_datagrams_that_come_alone_cost_few_reads_in_vain(peer: Peer) -> None:
    class Counting(socket.socket):
        in_vain = 0

        def recvfrom(self, *arguments: Any) -> Any:
            try:
                return super().recvfrom(*arguments)
            except BlockingIOError:
                self.in_vain += 1
                raise

    sock = Counting(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    async with aioecho.DatagramServer(None, DatagramEcho, sock=sock) as server:
        for _ in range(200):
            await peer.ask(b"x", server.server_address)
        assert sock.in_vain <= 20
        for _ in range(40):  # and then many at once are still found
            for _ in range(20):
                peer.send(b"x", server.server_address)
            for _ in range(20):
                await peer.receive()
        assert server.stats.completed == 1000
        assert sock.in_vain <= 110


async def test_what_the_kernel_drops_is_counted_to_the_datagram(peer: Peer) -> None:
    async with serving(DatagramDiscard, limits=aioecho.Limits(receive_buffer=4096)) as (server, address):
        assert server.sockets[0].getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 4096
        for _ in range(1000):  # the server can't read meanwhile
            peer.send(b"x" * 100, address)
        await settle(lambda: server.stats.received + server.stats.kernel_drops == 1000)
        assert server.stats.kernel_drops > 900
    assert server.stats.received + server.stats.kernel_drops == 1000


@pytest.mark.slow
@pytest.mark.parametrize("sent", [30_000, pytest.param(100_000, marks=pytest.mark.soak)])
async def test_a_burst_at_a_slow_handler_is_bounded_and_accounted_for(peer: Peer, sent: int) -> None:
    handled = 0

    async def handle(self: Any) -> None:
        nonlocal handled
        await asyncio.sleep(0.01)
        handled += 1

    limits = aioecho.Limits(max_handlers=100, max_queue=500)
    most = 0
    async with serving(handler(handle), limits=limits) as (server, address):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(sent):
            peer.send(b"x" * 1000, address)
            if number % 200 == 0:
                await asyncio.sleep(0)
                most = max(most, server.stats.active + server.stats.queued)
        await settle(lambda: server.stats.received + server.stats.kernel_drops == sent)
        await settle(lambda: not server.connections)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert most <= 600
    assert handled == server.stats.handled
    assert sent == handled + server.stats.drops["queue full"] + server.stats.kernel_drops
    assert server.stats.drops["queue full"] > 0
    assert grown < 20_000, f"{grown} KiB for 600 datagrams of 1 KiB"


# Replies


async def test_a_reply_that_is_too_large_is_the_handlers_fault(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        try:
            self.reply(bytes(70_000))
        except OSError as error:
            await self.reply(errno.errorcode[error.errno].encode())
            raise

    async with serving(handler(handle)) as (server, address):
        assert await peer.ask(b"", address) == b"EMSGSIZE"
        await settle(lambda: server.stats.failed == 1)


async def test_a_peer_that_is_gone_or_nowhere_stops_nothing(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        await self.request[1].sendto(b"", ("127.0.0.1", 0))
        await self.request[1].sendto(b"", ("255.255.255.255", 9))
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for _ in range(3):
            with Peer(address=("127.0.0.1", 0)) as gone:
                gone.send(b"nobody reads the reply", address)
        await settle(lambda: server.stats.completed == 3)  # and each reply has brought "port unreachable"
        assert await peer.ask(b"still here", address) == b"still here"
        assert server.stats.send_errors == 8
        assert server.stats.failed == 0
    # The broadcast, which is a mistake of the handler's: once, however often.
    [message] = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert message == (
        f"the system forbids to send to 255.255.255.255:9 from {server.names[0]}: Permission denied (it is a broadcast address:"
        " add ?broadcast to the endpoint)"
    )


async def test_what_a_unix_peer_does_to_its_socket_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with aioecho.UnixDatagramServer(tmp_path / "server", DatagramEcho) as server:
        to = os.fspath(tmp_path / "server")
        with Peer(socket.AF_UNIX, str(tmp_path / "other")), Peer(socket.AF_UNIX, str(tmp_path / "peer")) as peer:
            peer.sock.connect(str(tmp_path / "other"))  # so that the server may not send to it
            peer.send(b"x", to)
            await settle(lambda: server.stats.send_errors == 1)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def test_an_icmp_error_that_waits_in_a_connected_socket_is_counted(peer: Peer) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    sock.connect(peer.sock.getsockname())
    async with aioecho.DatagramServer(None, DatagramEcho, sock=sock) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            nobody = free.getsockname()
        sock.connect(nobody)
        sock.send(b"")
        await settle(lambda: server.stats.receive_errors == 1)
        sock.connect(peer.sock.getsockname())
        assert await peer.ask(b"still here", sock.getsockname()) == b"still here"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "127.99.3.4", pytest.param("::1", marks=needs_ipv6)])
async def test_a_server_on_every_address_replies_from_the_one_that_was_asked(host: str) -> None:
    async with aioecho.serve(DatagramEcho, "udp://*:0") as server:
        [name] = server.names
        assert len(server.sockets) == 1 + socket.has_dualstack_ipv6()
        port = server.server_address[1]
        assert name == f"udp://*:{port}"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with Peer(family) as client:
            for _ in range(2):
                client.send(b"x", (host, port))
                data, address = await client.receive()
                assert (data, address[:2]) == (b"x", (host, port))
        check(server)


def dual_stack(kind: int, host: str = "::") -> socket.socket:
    """Return a bound socket for IPv4 and IPv6."""
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, 0))
    return sock


@needs_ipv6
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
async def test_a_socket_for_both_families_replies_from_the_address_that_was_asked(host: str) -> None:
    names = []

    async def handle(self: Any) -> None:
        names.append(self.client_address[0])
        await self.reply(self.data)

    sock = dual_stack(socket.SOCK_DGRAM)
    async with aioecho.serve(handler(handle), sock=sock) as server:
        port = sock.getsockname()[1]
        with Peer(socket.AF_INET6 if ":" in host else socket.AF_INET) as client:
            client.send(b"x", (host, port))
            data, address = await client.receive()
            assert (data, address[:2]) == (b"x", (host, port))
        check(server)
    assert names == ["::1" if host == "::1" else "127.0.0.1" if host != "127.0.0.2" else names[0]]


@needs_ipv6
@pytest.mark.parametrize("bound_to", ["::", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("blocks", [False, True])
async def test_an_ipv4_client_of_a_socket_for_both_families_has_its_ipv4_address(
    blocks: bool, bound_to: str, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aioecho")
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        _, transport = self.request
        seen.extend([self.client_address, transport.local_address[0]])
        await transport.sendto(b"to the address", self.client_address)
        await self.reply(self.data)
        raise ValueError("so that the address is logged")

    class Blocking(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            seen.extend([self.client_address, "127.0.0.1"])
            sock.sendto(b"to the address", self.client_address)
            sock.sendto(data, self.client_address)
            raise ValueError("so that the address is logged")

    sock = dual_stack(socket.SOCK_DGRAM, bound_to)
    async with aioecho.serve(Blocking if blocks else handler(handle), sock=sock) as server:
        address = ("127.0.0.1", sock.getsockname()[1])
        assert await peer.ask(b"x", address) == b"to the address"
        assert (await peer.receive())[0] == b"x"
        await settle(lambda: server.stats.failed == 1)
    assert seen[0] == peer.sock.getsockname()
    assert seen[1] == "127.0.0.1"
    assert f"a datagram from 127.0.0.1:{peer.sock.getsockname()[1]}" in caplog.text
    assert "::ffff:" not in caplog.text.replace(f"udp://[{bound_to}]", "")


@needs_ipv6
async def test_an_ipv4_client_of_a_stream_socket_for_both_families_is_limited_by_its_ipv4_address(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "aioecho")
    seen: list[Any] = []

    class Address(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            seen.append(self.client_address)
            await self.reader.read()

    sock = dual_stack(socket.SOCK_STREAM)
    async with aioecho.serve(Address, sock=sock, limits=aioecho.Limits(max_per_host=1)) as server:
        port = sock.getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        mine = writer.get_extra_info("sockname")
        _, other = await asyncio.open_connection("127.0.0.1", port)
        await settle(lambda: server.stats.reasons["per host"] == 1)
        _, third = await asyncio.open_connection("::1", port)
        await settle(lambda: len(seen) == 2)
        for each in (writer, other, third):
            each.close()
        await settle(lambda: not server.connections)
    assert seen[0] == mine
    assert seen[1][0] == "::1"
    assert f"connection from 127.0.0.1:{mine[1]}: completed" in caplog.text
    assert "::ffff:" not in caplog.text


async def test_more_addresses_than_are_kept_are_all_replied_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioecho.net.datagram_socket.ADDRESSES_KEPT", 4)
    async with aioecho.serve(DatagramEcho, "udp://0.0.0.0:0") as server:
        port = server.server_address[1]
        with Peer() as client:
            for number in range(1, 20):
                client.send(b"x", (f"127.0.1.{number}", port))
                assert await client.receive() == (b"x", (f"127.0.1.{number}", port))


# Unix sockets, where a peer's queue can be full


def fill(path: str) -> int:
    """Send to a Unix socket until its queue is full; return how many that took."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        for number in range(10_000):
            try:
                sock.sendto(b"", path)
            except BlockingIOError:
                return number
    raise AssertionError("it is never full")


async def test_unix_datagrams_come_back(tmp_path: Path) -> None:
    for address in (
        tmp_path / "server",
        str(tmp_path / "server"),
        f"unixgram:{tmp_path}/server",
        f"\0aioecho-{os.getpid()}",
    ):
        async with aioecho.UnixDatagramServer(address, DatagramUpper) as server:
            with Peer(socket.AF_UNIX, str(tmp_path / "client")) as client:
                assert await client.ask(b"hello", server.server_address) == b"HELLO"
            os.unlink(tmp_path / "client")
            check(server)
        assert not (tmp_path / "server").exists()


async def test_who_has_no_name_gets_no_reply_and_stops_nothing(tmp_path: Path) -> None:
    async with aioecho.UnixDatagramServer(tmp_path / "server", DatagramEcho) as server:
        with Peer(socket.AF_UNIX) as nameless:
            nameless.send(b"x", str(tmp_path / "server"))
            await settle(lambda: server.stats.completed == 1)
        assert server.stats.send_errors == 1


async def test_a_reply_that_is_awaited_waits_for_room(tmp_path: Path) -> None:
    async with aioecho.UnixDatagramServer(
        tmp_path / "server", DatagramEcho, timeouts=aioecho.Timeouts(send=None)
    ) as server:
        with Peer(socket.AF_UNIX, str(tmp_path / "client")) as client:
            queued = fill(str(tmp_path / "client"))
            for number in range(3):
                client.send(b"%d" % number, str(tmp_path / "server"))
            await settle(lambda: server.stats.active == 3)
            replies = [(await client.receive())[0] for _ in range(queued + 3)]
            assert sorted(replies[queued:]) == [b"0", b"1", b"2"]
            await settle(lambda: server.stats.completed == 3)
        assert server.stats.send_drops == 0


async def test_a_reply_that_is_not_awaited_is_dropped_and_counted(tmp_path: Path) -> None:
    async def handle(self: Any) -> None:
        self.reply(b"lost")

    async with aioecho.UnixDatagramServer(tmp_path / "server", handler(handle)) as server:
        with Peer(socket.AF_UNIX, str(tmp_path / "client")) as client:
            queued = fill(str(tmp_path / "client"))
            client.send(b"", str(tmp_path / "server"))
            await settle(lambda: server.stats.completed == 1)
            assert server.stats.send_drops == 1
            assert [(await client.receive())[0] for _ in range(queued)] == [b""] * queued


@pytest.mark.parametrize("whose", ["server", "handler"])
async def test_a_peer_that_never_reads_is_given_up(whose: str, tmp_path: Path) -> None:
    class Hasty(DatagramEcho):
        timeouts = aioecho.Timeouts(send=0.05) if whose == "handler" else None

    async with aioecho.UnixDatagramServer(
        tmp_path / "server", Hasty, timeouts=aioecho.Timeouts(send=0.05 if whose == "server" else 30)
    ) as server:
        with Peer(socket.AF_UNIX, str(tmp_path / "client")) as client:
            fill(str(tmp_path / "client"))
            client.send(b"", str(tmp_path / "server"))
            await settle(lambda: server.stats.send_drops == 1)
            await settle(lambda: server.stats.completed == 1)
            check(server)


async def test_peers_that_never_read_do_not_keep_others_from_their_replies(tmp_path: Path) -> None:
    """Their unread datagrams are charged to the server's socket, until that is full too."""

    async def handle(self: Any) -> None:
        self.reply(bytes(40_000))

    with contextlib.ExitStack() as stack:
        async with aioecho.UnixDatagramServer(
            tmp_path / "server", handler(handle), timeouts=aioecho.Timeouts(send=5)
        ) as server:
            lazy = [stack.enter_context(Peer(socket.AF_UNIX, str(tmp_path / f"lazy{n}"))) for n in range(3)]
            for turn in range(1, 6):
                for each in lazy:
                    each.send(b"", str(tmp_path / "server"))
                await settle(lambda turn=turn: server.stats.completed == 3 * turn)
            assert server.stats.send_drops > 0, "the socket is full"
            server.RequestHandlerClass = DatagramEcho
            client = stack.enter_context(Peer(socket.AF_UNIX, str(tmp_path / "client")))
            client.send(b"wait", str(tmp_path / "server"))
            await settle(lambda: server.stats.active == 1)
            for each in lazy:
                with contextlib.suppress(BlockingIOError):
                    while True:
                        each.sock.recv(2**17)
            assert (await client.receive())[0] == b"wait"


async def test_a_full_udp_socket_is_waited_for_or_not(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loopback interface a UDP socket is never full, so this one says that it is."""

    class Full(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            transport = self.request[1]
            real = transport.send_now

            def send(data: Any, address: Any) -> Any:
                nonlocal refusals
                if refusals:
                    refusals -= 1
                    raise BlockingIOError
                return real(data, address)

            transport.send_now = send
            try:
                refusals = 3
                self.reply(b"dropped")
                refusals = 3
                await self.reply(b"waited for")
                refusals = 1
                await asyncio.gather(self.reply(b"1"), self.reply(b"2"))
            finally:
                transport.send_now = real

    async with serving(Full) as (server, address):
        assert await peer.ask(b"", address) == b"waited for"
        assert {(await peer.receive())[0] for _ in range(2)} == {b"1", b"2"}
        await settle(lambda: server.stats.completed == 1)
        assert server.stats.send_drops == 1


# Pausing


async def test_a_server_that_is_paused_leaves_datagrams_to_the_kernel(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        if self.data == b"pause":
            self.server.pause()
        await self.reply(self.data)

    server = aioecho.UDPServer(("127.0.0.1", 0), handler(handle))
    server.pause()
    async with server:
        address = server.server_address
        for data in (b"1", b"pause", b"2", b"3"):
            peer.send(data, address)
        await settle()
        assert server.stats.received == 0
        server.resume()
        assert [(await peer.receive())[0] for _ in range(2)] == [b"1", b"pause"]
        await settle()
        assert server.stats.received == 2
        server.limits = aioecho.Limits(max_handlers=7)
        await settle()
        assert server.stats.received == 2
        server.resume()
        assert [(await peer.receive())[0] for _ in range(2)] == [b"2", b"3"]
        peer.send(b"pause", address)
        peer.send(b"4", address)
        assert (await peer.receive())[0] == b"pause"
        await server.shutdown(10)
        assert (await peer.receive())[0] == b"4"
        check(server)


@pytest.mark.parametrize("error", [OSError(errno.ENOMEM, "no memory"), MemoryError()], ids=["system", "Python"])
async def test_a_pause_holds_while_a_read_is_to_be_tried_again(
    peer: Peer, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioecho.net.watch.RETRY_AFTER", 0.05)

    class Poor(socket.socket):
        is_poor = True

        def recvfrom(self, *arguments: Any) -> Any:
            if self.is_poor:
                raise error
            return super().recvfrom(*arguments)

    sock = Poor(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    async with aioecho.DatagramServer(None, DatagramEcho, sock=sock) as server:
        peer.send(b"1", server.server_address)
        await settle(lambda: server.stats.receive_errors >= 1)
        server.resume()
        await settle(lambda: server.stats.receive_errors >= 2)
        server.pause()
        sock.is_poor = False
        await asyncio.sleep(0.2)  # in which a forgotten timer would have resumed
        assert server.stats.received == 0
        server.resume()
        assert (await peer.receive())[0] == b"1"


# Stopping


async def test_who_leaves_the_queue_leaves_it_to_others_with_the_same_socket(peer: Peer) -> None:
    gate = asyncio.Event()
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    async with aioecho.DatagramServer(None, blocked(gate), sock=sock.dup()) as old:
        peer.send(b"mine", sock.getsockname())
        await settle(lambda: old.stats.active == 1)
        for number in range(3):
            peer.send(b"%d" % number, sock.getsockname())
        old.keep_backlog = True
        old.close()  # the loop has not turned since they came
        async with aioecho.DatagramServer(None, DatagramEcho, sock=sock) as new:
            assert [(await peer.receive())[0] for _ in range(3)] == [b"0", b"1", b"2"]
            gate.set()
            assert (await peer.receive())[0] == b"mine"
            assert new.stats.received == 3
    assert old.stats.received == old.stats.completed == 1


async def test_a_stop_lets_handlers_finish_and_reply(peer: Peer) -> None:
    gate = asyncio.Event()
    limits = aioecho.Limits(max_handlers=2, max_queue=10)
    async with serving(blocked(gate), limits=limits) as (server, address):
        for number in range(4):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.received == 4)
        stopping = asyncio.create_task(server.shutdown(10))
        await settle(lambda: not server.is_serving())
        peer.send(b"too late", address)
        gate.set()
        report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (4, 0, 0)
        assert [(await peer.receive())[0] for _ in range(4)] == [b"0", b"1", b"2", b"3"]
        assert server.stats.received == 4


# What had waited for its end, and ended at once, was counted before it, and so made the end of the drain.
async def test_a_drain_counts_a_handler_for_which_another_has_waited(peer: Peer) -> None:
    gate = asyncio.Event()
    seen: list[tuple[int, int]] = []

    async def handle(self: Any) -> None:
        if self.data == b"waits":
            await gate.wait()
        seen.append((self.server.stats.active, len(self.server.connections)))

    async with serving(handler(handle), limits=aioecho.Limits(max_handlers=1)) as (server, address):
        for data in (b"waits", b"at once"):
            peer.send(data, address)
        await settle(lambda: server.stats.queued == 1)
        stopping = asyncio.create_task(server.shutdown(20))
        await settle()
        gate.set()
        report = await stopping
    assert (report.completed, server.stats.completed) == (2, 2)
    assert seen == [(1, 1), (1, 1)]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_stop_serves_what_the_kernel_has_queued(waits: bool, peer: Peer) -> None:
    async def handle(self: Any) -> None:
        if waits:
            await asyncio.sleep(0.01)
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        for number in range(100):
            peer.send(b"%d" % number, address)
        await server.shutdown(10)  # the loop has turned once at most, and a turn finds 64 at most
        assert server.stats.completed == 100
        assert {(await peer.receive())[0] for _ in range(100)} == {b"%d" % number for number in range(100)}


async def test_a_stop_serves_what_a_unix_socket_has_queued(tmp_path: Path) -> None:
    path = str(tmp_path / "server")
    seen = []

    async def handle(self: Any) -> None:
        seen.append(self.data)

    async with aioecho.UnixDatagramServer(path, handler(handle)) as server:
        with Peer(socket.AF_UNIX) as peer:
            for number in range(8):
                peer.send(b"%d" % number, path)
            server.close()  # the loop has not turned since
        await server.shutdown(10)
        check(server)
    assert seen == [b"%d" % number for number in range(8)]


async def test_who_does_not_finish_in_time_is_cancelled_and_what_waits_is_dropped(peer: Peer) -> None:
    limits = aioecho.Limits(max_handlers=2, max_queue=10)
    async with serving(blocked(asyncio.Event()), limits=limits) as (server, address):
        for _ in range(5):
            peer.send(b"", address)
        await settle(lambda: server.stats.received == 5)
        report = await server.shutdown(0)
        assert (report.completed, report.cancelled, report.aborted) == (0, 2, 0)
        assert server.stats.cancelled == 2
        assert server.stats.drops == {"stopped": 3}


async def test_a_handler_that_swallows_its_cancellation_is_cut_off(
    peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    async def handle(self: Any) -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(100)

    async with serving(handler(handle)) as (server, address):
        peer.send(b"", address)
        await settle(lambda: server.stats.active == 1)
        report = await server.shutdown(0)
        assert (report.completed, report.cancelled, report.aborted) == (0, 0, 1)
        assert server.stats.cancelled == 1
    assert "would not end when cancelled, and was cut off: <DatagramTask with 127.0.0.1:" in caplog.text


async def test_close_stops_reading_and_the_socket_closes_after_the_last_handler(peer: Peer) -> None:
    gate = asyncio.Event()
    async with serving(blocked(gate)) as (server, address):
        peer.send(b"x", address)
        await settle(lambda: server.stats.active == 1)
        sock = server.sockets[0]
        server.close()
        assert not server.is_serving()
        assert sock.fileno() != -1
        gate.set()
        assert (await peer.receive()) == (b"x", address)
        await settle(lambda: sock.fileno() == -1)


async def test_a_handler_may_stop_its_server(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        self.server.close()
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        [sock] = server.sockets
        for number in range(5):
            peer.send(b"%d" % number, address)
        assert [(await peer.receive())[0] for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
        await settle(lambda: sock.fileno() == -1)


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("has_served", [False, True])
async def test_a_handler_that_awaits_the_shutdown_of_its_server_does_not_wait_for_itself(
    waits: bool, has_served: bool, peer: Peer
) -> None:
    async def handle(self: Any) -> None:
        if self.data == b"quit":
            if waits:
                await asyncio.sleep(0)
            report = await self.server.shutdown(20)
            assert (report.completed, report.cancelled, report.aborted) == (0, 0, 0)
        await self.reply(self.data)

    async with serving(handler(handle)) as (server, address):
        if has_served:
            assert await peer.ask(b"x", address) == b"x"
        assert await peer.ask(b"quit", address) == b"quit"
        report = await server.shutdown()
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)


async def test_close_serves_what_the_kernel_has_queued_and_closes_the_socket(peer: Peer) -> None:
    async with serving(DatagramEcho) as (server, address):
        [sock] = server.sockets
        for number in range(5):
            peer.send(b"%d" % number, address)

        def close() -> None:  # where no task is current, so that each is handled at once
            server.close()
            assert server.stats.completed == 5
            assert sock.fileno() == -1

        asyncio.get_running_loop().call_soon(close)
        assert [(await peer.receive())[0] for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]


# Endpoints


@pytest.mark.parametrize("form", ["fd", "sock"])
async def test_a_socket_that_is_bound_already_is_served_on(form: str, peer: Peer) -> None:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    address = sock.getsockname()
    server = (
        aioecho.serve(DatagramEcho, f"fd://{sock.detach()}") if form == "fd" else aioecho.serve(DatagramEcho, sock=sock)
    )
    assert isinstance(server, aioecho.DatagramServer)
    async with server:
        assert server.names == (f"udp://127.0.0.1:{address[1]}",)
        assert await peer.ask(b"x", address) == b"x"


async def test_a_port_is_not_shared(peer: Peer) -> None:
    async with serving(DatagramEcho) as (_, address):
        with pytest.raises(aioecho.EndpointError, match=r"cannot listen on udp://127\.0\.0\.1:\d+: Address already"):
            await aioecho.UDPServer(address, DatagramEcho).start()
        other = aioecho.serve(DatagramEcho, "udp://127.0.0.1:0", f"udp://127.0.0.1:{address[1]}")
        with pytest.raises(aioecho.EndpointError):
            await other.start()


async def test_a_path_that_nobody_uses_is_taken_over_and_one_that_somebody_uses_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "server")
    with Peer(socket.AF_UNIX, path):
        with pytest.raises(aioecho.EndpointError, match="another socket listens there already"):
            await aioecho.UnixDatagramServer(path, DatagramEcho).start()
        with pytest.raises(aioecho.EndpointError, match="another socket listens there already"):
            await aioecho.UnixStreamServer(path, Echo).start()
    assert os.path.exists(path)
    async with aioecho.serve(DatagramEcho, f"unixgram:{path}?mode=620"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o620
        with pytest.raises(aioecho.EndpointError, match="another socket listens there already"):
            await aioecho.UnixDatagramServer(path, DatagramEcho, mode=0o600).start()
        os.unlink(path)
        Path(path).write_text("another's")
    assert Path(path).read_text() == "another's"


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"tcp://127\.0\.0\.1:0 is for streams and udp://127\.0\.0\.1:0 is for datagr"):
        aioecho.serve(DatagramEcho, "tcp://127.0.0.1:0", "udp://127.0.0.1:0")
    with pytest.raises(TypeError, match=r"Echo is a handler of streams: it can't serve datagrams, as on udp://"):
        aioecho.serve(Echo, "udp://127.0.0.1:0")
    with pytest.raises(
        TypeError, match=r"DatagramEcho is a handler of datagrams: it can't serve streams, as on tcp://"
    ):
        aioecho.TCPServer(("127.0.0.1", 0), DatagramEcho)
    with pytest.raises(ValueError, match=r"udp://127\.0\.0\.1:0 is not for TCPServer: aioecho\.serve\(\) finds"):
        aioecho.TCPServer("udp://127.0.0.1:0", Echo)
    with pytest.raises(ValueError, match=r"unix:x is not for DatagramServer"):
        aioecho.DatagramServer("unix:x", DatagramEcho)
    with pytest.raises(TypeError, match=r"several handler classes go to aioecho\.serve\(\)"):
        aioecho.DatagramServer(None, {DatagramEcho: "udp://127.0.0.1:0"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ssl is for streams"):
        aioecho.UDPServer(("127.0.0.1", 0), DatagramEcho, ssl=object())
    with pytest.raises(ValueError, match=r"expected a \(host, port\)"):
        aioecho.UDPServer(("127.0.0.1", 70_000), DatagramEcho)
    with pytest.raises(ValueError, match="max_datagram must be a whole number from 1 to"):
        aioecho.Limits(max_datagram=2**30)


async def test_a_stream_socket_is_refused() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        pytest.raises(aioecho.EndpointError, match="it is not a UDP or Unix datagram socket"),
    ):
        await aioecho.DatagramServer(None, DatagramEcho, sock=sock).start()


# Ready-made handlers


class Outbox:
    """Keeps what a handler sends."""

    local_address = ("127.0.0.1", 9999)

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def sendto(self, data: bytes, address: Any) -> Any:
        self.sent.append(bytes(data))
        return asyncio.sleep(0)


@ON_ONE_LOOP
@pytest.mark.parametrize("name", DATAGRAM_HANDLERS)
async def test_no_ready_made_handler_answers_a_small_service(name: str) -> None:
    for port in SMALL_SERVICES:
        for address in (("127.0.0.1", port), ("::1", port, 0, 0)):
            outbox = Outbox()
            await DATAGRAM_HANDLERS[name]((b"hello", outbox), address, None).handle()
            assert outbox.sent == []
    assert frozenset({7, 9, 13, 17, 19, 37}) == SMALL_SERVICES


@pytest.mark.parametrize("name", DATAGRAM_HANDLERS)
@pytest.mark.parametrize(
    ("host", "asked"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.2"), pytest.param("::", "::1", marks=needs_ipv6)],
)
async def test_no_ready_made_handler_answers_itself(name: str, host: str, asked: str) -> None:
    async with aioecho.UDPServer((host, 0), DATAGRAM_HANDLERS[name]) as server:
        itself = socket.socket(fileno=os.dup(server.sockets[0].fileno()))  # as who writes its address on a datagram
        if host == "0.0.0.0":
            source = struct.pack("@i4s4s", 0, socket.inet_aton(asked), bytes(4))
            ancillary = [(socket.IPPROTO_IP, IP_PKTINFO, source)]
        else:
            ancillary = []
        with itself:
            itself.sendmsg([b"hello"], ancillary, 0, (asked, server.server_address[1]))
        await settle(lambda: server.stats.completed == 1)
        await settle()
        assert server.stats.received == 1
        with Peer(socket.AF_INET6 if ":" in asked else socket.AF_INET) as peer:
            if name != "discard":
                assert await peer.ask(b"hello", (asked, server.server_address[1]))


@ON_ONE_LOOP
@pytest.mark.parametrize("name", DATAGRAM_HANDLERS)
@pytest.mark.parametrize("size", [0, 1, 100, 600, 65_507])
async def test_no_ready_made_handler_answers_with_more_unless_its_protocol_does(
    name: str, size: int, peer: Peer
) -> None:
    async with serving(DATAGRAM_HANDLERS[name]) as (server, address):
        peer.send(b"x" * size, address)
        if name == "discard":
            await settle(lambda: server.stats.completed == 1)
            return
        reply, _ = await peer.receive()
    if name == "daytime":
        assert reply.endswith(b"-UTC\r\n")
    elif name == "time":
        assert len(reply) == 4
    elif name == "chargen":
        assert len(reply) == min(size, 512)
    else:
        assert len(reply) == size
