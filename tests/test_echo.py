"""The ready-made handlers, byte for byte."""

import asyncio
import re
import socket
import struct
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ask, close

import aioecho
from aioecho import testing
from aioecho.echo import FRAME_HANDLERS, HANDLERS, Agent, Chargen, Daytime, Discard, Echo, Time, Upper
from aioecho.framing import SLIP, Framing, Netstrings


async def replies(handler: Any, sent: bytes) -> bytes:
    """Return all that a server answers to all that a client sends."""
    async with aioecho.TCPServer(("127.0.0.1", 0), handler) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)

        async def send() -> None:
            writer.write(sent)
            await writer.drain()
            writer.write_eof()

        _, received = await asyncio.gather(send(), reader.read())
        writer.close()
        await writer.wait_closed()
        await settle(lambda: server.stats.active == 0)
        check_identity(server)
        assert server.stats.completed == 1
        return received


def test_the_ready_made_handlers_have_these_names() -> None:
    assert {
        "echo": Echo,
        "upper": Upper,
        "discard": Discard,
        "chargen": Chargen,
        "daytime": Daytime,
        "time": Time,
        "agent": Agent,
    } == HANDLERS


@pytest.mark.parametrize("framing", [Netstrings(), SLIP()], ids=repr)
async def test_with_a_framing_echo_and_upper_answer_frames(framing: Framing) -> None:
    frames = [b"a\nb", b"\xc0\xdb", b"x" * 3000]
    sent = b"".join(map(framing.join, frames))
    for name, kind in FRAME_HANDLERS.items():
        answers = frames if name == "echo" else [frame.upper() for frame in frames]
        received = await replies(type("Framed", (kind,), {"framing": framing}), sent)
        assert received == b"".join(map(framing.join, answers))


@pytest.mark.parametrize("data", [b"", b"x", b"Hello, Server!\n", bytes(range(256)) * 4096], ids=len)
async def test_echo_sends_back_what_comes(data: bytes) -> None:
    assert await replies(Echo, data) == data


async def test_echo_answers_before_the_client_has_sent_its_last() -> None:
    async with testing.connect(Echo) as client:
        for message in (b"no end of line", b"\0\xff", b"\n"):
            await client.send(message)
            assert await client.readexactly(len(message)) == message


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (b"Hello, Server!\n", b"HELLO, SERVER!\n"),
        (b"one\ntwo\r\n\nthree", b"ONE\nTWO\r\n\nTHREE"),
        (b"", b""),
        (b"last line without its end", b"LAST LINE WITHOUT ITS END"),
        (b"nul \0 digits 123 [\\]^_`{|}~\n", b"NUL \0 DIGITS 123 [\\]^_`{|}~\n"),
    ],
)
async def test_upper_answers_lines_in_upper_case(sent: bytes, received: bytes) -> None:
    assert await replies(Upper, sent) == received


async def test_upper_leaves_bytes_beyond_ascii_as_they_are() -> None:
    high = bytes(range(128, 256))
    assert await replies(Upper, high + b"z\n") == high + b"Z\n"
    assert await replies(Upper, "größe\n".encode()) == "GRößE\n".encode()


async def test_upper_answers_each_line_when_it_is_complete() -> None:
    async with testing.connect(Upper) as client:
        await client.send(b"one\ntw")
        assert await client.readline() == b"ONE\n"
        await client.send(b"o\n")
        assert await client.readline() == b"TWO\n"


async def test_discard_sends_nothing() -> None:
    assert await replies(Discard, b"anything\n" * 100_000) == b""


async def test_daytime_is_a_line_with_the_time_in_utc() -> None:
    line = (await replies(Daytime, b"")).decode("ascii")
    assert re.fullmatch(r"[A-Z][a-z]+, [A-Z][a-z]+ \d\d, \d{4} \d\d:\d\d:\d\d-UTC\r\n", line)
    told = datetime.strptime(line.strip(), "%A, %B %d, %Y %H:%M:%S-UTC").replace(tzinfo=UTC)
    assert timedelta(seconds=-1) <= datetime.now(UTC) - told <= timedelta(seconds=5)


async def test_time_is_the_seconds_since_1900_in_four_bytes() -> None:
    before = int(time.time())
    (told,) = struct.unpack("!L", await replies(Time, b""))
    # RFC 868: "the time 2,208,988,800 corresponds to 00:00 1 Jan 1970 GMT".
    assert before <= told - 2_208_988_800 <= before + 5


async def test_time_is_what_the_rfc_gives_as_examples_and_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    for unix, told in [(504_921_600, 2_713_910_400), (-1, 2_208_988_799), (2**32 - 2_208_988_800 + 5, 5)]:
        monkeypatch.setattr("aioecho.echo.time.time", lambda unix=unix: unix)
        assert struct.unpack("!L", await replies(Time, b"")) == (told,)


async def read_lines(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    return [await reader.readline() for _ in range(count)]


async def test_chargen_sends_the_rotating_pattern() -> None:
    printable = bytes(range(32, 127))
    async with aioecho.TCPServer(("127.0.0.1", 0), Chargen) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        lines = await read_lines(reader, 3 * len(printable) + 7)
        assert all(len(line) == 72 + 2 and line.endswith(b"\r\n") for line in lines)
        ring = printable * 2
        assert [line[:72] for line in lines] == [ring[n % 95 : n % 95 + 72] for n in range(len(lines))]
        assert lines[0] == rb""" !"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\]^_`abcdefg""" + b"\r\n"
        assert lines[95] == lines[0]
        writer.close()
        await writer.wait_closed()
        await settle(lambda: server.stats.active == 0)
        check_identity(server)


async def test_chargen_throws_away_what_comes_and_ends_when_the_client_has_sent_its_last() -> None:
    received = await replies(Chargen, b"noise" * 1000)
    assert received
    assert received.startswith(b' !"#$%')


async def test_chargen_ends_when_the_client_goes_away() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Chargen) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await reader.readline()
        writer.transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        writer.transport.abort()
        await settle(lambda: server.stats.accepted == 1 and server.stats.active == 0)
        check_identity(server)


async def test_chargen_ends_when_the_server_stops() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Chargen) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await read_lines(reader, 10)
        stopping = asyncio.create_task(server.shutdown(30))
        rest = await reader.read()
        assert rest.endswith(b"\r\n")
        writer.close()
        await writer.wait_closed()
        report = await stopping
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
        assert report.seconds < 5


async def test_chargen_leaves_the_loop_to_others() -> None:
    async with aioecho.serve(Chargen, "tcp://127.0.0.1:0") as noisy, aioecho.serve(Echo, "tcp://127.0.0.1:0") as quiet:
        noise_reader, noise_writer = await asyncio.open_connection(*noisy.server_address)

        async def take_all() -> None:
            while await noise_reader.read(2**20):
                pass

        taking = asyncio.create_task(take_all())
        reader, writer = await asyncio.open_connection(*quiet.server_address)
        for number in range(50):
            message = b"%d\n" % number
            writer.write(message)
            async with asyncio.timeout(20):
                assert await reader.readline() == message
        writer.close()
        noise_writer.write_eof()
        await taking
        noise_writer.close()
        await asyncio.gather(writer.wait_closed(), noise_writer.wait_closed())


# For a proxy


async def agent_says(server: aioecho.BaseServer) -> bytes:
    return await ask(server.sockets[-1].getsockname(), b"")


async def test_the_agent_tells_how_much_room_there_is() -> None:
    served = {Echo: "tcp://127.0.0.1:0", Agent: "tcp://127.0.0.1:0"}
    async with aioecho.serve(served, limits=aioecho.Limits(max_connections=4)) as server:
        assert await agent_says(server) == b"up ready 100%\n"
        _, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: server.stats.active == 1)
        assert await agent_says(server) == b"up ready 75%\n"
        await close(writer)
    async with aioecho.serve(served) as server:
        assert await agent_says(server) == b"up ready\n"


async def test_the_agent_of_a_server_that_stops_says_drain() -> None:
    async with aioecho.serve(Agent, "tcp://127.0.0.1:0") as server:
        server.pause()
        with socket.create_connection(server.server_address) as sock:  # it waits to be accepted when the stop begins
            sock.setblocking(False)
            stopping = asyncio.create_task(server.shutdown())
            assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"drain\n"
        await stopping
