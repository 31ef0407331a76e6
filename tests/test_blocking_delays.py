"""Delayed acknowledgements cost the clients of blocking handlers nothing."""

import asyncio
import socket
import socketserver
import time
from types import SimpleNamespace
from typing import Any

import pytest
from timing import in_time

import aioecho
from aioecho.blocking.sockets import RequestSocket
from aioecho.streams.protocol import QUICK_ACKS, TCP_QUICKACK

COUNT = 200  # by a delayed acknowledgement, 40 ms, each: 8 s


class ByFiles(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while header := self.rfile.read(4):
            self.wfile.write(self.rfile.read(int.from_bytes(header, "big")))


class ByRecv(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while header := self.request.recv(4):
            self.request.sendall(self.request.recv(int.from_bytes(header, "big")))


@pytest.mark.timed
@pytest.mark.parametrize("has_tls", [False, True])
@pytest.mark.parametrize("kind", [ByFiles, ByRecv])
async def test_a_client_that_writes_in_two_parts_waits_for_no_delayed_acknowledgement(
    kind: Any, has_tls: bool, tls: SimpleNamespace
) -> None:
    def ask() -> float:
        with socket.create_connection(server.server_address) as plain:  # with Nagle's algorithm
            sock = tls.client.wrap_socket(plain, server_hostname="localhost") if has_tls else plain
            with sock:
                began = time.monotonic()
                for _ in range(COUNT):
                    sock.sendall(b"\0\0\0\4")
                    sock.sendall(b"body")
                    assert sock.recv(4) == b"body"
                return time.monotonic() - began

    async with aioecho.serve(kind, "tcp://127.0.0.1:0", ssl=tls.server if has_tls else None) as server:
        in_time(await asyncio.to_thread(ask), 2, f"{COUNT} requests")


async def test_the_kernel_is_asked_for_acknowledgements_by_a_client_that_only_sends_a_few_times_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def set_option(self: Any, level: int, option: int, value: Any) -> None:
        if option == TCP_QUICKACK:
            asked.append(value)
        super(RequestSocket, self).setsockopt(level, option, value)

    monkeypatch.setattr(RequestSocket, "setsockopt", set_option, raising=False)

    class Sink(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for _ in self.rfile:
                pass

    def send_lines() -> None:
        with socket.create_connection(server.server_address) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(100):
                sock.sendall(b"line\n")
                time.sleep(0.001)  # so that they come one by one
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""

    async with aioecho.serve(Sink, "tcp://127.0.0.1:0") as server:
        await asyncio.to_thread(send_lines)
    assert asked == [1] * QUICK_ACKS


async def test_nothing_is_asked_of_the_kernel_for_a_client_that_asks_and_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(RequestSocket, "setsockopt", lambda *arguments: asked.append(arguments), raising=False)

    class Upper(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line.upper())

    async with aioecho.serve(Upper, "tcp://127.0.0.1:0") as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        for _ in range(20):
            writer.write(b"line\n")
            assert await reader.readline() == b"LINE\n"
        writer.close()
        await writer.wait_closed()
    assert asked == []


@pytest.mark.timed
async def test_the_first_reply_over_tls_waits_for_no_delayed_acknowledgement(tls: SimpleNamespace) -> None:
    class Upper(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    def ask() -> float:
        with (
            socket.create_connection(server.server_address) as plain,
            tls.client.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            assert sock.version() == "TLSv1.3"
            began = time.monotonic()
            sock.sendall(b"line\n")
            assert sock.recv(10) == b"LINE\n"
            return time.monotonic() - began

    async with aioecho.serve(Upper, "tcp://127.0.0.1:0", ssl=tls.server) as server:
        took = sorted([await asyncio.to_thread(ask) for _ in range(10)])
    in_time(took[5], 0.03, "the first reply of most clients")
