"""What the tests of several modules do alike."""

import asyncio
import contextlib
import importlib.util
import os
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import settle

import aioecho
from aioecho.cli import main

__all__ = [
    "ANYWHERE",
    "HAS_IPV6",
    "LOOPS",
    "ON_ONE_LOOP",
    "Stubborn",
    "ask",
    "ask_by_datagram",
    "check_mistake",
    "close",
    "handler",
    "invoke",
    "needs_ipv6",
    "reset",
    "skip_without",
    "stopped_after",
]

ANYWHERE = ("127.0.0.1", 0)

# Whether there is ::1, which containers often lack.
HAS_IPV6 = Path("/proc/net/if_inet6").exists() and f"{1:032}" in Path("/proc/net/if_inet6").read_text("ascii")
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6")

# For tests that start a loop elsewhere, in a thread or a process.
LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])

# For coroutines that ask nothing of their loop: it would be the same test twice.
ON_ONE_LOOP = pytest.mark.asyncio(loop_factories=["asyncio"])


async def ask(where: aioecho.BaseServer | tuple[Any, ...], request: bytes = b"x\n", **options: Any) -> bytes:
    """Send a server, or an address, a request and the end of the stream, and return all that comes back."""
    address = where if isinstance(where, tuple) else where.server_address
    reader, writer = await asyncio.open_connection(*address[:2], **options)
    writer.write(request)
    if writer.can_write_eof():
        writer.write_eof()
    try:
        return await reader.read()
    finally:
        await close(writer)


def ask_by_datagram(where: tuple[Any, ...] | str, data: bytes = b"hello") -> bytes:
    """Send an address, or an endpoint, a datagram, and return the one that comes back."""
    if isinstance(where, str):
        host, _, port = where.removeprefix("udp://").rpartition(":")
        where = (host, int(port))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        sock.connect(where)
        sock.send(data)
        return sock.recv(2**16)


def handler(handle: Callable[[Any], Any], **attributes: Any) -> Any:
    """Return a handler class for streams, with what else its attributes are."""
    return type("Handler", (aioecho.StreamRequestHandler,), {"handle": handle, **attributes})


class Stubborn:
    """``async with Stubborn() as stubborn``: tasks of stubborn.run() swallow every cancellation, until the block ends.

    However it ends: else the loop would wait for them for ever.
    """

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self._is_over = asyncio.Event()

    async def run(self) -> None:
        """Be such a task. To be begun once."""
        task = asyncio.current_task()
        assert task is not None
        self.tasks.append(task)
        while not self._is_over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self._is_over.wait()

    async def __aenter__(self) -> "Stubborn":
        return self

    async def __aexit__(self, *raised: object) -> None:
        self._is_over.set()
        for task in self.tasks:
            await task


async def close(writer: asyncio.StreamWriter) -> None:
    """Close a stream and wait until it is, however it ended."""
    writer.close()
    with contextlib.suppress(OSError):  # ssl.SSLError is one
        await writer.wait_closed()


@contextlib.asynccontextmanager
async def stopped_after(
    server: aioecho.BaseServer, writer: asyncio.StreamWriter, first: bytes, grace: float
) -> AsyncIterator["asyncio.Task[Any]"]:
    """Send the first part of a message, begin a stop, and give that; at the end close, and wait for both."""
    writer.write(first)
    await settle(lambda: len(server.connections) == 1)
    await asyncio.sleep(0.12)  # time is the subject: past aioecho.serving.draining.FRESH
    stop = asyncio.create_task(server.shutdown(grace))
    await settle(lambda: not server.is_serving())
    await settle()
    try:
        yield stop
    finally:
        await close(writer)
        await stop


def reset(sock: socket.socket) -> None:
    """Close it so that the peer gets a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def skip_without(module: str) -> None:
    """Skip the test where there is no such module, as distributions leave out most of the package `test`."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that has it
        found = None
    if found is None:
        pytest.skip(f"this Python comes without {module}")


def invoke(*arguments: str | Path, cwd: Path | str = ".") -> tuple[int, bytes, str]:
    """Run the command line to its end in this process: exit status, stdout, stderr. What it raises is raised.

    What it imports from `cwd` is forgotten.
    """
    path, modules = sys.path[:], sys.modules.copy()
    try:
        with contextlib.chdir(cwd):
            outcome = CliRunner().invoke(
                main, [str(part) for part in arguments], prog_name="python -m aioecho", catch_exceptions=False
            )
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - modules.keys():
            if cwd != "." and (getattr(sys.modules[name], "__file__", None) or "").startswith(os.path.realpath(cwd)):
                del sys.modules[name]
    return outcome.exit_code, outcome.stdout_bytes, outcome.stderr


def check_mistake(outcome: tuple[int, bytes, str], *expected: str, status: int = 2) -> None:
    """What went wrong is said in one line, without a traceback."""
    code, output, errors = outcome
    assert code == status, errors
    assert output == b""
    lines = [line for line in errors.splitlines() if not re.match(r"\d{4}-\d\d-\d\d .* INFO ", line)]
    assert len(lines) == 1, errors
    assert lines[0].startswith("Error: ")
    for part in expected:
        assert part in lines[0]
