"""Unix sockets: the credentials of a peer, and descriptors that it passes."""

import asyncio
import os
import socket
import socketserver
import sys
from pathlib import Path

import pytest
from helpers import ANYWHERE, ask

import aioecho

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells them so")


class TellsCredentials(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.send(repr(self.credentials and tuple(self.credentials)).encode())


@on_linux
async def test_a_handler_knows_the_process_and_the_user_of_its_peer(tmp_path: Path) -> None:
    async with aioecho.UnixStreamServer(tmp_path / "sock", TellsCredentials):
        reader, writer = await asyncio.open_unix_connection(tmp_path / "sock")
        assert await reader.read() == repr((os.getpid(), os.getuid(), os.getgid())).encode()
        writer.close()
        await writer.wait_closed()


async def test_a_peer_of_the_network_has_no_credentials() -> None:
    async with aioecho.TCPServer(ANYWHERE, TellsCredentials) as server:
        assert await ask(server) == b"None"


class Closed:
    """A pipe whose write end was passed: its read end meets the end once no process has the other end."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()

    def pass_over(self, sock: socket.socket) -> None:
        """Send the write end with a line, and close it here."""
        socket.send_fds(sock, [b"line\n"], [self.write] * 3)
        os.close(self.write)

    async def see_end(self) -> None:
        """Return when no process has the write end open."""
        assert await asyncio.to_thread(os.read, self.read, 1) == b""
        os.close(self.read)


class Answers(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.reader:
            await self.send(line)


async def test_descriptors_that_a_peer_passes_are_closed(tmp_path: Path) -> None:
    """Neither loop receives them: the kernel drops what comes with data that is read without room for it."""
    pipe = Closed()
    async with aioecho.UnixStreamServer(str(tmp_path / "sock"), Answers):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(tmp_path / "sock"))
            pipe.pass_over(sock)
            assert await asyncio.to_thread(sock.recv, 100) == b"line\n"
            # The connection and its handler live on, and the descriptors do not.
            await pipe.see_end()
            sock.sendall(b"more\n")
            assert await asyncio.to_thread(sock.recv, 100) == b"more\n"


class DatagramAnswers(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        await self.reply(self.data)


async def test_descriptors_that_come_with_a_datagram_are_closed(tmp_path: Path) -> None:
    pipe = Closed()
    async with aioecho.UnixDatagramServer(str(tmp_path / "sock"), DatagramAnswers):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.bind(str(tmp_path / "client"))
            sock.connect(str(tmp_path / "sock"))
            pipe.pass_over(sock)
            assert await asyncio.to_thread(sock.recv, 100) == b"line\n"
            await pipe.see_end()


async def test_a_blocking_handler_receives_descriptors(tmp_path: Path) -> None:
    class Receives(socketserver.BaseRequestHandler):
        request: socket.socket

        def handle(self) -> None:
            data, descriptors, _, _ = socket.recv_fds(self.request, 100, 3)
            for number in descriptors:
                os.write(number, data)
                os.close(number)

    read, write = os.pipe()
    async with aioecho.UnixStreamServer(str(tmp_path / "sock"), Receives):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(tmp_path / "sock"))
            socket.send_fds(sock, [b"hello"], [write])
            os.close(write)
            assert await asyncio.to_thread(sock.recv, 100) == b""
    assert os.read(read, 100) == b"hello"
    os.close(read)
