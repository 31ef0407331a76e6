"""The stream pair against asyncio's: CPython's own tests, flow control in both directions, TLS on a running stream."""

import asyncio
import functools
import gc
import socket
import ssl
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settle
from driven import drive
from helpers import skip_without
from hypothesis import example, given, settings
from hypothesis import strategies as st
from programs import connect
from subjects import Subject

import aioecho
import aioecho.echo
from aioecho.streams import receive
from aioecho.streams.protocol import StreamProtocol
from aioecho.streams.writer import StreamWriter

SWAPPED = """
import asyncio, asyncio.streams, sys, unittest
import aioecho
asyncio.StreamReader = asyncio.streams.StreamReader = aioecho.StreamReader
import test.test_asyncio.test_streams as theirs
suite = unittest.defaultTestLoader.loadTestsFromModule(theirs)
assert suite.countTestCases() > 50
result = unittest.TextTestRunner().run(suite)
sys.exit(not result.wasSuccessful())
"""


def test_cpythons_own_tests_pass_with_the_reader_swapped_in() -> None:
    skip_without("test.test_asyncio.test_streams")
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SWAPPED], capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr


class Pair:
    """A stream of ours on one end of a socket pair."""

    def __init__(self, protocol: StreamProtocol, peer: socket.socket) -> None:
        self.protocol, self.peer = protocol, peer
        self.reader, self.writer = (
            protocol.reader,
            StreamWriter(protocol.transport, protocol, protocol.reader, protocol._loop),
        )

    async def close(self) -> None:
        self.writer.transport.abort()
        self.peer.close()
        await self.protocol.wait_lost()
        await settle()


async def make_pair(limit: int = 2**16) -> Pair:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    _, protocol = await loop.create_connection(
        lambda: StreamProtocol(loop, limit=limit, is_server_side=True), sock=ours
    )
    protocol.begin_reading()
    return Pair(protocol, theirs)


async def test_a_reader_that_does_not_read_pauses_its_peer_at_twice_the_limit() -> None:
    pair = await make_pair(limit=1000)
    sent = 0
    quiet = 0
    while quiet < 20:
        try:
            sent += pair.peer.send(b"x" * 50_000)
            quiet = 0
        except BlockingIOError:
            quiet += 1
        await asyncio.sleep(0)
    # One read may bring more than the limit, and after it nothing more is taken from the socket.
    held = len(pair.reader._buffer)
    assert 2000 < held <= 2000 + 256 * 1024
    assert not pair.writer.transport.is_reading()
    pair.peer.shutdown(socket.SHUT_WR)
    assert len(await pair.reader.read()) == sent
    await pair.close()


async def test_more_than_the_limit_can_be_read_exactly() -> None:
    pair = await make_pair(limit=10)
    pair.peer.send(b"x" * 5000)
    reading = asyncio.create_task(pair.reader.readexactly(9000))
    await settle()
    pair.peer.send(b"y" * 4001)
    assert await reading == b"x" * 5000 + b"y" * 4000
    assert await pair.reader.read(10) == b"y"
    await pair.close()


@pytest.mark.parametrize("also_buffered", [False, True])
async def test_a_line_over_the_limit_is_an_error_and_the_stream_goes_on(also_buffered: bool) -> None:
    pair = await make_pair(limit=8)
    if also_buffered:
        pair.peer.send(b"first\n123456789\nshort\n")
        assert await pair.reader.readline() == b"first\n"
    else:
        reading = asyncio.create_task(pair.reader.readline())
        await settle()
        pair.peer.send(b"123456789\nshort\n")
        with pytest.raises(ValueError, match="line of 9 bytes, over the limit of 8 bytes"):
            await reading
        assert await pair.reader.readline() == b"short\n"
        reading = asyncio.create_task(pair.reader.readuntil(b"\n"))
        await settle()
        pair.peer.send(b"123456789\nshort\n")
        with pytest.raises(asyncio.LimitOverrunError):
            await reading
        assert await pair.reader.readexactly(10) == b"123456789\n"
        assert await pair.reader.readline() == b"short\n"
        await pair.close()
        return
    with pytest.raises(ValueError, match="line of 9 bytes, over the limit of 8 bytes"):
        await pair.reader.readline()
    assert await pair.reader.readline() == b"short\n"
    await pair.close()


async def test_a_tuple_of_separators_ends_at_the_first_of_them() -> None:
    pair = await make_pair()
    pair.peer.send(b"a;b\r\nc\nrest")
    separators = (b"\n", b"\r\n", b";")
    assert [await pair.reader.readuntil(separators) for _ in range(3)] == [b"a;", b"b\r\n", b"c\n"]
    with pytest.raises(ValueError, match="at least one element"):
        await pair.reader.readuntil(())
    with pytest.raises(ValueError, match="at least one-byte"):
        await pair.reader.readuntil((b"", b"x"))
    await pair.close()


class NoTransport(asyncio.Transport):
    """As much of a transport as a reader needs."""

    def __init__(self) -> None:
        super().__init__()
        self.is_paused = False

    def pause_reading(self) -> None:
        assert not self.is_paused
        self.is_paused = True

    def resume_reading(self) -> None:
        assert self.is_paused
        self.is_paused = False


READS: dict[str, Callable[[asyncio.StreamReader], Awaitable[bytes]]] = {
    "read a few": lambda reader: reader.read(3),
    "read": lambda reader: reader.read(100),
    "read all": lambda reader: reader.read(),
    "read nothing": lambda reader: reader.read(0),
    "read exactly": lambda reader: reader.readexactly(5),
    "read far more than the limit": lambda reader: reader.readexactly(40),
    "read a line": lambda reader: reader.readline(),
    "next line": lambda reader: reader.__anext__(),
    "read until": lambda reader: reader.readuntil(b"ab"),
}

STEPS = st.lists(
    st.one_of(
        st.sampled_from([*READS, "cancel", "look"]),
        st.sampled_from([b"a", b"\n", b"ab", b"abc\n", b"a\nb\n", b"123456789", b"x" * 30, b"ab" * 11 + b"\n"]),
        st.sampled_from([b"a\nb\nab\nc\nd", b"a\n\nab\n\n\n", b"x\n" * 50, b"1234567\n" * 5 + b"12345678\n1\n2\n"]),
        st.sampled_from(["end", "break"]),
    ),
    max_size=25,
)

# Lines that come together while a read waits, which is the short way: of as many bytes as the limit or a piece, and of others.
LINES = [
    b"a\nb\n",
    b"a\nb\nc",
    b"a\n123456\n",
    b"a\n123456789\n",
    b"\n" * 9,
    b"x\n" * 31,
    b"x\n" * 32,
    b"x\n" * 31 + b"12",
]
STEPS_OF_LINES = st.lists(
    st.sampled_from([*LINES, *["read a line", "next line"] * 2, "read a few", "read exactly", "read until", "cancel"]),
    min_size=8,
    max_size=25,
)


async def play(
    reader: asyncio.StreamReader,
    receive: Callable[[bytes], object],
    end: Callable[[], object],
    steps: list[Any],
    call: Callable[..., object],
    start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]] = asyncio.create_task,
) -> list[Any]:
    """Tell what a reader does in these steps: what reads give, what they raise, and what is left.

    `call` lets what comes from the peer come: in an event of the loop, as it does from a transport, or while a task is current.
    """
    transport = NoTransport()
    reader.set_transport(transport)
    told: list[Any] = []
    task: asyncio.Task[Any] | None = None
    has_ended = False

    async def read(how: str) -> None:
        try:
            told.append((how, await READS[how](reader)))
        except (Exception, asyncio.CancelledError) as error:
            told.append((how, repr(error)))

    for step in steps:
        if isinstance(step, bytes):
            if not has_ended:
                call(receive, step)
        elif step == "cancel" and task is not None:
            task.cancel()
        elif step == "look" and isinstance(reader, aioecho.StreamReader):
            reader.waits(0.0)  # as the timeouts do
        elif step == "end":
            has_ended = True
            call(end)
        elif step == "break":
            call(reader.set_exception, OSError("broken"))
        elif step in READS and (task is None or task.done()):
            task = start(read(step))
        elif step in READS:
            await read(step)  # while the other waits
        for _ in range(4):
            await asyncio.sleep(0)
    if task is not None:
        task.cancel()
        await asyncio.wait([task])
    told.append((bytes(reader._buffer), reader.at_eof(), repr(reader.exception())))  # type: ignore[attr-defined]
    return told


def up_to_a_line_too_long(told: list[Any]) -> list[Any]:
    """Return what comes before the first line over the limit, of which asyncio hands out the rest as a line."""
    for index, (_, result, *_) in enumerate(told):
        if isinstance(result, str) and ("ValueError" in result or "LineTooLong" in result):
            return [*told[:index], "too long"]
    return told


@pytest.mark.slow
def test_a_reader_does_what_asyncios_does_whatever_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "PIECE", 64)  # so that chunks of 64 bytes are as long as is split at a time
    monkeypatch.setattr(receive, "SHORT", 16)
    monkeypatch.setattr(receive, "MANY", 8)

    with asyncio.Runner() as runner:
        loop = runner.get_loop()

        def in_a_task(function: Callable[..., object], *args: Any) -> None:
            function(*args)

        @settings(max_examples=500, deadline=None)
        @example(["read a line", b"a\n123456789\n", "read a line", "read a line"], loop.call_soon, 8)
        @given(STEPS | STEPS_OF_LINES, st.sampled_from([in_a_task, loop.call_soon]), st.sampled_from([8, 64, 200]))
        def check(steps: list[Any], call: Callable[..., object], limit: int) -> None:
            theirs = asyncio.StreamReader(limit=limit, loop=loop)
            expected = runner.run(play(theirs, theirs.feed_data, theirs.feed_eof, steps, call))
            for is_driven in (False, True):
                ours = StreamProtocol(loop, limit=limit, is_server_side=True)
                start = functools.partial(drive, protocol=ours) if is_driven else asyncio.create_task
                told = runner.run(play(ours.reader, ours.data_received, ours.eof_received, steps, call, start))
                assert up_to_a_line_too_long(told) == up_to_a_line_too_long(expected)

        check()


@pytest.mark.parametrize("method", ["read", "readline", "readexactly", "readuntil", "__anext__"])
async def test_two_that_read_at_once_get_a_runtime_error(method: str) -> None:
    pair = await make_pair()
    first = asyncio.create_task(pair.reader.readline())
    await settle()
    arguments = {"read": (10,), "readexactly": (5,)}.get(method, ())
    with pytest.raises(RuntimeError, match=r"\(\) called while another coroutine is already waiting for incoming data"):
        await getattr(pair.reader, method)(*arguments)
    pair.peer.send(b"still mine\n")
    assert await first == b"still mine\n"
    await pair.close()


async def test_reads_after_the_end_and_after_an_error() -> None:
    pair = await make_pair()
    pair.peer.send(b"no end")
    pair.peer.shutdown(socket.SHUT_WR)
    with pytest.raises(asyncio.IncompleteReadError) as caught:
        await pair.reader.readuntil(b"\n")
    assert caught.value.partial == b"no end"
    assert await pair.reader.read() == await pair.reader.readline() == await pair.reader.read(1) == b""
    assert pair.reader.at_eof()
    assert [line async for line in pair.reader] == []
    pair.protocol.data_received(b"after the end")
    assert await pair.reader.read() == b""
    pair.reader.set_exception(OSError("broken"))
    for read in (pair.reader.read, pair.reader.readline, lambda: pair.reader.readexactly(1), pair.reader.readuntil):
        with pytest.raises(OSError, match="broken"):
            await read()
    with pytest.raises(OSError, match="broken"):
        await pair.writer.drain()
    await pair.close()


async def test_drain_waits_over_the_high_water_mark_until_the_peer_has_read() -> None:
    pair = await make_pair()
    pair.writer.transport.set_write_buffer_limits(high=10_000, low=1000)
    pair.writer.write(b"")
    await asyncio.wait_for(pair.writer.drain(), 10)
    pair.writer.writelines([b"x" * 1_000_000, b"y" * 1_000_000])
    drains = [asyncio.create_task(pair.writer.drain()) for _ in range(3)]
    await settle()
    assert not any(drain.done() for drain in drains)
    drains[0].cancel()
    got = 0
    while got < 2_000_000:
        try:
            got += len(pair.peer.recv(100_000))
        except BlockingIOError:
            await asyncio.sleep(0)
    results = await asyncio.gather(*drains, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]
    await pair.close()


async def test_drain_tells_of_a_lost_connection() -> None:
    pair = await make_pair()
    pair.writer.write(b"x" * 5_000_000)
    waiting = asyncio.create_task(pair.writer.drain())
    await settle()
    pair.peer.close()
    with pytest.raises(ConnectionError):
        await waiting
    with pytest.raises(ConnectionError):
        await pair.writer.drain()
    with pytest.raises(ConnectionError):
        await pair.writer.wait_closed()
    assert pair.writer.is_closing()
    await pair.close()


async def test_drain_and_send_raise_what_the_readers_exception_was_set_to() -> None:
    pair = await make_pair()
    handler = aioecho.echo.Echo((pair.reader, pair.writer), None, None)  # type: ignore[arg-type]
    await handler.send(b"x")
    pair.reader.set_exception(OSError("told by the application"))
    for sending in (handler.send(b"y"), pair.writer.drain()):
        with pytest.raises(OSError, match="told by"):
            await sending
    await pair.close()


async def test_a_loop_of_writes_and_drains_notices_that_the_peer_is_gone() -> None:
    pair = await make_pair()
    pair.peer.close()

    async def write_for_ever() -> None:
        while True:
            pair.writer.write(b"x")
            await pair.writer.drain()

    with pytest.raises(ConnectionError):
        await asyncio.wait_for(write_for_ever(), 20)
    await pair.close()


async def test_the_writer_is_asyncios_writer() -> None:
    pair = await make_pair()
    assert isinstance(pair.writer, asyncio.StreamWriter)
    assert isinstance(pair.reader, asyncio.StreamReader)
    assert pair.writer.get_extra_info("socket").family == socket.AF_UNIX
    assert pair.writer.get_extra_info("no such", 7) == 7
    assert pair.writer.can_write_eof()
    pair.writer.write(b"bye")
    pair.writer.write_eof()
    await settle()
    assert pair.peer.recv(10) == b"bye"
    assert pair.peer.recv(10) == b""
    pair.peer.send(b"last words")
    assert await pair.reader.read(100) == b"last words"
    pair.writer.close()
    assert pair.writer.is_closing()
    await pair.writer.wait_closed()
    await pair.close()


class Starttls(aioecho.StreamRequestHandler):
    """A line in plain text, then TLS, then lines that say which."""

    context: ssl.SSLContext

    async def handle(self) -> None:
        while line := await self.reader.readline():
            if line == b"STARTTLS\n":
                if self.server.early_answer:  # type: ignore[attr-defined]
                    await self.send(b"go ahead\n")
                await self.writer.start_tls(self.server.context)  # type: ignore[attr-defined]
                secret = self.writer.get_extra_info("ssl_object") is not None
                await self.send(b"tls %d\n" % secret)
            else:
                await self.send(line.upper())


async def starttls_server(tls: SimpleNamespace, *, early_answer: bool) -> aioecho.TCPServer:
    server = aioecho.TCPServer(("127.0.0.1", 0), Starttls, timeouts=aioecho.Timeouts(handshake=1))
    server.context = tls.server  # type: ignore[attr-defined]
    server.early_answer = early_answer  # type: ignore[attr-defined]
    await server.start()
    return server


async def test_a_stream_goes_over_to_tls(tls: SimpleNamespace) -> None:
    server = await starttls_server(tls, early_answer=True)
    reader, writer = await aioecho_connect(server)
    writer.write(b"plain\nSTARTTLS\n")
    assert await reader.readline() == b"PLAIN\n"
    assert await reader.readline() == b"go ahead\n"
    await writer.start_tls(tls.client, server_hostname="127.0.0.1")
    writer.write(b"secret\n" * 2)
    assert [await reader.readline() for _ in range(3)] == [b"tls 1\n", b"SECRET\n", b"SECRET\n"]
    writer.close()
    await writer.wait_closed()
    await server.shutdown()


async def test_a_hello_right_behind_the_command_is_the_handshakes(tls: SimpleNamespace) -> None:
    server = await starttls_server(tls, early_answer=False)

    def client() -> bytes:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = tls.client.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        with pytest.raises(ssl.SSLWantReadError):
            session.do_handshake()
        got = b""
        with socket.create_connection(server.server_address, timeout=30) as sock:
            sock.sendall(b"STARTTLS\n" + outgoing.read())  # in one segment
            while True:
                try:
                    session.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    sock.sendall(outgoing.read())
                    incoming.write(sock.recv(65536))
            session.write(b"secret\n")
            sock.sendall(outgoing.read())
            while got.count(b"\n") < 2:
                try:
                    got += session.read()
                except ssl.SSLWantReadError:
                    incoming.write(sock.recv(65536))
        return got

    assert await asyncio.to_thread(client) == b"tls 1\nSECRET\n"
    await server.shutdown()


async def test_plain_text_behind_the_command_does_not_survive_into_tls(tls: SimpleNamespace) -> None:
    server = await starttls_server(tls, early_answer=False)
    reader, writer = await aioecho_connect(server)
    writer.write(b"STARTTLS\ninjected\n")
    answer = await asyncio.gather(reader.read(), return_exceptions=True)
    assert b"INJECTED" not in (answer[0] if isinstance(answer[0], bytes) else b"")
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    await server.shutdown()
    assert server.stats.failed == 1


@pytest.mark.parametrize("how", ["silent", "gone", "reset", "garbage"])
async def test_a_peer_that_fails_to_start_tls_holds_nothing(
    tls: SimpleNamespace, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Impatient(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.readline()
            await self.writer.start_tls(tls.server, ssl_handshake_timeout=0.1)

    async with aioecho.TCPServer(("127.0.0.1", 0), Impatient) as server:
        sock = socket.create_connection(server.server_address)
        sock.sendall(b"STARTTLS\n")
        if how == "gone":
            sock.shutdown(socket.SHUT_WR)
        await settle(lambda: server.stats.accepted == 1)
        if how == "reset":
            await settle()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        elif how == "garbage":
            await settle()
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        await settle(lambda: not server.connections)
        assert server.stats.failed == server.stats.reasons["connection lost"] == 1
        sock.close()
        assert (await server.shutdown(20)).seconds < 5
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def aioecho_connect(server: aioecho.BaseServer) -> Any:
    from aioecho.client import open_connection

    return await open_connection(server.names[0])


async def test_a_foreign_stepper_that_resumes_late_loses_no_byte() -> None:
    """Who awaits like a task, but runs the coroutine later than the wake-up, still gets the chunks in order."""
    pair = await make_pair()
    loop = asyncio.get_running_loop()
    coro = pair.reader.readexactly(6)
    waiter = coro.send(None)
    late: list[Callable[[], Awaitable[Any]]] = []
    waiter._asyncio_future_blocking = False
    waiter.add_done_callback(lambda w: late.append(w), context=__import__("contextvars").copy_context())
    loop.call_soon(pair.protocol.data_received, b"abc")
    loop.call_soon(pair.protocol.data_received, b"defghi")
    await settle()
    assert len(late) == 1
    with pytest.raises(StopIteration) as end:
        coro.send(None)
    assert end.value.value == b"abcdef"
    assert await pair.reader.read(10) == b"ghi"
    await pair.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_short_messages_map_no_memory(loop: str) -> None:
    """What asyncio's transports read with by themselves is so large that malloc() may map it anew for each."""
    count = 2_000
    with Subject(loop, "echo") as server, connect(server.endpoint) as sock:
        for _ in range(3):  # what is made once is made before it counts
            before = server.ask()
            for number in range(count):
                sock.sendall(b"%08d" % number)
                assert sock.recv(100) == b"%08d" % number
            pages = server.ask()["faults"] - before["faults"]
        print(f"pages mapped for {count} messages on {loop}: {pages}")
        assert pages < count / 4


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_large_messages_map_no_memory(loop: str) -> None:
    """A chunk is large enough for malloc() to give its memory back to the kernel, as soon as it is freed."""
    count, message = 100, b"x" * 2**20
    with Subject(loop, "echo") as server, connect(server.endpoint) as sock, ThreadPoolExecutor(1) as pool:
        for _ in range(2):  # what is made once is made before it counts
            before = server.ask()
            for _ in range(count):
                sending = pool.submit(sock.sendall, message)
                left = len(message)
                while left:
                    left -= len(sock.recv(left))
                sending.result()
            pages = server.ask()["faults"] - before["faults"]
        print(f"pages mapped for {count} messages on {loop}: {pages}")
        assert pages < 8 * count  # it was 50 and more for each


# As test_crowds.py does by the memory of ten thousand, which not every Python has CI run: one dictionary is 300 bytes on 3.13.
async def test_an_idle_connections_handler_reader_and_writer_have_no_dictionaries() -> None:
    class Idle(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            parts.extend([self, self.reader, self.writer])
            await self.reader.read(1)

    parts: list[Any] = []
    async with aioecho.TCPServer(("127.0.0.1", 0), Idle) as server:
        for _ in range(40):  # the first of a class have more
            _, writer = await asyncio.open_connection(*server.server_address)
            writer.close()
            await writer.wait_closed()
        del parts[:]
        _, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: parts)
        assert [part for part in parts if any(type(each) is dict for each in gc.get_referents(part))] == []
        writer.close()
        await writer.wait_closed()
