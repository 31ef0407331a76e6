"""A publisher whose 1,000 subscribers vanish: they reset, or their network drops every packet from some moment on.

The partition is real: the subscribers are in a network namespace of their own, and only the kernel's probes can tell.
"""

import asyncio
import contextlib
import ctypes
import os
import resource
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from conftest import check_identity
from helpers import ANYWHERE, reset
from timing import in_time

import aioecho

pytestmark = [pytest.mark.slow, pytest.mark.timed]

COUNT = 1000

CLONE_NEWNET = 0x40000000

T = TypeVar("T")


class Namespace:
    """A network namespace, which is that of a thread: what :meth:`run` calls is in it, and sockets stay in it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        try:
            self.run(self._leave_the_others)
            self.tid = self.run(threading.get_native_id)
        except BaseException:
            self.close()
            raise

    def _leave_the_others(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def run(self, function: Callable[..., T], *args: Any) -> T:
        return self._thread.submit(function, *args).result()

    def ip(self, command: str) -> None:
        self.run(lambda: subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True))

    def close(self) -> None:
        self._thread.shutdown()


@pytest.fixture
def ends() -> Iterator[tuple[Namespace, Namespace]]:
    """Two namespaces with a cable between them, at 10.99.0.1 and 10.99.0.2."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespace can be made here: there is no ip (iproute2)")
    with contextlib.ExitStack() as stack:
        try:
            here, there = (stack.enter_context(contextlib.closing(Namespace())) for _ in range(2))
            here.ip(f"link add cable type veth peer name cable netns {there.tid}")
            for number, end in ((1, here), (2, there)):
                end.ip(f"addr add 10.99.0.{number}/24 dev cable")
                end.ip("link set cable up")
        except (OSError, AttributeError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespace can be made here: {getattr(error, 'stderr', '') or error}")
        yield here, there


class Subscriber(aioecho.StreamRequestHandler):
    """Reads nothing; every other one is sent what is published."""

    async def handle(self) -> None:
        if len(self.server.connections) % 2:
            self.join("news")
        await self.send(b"welcome\n")
        await asyncio.Event().wait()


def connect_all(address: Any) -> list[socket.socket]:
    """Return 1,000 subscribers, each with what it was sent first."""
    subscribers = [socket.create_connection(address, timeout=30) for _ in range(COUNT)]
    for sock in subscribers:
        assert sock.recv(100) == b"welcome\n"
    return subscribers


@pytest.mark.alike
async def test_subscribers_that_a_partition_cuts_off_are_gone_within_the_time_of_the_keep_alive(
    ends: tuple[Namespace, Namespace],
) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= most < 2 * COUNT + 200:
        pytest.skip(f"{COUNT} subscribers need more descriptors than {most}")
    here, there = ends
    listening = here.run(socket.create_server, ("10.99.0.1", 0))
    # Linux takes the longer one of the two where something is on its way, and where nothing is.
    timeouts = aioecho.Timeouts(keepalive=4, write=4)
    async with aioecho.TCPServer(None, Subscriber, sock=listening, timeouts=timeouts) as server:
        subscribers = await asyncio.to_thread(there.run, connect_all, server.server_address)
        try:
            there.ip("route add blackhole 10.99.0.1/32")  # no packet of theirs arrives any more
            began = time.monotonic()
            heard = server.broadcast(b"news\n", to="news")
            assert 0 < heard < COUNT
            while server.connections and time.monotonic() < began + 20:
                await asyncio.sleep(0.02)
                server.broadcast(b"news\n", to="news")
            took = time.monotonic() - began
            assert server.stats.reasons == {"connection lost": COUNT}
            check_identity(server)
            assert took > 2  # it was the timeout, and nothing else
        finally:
            for sock in subscribers:
                sock.close()
    in_time(took, 4 + 1.5)


async def test_subscribers_that_reset_are_gone_at_once() -> None:
    async with aioecho.TCPServer(ANYWHERE, Subscriber) as server:
        subscribers = await asyncio.to_thread(connect_all, server.server_address)
        for sock in subscribers:
            reset(sock)
        began = time.process_time()  # of this process: others are not to count
        while server.connections:
            await asyncio.sleep(0)
        took = time.process_time() - began
        assert server.stats.reasons == {"connection lost": COUNT}
        check_identity(server)
    in_time(took, 0.1)
