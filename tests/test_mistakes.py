"""Mistakes that are told in one line: at the start where that can be, or in debug mode while they happen."""

import __future__

import asyncio
import logging
import ssl
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, ask

import aioecho
import aioecho.framing
from aioecho.echo import DatagramEcho, Echo


class Plain(aioecho.StreamRequestHandler):
    def handle(self) -> None:  # type: ignore[override]
        self.writer.write(b"x")
        if self.reader:
            return


class NoHandle:
    def __init__(self, *args: Any) -> None: ...


class Lines(Echo):
    framing = "lines"  # type: ignore[assignment]


class Seconds(Echo):
    timeouts = 30  # type: ignore[assignment]


class SyncSetup(Echo):
    def setup(self) -> None:  # type: ignore[override]
        self.greeting = b"hello"


class SyncFinish(Echo):
    def finish(self) -> None:  # type: ignore[override]
        print("the end")


class Named(Echo):
    def __init__(self, name: str) -> None:
        self.name = name


def two_arguments(reader: Any, writer: Any) -> None: ...


@pytest.mark.parametrize(
    ("made_with", "expected"),
    [
        (Plain, r"the handle\(\) of Plain is a plain function: define it as `async def handle\(self\)`"),
        (NoHandle, r"NoHandle makes no handlers, as it has no handle\(\)"),
        (Lines, r"Lines.framing must be None or as aioecho.framing.Lines\(\), not 'lines'"),
        (Seconds, r"Seconds.timeouts must be None or as aioecho.Timeouts\(\), not 30"),
        (SyncSetup, r"the setup\(\) of SyncSetup is a plain function, .* `async def setup\(self\)`"),
        (SyncFinish, r"the finish\(\) of SyncFinish is a plain function"),
        (
            Named,
            r"Named is called with \(request, client_address, server\) .* give functools.partial\(Named, more=...\)",
        ),
        (two_arguments, r"two_arguments is called with \(request, client_address, server\)"),
        (aioecho.TCPServer, r"TCPServer is a server: .* server_class=TCPServer"),
    ],
)
def test_what_makes_no_handlers_says_so_before_it_serves(made_with: Any, expected: str) -> None:
    with pytest.raises(TypeError, match=expected):
        aioecho.TCPServer(ANYWHERE, made_with)


@pytest.mark.parametrize("name", ["limits", "timeouts"])
def test_settings_of_the_wrong_type_are_named(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be"):
        aioecho.TCPServer(ANYWHERE, Echo, **{name: 30})  # type: ignore[arg-type]


def test_a_field_of_limits_or_timeouts_as_an_option_says_where_it_belongs() -> None:
    with pytest.raises(TypeError, match=r"give limits=aioecho.Limits\(max_connections=...\)"):
        aioecho.TCPServer(ANYWHERE, Echo, max_connections=5)
    with pytest.raises(TypeError, match=r"give timeouts=aioecho.Timeouts\(idle=...\)"):
        aioecho.serve(Echo, "tcp://127.0.0.1:0", idle=5)
    with pytest.raises(TypeError, match="port is no option: write the endpoint tcp://HOST:PORT"):
        aioecho.serve(Echo, port=9999)


@pytest.mark.parametrize("kind", [aioecho.TCPServer, aioecho.UDPServer])
def test_a_server_in_a_plain_with_says_what_to_use(kind: Any) -> None:
    server = kind(ANYWHERE, Echo if kind is aioecho.TCPServer else DatagramEcho)
    with pytest.raises(TypeError, match=f"a {kind.__name__} is an `async with`.*aioecho.run_in_thread"), server:
        pass


def test_a_context_for_clients_and_the_name_of_a_file_are_no_ssl_of_a_server() -> None:
    with pytest.raises(ValueError, match=r"ssl is a context for clients: .*Purpose.CLIENT_AUTH"):
        aioecho.TCPServer(ANYWHERE, Echo, ssl=ssl.create_default_context())
    with pytest.raises(TypeError, match=r'ssl must be an aioecho.TLS, as aioecho.TLS\("server.pem"\)'):
        aioecho.TCPServer(ANYWHERE, Echo, ssl="server.pem")  # type: ignore[arg-type]


async def plain_generator(server: Any) -> AsyncIterator[None]:
    yield


async def coroutine(server: Any) -> None: ...


@pytest.mark.parametrize("lifespan", [plain_generator, coroutine])
async def test_a_lifespan_that_is_no_context_manager_names_the_decorator(lifespan: Any) -> None:
    server = aioecho.TCPServer(ANYWHERE, Echo, lifespan=lifespan)
    with pytest.raises(TypeError, match=r"the lifespan .* decorate it with @contextlib.asynccontextmanager"):
        await server.start()
    await server.shutdown()


@pytest.mark.parametrize("waits", [False, True])
async def test_data_that_handle_returns_is_not_sent_and_a_warning_says_so(caplog: Any, waits: bool) -> None:
    class Returning(aioecho.StreamRequestHandler):
        async def handle(self) -> Any:
            return b"hello " + await self.reader.readline() if waits else b"hello"

    async with aioecho.TCPServer(ANYWHERE, Returning) as server:
        assert await ask(server) == b""
    [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Returning.handle() returned bytes, which is not sent" in record.getMessage()


async def test_a_str_as_a_frame_is_named(caplog: Any) -> None:
    class Framed(aioecho.StreamRequestHandler):
        framing = aioecho.framing.Lines()

        async def handle(self) -> None:
            await self.send_frame("hello")  # type: ignore[arg-type]

    async with aioecho.TCPServer(ANYWHERE, Framed) as server:
        assert await ask(server) == b""
    assert "a frame is bytes, not str: encode it" in caplog.text


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("127.0.0.1", "a port is missing, as in tcp://127.0.0.1:9999"),
        ("localhost:", "a port is missing, as in tcp://localhost:9999"),
        ("udp://127.0.0.1", "a port is missing, as in udp://127.0.0.1:9999"),
        ("[::1]", r"a port is missing, as in tcp://\[::1\]:9999"),
        ("tcp://127.0.0.1:http", "'http' is no port"),
        ("tcp:127.0.0.1:9999", "write tcp://127.0.0.1:9999"),
        ("udp:/127.0.0.1:9999", "write udp://127.0.0.1:9999"),
        ("tcp://::1:9999", r"write tcp://\[::1\]:9999"),
        (("127.0.0.1", 9999), "write tcp://127.0.0.1:9999 in place of"),
        (Echo, "the handler comes first, and then the endpoints"),
    ],
)
def test_what_is_no_endpoint_says_what_was_probably_meant(text: Any, hint: str) -> None:
    with pytest.raises((TypeError, ValueError), match=hint):
        aioecho.serve(Echo, text)


async def test_a_plain_handle_that_returns_what_can_be_awaited_is_no_mistake() -> None:
    class Delegating(aioecho.StreamRequestHandler):
        def handle(self) -> Any:
            if self.client_address is None:
                return None
            return self.send(b"hello")

    async with aioecho.TCPServer(ANYWHERE, Delegating) as server:
        assert await ask(server) == b"hello"


def work() -> None:
    time.sleep(0.3)  # the line that holds the loop up


@pytest.mark.parametrize("has_parts", [False, True])
async def test_in_debug_mode_a_handler_that_holds_the_loop_up_is_named_with_its_line(
    has_parts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Sleepy(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.reader:
                work()
                await self.send(line)

    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = 0.1
    try:
        with caplog.at_level(logging.WARNING, "aioecho.server"):
            others = {DatagramEcho: "udp://127.0.0.1:0"} if has_parts else {}
            async with aioecho.serve({Sleepy: "tcp://127.0.0.1:0", **others}) as server:
                assert await ask(server) == b"x\n"
                await settle(lambda: "Sleepy" in caplog.text)
    finally:
        loop.slow_callback_duration = float("inf")
    records = [record.getMessage() for record in caplog.records if record.name == "aioecho.server"]
    assert len(records) == 1
    line = work.__code__.co_firstlineno + 1
    assert f"Sleepy.handle() holds the event loop up for more than 0.1 s, at {__file__}:{line}" in records[0]


async def test_the_loop_is_not_watched_for_a_server_that_could_not_start() -> None:
    loop = asyncio.get_running_loop()
    loop.slow_callback_duration = 60.0
    try:
        async with aioecho.UDPServer(ANYWHERE, DatagramEcho) as other:
            assert other._held_up is not None
            taken = "udp://{}:{}".format(*other.server_address)
            for server in (
                aioecho.serve(DatagramEcho, taken),
                aioecho.serve({Echo: "tcp://127.0.0.1:0", DatagramEcho: taken}),
            ):
                with pytest.raises(aioecho.EndpointError):
                    await server.start()
                assert not any(each._held_up for each in (server, *getattr(server, "parts", ())))
    finally:
        loop.slow_callback_duration = float("inf")


async def test_out_of_debug_mode_the_loop_is_not_watched() -> None:
    asyncio.get_running_loop().set_debug(False)
    async with aioecho.TCPServer(ANYWHERE, Echo) as server:
        assert server._held_up is None


async def test_a_handler_that_returns_the_end_of_the_stream_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    class WaitsForEnd(aioecho.StreamRequestHandler):
        async def handle(self) -> bytes:  # type: ignore[override]
            return await self.reader.read()

    async with aioecho.TCPServer(ANYWHERE, WaitsForEnd) as server:
        assert await ask(server, b"") == b""
        await settle(lambda: server.stats.completed)
    assert "returned" not in caplog.text


async def test_annotations_may_name_what_is_imported_for_type_checkers_alone() -> None:
    # From Python 3.14 on, inspect.signature() evaluates them, and no program needs `from __future__` for them any more.
    source = """if True:
        class Annotated(Echo):
            def __init__(self, request: Missing, client_address: Missing, server: Missing) -> None:
                super().__init__(request, client_address, server)

        async def handle(reader: Missing, writer: Missing) -> Missing:
            writer.write(await reader.read(100))
    """
    flags = {} if sys.version_info >= (3, 14) else {"flags": __future__.annotations.compiler_flag}
    names: dict[str, Any] = {"Echo": Echo, "__name__": __name__}
    exec(compile(source, "annotated", "exec", **flags), names)
    for handler in (names["Annotated"], names["handle"]):
        async with aioecho.TCPServer(ANYWHERE, handler) as server:
            assert await ask(server, b"hello") == b"hello"
