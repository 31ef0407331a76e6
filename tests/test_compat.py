"""socketserver's names over our engine: CPython's own tests, and what its servers gain."""

import asyncio
import contextlib
import gc
import http.client
import http.server
import io
import logging
import os
import signal
import socket
import socketserver as stdlib
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from helpers import skip_without
from programs import Program, connect, read_line

import aioecho
from aioecho.compat import socketserver

SWAPPED = """
import sys, unittest
from aioecho.compat import socketserver
sys.modules["socketserver"] = socketserver
import test.support
test.support.use_resources = ["network"]
import test.test_socketserver as theirs
assert theirs.socketserver is socketserver
suite = unittest.defaultTestLoader.loadTestsFromModule(theirs)
assert suite.countTestCases() > 20
result = unittest.TextTestRunner(verbosity=2).run(suite)
sys.exit(not result.wasSuccessful())
"""


def test_cpythons_own_tests_pass_with_the_module_swapped_in() -> None:
    skip_without("test.test_socketserver")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SWAPPED], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr
    assert "test_ThreadingTCPServer" in done.stderr
    # What is skipped is skipped for the platform's sake.
    assert "skipped" not in done.stderr


def test_every_public_name_is_there_and_has_the_same_attributes() -> None:
    assert socketserver.__all__ == stdlib.__all__
    for name in stdlib.__all__:
        ours, theirs = getattr(socketserver, name), getattr(stdlib, name)
        missing = {each for each in dir(theirs) if not hasattr(ours, each)}
        assert not missing, f"{name} lacks {missing}"
        if "Threading" in name:
            for each in ("allow_reuse_address", "request_queue_size", "timeout", "daemon_threads", "block_on_close"):
                assert getattr(ours, each, None) == getattr(theirs, each, None)
            assert issubclass(ours, stdlib.ThreadingMixIn)
        else:
            assert ours is theirs


class Upper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


@contextlib.contextmanager
def serving(server: Any, **options: Any) -> Iterator[Any]:
    """Serve in a thread, the whole of it as socketserver's users write it."""
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            server.serve_forever(**options)
        except BaseException as error:
            errors.append(error)

    with server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(20)
            assert not thread.is_alive()
            assert not errors
    assert server.socket.fileno() == -1


def ask(server: Any, request: bytes) -> bytes:
    with socket.socket(server.address_family) as sock:
        sock.settimeout(20)
        sock.connect(server.server_address)
        sock.sendall(request)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(2**16), b""))


@pytest.fixture(autouse=True)
def threads_are_back() -> Iterator[None]:
    before = threading.active_count()
    yield
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def settle(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come about"
        time.sleep(0.005)


# What stays as it is


def test_a_threading_server_serves_on_the_engine(tmp_path: Path) -> None:
    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Upper)) as server:
        assert ask(server, b"x\n") == b"X\n"
        settle(lambda: server.aioecho_server.stats.completed == 1)
    with serving(socketserver.ThreadingUnixStreamServer(str(tmp_path / "socket"), Upper)) as server:
        assert ask(server, b"x\n") == b"X\n"
        assert server.aioecho_server.stats.accepted == 1
    assert (tmp_path / "socket").exists()  # it is not removed, as under socketserver


def test_it_may_serve_again_and_handle_single_requests() -> None:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Upper) as server:
        for _ in range(2):
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            assert ask(server, b"x\n") == b"X\n"
            server.shutdown()
            thread.join()
            assert server.socket.gettimeout() is None
            assert os.get_blocking(server.fileno())
        with socket.create_connection(server.server_address) as sock:
            sock.sendall(b"y\n")
            server.handle_request()
            assert sock.recv(10) == b"Y\n"
        server.timeout = 0.01
        timed_out: list[int] = []
        server.handle_timeout = lambda: timed_out.append(1)  # type: ignore[method-assign]
        server.handle_request()
        assert timed_out == [1]


def test_the_hooks_are_called_as_by_socketserver() -> None:
    calls: list[Any] = []
    threads = {}

    class Hooks(socketserver.ThreadingTCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            calls.append("verify_request")
            threads["verify_request"] = threading.current_thread()
            if calls.count("verify_request") == 3:
                raise ValueError("verify_request")
            return calls.count("verify_request") != 2

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            calls.append("process_request_thread")
            super().process_request_thread(request, client_address)

        def finish_request(self, request: Any, client_address: Any) -> None:
            calls.append("finish_request")
            threads["finish_request"] = threading.current_thread()
            super().finish_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            calls.append("shutdown_request")
            super().shutdown_request(request)

        def close_request(self, request: Any) -> None:
            calls.append("close_request")
            super().close_request(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            calls.append(f"handle_error: {sys.exception()!r}")

        def service_actions(self) -> None:
            calls.append("service_actions")

    with serving(Hooks(("127.0.0.1", 0), Upper), poll_interval=0.01) as server:
        main = threading.current_thread()
        assert ask(server, b"x\n") == b"X\n"
        settle(lambda: server.aioecho_server.stats.completed == 1)
        settle(lambda: "service_actions" in calls)
        calls[:] = [call for call in calls if call != "service_actions"]
        assert calls == [
            "verify_request",
            "process_request_thread",
            "finish_request",
            "shutdown_request",
            "close_request",
        ]
        assert ask(server, b"x\n") == b""
        settle(lambda: server.aioecho_server.stats.rejected == 1)
        assert ask(server, b"x\n") == b""
        settle(lambda: server.aioecho_server.stats.rejected == 2)
        assert [call for call in calls[5:] if call != "service_actions"] == [
            "verify_request",
            "shutdown_request",
            "close_request",
            "verify_request",
            "handle_error: ValueError('verify_request')",
            "shutdown_request",
            "close_request",
        ]
        assert main not in threads.values()
        assert threads["finish_request"].daemon
        assert not threads["verify_request"].daemon  # that of serve_forever()


@pytest.mark.parametrize("hook", ["as it is", "raises", "replies"])
def test_an_error_is_handled_in_its_thread_and_counted(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)

    class Bad(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            raise ValueError("in handle")

    class Server(socketserver.ThreadingTCPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            if hook == "as it is":
                super().handle_error(request, client_address)
            elif hook == "replies":
                request.sendall(b"sorry")
            else:
                raise

    with serving(Server(("127.0.0.1", 0), Bad)) as server:
        assert ask(server, b"") == (b"sorry" if hook == "replies" else b"")
        settle(lambda: server.aioecho_server.stats.failed == 1)
    assert ("ValueError: in handle" in stderr.getvalue()) == (hook == "as it is")
    assert [each.exc_type for each in ended] == ([ValueError] if hook == "raises" else [])


@pytest.mark.parametrize("name", ["process_request_thread", "shutdown_request"])
def test_what_a_hook_raises_in_a_requests_thread_is_reported_and_counted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)

    def fail(self: Any, *arguments: Any) -> None:
        raise ValueError(name)

    kind = type("Fails", (socketserver.ThreadingTCPServer,), {name: fail})
    with serving(kind(("127.0.0.1", 0), Upper)) as server:
        assert ask(server, b"x\n") == (b"X\n" if name == "shutdown_request" else b"")
        settle(lambda: server.aioecho_server.stats.failed == 1)
    assert [str(each.exc_value) for each in ended] == [name]


@pytest.mark.parametrize("way", ["shutdown_request", "close_request", "process_request_thread", "verify_request"])
def test_a_connection_that_the_hooks_leave_open_is_the_programs(way: str) -> None:
    # As ws4py's WSGIServer does, whose manager serves the connections that have become WebSockets.
    kept: list[socket.socket] = []

    class Greets(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"hello ")
            kept.append(self.request)

    class Keeps(socketserver.ThreadingTCPServer):
        if way == "shutdown_request":

            def shutdown_request(self, request: Any) -> None:
                pass

        elif way == "close_request":

            def shutdown_request(self, request: Any) -> None:
                self.close_request(request)

            def close_request(self, request: Any) -> None:
                pass

        elif way == "process_request_thread":

            def process_request_thread(self, request: Any, client_address: Any) -> None:
                self.finish_request(request, client_address)

        else:

            def verify_request(self, request: Any, client_address: Any) -> bool:
                request.sendall(b"hello ")
                kept.append(request)
                return False

            def shutdown_request(self, request: Any) -> None:
                pass

    with serving(Keeps(("127.0.0.1", 0), Greets)) as server:
        sock = connect("tcp://{}:{}".format(*server.server_address))
        assert sock.recv(6, socket.MSG_WAITALL) == b"hello "
        settle(lambda: server.aioecho_server.stats.active == 0)
        stats = server.aioecho_server.stats
        assert (stats.rejected if way == "verify_request" else stats.completed) == 1
        (request,) = kept
        sock.sendall(b"ping")
        assert request.recv(4, socket.MSG_WAITALL) == b"ping"
    request.sendall(b"pushed")  # also after the stop
    assert sock.recv(6, socket.MSG_WAITALL) == b"pushed"
    request.close()
    assert sock.recv(1) == b""
    sock.close()


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_connection_that_nobody_keeps_is_closed_though_no_hook_has() -> None:
    class Forgets(socketserver.ThreadingTCPServer):
        def shutdown_request(self, request: Any) -> None:
            pass

    with (
        serving(Forgets(("127.0.0.1", 0), Upper)) as server,
        connect("tcp://{}:{}".format(*server.server_address)) as sock,
    ):
        sock.sendall(b"x\n")
        assert read_line(sock) == b"X\n"
        sock.shutdown(socket.SHUT_WR)
        settle(lambda: server.aioecho_server.stats.completed == 1)
        gc.collect()
        assert sock.recv(1) == b""


def test_a_listening_socket_with_tls_and_a_hook_that_may_keep_is_the_standard_librarys(tls: SimpleNamespace) -> None:
    kept: list[ssl.SSLSocket] = []

    class Keeps(socketserver.ThreadingTCPServer):
        def shutdown_request(self, request: Any) -> None:
            kept.append(request)

    server = Keeps(("127.0.0.1", 0), Upper)
    server.socket = tls.server.wrap_socket(server.socket, server_side=True)
    with serving(server, poll_interval=0.01):
        plain = socket.create_connection(server.server_address, timeout=30)
        with tls.client.wrap_socket(plain, server_hostname="localhost") as sock:
            sock.sendall(b"x\n")
            assert sock.recv(10) == b"X\n"
            plain.close()
            sock.shutdown(socket.SHUT_WR)
            settle(lambda: kept)
        assert server.aioecho_server is None
        kept[0].close()


def test_service_actions_may_be_an_attribute() -> None:
    called = threading.Event()
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Upper)
    server.service_actions = called.set  # type: ignore[method-assign]
    with serving(server, poll_interval=0.01):
        assert called.wait(10)


def test_what_service_actions_raises_ends_serve_forever() -> None:
    class Ends(socketserver.ThreadingTCPServer):
        def service_actions(self) -> None:
            raise ValueError("enough")

    with Ends(("127.0.0.1", 0), Upper) as server:
        with pytest.raises(ValueError, match="enough"):
            server.serve_forever(poll_interval=0.01)
        server.shutdown()  # returns


@pytest.mark.parametrize("name", ["process_request", "get_request", "fileno"])
def test_a_class_with_a_hook_that_the_engine_has_not_is_served_by_the_standard_library(name: str) -> None:
    called = threading.Event()

    def hook(self: Any, *arguments: Any) -> Any:
        called.set()
        return getattr(super(kind, self), name)(*arguments)

    kind: Any = type("Own", (socketserver.ThreadingTCPServer,), {name: hook})
    with serving(kind(("127.0.0.1", 0), Upper), poll_interval=0.01) as server:
        assert ask(server, b"x\n") == b"X\n"
        assert server.aioecho_server is None
    assert called.is_set()


@pytest.mark.parametrize("name", ["serve_forever", "shutdown"])
def test_it_may_be_mixed_into_a_class_with_its_own_serve_forever_or_shutdown(name: str) -> None:
    called = threading.Event()

    def hook(self: Any, *arguments: Any) -> Any:
        called.set()
        return getattr(super(base, self), name)(*arguments)

    base: Any = type("Base", (socketserver.TCPServer,), {name: hook})
    kind = type("Mixed", (socketserver.ThreadingMixIn, base), {})
    with serving(kind(("127.0.0.1", 0), Upper), poll_interval=0.01) as server:
        assert ask(server, b"x\n") == b"X\n"
        assert server.aioecho_server is None
    assert called.is_set()


def test_it_serves_where_an_event_loop_runs_already() -> None:
    class Server(socketserver.ThreadingTCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            async def main() -> None:
                socketserver.ThreadingTCPServer.serve_forever(self, poll_interval)

            asyncio.run(main())

    server = Server(("127.0.0.1", 0), Upper)
    with serving(server, poll_interval=0.01):
        assert ask(server, b"x\n") == b"X\n"


def test_datagrams_are_served() -> None:
    class Reply(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper())

    with (
        serving(socketserver.ThreadingUDPServer(("127.0.0.1", 0), Reply), poll_interval=0.01) as server,
        socket.socket(type=socket.SOCK_DGRAM) as sock,
    ):
        sock.settimeout(30)
        sock.sendto(b"x", server.server_address)
        assert sock.recv(10) == b"X"


def test_it_mixes_with_servers_of_the_standard_library(tmp_path: Path) -> None:
    class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
        pass

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = f"port {self.server.server_port}".encode()  # type: ignore[attr-defined]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    with serving(Server(("127.0.0.1", 0), Handler)) as server:
        client = http.client.HTTPConnection(*server.server_address, timeout=20)
        for _ in range(3):
            client.request("GET", "/")
            assert client.getresponse().read() == b"port %d" % server.server_port
        assert server.aioecho_server.stats.accepted == 1
        began = time.monotonic()
    assert time.monotonic() - began < 5  # the client keeps its connection, and the drain ends it
    client.close()


# What is gained


def test_threads_are_bounded_and_used_again() -> None:
    names = []
    release = threading.Event()

    class Names(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            names.append(threading.current_thread().name)
            release.wait(20)

    class Server(socketserver.ThreadingTCPServer):
        aioecho_options: ClassVar = {"limits": aioecho.Limits(max_threads=2)}

    with serving(Server(("127.0.0.1", 0), Names)) as server:
        clients = [socket.create_connection(server.server_address) for _ in range(6)]
        settle(lambda: server.aioecho_server is not None and server.aioecho_server.stats.active == 6)
        settle(lambda: len(names) == 2)
        release.set()
        assert [sock.recv(1) for sock in clients] == [b""] * 6
        for sock in clients:
            sock.close()
    assert len(names) == 6
    assert len(set(names)) == 2


def test_a_reply_is_not_lost_to_what_the_client_still_sends() -> None:
    class Replies(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(4)
            self.request.sendall(b"reply" * 1000)

    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Replies)) as server:
        for _ in range(20):
            assert ask(server, b"x" * 100_000) == b"reply" * 1000


def test_a_stop_drains() -> None:
    entered, may_go_on = threading.Event(), threading.Event()
    ends: list[bytes] = []

    class Held(Upper):
        def handle(self) -> None:
            line = self.rfile.readline()
            entered.set()
            may_go_on.wait(20)
            self.wfile.write(line.upper())
            ends.append(self.rfile.readline())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Held) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with (
            connect("tcp://{}:{}".format(*server.server_address)) as busy,
            socket.create_connection(server.server_address) as idle,
        ):
            busy.sendall(b"x\n")
            assert entered.wait(10)
            settle(lambda: server.aioecho_server.stats.active == 2)
            stopping = threading.Thread(target=server.shutdown)
            stopping.start()
            settle(lambda: not server.aioecho_server.is_serving())
            assert thread.is_alive()
            may_go_on.set()
            assert read_line(busy) == b"X\n"
            assert busy.recv(1) == b""
            assert idle.recv(10) == b""
            stopping.join(20)
            thread.join(20)
        assert server.aioecho_server.stats.completed == 2
        assert ends == [b"", b""]


@pytest.mark.parametrize("setting", [{"daemon_threads": True}, {"block_on_close": False}])
def test_handlers_that_are_not_to_be_waited_for_are_left_to_finish(setting: dict[str, bool]) -> None:
    entered, may_go_on = threading.Event(), threading.Event()

    class Held(Upper):
        def handle(self) -> None:
            line = self.rfile.readline()
            entered.set()
            may_go_on.wait(20)
            self.wfile.write(line.upper())

    kind = type("Server", (socketserver.ThreadingTCPServer,), setting)
    with kind(("127.0.0.1", 0), Held) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        sock = connect("tcp://{}:{}".format(*server.server_address))
        sock.sendall(b"x\n")
        assert entered.wait(10)
        began = time.monotonic()
        server.shutdown()
        thread.join(20)
    assert time.monotonic() - began < 5
    may_go_on.set()
    with sock:
        assert read_line(sock) == b"X\n"
        assert sock.recv(1) == b""


@pytest.mark.parametrize("has_tls", [False, True])
def test_a_stop_makes_up_no_end_in_the_middle_of_a_message(has_tls: bool, tls: SimpleNamespace) -> None:
    class Server(socketserver.ThreadingTCPServer):
        aioecho_options: ClassVar = {"ssl": tls.server} if has_tls else {}

    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(Server(("127.0.0.1", 0), Upper)))
        sock: socket.socket = stack.enter_context(socket.create_connection(server.server_address))
        if has_tls:
            sock = stack.enter_context(tls.client.wrap_socket(sock, server_hostname="localhost"))
        sock.settimeout(20)
        sock.sendall(b"one\npay 10")
        assert sock.recv(100) == b"ONE\n"
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        time.sleep(0.7)  # time is the subject: longer than linger
        sock.sendall(b"00\n")
        assert sock.recv(100) == b"PAY 1000\n"
        assert sock.recv(100) == b""
        stopping.join(20)
        assert not stopping.is_alive()


def test_a_sink_says_so_as_elsewhere() -> None:
    lines: list[bytes] = []

    class Sink(socketserver.StreamRequestHandler):
        one_way = True

        def handle(self) -> None:
            lines.extend(self.rfile)

    with (
        serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Sink)) as server,
        socket.create_connection(server.server_address) as sock,
    ):
        sock.settimeout(20)
        sock.sendall(b"one\n")
        stopping = threading.Thread(target=server.shutdown)
        stopping.start()
        assert sock.recv(1) == b""  # it is told to stop,
        sock.sendall(b"two\n")  # and what it sends meanwhile is read
        stopping.join(20)
        assert not stopping.is_alive()
    assert lines == [b"one\n", b"two\n"]


def test_at_the_end_of_the_grace_a_handler_is_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    class Server(socketserver.ThreadingTCPServer):
        aioecho_options: ClassVar = {"grace": 0.1}

    class Floods(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while True:
                    self.request.sendall(b"x" * 100_000)

    with caplog.at_level(logging.WARNING), serving(Server(("127.0.0.1", 0), Floods)) as server:
        sock = socket.create_connection(server.server_address)
        settle(lambda: server.aioecho_server is not None and server.aioecho_server.stats.active == 1)
    sock.close()
    assert server.aioecho_server.stats.cancelled == 1
    assert "cut off when the grace was over" in caplog.text


def test_a_handler_may_shut_the_server_down() -> None:
    class Stops(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.server.shutdown()
            self.request.sendall(b"stopping")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Stops) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert ask(server, b"") == b"stopping"
        thread.join(20)
        assert not thread.is_alive()


@pytest.mark.parametrize("way", ["an option", "a listening socket that was wrapped"])
def test_a_silent_client_does_not_hold_up_tls(way: str, tls: SimpleNamespace) -> None:
    context = tls.as_debians()

    class Server(socketserver.ThreadingTCPServer):
        if way == "an option":
            aioecho_options: ClassVar = {"ssl": context}

    server = Server(("127.0.0.1", 0), Upper)
    if way != "an option":
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server), socket.create_connection(server.server_address):
        with (
            socket.create_connection(server.server_address, timeout=30) as plain,
            tls.client.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False) as sock,
        ):
            sock.sendall(b"x\n")
            assert sock.recv(10) == b"X\n"
            with contextlib.suppress(ssl.SSLError):
                sock.unwrap()
        settle(lambda: server.aioecho_server.stats.completed == 1)  # type: ignore[union-attr]


PROGRAM = """
import signal, sys, threading
from aioecho.compat import socketserver

class Upper(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())

if "leave" in sys.argv:
    socketserver.ThreadingTCPServer.block_on_close = False

    def tell():
        threading.main_thread().join()
        print("main has ended", flush=True)

    threading.Thread(target=tell, daemon=True).start()
if "exit" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *arguments: sys.exit(3))
with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Upper) as server:
    print("listening on tcp://%s:%d" % server.server_address, flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize(("number", "argument", "code"), [(signal.SIGINT, "", 0), (signal.SIGTERM, "exit", 3)])
def test_a_program_ends_by_its_signals_and_drains(tmp_path: Path, number: int, argument: str, code: int) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with Program(sys.executable, "-X", "dev", "program.py", argument, cwd=tmp_path) as program:
        with connect(program.listening()) as sock:
            sock.sendall(b"x\n")
            assert read_line(sock) == b"X\n"
            program.signal(number)
            assert sock.recv(1) == b""
        assert program.wait() == code
        assert program.stderr() == ""
        assert program.line() == ("interrupted" if number == signal.SIGINT else "")


def test_at_its_exit_a_program_waits_for_handlers_that_the_server_did_not_wait_for(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with Program(sys.executable, "-X", "dev", "program.py", "leave", cwd=tmp_path) as program:
        with connect(program.listening()) as sock:
            sock.sendall(b"x\n")
            assert read_line(sock) == b"X\n"
            program.signal(signal.SIGINT)
            assert program.line() == "interrupted"
            assert program.line() == "main has ended"
            sock.sendall(b"y\n")
            assert read_line(sock) == b"Y\n"
        assert program.wait() == 0
        assert program.stderr() == ""


DAEMON = """
import sys, threading
from aioecho.compat import socketserver

class Upper(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            self.wfile.write(line.upper())

server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Upper)
threading.Thread(target=server.serve_forever, daemon=True).start()
print("listening on tcp://%s:%d" % server.server_address, flush=True)
sys.stdin.read()
"""


def test_a_program_may_end_while_a_daemon_thread_serves(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(DAEMON)
    with Program(sys.executable, "program.py", cwd=tmp_path, stdin=subprocess.PIPE) as program:
        with connect(program.listening()) as sock:
            sock.sendall(b"x\n")
            assert read_line(sock) == b"X\n"
            assert program.process.stdin is not None
            program.process.stdin.close()
            assert program.wait() == 0
            with contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
        assert program.stderr() == ""


REAL = """
import sys
from aioecho.compat import socketserver
sys.modules["socketserver"] = socketserver
import contextlib, http.client, http.server, json, logging.config, socket, struct, threading
import wsgiref.simple_server, xmlrpc.client, xmlrpc.server

@contextlib.contextmanager
def serving(server):
    with server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
    stats = server.aioecho_server.stats
    assert stats.accepted and not stats.failed, stats

class Quiet:
    def log_message(self, *arguments):
        pass

class Files(Quiet, http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

class FileServer(http.server.ThreadingHTTPServer):
    def finish_request(self, request, client_address):
        self.RequestHandlerClass(request, client_address, self, directory=sys.argv[1])

assert FileServer.daemon_threads
with serving(FileServer(("127.0.0.1", 0), Files)) as server:
    client = http.client.HTTPConnection(*server.server_address)
    for name, status in [("file.txt", 200), ("absent.txt", 404), ("file.txt", 200)]:
        client.request("GET", "/" + name)
        response = client.getresponse()
        body = response.read()
        assert response.status == status, response.status
    assert body == b"x" * 300_000
    client.close()

class XMLRPCServer(socketserver.ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    pass

with serving(XMLRPCServer(("127.0.0.1", 0), logRequests=False)) as server:
    server.register_function(lambda a, b: a + b, "add")
    with xmlrpc.client.ServerProxy("http://%s:%d" % server.server_address) as proxy:
        assert [proxy.add(n, 1) for n in range(3)] == [1, 2, 3]

class WSGIServer(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    pass

class WSGIHandler(Quiet, wsgiref.simple_server.WSGIRequestHandler):
    pass

app = wsgiref.simple_server.demo_app
with serving(wsgiref.simple_server.make_server("127.0.0.1", 0, app, WSGIServer, WSGIHandler)) as server:
    client = http.client.HTTPConnection(*server.server_address)
    client.request("GET", "/")
    assert client.getresponse().read().startswith(b"Hello world!")
    client.close()

listening = logging.config.listen(0)
listening.start()
assert listening.ready.wait(10)
listening.ready.clear()
config = {"version": 1, "disable_existing_loggers": False, "loggers": {"told": {"level": "DEBUG"}}}
data = json.dumps(config).encode()
with socket.create_connection(("localhost", listening.port)) as sock:
    sock.sendall(struct.pack(">L", len(data)) + data)
    assert listening.ready.wait(10)
assert logging.getLogger("told").level == logging.DEBUG
logging.config.stopListening()
listening.join(10)
assert not listening.is_alive()
print("done")
"""


def test_the_standard_librarys_own_servers_work_with_the_module_swapped_in(tmp_path: Path) -> None:
    (tmp_path / "real.py").write_text(REAL)
    (tmp_path / "file.txt").write_bytes(b"x" * 300_000)
    with Program(sys.executable, "-X", "dev", "real.py", tmp_path, cwd=tmp_path) as program:
        code, output, errors = program.end()
    assert (code, output, errors) == (0, b"done\n", "")


def test_tls_that_the_standard_library_would_leave_out_is_an_error(tls: SimpleNamespace) -> None:
    class Server(socketserver.ThreadingTCPServer):
        aioecho_options: ClassVar = {"ssl": tls.server}

        def process_request(self, request: Any, client_address: Any) -> None:
            super().process_request(request, client_address)

    with (
        Server(("127.0.0.1", 0), Upper) as server,
        pytest.raises(RuntimeError, match=r"without the TLS .* as its process_request\(\) is not"),
    ):
        server.serve_forever()
