"""A server to be mistreated, as a process of its own, which answers questions about itself on its stdin and stdout.

As a program: `python subjects.py {"loop": …, "handler": …, "limits": {…}, "timeouts": {…}, "descriptors": …}`. For tests:
:class:`Subject`, which starts it.
"""

import asyncio
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import resource
import sys
import threading
import time
from subprocess import PIPE
from typing import Any

from programs import Program

import aioecho
from aioecho.echo import HANDLERS
from aioecho.runtime.loops import loop_factory

__all__ = ["CHUNK", "Subject"]

CHUNK = 2**16


class Delayed(aioecho.StreamRequestHandler):
    """Answers each line after 0 to 500 ms."""

    async def handle(self) -> None:
        async for line in self.reader:
            await asyncio.sleep(random.random() / 2)
            await self.send(line.upper())


class Torrent(aioecho.StreamRequestHandler):
    """For a line with a number: so many bytes, as fast as the peer takes them."""

    async def handle(self) -> None:
        async for line in self.reader:
            left = int(line)
            while left > 0:
                await self.send(bytes(min(CHUNK, left)))  # bytes of their own: a shared object would hide a hoard
                left -= CHUNK


class Sleeper(aioecho.StreamRequestHandler):
    """Reads a byte, and then looks no more at what comes."""

    async def handle(self) -> None:
        await self.reader.readexactly(1)
        await self.send(b"!")
        await asyncio.Event().wait()


class Heedless(aioecho.StreamRequestHandler):
    """Writes and writes and never drains."""

    async def handle(self) -> None:
        await self.reader.readline()
        while True:
            self.writer.write(bytes(CHUNK))
            await asyncio.sleep(0)


# Blocks up to 128 KiB, such as a chunk of a stream, are carved from a heap that glibc shrinks only from its upper end.
malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)

STATM = os.open("/proc/self/statm", os.O_RDONLY)  # now, as there may be no descriptor left for it later


def resident() -> int:
    """Return the bytes of this process that are in memory, without those that are free but kept by the C library."""
    gc.collect()
    malloc_trim(0)
    return int(os.pread(STATM, 100, 0).split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int | None:
    """Return the number of descriptors that this process has open; None if it has none left to look it up with."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return None


def counts_of(server: aioecho.BaseServer) -> dict[str, Any]:
    """Return what is counted, which takes no time."""
    stats = server.stats
    return {
        "cpu": time.process_time(),
        "accepted": stats.accepted,
        "active": stats.active,
        "completed": stats.completed,
        "failed": stats.failed,
        "cancelled": stats.cancelled,
        "rejected": stats.rejected,
        "accept_errors": stats.accept_errors,
        "reasons": dict(stats.reasons),
        "connections": len(server.connections),
    }


def state_of(server: aioecho.BaseServer) -> dict[str, Any]:
    """Return what a test asks about: the counts, and what it takes time to find."""
    return {
        **counts_of(server),
        # Pages that were mapped.
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        "tasks": len(asyncio.all_tasks()),
        "descriptors": descriptors(),
        "threads": threading.active_count(),
        "resident": resident(),
    }


async def serve(settings: dict[str, Any]) -> None:
    """Serve, and obey stdin until it ends."""
    loop = asyncio.get_running_loop()
    errors: list[str] = []
    loop.set_exception_handler(lambda loop, context: errors.append(repr(context)))
    server = aioecho.serve(
        {**HANDLERS, "delayed": Delayed, "torrent": Torrent, "sleeper": Sleeper, "heedless": Heedless}[
            settings["handler"]
        ],
        "tcp://127.0.0.1:0",
        limits=aioecho.Limits(**settings["limits"]),
        timeouts=aioecho.Timeouts(**settings["timeouts"]),
        grace=settings["grace"],
    )
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    spare: list[int] = []
    async with server:
        if settings["descriptors"]:
            resource.setrlimit(resource.RLIMIT_NOFILE, (settings["descriptors"],) * 2)
        print(f"listening on {server.names[0]}", flush=True)
        while line := await commands.readline():
            answer: Any = None
            match json.loads(line):
                case "state":
                    answer = {**state_of(server), "errors": errors}
                case "counts":
                    answer = counts_of(server)
                case ["occupy", int(count)]:
                    spare += [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]
                case "free":
                    os.close(spare.pop())
            print(json.dumps(answer), flush=True)
        for fd in spare:
            os.close(fd)
    print(json.dumps({**state_of(server), "errors": errors}), flush=True)


class Subject(Program):
    """The program above, started; `endpoint` is where it listens."""

    def __init__(
        self,
        loop: str,
        handler: str = "echo",
        *,
        limits: dict[str, Any] | None = None,
        timeouts: dict[str, Any] | None = None,
        descriptors: int | None = None,
        grace: float = 5.0,
    ) -> None:
        settings = {
            "loop": loop,
            "handler": handler,
            "limits": limits or {},
            "timeouts": timeouts or {},
            "descriptors": descriptors,
            "grace": grace,
        }
        super().__init__(sys.executable, __file__, json.dumps(settings), stdin=PIPE)
        self.endpoint = self.listening()
        host, _, port = self.endpoint.removeprefix("tcp://").rpartition(":")
        self.address = (host, int(port))

    def ask(self, command: Any = "state") -> Any:
        """Send a command and return the answer."""
        self.write(json.dumps(command).encode() + b"\n")
        return json.loads(self.line())

    def until(self, condition: Any, timeout: float = 30.0) -> Any:
        """Ask for its counts until they meet a condition, and return its state."""
        deadline = time.monotonic() + timeout
        while not condition(counts := self.ask("counts")):
            assert time.monotonic() < deadline, (counts, self.stderr())
            time.sleep(0.01)
        return self.ask()

    def finish(self) -> Any:
        """Let it shut down, and return its state at the end."""
        self.process.stdin.close()
        state = json.loads(self.line())
        assert self.wait() == 0, self.stderr()
        return state

    def records(self, level: str) -> list[str]:
        """Return its log records of a level."""
        return [line for line in self.stderr().splitlines() if f" {level} " in line]


def main() -> None:
    """Be the program."""
    logging.basicConfig(level="INFO", format="%(created).3f %(levelname)s %(name)s: %(message)s")
    settings = json.loads(sys.argv[1])
    with asyncio.Runner(loop_factory=loop_factory(settings["loop"])) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(serve(settings))


if __name__ == "__main__":
    main()
