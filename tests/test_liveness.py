"""A handler that waits for something else than its client is told when that is gone, or when the server stops."""

import asyncio
import gc
import socket
import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, handler, reset

import aioecho

FOR_LONG = aioecho.Timeouts(lost=60, half_closed=60)


async def connect(server: aioecho.BaseServer, request: bytes = b"") -> socket.socket:
    """Return a client's socket, by which the request was sent and read."""
    loop = asyncio.get_running_loop()
    sock = socket.socket()
    sock.setblocking(False)
    await loop.sock_connect(sock, server.server_address)
    await settle(lambda: any(connection.handler is not None for connection in server.connections))
    if request:
        await loop.sock_sendall(sock, request)
    return sock


async def wait_on(self: Any) -> None:
    """Handle a connection by waiting for something else."""
    await self.event.wait()


async def answer_and_wait(self: Any) -> None:
    """Answer a line, and wait for something else."""
    await self.send(await self.reader.readline())
    await self.event.wait()


async def take_and_wait(self: Any) -> None:
    """Read a line, wait for something else, and note that this was waited for."""
    self.line = await self.reader.readline()
    type(self).has_read = True
    await self.event.wait()
    type(self).has_waited = True


def waiting(handle: Any, **attributes: Any) -> Any:
    return handler(handle, event=asyncio.Event(), has_read=False, has_waited=False, **attributes)


async def test_a_handler_that_waits_for_something_else_is_cancelled_when_its_client_resets() -> None:
    ended = []

    async def finish(self: Any) -> None:
        ended.append(self)

    async with aioecho.TCPServer(ANYWHERE, waiting(wait_on, finish=finish), timeouts=FOR_LONG) as server:
        reset(await connect(server))
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"connection lost": 1}
        assert (server.stats.failed, len(ended)) == (1, 1)


async def test_a_handler_that_has_answered_is_cancelled_when_its_client_resets() -> None:
    async with aioecho.TCPServer(ANYWHERE, waiting(answer_and_wait), timeouts=FOR_LONG) as server:
        sock = await connect(server, b"subscribe\n")
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"subscribe\n"
        reset(sock)
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"connection lost": 1}


async def test_a_handler_in_the_middle_of_a_message_goes_on_when_its_client_resets() -> None:
    Handler = waiting(take_and_wait)
    async with aioecho.TCPServer(ANYWHERE, Handler, timeouts=FOR_LONG) as server:
        sock = await connect(server, b"charge 10\n")
        await settle(lambda: Handler.has_read)
        reset(sock)
        [connection] = server.connections
        await settle(connection.is_peer_lost)
        Handler.event.set()
        await settle(lambda: not server.connections)
        assert Handler.has_waited
        assert server.stats.reasons == {"finished": 1}


async def test_a_handler_in_the_middle_of_a_message_has_the_time_of_the_timeout_lost() -> None:
    Handler = waiting(take_and_wait)
    async with aioecho.TCPServer(ANYWHERE, Handler, timeouts=aioecho.Timeouts(lost=0.05)) as server:
        sock = await connect(server, b"charge 10\n")
        await settle(lambda: Handler.has_read)
        reset(sock)
        await settle(lambda: not server.connections)
        assert not Handler.has_waited
        assert server.stats.reasons == {"connection lost": 1}


async def test_what_came_before_a_reset_is_read_before_the_handler_learns_of_it() -> None:
    event, lines = asyncio.Event(), []

    async def read_late(self: Any) -> None:
        await event.wait()
        async for line in self.reader:
            lines.append(line)

    async with aioecho.TCPServer(ANYWHERE, handler(read_late), timeouts=FOR_LONG) as server:
        sock = await connect(server, b"one\ntwo\n")
        [connection] = server.connections
        await settle(lambda: bool(connection.request[0]._buffer))
        reset(sock)
        await settle(connection.is_peer_lost)
        await settle()
        event.set()
        await settle(lambda: not server.connections)
        assert lines == [b"one\n", b"two\n"]
        assert server.stats.reasons == {"connection lost": 1}


async def test_a_handler_that_a_read_tells_of_the_end_may_clean_up() -> None:
    cleaned = asyncio.Event()

    async def handle(self: Any) -> None:
        try:
            await self.reader.readline()
        except ConnectionError:
            for _ in range(10):
                await asyncio.sleep(0)
            cleaned.set()
            raise

    async with aioecho.TCPServer(ANYWHERE, handler(handle), timeouts=FOR_LONG) as server:
        reset(await connect(server))
        await settle(lambda: not server.connections)
        assert cleaned.is_set()
        assert server.stats.reasons == {"connection lost": 1}


async def test_a_handler_class_can_refuse_to_be_cancelled() -> None:
    Handler = waiting(wait_on, cancel_on_lost=False)
    async with aioecho.TCPServer(ANYWHERE, Handler, timeouts=aioecho.Timeouts(lost=0.01)) as server:
        sock = await connect(server)
        [connection] = server.connections
        reset(sock)
        await settle(connection.is_peer_lost)
        await asyncio.sleep(0.05)  # time is the subject
        assert server.connections
        Handler.event.set()
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"finished": 1}


async def test_a_stop_does_not_wait_for_the_handlers_of_clients_that_are_lost() -> None:
    async with aioecho.TCPServer(ANYWHERE, waiting(wait_on), timeouts=FOR_LONG, grace=60) as server:
        socks = [await connect(server) for _ in range(20)]
        stop = asyncio.create_task(server.shutdown())
        await settle(lambda: not server.is_serving())
        for sock in socks:
            reset(sock)
        report = await asyncio.wait_for(stop, 30)
        assert (report.cancelled, report.aborted) == (0, 0)
        check_identity(server)


async def test_a_client_that_was_lost_while_setup_waited_is_noticed() -> None:
    event = asyncio.Event()

    async def setup(self: Any) -> None:
        await event.wait()

    Handler = waiting(wait_on, setup=setup)
    async with aioecho.TCPServer(ANYWHERE, Handler, timeouts=FOR_LONG) as server:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, server.server_address)
        await settle(lambda: bool(server.connections))
        [connection] = server.connections
        await settle(lambda: connection.request is not None)
        reset(sock)
        await settle(connection.is_peer_lost)
        event.set()
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"connection lost": 1}


# closed()


@pytest.mark.parametrize("end", ["end of stream", "reset", "stop"])
async def test_closed_returns_when_the_client_ends_or_the_server_stops(end: str) -> None:
    found = []

    async def race(self: Any) -> None:
        await self.send(b"hello\n")
        await self.closed()
        found.append(self.reader.end)
        await self.closed()  # at once

    async with aioecho.TCPServer(ANYWHERE, handler(race), timeouts=FOR_LONG, grace=60) as server:
        sock = await connect(server)
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"hello\n"
        stop = None
        if end == "reset":
            reset(sock)
        elif end == "stop":
            stop = asyncio.create_task(server.shutdown())
        else:
            sock.shutdown(socket.SHUT_WR)
        await settle(lambda: len(found) == 1)
        await settle(lambda: not server.connections)
        assert found == [{"end of stream": "peer"}.get(end)]
        assert server.stats.reasons == {"finished": 1}
        if stop is not None:
            assert (await stop).completed == 1
        sock.close()


async def test_what_was_not_read_can_be_read_after_closed() -> None:
    read = []

    async def handle(self: Any) -> None:
        await self.closed()
        read.append(await self.reader.read())

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        sock = await connect(server, b"the rest")
        sock.close()
        await settle(lambda: not server.connections)
    assert read == [b"the rest"]


# A client that has ended its stream


async def test_a_handler_that_waits_for_long_after_the_clients_end_is_cancelled() -> None:
    timeouts = aioecho.Timeouts(half_closed=0.05)
    async with aioecho.TCPServer(ANYWHERE, waiting(answer_and_wait), timeouts=timeouts) as server:
        sock = await connect(server, b"subscribe\n")
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"subscribe\n"
        sock.shutdown(socket.SHUT_WR)
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"half_closed": 1}
        assert server.stats.failed == 1
        sock.close()


async def test_a_handler_that_never_answers_is_cancelled_when_it_waits_for_long_after_the_clients_end() -> None:
    Handler = waiting(take_and_wait, one_way=True)
    async with aioecho.TCPServer(ANYWHERE, Handler, timeouts=aioecho.Timeouts(half_closed=0.05)) as server:
        sock = await connect(server, b"a line\n")
        await settle(lambda: Handler.has_read)
        sock.shutdown(socket.SHUT_WR)
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"half_closed": 1}
        sock.close()


async def test_a_request_that_is_not_answered_yet_is_answered_after_the_clients_end() -> None:
    async def answer_late(self: Any) -> None:
        line = await self.reader.readline()
        await asyncio.sleep(0.3)  # time is the subject
        await self.send(line)

    timeouts = aioecho.Timeouts(half_closed=0.05)
    async with aioecho.TCPServer(ANYWHERE, handler(answer_late), timeouts=timeouts) as server:
        sock = await connect(server, b"question\n")
        sock.shutdown(socket.SHUT_WR)
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"question\n"
        sock.close()
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"finished": 1}


async def test_nothing_is_kept_of_a_connection_that_ended_after_its_clients_end() -> None:
    handlers: weakref.WeakSet[Any] = weakref.WeakSet()

    async def answer_late(self: Any) -> None:
        handlers.add(self)
        async for line in self.reader:
            await self.event.wait()
            await self.send(line)

    Handler = handler(answer_late, event=asyncio.Event())
    async with aioecho.TCPServer(ANYWHERE, Handler, timeouts=FOR_LONG) as server:
        sock = await connect(server, b"question\n")
        sock.shutdown(socket.SHUT_WR)
        await settle()
        Handler.event.set()
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"question\n"
        sock.close()
        await settle(lambda: not server.connections)
        await settle(lambda: not gc.collect() and not handlers)


async def test_what_is_sent_puts_the_end_of_a_half_closed_connection_off() -> None:
    async def tick(self: Any) -> None:
        for _ in range(10):
            await self.send(b".")
            await asyncio.sleep(0.05)  # time is the subject

    timeouts = aioecho.Timeouts(half_closed=0.2)
    async with aioecho.TCPServer(ANYWHERE, handler(tick), timeouts=timeouts) as server:
        sock = await connect(server)
        sock.shutdown(socket.SHUT_WR)
        received, loop = b"", asyncio.get_running_loop()
        while data := await loop.sock_recv(sock, 100):
            received += data
        assert received == b"." * 10
        sock.close()
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"finished": 1}


@pytest.mark.parametrize("closes", [True, False])
async def test_of_a_unix_socket_only_one_that_is_closed_altogether_counts(tmp_path: Path, closes: bool) -> None:
    Handler = waiting(wait_on)
    timeouts = aioecho.Timeouts(half_closed=0.02)
    async with aioecho.UnixStreamServer(str(tmp_path / "s"), Handler, timeouts=timeouts) as server:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(tmp_path / "s"))
        await settle(lambda: bool(server.connections))
        if closes:
            sock.close()
            await settle(lambda: not server.connections)
            assert server.stats.reasons == {"half_closed": 1}
        else:
            sock.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.2)  # time is the subject
            assert server.connections
            Handler.event.set()
            sock.close()


# Goodbye


class Goodbye(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.send(b"hello\n")
        await self.closed()

    async def draining(self) -> None:
        await asyncio.sleep(0)
        await self.send(b"goodbye\n")


async def read_all(sock: socket.socket) -> bytes:
    received, loop = b"", asyncio.get_running_loop()
    while data := await loop.sock_recv(sock, 100):
        received += data
    return received


async def test_a_stop_says_goodbye() -> None:
    async with aioecho.TCPServer(ANYWHERE, Goodbye) as server:
        socks = [await connect(server) for _ in range(10)]
        reading = [asyncio.create_task(read_all(sock)) for sock in socks]
        report = await server.shutdown(grace=10)
        assert [await task for task in reading] == [b"hello\ngoodbye\n"] * 10
        assert (report.completed, report.seconds < 3) == (10, True)
        for sock in socks:
            sock.close()


async def test_a_goodbye_that_does_not_end_is_waited_for_a_second() -> None:
    ended = []

    class Slow(Goodbye):
        async def draining(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(self)

    async with aioecho.TCPServer(ANYWHERE, Slow) as server:
        sock = await connect(server)
        began = asyncio.get_running_loop().time()
        report = await server.shutdown(grace=60)
        assert report.completed == 1
        assert 0.9 < asyncio.get_running_loop().time() - began < 20
        await settle(lambda: len(ended) == 1)
        sock.close()


async def test_a_goodbye_that_raises_is_reported_as_the_handlers_mistake(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(Goodbye):
        async def draining(self) -> None:
            raise ValueError("no goodbye")

    async with aioecho.TCPServer(ANYWHERE, Wrong) as server:
        sock = await connect(server)
        report = await server.shutdown(grace=10)
        assert report.completed == 1
        sock.close()
    assert "no goodbye" in caplog.text


async def test_the_end_of_the_grace_ends_a_goodbye() -> None:
    ended = []

    class Slow(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await asyncio.Event().wait()

        async def draining(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(self)

    async with aioecho.TCPServer(ANYWHERE, Slow) as server:
        sock = await connect(server)
        report = await server.shutdown(grace=0.2)
        assert (report.cancelled, report.aborted) == (1, 0)
        await settle(lambda: len(ended) == 1)
        sock.close()


# Keep-alive


def probing(sock: Any) -> tuple[int, ...]:
    names = ["TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"]
    options = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *options


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="the options are Linux's")
async def test_the_kernel_probes_silent_clients() -> None:
    found = []

    async def handle(self: Any) -> None:
        found.append(probing(self.writer.get_extra_info("socket")))

    async def connect_once(server: aioecho.BaseServer) -> tuple[int, ...]:
        with socket.create_connection(server.server_address):
            await settle(lambda: bool(found))
        return found.pop()

    async with aioecho.TCPServer(ANYWHERE, handler(handle)) as server:
        assert await connect_once(server) == (1, 15, 15, 3, 60_000)
        server.timeouts = aioecho.Timeouts(keepalive=4, write=300)
        assert await connect_once(server) == (1, 1, 1, 3, 300_000)
        server.timeouts = aioecho.Timeouts(keepalive=120, write=None)
        assert await connect_once(server) == (1, 30, 30, 3, 0)
    async with aioecho.TCPServer(ANYWHERE, handler(handle), timeouts=aioecho.Timeouts(keepalive=None)) as server:
        assert (await connect_once(server))[0] == 0
