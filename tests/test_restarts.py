"""Worker processes under load: restarts and deaths that clients are not to notice, or to get over.

The event loop here is only the clients': these tests need not run on every one of them.
"""

import asyncio
import itertools
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from programs import Program, descriptors_of, eventually, state_of, workers_of
from restarted import CLIENTS, Client

import aioecho


class Clients:
    """So many clients at a time. They make one connection after another, with one request a connection."""

    def __init__(self, endpoint: str, count: int) -> None:
        host, port = endpoint.removeprefix("tcp://").split(":")
        self._address = host, int(port)
        self._stop = asyncio.Event()
        self.outcomes: Counter[str] = Counter()
        self._tasks = [asyncio.create_task(self._run(number)) for number in range(count)]

    @property
    def answered(self) -> int:
        return self.outcomes["answered"]

    async def _run(self, number: int) -> None:
        request = b"client %d\n" % number
        while not self._stop.is_set():
            try:
                async with asyncio.timeout(20):
                    reader, writer = await asyncio.open_connection(*self._address)
                    writer.write(request)
                    reply = await reader.readline()
                    writer.close()
                    await writer.wait_closed()
            except Exception as error:
                self.outcomes[repr(error)] += 1
            else:
                self.outcomes["answered" if reply == request else f"lost: {reply!r}"] += 1

    async def stop(self) -> Counter[str]:
        self._stop.set()
        await asyncio.gather(*self._tasks)
        return self.outcomes

    async def reach(self, answered: int) -> None:
        while self.answered < answered:
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool], seconds: float = 40) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def roll(workers: int, times: int, requests: int, *arguments: str) -> None:
    """Restart all workers so many times, under so many requests or more; none is lost and none reset."""
    command = ("serve", "echo", "--workers", str(workers), "--port", "0", *arguments)
    with Program.aioecho(*command) as program:
        clients = Clients(await asyncio.to_thread(program.listening), 16)
        descriptors = descriptors_of(program.process.pid)
        pids = workers_of(program)
        for number in range(1, times + 1):
            await clients.reach(requests * number // (times + 1))
            program.signal(signal.SIGHUP)
            await until(lambda: program.stderr().count("replaced all workers") == number)  # noqa: B023 - at once
            assert len(workers_of(program)) >= workers
        await clients.reach(requests)
        outcomes = await clients.stop()
        assert set(outcomes) == {"answered"}, outcomes
        await until(lambda: len(workers_of(program)) == workers)
        assert not workers_of(program) & pids
        await until(lambda: descriptors_of(program.process.pid) == descriptors)
        assert await asyncio.to_thread(program.stop) == 0
        assert "ERROR" not in program.stderr()
        assert "WARNING" not in program.stderr()


@pytest.mark.alike
@pytest.mark.slow
@pytest.mark.parametrize("way", [(), ("--reuse-port",)])
def test_a_rolling_restart_loses_no_client(way: tuple[str, ...]) -> None:
    asyncio.run(roll(2, 2, 1000, *way))


@pytest.mark.soak
@pytest.mark.timeout(400)
@pytest.mark.parametrize("way", [(), ("--reuse-port",)])
def test_twenty_rolling_restarts_of_four_workers_lose_no_client(way: tuple[str, ...]) -> None:
    asyncio.run(roll(4, 20, 50_000, *way))


async def kill_at_random(workers: int, seconds: float, *arguments: str) -> None:
    """Kill some worker every 100 ms, as 100 clients come and go; in the end all is as before."""
    command = ("serve", "echo", "--workers", str(workers), "--port", "0", *arguments)
    with Program.aioecho(*command) as program:
        clients = Clients(await asyncio.to_thread(program.listening), 100)
        await clients.reach(100)
        descriptors = descriptors_of(program.process.pid)
        killed: set[int] = set()
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(killed) <= seconds * 3:
            if alive := sorted(workers_of(program)):
                os.kill(victim := random.choice(alive), signal.SIGKILL)
                killed.add(victim)
            await asyncio.sleep(0.1)
        await until(lambda: len(workers_of(program)) == workers)
        answered = clients.answered
        await clients.reach(answered + 1000)
        outcomes = await clients.stop()
        # All that may happen to a client is that its connection is lost with its worker.
        for outcome in outcomes:
            assert re.match(r"answered|lost: b''|ConnectionResetError|BrokenPipeError", outcome), outcomes
        assert len(workers_of(program)) == workers
        assert not any(state_of(pid) for pid in killed)
        await until(lambda: descriptors_of(program.process.pid) == descriptors)
        assert await asyncio.to_thread(program.stop) == 0


@pytest.mark.alike
@pytest.mark.slow
def test_workers_that_are_killed_are_replaced() -> None:
    asyncio.run(kill_at_random(2, 1))


@pytest.mark.soak
@pytest.mark.parametrize("way", [(), ("--reuse-port",)])
def test_workers_that_are_killed_for_ten_seconds_are_replaced(way: tuple[str, ...]) -> None:
    asyncio.run(kill_at_random(4, 10, *way))


@pytest.mark.alike
@pytest.mark.slow
def test_recycled_workers_lose_no_client() -> None:
    asyncio.run(recycle())


async def recycle() -> None:
    arguments = ("--workers", "2", "--limit-max-requests", "200", "--limit-max-requests-jitter", "100", "--port", "0")
    with Program.aioecho("serve", "echo", *arguments) as program:
        clients = Clients(await asyncio.to_thread(program.listening), 16)
        pids = workers_of(program)
        await clients.reach(800)
        await until(lambda: not pids & workers_of(program))
        outcomes = await clients.stop()
        assert set(outcomes) == {"answered"}, outcomes
        eventually(lambda: len(workers_of(program)) == 2)
        assert await asyncio.to_thread(program.stop) == 0


# Clients that only send


async def test_one_that_only_sends_loses_one_line_at_the_most_however_late_its_connection_is_closed() -> None:
    """Between the last read and the closing the kernel would take line after line, and throw them away."""
    taken: list[bytes] = []

    class Sink(aioecho.StreamRequestHandler):
        one_way = True

        async def handle(self) -> None:
            async for line in self.reader:
                taken.append(line)

        async def finish(self) -> None:
            time.sleep(0.1)  # as on a busy machine

    def send(address: tuple[str, int]) -> int:
        """Send lines as fast as they are taken, and return how many were."""
        count = 0
        with socket.create_connection(address) as sock:
            began.release()
            try:
                while True:
                    sock.sendall(b"%d\n" % count)
                    count += 1
                    time.sleep(0.0005)  # else the buffers are full of lines that are in time
            except OSError:
                return count

    began = threading.Semaphore(0)
    async with aioecho.TCPServer(("127.0.0.1", 0), Sink, timeouts=aioecho.Timeouts(linger=0.2)) as server:
        sending = [asyncio.create_task(asyncio.to_thread(send, server.server_address)) for _ in range(3)]
        for _ in sending:
            await asyncio.to_thread(began.acquire)
        await until(lambda: len(taken) > 100)
        report = await server.shutdown()
        sent = await asyncio.gather(*sending)
    assert report.completed == 3
    assert len(taken) >= sum(sent) - 3, (len(taken), sent)


# Five kinds of clients at once, and datagrams in sessions


async def roll_under_all(times: int, notes: Path, *way: str, kinds: Sequence[type[Client]], each: int) -> str:
    """Restart both workers so many times, under so many clients of every kind; return the account of what came of it."""
    binds = [
        ("--bind", f"restarted:{kind.KIND}={'udp' if kind.KIND == 'Session' else 'tcp'}://127.0.0.1:0")
        for kind in kinds
    ]
    command = ("serve", *itertools.chain(*binds), "--workers", "2", "--app-dir", Path(__file__).parent, *way)
    with Program.aioecho(*command, env={"RESTARTED_NOTES": str(notes)}) as program:
        endpoints = [await asyncio.to_thread(program.listening) for _ in kinds]
        clients = [
            kind(endpoint, number * each + index)
            for number, (kind, endpoint) in enumerate(zip(kinds, endpoints, strict=True))
            for index in range(each)
        ]
        async with asyncio.TaskGroup() as tasks:
            for client in clients:
                tasks.create_task(client.run())
            await asyncio.sleep(0.3)  # that all are at it
            for number in range(1, times + 1):
                program.signal(signal.SIGHUP)
                await until(lambda: program.stderr().count("replaced all workers") == number)  # noqa: B023 - at once
                await asyncio.sleep(0.1)  # likewise
            for client in clients:
                client.is_stopped = True
        assert await asyncio.to_thread(program.stop) == 0
        assert "ERROR" not in program.stderr()
        assert "WARNING" not in program.stderr()
    taken = [line.split() for line in notes.read_text().splitlines()]
    account = ""
    for kind in kinds:
        total: Counter[str] = Counter()
        for client in clients:
            if isinstance(client, kind):
                try:
                    client.check(taken)
                finally:
                    total += client.outcomes
        account += f"{kind.__name__}: {dict(total)}\n"
    print(account)  # shown with -rP
    assert "failed" not in account, account
    assert "cut" not in account, account
    return account


# A peer's datagrams reach one worker only with sockets of their own.
WAYS = pytest.mark.parametrize(
    ("way", "kinds"), [((), CLIENTS[:-1]), (("--reuse-port",), CLIENTS)], ids=["shared", "own"]
)


@pytest.mark.alike
@pytest.mark.slow
@WAYS
def test_rolling_restarts_cut_none_of_five_kinds_of_clients(
    way: tuple[str, ...], kinds: Sequence[type[Client]], tmp_path: Path
) -> None:
    asyncio.run(roll_under_all(2, tmp_path / "notes", *way, kinds=kinds, each=4))


@pytest.mark.soak
@pytest.mark.timeout(1200)
@WAYS
def test_fifty_rolling_restarts_cut_none_of_five_kinds_of_clients(
    way: tuple[str, ...], kinds: Sequence[type[Client]], tmp_path: Path
) -> None:
    asyncio.run(roll_under_all(50, tmp_path / "notes", *way, kinds=kinds, each=8))


# Eight clients that connect again and again until they are refused, and what became of their connections.
CONNECTING = """
import collections, socket, sys, threading

outcomes = collections.Counter()

served = threading.Semaphore(0)

def connect():
    refused = 0
    while refused < 3:
        with socket.socket() as sock:
            sock.settimeout(20)
            try:
                sock.connect(("127.0.0.1", int(sys.argv[1])))
            except ConnectionRefusedError:
                refused += 1
                continue
            except OSError as error:
                outcomes[repr(error)] += 1
                continue
            try:
                sock.sendall(b"hello\\n")
                sock.shutdown(socket.SHUT_WR)
                outcomes[sock.recv(100).decode()] += 1
                served.release()
            except OSError as error:
                outcomes[repr(error)] += 1

threads = [threading.Thread(target=connect) for _ in range(8)]
for thread in threads:
    thread.start()
for _ in range(500):
    served.acquire()
print("served", flush=True)
for thread in threads:
    thread.join()
print(dict(outcomes))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no other system can drop connection requests")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_no_client_is_reset_that_connects_while_a_server_stops(loop: str) -> None:
    for _ in range(4):
        with Program.aioecho("serve", "upper", "--port", "0", "--loop", loop) as server:
            port = server.listening().rpartition(":")[2]
            with Program(sys.executable, "-c", CONNECTING, port) as clients:
                assert clients.line() == "served"
                assert server.stop() == 0
                code, output, errors = clients.end()
        assert (code, errors) == (0, "")
        outcomes = eval(output)
        assert set(outcomes) == {"HELLO\n"}, outcomes
