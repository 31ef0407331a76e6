"""Serving over real sockets: handlers, hooks, accounting, several endpoints and embedding."""

import asyncio
import functools

import pytest
from conftest import check_identity, settle

import aioecho
from aioecho.echo import Echo, Upper


async def test_a_line_comes_back_in_upper_case() -> None:
    async with aioecho.TCPServer(("127.0.0.1", 0), Upper) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"Hello, Server!\n")
        assert await reader.readline() == b"HELLO, SERVER!\n"
        writer.close()
        await writer.wait_closed()
        await settle(lambda: server.stats.completed == 1)
        check_identity(server)
