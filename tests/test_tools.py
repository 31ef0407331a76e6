"""What looks into a running program, `python -m asyncio ps` and the like, shows each handler with the line where it waits."""

import asyncio
import inspect
import io
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from conftest import settle

import aioecho

shows_tasks = pytest.mark.skipif(sys.version_info < (3, 14), reason="asyncio has these tools from Python 3.14 on")


class Line(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for _ in self.reader:  # it waits here
            pass


class Peer(aioecho.DatagramSessionHandler):
    async def handle(self) -> None:
        async for _ in self.datagrams:  # it waits here
            pass


class Single(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        await self.server.state.wait()  # it waits here


class Full(aioecho.DatagramRequestHandler):
    """One with all methods, for a server that verifies requests in a coroutine."""

    async def setup(self) -> None:
        await asyncio.sleep(0)

    async def handle(self) -> None:
        await self.server.state.wait()  # it waits here

    async def finish(self) -> None:
        await asyncio.sleep(0)


HANDLERS: tuple[Any, ...] = (Line, Peer, Single, Full)


class Verifying(aioecho.UDPServer):
    async def verify_request(self, request: Any, client_address: Any) -> bool:  # type: ignore[override]
        await asyncio.sleep(0)
        return True


def line_of(handler: Any) -> int:
    """Return the number of the line in which a handler waits."""
    lines, first = inspect.getsourcelines(handler.handle)
    [index] = [index for index, line in enumerate(lines) if "# it waits here" in line]
    return first + index


@pytest_asyncio.fixture
async def tasks(sessions_end_soon: None) -> AsyncIterator[dict[Any, Any]]:
    """Servers of all kinds, each with a handler that waits and was woken once before if it can be: tasks by handler class."""
    gate = asyncio.Event()
    async with (
        aioecho.TCPServer(("127.0.0.1", 0), Line) as lines,
        aioecho.UDPServer(("127.0.0.1", 0), Peer) as peers,
        aioecho.UDPServer(("127.0.0.1", 0), Single) as singles,
        Verifying(("127.0.0.1", 0), Full) as full,
    ):
        for server in (singles, full):
            server.state = gate
        with (
            socket.create_connection(lines.server_address) as client,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            sender.bind(("127.0.0.1", 0))
            for _ in range(2):
                client.sendall(b"x\n")
                sender.sendto(b"x", peers.server_address)
                await settle(lambda: lines.connections and peers.stats.handled)
                await settle()
            for _ in range(3):  # the first of them takes the spare task, the others need new ones in the same turn
                sender.sendto(b"x", singles.server_address)
            sender.sendto(b"x", full.server_address)
            await settle(lambda: (singles.stats.active, full.stats.active) == (3, 1))
            await settle()
            servers = (lines, peers, singles, full)
            yield {
                kind: [each.task for each in server.connections] for kind, server in zip(HANDLERS, servers, strict=True)
            }
            gate.set()


async def look(tool: str) -> str:
    """Return what a tool tells of this process."""
    command = (sys.executable, "-m", "asyncio", tool, str(os.getpid()))
    process = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
    output, errors = await process.communicate()
    if process.returncode and re.search(rb"[Pp]ermission|not permitted", output + errors):
        pytest.skip("this process may not look into another")
    assert process.returncode == 0, (output + errors).decode()
    return output.decode()


@shows_tasks
async def test_ps_shows_the_handlers(tasks: dict[Any, Any]) -> None:
    table = await look("ps")
    for kind, waiting in tasks.items():
        rows = [row for row in table.splitlines() if f" {kind.handle.__qualname__} " in row]
        assert len(rows) == len(waiting)


@shows_tasks
async def test_pstree_shows_the_line_where_each_handler_waits(tasks: dict[Any, Any]) -> None:
    tree = await look("pstree")
    for kind, waiting in tasks.items():
        assert tree.count(f"{kind.handle.__qualname__} {__file__}:{line_of(kind)}") == len(waiting)


@shows_tasks
async def test_a_call_graph_shows_the_line_where_each_handler_waits(tasks: dict[Any, Any]) -> None:
    for kind, waiting in tasks.items():
        for task in waiting:
            graph = io.StringIO()
            asyncio.print_call_graph(task, file=graph)
            assert f"line {line_of(kind)}, in async {kind.handle.__qualname__}()" in graph.getvalue()


async def test_a_tasks_repr_names_its_handler(tasks: dict[Any, Any]) -> None:
    for kind, waiting in tasks.items():
        for task in waiting:
            pattern = rf"coro=<{kind.handle.__qualname__}\(\) (running|done|suspended)"
            assert re.search(pattern, repr(task)), repr(task)


async def test_a_tasks_stack_has_the_handler_behind_its_own_coroutine(tasks: dict[Any, Any]) -> None:
    for kind, waiting in tasks.items():
        for task in waiting:
            names, inner = [], task.get_coro()
            while inspect.iscoroutine(inner):
                names.append(inner.cr_code.co_name)
                inner = inner.cr_await
            assert "handle" in names, kind
