"""The test kit for synchronous tests, and the pytest plugin."""

import asyncio
import importlib.util
import socket
import socketserver
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import LOOPS, ask, ask_by_datagram, handler

import aioecho
from aioecho import testing
from aioecho.echo import DatagramUpper, Upper
from aioecho.framing import LengthPrefixed
from aioecho.server import StreamServer
from aioecho.testing import pytest_aioecho
from aioecho.testing.factory import ServerFactory

pytest_plugins = ["pytester"]


class Shout(aioecho.StreamRequestHandler):
    framing = LengthPrefixed(2)

    async def handle(self) -> None:
        async for frame in self.frames:
            await self.send_frame({b"hello": b"HELLO"}[frame])


class Legacy(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write({b"hello\n": b"HELLO\n"}[line])


class LegacyDatagram(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())


@LOOPS
def test_a_synchronous_test_has_a_blocking_client(loop: str) -> None:
    with testing.connect_sync(Upper, loop=loop) as client:
        client.send(b"hello\nworld\nrest")
        assert client.readline() == b"HELLO\n"
        assert client.readexactly(6) == b"WORLD\n"
        with testing.connect_sync(client.server) as other:
            other.send(b"other\n")
            assert other.read(3) == b"OTH"
            assert other.client_address == ("127.0.0.1", 2)
        client.write_eof()
        assert (client.readline(), client.read()) == (b"REST", b"")
        assert type(client.handler) is Upper
    assert client.server.stats.completed == 2


def test_a_synchronous_client_reads_frames() -> None:
    with testing.connect_sync(Shout) as client:
        client.send_frame(b"hello")
        client.send_frame(b"hello")
        assert client.read_frame() == b"HELLO"
        client.write_eof()
        assert list(client.frames) == [b"HELLO"]
        with pytest.raises(asyncio.IncompleteReadError):
            client.read_frame()


def test_a_stream_that_ends_too_early_is_told() -> None:
    async def say_half(self: Any) -> None:
        await self.send(b"\x00\x05he")

    with testing.connect_sync(handler(say_half)) as client, pytest.raises(asyncio.IncompleteReadError):
        client.readexactly(5)
    framed = handler(say_half, framing=LengthPrefixed(2))
    with testing.connect_sync(framed) as client, pytest.raises(asyncio.IncompleteReadError):
        next(client.frames)


def test_a_blocking_handler_is_served_to_a_blocking_client() -> None:
    with testing.connect_sync(Legacy) as client:
        client.send(b"hello\n")
        assert client.readline() == b"HELLO\n"
    assert type(client.handler) is Legacy
    with pytest.raises(KeyError, match="unknown"), testing.connect_sync(Legacy) as client:
        client.send(b"unknown\n")


@pytest.mark.parametrize("kind", [DatagramUpper, LegacyDatagram])
def test_datagrams_are_asked_by_a_blocking_client(kind: Any) -> None:
    with testing.connect_sync(kind) as client:
        assert client.ask(b"hello") == b"HELLO"
    assert client.handler.client_address == client.client_address


def test_what_a_handler_raises_is_raised_in_the_synchronous_test() -> None:
    with pytest.raises(KeyError, match="unknown"), testing.connect_sync(Shout) as client:  # noqa: PT012
        client.send_frame(b"unknown")
        assert client.read() == b""
    with pytest.raises(AssertionError) as caught, testing.connect_sync(Shout) as client:  # noqa: PT012
        client.send_frame(b"unknown")
        assert client.read() == b"HELLO"
    assert "KeyError: b'unknown'" in caught.value.__notes__[0]


def test_a_blocking_client_waits_for_no_more_than_its_timeout() -> None:
    message = r"the handler has sent no line within 0\.01 seconds"
    with testing.connect_sync(Upper, timeout=0.01) as client, pytest.raises(TimeoutError, match=message):
        client.readline()


@LOOPS
def test_a_server_that_was_shut_down_accepts_no_synchronous_client(loop: str) -> None:
    with testing.connect_sync(Upper, loop=loop) as client:
        pass
    with pytest.raises(ConnectionRefusedError, match="has been shut down"), testing.connect_sync(client.server):
        pass


@LOOPS
def test_a_blocking_client_may_speak_tls(loop: str, tls: Any) -> None:
    with testing.connect_sync(Upper, ssl=tls.server, loop=loop) as client:
        client.socket = tls.client.wrap_socket(client.socket, server_hostname="localhost")
        client.send(b"hello\n")
        assert client.readline() == b"HELLO\n"


# The plugin


def test_the_fixture_serves_a_synchronous_test(aioecho_server: Any) -> None:
    server = aioecho_server(Upper)
    with socket.create_connection(server.server_address) as sock:
        sock.sendall(b"hello\n")
        assert sock.recv(100) == b"HELLO\n"
    assert ask_by_datagram(aioecho_server(DatagramUpper).server_address) == b"HELLO"


async def test_the_fixture_serves_a_coroutine(aioecho_server: Any) -> None:
    server = aioecho_server(Upper, "tcp://127.0.0.1:0", limits=aioecho.Limits(max_connections=3))
    assert await ask(server.server_address, b"hello\n") == b"HELLO\n"


def test_a_shutdown_that_raises_hides_no_errors_of_handlers() -> None:
    class Broken(StreamServer):
        async def shutdown(self, grace: float | None = None) -> Any:
            await super().shutdown(grace)
            raise OSError("cannot stop")

    class Failing(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            raise KeyError(await self.reader.readline())

    factory = ServerFactory()
    for server_class in (Broken, StreamServer, Broken):
        server = factory(Failing, server_class=server_class)
        with socket.create_connection(server.server_address) as sock:
            sock.sendall(b"hello\n")
            assert sock.recv(100) == b""
    assert [str(error) for error in factory.close()] == ["b'hello\\n'"] * 3 + ["cannot stop"] * 2
    assert factory.close() == []


TESTS = """
import asyncio, socket
import pytest
import aioecho
from aioecho.echo import Upper

class Failing(aioecho.StreamRequestHandler):
    async def handle(self):
        raise KeyError(await self.reader.readline())

def ask(server):
    with socket.create_connection(server.server_address) as sock:
        sock.sendall(b"hello\\n")
        return sock.recv(100)

def test_synchronous_passes(aioecho_server):
    assert ask(aioecho_server(Upper)) == b"HELLO\\n"

def test_synchronous_fails(aioecho_server):
    ask(aioecho_server(Failing))

@pytest.fixture
def server(aioecho_server):
    return aioecho_server(Failing)

def test_indirect_fails(server):
    assert ask(server) == b"HELLO\\n"

@MARK
async def test_coroutine_passes(aioecho_server):
    assert await asyncio.to_thread(ask, aioecho_server(Upper)) == b"HELLO\\n"

@MARK
async def test_coroutine_fails(aioecho_server):
    await asyncio.to_thread(ask, aioecho_server(Failing))

@pytest.fixture
def other():
    yield

def test_other_passes(other):
    pass
"""


@pytest.mark.parametrize(("mode", "mark"), [("strict", "pytest.mark.asyncio"), ("auto", "(lambda test: test)")])
def test_a_failing_handler_fails_its_test_and_no_other(pytester: pytest.Pytester, mode: str, mark: str) -> None:
    pytester.makepyfile(TESTS.replace("@MARK", f"@{mark}"))
    options = ["-q", "-p", "no:cacheprovider", "-o", f"asyncio_mode={mode}"]
    options += ["-o", "asyncio_default_fixture_loop_scope=function"]
    plugins = [] if importlib.util.find_spec("pytest_aioecho") else [pytest_aioecho]
    outcome = pytester.inline_run(*options, plugins=plugins)
    passed, skipped, failed = outcome.listoutcomes()
    assert {report.nodeid.partition("::")[2] for report in passed} == {
        "test_synchronous_passes",
        "test_coroutine_passes",
        "test_other_passes",
    }
    # In the call, and not in the teardown.
    assert {(report.nodeid.partition("::")[2], report.when) for report in failed} == {
        ("test_synchronous_fails", "call"),
        ("test_indirect_fails", "call"),
        ("test_coroutine_fails", "call"),
    }
    assert not skipped
    assert "KeyError" in failed[0].longreprtext


def load_plugin() -> Any:
    spec = importlib.util.spec_from_file_location("pytest_aioecho_alone", Path(pytest_aioecho.__file__))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plugin_imports_nothing_of_aioecho(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("aioecho", "uvloop")]:
        monkeypatch.delitem(sys.modules, name)
    load_plugin()
    assert not {name.partition(".")[0] for name in sys.modules} & {"aioecho", "uvloop"}


def test_the_plugin_can_be_imported_by_an_older_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    def hookimpl_of_pluggy_1_0(*, hookwrapper: bool = False, tryfirst: bool = False, trylast: bool = False) -> Any:
        raise AssertionError("it is not called like that")

    monkeypatch.setattr(pytest, "hookimpl", hookimpl_of_pluggy_1_0)
    plugin = load_plugin()
    assert hasattr(plugin, "aioecho_server")
    assert not hasattr(plugin, "pytest_pyfunc_call")
