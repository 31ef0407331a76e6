"""A process that a handler has forked keeps none of the server's sockets."""

import asyncio
import gc
import multiprocessing
import os
import signal
import socket
import socketserver
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ANYWHERE, close

import aioecho
from aioecho.echo import DatagramEcho

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Child:
    """A forked process that ends when told to. It has begun when the constructor returns."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        self._before = before
        read, self._begun = os.pipe()
        self._process = multiprocessing.get_context("fork").Process(target=self._run)
        self._process.start()
        os.read(read, 1)
        os.close(read)
        os.close(self._begun)

    def _run(self) -> None:
        os.write(self._begun, b"x")
        self._before()
        signal.pause()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()


class Nothing(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        pass


async def in_executor(function: Callable[[], Any]) -> Any:
    return await asyncio.to_thread(function)


async def test_a_client_sees_the_end_while_a_child_of_its_handler_lives() -> None:
    children: list[Child] = []

    class Forks(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.read()
            children.append(Child())
            await self.send(b"forked")

    try:
        async with aioecho.TCPServer(ANYWHERE, Forks) as server:
            reader, writer = await asyncio.open_connection(*server.server_address)
            writer.write_eof()
            async with asyncio.timeout(10):
                assert await reader.read() == b"forked"
            await close(writer)
            address = server.server_address
        socket.create_server(address).close()  # the port is free
    finally:
        for child in children:
            child.end()


async def test_the_paths_and_ports_of_a_stopped_server_are_free_while_a_child_lives(tmp_path: Path) -> None:
    async with aioecho.serve(DatagramEcho, "udp://127.0.0.1:0", f"unixgram:{tmp_path}/sock") as server:
        address = server.server_address
        child = Child()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(address)
    finally:
        child.end()


async def test_what_a_child_opens_is_not_closed_by_objects_that_it_has_copied() -> None:
    """Their numbers stay taken there, so that what closes them once more closes nothing else."""
    replies = multiprocessing.get_context("fork").SimpleQueue()

    class Forks(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            number = self.writer.get_extra_info("socket").fileno()
            listening = [sock.fileno() for sock in self.server.sockets]

            def look() -> None:
                replies.put([os.readlink(f"/proc/self/fd/{fd}") for fd in (number, *listening)])
                with open(os.devnull) as file:
                    gc.collect()
                    replies.put(os.fstat(file.fileno()) is not None)

            child = Child(look)
            try:
                assert await in_executor(replies.get) == [os.devnull] * 2
                assert await in_executor(replies.get)
            finally:
                child.end()
            await self.send(b"forked")

    try:
        async with aioecho.TCPServer(ANYWHERE, Forks) as server:
            reader, writer = await asyncio.open_connection(*server.server_address)
            assert await reader.read() == b"forked"
            await close(writer)
    finally:
        replies.close()


async def test_a_child_that_a_blocking_handler_forks_itself_keeps_its_connection() -> None:
    """As under socketserver: it answers in place of the handler."""

    class Forks(socketserver.BaseRequestHandler):
        request: socket.socket

        def handle(self) -> None:
            child = os.fork()
            if child == 0:
                try:
                    kept = [sock for sock in self.server.sockets if os.path.exists(f"/proc/self/fd/{sock.fileno()}")]
                    names = {os.readlink(f"/proc/self/fd/{sock.fileno()}") for sock in kept}  # type: ignore[attr-defined]
                    self.request.sendall(" ".join(names).encode())
                finally:
                    os._exit(0)
            os.waitpid(child, 0)

    async with aioecho.TCPServer(ANYWHERE, Forks) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write_eof()
        assert await reader.read() == b"/dev/null"
        await close(writer)


async def test_a_program_gets_the_connection_as_its_stdin_also_with_a_preexec_fn() -> None:
    class Starts(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            number = self.writer.get_extra_info("socket").fileno()
            program = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", "print('from the program')"],
                stdout=number,
                preexec_fn=lambda: None,
            )
            await in_executor(program.wait)

    async with aioecho.TCPServer(ANYWHERE, Starts) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.read() == b"from the program\n"
        await close(writer)


async def test_a_child_of_a_program_with_a_server_that_is_gone_closes_nothing() -> None:
    async with aioecho.TCPServer(ANYWHERE, Nothing):
        pass
    read, write = os.pipe()
    child = Child(lambda: os.write(write, b"x"))
    try:
        assert os.read(read, 1) == b"x"
    finally:
        child.end()
        os.close(read)
        os.close(write)
