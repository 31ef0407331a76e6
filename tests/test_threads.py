"""Blocking handlers of socketserver's, unmodified, in threads of a bounded pool: alone, and beside async ones."""

import asyncio
import contextlib
import errno
import functools
import gc
import http.server
import logging
import os
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ask, close
from programs import Program, connect
from programs import ask as ask_program
from test_datagram import fill
from timing import in_time, within

import aioecho
from aioecho.echo import Echo
from aioecho.echo import Upper as AsyncUpper

ANYWHERE = "tcp://127.0.0.1:0"


class Upper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class Held(socketserver.BaseRequestHandler):
    """Waits for its server's event between the request and the reply."""

    def handle(self) -> None:
        request = self.request.recv(1024)
        self.server.entered.release()  # type: ignore[attr-defined]
        self.server.may_go_on.wait(30)  # type: ignore[attr-defined]
        self.request.sendall(request.upper())


class HeldServer(aioecho.TCPServer):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.entered = threading.Semaphore(0)
        self.may_go_on = threading.Event()

    async def has_entered(self, count: int = 1) -> None:
        for _ in range(count):
            await settle(lambda: self.entered.acquire(blocking=False))


@pytest.fixture(autouse=True)
def threads_are_back() -> Iterator[None]:
    """Fail a test that leaves a thread of ours."""
    yield
    assert our_threads() == []


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("aioecho-")]


async def open_to(server: aioecho.BaseServer, index: int = 0, **options: Any) -> Any:
    return await asyncio.open_connection(*server.sockets[index].getsockname()[:2], **options)


# What a handler has


async def test_a_stream_handler_runs_unmodified() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
        assert await ask(server, b"Hello, Server!\nagain\n") == b"HELLO, SERVER!\nAGAIN\n"
        await settle(lambda: server.stats.completed == 1)
        check_identity(server)


async def test_a_handler_has_what_socketservers_has_and_its_methods_are_called_in_order(tmp_path: Any) -> None:
    calls: list[Any] = []

    class Full(socketserver.BaseRequestHandler):
        def setup(self) -> None:
            calls.append("setup")

        def handle(self) -> None:
            thread = threading.current_thread()
            calls.append((self.client_address, self.server, thread is not threading.main_thread(), thread.daemon))
            calls.append((self.request.gettimeout(), self.request.getpeername(), self.server.server_address))
            self.request.sendall(self.request.recv(10))

        def finish(self) -> None:
            calls.append("finish")

    async with aioecho.TCPServer(("127.0.0.1", 0), Full) as server:
        reader, writer = await open_to(server)
        address = writer.get_extra_info("sockname")
        expected = ["setup", (address, server, True, True), (None, address, server.server_address), "finish"]
        writer.write(b"x")
        assert await reader.read() == b"x"
        await close(writer)
    assert calls == expected
    async with aioecho.UnixStreamServer(str(tmp_path / "socket"), Upper) as unix:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
        writer.write(b"unix\n")
        assert await reader.readline() == b"UNIX\n"
        await close(writer)
    check_identity(unix)


async def test_a_partial_of_a_handler_class_is_blocking_too() -> None:
    class Greeter(socketserver.BaseRequestHandler):
        def __init__(self, *arguments: Any, greeting: bytes) -> None:
            self.greeting = greeting
            super().__init__(*arguments)

        def handle(self) -> None:
            self.request.sendall(self.greeting)

    made = functools.partial(functools.partial(Greeter), greeting=b"hi")
    async with aioecho.serve(made, ANYWHERE) as server:
        assert await ask(server, b"") == b"hi"


def test_a_handler_of_socketservers_with_a_coroutine_is_refused() -> None:
    class Mixed(socketserver.StreamRequestHandler):
        async def handle(self) -> None:  # type: ignore[override]
            pass

    with pytest.raises(TypeError, match=r"Mixed .*derive it from aioecho\.StreamRequestHandler"):
        aioecho.serve(Mixed, ANYWHERE)


@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("where", ["verify_request", "socket.setdefaulttimeout"])
async def test_a_sockets_timeout_set_before_the_handler_holds(
    where: str, has_tls: bool, tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    class Server(aioecho.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            if where == "verify_request":
                request.settimeout(0.1)
            return True

    options = {"ssl": tls.client, "server_hostname": "localhost"} if has_tls else {}
    async with Server(("127.0.0.1", 0), Upper, ssl=tls.server if has_tls else None) as server:
        try:
            socket.setdefaulttimeout(0.1 if where != "verify_request" else None)
            reader, writer = await open_to(server, **options)
            assert await reader.read() == b""  # a silent client
        finally:
            socket.setdefaulttimeout(None)
        await close(writer)
        await settle(lambda: server.stats.failed == 1)
    check_identity(server)
    assert server.stats.reasons == {"timeout": 1}
    assert not [record for record in caplog.records if record.levelno > logging.INFO]  # the client's doing


async def test_context_variables_and_files_are_a_requests_own() -> None:
    import contextvars

    seen = contextvars.ContextVar("seen", default="nothing")

    class Marks(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            file = self.request.makefile("rwb")  # left open
            file.write(seen.get().encode())
            file.flush()
            seen.set("something")

    async with aioecho.serve(Marks, ANYWHERE, limits=aioecho.Limits(max_threads=1)) as server:
        for _ in range(2):
            assert await ask(server, b"") == b"nothing"


async def test_an_http_handler_of_the_standard_library_serves_files(tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_bytes(b"x" * 300_000)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

    async with aioecho.serve(functools.partial(Quiet, directory=str(tmp_path)), ANYWHERE) as server:
        reader, writer = await open_to(server)
        for _ in range(3):
            writer.write(b"GET /file.txt HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(300_000) == b"x" * 300_000
        assert (await server.shutdown(20)).seconds < 5  # it waits for a fourth request, which is not to come
        await close(writer)
    check_identity(server)


def test_the_command_line_serves_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import socketserver\nclass Upper(socketserver.StreamRequestHandler):\n"
        "    def handle(self):\n        self.wfile.write(self.rfile.readline().upper())\n"
    )
    with Program.aioecho("serve", "mine:Upper", "--port", "0", cwd=tmp_path) as server:
        endpoint = server.listening()
        assert ask_program(endpoint, b"hello\n") == b"HELLO\n"
        with connect(endpoint) as idle:
            settled = connect(endpoint)
            settled.sendall(b"x\n")
            assert settled.recv(10) == b"X\n"  # so that the idle one has been accepted too
            settled.close()
            server.signal()
            assert idle.recv(1) == b""
        assert server.wait() == 0
        assert "shut down in" in server.stderr()
        assert "WARNING" not in server.stderr()


async def test_the_servers_address_holds_until_the_last_handler_has_ended() -> None:
    addresses = []

    class Asks(Held):
        def handle(self) -> None:
            addresses.append(self.server.server_address)
            super().handle()
            addresses.append(self.server.server_address)

    async with HeldServer(("127.0.0.1", 0), Asks) as server:
        expected = server.server_address
        asking = asyncio.create_task(ask(server, b"x"))
        await server.has_entered()
        stopping = asyncio.create_task(server.shutdown(20))
        await settle(lambda: not server.is_serving())
        server.may_go_on.set()
        assert await asking == b"X"
        await stopping
    assert addresses == [expected, expected]


# Errors, hooks, accounting


@pytest.mark.parametrize("where", ["__init__", "setup", "handle", "finish"])
async def test_a_method_that_raises_is_reported_and_stops_nothing(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def fails(self: Any, *arguments: Any) -> None:
        raise ValueError(f"in {where}")

    bad = type("Bad", (socketserver.StreamRequestHandler,), {where: fails})
    async with aioecho.TCPServer(("127.0.0.1", 0), bad) as server:
        assert await ask(server, b"") == b""
        server.RequestHandlerClass = Upper
        assert await ask(server, b"still here\n") == b"STILL HERE\n"
        await settle(lambda: not server.connections)
        assert (server.stats.failed, server.stats.completed) == (1, 1)
        assert server.stats.reasons == {"error": 1, "finished": 1}
        check_identity(server)
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == f"in {where}"


async def test_handle_error_is_called_in_the_thread_with_the_socket() -> None:
    class Bad(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raise ValueError("no")

    class Tells(aioecho.TCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            assert threading.current_thread() is not threading.main_thread()
            request.sendall(repr(sys.exception()).encode())

    async with Tells(("127.0.0.1", 0), Bad) as server:
        assert await ask(server, b"x") == b"ValueError('no')"


async def test_what_would_end_a_thread_ends_only_a_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", caught.append)

    class Exits(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            sys.exit("now")

    async with aioecho.serve(Exits, ANYWHERE, limits=aioecho.Limits(max_threads=1)) as server:
        for _ in range(3):
            assert await ask(server, b"") == b""
        await settle(lambda: server.stats.failed == 3)
    assert [each.exc_type for each in caught] == [SystemExit] * 3


async def test_an_excepthook_that_raises_costs_no_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(arguments: Any) -> None:
        raise BrokenPipeError("stderr is closed")

    monkeypatch.setattr(threading, "excepthook", fail)

    class Exits(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            sys.exit("now")

    async with aioecho.serve(Exits, ANYWHERE, limits=aioecho.Limits(max_threads=1)) as server:
        for _ in range(3):
            assert await ask(server, b"") == b""
        await settle(lambda: server.stats.failed == 3)
        check_identity(server)
    assert caplog.text.count("threading.excepthook raised") == 3


@pytest.mark.parametrize("is_async", [False, True])
async def test_verify_request_refuses_before_a_thread_is_taken(is_async: bool) -> None:
    made = []

    class Picky(aioecho.TCPServer):
        def check(self, request: Any) -> bool:
            assert asyncio.get_running_loop()
            assert isinstance(request, socket.socket)
            return self.stats.rejected == 1

        if is_async:

            async def verify_request(self, request: Any, client_address: Any) -> bool:  # type: ignore[override]
                await asyncio.sleep(0)
                return self.check(request)
        else:

            def verify_request(self, request: Any, client_address: Any) -> bool:
                return self.check(request)

    class Made(Upper):
        def setup(self) -> None:
            made.append(1)
            super().setup()

    async with Picky(("127.0.0.1", 0), Made) as server:
        assert await ask(server, b"x\n") == b""
        await settle(lambda: server.stats.rejected == 1)
        assert our_threads() == []
        assert await ask(server, b"x\n") == b"X\n"
        await settle(lambda: not server.connections)
        assert (server.stats.rejected, server.stats.completed, len(made)) == (1, 1, 1)
        assert server.stats.reasons["refused"] == 1
        check_identity(server)


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_verify_request_that_raises_is_reported(is_async: bool, caplog: pytest.LogCaptureFixture) -> None:
    class Bad(aioecho.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> Any:
            async def fail() -> bool:
                raise ValueError("verifying")

            if is_async:
                return fail()
            raise ValueError("verifying")

    async with Bad(("127.0.0.1", 0), Upper) as server:
        assert await ask(server, b"x\n") == b""
        await settle(lambda: server.stats.failed == 1)
        check_identity(server)
    assert [r.levelname for r in caplog.records if r.exc_info] == ["ERROR"]


async def test_a_reset_is_the_peers_doing(caplog: pytest.LogCaptureFixture) -> None:
    async with HeldServer(("127.0.0.1", 0), Held) as server:
        sock = socket.create_connection(server.server_address)
        sock.sendall(b"x")
        await server.has_entered()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        server.may_go_on.set()
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"connection lost": 1}
        check_identity(server)
    assert [r for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.parametrize(
    "record",
    [b"no record of TLS at all", b"\x17\x03\x03\x00\x20" + b"x" * 32],
    ids=["no record", "a record that can't be decrypted"],
)
async def test_broken_tls_is_the_peers_doing(
    record: bytes, tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    def break_it() -> None:
        plain = socket.create_connection(server.server_address)
        sock = tls.client.wrap_socket(plain, server_hostname="localhost")
        with socket.socket(fileno=sock.detach()) as bare:
            bare.sendall(record)
            with contextlib.suppress(OSError):
                while bare.recv(1000):
                    pass

    async with aioecho.serve(Upper, ANYWHERE, ssl=tls.server) as server:
        await asyncio.to_thread(break_it)
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"connection lost": 1}
        check_identity(server)
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_an_error_of_tls_elsewhere_is_not_the_peers_doing(
    tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "with the database")

    async with aioecho.serve(Fails, ANYWHERE, ssl=tls.server) as server:
        await ask(server, b"", ssl=tls.client, server_hostname="localhost")
        await settle(lambda: server.stats.reasons == {"error": 1})
    assert [r.levelname for r in caplog.records if r.exc_info] == ["ERROR"]


@pytest.mark.parametrize("kind", ["blocking", "async"])
async def test_to_be_refused_elsewhere_is_not_the_peers_doing(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    class Blocking(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raise ConnectionRefusedError("by the database")

    class Async(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            raise ConnectionRefusedError("by the database")

    async with aioecho.serve(Blocking if kind == "blocking" else Async, ANYWHERE) as server:
        assert await ask(server, b"") == b""
        await settle(lambda: server.stats.reasons == {"error": 1})
    assert [r.levelname for r in caplog.records if r.exc_info] == ["ERROR"]


async def test_a_client_that_does_not_close_gets_its_reply_and_keeps_no_thread() -> None:
    class Replies(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4)
            self.request.sendall(b"reply")

    limits, timeouts = aioecho.Limits(max_threads=1), aioecho.Timeouts(linger=0.2)
    async with aioecho.serve(Replies, ANYWHERE, limits=limits, timeouts=timeouts) as server:
        writers = []
        for _ in range(3):
            reader, writer = await open_to(server)
            writer.write(b"x" * 100_000)  # more than is read: to close over it would reset the connection
            assert await reader.read() == b"reply"
            writers.append(writer)
        await settle(lambda: server.stats.completed == 3)
        check_identity(server)
        for writer in writers:
            await close(writer)


@pytest.mark.parametrize("way", ["close", "close a copy", "detach", "shut and close"])
async def test_a_handler_may_close_its_socket_itself(way: str) -> None:
    go_on = threading.Event()

    class Closes(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"reply")
            if way == "close a copy":
                self.request.dup().close()
                return
            if way == "detach":
                with socket.socket(fileno=self.request.detach()) as mine:
                    mine.sendall(b", and more")
                return
            if way == "shut and close":
                self.request.shutdown(socket.SHUT_WR)
            self.request.close()
            self.request.close()
            assert go_on.wait(30)

    async with aioecho.serve(Closes, ANYWHERE) as server:
        # The end comes at once, not when the handler returns.
        assert await ask(server, b"") == (b"reply, and more" if way == "detach" else b"reply")
        go_on.set()
        await settle(lambda: server.stats.completed == 1)
        check_identity(server)


# TLS


async def test_tls_is_wrapped_in_the_thread_and_ended_in_good_order(tls: SimpleNamespace) -> None:
    seen: list[Any] = []

    class Secret(Upper):
        def setup(self) -> None:
            seen.append((isinstance(self.request, ssl.SSLSocket), self.request.version(), self.request.gettimeout()))
            super().setup()

    async with aioecho.serve(Secret, ANYWHERE, ssl=tls.server) as server:

        def ask_blocking() -> bytes:
            with (
                socket.create_connection(server.sockets[0].getsockname()) as plain,
                # A connection that ends without TLS's own end is an error to this client.
                tls.client.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as sock,
            ):
                sock.sendall(b"secret\n" * 20000)
                received = b""
                while len(received) < 140_000:
                    received += sock.recv(2**16)
                plain_end = sock.unwrap  # tells the server that this was all
                plain_end()
                return received

        assert await asyncio.to_thread(ask_blocking) == b"SECRET\n" * 20000
        await settle(lambda: server.stats.completed == 1)
        assert seen == [(True, "TLSv1.3", None)]

        class Closes(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.sendall(b"bye")

        server.RequestHandlerClass = Closes

        def read_to_the_end() -> list[bytes]:
            with (
                socket.create_connection(server.sockets[0].getsockname()) as plain,
                tls.client.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as sock,
            ):
                return [sock.recv(10), sock.recv(10)]

        assert await asyncio.to_thread(read_to_the_end) == [b"bye", b""]
        await settle(lambda: server.stats.completed == 2)
        check_identity(server)


@pytest.mark.parametrize("peer", ["garbage", "silent", "gone", "stranger"])
async def test_a_failed_handshake_is_rejected_and_frees_its_thread(peer: str, tls: SimpleNamespace) -> None:
    limits, timeouts = aioecho.Limits(max_threads=1), aioecho.Timeouts(handshake=0.2 if peer == "silent" else 30)
    async with aioecho.serve(Upper, ANYWHERE, ssl=tls.mutual, limits=limits, timeouts=timeouts) as server:
        if peer == "stranger":
            with contextlib.suppress(OSError):  # it learns at its first read that it is not wanted
                await ask(server, b"x\n", ssl=tls.client, server_hostname="localhost")
        else:
            reader, writer = await open_to(server)
            if peer == "garbage":
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
            if peer != "gone":
                with contextlib.suppress(ConnectionError):
                    await reader.read()
            await close(writer)
        await settle(lambda: server.stats.rejected == 1)
        assert server.stats.reasons == {"handshake": 1}
        server.timeouts = aioecho.Timeouts()
        reader, writer = await open_to(server, ssl=tls.known_client, server_hostname="localhost")
        writer.write(b"x\n")
        assert await reader.readline() == b"X\n"
        await close(writer)
    check_identity(server)


@pytest.mark.parametrize("wraps", ["the server", "the handler"])
async def test_no_descriptor_is_closed_twice_where_there_is_none_left_to_wrap_with(
    wraps: str, tls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be another connection's by then."""

    class Wraps(Upper):
        def setup(self) -> None:
            if wraps == "the handler":
                self.request = tls.server.wrap_socket(self.request, server_side=True)
            super().setup()

        def finish(self) -> None:
            super().finish()
            self.request.close()

    def fail(descriptor: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    async with aioecho.serve(Wraps, ANYWHERE, ssl=tls.server if wraps == "the server" else None) as server:
        monkeypatch.setattr("os.dup", fail)
        if wraps == "the server":
            with contextlib.suppress(OSError):
                await open_to(server, ssl=tls.client, server_hostname="localhost")
            await settle(lambda: server.stats.reasons == {"handshake": 1})
            monkeypatch.undo()
        reader, writer = await open_to(server, ssl=tls.client, server_hostname="localhost")
        writer.write(b"x\n")
        assert await reader.readline() == b"X\n"
        await close(writer)
        await settle(lambda: not server.connections)
    check_identity(server)


# The pool


async def test_at_the_limit_clients_wait_for_a_thread_in_order() -> None:
    async with HeldServer(("127.0.0.1", 0), Held, limits=aioecho.Limits(max_threads=2)) as server:
        asking = [asyncio.create_task(ask(server, b"client %d" % n)) for n in range(7)]
        await server.has_entered(2)
        await settle(lambda: server.stats.active == 7)
        assert len(our_threads()) == 2
        assert not server.entered.acquire(blocking=False)
        check_identity(server)
        server.may_go_on.set()
        assert await asyncio.gather(*asking) == [b"CLIENT %d" % n for n in range(7)]
        await settle(lambda: not server.connections)
        assert len(our_threads()) == 2
        check_identity(server)


async def test_the_number_of_threads_may_be_changed_while_clients_wait() -> None:
    async with HeldServer(("127.0.0.1", 0), Held, limits=aioecho.Limits(max_threads=1)) as server:
        asking = [asyncio.create_task(ask(server, b"x")) for _ in range(6)]
        await server.has_entered()
        await settle(lambda: server.stats.active == 6)
        server.limits = aioecho.Limits(max_threads=3)
        await server.has_entered(2)
        server.limits = aioecho.Limits(max_threads=1)
        assert len(our_threads()) == 3
        assert not server.entered.acquire(blocking=False)
        server.may_go_on.set()
        assert await asyncio.gather(*asking) == [b"X"] * 6
        await settle(lambda: not server.connections)
        # Of the three threads no more than one is used from now on.
        server.may_go_on.clear()
        await server.has_entered(3)
        asking = [asyncio.create_task(ask(server, b"y")) for _ in range(2)]
        await server.has_entered()
        await settle(lambda: server.stats.active == 2)
        assert [connection.thread for connection in server.connections].count(None) == 1
        server.may_go_on.set()
        assert await asyncio.gather(*asking) == [b"Y"] * 2
    check_identity(server)


async def test_a_socket_that_can_not_be_made_blocking_is_closed_and_leaves_its_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inherited = socket.socket.setblocking

    def setblocking(self: socket.socket, flag: bool) -> None:
        if flag:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        inherited(self, flag)

    async with aioecho.serve(Upper, ANYWHERE, limits=aioecho.Limits(max_per_host=1)) as server:
        for is_refused in (True, True, False):
            with monkeypatch.context() as patch:
                if is_refused:
                    patch.setattr(socket.socket, "setblocking", setblocking)
                reader, writer = await open_to(server)
                writer.write(b"hello\n")
                with contextlib.suppress(ConnectionError):
                    assert await reader.readline() == (b"" if is_refused else b"HELLO\n")
            writer.close()
            await settle(lambda: not server.connections)
        assert (server.stats.completed, server.stats.rejected) == (1, 2)
        check_identity(server)
    assert "no connection with" in caplog.text


async def test_the_limits_of_connections_apply() -> None:
    limits = aioecho.Limits(max_per_host=2)
    async with HeldServer(("127.0.0.1", 0), Held, limits=limits) as server:
        held = [asyncio.create_task(ask(server, b"x")) for _ in range(2)]
        await server.has_entered(2)
        with socket.create_connection(server.server_address) as third:
            await settle(lambda: server.stats.rejected == 1)
            assert third.recv(1) == b""
        assert server.stats.reasons == {"per host": 1}
        server.may_go_on.set()
        assert await asyncio.gather(*held) == [b"X"] * 2
        await settle(lambda: not server.connections)
        assert await ask(server, b"y") == b"Y"
        check_identity(server)


@pytest.mark.parametrize("way", ["files", "a socket", "TLS"])
async def test_an_ended_connection_makes_one_record(
    way: str, tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    class Twice(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if way != "TLS":
                assert self.request.recv(1, socket.MSG_PEEK) == b"x"
            self.request.sendall(self.request.recv(100))
            self.request.send(b"\n")

    options = {"ssl": tls.client, "server_hostname": "localhost"} if way == "TLS" else {}
    with caplog.at_level(logging.DEBUG, "aioecho.connection"):
        async with aioecho.serve(
            Upper if way == "files" else Twice, ANYWHERE, ssl=tls.server if options else None
        ) as server:
            await ask(server, b"x\n", **options)
            await settle(lambda: not server.connections)
    [record] = [r for r in caplog.records if r.name == "aioecho.connection"]
    assert (record.outcome, record.reason) == ("completed", "finished")  # type: ignore[attr-defined]
    expected = {"files": (2, 2), "a socket": (2, 3), "TLS": (0, 0)}[way]
    assert (record.bytes_in, record.bytes_out) == expected  # type: ignore[attr-defined]
    assert f"{expected[0]} bytes in, {expected[1]} out" in record.getMessage()


async def test_one_who_leaves_while_waiting_for_a_thread_costs_nothing() -> None:
    async with HeldServer(("127.0.0.1", 0), Held, limits=aioecho.Limits(max_threads=1)) as server:
        first = asyncio.create_task(ask(server, b"a"))
        await server.has_entered()
        for _ in range(5):
            _, writer = await open_to(server)
            await close(writer)
        last = asyncio.create_task(ask(server, b"b"))
        server.may_go_on.set()
        assert await first == b"A"
        assert await last == b"B"
    assert server.stats.accepted == 7
    check_identity(server)


async def test_threads_are_used_again() -> None:
    names = set()

    class Names(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            names.add(threading.current_thread().name)

    async with aioecho.serve(Names, ANYWHERE) as server:
        for n in range(50):
            await ask(server, b"")
            await settle(lambda n=n: server.stats.completed == n + 1)  # type: ignore[misc]
    assert len(names) == 1


async def test_no_thread_to_be_had_is_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = threading.Thread.start

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with aioecho.serve(Upper, ANYWHERE) as server:
        monkeypatch.setattr(threading.Thread, "start", fail)
        assert await ask(server, b"x\n") == b""
        await settle(lambda: server.stats.rejected == 1)
        assert server.stats.reasons == {"no thread": 1}
        for _ in range(20):
            await ask(server, b"x\n")
        assert caplog.text.count("can't start new thread") <= 2  # and not each time: once a second
        monkeypatch.setattr(threading.Thread, "start", start)
        assert await ask(server, b"x\n") == b"X\n"
        # With one thread at work a second client waits for it, instead.
        monkeypatch.setattr(threading.Thread, "start", fail)
        replies = await asyncio.gather(ask(server, b"y\n"), ask(server, b"z\n"))
        assert replies == [b"Y\n", b"Z\n"]
        check_identity(server)
    assert "can't start new thread" in caplog.text


async def test_a_hundred_starts_and_stops_leave_no_thread() -> None:
    before = threading.active_count()
    for _ in range(100):
        async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
            with socket.create_connection(server.server_address) as sock:
                sock.sendall(b"x\n")
                sock.shutdown(socket.SHUT_WR)
        assert server.stats.completed == 1
        assert threading.active_count() == before


async def test_a_connection_leaves_no_reference_cycle() -> None:
    async with aioecho.serve(Upper, ANYWHERE) as server:
        await ask(server, b"warm\n")
        await settle(lambda: not server.connections)
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await ask(server, b"x\n")
            await settle(lambda: not server.connections)
            await settle()
            kinds = [type(each).__name__ for each in gc.get_objects()]
        finally:
            gc.enable()
        assert kinds.count("ThreadedConnection") <= 1  # the last one may still be on a thread's stack
        assert kinds.count("RequestSocket") <= 1


async def test_a_reply_is_written_at_once_though_more_requests_are_buffered() -> None:
    may_go_on = threading.Event()

    class Waits(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                if line == b"two\n":
                    may_go_on.wait(20)
                self.wfile.write(line.upper())

    async with aioecho.serve(Waits, ANYWHERE) as server:
        reader, writer = await open_to(server)
        writer.write(b"one\ntwo\n")
        assert await reader.readline() == b"ONE\n"
        may_go_on.set()
        assert await reader.readline() == b"TWO\n"
        await close(writer)


# Drain


async def test_a_drain_ends_those_who_wait_for_data() -> None:
    async with aioecho.serve(Upper, ANYWHERE) as server:
        reader, writer = await open_to(server)
        writer.write(b"one\n")
        assert await reader.readline() == b"ONE\n"
        report = await server.shutdown(grace=20)
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
        assert report.seconds < 5
        assert await reader.read() == b""
        await close(writer)
    check_identity(server)


async def test_a_request_that_came_before_the_drain_is_answered() -> None:
    async with HeldServer(("127.0.0.1", 0), Held, limits=aioecho.Limits(max_threads=2)) as server:
        working = [asyncio.create_task(ask(server, b"working")) for _ in range(2)]
        await server.has_entered(2)
        # Without a thread, and, the last one, still in the kernel's queue.
        waiting = [asyncio.create_task(ask(server, b"waiting")) for _ in range(5)]
        await settle(lambda: server.stats.active == 7)
        with socket.create_connection(server.sockets[0].getsockname()) as queued:
            queued.sendall(b"queued")
            stopping = asyncio.create_task(server.shutdown(grace=20))
            await settle(lambda: not server.is_serving())
            server.may_go_on.set()
            report = await stopping
            assert queued.recv(10) == b"QUEUED"
        assert await asyncio.gather(*working, *waiting) == [b"WORKING"] * 2 + [b"WAITING"] * 5
        assert (report.completed, report.cancelled, report.aborted) == (8, 0, 0)
    check_identity(server)


@pytest.mark.parametrize("has_tls", [False, True])
async def test_a_drain_loses_no_reply_to_what_a_handler_has_not_read(has_tls: bool, tls: SimpleNamespace) -> None:
    class Large(Held):
        def handle(self) -> None:
            assert self.request.recv(4) == b"give"
            self.server.entered.release()  # type: ignore[attr-defined]
            self.server.may_go_on.wait(30)  # type: ignore[attr-defined]
            self.request.sendall(b"x" * 500_000)

    def receive_all(sock: socket.socket) -> int:
        received = 0
        while chunk := sock.recv(2**16):
            received += len(chunk)
        return received

    async with HeldServer(("127.0.0.1", 0), Large, ssl=tls.server if has_tls else None) as server:
        with socket.socket() as plain:
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)  # so that most of it waits at the server
            await asyncio.to_thread(plain.connect, server.server_address)
            sock = plain
            if has_tls:
                sock = await asyncio.to_thread(tls.client.wrap_socket, plain, server_hostname="localhost")
            with sock:
                sock.sendall(b"give")
                await server.has_entered()
                sock.sendall(b", and more")
                stopping = asyncio.create_task(server.shutdown(20))
                [connection] = server.connections
                await settle(lambda: connection._has_shut_reading or connection._is_draining)
                server.may_go_on.set()
                report = await stopping
                assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
                assert await asyncio.to_thread(receive_all, sock) == 500_000
    check_identity(server)


async def test_at_the_end_of_the_grace_both_sides_are_shut() -> None:
    class Floods(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while True:
                self.request.sendall(b"x" * 100_000)

    async with aioecho.serve(Floods, ANYWHERE, limits=aioecho.Limits(max_threads=2)) as server:
        clients = [socket.create_connection(server.sockets[0].getsockname()) for _ in range(4)]
        await settle(lambda: server.stats.active == 4)
        report = await server.shutdown(grace=0.2)
        # Two in sendall(), which fails; two that never had a thread.
        assert (report.completed, report.cancelled, report.aborted) == (0, 4, 0)
        assert server.stats.reasons == {"cancelled": 4}
        for sock in clients:
            sock.close()
    check_identity(server)


async def test_a_thread_that_does_not_return_is_named_with_its_stack(caplog: pytest.LogCaptureFixture) -> None:
    async with HeldServer(("127.0.0.1", 0), Held) as server:
        asking = asyncio.create_task(ask(server, b"x"))
        await server.has_entered()
        report = await server.shutdown(grace=0)
        assert (report.completed, report.cancelled, report.aborted) == (0, 0, 1)
        assert report.seconds < 5
        assert await asking == b""
    [record] = [r for r in caplog.records if r.name == "aioecho.threads"]
    text = record.getMessage()
    assert record.levelno == logging.ERROR
    assert "aioecho-1" in text
    assert "in handle" in text
    assert "self.server.may_go_on.wait(30)" in text
    check_identity(server)
    server.may_go_on.set()  # when it returns after all, it is counted, and its thread ends
    await settle(lambda: not our_threads())
    await settle(lambda: not server.connections)
    check_identity(server)


STUCK = """
import asyncio, socket, socketserver, threading, time
import aioecho

class Stuck(socketserver.BaseRequestHandler):
    def handle(self):
        print("at work", flush=True)
        while True:
            time.sleep(1000)

async def main():
    async with aioecho.serve(Stuck, "tcp://127.0.0.1:0", grace=0.1) as server:
        sock = socket.create_connection(server.sockets[0].getsockname())
        while not server.connections or not any(c.thread for c in server.connections):
            await asyncio.sleep(0.01)
    print(sock.recv(10), flush=True)

asyncio.run(main())
"""


def test_a_stuck_thread_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    with Program(sys.executable, "stuck.py", cwd=tmp_path) as program:
        code, output, errors = program.end()
    assert code == 0
    assert output.splitlines() == [b"at work", b"b''"]
    assert "time.sleep(1000)" in errors


async def test_a_drain_reaches_tls(tls: SimpleNamespace) -> None:
    async with aioecho.serve(Upper, ANYWHERE, ssl=tls.server) as server:
        reader, writer = await open_to(server, ssl=tls.client, server_hostname="localhost")
        writer.write(b"one\n")
        assert await reader.readline() == b"ONE\n"
        report = await server.shutdown(grace=20)
        assert report.completed == 1
        assert report.seconds < 5
        assert await reader.read() == b""
        await close(writer)
    check_identity(server)


async def test_a_client_that_a_drain_meets_in_its_handshake_has_time_to_speak(
    tls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioecho.blocking.streams.FRESH", 0.5)

    def shake_hands_and_ask(plain: socket.socket) -> bytes:
        with tls.client.wrap_socket(plain, server_hostname="localhost") as sock:
            time.sleep(0.05)  # the server's handshake is over by then
            sock.sendall(b"x\n")
            return sock.recv(10)

    async with aioecho.serve(Upper, ANYWHERE, ssl=tls.server) as server:
        with socket.create_connection(server.sockets[0].getsockname()) as plain:
            await settle(lambda: server.connections)
            [connection] = server.connections
            await settle(lambda: asyncio.get_running_loop().time() - connection.since > 0.5)
            stopping = asyncio.create_task(server.shutdown(20))
            await settle(lambda: not server.is_serving())
            await settle()
            with within(0.5):
                assert await asyncio.to_thread(shake_hands_and_ask, plain) == b"X\n"
        report = await stopping
        assert (report.completed, report.seconds < 5) == (1, True)
    check_identity(server)


async def test_a_drain_reaches_a_handler_that_wraps_its_socket_itself(tls: SimpleNamespace) -> None:
    class Wraps(Upper):
        def setup(self) -> None:
            self.request = tls.server.wrap_socket(self.request, server_side=True)
            super().setup()

        def finish(self) -> None:
            super().finish()
            self.request.close()

    async with aioecho.serve(Wraps, ANYWHERE) as server:
        reader, writer = await open_to(server, ssl=tls.client, server_hostname="localhost")
        writer.write(b"one\n")
        assert await reader.readline() == b"ONE\n"
        report = await server.shutdown(grace=20)
        assert report.completed == 1
        assert report.seconds < 5
        with contextlib.suppress(ssl.SSLError, ConnectionError):  # it ends TLS no better than under socketserver
            await reader.read()
        await close(writer)
    check_identity(server)


async def test_a_handler_may_shut_its_server_down() -> None:
    class Stops(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(10)
            self.server.shutdown()
            self.request.sendall(b"stopping")

    server = aioecho.TCPServer(("127.0.0.1", 0), Stops)
    await server.start()
    serving = asyncio.create_task(server.serve_forever())
    assert await ask(server, b"x") == b"stopping"
    await serving
    assert server.stats.completed == 1
    check_identity(server)


async def test_a_handlers_server_is_the_server() -> None:
    class Looks(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data = self.request.recv(10)
            assert isinstance(self.server, aioecho.TCPServer)
            assert self.server == server
            assert len({self.server, server}) == 1
            self.server.latest = data  # type: ignore[attr-defined]
            assert self.server.server_address == server.server_address
            self.request.sendall(repr(self.server).encode())

    async with aioecho.TCPServer(("127.0.0.1", 0), Looks) as server:
        assert await ask(server, b"x") == repr(server).encode()
        assert server.latest == b"x"  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["a helper", "run_coroutine_threadsafe"])
async def test_a_handlers_helper_may_shut_its_server_down(way: str) -> None:
    reports: list[Any] = []

    class Stops(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(10)
            if way == "a helper":  # as it has to be done under socketserver, where to wait here would be for ever
                helper = threading.Thread(target=self.server.shutdown)
                helper.start()
                helper.join()
            else:
                waiting = asyncio.run_coroutine_threadsafe(server.shutdown(5), loop)
                waiting.add_done_callback(lambda done: reports.append(done.result()))
            self.request.sendall(b"stopping")

    loop = asyncio.get_running_loop()
    server = aioecho.TCPServer(("127.0.0.1", 0), Stops)
    await server.start()
    serving = asyncio.create_task(server.serve_forever())
    assert await ask(server, b"x") == b"stopping"
    await serving
    assert server.stats.completed == 1
    check_identity(server)
    # When all is over, too.
    report = await asyncio.to_thread(lambda: asyncio.run(server.shutdown()))
    assert report == await server.shutdown()
    if way != "a helper":
        await settle(lambda: reports)
        assert reports == [report]


async def test_a_verification_that_hangs_is_cut_off() -> None:
    class Hangs(aioecho.TCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:  # type: ignore[override]
            await asyncio.Event().wait()
            return True

    async with Hangs(("127.0.0.1", 0), Upper) as server:
        asking = asyncio.create_task(ask(server, b"x\n"))
        await settle(lambda: server.connections)
        report = await server.shutdown(grace=0)
        assert (report.completed, report.cancelled, report.aborted) == (0, 1, 0)
        with contextlib.suppress(ConnectionError):
            assert await asking == b""
    check_identity(server)


@pytest.mark.parametrize("kind", ["stream", "datagram"])
async def test_a_verification_has_a_deadline(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def hang(*_: Any) -> bool:
        await asyncio.Event().wait()
        return True

    class Answer(socketserver.DatagramRequestHandler):
        pass

    timeouts = aioecho.Timeouts(handshake=0.1) if kind == "stream" else aioecho.Timeouts(datagram_handler=0.1)
    endpoint = "tcp://127.0.0.1:0" if kind == "stream" else "udp://127.0.0.1:0"
    server = aioecho.serve(Upper if kind == "stream" else Answer, endpoint, timeouts=timeouts)
    server.verify_request = hang  # type: ignore[method-assign]
    async with server:
        if kind == "stream":
            with contextlib.suppress(ConnectionError):
                assert await ask(server, b"x\n") == b""
        else:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", server.server_address)
        reason = "handshake" if kind == "stream" else "datagram_handler"
        await settle(lambda: server.stats.reasons[reason] == 1)
        assert not server.connections
        check_identity(server)
    assert "verify_request() took longer than 0.1 seconds" in caplog.text


async def test_abort_cuts_off_a_connection() -> None:
    async with aioecho.serve(Upper, ANYWHERE) as server:
        reader, writer = await open_to(server)
        writer.write(b"one\n")
        assert await reader.readline() == b"ONE\n"
        [connection] = server.connections
        assert "aioecho-1" in repr(connection)
        connection.abort()
        assert await reader.read() == b""
        await settle(lambda: server.stats.cancelled == 1)
        connection.abort()
        check_identity(server)
        await close(writer)


# Datagrams


class UpperDatagram(socketserver.DatagramRequestHandler):
    timeouts = (1, 2)  # its own, and nothing of ours

    def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())


async def settle_stats(server: aioecho.DatagramServer, condition: Any) -> None:
    await settle(lambda: condition(server.stats))
    stats = server.stats
    assert stats.received == stats.handled + stats.queued + sum(stats.drops.values())
    assert stats.accepted == stats.active + stats.completed + stats.failed + stats.cancelled + stats.rejected


def peer_of(server: aioecho.DatagramServer) -> socket.socket:
    sock = socket.socket(server.sockets[0].family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


async def receive(sock: socket.socket) -> bytes:
    received: list[bytes] = []

    def try_it() -> bool:
        with contextlib.suppress(BlockingIOError):
            received.append(sock.recv(2**16))
        return bool(received)

    await settle(try_it)
    return received[0]


async def test_a_handler_may_use_its_servers_socket() -> None:
    class Replies(socketserver.BaseRequestHandler):
        server: Any

        def handle(self) -> None:
            if isinstance(self.request, tuple):
                self.server.socket.sendto(self.request[0].upper(), self.client_address)
            else:
                self.request.sendall(b"%d" % self.server.socket.getsockname()[1])

    async with aioecho.UDPServer(("127.0.0.1", 0), Replies) as server:
        with peer_of(server) as sock:
            sock.sendto(b"x", server.server_address)
            assert await receive(sock) == b"X"
    assert server.socket.fileno() == -1
    async with aioecho.TCPServer(("127.0.0.1", 0), Replies) as tcp:
        assert await ask(tcp, b"") == b"%d" % tcp.server_address[1]


@pytest.mark.parametrize("host", ["127.0.0.1", ""])
async def test_a_datagram_handler_runs_unmodified(host: str, tmp_path: Path) -> None:
    async with aioecho.UDPServer((host, 0), UpperDatagram) as server:
        with peer_of(server) as sock:
            # On every address it replies from the one that was asked, else a connected peer would not see it.
            sock.connect(("127.0.0.1" if sock.family == socket.AF_INET else "::1", server.server_address[1]))
            for n in range(3):
                sock.send(b"hello %d" % n)
                assert await receive(sock) == b"HELLO %d" % n
        await settle_stats(server, lambda stats: stats.completed == 3)
        assert len(our_threads()) <= 3
    async with aioecho.serve(UpperDatagram, f"unixgram:{tmp_path / 'socket'}") as unix:
        with peer_of(unix) as sock:
            sock.bind(str(tmp_path / "peer"))
            sock.sendto(b"unix", str(tmp_path / "socket"))
            assert await receive(sock) == b"UNIX"


async def test_a_handler_that_sets_its_sockets_timeout_does_not_make_the_loop_wait() -> None:
    class Patient(UpperDatagram):
        def setup(self) -> None:
            super().setup()
            assert self.socket.gettimeout() == 1  # Timeouts.send
            self.socket.setblocking(False)
            self.socket.settimeout(5)
            assert self.socket.gettimeout() == 5

    async with aioecho.UDPServer(("127.0.0.1", 0), Patient) as server:
        with peer_of(server) as sock:
            for _ in range(2):
                sock.sendto(b"x", server.server_address)
                assert await receive(sock) == b"X"
        assert server.sockets[0].gettimeout() == 0


async def test_datagrams_beyond_the_threads_wait_and_beyond_the_queue_are_dropped() -> None:
    may_go_on = threading.Event()

    class Waits(UpperDatagram):
        def handle(self) -> None:
            may_go_on.wait(30)
            super().handle()

    limits = aioecho.Limits(max_threads=2, max_queue=3)
    async with aioecho.UDPServer(("127.0.0.1", 0), Waits, limits=limits) as server:
        with peer_of(server) as sock:
            for n in range(7):
                sock.sendto(b"x%d" % n, server.server_address)
            await settle_stats(server, lambda stats: stats.received == 7)
            assert server.stats.drops == {"queue full": 2}
            assert server.stats.active == 5
            assert len(our_threads()) == 2
            may_go_on.set()
            assert {await receive(sock) for _ in range(5)} == {b"X%d" % n for n in range(5)}
        await settle_stats(server, lambda stats: stats.completed == 5)


@pytest.mark.timed
@pytest.mark.parametrize("send", [0.2, None])
async def test_a_peer_that_takes_no_replies_is_waited_for_in_vain_or_until_it_does(
    send: float | None, tmp_path: Path
) -> None:
    sent, ends = threading.Semaphore(0), []

    class Floods(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            began, used = time.monotonic(), time.thread_time()
            try:
                for _ in range(1000):  # more than any queue of a Unix socket takes
                    self.socket.sendto(b"x", self.client_address)
                    sent.release()
            except TimeoutError as error:
                ends.append(error)
            waited = time.monotonic() - began
            assert time.thread_time() - used < 0.5 * waited or waited < 0.1  # it does not spin

        def finish(self) -> None:
            pass

    timeouts = aioecho.Timeouts(send=send)
    async with aioecho.serve(Floods, f"unixgram:{tmp_path / 'socket'}", timeouts=timeouts) as server:
        with peer_of(server) as sock:
            sock.bind(str(tmp_path / "peer"))
            sock.sendto(b"flood", str(tmp_path / "socket"))
            await settle(lambda: sent.acquire(blocking=False))
            if send is None:
                for _ in range(1000):
                    assert await receive(sock) == b"x"
            await settle_stats(server, lambda stats: stats.completed == 1)
    assert [str(end) for end in ends] == (["the socket has no room for a reply"] if send is not None else [])


async def test_a_stopping_server_serves_the_datagrams_that_have_come() -> None:
    entered, may_go_on = threading.Event(), threading.Event()

    class Waits(UpperDatagram):
        def handle(self) -> None:
            entered.set()
            may_go_on.wait(30)
            super().handle()

    async with aioecho.UDPServer(("127.0.0.1", 0), Waits, limits=aioecho.Limits(max_threads=1)) as server:
        with peer_of(server) as sock:
            for n in range(3):
                sock.sendto(b"x%d" % n, server.server_address)
            await settle(entered.is_set)
            stopping = asyncio.create_task(server.shutdown(20))
            await settle(lambda: not server.is_serving())
            may_go_on.set()
            report = await stopping
            assert (report.completed, report.cancelled, report.aborted) == (3, 0, 0)
            assert {await receive(sock) for _ in range(3)} == {b"X0", b"X1", b"X2"}
    assert server.stats.completed == 3


async def test_datagrams_that_get_no_thread_in_time_were_not_handled() -> None:
    entered, may_go_on = threading.Event(), threading.Event()

    class Waits(UpperDatagram):
        def handle(self) -> None:
            entered.set()
            may_go_on.wait(30)

    async with aioecho.UDPServer(("127.0.0.1", 0), Waits, limits=aioecho.Limits(max_threads=1)) as server:
        with peer_of(server) as sock:
            for _ in range(3):
                sock.sendto(b"x", server.server_address)
            await settle(entered.is_set)
            await settle(lambda: server.stats.received == 3)
        stopping = asyncio.create_task(server.shutdown(0))
        await settle(lambda: server.stats.active == 1)
        may_go_on.set()
        await stopping
        await settle_stats(server, lambda stats: stats.cancelled == 3)
        assert server.stats.drops == {"stopped": 2}
        assert server.stats.handled == 1


async def test_a_reply_waits_for_room_in_its_peers_queue_and_not_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, patient = str(tmp_path / "peer"), aioecho.Timeouts(send=10)
    async with aioecho.serve(UpperDatagram, f"unixgram:{tmp_path / 'socket'}", timeouts=patient) as server:
        with peer_of(server) as sock:
            sock.bind(path)
            queued = fill(path)
            sock.sendto(b"unix", str(tmp_path / "socket"))
            await settle_stats(server, lambda stats: stats.active == 1)
            assert [await receive(sock) for _ in range(queued + 1)][-1] == b"UNIX"
            await settle_stats(server, lambda stats: stats.completed == 1)
    os.unlink(path)
    hasty = aioecho.Timeouts(send=0.05)
    async with aioecho.serve(UpperDatagram, f"unixgram:{tmp_path / 'socket'}", timeouts=hasty, grace=0) as server:
        with peer_of(server) as sock:
            sock.bind(path)
            fill(path)
            sock.sendto(b"unix", str(tmp_path / "socket"))
            await settle_stats(server, lambda stats: stats.failed == 1)
    assert "TimeoutError: the socket has no room for a reply" in caplog.text


async def test_a_datagram_can_be_refused_and_its_handler_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    class Fails(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            raise ValueError("no")

    class Picky(aioecho.UDPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            data, _ = request
            return bool(data != b"foe")

    async with Picky(("127.0.0.1", 0), Fails) as server:
        with peer_of(server) as sock:
            sock.sendto(b"foe", server.server_address)
            sock.sendto(b"friend", server.server_address)
            await settle_stats(server, lambda stats: stats.failed == stats.rejected == 1)
        assert server.stats.drops == {"refused": 1}
    assert "ValueError: no" in caplog.text


def test_a_handler_of_the_other_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="UpperDatagram is a handler of datagrams"):
        aioecho.serve(UpperDatagram, ANYWHERE)
    with pytest.raises(TypeError, match="Upper is a handler of streams"):
        aioecho.serve(functools.partial(Upper), "udp://127.0.0.1:0")


# Side by side


async def test_async_and_blocking_handlers_serve_side_by_side(tmp_path: Any) -> None:
    path = tmp_path / "socket"
    handlers = {AsyncUpper: ANYWHERE, Upper: [ANYWHERE, f"unix:{path}"], functools.partial(Echo): (ANYWHERE,)}
    async with aioecho.serve(handlers, limits=aioecho.Limits(max_connections=5)) as server:
        assert len(server.names) == 4
        for index, expected in enumerate([b"X\n", b"X\n", None, b"x\n"]):
            if expected is not None:
                assert await ask(server.sockets[index].getsockname(), b"x\n") == expected
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b"x\n")
        assert await reader.readline() == b"X\n"
        await settle(lambda: server.stats.completed == 3)
        check_identity(server)
        # One set of limits, one drain.
        others = [await open_to(server, index) for index in (0, 1, 3, 0, 1, 3)]
        await settle(lambda: server.stats.active == 5)
        await settle()
        assert server.stats.active == 5
        report = await server.shutdown(grace=20)
        assert report.completed == 7  # the two that waited for a place too
        assert report.seconds < 10
        for _, each in [(reader, writer), *others]:
            await close(each)
    check_identity(server)


def test_endpoints_are_given_once() -> None:
    with pytest.raises(TypeError, match="endpoints of several handler classes"):
        aioecho.serve({AsyncUpper: ANYWHERE}, ANYWHERE)
    with pytest.raises(ValueError, match="bad endpoint 'nonsense'"):
        aioecho.serve({AsyncUpper: "nonsense"})
    with pytest.raises(ValueError, match="needs an endpoint"):
        aioecho.serve({})
    with pytest.raises(TypeError, match="must be callable"):
        aioecho.serve({3: ANYWHERE})  # type: ignore[dict-item]


# What it is for


BESIDE = """
import asyncio, signal, socketserver, sys, time
import aioecho
from aioecho.echo import Echo
from aioecho.runtime.loops import loop_factory

class Blocking(socketserver.BaseRequestHandler):
    def handle(self):
        if self.request.recv(1) == b"s":
            while not self.server.is_draining:
                time.sleep(0.005)
            self.request.sendall(b"s")  # a stop waits for the answer
        while data := self.request.recv(2**16):
            self.request.sendall(data)

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with aioecho.serve({Echo: "tcp://127.0.0.1:0", Blocking: "tcp://127.0.0.1:0"}) as server:
        print(*server.names, flush=True)
        while server.stats.active < 1032:
            await asyncio.sleep(0.01)
        lags = []
        while not stop.is_set():
            began = time.perf_counter()
            await asyncio.sleep(0.005)
            lags.append(time.perf_counter() - began - 0.005)
        report = await server.shutdown(20)
    print(sorted(lags)[int(len(lags) * 0.99)], len(lags), report.completed, server.stats.accepted)

asyncio.Runner(loop_factory=loop_factory(sys.argv[1])).run(main())
"""


@pytest.mark.exclusive
@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_loop_answers_beside_handlers_that_sleep_or_do_io(loop: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(BESIDE)
    seconds = 1

    async def client(address: tuple[str, int], first: bytes, pause: float, stop: asyncio.Event) -> int:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(first)
        count = 0
        while first != b"s" and not stop.is_set():
            writer.write(b"x" * 64)
            assert await reader.readexactly(64) == b"x" * 64
            count += 1
            await asyncio.sleep(pause)
        assert await reader.read() == (first if first == b"s" else b"")
        await close(writer)
        return count

    async def clients(addresses: list[tuple[str, int]], server: Program) -> list[int]:
        stop = asyncio.Event()
        running = [asyncio.create_task(client(addresses[0], b"", 0.5, stop)) for _ in range(1000)]
        running += [asyncio.create_task(client(addresses[1], first, 0.005, stop)) for first in [b"s", b"i"] * 16]
        await asyncio.sleep(seconds)  # the time that is measured
        stop.set()
        await asyncio.sleep(0.6)
        server.signal()
        return await asyncio.gather(*running)

    with Program(sys.executable, "beside.py", loop, cwd=tmp_path) as server:
        addresses = [("127.0.0.1", int(name.rpartition(":")[2])) for name in server.line().split()]
        counts = asyncio.run(clients(addresses, server))
        lag, samples, completed, accepted = map(float, server.line().split())
        assert server.wait() == 0
        assert server.stderr() == ""
    assert (completed, accepted) == (1032, 1032)
    in_time(seconds / samples, 0.04, "a turn of the loop")
    in_time(seconds / (min(counts[:1000]) + 1), 0.6, "a request every half second")
    in_time(lag, 0.02, "99 of 100 turns of the loop")


class Slow(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        data = self.request.recv(1024)
        time.sleep(0.2)  # the seed has 2 s
        self.request.sendall(data.upper())


class AsyncSlow(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        data = await self.reader.read(1024)
        await asyncio.sleep(0.2)
        await self.send(data.upper())


@pytest.mark.timed
@pytest.mark.slow  # in debug mode a hundred clients take half a second of the processor
@pytest.mark.parametrize(
    ("kind", "threads", "clients", "rounds"), [(Slow, 50, 50, 1), (Slow, 10, 50, 5), (AsyncSlow, 1, 100, 1)]
)
async def test_slow_handlers_take_as_many_rounds_as_there_are_threads(
    kind: Any, threads: int, clients: int, rounds: int
) -> None:
    async with aioecho.serve(kind, ANYWHERE, limits=aioecho.Limits(max_threads=threads)) as server:
        # In less it can not be done. One after the other they would take 10 s and 20 s.
        began = time.monotonic()
        assert await asyncio.gather(*(ask(server, b"x") for _ in range(clients))) == [b"X"] * clients
        took = time.monotonic() - began
    assert took >= 0.2 * rounds
    in_time(took, 0.4 * rounds + 1)
