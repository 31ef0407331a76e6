"""Limits: who is let in, when, and what happens when there is no room, no descriptor, no memory."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, LOOPS, ask
from programs import connect, read_line
from subjects import Subject
from timing import in_time

import aioecho
from aioecho.echo import Echo, Upper


class Client:
    """A client that stays."""

    @classmethod
    async def connect(cls, server: aioecho.BaseServer, host: str = "127.0.0.1") -> "Client":
        self = cls()
        self.reader, self.writer = await asyncio.open_connection(*server.server_address[:2], local_addr=(host, 0))
        return self

    async def ask(self, line: bytes = b"x\n") -> bytes:
        """Return the answer to a line; b"" if it was disconnected."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(line)
            return await self.reader.readline()
        return b""

    async def is_served(self) -> bool:
        return await self.ask() == b"X\n"

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


# max_connections and overflow


class Counted(Upper):
    """Knows how many of its kind are alive."""

    live = most = 0

    async def setup(self) -> None:
        kind = type(self)
        kind.live += 1
        kind.most = max(kind.most, kind.live)

    async def finish(self) -> None:
        type(self).live -= 1


@pytest.mark.slow
async def test_a_thousand_clients_for_ten_places_are_all_served_and_never_eleven_at_once() -> None:
    class Ten(Counted):
        pass

    class Twenty(Counted):
        connected = 0  # at the most: some that count against the limit have come to their handler's end already

        async def setup(self) -> None:
            await super().setup()
            Twenty.connected = max(Twenty.connected, self.server.stats.active)

    server = aioecho.TCPServer(ANYWHERE, Ten, limits=aioecho.Limits(max_connections=10))
    async with server:
        asking = [asyncio.create_task(ask(server, b"client %d\n" % n)) for n in range(1000)]
        await settle(lambda: server.stats.completed >= 300)
        assert Ten.most == 10
        server.RequestHandlerClass = Twenty
        server.limits = aioecho.Limits(max_connections=20)
        assert await asyncio.gather(*asking) == [b"CLIENT %d\n" % n for n in range(1000)]
        await settle(lambda: not server.connections)
        assert Ten.most == 10
        assert Twenty.most <= 20
        assert 10 < Twenty.connected <= 20
        assert server.stats.completed == server.stats.accepted == 1000
        check_identity(server)


async def test_a_raised_limit_takes_in_those_who_wait_at_once_and_a_lowered_one_cuts_nobody_off() -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, limits=aioecho.Limits(max_connections=2)) as server:
        clients = [await Client.connect(server) for _ in range(5)]
        asked = [asyncio.create_task(client.ask()) for client in clients]
        await settle(lambda: server.stats.active == 2)
        await settle()
        assert server.stats.accepted == 2
        server.limits = aioecho.Limits(max_connections=4)
        await settle(lambda: server.stats.active == 4)
        await settle()
        assert server.stats.accepted == 4
        server.limits = aioecho.Limits(max_connections=1)
        await settle()
        assert server.stats.active == 4
        for client in clients[:3]:
            await client.close()
        await settle(lambda: server.stats.active == 1)
        await settle()
        assert server.stats.accepted == 4  # there is one: no room for the fifth
        await clients[3].close()
        assert await asked[4] == b"X\n"
        await clients[4].close()
        await asyncio.gather(*asked)
        await settle(lambda: not server.connections)
        assert server.stats.completed == 5


async def test_with_reject_the_one_too_many_is_disconnected_at_once_and_counted() -> None:
    limits = aioecho.Limits(max_connections=3, overflow="reject")
    async with aioecho.TCPServer(ANYWHERE, Upper, limits=limits) as server:
        clients = [await Client.connect(server) for _ in range(3)]
        assert all([await client.is_served() for client in clients])
        refused = [await Client.connect(server) for _ in range(10)]
        async with asyncio.timeout(20):
            assert [await client.ask() for client in refused] == [b""] * 10
        assert server.stats.rejected == server.stats.reasons["overflow"] == 10
        assert (server.stats.accepted, server.stats.active) == (13, 3)
        check_identity(server)
        await clients[0].close()
        await settle(lambda: server.stats.active == 2)
        late = await Client.connect(server)
        assert await late.is_served()
        for client in [*clients, *refused, late]:
            await client.close()


# max_per_host


async def test_five_from_each_host_are_served_and_the_sixth_is_disconnected() -> None:
    async with aioecho.serve(Upper, "tcp://0.0.0.0:0", limits=aioecho.Limits(max_per_host=5)) as server:
        everybody: list[Client] = []
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            clients = [await Client.connect(server, host) for _ in range(8)]
            assert [await client.is_served() for client in clients] == [True] * 5 + [False] * 3
            everybody += clients
        assert server.stats.active == 15
        assert server.stats.rejected == server.stats.reasons["per host"] == 9
        check_identity(server)
        await everybody[0].close()  # one of the first host's
        await settle(lambda: server.stats.active == 14)
        more = [await Client.connect(server, "127.0.0.1") for _ in range(2)]
        assert [await client.is_served() for client in more] == [True, False]
        server.limits = aioecho.Limits(max_per_host=6)  # those that live count for it
        more += [await Client.connect(server, "127.0.0.2") for _ in range(2)]
        assert [await client.is_served() for client in more[2:]] == [True, False]
        for client in [*everybody, *more]:
            await client.close()
        await settle(lambda: not server.connections)
        check_identity(server)


async def test_a_host_whose_handlers_fail_gets_its_places_back() -> None:
    class Failing(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            raise ConnectionError("by itself")

    async with aioecho.TCPServer(ANYWHERE, Failing, limits=aioecho.Limits(max_per_host=1)) as server:
        for count in range(1, 21):
            assert await ask(server) == b""
            await settle(lambda: server.stats.failed == count)  # noqa: B023
        assert server.stats.rejected == 0


async def test_a_limit_for_each_host_leaves_unix_sockets_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with aioecho.UnixStreamServer(path, Upper, limits=aioecho.Limits(max_per_host=1)) as server:
        for _ in range(3):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b"x\n")
            assert await reader.readline() == b"X\n"
            writer.close()
        assert server.stats.rejected == 0


# accept_rate


@pytest.mark.timed
async def test_a_hundred_connections_a_second_are_let_in_evenly() -> None:
    came: list[float] = []

    class Noting(Upper):
        async def setup(self) -> None:
            came.append(time.monotonic())

    async with aioecho.TCPServer(ANYWHERE, Noting) as server:

        async def seconds_for_120(rate: int) -> float:
            came.clear()
            server.pause()
            server.limits = aioecho.Limits(accept_rate=rate)
            # All are in the queue before the first is let in: what it takes to make them is not the server's time.
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(connect(server.names[0])) for _ in range(120)]
                for sock in clients:
                    sock.sendall(b"x\n")
                server.resume()
                await settle(lambda: len(came) == 120)
                for sock in clients:
                    assert await asyncio.to_thread(read_line, sock) == b"X\n"
            after = [moment - came[0] for moment in came]
            # As many as the rate gives, one more at the start, and what late turns of the loop make up for. If it is not the
            # letting in that is late but its being noted, more seem to come together.
            for number, seconds in enumerate(after):
                in_time(number, seconds * rate + rate * 0.02 + 1.01, f"{seconds:.3f} s")
            return after[-1]

        seconds = await seconds_for_120(100)
        assert seconds > 1.19 * 0.9
        in_time(seconds, 1.19 * 1.2)
        in_time(await seconds_for_120(10_000), 1.19 * 0.9)
        await settle(lambda: not server.connections)
        check_identity(server)


@pytest.mark.timed
async def test_a_rate_that_is_taken_away_lets_those_who_wait_in_at_once() -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, limits=aioecho.Limits(accept_rate=0.01)) as server:
        assert await ask(server) == b"X\n"
        waiting = [asyncio.create_task(ask(server)) for _ in range(5)]
        await asyncio.sleep(0.1)  # time is the subject
        assert server.stats.accepted <= 1 + 1
        server.limits = aioecho.Limits()
        async with asyncio.timeout(20):
            assert await asyncio.gather(*waiting) == [b"X\n"] * 5


async def test_a_server_that_lets_in_slowly_stops_at_once() -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, limits=aioecho.Limits(accept_rate=0.01)) as server:
        assert await ask(server) == b"X\n"
        waiting = [asyncio.create_task(ask(server)) for _ in range(5)]
        await settle(lambda: server.stats.completed == 1)
        report = await server.shutdown(20)
        assert report.seconds < 5
        assert await asyncio.gather(*waiting) == [b"X\n"] * 5  # they were in the queue when the stop began


# pause() and resume()


async def test_paused_it_accepts_nobody_and_serves_who_is_there() -> None:
    async with aioecho.serve(Upper, "tcp://127.0.0.1:0", "tcp://127.0.0.1:0") as server:
        early = await Client.connect(server)
        assert await early.is_served()
        server.pause()
        server.pause()
        late = [await Client.connect(server) for _ in range(3)]  # into the kernel's queue
        host, _, port = server.names[1].removeprefix("tcp://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"other\n")
        asked = [asyncio.create_task(client.ask()) for client in late]
        assert await early.is_served()
        await early.close()  # there is room, which is no reason
        await settle(lambda: server.stats.completed == 1)
        server.limits = aioecho.Limits(max_connections=100)
        await settle()
        assert server.stats.accepted == 1
        assert server.is_serving()
        server.resume()
        server.resume()
        assert await asyncio.gather(*asked) == [b"X\n"] * 3
        assert await reader.readline() == b"OTHER\n"
        writer.close()
        for client in late:
            await client.close()
        check_identity(server)


# backlog


def queue_length(sock: socket.socket) -> int:
    """Return the backlog of a listening socket: tcpi_sacked in struct tcp_info."""
    return int(struct.unpack_from("I", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)[0])


async def test_the_backlog_is_the_kernels_and_changes_while_it_runs() -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, limits=aioecho.Limits(backlog=7)) as server:
        assert queue_length(server.sockets[0]) == 7
        server.limits = aioecho.Limits(backlog=70)
        assert queue_length(server.sockets[0]) == 70
        assert await ask(server) == b"X\n"


# Out of descriptors


@pytest.mark.timed
@pytest.mark.slow
@LOOPS
def test_out_of_descriptors_it_serves_on_keeps_quiet_and_resumes(loop: str) -> None:
    with Subject(loop, "upper", descriptors=64) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.endpoint)) for _ in range(120)]
        for number, sock in enumerate(clients):
            sock.sendall(b"client %d\n" % number)
        state = server.until(lambda state: state["accept_errors"])
        live = state["active"]
        assert 40 < live < 64
        # Clients are served in the order of the queue.
        for number, sock in enumerate(clients[:live]):
            assert read_line(sock) == b"CLIENT %d\n" % number
        before, logged, began = server.ask(), len(server.stderr().splitlines()), time.monotonic()
        time.sleep(2)  # time is the subject: as long as the figures are for
        after, seconds = server.ask(), time.monotonic() - began
        share = (after["cpu"] - before["cpu"]) / seconds
        assert len(server.stderr().splitlines()) - logged <= 2 * seconds
        for sock in clients[:live]:
            sock.sendall(b"again\n")
            assert read_line(sock) == b"AGAIN\n"
        # A connection that ends makes room for the next.
        longest = 0.0
        for following in range(live, live + 10):
            clients[following - live].close()
            freed = time.monotonic()
            assert read_line(clients[following]) == b"CLIENT %d\n" % following
            longest = max(longest, time.monotonic() - freed)
        for sock in clients[10 : live + 10]:
            sock.close()
        for number, sock in enumerate(clients[live + 10 :], live + 10):
            assert read_line(sock) == b"CLIENT %d\n" % number
            sock.close()
        state = server.until(lambda state: state["active"] == 0)
        assert state["completed"] == state["accepted"] == 120
        assert server.finish()["errors"] == []
        in_time(share, 0.05, "waiting for a descriptor")
        in_time(longest, 0.25)


@pytest.mark.timed
@LOOPS
def test_a_descriptor_that_comes_free_elsewhere_is_noticed(loop: str) -> None:
    with Subject(loop, "upper", descriptors=64) as server, contextlib.ExitStack() as stack:
        server.ask(["occupy", 40])
        clients = [stack.enter_context(connect(server.endpoint)) for _ in range(30)]
        for number, sock in enumerate(clients):
            sock.sendall(b"client %d\n" % number)
        live = server.until(lambda state: state["accept_errors"])["active"]
        for following in range(live, live + 5):
            server.ask("free")
            freed = time.monotonic()
            assert read_line(clients[following]) == b"CLIENT %d\n" % following
            in_time(time.monotonic() - freed, 0.25)


@LOOPS
def test_it_stops_in_order_when_there_is_no_descriptor(loop: str) -> None:
    with Subject(loop, "upper", descriptors=64) as server, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(server.endpoint)) for _ in range(80)]
        for sock in clients:
            sock.sendall(b"x\n")
        live = server.until(lambda state: state["accept_errors"])["active"]
        state = server.finish()
        assert state["completed"] == live
        for sock in clients[:live]:
            assert read_line(sock) == b"X\n"


@LOOPS
def test_shedding_cuts_off_who_has_waited_longest(loop: str) -> None:
    with (
        Subject(loop, "upper", descriptors=64, limits={"shed": "idle"}) as server,
        contextlib.ExitStack() as stack,
    ):
        busy, *idle = clients = [stack.enter_context(connect(server.endpoint)) for _ in range(20)]
        for sock in clients:
            sock.sendall(b"x\n")
            assert read_line(sock) == b"X\n"
        time.sleep(0.02)  # some ticks of the kernel's clock, by which it tells how long each has waited
        busy.sendall(b"busy\n")
        assert read_line(busy) == b"BUSY\n"
        for number in range(100):
            late = stack.enter_context(connect(server.endpoint))
            began = time.monotonic()
            late.sendall(b"late %d\n" % number)
            assert read_line(late) == b"LATE %d\n" % number
            in_time(time.monotonic() - began, 1)
            idle.append(late)
            busy.sendall(b"busy\n")
            assert read_line(busy) == b"BUSY\n"
        state = server.ask()
        shed = state["reasons"]["shed"]
        assert state["accepted"] == 120
        assert 120 - 64 < shed < 80
        assert state["active"] == 120 - shed
        ended = []
        for sock in idle:  # in the order of their waiting
            sock.setblocking(False)
            try:
                ended.append(sock.recv(1) == b"")
            except ConnectionResetError:
                ended.append(True)
            except BlockingIOError:
                ended.append(False)
        assert sum(ended) == shed  # and so not the busy one
        # The kernel's clock ticks some hundred times a second, and clients may come faster.
        assert all(ended[: shed - 20])
        assert not any(ended[shed + 20 :])
        assert server.finish()["errors"] == []
        assert len(server.records("WARNING")) < 20  # at a bounded rate


# Errors of accept(2)


NO_MEMORY = -1  # for Python itself


class Flaky(socket.socket):
    """A listening socket whose accepting fails with each of these errors before it succeeds."""

    errors: list[int]

    def _accept(self) -> Any:
        if self.errors:
            number = self.errors.pop(0)
            if number == NO_MEMORY:
                raise MemoryError
            raise OSError(number, os.strerror(number))
        return super()._accept()  # type: ignore[misc]


OF_ONE_CONNECTION = [
    errno.ECONNABORTED,
    errno.EPROTO,
    errno.EPERM,
    errno.ENETDOWN,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.EHOSTUNREACH,
    errno.EOPNOTSUPP,
    errno.ENETUNREACH,
    errno.ETIMEDOUT,
    errno.EINTR,
    errno.EAGAIN,
]
OF_RESOURCES = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, NO_MEMORY]


def flaky(errors: list[int]) -> Flaky:
    sock = Flaky(socket.AF_INET, socket.SOCK_STREAM)
    sock.errors = list(errors)
    sock.bind(ANYWHERE)
    return sock


@pytest.mark.parametrize("number", OF_ONE_CONNECTION, ids=errno.errorcode.get)
async def test_an_error_of_one_incoming_connection_stops_nothing(number: int, caplog: pytest.LogCaptureFixture) -> None:
    sock = flaky([])
    async with aioecho.TCPServer(None, Upper, sock=sock) as server:
        early = await Client.connect(server)
        assert await early.is_served()
        sock.errors = [number] * 100
        clients = [await Client.connect(server) for _ in range(5)]
        async with asyncio.timeout(20):
            assert all([await client.is_served() for client in clients])
        assert not sock.errors
        assert await early.is_served()
        assert server.stats.accept_errors == (0 if number in (errno.EINTR, errno.EAGAIN) else 100)
        for client in [early, *clients]:
            await client.close()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1


@pytest.mark.timed
@pytest.mark.parametrize("number", OF_RESOURCES, ids=lambda number: errno.errorcode.get(number, "MemoryError"))
async def test_out_of_resources_it_backs_off_and_comes_back(number: int, caplog: pytest.LogCaptureFixture) -> None:
    sock = flaky([])
    async with aioecho.TCPServer(None, Upper, sock=sock) as server:
        early = await Client.connect(server)
        assert await early.is_served()
        sock.errors = [number] * 5
        late = await Client.connect(server)
        began = time.monotonic()
        asked = asyncio.create_task(late.ask())
        await settle(lambda: server.stats.accept_errors)
        assert await early.is_served()
        assert await asked == b"X\n"
        took = time.monotonic() - began
        assert took > 0.3
        assert server.stats.accept_errors == 5
        for client in (early, late):
            await client.close()
        check_identity(server)
    assert 1 <= len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 2 * 2
    in_time(took, 5 * 0.25)


# max_buffer and max_write_buffer


class Heedless(aioecho.StreamRequestHandler):
    """Writes without draining, with `write` or `writelines` as its line says."""

    async def handle(self) -> None:
        how = (await self.reader.readline()).strip()
        while how:
            if how == b"writelines":
                self.writer.writelines([bytes(5_000), bytes(5_000)])
            else:
                self.writer.write(bytes(10_000))
            size = self.writer.transport.get_write_buffer_size()
            self.server.most = max(self.server.most, size)  # type: ignore[attr-defined]
            await asyncio.sleep(0)


@pytest.mark.parametrize("how", [b"write", b"writelines"])
async def test_who_piles_up_what_it_writes_is_cut_off_and_reported(
    how: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    limits, timeouts = aioecho.Limits(max_write_buffer=1_000_000), aioecho.Timeouts(write=2)
    async with aioecho.TCPServer(ANYWHERE, Heedless, limits=limits, timeouts=timeouts) as server:
        server.most = 0  # type: ignore[attr-defined]
        other = await Client.connect(server)
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(server.server_address)
            sock.sendall(how + b"\n")
            await settle(lambda: server.stats.reasons["write buffer"])
        assert server.stats.failed + server.stats.cancelled == 1
        assert server.stats.active == 1  # the other one
        assert 1_000_000 < server.most <= 1_010_000  # type: ignore[attr-defined]
        records = [r for r in caplog.records if r.levelno == logging.WARNING and "write buffer" in r.getMessage()]
        assert len(records) == 1
        await other.close()
        await settle(lambda: not server.connections)
        check_identity(server)


async def test_a_handler_that_drains_may_write_more_than_the_write_buffer_at_once() -> None:
    class Large(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            for _ in range(3):
                await self.send(b"x" * 5_000_000)

    limits = aioecho.Limits(max_write_buffer=1_000_000)
    async with aioecho.TCPServer(ANYWHERE, Large, limits=limits) as server:
        assert len(await ask(server)) == 15_000_000
        await settle(lambda: server.stats.completed == 1)


async def test_no_bound_on_the_write_buffer_is_none() -> None:
    class Piling(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            for _ in range(40):
                self.writer.write(b"x" * 1_000_000)

    async with aioecho.TCPServer(ANYWHERE, Piling, limits=aioecho.Limits(max_write_buffer=None)) as server:
        assert len(await ask(server)) == 40_000_000


async def test_the_peer_that_floods_is_read_no_further_than_the_limit() -> None:
    gate = asyncio.Event()

    class Busy(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.readexactly(1)
            await gate.wait()
            self.server.buffered = len(self.reader._buffer)  # type: ignore[attr-defined]
            while await self.reader.read(2**16):
                pass

    async with aioecho.TCPServer(ANYWHERE, Busy, limits=aioecho.Limits(max_buffer=50_000)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"x" * 20_000_000)
        sizes = [-1]
        while sizes[-1] != (size := writer.transport.get_write_buffer_size()):  # until nothing moves any more
            sizes.append(size)
            await asyncio.sleep(0.05)
        assert size > 0
        gate.set()
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        # Twice the limit, and one read of the loop beyond: uvloop's are of 256,000 bytes.
        assert server.buffered < 100_000 + 2**18  # type: ignore[attr-defined]


async def test_a_line_longer_than_the_limit_is_the_handlers_to_refuse() -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, limits=aioecho.Limits(max_buffer=1_000)) as server:
        assert await ask(server, b"x" * 900 + b"\n") == b"X" * 900 + b"\n"
        assert await ask(server, b"x" * 5_000 + b"\n") == b""
        await settle(lambda: server.stats.failed == 1)


async def test_echo_holds_under_all_limits_together() -> None:
    limits = aioecho.Limits(
        max_connections=5, max_per_host=5, accept_rate=5_000, backlog=64, max_buffer=2_000, max_write_buffer=100_000
    )
    async with aioecho.TCPServer(ANYWHERE, Echo, limits=limits) as server:
        data = bytes(range(256)) * 1000
        assert await asyncio.gather(*(ask(server, data) for _ in range(50))) == [data] * 50
        await settle(lambda: not server.connections)
        assert server.stats.completed == server.stats.accepted == 50
        check_identity(server)
