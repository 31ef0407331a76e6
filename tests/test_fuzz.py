"""Random clients against one server, with an oracle for every byte, count, task and descriptor.

A short run is part of the suite; `python -m pytest tests/test_fuzz.py -m soak` runs for AIOECHO_FUZZ_SECONDS, 600 if not set.
A failure names the seed of its round: AIOECHO_FUZZ_SEED=N runs that round alone.
"""

import asyncio
import collections
import contextlib
import hashlib
import os
import random
import socket
import ssl
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import reset

import aioecho
from aioecho.framing import LengthPrefixed, Lines

CLIENTS = 24
DONE = b"stored "


class Fuzzed(aioecho.StreamRequestHandler):
    """Serves what the client's first line names. `how` of the server decides by which methods."""

    framing = LengthPrefixed(4)

    async def handle(self) -> None:
        what = await self.reader.readline()
        if not what.endswith(b"\n"):
            return
        self.random = random.Random(what)
        match what.split(b" ")[0]:
            case b"lines":
                await self.serve_lines()
            case b"frames":
                await self.serve_frames()
            case b"bytes":
                while data := await self.reader.read(self.random.choice([1, 100, 65_536, 2**20])):
                    await self.send(data)
            case b"upload":
                await self.store()

    async def serve_lines(self) -> None:
        reader = self.reader
        while True:
            match self.random.randrange(4):
                case 0:
                    line = await reader.readline()
                case 1:
                    line = await anext(reader, b"")
                case 2:
                    try:
                        line = await reader.readuntil(self.random.choice([b"\n", (b"\n", b"\r\n")]))  # type: ignore[arg-type]
                    except asyncio.IncompleteReadError as error:
                        line = error.partial
                case _:
                    lines = await anext(reader.batches(Lines()), [])
                    line = b"".join(each + b"\n" for each in lines)
            if not line:
                return
            if self.random.random() < 0.1:
                await asyncio.sleep(0)
            if self.random.random() < 0.5:
                await self.send(line.upper())
            else:
                self.writer.write(bytearray(line.upper()))
                await self.writer.drain()

    async def serve_frames(self) -> None:
        with contextlib.suppress(StopAsyncIteration):
            while True:
                if self.random.random() < 0.5:
                    frame = await anext(self.frames)
                else:
                    try:
                        size = int.from_bytes(await self.reader.readexactly(4), "big")
                    except asyncio.IncompleteReadError as error:
                        if error.partial:
                            raise
                        return
                    frame = await self.reader.readexactly(size)
                await self.send_frame(frame)

    async def store(self) -> None:
        digest = hashlib.sha256()
        if self.random.random() < 0.5:
            digest.update(await self.reader.read())
        else:
            while data := await self.reader.read(self.random.randint(1, 100_000)):
                digest.update(data)
        await self.send(DONE + digest.hexdigest().encode())


class Line(asyncio.Protocol):
    """What comes back to a client, which may stop to read for a while."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.has_ended = asyncio.get_running_loop().create_future()
        self.error: Exception | None = None

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> bool:
        if not self.has_ended.done():
            self.has_ended.set_result("end")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.error = exc
        if not self.has_ended.done():
            self.has_ended.set_result("lost")


class Client:
    """One client of a round: what it sends, how, and what must come of it."""

    def __init__(self, chance: random.Random, totals: "collections.Counter[str]") -> None:
        self.chance = chance
        self.totals = totals
        self.what = chance.choice(["lines", "frames", "bytes", "upload"])
        size = chance.choice([0, 1, 100, 5_000, 70_000, 300_000])
        if self.what == "lines":
            alphabet = b"abc\r xyz"
            lines = [
                bytes(chance.choices(alphabet, k=chance.choice([0, 1, 5, 64, 2_000]))) for _ in range(size // 100 + 1)
            ]
            self.body = b"".join(each + b"\n" for each in lines)
            self.expected = self.body.upper()
        elif self.what == "frames":
            join = LengthPrefixed(4).join
            frames = [chance.randbytes(chance.choice([0, 1, 4, 60, 3_000, 70_000])) for _ in range(size // 2_000 + 1)]
            self.body = self.expected = b"".join(map(join, frames))
        else:
            self.body = chance.randbytes(size)
            self.expected = self.body
            if self.what == "upload":
                self.expected = DONE + hashlib.sha256(self.body).hexdigest().encode()
        self.leaves = chance.random() < 0.25  # in the middle, by a reset or a close

    async def run(self, endpoint: str, context: ssl.SSLContext | None) -> None:
        with contextlib.ExitStack() as closing:
            await self.talk(endpoint, context, closing)

    async def talk(self, endpoint: str, context: ssl.SSLContext | None, closing: contextlib.ExitStack) -> None:
        chance, loop = self.chance, asyncio.get_running_loop()
        named: dict[str, Any] = {"server_hostname": "localhost"} if context is not None else {}
        scheme, _, where = endpoint.partition(":")
        try:
            if scheme == "tcp":
                made = loop.create_connection(Line, "127.0.0.1", int(where.rpartition(":")[2]), ssl=context, **named)
            else:
                made = loop.create_unix_connection(Line, where, ssl=context, **named)
            transport, line = await made
        except OSError:
            assert self.is_cut, "the server serves"
            return
        kept = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        closing.callback(kept.close)
        closing.callback(transport.abort)
        head = self.what.encode() + b" %d\n" % chance.randrange(10**9)
        stream = head + self.body
        upto = chance.randrange(len(stream) + 1) if self.leaves else len(stream)
        at = 0
        pace = chance.choice([[1, 3], [50, 1_000], [16_384], [10**6]])
        budget = 300  # pieces, so that a slow one comes to an end
        while at < upto and not line.has_ended.done():
            piece = min(chance.choice(pace) if budget > 0 else upto, upto - at)
            budget -= 1
            transport.write(stream[at : at + piece])
            at += piece
            if chance.random() < 0.2:
                await asyncio.sleep(chance.choice([0, 0, 0.001]))
            if chance.random() < 0.1 and context is None:
                transport.pause_reading()
                loop.call_later(chance.choice([0.001, 0.01]), transport.resume_reading)
            while transport.get_write_buffer_size() > 100_000 and not line.has_ended.done():
                await asyncio.sleep(0.001)
        is_reset = self.leaves and chance.random() < 0.5
        if self.what == "upload" and at >= len(head) and not is_reset:  # it is whole where its client ends the stream
            self.expected = DONE + hashlib.sha256(self.body[: at - len(head)]).hexdigest().encode()
            self.has_sent_all = at == upto
        self.fate = {
            "sent": at,
            "of": upto,
            "all": len(stream),
            "reset": is_reset,
            "endpoint": endpoint,
            "tls": bool(context),
        }
        if is_reset:
            kept.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            transport.abort()
            reset(kept)
            await line.has_ended
        elif context is not None:
            await self.wait_for(line, self.expected)
            transport.close()
            kept.close()
            await line.has_ended
        else:
            if transport.can_write_eof() and not line.has_ended.done():
                with contextlib.suppress(OSError, RuntimeError):
                    transport.write_eof()
            await line.has_ended
            transport.abort()
            kept.close()
        self.judge(line, context is not None)
        self.totals["clients"] += 1
        self.totals["bytes"] += at + len(line.received)

    async def wait_for(self, line: Line, expected: bytes) -> None:
        """TLS has no half-close that asyncio's clients could use: they close when they have all."""
        if self.leaves or self.what == "upload":
            return
        while len(line.received) < len(expected) and not line.has_ended.done():
            await asyncio.sleep(0.001)

    def judge(self, line: Line, is_tls: bool) -> None:
        received = bytes(line.received)
        if self.what == "upload":
            if received:
                assert self.has_sent_all, f"half an upload was stored as a whole one: {self.fate}"
                assert received == self.expected
        else:
            assert self.expected.startswith(received), f"{self.what}: {received[:80]!r} of {self.expected[:80]!r}"
        if not self.leaves and not is_tls and not self.is_cut:
            assert received == self.expected, (
                f"{self.what}: {len(received)} of {len(self.expected)} bytes, {line.error!r}"
            )

    is_cut = False  # by a stop
    fate: dict[str, object] = {}  # noqa: RUF012 - for who looks into a failure
    has_sent_all = False  # and then the end of the stream


async def play(seed: int, folder: Path, tls: SimpleNamespace, totals: "collections.Counter[str]") -> None:
    """One round: a server, its clients, and maybe a stop in their midst."""
    chance = random.Random(seed)
    is_tls = chance.random() < 0.4
    stops_early = chance.random() < 0.3
    limits = aioecho.Limits(max_buffer=chance.choice([4096, 65_536]), max_connections=chance.choice([None, 3]))
    path = folder / f"{seed}"
    server = aioecho.serve(
        Fuzzed, "tcp://127.0.0.1:0", f"unix:{path}", ssl=tls.server if is_tls else None, limits=limits, grace=20
    )
    async with server:
        port = (
            server.server_address[1] if isinstance(server.server_address, tuple) else server.sockets[0].getsockname()[1]
        )
        clients = [Client(random.Random(f"{seed}/{n}"), totals) for n in range(CLIENTS)]
        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for client in clients:
                client.is_cut = stops_early
                endpoint = chance.choice([f"tcp://127.0.0.1:{port}", f"unix:{path}"])
                group.create_task(client.run(endpoint, tls.client if is_tls else None))
            if stops_early:
                await asyncio.sleep(chance.choice([0, 0.001, 0.01, 0.05]))
                await server.shutdown(grace=chance.choice([0, 0.05, 5]))
        if not stops_early:
            await settle(lambda: not server.connections)
        check_identity(server)
        assert not server.connections
        await settle(lambda: server.admission.memory.held == 0)  # the loop tells of a lost connection a turn later
    totals["rounds"] += 1


async def fuzz(seconds: float, folder: Path, tls: SimpleNamespace) -> "collections.Counter[str]":
    totals: collections.Counter[str] = collections.Counter()
    fixed = os.environ.get("AIOECHO_FUZZ_SEED")
    end = time.monotonic() + seconds
    while time.monotonic() < end or not totals["rounds"]:
        seed = int(fixed) if fixed is not None else random.SystemRandom().randrange(10**9)
        try:
            await play(seed, folder, tls, totals)
        except BaseException as error:
            error.add_note(f"AIOECHO_FUZZ_SEED={seed}")
            raise
        if fixed is not None:
            break
    return totals


async def test_random_clients_get_their_own_bytes_and_nothing_else(tmp_path: Path, tls: SimpleNamespace) -> None:
    totals = await fuzz(1.0, tmp_path, tls)
    assert totals["clients"] > 0


@pytest.mark.soak
@pytest.mark.timeout(0)
async def test_random_clients_for_long(tmp_path: Path, tls: SimpleNamespace) -> None:
    totals = await fuzz(float(os.environ.get("AIOECHO_FUZZ_SECONDS", "600")), tmp_path, tls)
    print(dict(totals))
