"""Handlers with a mistake each, for the checks to find; and sound ones, in which they must find nothing."""

import asyncio
import os
import random
import socketserver
import time
from typing import Any, ClassVar

import aioecho
from aioecho.echo import UpperFrames
from aioecho.framing import Delimited, LengthPrefixed


class OneReadIsOneMessage(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        while data := await self.reader.read(1024):
            await self.send(b"%d bytes\n" % len(data.strip()))


class BlockingOneReadIsOneMessage(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(1024):
            self.request.sendall(b"%d bytes\n" % len(data.strip()))


class LosesALineFeed(aioecho.StreamRequestHandler):
    framing = Delimited(b"\r\n")

    async def handle(self) -> None:
        buffer = b""
        while data := await self.reader.read(1024):
            buffer += data.removeprefix(b"\n")  # what a \r at the end of a chunk needs
            *lines, buffer = buffer.split(b"\r\n")
            for line in lines:
                await self.send(line + b"\r\n")


class AnswersTheFirstLineOfAChunk(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        buffer = b""
        while data := await self.reader.read(1024):
            buffer += data
            if b"\n" in buffer:
                line, _, _ = buffer.partition(b"\n")
                buffer = b""
                await self.send(line.upper() + b"\n")


class AnswersAPartOfAFrame(aioecho.StreamRequestHandler):
    framing = LengthPrefixed(4)

    async def handle(self) -> None:
        while True:
            try:
                size = int.from_bytes(await self.reader.readexactly(4))
            except asyncio.IncompleteReadError:
                return
            body = b""
            while len(body) < size and (data := await self.reader.read(size - len(body))):
                body += data
            await self.send_frame(body.upper())


class RunsOnAtTheEnd(aioecho.StreamRequestHandler):
    framing = LengthPrefixed(4)

    async def handle(self) -> None:
        while True:
            try:
                size = int.from_bytes(await self.reader.readexactly(4))
            except asyncio.IncompleteReadError:
                return
            body = b""
            while len(body) < size:
                body += await self.reader.read(size - len(body))
            await self.send_frame(body.upper())


class KeepsALineOfAnyLength(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        buffer = bytearray()
        while data := await self.reader.read(2**18):
            buffer += data
            while (end := buffer.find(b"\n") + 1) > 0:
                await self.send(bytes(buffer[:end]).upper())
                del buffer[:end]


class RaisesAtALongLine(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        try:
            async for line in self.reader:
                await self.send(line)
        except ValueError as error:
            raise RuntimeError("no such line was expected") from error


class NeverDrains(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            self.writer.write(line.upper())


class QueuesReplies(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        writing = asyncio.create_task(self.write_all(queue))
        async for line in self.reader:
            queue.put_nowait(line)
            await asyncio.sleep(0)
        queue.put_nowait(b"")
        await writing

    async def write_all(self, queue: "asyncio.Queue[bytes]") -> None:
        while line := await queue.get():
            await self.send(line.upper())


class RaisesAtAReset(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        try:
            async for line in self.reader:
                await self.send(line.upper())
        except ConnectionError as error:
            raise RuntimeError("the client has gone") from error


class StaysAfterAReset(aioecho.StreamRequestHandler):
    cancel_on_lost = False

    async def handle(self) -> None:
        try:
            async for line in self.reader:
                await self.send(line.upper())
        except ConnectionError:
            await asyncio.sleep(3600)


class DropsTheReplyToTheLastLine(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            await asyncio.sleep(0.01)
            if self.reader.at_eof():
                return
            await self.send(line.upper())


class AnswersWhatIsLeftAtAStop(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        buffer = b""
        try:
            while data := await self.reader.read(1024):
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    await self.send(b"%d bytes\n" % len(line))
        finally:
            if buffer:
                self.writer.write(b"%d bytes\n" % len(buffer))


class LeavesATask(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        self.watching = asyncio.create_task(self.watch())
        async for line in self.reader:
            await self.send(line)

    async def watch(self) -> None:
        await asyncio.sleep(3600)


class LeavesAFile(aioecho.StreamRequestHandler):
    files: list[Any] = []  # noqa: RUF012

    async def handle(self) -> None:
        self.files.append(open(os.devnull))  # noqa: SIM115
        async for line in self.reader:
            await self.send(line)


class LeavesItself(aioecho.StreamRequestHandler):
    known: list[Any] = []  # noqa: RUF012

    async def handle(self) -> None:
        self.known.append(self)
        async for line in self.reader:
            await self.send(line)


class RaisesAtALine(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            print("a line:", line)
            await self.send(b"%d\n" % (int(line) + 1))


# Sound ones


class Framed(UpperFrames):
    framing = LengthPrefixed(4)


class Ended(aioecho.StreamRequestHandler):
    framing = Delimited(b"\r\n")

    async def handle(self) -> None:
        async for frame in self.frames:
            await self.send_frame(frame)


class Bye(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            if line == b"42\n":
                await self.send(b"bye\n")
                return
            await self.send(b"%d bytes\n" % len(line.strip()))


class Greets(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.send(b"220 ready\r\n")
        async for line in self.reader:
            await self.send(b"250 " + line)


class Room(aioecho.StreamRequestHandler):
    """The chat of docs/pages/start.md."""

    name = b""

    async def handle(self) -> None:
        await self.send(b"your name: ")
        self.name = (await self.reader.readline()).strip()
        if not self.name:
            return
        self.join("members")
        self.tell(b"has joined")
        async for line in self.reader:
            self.tell(line.strip())

    async def finish(self) -> None:
        if self.name:
            self.tell(b"has left")

    async def draining(self) -> None:
        await self.send(b"the server stops\n")

    def tell(self, text: bytes) -> None:
        self.server.broadcast(b"%s: %s\n" % (self.name, text), to="members", most=2**20)


class Store(aioecho.StreamRequestHandler):
    """A part of RESP, with requests that may come before the replies to those before them."""

    values: dict[bytes, bytes] = {}  # noqa: RUF012

    async def handle(self) -> None:
        while line := await self.reader.readline():
            count = int(line[1:]) if line[:1] == b"*" and line[1:].strip().isdigit() else 0
            words = [await self.read_word() for _ in range(count)]
            await self.send(self.answer(words))

    async def read_word(self) -> bytes:
        size = int((await self.reader.readuntil(b"\r\n"))[1:])
        return (await self.reader.readexactly(size + 2))[:-2]

    def answer(self, words: list[bytes]) -> bytes:
        match words:
            case [b"SET", name, value]:
                self.values[name] = value
                return b"+OK\r\n"
            case [b"GET", name] if name in self.values:
                return b"$%d\r\n%s\r\n" % (len(self.values[name]), self.values[name])
        return b"-ERR\r\n"


class Publisher(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.send(b"news\n")
        await asyncio.Event().wait()


class InThreads(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            await self.send(await asyncio.to_thread(self.answer, line))

    def answer(self, line: bytes) -> bytes:
        time.sleep(0.002)
        return line.upper()


class Blocking(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline(2**16):
            self.wfile.write(line.upper())


class Random(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for _ in self.reader:
            await self.send(b"%d\n" % random.getrandbits(64))


# Handlers for datagrams


class NeedsAByte(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        await self.reply(bytes([self.data[0]]) + self.data[1:])


class NeedsANumber(aioecho.DatagramSessionHandler):
    async def handle(self) -> None:
        total = 0
        async for data in self.datagrams:
            total += int(data)
            await self.reply(b"%d" % total)


class TakesNoneTwice(aioecho.DatagramRequestHandler):
    waiting: ClassVar[dict[bytes, asyncio.Event]] = {}

    async def handle(self) -> None:
        if self.data in self.waiting:
            raise KeyError(self.data)
        self.waiting[self.data] = asyncio.Event()
        try:
            await asyncio.wait_for(self.waiting[self.data].wait(), 0.3)
        except TimeoutError:
            pass
        finally:
            del self.waiting[self.data]


class RunsOnAtAZero(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        while b"\0" in self.data:
            pass
        await self.reply(self.data)


class Amplifies(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        await self.reply(self.data * 4)


class Sums(aioecho.DatagramSessionHandler):
    async def handle(self) -> None:
        total = 0
        async for data in self.datagrams:
            if data.isdigit() and len(data) < 10:
                total += int(data)
                await self.reply(b"%d" % total)
