"""The test kit: a client for a handler without a port, in an event loop."""

import asyncio
import contextlib
import functools
import socketserver
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import pytest
from conftest import check_identity, settle
from helpers import ON_ONE_LOOP, handler

import aioecho
from aioecho import testing
from aioecho.echo import DatagramUpper, Echo, Upper
from aioecho.framing import LengthPrefixed, Lines


class Shout(aioecho.StreamRequestHandler):
    """Fails at what it does not know."""

    framing = LengthPrefixed(2)

    async def handle(self) -> None:
        async for frame in self.frames:
            await self.send_frame({b"hello": b"HELLO"}[frame])


async def raise_key_error(self: Any) -> None:
    raise KeyError(await self.reader.readline())


Bad = handler(raise_key_error)


# What a client is


async def test_a_handler_is_served_without_a_port() -> None:
    async with testing.connect(Upper) as client:
        await client.send(b"hello\nworld\nrest")
        assert await client.readline() == b"HELLO\n"
        assert await client.readexactly(6) == b"WORLD\n"
        client.write_eof()
        assert await client.read() == b"REST"
        assert await client.read() == b""
        assert client.server.names == ()
    assert client.server.stats.completed == 1
    check_identity(client.server)


async def test_the_handler_and_its_server_are_at_hand() -> None:
    async with testing.connect(Upper) as client:
        assert type(client.handler) is Upper
        assert client.handler.client_address == client.client_address == ("127.0.0.1", 1)
        assert client.handler.server is client.server
        assert isinstance(client.server, aioecho.TCPServer)
        assert [live.client_address for live in client.server.connections] == [("127.0.0.1", 1)]


async def test_frames_are_cut_by_the_handlers_framing() -> None:
    async with testing.connect(Shout) as client:
        await client.send_frame(b"hello")
        await client.send_frame(b"hello")
        assert await client.read_frame() == b"HELLO"
        client.write_eof()
        assert [frame async for frame in client.frames] == [b"HELLO"]
        with pytest.raises(asyncio.IncompleteReadError):
            await client.read_frame()


async def test_a_handler_without_a_framing_has_no_frames() -> None:
    async with testing.connect(Upper) as client:
        with pytest.raises(TypeError, match="Upper has no framing"):
            await anext(client.frames)


async def test_one_server_has_several_clients() -> None:
    class Room(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            self.join("room")
            async for line in self.reader:
                self.server.broadcast(line, to="room", but=self)

    async with testing.connect(Room) as ann:
        async with testing.connect(ann.server) as bob:
            await bob.send(b"hello\n")
            assert await ann.readline() == b"hello\n"
            assert bob.client_address == ("127.0.0.1", 2)
            assert bob.handler is not ann.handler
        assert len(ann.server.connections) == 1


async def test_a_function_of_a_reader_and_a_writer_is_served() -> None:
    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.readline()).upper())

    async with testing.connect(upper) as client:
        await client.send(b"hello\n")
        assert await client.read() == b"HELLO\n"


async def test_a_partial_binds_more_arguments() -> None:
    class Greeter(aioecho.StreamRequestHandler):
        def __init__(self, *request: Any, greeting: bytes) -> None:
            super().__init__(*request)
            self.greeting = greeting

        async def handle(self) -> None:
            await self.send(self.greeting)

    async with testing.connect(functools.partial(Greeter, greeting=b"hello")) as client:
        assert await client.read() == b"hello"


async def test_a_blocking_handler_is_served_in_a_thread() -> None:
    class Legacy(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    async with testing.connect(Legacy) as client:
        await client.send(b"hello\n")
        assert await client.read() == b"HELLO\n"
    assert client.handler.client_address == client.client_address


async def test_a_handler_of_datagrams_is_asked() -> None:
    async with testing.connect(DatagramUpper) as client:
        assert await client.ask(b"hello") == b"HELLO"
        await client.send(b"again")
        assert await client.receive() == b"AGAIN"
        assert client.handler.client_address == client.client_address
        assert isinstance(client.server, aioecho.UDPServer)


async def test_a_client_waits_for_no_more_than_its_timeout() -> None:
    async with testing.connect(Echo, timeout=0.01) as client:
        with pytest.raises(TimeoutError, match=r"the handler has sent no line within 0\.01 seconds"):
            await client.readline()
        await client.send(b"late\n")
        client.timeout = 10
        assert await client.readline() == b"late\n"


async def test_a_handler_that_reads_nothing_is_told_of() -> None:
    async def wait(self: Any) -> None:
        await self.closed()

    async with testing.connect(handler(wait), timeout=0.01, grace=0) as client:
        with pytest.raises(TimeoutError, match=r"the handler has read nothing within 0\.01 seconds"):
            await client.send(bytes(2**22))
        client.writer.transport.abort()


# What a handler raises


async def test_what_a_handler_raises_fails_the_test() -> None:
    with pytest.raises(KeyError, match="hello"):  # noqa: PT012 - what is raised is raised at its end
        async with testing.connect(Bad) as client:
            await client.send(b"hello\n")
            assert await client.read() == b""


async def test_a_handler_that_raises_as_late_as_its_clients_end_fails_the_test() -> None:
    with pytest.raises(KeyError):
        async with testing.connect(Bad):
            pass


@pytest.mark.parametrize("method", ["setup", "finish"])
async def test_what_the_other_methods_raise_fails_the_test_too(method: str) -> None:
    async def fail(self: Any) -> None:
        raise LookupError(method)

    async def nothing(self: Any) -> None:
        pass

    with pytest.raises(LookupError, match=method):
        async with testing.connect(handler(nothing, **{method: fail})) as client:
            assert await client.read() == b""


async def test_a_test_that_fails_by_itself_notes_what_the_handler_raised() -> None:
    with pytest.raises(AssertionError) as caught:  # noqa: PT012
        async with testing.connect(Bad) as client:
            await client.send(b"hello\n")
            assert await client.read() == b"HELLO\n"
    assert "The handler raised:" in caught.value.__notes__[0]
    assert "KeyError: b'hello\\n'" in caught.value.__notes__[0]


async def test_what_the_peer_causes_is_no_mistake_of_the_handlers() -> None:
    async with testing.connect(Shout) as client:
        await client.send(b"\x00")  # half of a length
    assert client.server.stats.reasons == {"incomplete": 1}


async def test_several_handlers_fail_as_a_group() -> None:
    with pytest.raises(BaseExceptionGroup) as caught:  # noqa: PT012
        async with testing.connect(Bad) as client, testing.connect(client.server, raise_errors=False) as other:
            del other
            await client.send(b"1\n")
            client.server._record.errors.append((None, ValueError("of a third")))
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ValueError}


async def test_errors_that_the_test_is_about_can_be_kept_from_failing_it() -> None:
    async with testing.connect(Bad, raise_errors=False) as client:
        await client.send(b"hello\n")
        assert await client.read() == b""
    assert client.server.stats.reasons == {"error": 1}


async def test_the_client_whose_handler_fails_is_the_one_that_raises() -> None:
    class Picky(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.reader:
                if line == b"bad\n":
                    raise KeyError(line)
                await self.send(line)

    async with testing.connect(Picky) as client:
        with pytest.raises(KeyError):
            async with testing.connect(client.server) as other:
                await other.send(b"bad\n")
        await client.send(b"good\n")
        assert await client.readline() == b"good\n"


async def test_a_failing_handler_of_datagrams_fails_the_test() -> None:
    class Failing(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            raise LookupError(self.data)

    with pytest.raises(LookupError):
        async with testing.connect(Failing) as client:
            await client.send(b"hello")


async def test_a_handler_that_does_not_end_is_cancelled_when_the_grace_is_over() -> None:
    ends: list[str] = []

    async def wait(self: Any) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    async with testing.connect(handler(wait), grace=0.01) as client:
        pass
    assert ends == ["cancelled"]
    assert client.server.stats.reasons == {"cancelled": 1}


# The server is a real one


async def test_the_servers_hooks_and_limits_are_the_real_ones() -> None:
    class Strict(aioecho.TCPServer):
        greeting = b"hello\n"

        async def verify_request(self, request: Any, client_address: Any) -> bool:
            await asyncio.sleep(0)
            return client_address[0] == "192.0.2.1"

    async def greet(self: Any) -> None:
        await self.send(self.server.greeting)

    async with testing.connect(handler(greet), server_class=Strict, client_address=("192.0.2.1", 5)) as client:
        assert await client.read() == b"hello\n"
        assert isinstance(client.server, Strict)
        async with testing.connect(client.server) as other:
            assert await other.read() == b""
            assert other.handler is None
    assert client.server.stats.reasons == {"finished": 1, "refused": 1}


async def test_a_client_for_which_there_is_no_room_waits_or_is_rejected() -> None:
    only_one = aioecho.Limits(max_connections=1)
    async with testing.connect(Echo, limits=only_one) as client, testing.connect(client.server) as second:
        await second.send(b"waiting\n")
        assert second.handler is None
        await client.aclose()
        assert await second.readline() == b"waiting\n"
        client.server.limits = aioecho.Limits(max_connections=1, overflow="reject")
        async with testing.connect(client.server) as third:
            assert await third.read() == b""
    assert client.server.stats.reasons["overflow"] == 1
    check_identity(client.server)


async def test_networks_and_limits_per_host_see_the_address_that_the_test_gives() -> None:
    options = {"deny": ["192.0.2.0/24"], "limits": aioecho.Limits(max_per_host=1)}
    async with testing.connect(Echo, **options) as client:
        for address in [("192.0.2.1", 1), ("127.0.0.1", 99)]:
            async with testing.connect(client.server, client_address=address) as other:
                assert await other.read() == b""
    assert client.server.stats.reasons == {"finished": 1, "not allowed": 1, "per host": 1}


async def test_a_timeout_of_the_server_ends_the_handler() -> None:
    async with testing.connect(Echo, timeouts=aioecho.Timeouts(idle=0.02)) as client:
        assert await client.read() == b""
    assert client.server.stats.reasons == {"idle": 1}


async def test_a_drain_can_be_tested() -> None:
    class Polite(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.reader:
                await self.send(line)

        async def draining(self) -> None:
            await self.send(b"goodbye\n")

    async with testing.connect(Polite) as client:
        report = await client.server.shutdown()
        assert await client.read() == b"goodbye\n"
        with pytest.raises(ConnectionRefusedError, match="has been shut down"):
            async with testing.connect(client.server):
                pass
    assert report.completed == 1


async def test_state_and_lifespan_are_the_handlers() -> None:
    events: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan(server: aioecho.BaseServer) -> AsyncIterator[bytes]:
        events.append("opened")
        yield b"of the lifespan"
        events.append("closed")

    async def tell(self: Any) -> None:
        await self.send(self.state)

    async with testing.connect(handler(tell), state=b"given") as client:
        assert await client.read() == b"given"
    async with testing.connect(handler(tell), lifespan=lifespan) as client:
        assert await client.read() == b"of the lifespan"
    assert events == ["opened", "closed"]


async def test_a_lifespan_that_raises_at_its_end_fails_the_test() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(server: aioecho.BaseServer) -> AsyncIterator[None]:
        yield
        raise LookupError

    with pytest.raises(RuntimeError, match="the lifespan raised"):
        async with testing.connect(Echo, lifespan=lifespan):
            pass


async def test_tls_is_begun_by_the_test(tls: Any) -> None:
    async with testing.connect(Upper, ssl=tls.server) as client:
        assert client.handler is None
        await client.writer.start_tls(tls.client, server_hostname="localhost")
        await client.send(b"hello\n")
        assert await client.readline() == b"HELLO\n"
    assert client.server.stats.completed == 1


async def test_a_proxy_header_comes_first() -> None:
    proxy = aioecho.ProxyProtocol(trusted=["127.0.0.1"])
    async with testing.connect(Upper, proxy=proxy) as client:
        await client.send(b"PROXY TCP4 192.0.2.7 192.0.2.1 5000 80\r\nhello\n")
        assert await client.readline() == b"HELLO\n"
        assert [live.client_address for live in client.server.connections] == [("192.0.2.7", 5000)]


@ON_ONE_LOOP
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Echo, {"server_class": object}), "server_class must be a class of aioecho's servers"),
        ((DatagramUpper, {"client_address": ("127.0.0.1", 1)}), "client_address is for streams"),
        ((aioecho.TCPServer(("127.0.0.1", 0), Echo), {}), "give a handler class"),
    ],
)
async def test_a_mistake_is_told(arguments: Any, message: str) -> None:
    target, options = arguments
    with pytest.raises(TypeError, match=message):
        testing.connect(target, **options)


@ON_ONE_LOOP
async def test_two_clients_cannot_have_one_address() -> None:
    async with testing.connect(Echo) as client:
        with pytest.raises(ValueError, match="another client of this server has the address"):
            async with testing.connect(client.server, client_address=client.client_address):
                pass
        with pytest.raises(TypeError, match="a server that runs takes no option, as limits"):
            testing.connect(client.server, limits=aioecho.Limits())


@ON_ONE_LOOP
async def test_a_client_without_an_address_gets_one_that_no_other_has() -> None:
    async with (
        testing.connect(Echo, client_address=("127.0.0.1", 2)) as client,
        testing.connect(client.server) as other,
    ):
        assert other.client_address[0] == "127.0.0.1"
        assert other.client_address != client.client_address


# A handler without a server


class FakeWriter:
    def __init__(self) -> None:
        self.written = b""
        self.drains = 0

    def write(self, data: bytes) -> None:
        self.written += data

    async def drain(self) -> None:
        self.drains += 1


class Frames(aioecho.StreamRequestHandler):
    framing = LengthPrefixed(1)

    async def handle(self) -> None:
        self.join("room")
        async with self.unbroken():
            first = await anext(self.frames)
        await self.send(await self.reader.readexactly(2))
        self.leave("room")
        async for frame in self.frames:
            await self.send_frame(first + frame)


@pytest.mark.parametrize("make_reader", [asyncio.StreamReader, aioecho.StreamReader])
async def test_a_handler_works_with_any_streams(make_reader: Any) -> None:
    reader, writer = make_reader(), FakeWriter()
    reader.feed_data(b"\x03one--\x03two\x05three")
    reader.feed_eof()
    await Frames((reader, writer), ("127.0.0.1", 1), None).handle()
    assert writer.written == b"--\x06onetwo\x08onethree"
    assert writer.drains == 3


async def test_a_handler_works_with_asyncios_writer_and_a_mock_of_one() -> None:
    writer = mock.create_autospec(asyncio.StreamWriter, instance=True)
    reader = asyncio.StreamReader()
    reader.feed_data(b"hello\n")
    reader.feed_eof()
    await Upper((reader, writer), ("127.0.0.1", 1), None).handle()
    assert b"".join(call.args[0] for call in writer.write.call_args_list) == b"HELLO\n"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await Upper((reader, writer), writer.get_extra_info("peername"), None).handle()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    client_reader, client_writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    client_writer.write(b"hello\n")
    client_writer.write_eof()
    assert await client_reader.read() == b"HELLO\n"
    client_writer.close()
    await client_writer.wait_closed()
    server.close()
    await settle()


@ON_ONE_LOOP
async def test_frames_of_asyncios_reader_take_no_more_than_they_are() -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(b"one\ntwo\nrest")
    one = handler(raise_key_error, framing=Lines())((reader, FakeWriter()), ("127.0.0.1", 1), None)
    assert await anext(one.frames) == b"one"
    assert await reader.readline() == b"two\n"
    reader.feed_data(b"\nfour\n")
    assert (await one.read_frame(), await one.read_frame()) == (b"rest", b"four")
    reader.feed_data(b"rest")
    reader.feed_eof()
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await anext(one.frames)
    assert caught.value.partial == b"rest"
    with pytest.raises(asyncio.IncompleteReadError):
        await one.read_frame()


@ON_ONE_LOOP
async def test_closed_needs_a_reader_that_tells_and_tasks_a_connection() -> None:
    one = Upper((asyncio.StreamReader(), FakeWriter()), ("127.0.0.1", 1), None)
    with pytest.raises(TypeError, match=r"needs an aioecho\.StreamReader"):
        await one.closed()
    with pytest.raises(RuntimeError, match="no server has made it"):
        one.tasks  # noqa: B018


# Simulated time


def test_on_asyncios_loop_time_can_be_simulated() -> None:
    looptime = pytest.importorskip("looptime")

    async def patient() -> tuple[bytes, float]:
        async def slow(self: Any) -> None:
            await asyncio.sleep(3600)
            await self.send(await self.reader.readline())
            await self.reader.readline()  # up to the timeout

        async with testing.connect(
            handler(slow), timeout=None, timeouts=aioecho.Timeouts(idle=600, handler=None, max_age=None)
        ) as client:
            await client.send(b"an hour later\n")
            reply = await client.readline()
            assert await client.read() == b""
        assert client.server.stats.reasons == {"idle": 1}
        return reply, asyncio.get_running_loop().time()

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        reply, now = runner.run(patient())
    assert reply == b"an hour later\n"
    assert 4200 <= now < 4300
