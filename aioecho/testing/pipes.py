"""What a proxy does to one connection: two pipes, and the faults that they have."""

import asyncio
import contextlib
import random
from collections.abc import Mapping
from dataclasses import dataclass

from aioecho.streams.outgoing import reset_when_closed
from aioecho.streams.reader import StreamReader
from aioecho.streams.writer import StreamWriter

__all__ = ["Faults", "Link", "Pipe", "Way", "reset"]

# Bytes that are read at a time, and that may be on their way in one direction: a sender is held back beyond.
CHUNK = 2**16
MOST_IN_FLIGHT = 2**20

# Turns of the loop between two slices. A receiver in the same loop reads in the second: in the first, asyncio's loop runs the
# proxy before what the poll has found.
TURNS = 3

# Pieces a second in which a rate is kept, of one byte at the least.
PIECES_PER_SECOND = 100


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What happens to the bytes of one direction. The defaults are a good network."""

    latency: float = 0.0
    """Seconds from reading a byte to writing it."""
    jitter: float = 0.0
    """Seconds: up to so much is added to the latency of every chunk that is read. The order of bytes is kept."""
    rate: float | None = None
    """Bytes a second, at most. None: no bound."""
    slices: int | tuple[int, int] | None = None
    """Bytes of a piece in which the stream is written, as a number or as (least, most). None: as it was read.

    The boundaries are the same for the same seed, however the bytes are read. The event loop turns three times between two
    pieces. A receiver in another process that is slower than that reads several at once: set `rate` besides.
    """
    reset_after: int | None = None
    """Bytes, from the start of the connection, after which it is reset on both sides. 0: before the first byte. None: never."""

    def __post_init__(self) -> None:
        for name in ("latency", "jitter"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be seconds from 0 up, not {getattr(self, name)!r}")
        if self.rate is not None and not 0 < self.rate < float("inf"):
            raise ValueError(f"rate must be bytes a second above 0, or None, not {self.rate!r}")
        if self.reset_after is not None and self.reset_after < 0:
            raise ValueError(f"reset_after must be a number of bytes from 0 up, or None, not {self.reset_after!r}")
        if self.slices is not None:
            least, most = self.slice_sizes
            if not 1 <= least <= most:
                raise ValueError(f"slices must be a number of bytes above 0, or (least, most), not {self.slices!r}")

    @property
    def slice_sizes(self) -> tuple[int, int]:
        """The least and the most bytes of a piece."""
        assert self.slices is not None
        return (self.slices, self.slices) if isinstance(self.slices, int) else self.slices


class Way:
    """One direction of every connection of a proxy: its faults now, and a gate that a partition closes."""

    def __init__(self, faults: Faults) -> None:
        self.faults = faults
        self.gate = asyncio.Event()
        self.gate.set()


def reset(writer: StreamWriter) -> None:
    """Abort a connection, so that its peer gets a reset."""
    if not writer.protocol.is_lost:
        with contextlib.suppress(ValueError):  # uvloop: the socket is closed
            reset_when_closed(writer.transport)
        writer.transport.abort()


class _ResetError(Exception):
    """The connection is to be reset."""


class Link:
    """One connection: a client's stream, a server's, and the two pipes between them."""

    def __init__(
        self,
        ways: Mapping[str, Way],
        seed: str,
        clients: tuple[StreamReader, StreamWriter],
        servers: tuple[StreamReader, StreamWriter],
    ) -> None:
        self._writers = clients[1], servers[1]
        self._tasks: list[asyncio.Task[None]] = []
        self.pipes = {
            "to_server": Pipe(ways["to_server"], f"{seed} to_server", clients[0], servers[1]),
            "to_client": Pipe(ways["to_client"], f"{seed} to_client", servers[0], clients[1]),
        }

    async def run(self) -> None:
        """Forward until both directions have ended, or the connection is reset."""
        try:
            async with asyncio.TaskGroup() as tasks:
                for pipe in self.pipes.values():
                    self._tasks += [tasks.create_task(pipe.read()), tasks.create_task(pipe.write())]
        except* (_ResetError, OSError):
            self.reset()
        finally:
            for writer in self._writers:
                writer.close()
            for writer in self._writers:
                await writer.protocol.wait_lost()

    def reset(self) -> None:
        """Reset both sides."""
        for writer in self._writers:
            reset(writer)
        for task in self._tasks:
            task.cancel()


class Pipe:
    """One direction of one connection: a reader that notes when its bytes are due, and a writer that makes them wait."""

    def __init__(self, way: Way, seed: str, reader: StreamReader, writer: StreamWriter) -> None:
        self._way = way
        self._reader, self._writer = reader, writer
        self._delays, self._sizes = (random.Random(f"{seed} {what}") for what in ("jitter", "slices"))
        # When it is due, and what: bytes; b"" for the end that half_close() makes; None for the sender's; what it broke with.
        self._events: asyncio.Queue[tuple[float, bytes | OSError | None]] = asyncio.Queue()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._in_flight = self._written = 0
        self._boundary = 0  # where the present slice ends, in the stream
        self._last_due = 0.0
        self._is_ended = False

    def end(self) -> None:
        """End the direction behind what was read by now."""
        self._is_ended = True
        self._put(b"")

    def _put(self, event: bytes | OSError | None) -> None:
        faults = self._way.faults
        delay = faults.latency + (self._delays.uniform(0, faults.jitter) if faults.jitter else 0)
        self._last_due = max(self._last_due, asyncio.get_running_loop().time() + delay)
        self._events.put_nowait((self._last_due, event))

    async def read(self) -> None:
        """Read up to the end of the stream."""
        try:
            while data := await self._reader.read(CHUNK):
                if not self._is_ended:
                    self._in_flight += len(data)
                    self._put(data)
                    if self._in_flight >= MOST_IN_FLIGHT:
                        self._has_room.clear()
                        await self._has_room.wait()
        except OSError as error:
            self._put(error)
        else:
            self._put(None)

    async def write(self) -> None:
        """Write what was read, when it is due, up to the end."""
        while True:
            due, event = await self._events.get()
            await self._wait_until(due)
            await self._way.gate.wait()
            if isinstance(event, OSError):
                raise event
            if not event:  # the end of the stream, by half_close() or by the sender
                self._writer.write_eof()
                if event is None:
                    return
                continue
            await self._write(memoryview(event))
            self._in_flight -= len(event)
            if self._in_flight < MOST_IN_FLIGHT:
                self._has_room.set()

    async def _write(self, data: memoryview) -> None:
        loop = asyncio.get_running_loop()
        while data:
            await self._way.gate.wait()
            faults, began = self._way.faults, loop.time()
            size = self._choose_size(faults, len(data))
            if faults.reset_after is not None and self._written + size >= faults.reset_after:
                size = max(0, faults.reset_after - self._written)
                self._writer.write(data[:size])
                raise _ResetError
            self._writer.write(bytes(data[:size]))
            await self._writer.drain()
            data = data[size:]
            self._written += size
            if faults.rate is not None:
                await self._wait_until(began + size / faults.rate)
            elif faults.slices is not None:
                for _ in range(TURNS):
                    await asyncio.sleep(0)

    def _choose_size(self, faults: Faults, available: int) -> int:
        """Return how many bytes to write at once."""
        size = available
        if faults.slices is not None:
            while self._boundary <= self._written:
                self._boundary = max(self._boundary, self._written) + self._sizes.randint(*faults.slice_sizes)
            size = min(size, self._boundary - self._written)
        if faults.rate is not None:
            size = min(size, max(1, int(faults.rate / PIECES_PER_SECOND)))
        return size

    async def _wait_until(self, when: float) -> None:
        delay = when - asyncio.get_running_loop().time()
        if delay > 0:
            await asyncio.sleep(delay)
