"""One frame at a time, for protocols that go on in steps."""

import asyncio
from asyncio import IncompleteReadError
from typing import Any

import pytest

import aioecho
from aioecho.exceptions import FrameTooLong
from aioecho.framing import FixedSize, Lines, Netstrings


async def exchange(handle: Any, *pieces: bytes, framing: Any = None) -> bytes:
    """Return what a handler answers to pieces that come one after another."""
    kind: Any = type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle, "framing": framing})
    async with aioecho.TCPServer(("127.0.0.1", 0), kind) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer


@pytest.mark.parametrize("pieces", [[b"1:a,1:b,1:c,"], [b"1:a", b",1:b,1", b":c,"]])
async def test_frames_come_one_by_one_whole_and_the_end_is_an_error(pieces: list[bytes]) -> None:
    async def handle(self: Any) -> None:
        seen = []
        try:
            while True:
                seen.append(await self.read_frame())
        except IncompleteReadError as error:
            await self.send(repr((seen, error.partial)).encode())

    assert await exchange(handle, *pieces, framing=Netstrings()) == repr(([b"a", b"b", b"c"], b"")).encode()


async def test_framings_and_other_reads_take_turns() -> None:
    async def handle(self: Any) -> None:
        lines, three = Lines(), FixedSize(3)
        seen = [await self.reader.readframe(lines), await self.reader.readframe(three)]
        seen += [await self.reader.readline(), await self.reader.readframe(lines), await self.reader.readexactly(2)]
        seen += [await self.reader.readframe(lines)]
        await self.send(b"|".join(seen))

    assert await exchange(handle, b"one\ntwothree\nfour\nfive\nsix\n") == b"one|two|three\n|four|fi|ve"


async def test_what_is_split_already_is_handed_out_and_not_split_again() -> None:
    class Counting(Lines):
        splits = 0

        def split(self, buffer: Any, scanned: int = 0) -> Any:
            Counting.splits += 1
            return super().split(buffer, scanned)

        def limited(self, max_size: int) -> Any:
            return self

    counting = Counting()

    async def handle(self: Any) -> None:
        await self.reader.readexactly(1)  # by now all of it has come
        seen = [await self.reader.readframe(counting) for _ in range(1000)]
        await self.send(b"%d %d" % (len(seen), Counting.splits))

    count, splits = (await exchange(handle, b"x" + b"line\n" * 1000)).split()
    assert int(count) == 1000
    assert int(splits) < 100


async def test_after_a_frame_that_is_too_long_the_next_is_whole() -> None:
    async def handle(self: Any) -> None:
        with pytest.raises(FrameTooLong):
            await self.read_frame()
        await self.send(await self.read_frame())

    assert await exchange(handle, b"9:123456789,2:ok,", framing=Netstrings(max_size=5)) == b"ok"


async def test_an_end_in_mid_frame_tells_what_came() -> None:
    async def handle(self: Any) -> None:
        with pytest.raises(IncompleteReadError) as caught:
            await self.read_frame()
        await self.send(caught.value.partial)

    assert await exchange(handle, b"5:ab", framing=Netstrings()) == b"5:ab"


async def test_a_class_without_a_framing_is_told_so() -> None:
    async def handle(self: Any) -> None:
        with pytest.raises(TypeError, match="has no framing: set the class attribute"):
            await self.read_frame()

    assert await exchange(handle) == b""
