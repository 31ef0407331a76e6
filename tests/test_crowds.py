"""Many clients at once: what each costs, and that none is lost."""

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import LOOPS
from programs import Program, connect, narrow
from subjects import Subject
from timing import in_time


@contextlib.contextmanager
def crowd(address: Any, count: int, connect: Callable[[Any], socket.socket] = connect) -> Iterator[list[socket.socket]]:
    """Connect so many clients, and close them in the end."""
    clients: list[socket.socket] = []
    try:
        for _ in range(count):
            clients.append(connect(address))
        yield clients
    finally:
        for sock in clients:
            sock.close()


def collect(clients: list[socket.socket], done: int | None, timeout: float = 30) -> list[bytes]:
    """Return what each receives: so many bytes, or all until the end of its stream if `done` is None."""
    received = [b""] * len(clients)
    deadline = time.monotonic() + timeout
    with selectors.EpollSelector() as selector:
        for number, sock in enumerate(clients):
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, number)
        left = len(clients)
        while left:
            assert time.monotonic() < deadline, f"{left} are still waiting"
            for key, _ in selector.select(1):
                sock = key.fileobj  # type: ignore[assignment]
                chunk = sock.recv(2**16)
                received[key.data] += chunk
                if not chunk or (done is not None and len(received[key.data]) >= done):
                    selector.unregister(sock)
                    left -= 1
    return received


@pytest.mark.slow
@LOOPS
def test_ten_thousand_stay_idle_and_then_echo(loop: str) -> None:
    count = 10_000
    with Subject(loop, "echo", limits={"backlog": 4096}) as server:
        with crowd(server.endpoint, 100) as few:  # what is made once is made before it counts
            for sock in few:
                sock.sendall(b"x")
            collect(few, 1)
        before = server.until(lambda state: state["active"] == 0)
        with crowd(server.endpoint, count) as clients:
            state = server.until(lambda state: state["active"] == count)
            each = (state["resident"] - before["resident"]) / count
            print(f"resident memory per idle connection on {loop}: {each:.0f} bytes")  # shown with -rP
            assert each < {"asyncio": 6_000, "uvloop": 4_096}[loop]
            before_idling, began = server.ask("counts")["cpu"], time.monotonic()
            time.sleep(1)  # time is the subject
            share = (server.ask("counts")["cpu"] - before_idling) / (time.monotonic() - began)
            print(f"share of a processor that they take, idle: {share:.1%}")
            for number, sock in enumerate(clients):
                sock.sendall(b"%08d" % number)
            assert collect(clients, 8) == [b"%08d" % number for number in range(count)]
            assert server.ask("counts")["active"] == count
        state = server.until(lambda state: state["active"] == 0)
        assert state["completed"] == count + 100
        assert (state["descriptors"], state["tasks"]) == (before["descriptors"], before["tasks"])
        state = server.finish()
        assert not state["errors"]
        in_time(share, 0.2, "idling")


@pytest.mark.slow
@LOOPS
@pytest.mark.parametrize("timeouts", [{"idle": None, "message": 0.1, "write": 0.1}, {}], ids=["short", "default"])
def test_thousands_that_are_idle_take_no_processor_time(loop: str, timeouts: dict[str, float | None]) -> None:
    count = 2_000
    with Subject(loop, "echo", timeouts=timeouts, limits={"backlog": 4096}) as server, crowd(server.endpoint, count):
        server.until(lambda state: state["active"] == count)
        time.sleep(0.2 if timeouts else 3.5)  # the sweep after their connecting
        before, began = server.ask("counts")["cpu"], time.monotonic()
        time.sleep(2)  # time is the subject
        share = (server.ask("counts")["cpu"] - before) / (time.monotonic() - began)
        print(f"share of a processor that {count} take on {loop}: {share:.2%}")  # shown with -rP
    in_time(share, 0.03, "idling")


@pytest.mark.slow
@LOOPS
def test_ten_thousand_requests_in_flight_at_sigterm_are_all_answered(loop: str) -> None:
    count, grace = 10_000, 40  # a tenth of it where the machine has nothing else to do
    command = ("serve", "subjects:Delayed", "--app-dir", Path(__file__).parent, "--port", "0", "--loop", loop)
    with Program.aioecho(*command, "--backlog", "4096", "--timeout-graceful-shutdown", str(grace)) as server:
        endpoint = server.listening()
        with crowd(endpoint, count) as clients:
            for number, sock in enumerate(clients):
                sock.sendall(b"request %d\n" % number)
            began = time.monotonic()
            server.signal()
            answers = collect(clients, None, grace + 10)  # a reset would raise
            status = server.wait()
            seconds = time.monotonic() - began
        assert answers == [b"REQUEST %d\n" % number for number in range(count)]
        assert status == 0, server.stderr()
        assert "cut off" not in server.stderr()
        in_time(seconds, grace + 0.5)


@pytest.mark.timed
@LOOPS
def test_hundreds_that_reset_in_mid_reply_are_gone_within_a_second(loop: str) -> None:
    count = 300
    with Subject(loop, "torrent") as server:
        with connect(server.endpoint) as sock:
            sock.sendall(b"100\n")
            collect([sock], 100)
        before = server.until(lambda state: state["active"] == 0)
        with crowd(server.address, count, narrow) as clients:
            for sock in clients:
                sock.sendall(b"10000000\n")
            collect(clients, 1)
            assert server.ask("counts")["active"] == count  # none has all of its reply
            for sock in clients:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # They are closed, and so reset, here.
        began = time.monotonic()
        state = server.until(lambda state: state["active"] == 0)
        took = time.monotonic() - began
        assert (state["descriptors"], state["tasks"]) == (before["descriptors"], before["tasks"])
        assert state["failed"] == state["reasons"]["connection lost"] == count
        state = server.finish()
        assert state["errors"] == []
        assert not server.records("ERROR") + server.records("WARNING")
        in_time(took, 1)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@LOOPS
def test_a_million_connections_leave_nothing(loop: str) -> None:
    count, step = int(os.environ.get("AIOECHO_SOAK", 1_000_000)), 20_000
    with Subject(loop, "echo") as server:
        sizes, began = [], time.monotonic()
        for done in range(0, count, step):
            for _ in range(step // 100):
                with crowd(server.endpoint, 100) as clients:
                    for sock in clients:
                        sock.sendall(b"x")
                    collect(clients, 1)
                    for sock in clients[::2]:  # half of them reset, half of them finish
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            state = server.until(lambda state: state["active"] == 0)
            sizes.append(state["resident"])
            assert state["accepted"] == done + step
        seconds = time.monotonic() - began
        growth = (sizes[-1] - sizes[0]) / (count - step) * 100_000
        print(f"{loop}: {count} connections in {seconds:.0f} s; resident KiB: {[size // 1024 for size in sizes]};")
        print(f"growth per 100,000: {growth:.0f} bytes")
        assert growth < 1_000_000
        state = server.finish()
        assert state["errors"] == []
