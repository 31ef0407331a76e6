"""What a client may cost: memory while it sends without end, or reads nothing, and what is left when it has gone."""

import asyncio
import contextlib
import gc
import itertools
import os
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator

from aioecho.check.examples import ERRORS, literal, source_of
from aioecho.check.player import PATIENCE, Session
from aioecho.check.subject import Finding, Subject

__all__ = ["check_leaks", "check_slow_reader", "check_too_long"]

SENT = 2**25
"""Bytes that a client sends at most: of a record without an end, and without reading."""

HELD = 3 * 2**23
"""Bytes that the process may hold for it. aioecho's own limits are below that, and so are limits of a handler's own mostly."""

UNREAD = 2**22
"""Bytes that it may hold for a client that reads nothing, where it reads on and holds a good part of what it reads."""

CHUNK = 2**16

BLOCKED = 0.3
"""Seconds in which the server reads nothing: then it waits for its client, and so holds no more than it does by then."""

SECONDS = 5.0
"""What sending may take of the processor."""

WARM_UP = 5
"""Conversations before anything is counted: a program may open and keep something at first."""

ROUND = 20
"""Conversations from one count to the next."""

MOST_SECONDS = 6.0
"""What all of these conversations may take. Where one takes long there are fewer, but FEWEST in a round."""

FEWEST = 3

OTHERS = ("<", os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(__file__)))
"""How the names of files begin that are not the handler's: the standard library's, aioecho's."""

LEAKED = 1024
"""Bytes that a conversation may leave behind, in each of two rounds. A connection takes more."""

_FLOOD = '''
async def hold(begin, chunk, reads):
    """Return how many bytes are held for a client that sends so much, and why the server has ended its connection."""
    limits = aioecho.Limits(max_frame=2**20, max_write_buffer=2**20)
    async with {server}(("127.0.0.1", 0), {handler}, limits=limits, grace=0.1) as server:
        {buffers}reader, writer = await asyncio.open_connection(*server.server_address, limit=2**14)
        if reads:
            discarding = asyncio.create_task(discard(reader))
        await asyncio.sleep(0.1)
        {start}with contextlib.suppress(TimeoutError, ConnectionError):
            writer.write(begin)
            for _ in range({sent} // len(chunk)):
                writer.write(chunk)
                await asyncio.wait_for(writer.drain(), 10)
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        writer.transport.abort()
        if reads:
            await discarding
    return held, server.stats.reasons


async def discard(reader):
    with contextlib.suppress(ConnectionError):
        while await reader.read(2**18):
            pass
'''

_HELD = """
def test_memory_is_bounded():
    held, reasons = asyncio.run(hold({begin}, {chunk}, reads={reads}))
    assert held < {most}
"""

_DRAINS = """
def test_the_handler_drains():
    _, reasons = asyncio.run(hold({begin}, {chunk}, reads={reads}))
    assert "write buffer" not in reasons  # await drain() after write(), as send() does
"""

_FLOOD_RAISES = """
def test_a_record_that_is_too_long_is_no_mistake_of_the_handlers():
    asyncio.run(hold({begin}, {chunk}, reads={reads}))
    assert Server.mistakes == []
"""


_TRACED = {"buffers": "", "start": "tracemalloc.start()\n        "}

# So that what the kernel buffers does not count.
_BUFFERS = """for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            server.sockets[0].setsockopt(socket.SOL_SOCKET, option, 2**14)
        """


def check_too_long(subject: Subject) -> Iterator[Finding]:
    """Send a record far above the limit: memory stays bounded, and it is no mistake of the handler's."""
    record = subject.conversation.too_long(SENT)
    if record is None:
        return
    begin, chunk = record[: len(record) - SENT], b"x" * CHUNK
    if subject.conversation.is_text:
        begin = record[: record.index(b"x")]
    del record
    flood = _Flood(begin, chunk, HELD, promising=HELD // 2)
    outcome = subject.player.run(lambda session: flood.send(session, reads=True))
    values = {"begin": literal(begin), "chunk": f'b"x" * {CHUNK}', "reads": True, "most": HELD, **_TRACED, "sent": SENT}
    what = f"a record of {SENT >> 20} MiB"
    if outcome.was_stuck:
        text = f"the handler keeps the loop for seconds when its client sends {what}"
    elif flood.held > HELD:
        text = f"the handler holds {flood.held >> 20} MiB when its client sends {what}"
    elif set(outcome.errors) - set(subject.reference.errors):
        text = f"the handler raises {outcome.errors[0]} when its client sends {what}"
        source = source_of(subject, ERRORS, _FLOOD, _FLOOD_RAISES, **values, server="Server")
        yield Finding("too long", text, source)
        return
    else:
        return
    yield Finding("too long", text, source_of(subject, _FLOOD, _HELD, **values))


def check_slow_reader(subject: Subject) -> Iterator[Finding]:
    """Say the conversation again and again and read no reply: memory stays bounded, as the handler waits for its client."""
    data = b"".join(subject.conversation.records)
    times = CHUNK // len(data) + 1
    chunk = data * times
    values = {
        "begin": 'b""',
        "chunk": f"{literal(data)} * {times}",
        "reads": False,
        "most": UNREAD // 2,
        **_TRACED,
        "sent": 2 * UNREAD,
        "buffers": _BUFFERS,
    }
    end = _HELD
    flood = _Flood(b"", chunk, UNREAD, promising=UNREAD // 4)
    outcome = subject.player.run(lambda session: flood.send(session, reads=False))
    if "write buffer" in outcome.reasons:
        text = "the handler writes on and does not drain while its client reads nothing, until the server ends the connection"
        values, end = {**values, "start": ""}, _DRAINS
    elif flood.held > max(UNREAD, flood.sent // 4) and not flood.was_blocked:
        text = (
            f"the handler holds {flood.held >> 20} MiB when its client sends {flood.sent >> 20} MiB and reads nothing"
        )
    else:
        return
    yield Finding("slow reader", text, source_of(subject, _FLOOD, end, **values))


class _Flood:
    """A client that sends until the server reads no more, all is sent, or the server holds more than `most` of it.

    It goes on for longer where the server holds `promising` bytes of it after SECONDS.
    """

    def __init__(self, begin: bytes, chunk: bytes, most: int, promising: int) -> None:
        self._begin, self._chunk, self._most, self._promising = begin, chunk, most, promising
        self.sent = self.held = self._held_before = 0
        self.was_blocked = False

    async def send(self, session: Session, *, reads: bool) -> None:
        """Connect, and send."""
        await session.connect(reads=reads, buffer=None if reads else 2**14)
        gc.collect()
        tracemalloc.start()
        self._held_before = tracemalloc.get_traced_memory()[0]  # more than nothing with PYTHONTRACEMALLOC=1
        try:
            with contextlib.suppress(OSError):  # the server ends the connection, as it may
                await self._send(session)
            gc.collect()
            self._note_held()
        finally:
            tracemalloc.stop()

    def _note_held(self) -> None:
        self.held = max(self.held, tracemalloc.get_traced_memory()[0] - self._held_before)

    async def _send(self, session: Session) -> None:
        began = last = time.monotonic()
        began_work = time.process_time()
        left = memoryview(self._begin or self._chunk)
        while self.sent < SENT and not session.is_over:
            count = session.send_now(left)
            now = time.monotonic()
            worked = time.process_time() - began_work  # a busy machine is slow, but finds the same
            if worked > (SECONDS if self.held < self._promising else 4 * SECONDS) or now - began > 6 * SECONDS:
                return
            if count:
                self.sent += count
                left, last = left[count:] or memoryview(self._chunk), now
                await asyncio.sleep(0)
                self._note_held()
                if self.held > max(self._most, self.sent // 4):
                    return
            elif now - last > BLOCKED and await session.is_quiet():
                self.was_blocked = True
                return
            else:
                await asyncio.sleep(0.001)  # the socket is full: whether the server reads on shows by and by
        await session.settle()


_LEAK = '''
async def count_what_is_left(before=5, then=10):
    """Return what is counted after some conversations, and after some more."""
    async with aioecho.TCPServer(("127.0.0.1", 0), {handler}) as server:
        counts = []
        for conversations in (before, then):
            for _ in range(conversations):
                reader, writer = await asyncio.open_connection(*server.server_address)
                writer.write({data})
                await asyncio.sleep(0.02)
                writer.write_eof()
                with contextlib.suppress(TimeoutError, ConnectionError):
                    while await asyncio.wait_for(reader.read(2**16), 1):
                        pass
                writer.close()
                await writer.wait_closed()
            await asyncio.sleep(0.2)
            gc.collect()
            counts.append({count})
        return counts


def test_nothing_is_left():
    {setup}before, after = asyncio.run(count_what_is_left())
    assert after - before < {most}
'''


def check_leaks(subject: Subject) -> Iterator[Finding]:
    """Count tasks, descriptors and bytes after conversations: none grows with their number. What grows first is told."""
    counts = _Counts()
    subject.player.run(lambda session: _converse(session, subject, counts))
    for what, count, most, setup, text in (
        ("tasks", "len(asyncio.all_tasks())", 0.5, "", f": {counts.commonest_task}"),
        ("descriptors", 'len(os.listdir("/dev/fd"))', 0.5, "", ""),
        ("bytes", "tracemalloc.get_traced_memory()[0]", LEAKED, "tracemalloc.start()\n    ", counts.place),
    ):
        grown = [after - before for before, after in itertools.pairwise(counts.seen[what])]
        if len(grown) == 2 and min(grown) >= most * counts.round:
            number = max(min(grown) // counts.round, 1)
            left = f"{number} {what if number > 1 else what.removesuffix('s')}"
            data = literal(b"".join(subject.conversation.records))
            values = {"count": count, "most": int(most * 10), "setup": setup, "data": data}
            source = source_of(subject, _LEAK, **values)
            yield Finding("leaks", f"a conversation leaves {left} behind{text}", source)
            return  # a task or a descriptor holds memory too


class _Counts:
    """What there is after each round of conversations."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {"tasks": [], "descriptors": [], "bytes": []}
        self.commonest_task = self.place = ""
        self.round = ROUND
        self._snapshot: tracemalloc.Snapshot | None = None

    def note(self) -> None:
        """Count."""
        gc.collect()
        tasks = asyncio.all_tasks()
        self.seen["tasks"].append(len(tasks))
        self.commonest_task = Counter(map(_name, tasks)).most_common(1)[0][0]
        self.seen["descriptors"].append(_count_descriptors())
        self.seen["bytes"].append(tracemalloc.get_traced_memory()[0])
        taken = tracemalloc.take_snapshot() if len(self.seen["bytes"]) > 1 else None
        if taken is not None and self._snapshot is not None:
            for grown in taken.compare_to(self._snapshot, "lineno"):
                frame = grown.traceback[0]
                if grown.size_diff > 0 and not frame.filename.startswith(OTHERS):
                    self.place = f", most of them from {os.path.basename(frame.filename)}:{frame.lineno}"
                    break
        self._snapshot = taken


def _name(task: "asyncio.Task[object]") -> str:
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", coroutine))


def _count_descriptors() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # a system without that
        return 0


async def _converse(session: Session, subject: Subject, counts: _Counts) -> None:
    tracemalloc.start()
    try:
        began = time.monotonic()
        if not await _repeat(session, subject, WARM_UP):
            return
        seconds = (time.monotonic() - began) / WARM_UP
        counts.round = min(max(int(MOST_SECONDS / 3 / seconds), FEWEST), ROUND)
        for _ in range(3):
            if not await _repeat(session, subject, counts.round):
                return
            counts.note()
    finally:
        tracemalloc.stop()


async def _repeat(session: Session, subject: Subject, count: int) -> bool:
    """Hold the conversation so many times; return whether the handler has ended after every one."""
    for _ in range(count):
        await session.connect()
        await session.send(b"".join(subject.conversation.records))
        session.end()
        await session.wait_end(subject.player.patience)
        session.close()
        if not await session.wait_handler(PATIENCE):
            return False
    await session.settle()
    return True
