"""The client: how it connects, what it makes of bad servers, how it connects again, and what it never does."""

import asyncio
import contextlib
import errno
import logging
import os
import random
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, handler, reset

import aioecho
from aioecho import Backoff, ConnectionClosed, ConnectionTimeout, EndpointError, connect
from aioecho.client import explain
from aioecho.echo import Echo
from aioecho.framing import Delimited, LengthPrefixed, Lines, Netstrings

AT_ONCE = Backoff(base=0)


@contextlib.asynccontextmanager
async def bad_server(serve: Callable[[socket.socket], Awaitable[None]]) -> AsyncIterator[str]:
    """Serve by `serve(sock)`, a task for every client that is accepted, without aioecho; give the endpoint."""
    loop = asyncio.get_running_loop()
    tasks = []
    with socket.create_server(ANYWHERE) as listening:
        listening.setblocking(False)

        async def serve_one(sock: socket.socket) -> None:
            with sock:
                await serve(sock)

        async def accept() -> None:
            while True:
                sock, _ = await loop.sock_accept(listening)
                sock.setblocking(False)
                tasks.append(asyncio.create_task(serve_one(sock)))

        tasks.append(asyncio.create_task(accept()))
        try:
            yield f"tcp://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def read(sock: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(sock, 65536)


async def write(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


def free_port() -> int:
    with socket.create_server(ANYWHERE) as sock:
        port: int = sock.getsockname()[1]
        return port


# Streams.


@pytest.mark.parametrize("framing", [LengthPrefixed(4), Lines(), Netstrings(), Delimited(b"\r\n")], ids=repr)
async def test_frames_are_sent_and_received(framing: Any) -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server, connect(server.names[0], framing=framing) as conn:
        await conn.send(b"hello")
        assert await conn.receive() == b"hello"
        assert await conn.ask(b"again") == b"again"
        assert conn.endpoint == server.names[0]


async def test_the_messages_of_a_stream_end_where_the_server_closes() -> None:
    async def handle(self: Any) -> None:
        await self.send(b"one\ntwo\n")

    talk = handler(handle)
    async with aioecho.serve(talk, "tcp://127.0.0.1:0") as server, connect(server.names[0], framing=Lines()) as conn:
        assert [line async for line in conn] == [b"one", b"two"]
        with pytest.raises(ConnectionClosed, match=r"^tcp://127\.0\.0\.1:\d+ closed the connection$"):
            await conn.receive()


async def test_without_a_framing_there_are_the_reader_and_the_writer() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server, connect(server.names[0]) as conn:
        await conn.send(b"hel")
        conn.writer.write(b"lo\n")
        assert await conn.reader.readline() == b"hello\n"
        for receive in (conn.receive, lambda: anext(conn), lambda: conn.ask(b"x")):
            with pytest.raises(RuntimeError, match=r"ends: connect with a framing, such as framing=.*Lines\(\)"):
                await receive()


async def test_the_kernel_looks_for_a_server_that_has_vanished() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server, connect(server.names[0]) as conn:
        sock = conn.writer.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        times = [sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}")) for name in ("IDLE", "INTVL")]
        assert times[0] + times[1] * sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 60


@pytest.mark.parametrize("name", ["file", "@abstract"])
async def test_unix_sockets_are_connected_to(tmp_path: Any, name: str) -> None:
    endpoint = f"unix:{tmp_path}/app.sock" if name == "file" else f"unix:@aioecho-test-{tmp_path}"
    async with aioecho.serve(Echo, endpoint), connect(endpoint, framing=Lines()) as conn:
        assert await conn.ask(b"hello") == b"hello"


async def test_tls_is_a_file_of_an_authority_or_a_context(tls: SimpleNamespace) -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        for trusted in (tls.files.ca, str(tls.files.ca), tls.client):
            async with connect(server.names[0], framing=Lines(), tls=trusted, server_hostname="localhost") as conn:
                assert await conn.ask(b"hello") == b"hello"
                assert conn.writer.get_extra_info("ssl_object").version() == "TLSv1.3"


async def test_a_certificate_that_is_not_accepted_is_told_at_once(tls: SimpleNamespace) -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        with pytest.raises(
            EndpointError, match=r"cannot connect to tcp://.*: the certificate is not accepted: "
        ) as caught:
            await connect(server.names[0], tls=True, reconnect=Backoff(base=60, cap=60))
        assert caught.value.errno is None  # OpenSSL's own is 1, which would be EPERM
        with pytest.raises(EndpointError, match="the certificate is not accepted: Hostname mismatch"):
            await connect(server.names[0], tls=tls.files.ca, server_hostname="other.example")


def test_an_alert_is_told_from_what_is_no_tls() -> None:
    alert, other = ssl.SSLError(1, "alert"), ssl.SSLError(1, "other")
    alert.reason, other.reason = "SSLV3_ALERT_HANDSHAKE_FAILURE", "WRONG_VERSION_NUMBER"
    assert explain(alert) == "the server sent a TLS alert: SSLV3_ALERT_HANDSHAKE_FAILURE"
    assert explain(other) == "no TLS there: WRONG_VERSION_NUMBER"


@pytest.mark.parametrize(
    ("endpoint", "options", "said"),
    [
        (
            "fd://3",
            {},
            "cannot connect to fd://3: only to tcp://HOST:PORT, unix:PATH, udp://HOST:PORT and unixgram:PATH",
        ),
        ("tcp://127.0.0.1:0", {}, "with the server's port"),
        ("tcp//x", {}, "bad endpoint 'tcp//x'"),
        ("udp://127.0.0.1:9", {"framing": Lines()}, "a framing is for streams, and udp://127.0.0.1:9 is for datagrams"),
        ("udp://127.0.0.1:9", {"tls": True}, "TLS is for streams, and udp://127.0.0.1:9 is for datagrams"),
        ("tcp://127.0.0.1:9", {"server_hostname": "x"}, "server_hostname is for TLS"),
        ("unix:x", {"tls": True}, "unix:x has no host name: give the one of its certificate as server_hostname"),
        ("tcp://127.0.0.1:9", {"tls": "/no/ca.pem"}, "cannot trust the authorities in /no/ca.pem: No such file"),
        ("tcp://127.0.0.1:9", {"tls": __file__}, "cannot trust the authorities in"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_connected(endpoint: str, options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        connect(endpoint, **options)
    assert "\n" not in str(caught.value)


def test_a_framing_that_is_none_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"framing must be an aioecho.framing.Framing, as Lines\(\), not 'lines'"):
        connect("tcp://127.0.0.1:9", framing="lines")  # type: ignore[arg-type]


async def test_what_connects_is_entered_once_at_a_time() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server:
        connecting = connect(server.names[0], framing=Lines())
        async with connecting as conn:
            with pytest.raises(RuntimeError, match="it is entered already"):
                await connecting.__aenter__()
            assert await conn.ask(b"hello") == b"hello"
        async with connecting as conn:
            assert await conn.ask(b"again") == b"again"
        first, second = await asyncio.gather(*(connecting.__aenter__() for _ in range(2)), return_exceptions=True)
        await connecting.__aexit__(None, None, None)
        assert isinstance(first, aioecho.Connection)
        assert isinstance(second, RuntimeError)


# Bad servers.


async def test_a_server_that_is_not_there_is_named_in_one_line(tmp_path: Any) -> None:
    for endpoint, reason in (
        (f"tcp://127.0.0.1:{free_port()}", "Connection refused"),
        (f"unix:{tmp_path}/none.sock", "No such file or directory"),
    ):
        with pytest.raises(EndpointError) as caught:
            await connect(endpoint)
        assert str(caught.value) == f"cannot connect to {endpoint}: {reason}"


async def test_a_server_that_does_not_answer_the_handshake_is_given_up() -> None:
    async def say_nothing(sock: socket.socket) -> None:
        await asyncio.Event().wait()

    async with bad_server(say_nothing) as endpoint:
        with pytest.raises(EndpointError, match=r"^cannot connect to tcp://.*: no answer within 0.05 s$"):
            await connect(endpoint, tls=True, server_hostname="x", connect_timeout=0.05)


async def test_silence_is_a_timeout_and_what_comes_later_is_received() -> None:
    go = asyncio.Event()

    async def delay(sock: socket.socket) -> None:
        await write(sock, b"ha")
        await go.wait()
        await write(sock, b"lf\n")
        await read(sock)

    async with bad_server(delay) as endpoint, connect(endpoint, framing=Lines(), timeout=0.05) as conn:
        with pytest.raises(ConnectionTimeout) as caught:
            await conn.receive()
        assert str(caught.value) == f"{endpoint} sent no whole message within 0.05 s"
        assert isinstance(caught.value, TimeoutError)
        go.set()
        conn.timeout = 5
        assert await conn.receive() == b"half"


async def test_a_late_reply_is_never_that_of_the_next_request() -> None:
    requests = []

    async def reply_late(sock: socket.socket) -> None:
        while data := await read(sock):
            requests.append(data)

    async with bad_server(reply_late) as endpoint, connect(endpoint, framing=Lines()) as conn:
        with pytest.raises(ConnectionTimeout, match=r"sent no reply within 0.05 s$"):
            await conn.ask(b"first", timeout=0.05)
        with pytest.raises(ConnectionClosed, match="was closed by this program"):
            await conn.ask(b"second")
        await settle()
    async with bad_server(reply_late) as endpoint, connect(endpoint, framing=Lines()) as conn:
        asking = asyncio.create_task(conn.ask(b"cancelled"))
        await settle(lambda: requests[-1:] == [b"cancelled\n"])
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        with pytest.raises(ConnectionClosed):
            await conn.ask(b"after that")
    assert requests == [b"first\n", b"cancelled\n"]


async def test_tasks_that_ask_at_the_same_time_get_their_own_replies() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server, connect(server.names[0], framing=Lines()) as conn:
        words = [b"%d" % number for number in range(50)]
        assert await asyncio.gather(*map(conn.ask, words)) == words


async def test_a_reset_is_told_by_receive_and_by_send() -> None:
    accepted = []

    async def reset_at_once(sock: socket.socket) -> None:
        await read(sock)
        accepted.append(sock)
        reset(sock)

    async with bad_server(reset_at_once) as endpoint, connect(endpoint, framing=Lines()) as conn:
        await conn.send(b"x")
        with pytest.raises(ConnectionClosed) as caught:
            await conn.receive()
        assert str(caught.value) == f"the connection to {endpoint} broke: Connection reset by peer"
        assert isinstance(caught.value, ConnectionError)
        for _ in range(2):
            with pytest.raises(ConnectionClosed, match=r"^the connection to tcp://\S+ broke: Connection "):
                await conn.send(b"x")


async def test_an_end_in_the_middle_of_a_message_is_no_end() -> None:
    async def send_half(sock: socket.socket) -> None:
        await write(sock, b"\0\0\0\5hello\0\0\0\5he")

    async with bad_server(send_half) as endpoint, connect(endpoint, framing=LengthPrefixed(4)) as conn:
        assert await anext(conn) == b"hello"
        with pytest.raises(ConnectionClosed, match=r"in the middle of a message, after 6 bytes$") as caught:
            await anext(conn)
        assert caught.value.partial == b"\0\0\0\5he"


async def test_a_server_that_closes_without_a_word_is_told_from_one_that_has_spoken() -> None:
    async def close(sock: socket.socket) -> None:
        pass

    async with bad_server(close) as endpoint, connect(endpoint, framing=Lines()) as conn:
        with pytest.raises(ConnectionClosed, match=r"^tcp://\S+ closed the connection without a message$"):
            await conn.receive()


async def test_a_message_that_is_too_long_is_named_and_skipped() -> None:
    async def send_much(sock: socket.socket) -> None:
        await write(sock, struct.pack(">I", 99) + bytes(99) + struct.pack(">I", 2) + b"ok")
        await read(sock)

    async with bad_server(send_much) as endpoint, connect(endpoint, framing=LengthPrefixed(4, max_size=64)) as conn:
        with pytest.raises(aioecho.FrameTooLong) as caught:
            await conn.receive()
        assert str(caught.value) == f"{endpoint} sent a frame of 99 bytes, over the limit of 64 bytes"
        assert await conn.receive() == b"ok"


async def test_a_frame_that_announces_gigabytes_is_refused_before_it_comes() -> None:
    async def announce(sock: socket.socket) -> None:
        await write(sock, b"\xff\xff\xff\xff")
        await read(sock)

    async with bad_server(announce) as endpoint, connect(endpoint, framing=LengthPrefixed(4)) as conn:
        with pytest.raises(aioecho.FrameTooLong, match="over the limit of 16777216 bytes"):
            await conn.receive()


async def test_what_is_no_frame_names_the_endpoint() -> None:
    async def send_noise(sock: socket.socket) -> None:
        await write(sock, b"hello\n")
        await read(sock)

    async with bad_server(send_noise) as endpoint, connect(endpoint, framing=Netstrings()) as conn:
        with pytest.raises(aioecho.FramingError, match=rf"^{endpoint} sent no length"):
            await conn.receive()


async def test_a_server_that_does_not_read_is_a_timeout_and_does_not_hold_up_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("aioecho.client.connection.CLOSING", 0.05)

    async def ignore(sock: socket.socket) -> None:
        await asyncio.Event().wait()

    async with bad_server(ignore) as endpoint, connect(endpoint, framing=LengthPrefixed(4), timeout=0.05) as conn:
        with pytest.raises(ConnectionTimeout, match=r"did not read what was sent within 0.05 s$"):
            await conn.send(bytes(2**25))


async def test_a_cancelled_receive_loses_no_message() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server, connect(server.names[0], framing=Lines()) as conn:
        for number in range(20):
            receiving = asyncio.create_task(conn.receive())
            await conn.send(b"%d" % number)
            for _ in range(number % 5):
                await asyncio.sleep(0)
            receiving.cancel()
            try:
                received = await receiving
            except asyncio.CancelledError:
                received = await conn.receive()
            assert received == b"%d" % number


async def test_an_ask_while_another_task_receives_sends_nothing_and_ends_nothing() -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(aioecho.serve(Echo, "tcp://127.0.0.1:0"))
        datagrams = await stack.enter_async_context(datagram_server(lambda data, send: send(data)))
        stream = await stack.enter_async_context(connect(server.names[0], framing=Lines(), timeout=10))
        for conn in (stream, await stack.enter_async_context(connect(datagrams, timeout=10))):
            receiving = asyncio.create_task(conn.receive())
            await settle()
            with pytest.raises(RuntimeError, match="another task receives"):
                await conn.ask(b"lost")
            await conn.send(b"hello")
            assert await receiving == b"hello"
            assert await conn.ask(b"again") == b"again"


# Reconnecting.


async def test_a_loop_gives_connection_after_connection_and_sends_nothing_by_itself() -> None:
    requests = []

    async def answer_once(sock: socket.socket) -> None:
        requests.append(await read(sock))
        if len(requests) % 2:
            reset(sock)
        else:
            await write(sock, b"ok\n")

    lost, connections = 0, []
    async with bad_server(answer_once) as endpoint:
        async for conn in connect(endpoint, framing=Lines(), reconnect=AT_ONCE):
            connections.append(conn)
            try:
                await conn.send(b"%d" % len(connections))
                assert await conn.receive() == b"ok"
            except ConnectionClosed:
                lost += 1
            if len(connections) == 4:
                break
    assert lost == 2
    assert requests == [b"1\n", b"2\n", b"3\n", b"4\n"], "what was lost was not sent again"
    with pytest.raises(ConnectionClosed, match="closed by this program"):
        await connections[0].send(b"x")


async def test_a_server_that_is_down_is_waited_for(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aioecho.client")
    endpoint = f"unix:{tmp_path}/app.sock"
    connecting = asyncio.ensure_future(
        _use(connect(endpoint, framing=Lines(), reconnect=Backoff(base=0.001, cap=0.01)))
    )
    await settle(lambda: caplog.records)
    async with aioecho.serve(Echo, endpoint):
        assert await connecting == b"hello"
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1, "further failures say nothing new"
    assert f"cannot connect to {endpoint}: No such file or directory; the next attempt is in 0.0 s" in caplog.text
    assert f"connected to {endpoint} after" in caplog.text


async def _use(connecting: Any) -> bytes:
    async with connecting as conn:
        reply: bytes = await conn.ask(b"hello")
        return reply


async def test_attempts_are_bounded_if_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(random, "uniform", lambda low, high: asked.append((low, high)) or 0)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(EndpointError, match=f"cannot connect to {endpoint}: Connection refused"):
        await connect(endpoint, reconnect=Backoff(base=1, cap=5, attempts=5))
    with pytest.raises(EndpointError):
        await anext(aiter(connect(endpoint, reconnect=Backoff(attempts=1))))
    assert asked == [(0, 1), (0, 2), (0, 4), (0, 5)]


async def test_a_server_that_accepts_and_closes_is_not_asked_without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(random, "uniform", lambda low, high: asked.append(high) or 0)

    async def close(sock: socket.socket) -> None:
        pass

    count = 0
    async with bad_server(close) as endpoint:
        async for conn in connect(endpoint, framing=Lines(), reconnect=Backoff(base=1, cap=30)):
            assert [line async for line in conn] == []
            count += 1
            if count == 4:
                break
    assert asked == [1, 2, 4]


async def test_a_connection_that_lasted_ends_the_series(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(random, "uniform", lambda low, high: asked.append(high) or 0)
    loop = asyncio.get_running_loop()
    count = 0
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server:
        async for _ in connect(server.names[0], reconnect=Backoff(base=0.01, cap=0.02)):
            count += 1
            if count == 3:
                began = loop.time()
                await asyncio.sleep(0.03)  # time is the subject: past the cap
                assert loop.time() - began >= 0.02
            if count == 4:
                break
    assert asked[0] == 0.01
    assert asked[2] == 0.01


async def test_an_error_in_the_loop_is_the_callers_and_closes_the_connection() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server:
        with pytest.raises(ZeroDivisionError):
            await _divide(connect(server.names[0]))
        await settle(lambda: not server.connections)


async def _divide(connecting: Any) -> None:
    async for _ in connecting:
        1 // 0  # noqa: B018 - it raises


async def test_a_loop_that_is_cancelled_in_its_pause_ends() -> None:
    attempts = asyncio.create_task(anext(aiter(connect(f"tcp://127.0.0.1:{free_port()}", reconnect=Backoff(60, 60)))))
    await settle()
    attempts.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempts


@pytest.mark.parametrize("options", [{"base": -1}, {"base": 2, "cap": 1}, {"attempts": 0}], ids=str)
def test_a_backoff_that_makes_no_sense_is_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Backoff(**options)


# Datagrams.


class DatagramServer(asyncio.DatagramProtocol):
    """Answers by `answer(data, send)`, without aioecho."""

    def __init__(self, answer: Callable[[bytes, Callable[[bytes], None]], None]) -> None:
        self.answer = answer

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, peer: Any) -> None:
        self.answer(data, lambda reply: self.transport.sendto(reply, peer))


@contextlib.asynccontextmanager
async def datagram_server(answer: Callable[[bytes, Callable[[bytes], None]], None]) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: DatagramServer(answer), local_addr=ANYWHERE)
    try:
        yield f"udp://127.0.0.1:{transport.get_extra_info('sockname')[1]}"
    finally:
        transport.close()
        await settle()


async def test_datagrams_are_sent_received_and_asked() -> None:
    async with datagram_server(lambda data, send: send(data.upper())) as endpoint, connect(endpoint) as conn:
        assert await conn.ask(b"hello") == b"HELLO"
        await conn.send(b"one")
        assert await conn.receive() == b"ONE"
        await conn.send(b"two")
        assert await anext(conn) == b"TWO"
        with pytest.raises(RuntimeError, match=r"there is no stream from udp://\S+: receive\(\) gives datagrams"):
            conn.reader  # noqa: B018 - it raises


@pytest.fixture
def two_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let localhost have two addresses, of which nothing listens on the first."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any, **options: Any) -> Any:
        if host != "localhost":
            return resolve(host, *rest, **options)
        return [each for address in ("127.0.0.99", "127.0.0.1") for each in resolve(address, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.usefixtures("two_addresses")
@pytest.mark.parametrize("way", ["ask", "receive", "waits", "many"])
async def test_the_next_address_is_used_when_no_server_is_at_the_first(way: str) -> None:
    async with (
        datagram_server(lambda data, send: send(data.upper())) as at,
        connect(at.replace("127.0.0.1", "localhost"), timeout=10) as conn,
    ):
        if way == "ask":
            assert await conn.ask(b"hello") == b"HELLO"
        elif way == "receive":
            await conn.send(b"hello")
            assert await conn.receive() == b"HELLO"
        elif way == "waits":
            receiving = asyncio.create_task(conn.receive())
            await settle()
            await conn.send(b"hello")
            assert await receiving == b"HELLO"
        else:
            for number in range(3):
                await conn.send(b"a%d" % number)
            assert [await conn.receive() for _ in range(3)] == [b"A0", b"A1", b"A2"]
        assert await conn.ask(b"more") == b"MORE"


@pytest.mark.usefixtures("two_addresses")
async def test_where_no_address_has_a_server_that_is_said() -> None:
    async with connect("udp://localhost:1") as conn:
        with pytest.raises(EndpointError, match="Connection refused"):
            await conn.ask(b"hello")


async def test_unix_datagrams_have_a_name_to_be_answered_at(tmp_path: Any) -> None:
    class Answer(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            await self.reply(self.data.upper())

    async with aioecho.serve(Answer, f"unixgram:{tmp_path}/s") as server, connect(server.names[0]) as conn:
        assert await conn.ask(b"hello") == b"HELLO"


async def test_a_lost_datagram_is_sent_again_as_often_as_was_asked_for() -> None:
    seen: list[bytes] = []

    def lose_two(data: bytes, send: Callable[[bytes], None]) -> None:
        seen.append(data)
        if len(seen) == 3:
            send(b"found")

    async with datagram_server(lose_two) as endpoint, connect(endpoint, timeout=0.05) as conn:
        assert await conn.ask(b"where?", retries=2) == b"found"
        with pytest.raises(ConnectionTimeout) as caught:
            await conn.ask(b"and now?")
        assert str(caught.value) == f"{endpoint} sent no reply within 0.05 s"
        with pytest.raises(ConnectionTimeout, match=r"within 0.05 s, asked 2 times"):
            await conn.ask(b"still?", retries=1)
    assert seen == [b"where?"] * 3 + [b"and now?"] + [b"still?"] * 2


async def test_a_datagram_that_is_not_the_reply_is_passed_over() -> None:
    def answer_twice(data: bytes, send: Callable[[bytes], None]) -> None:
        send(b"0 other")
        send(data[:1] + b" mine")

    async with datagram_server(answer_twice) as endpoint, connect(endpoint, timeout=5) as conn:
        for number in (b"1", b"2", b"3"):
            reply = await conn.ask(number + b"?", match=lambda reply, number=number: reply.startswith(number))
            assert reply == number + b" mine"


async def test_what_had_come_before_is_no_reply() -> None:
    def answer_twice(data: bytes, send: Callable[[bytes], None]) -> None:
        send(data)
        send(b"a duplicate")

    async with datagram_server(answer_twice) as endpoint, connect(endpoint, timeout=5) as conn:
        assert await conn.ask(b"1") == b"1"
        assert await conn.ask(b"2") == b"2"


async def test_a_port_without_a_server_is_told_by_the_reply_that_is_none() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(ANYWHERE)
        endpoint = f"udp://127.0.0.1:{sock.getsockname()[1]}"
    async with connect(endpoint, timeout=5) as conn:
        with pytest.raises(EndpointError) as caught:
            await conn.ask(b"x")
        assert str(caught.value) == f"cannot receive from {endpoint}: Connection refused"


async def test_a_program_without_descriptors_cannot_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(socket, "socket", fail)
        with pytest.raises(EndpointError, match=r"^cannot connect to udp://127\.0\.0\.1:9: Too many open files$"):
            await connect("udp://127.0.0.1:9")


async def test_a_name_that_does_not_resolve_is_named_and_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EndpointError, match=r"^cannot resolve the host of udp://no\.invalid:9: "):
        await connect("udp://no.invalid:9", connect_timeout=30)

    async def resolve_never(where: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr("aioecho.client.opening.resolve", resolve_never)
    with pytest.raises(
        EndpointError, match=r"^cannot resolve the host of udp://some\.name:9: no answer within 0.01 s$"
    ):
        await connect("udp://some.name:9", connect_timeout=0.01)


async def test_a_close_wakes_the_task_that_receives() -> None:
    async with datagram_server(lambda data, send: None) as endpoint:
        conn = await connect(endpoint)
        receiving = asyncio.create_task(conn.receive())
        await settle()
        with pytest.raises(RuntimeError, match="another task receives"):
            await conn.receive()
        await conn.close()
        with pytest.raises(ConnectionClosed, match=r"^the socket to udp://\S+ was closed by this program$"):
            await receiving
        with pytest.raises(ConnectionClosed):
            await conn.send(b"x")


@contextlib.asynccontextmanager
async def full(tmp_path: Any) -> AsyncIterator[tuple[aioecho.client.Connection, socket.socket]]:
    """Give a connection whose server, a bare socket, has no room for another datagram, and the server."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.setblocking(False)
        server.bind(f"{tmp_path}/s")
        async with connect(f"unixgram:{tmp_path}/s", timeout=0.01) as conn:
            with contextlib.suppress(ConnectionTimeout):
                while True:
                    await conn.send(b"x")
            conn.timeout = 10
            yield conn, server


async def test_tasks_that_send_at_the_same_time_all_wait_for_room(tmp_path: Any) -> None:
    async with full(tmp_path) as (conn, server):
        sending = [asyncio.create_task(conn.send(b"%d" % number)) for number in range(3)]
        await settle()
        assert not any(task.done() for task in sending)
        received: list[bytes] = []

        def is_empty() -> bool:
            with contextlib.suppress(BlockingIOError):
                while True:
                    received.append(server.recv(100))
            return all(task.done() for task in sending)

        await settle(is_empty)
        await asyncio.gather(*sending)
        assert [data for data in received if data != b"x"] == [b"0", b"1", b"2"]


async def test_a_close_wakes_the_tasks_that_send(tmp_path: Any) -> None:
    async with full(tmp_path) as (conn, _):
        sending = [asyncio.create_task(conn.send(b"y")) for _ in range(2)]
        await settle()
        await conn.close()
        for task in sending:
            with pytest.raises(ConnectionClosed, match=r"was closed by this program$") as caught:
                await task
            assert caught.value.__cause__ is not caught.value


async def test_a_server_that_sends_faster_than_is_received_does_not_hold_up_the_loop() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(ANYWHERE)
        async with connect(f"udp://127.0.0.1:{server.getsockname()[1]}", timeout=10) as conn:
            await conn.send(b"x")
            _, peer = server.recvfrom(100)
            for _ in range(100):
                server.sendto(b"y", peer)
            turns: list[bool] = []
            asyncio.get_running_loop().call_soon(turns.append, True)
            for _ in range(100):
                assert await conn.receive() == b"y"
            assert turns


async def test_a_unix_datagram_is_received_whole(tmp_path: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"{tmp_path}/s")
        async with connect(f"unixgram:{tmp_path}/s", timeout=10) as conn:
            await conn.send(b"x")
            _, peer = server.recvfrom(100)
            server.sendto(bytes(100_000), peer)
            assert len(await conn.receive()) == 100_000


async def test_a_stream_sends_nothing_twice() -> None:
    async with aioecho.serve(Echo, "tcp://127.0.0.1:0") as server, connect(server.names[0], framing=Lines()) as conn:
        with pytest.raises(ValueError, match="retries and match are for datagrams"):
            await conn.ask(b"x", retries=1)
