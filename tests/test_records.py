"""Streams of records: split once, answered in one piece, refused when too long, and never at the cost of other clients."""

import asyncio
import io
import socket
import time
from typing import Any

import pytest
from conftest import settle
from helpers import ON_ONE_LOOP, close, handler, reset
from timing import in_time

import aioecho
from aioecho.framing import COBS, SLIP, Delimited, Framing, LengthPrefixed, Lines, Netstrings
from aioecho.streams import receive
from aioecho.streams.reader import StreamReader

LINE = b"x" * 63 + b"\n"


async def talk(kind: Any, *pieces: bytes, **options: Any) -> tuple[bytes, aioecho.Stats]:
    """Send pieces, a turn of the server apart, and return all that comes back, and the server's stats."""
    async with aioecho.TCPServer(("127.0.0.1", 0), kind, **options) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await settle()
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        await settle(lambda: server.stats.active == 0)
        return answer, server.stats


# 256 bytes were, by another constant of the same name.
@ON_ONE_LOOP
async def test_frames_are_split_32_kib_at_a_time() -> None:
    sizes: list[int] = []

    class Looked(Lines):
        def split(self, buffer: Any, scanned: int = 0, /) -> Any:
            sizes.append(len(buffer))
            return super().split(buffer, scanned)

    reader = StreamReader()
    reader.feed_data(b"a\n" * 2**15)
    reader.feed_eof()
    assert len([frame async for frame in reader.frames(Looked())]) == 2**15
    assert sizes == [2**15, 2**15]


async def echo_frames(self: Any) -> None:
    async for frame in self.frames:
        await self.send_frame(frame)


@pytest.mark.parametrize(
    "framing", [LengthPrefixed(4), LengthPrefixed(2, offset=4, strip=False), Lines(), Netstrings(), SLIP(), COBS()]
)
@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_handler_reads_and_sends_frames(framing: Framing, size: int) -> None:
    frames = [b"%04dframe %d" % (number, number) for number in range(200)]
    if not getattr(framing, "strip", True):
        frames = [framing.join(b"head\0\0" + frame) for frame in frames]
        stream = b"".join(frames)
    else:
        stream = b"".join(map(framing.join, frames))
    pieces = [stream[at : at + size * 20] for at in range(0, len(stream), size * 20)]
    answer, stats = await talk(handler(echo_frames, framing=framing), *pieces)
    assert answer == stream
    assert (stats.completed, stats.failed) == (1, 0)


async def test_batches_hold_all_that_has_come() -> None:
    sizes = []

    async def handle(self: Any) -> None:
        async for lines in self.reader.batches(Lines()):
            sizes.append(len(lines))
            assert set(lines) == {b"x" * 63}

    await talk(handler(handle), LINE * 300)
    assert sum(sizes) == 300
    assert 0 not in sizes
    assert len(sizes) <= 3


async def test_other_reads_go_on_where_frames_and_lines_were_left() -> None:
    async def handle(self: Any) -> None:
        reader = self.reader
        async for frame in reader.frames(Netstrings()):
            assert frame == b"one"
            break
        assert await reader.readline() == b"3:two,line\n"
        assert await anext(aiter(reader)) == b"a\n"
        assert await reader.read(1) == b"b"
        assert await reader.readexactly(3) == b"\nc\n"
        assert await reader.readuntil(b";") == b"d\ne;"
        assert [frame async for frame in reader.frames(Delimited(b"|"))] == [b"f", b"g"]
        await self.send(b"as expected")

    stream = b"3:one,3:two,line\na\nb\nc\nd\ne;f|g|"
    assert (await talk(handler(handle), stream))[0] == b"as expected"
    assert (await talk(handler(handle), *[stream[at : at + 1] for at in range(len(stream))]))[0] == b"as expected"


@pytest.mark.parametrize("cut", [1, 65_000, 200_000])
async def test_of_a_line_too_long_nothing_is_taken_for_a_line(cut: int) -> None:
    seen = []

    async def handle(self: Any) -> None:
        while True:
            try:
                line = await self.reader.readline()
            except aioecho.LineTooLong as error:
                seen.append(error.limit)
                continue
            if not line:
                return
            seen.append(line)

    stream = b"first\n" + b"A" * 200_000 + b"DELETE *\nPING\n"
    await talk(handler(handle), stream[:cut], stream[cut:])
    assert seen == [b"first\n", 2**16, b"PING\n"]


async def test_the_frame_after_one_too_long_is_whole() -> None:
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        frames = self.frames
        while True:
            try:
                seen.append(await anext(frames))
            except aioecho.FrameTooLong as error:
                seen.append((error.size, error.limit))
            except StopAsyncIteration:
                return

    framing = LengthPrefixed(4)
    kind = handler(handle, framing=framing)
    stream = framing.join(b"one") + framing.join(b"y" * 5000) + framing.join(b"two")
    for cut in (9, 100, len(stream)):
        seen.clear()
        await talk(kind, stream[:cut], stream[cut:], limits=aioecho.Limits(max_frame=1000))
        assert seen == [b"one", (5000, 1000), b"two"]


@pytest.mark.parametrize("size", [-1, 2000])
async def test_what_is_read_in_one_piece_is_bounded(size: int) -> None:
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        try:
            await (self.reader.read() if size < 0 else self.reader.readexactly(size))
        except aioecho.FrameTooLong as error:
            seen.append(error.limit)
        seen.append(await self.reader.read())  # the rest of it is skipped

    await talk(handler(handle), b"z" * 2000, b"" if size < 0 else b"after", limits=aioecho.Limits(max_frame=1000))
    assert seen == [1000, b"" if size < 0 else b"after"]


async def test_a_stream_that_ends_in_a_frame_is_incomplete() -> None:
    errors: list[Any] = []

    async def handle(self: Any) -> None:
        try:
            async for frame in self.frames:
                errors.append(frame)
        except asyncio.IncompleteReadError as error:
            errors.append((error.partial, error.expected))

    await talk(handler(handle, framing=LengthPrefixed(1)), b"\3one\5tw")
    assert errors == [b"one", (b"\5tw", 6)]


async def test_replies_to_pipelined_records_go_out_in_one_piece() -> None:
    async def handle(self: Any) -> None:
        async for line in self.reader:
            await self.send(line)

    def ask(address: Any) -> list[int]:
        sizes = []
        with socket.create_connection(address) as sock:
            for _ in range(20):
                sock.sendall(LINE * 16)
                sizes.append(len(sock.recv(4096)))
                left = 1024 - sizes[-1]
                while left:
                    left -= len(sock.recv(left))
        return sizes

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        sizes = await asyncio.to_thread(ask, server.server_address)
    assert sizes.count(1024) >= 15  # it is flushed after a millisecond too, which a busy machine takes at times


async def test_a_slow_handler_does_not_hold_replies_back() -> None:
    handled = 0

    async def handle(self: Any) -> None:
        nonlocal handled
        async for line in self.reader:
            time.sleep(0.01)
            handled += 1
            self.writer.write(line)

    def ask(address: Any) -> int:
        with socket.create_connection(address) as sock:
            sock.sendall(LINE * 50)
            sock.recv(64)
            return handled

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle)) as server:
        asyncio.get_running_loop().slow_callback_duration = 10
        assert await asyncio.to_thread(ask, server.server_address) < 25


@pytest.mark.parametrize("how", ["lines", "frames", "exactly", "until"])
async def test_a_fast_sender_does_not_starve_others(how: str) -> None:
    handled = 0

    async def handle(self: Any) -> None:
        nonlocal handled
        reader = self.reader
        if await reader.readexactly(1) == b"e":
            while data := await reader.read(100):
                await self.send(data)
            return
        lines = reader.frames(Lines()) if how == "frames" else reader
        while True:
            if how in ("lines", "frames"):
                await anext(lines)
            else:
                await (reader.readexactly(64) if how == "exactly" else reader.readuntil(b"\n"))
            until = time.perf_counter() + 0.0005
            while time.perf_counter() < until:
                pass
            handled += 1

    waited = []
    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle), grace=0.1) as server:
        asyncio.get_running_loop().slow_callback_duration = 10
        # In the server's own loop, so that it is the turns that are counted, and not how soon the machine runs a client.
        reader, writer = await asyncio.open_connection(*server.server_address)
        with socket.create_connection(server.server_address) as fast:
            writer.write(b"e")
            fast.sendall(b"f" + LINE * 1000)
            await settle(lambda: handled)
            while handled < 1000 and len(waited) < 8:
                before = handled
                writer.write(b"ping")
                assert await reader.readexactly(4) == b"ping"
                waited.append(handled - before)
            reset(fast)
        await close(writer)
    # Of a thousand records that were there. A client that had to wait for all of them would have waited for once.
    assert len(waited) == 8
    assert max(waited) <= 50


@pytest.mark.timed
@pytest.mark.parametrize("how", ["frames", "exactly"])
async def test_a_client_that_writes_in_two_parts_does_not_wait_for_acknowledgements(how: str) -> None:
    async def handle(self: Any) -> None:
        if how == "frames":
            await echo_frames(self)
        while True:
            size = int.from_bytes(await self.reader.readexactly(4), "big")
            await self.send(b"\0\0\0\4" + await self.reader.readexactly(size))

    def ask(address: Any) -> float:
        begin = time.monotonic()
        with socket.create_connection(address) as sock:  # with Nagle's algorithm, as it is by default
            for _ in range(50):
                sock.sendall(b"\0\0\0\4")
                sock.sendall(b"body")
                received = b""
                while len(received) < 8:
                    received += sock.recv(8)
        return time.monotonic() - begin

    async with aioecho.TCPServer(("127.0.0.1", 0), handler(handle, framing=LengthPrefixed(4))) as server:
        in_time(await asyncio.to_thread(ask, server.server_address), 1)  # each delayed acknowledgement would take 40 ms


@ON_ONE_LOOP
@pytest.mark.timed
async def test_several_separators_are_searched_for_in_linear_time() -> None:
    """By the time that four times as many lines take, which was sixteen times as long when it was quadratic."""

    async def read(count: int) -> float:
        reader = StreamReader(2**26)
        reader.feed_data(b"a\n" * count)
        begin = time.process_time()
        for _ in range(count):
            await reader.readuntil((b"\r\n", b"\n"))
        return time.process_time() - begin

    await read(1000)
    least = min([await read(10_000) for _ in range(3)])
    in_time(min([await read(40_000) for _ in range(3)]), 8 * least)


async def test_lines_between_counted_bytes_are_split_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in Redis's protocol: what readexactly() finds split is put back, and would be split again for the next line."""
    split = 0

    class Counting(io.BytesIO):
        def __init__(self, data: bytes) -> None:
            nonlocal split
            split += len(data)
            super().__init__(data)

    monkeypatch.setattr(receive, "BytesIO", Counting)
    reader = StreamReader()
    command = b"*2\r\n$3\r\nGET\r\n$6\r\nx\n\ny\r\n\r\n"
    reader.feed_data(command * 3000)
    for _ in range(3000):
        assert await reader.readline() == b"*2\r\n"
        for value in (b"GET\r\n", b"x\n\ny\r\n\r\n"):
            size = int((await reader.readline())[1:])
            assert await reader.readexactly(size + 2) == value
    assert split < 4 * len(command) * 3000


async def test_what_was_collected_is_written_before_anything_else() -> None:
    """A handler that closes, ends its stream, raises, or lets another task write, with more to read."""

    async def handle(self: Any) -> None:
        async for line in self.reader:
            self.writer.write(line)
            if line == b"close\n":
                self.writer.close()
                return
            if line == b"end\n":
                self.writer.write_eof()
            if line == b"raise\n":
                raise ConnectionError("of the test")
            if line == b"task\n":
                async with asyncio.TaskGroup() as group:
                    group.create_task(self.send(b"of a task\n"))
            if line == b"transport\n":
                self.writer.transport.write(b"by the transport\n")

    kind = handler(handle)
    for word, after in (
        (b"close", b""),
        (b"end", None),
        (b"raise", b""),
        (b"task", b"of a task\n"),
        (b"transport", b"by the transport\n"),
    ):
        answer, _ = await talk(kind, b"1\n2\n" + word + b"\n3\n4\n5\n")
        expected = b"1\n2\n" + word + b"\n" + (after or b"")
        if after:
            expected += b"3\n4\n5\n"
        assert answer == expected


def test_a_handler_without_a_framing_says_so() -> None:
    class Bare(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            """Do nothing."""

    with pytest.raises(TypeError, match=r"Bare has no framing: set the class attribute, as `framing = Lines\(\)`"):
        Bare((None, None), None, None).frames  # type: ignore[arg-type]  # noqa: B018
