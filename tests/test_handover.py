"""Sessions of datagrams when a worker is replaced: they go on in the old one, and new peers are the new one's."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from programs import Program, eventually, workers_of

import aioecho
from aioecho.datagrams.handover import Handover, Key

PROGRAM = """
import os
import aioecho

class Count(aioecho.DatagramSessionHandler):
    async def handle(self):
        count = 0
        async with self.unbroken():
            async for data in self.datagrams:
                count += 1
                await self.reply(b"%d %d" % (os.getpid(), count))
                if data == b"end":
                    return
"""

# The last is with PROXY headers.
PROXIED = "udp://127.0.0.1:0?proxy=v2&proxy_from=127.0.0.1"
ENDPOINTS = pytest.mark.parametrize("bind", ["udp://127.0.0.1:0", "udp://0.0.0.0:0", "udp://*:0", PROXIED])


class Peer:
    """A client with a socket of its own."""

    all: ClassVar[list["Peer"]] = []

    def __init__(self, endpoint: str) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.settimeout(20)
        self.all.append(self)
        name, _, options = endpoint.partition("?")
        self.sock.connect(("127.0.0.1", int(name.rpartition(":")[2])))
        self.header = b""
        if options:
            addresses = bytes([192, 0, 2, 1, 192, 0, 2, 2]) + struct.pack("!HH", len(self.all), 53)
            self.header = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c" + addresses

    def ask(self, data: bytes = b"on") -> tuple[int, int]:
        """Return the process that answers, and how many datagrams it has had in this session."""
        self.sock.send(self.header + data)
        pid, count = self.sock.recv(100).split()
        return int(pid), int(count)


@pytest.fixture(autouse=True)
def close_all() -> Iterator[None]:
    yield
    while Peer.all:
        Peer.all.pop().sock.close()


@contextlib.contextmanager
def serving(folder: Path, bind: str, workers: int = 1) -> Iterator[tuple[Program, str, int]]:
    """Give a program with one worker, or two, its endpoint, and the process id of a worker."""
    (folder / "counting.py").write_text(PROGRAM)
    command = ("serve", "counting:Count", "--workers", "2", "--reuse-port", "--bind", bind)
    with Program.aioecho(*command, cwd=folder) as program:
        endpoint = program.listening().partition("?")[0] + "".join(bind.partition("?")[1:])
        if workers == 1:
            program.signal(signal.SIGTTOU)  # else peers would be dealt out
        eventually(lambda: len(workers_of(program)) == workers)
        yield program, endpoint, next(iter(workers_of(program)))


def replace(program: Program, endpoint: str, worker: int) -> int:
    """Have a worker replaced, and return the process id of the new one once that serves."""
    before = workers_of(program)
    os.kill(worker, signal.SIGTERM)
    (new,) = eventually(lambda: workers_of(program) - before)
    eventually(lambda: Peer(endpoint).ask(b"end")[0] == new)
    return new


@ENDPOINTS
def test_sessions_go_on_when_their_worker_is_replaced_and_replaced_again(tmp_path: Path, bind: str) -> None:
    with serving(tmp_path, bind) as (program, endpoint, first):
        old = [Peer(endpoint) for number in range(20)]
        assert [peer.ask() for peer in old] == [(first, 1)] * 20
        second = replace(program, endpoint, first)
        assert [peer.ask() for peer in old] == [(first, 2)] * 20
        middle = Peer(endpoint)
        assert middle.ask() == (second, 1)
        third = replace(program, endpoint, second)
        assert [peer.ask() for peer in old] == [(first, 3)] * 20
        assert middle.ask() == (second, 2)
        assert Peer(endpoint).ask(b"end") == (third, 1)
        for peer in old:
            assert peer.ask(b"end") == (first, 4)
        assert middle.ask(b"end") == (second, 3)
        eventually(lambda: workers_of(program) == {third})
        assert [peer.ask() for peer in (*old, middle)] == [(third, 1)] * 21
        for peer in (*old, middle):
            peer.ask(b"end")
        assert program.stop() == 0
        assert "ERROR" not in program.stderr()


def test_sessions_end_whose_worker_has_no_successor_any_more(tmp_path: Path) -> None:
    with serving(tmp_path, "udp://127.0.0.1:0") as (program, endpoint, first):
        peer = Peer(endpoint)
        assert peer.ask() == (first, 1)
        second = replace(program, endpoint, first)
        assert peer.ask() == (first, 2)
        os.kill(second, signal.SIGKILL)
        eventually(lambda: first not in workers_of(program) and len(workers_of(program)) == 1)
        pid, count = peer.ask(b"end")
        assert pid not in (first, second)
        assert count == 1


def test_a_session_goes_on_when_its_successor_has_ended_before_it_as_the_program_stops(tmp_path: Path) -> None:
    with serving(tmp_path, "udp://127.0.0.1:0") as (program, endpoint, first):
        peer = Peer(endpoint)
        assert peer.ask() == (first, 1)
        replace(program, endpoint, first)
        assert peer.ask() == (first, 2)
        program.signal(signal.SIGTERM)
        eventually(lambda: workers_of(program) == {first})
        assert peer.ask() == (first, 3)
        assert peer.ask(b"end") == (first, 4)
        assert program.wait() == 0, program.stderr()
        assert "ERROR" not in program.stderr()


def test_no_newcomer_is_dropped_while_a_worker_that_was_removed_has_sessions(tmp_path: Path) -> None:
    with serving(tmp_path, "udp://127.0.0.1:0", workers=2) as (program, endpoint, _):
        old: dict[int, list[Peer]] = {}
        eventually(lambda: old.setdefault((peer := Peer(endpoint)).ask()[0], []).append(peer) or len(old) == 2)
        program.signal(signal.SIGTTOU)
        until = time.monotonic() + 0.5  # time is the subject: until it has heard of it, and then
        while time.monotonic() < until:
            assert Peer(endpoint).ask(b"end")[1] == 1
        for peer in (peer for peers in old.values() for peer in peers):
            peer.ask(b"end")
        eventually(lambda: len(workers_of(program)) == 1)
        assert program.stop() == 0
        assert "ERROR" not in program.stderr()


# They were dropped as "stopped", though the new worker could serve them.
@pytest.mark.slow
def test_what_a_session_has_not_read_when_the_grace_is_over_is_for_the_new_worker(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(
        """
import asyncio, os
import aioecho

class Busy(aioecho.DatagramSessionHandler):
    async def handle(self):
        async for data in self.datagrams:
            await self.reply(b"%d %b" % (os.getpid(), data))
            if data == b"1":
                await asyncio.sleep(1000)
"""
    )
    command = ("serve", "busy:Busy", "--workers", "2", "--reuse-port", "--bind", "udp://127.0.0.1:0")
    with Program.aioecho(*command, "--timeout-graceful-shutdown", "1", cwd=tmp_path) as program:
        endpoint = program.listening()
        program.signal(signal.SIGTTOU)
        (old,) = eventually(lambda: workers if len(workers := workers_of(program)) == 1 else None)
        peer = Peer(endpoint)
        assert peer.ask(b"1") == (old, 1)
        peer.sock.send(b"2")
        peer.sock.send(b"3")
        os.kill(old, signal.SIGTERM)
        answers = [tuple(map(int, peer.sock.recv(100).split())) for _ in range(2)]
        (new,) = eventually(lambda: workers_of(program) - {old})
        assert answers == [(new, 2), (new, 3)]


class Table:
    """The sessions of a worker, as its handover sees them: of one peer, or of none."""

    def __init__(self, *keys: Key) -> None:
        self.live = list(keys)
        self.taken_back: list[bytes] = []

    def keys(self) -> list[Key]:
        return self.live

    def has_socket(self, name: str) -> bool:
        return name == "here"

    def feed(self, key: Key, data: bytes) -> bool:
        return key in self.live

    def take_back(self, key: Key, data: bytes, transport: object) -> None:
        self.taken_back.append(data)

    def note_no_room(self, key: Key) -> None: ...
    def stop_reading(self) -> None: ...
    def read_on(self) -> None: ...
    def end_all(self) -> None: ...


# It closed its end over the second: the kernel then tells of a reset before it hands out what was sent, which was lost with it.
async def test_what_is_passed_on_while_the_old_worker_ends_is_passed_back_in_order() -> None:
    key: Key = ("here", None, ("192.0.2.1", 7), None)
    transport: Any = object()
    ends = [
        *socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET),
        *socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET),
    ]
    with ends[3], Handover(None, ends[1]) as old, Handover(ends[0], ends[2]) as new:
        old_table, new_table = Table(key), Table()
        old.add(old_table)
        await old.take_over()
        new.add(new_table)
        await new.take_over()
        old.retire()
        new.forward(key, b"2", transport)
        old_table.live.clear()
        old.give_back(key, b"1")
        old.note_end(key)
        old.close(old_table)
        was_forwarded = new.forward(key, b"3", transport), new.forward(key, b"4", transport)
        new.close(new_table)
    assert new_table.taken_back == [b"1", b"2", b"3"]
    assert was_forwarded == (True, False)  # it is the new worker's peer from the third on


# Only the first was served: what replies to a balancer was known for that one alone.
async def test_of_several_datagrams_of_a_balancer_that_come_back_all_are_served() -> None:
    class Session(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            async for data in self.datagrams:
                await self.reply(data)
                if data == b"2":
                    return  # else a stop waits for a second of silence

    async with aioecho.UDPServer(PROXIED, Session) as server:
        peer = Peer(f"udp://127.0.0.1:{server.server_address[1]}?proxy=v2")
        peer.sock.setblocking(False)
        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        loop.add_reader(peer.sock.fileno(), came.set)
        try:
            peer.sock.send(peer.header + b"1")
            await came.wait()
            assert peer.sock.recv(100) == b"1"
            came.clear()
            (key,) = server._sessions.keys()
            server._sessions.take_back(key, b"2", None)
            await came.wait()
            assert peer.sock.recv(100) == b"2"
        finally:
            loop.remove_reader(peer.sock.fileno())
        assert (server.stats.received, server.stats.drops.total()) == (2, 0)
