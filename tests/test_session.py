"""Sessions: one handler for all the datagrams of a peer."""

import asyncio
import contextlib
import contextvars
import functools
import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import settle
from test_datagram import Peer, check, peer, serving
from timing import within

import aioecho
from aioecho.datagrams.sessions import Session

__all__ = ["peer"]

pytestmark = pytest.mark.usefixtures("sessions_end_soon")


def handler(handle: Callable[[Any], Any], **methods: Any) -> type[aioecho.DatagramSessionHandler]:
    return type("Handler", (aioecho.DatagramSessionHandler,), {"handle": handle, **methods})


class Counting(aioecho.DatagramSessionHandler):
    """Answers with how many datagrams came by then, and what came."""

    async def handle(self) -> None:
        count = 0
        async for data in self.datagrams:
            count += 1
            await self.reply(b"%d %b" % (count, data))
            if data == b"end":
                break


def gated(gate: asyncio.Event, seen: dict[Any, list[bytes]]) -> type[aioecho.DatagramSessionHandler]:
    """Return a handler that takes one datagram, waits for the gate, and takes the rest."""

    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            seen[self.client_address].append(data)
            await gate.wait()

    return handler(handle)


async def test_one_handler_serves_one_peer_and_peers_do_not_mix(peer: Peer) -> None:
    with Peer(address=("127.0.0.1", 0)) as other:
        async with serving(Counting) as (server, address):
            assert await peer.ask(b"a", address) == b"1 a"
            assert await peer.ask(b"b", address) == b"2 b"
            assert await other.ask(b"c", address) == b"1 c"
            assert await peer.ask(b"", address) == b"3 "
            assert {each.client_address for each in server.connections} == {
                peer.sock.getsockname(),
                other.sock.getsockname(),
            }
            assert (server.stats.accepted, server.stats.active, server.stats.handled) == (2, 2, 4)
            check(server)
    assert server.stats.completed == 2


async def test_order_is_kept_however_the_handler_waits(peer: Peer) -> None:
    seen = []

    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            number = int(data)
            if number % 3 == 1:
                await asyncio.sleep(0)
            elif number % 50 == 2:
                await asyncio.sleep(0.001)
            elif number % 7 == 3:
                await asyncio.create_task(asyncio.sleep(0))
            seen.append(number)

    limits = aioecho.Limits(max_session_queue=2000, receive_buffer=2**20)
    async with serving(handler(handle), limits=limits) as (server, address):
        for number in range(1000):
            peer.send(b"%d" % number, address)
            if number % 100 == 0:
                await asyncio.sleep(0)
        await settle(lambda: len(seen) + server.stats.kernel_drops == 1000)
        assert seen == sorted(seen)
        assert len(seen) > 200


async def test_sessions_run_side_by_side_and_a_slow_one_fills_only_its_own_queue(peer: Peer) -> None:
    gate = asyncio.Event()
    seen: dict[Any, list[bytes]] = defaultdict(list)
    limits = aioecho.Limits(max_session_queue=5)

    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            seen[self.client_address].append(data)
            if data == b"0":
                await gate.wait()
            else:
                await self.reply(data)

    with Peer(address=("127.0.0.1", 0)) as other:
        async with serving(handler(handle), limits=limits) as (server, address):
            peer.send(b"0", address)
            await settle(lambda: seen)
            for number in range(1, 101):
                peer.send(b"%d" % number, address)
            assert await other.ask(b"x", address) == b"x"
            await settle(lambda: server.stats.received == 102)
            assert server.stats.drops == {"session queue full": 95}
            assert server.stats.queued == 5
            check(server)
            gate.set()
            await settle(lambda: server.stats.queued == 0)
    assert seen[peer.sock.getsockname() if peer.sock.fileno() != -1 else None] == [b"%d" % n for n in range(6)]


async def test_a_session_queues_no_more_bytes_than_the_limit(peer: Peer) -> None:
    gate = asyncio.Event()
    seen: dict[Any, list[bytes]] = defaultdict(list)
    async with serving(gated(gate, seen), limits=aioecho.Limits(max_buffer=1000)) as (server, address):
        peer.send(b"first", address)
        await settle(lambda: seen)
        for size in (5000, 1, 1):  # a single one always fits, or it could never be had
            peer.send(b"x" * size, address)
        await settle(lambda: server.stats.received == 4)
        assert server.stats.drops == {"session queue full": 2}
        gate.set()
    assert [len(data) for data in seen[peer.sock.getsockname()]] == [5, 5000]


async def test_a_session_ends_when_its_handler_does_and_another_begins(peer: Peer) -> None:
    async with serving(Counting) as (server, address):
        assert await peer.ask(b"a", address) == b"1 a"
        assert await peer.ask(b"end", address) == b"2 end"
        assert await peer.ask(b"b", address) == b"1 b"
        assert await peer.ask(b"end", address) == b"2 end"
        await settle(lambda: server.stats.completed == 2)


async def test_what_a_handler_leaves_unread_is_dropped_and_what_comes_while_it_finishes_is_for_the_next(
    peer: Peer,
) -> None:
    gate, finishing, finished = asyncio.Event(), asyncio.Event(), asyncio.Event()
    seen: list[list[bytes]] = []

    class Reluctant(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            seen.append([])
            async for data in self.datagrams:
                seen[-1].append(data)
                await gate.wait()
                if data == b"last":
                    return

        async def finish(self) -> None:
            finishing.set()
            await finished.wait()

    async with serving(Reluctant) as (server, address):
        for data in (b"last", b"left", b"left"):
            peer.send(data, address)
        await settle(lambda: (server.stats.received, server.stats.queued) == (3, 2))
        gate.set()
        await finishing.wait()
        await settle(lambda: server.stats.received == 3)
        finished.set()
        await settle(lambda: server.stats.completed == 1)
        assert server.stats.drops == {"session ended": 2}
        for data in (b"a", b"b"):
            peer.send(data, address)
        await settle(lambda: server.stats.handled == 3)
        assert seen == [[b"last"], [b"a", b"b"]]


async def test_a_task_that_outlives_its_handler_meets_the_end(peer: Peer) -> None:
    seen: list[Any] = []
    tasks = set()

    async def read(datagrams: Any) -> None:
        async for data in datagrams:
            seen.append(data)
        seen.append("end")

    async def handle(self: Any) -> None:
        tasks.add(asyncio.create_task(read(self.datagrams)))
        while not seen:
            await asyncio.sleep(0.001)

    async with serving(handler(handle)) as (server, address):
        peer.send(b"1", address)
        await settle(lambda: server.stats.completed == 1)
        await settle(lambda: len(seen) == 2)
    assert seen == [b"1", "end"]


async def test_datagrams_between_a_sessions_end_and_the_next_are_kept_in_order(peer: Peer) -> None:
    ending, ended = asyncio.Event(), asyncio.Event()
    seen: list[list[bytes]] = []

    class Slow(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            seen.append([await anext(self.datagrams)])
            if len(seen) > 1:
                async for data in self.datagrams:
                    seen[-1].append(data)

    class Server(aioecho.UDPServer):
        def task_ended(self, session: Any, task: Any) -> None:
            # As if the loop were busy between the end of the handler and that of its task.
            if ended.is_set():
                super().task_ended(session, task)
            else:
                ending.set()
                asyncio.get_running_loop().create_task(self.account_late(session, task))

        async def account_late(self, session: Any, task: Any) -> None:
            await ended.wait()
            super().task_ended(session, task)

    async with Server(("127.0.0.1", 0), Slow) as server:
        peer.send(b"1", server.server_address)
        await ending.wait()
        for data in (b"2", b"3", b"4"):
            peer.send(data, server.server_address)
        await settle(lambda: server.stats.received == 4)
        ended.set()
        await settle(lambda: server.stats.handled == 4)
        assert seen == [[b"1"], [b"2", b"3", b"4"]]
        check(server)


async def test_a_handler_that_shuts_its_server_down_does_not_wait_for_itself(peer: Peer) -> None:
    class Quit(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            await anext(self.datagrams)
            await self.server.shutdown(20)
            await self.reply(b"good bye")

    async with aioecho.UDPServer(("127.0.0.1", 0), Quit) as server:
        assert await peer.ask(b"quit", server.server_address) == b"good bye"
        report = await server.shutdown()
        assert (server.stats.completed, report.cancelled) == (1, 0)
        assert report.seconds < 5
        check(server)


async def test_a_silent_peers_session_ends_and_one_that_speaks_stays(peer: Peer) -> None:
    ended = asyncio.Event()

    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            await self.reply(data)
        ended.set()

    async with serving(handler(handle), timeouts=aioecho.Timeouts(session=0.2)) as (server, address):
        with Peer(address=("127.0.0.1", 0)) as talker:
            peer.send(b"hello", address)
            while not ended.is_set():
                with within(0.2):
                    assert await talker.ask(b"x", address) == b"x"
                    await asyncio.sleep(0.02)
            await settle(lambda: server.stats.completed == 1)
            assert [each.client_address for each in server.connections] == [talker.sock.getsockname()]
            await peer.receive()
            assert await peer.ask(b"again", address) == b"again"


async def test_a_handler_that_was_told_of_the_end_and_works_on_keeps_nobody_waiting(peer: Peer) -> None:
    gate = asyncio.Event()
    seen: list[list[bytes]] = []

    async def handle(self: Any) -> None:
        mine: list[bytes] = []
        seen.append(mine)
        async for data in self.datagrams:
            mine.append(data)
        await gate.wait()

    async with serving(handler(handle), timeouts=aioecho.Timeouts(session=0.05)) as (server, address):
        peer.send(b"1", address)
        await settle(lambda: server.stats.handled == 1)
        [session] = server.connections
        await settle(lambda: session.is_over)
        peer.send(b"2", address)
        peer.send(b"3", address)
        await settle(lambda: server.stats.queued == 2)
        gate.set()
        await settle(lambda: server.stats.handled == 3)
        assert seen == [[b"1"], [b"2", b"3"]]


@pytest.mark.parametrize("is_partial", [False, True])
async def test_a_handler_class_has_its_own_timeouts(is_partial: bool, peer: Peer) -> None:
    class Hasty(Counting):
        timeouts = aioecho.Timeouts(session=0.05)

    async with serving(functools.partial(Hasty) if is_partial else Hasty) as (server, address):
        assert await peer.ask(b"a", address) == b"1 a"
        await settle(lambda: server.stats.completed == 1)
        assert await peer.ask(b"b", address) == b"1 b"


async def test_at_the_cap_new_peers_are_dropped_and_known_ones_served(peer: Peer) -> None:
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(Peer(address=("127.0.0.1", 0))) for _ in range(5)]
        async with serving(Counting, limits=aioecho.Limits(max_sessions=2)) as (server, address):
            assert await peer.ask(b"", address) == b"1 "
            assert await others[0].ask(b"", address) == b"1 "
            for other in others[1:]:
                other.send(b"", address)
            assert await peer.ask(b"", address) == b"2 "
            assert server.stats.drops == {"too many sessions": 4}
            assert await others[0].ask(b"end", address) == b"2 end"
            await settle(lambda: server.stats.active == 1)
            assert await others[1].ask(b"", address) == b"1 "


def peers_of(stack: contextlib.ExitStack, host: str, count: int) -> list[Peer]:
    return [stack.enter_context(Peer(address=(host, 0))) for _ in range(count)]


async def test_a_host_that_has_all_places_yields_to_others_until_they_have_as_many() -> None:
    most = 0

    class Watched(Counting):
        async def setup(self) -> None:
            nonlocal most
            most = max(most, len(self.server.connections))

    with contextlib.ExitStack() as stack:
        many, others = peers_of(stack, "127.0.0.1", 10), peers_of(stack, "127.0.0.2", 5)
        async with serving(Watched, limits=aioecho.Limits(max_sessions=6)) as (server, address):
            for one in many[:6]:
                assert await one.ask(b"", address) == b"1 "
            assert await many[0].ask(b"", address) == b"2 "  # so the second one is quiet for longest
            for one in many[6:]:
                one.send(b"", address)
            await settle(lambda: server.stats.drops == {"too many sessions": 4})
            for one in others[:3]:
                assert await one.ask(b"", address) == b"1 "
            others[3].send(b"", address)
            await settle(lambda: server.stats.drops == {"too many sessions": 5})
            assert {each.client_address for each in server.connections} == {
                each.sock.getsockname() for each in (many[0], *many[4:6], *others[:3])
            }
            assert await many[0].ask(b"", address) == b"3 "
            assert (server.stats.completed, most) == (3, 6)
            check(server)


async def test_what_a_newcomer_sends_until_it_has_its_place_is_kept_for_it() -> None:
    gate = asyncio.Event()
    seen: dict[Any, list[bytes]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        many, [other] = peers_of(stack, "127.0.0.1", 2), peers_of(stack, "127.0.0.2", 1)
        limits = aioecho.Limits(max_sessions=2, max_session_queue=3)
        async with serving(gated(gate, seen), limits=limits) as (server, address):
            for one in many:
                one.send(b"x", address)
            await settle(lambda: len(seen) == 2)
            for data in (b"1", b"2", b"3", b"4"):  # none of the two is quiet, so the older one is told to end
                other.send(data, address)
            await settle(lambda: server.stats.received == 6)
            many[0].send(b"y", address)
            await settle(lambda: server.stats.received == 7)
            assert server.stats.drops == {"session queue full": 1, "too many sessions": 1}
            assert (server.stats.active, server.stats.queued) == (2, 3)
            check(server)
            gate.set()
            await settle(lambda: server.stats.queued == 0)
            assert seen[other.sock.getsockname()] == [b"1", b"2", b"3"]
            assert {each.client_address for each in server.connections} == {
                other.sock.getsockname(),
                many[1].sock.getsockname(),
            }


async def test_a_newcomer_that_waits_for_a_place_when_the_grace_is_over_is_dropped() -> None:
    gate = asyncio.Event()
    seen: dict[Any, list[bytes]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        many, [other] = peers_of(stack, "127.0.0.1", 2), peers_of(stack, "127.0.0.2", 1)
        async with serving(gated(gate, seen), limits=aioecho.Limits(max_sessions=2)) as (server, address):
            for one in many:
                one.send(b"x", address)
            await settle(lambda: len(seen) == 2)
            other.send(b"1", address)
            await settle(lambda: server.stats.queued == 1)
            report = await server.shutdown(0)
        assert (report.cancelled, report.aborted) == (2, 0)
        assert server.stats.drops == {"stopped": 1}


# It was dropped as "stopped", as if the grace were over.
@pytest.mark.parametrize("what", ["newcomer", "successor"])
async def test_a_session_that_is_aborted_during_a_drain_makes_room_for_what_waits_for_its_end(what: str) -> None:
    begun: list[Any] = []
    gate = asyncio.Event()

    async def handle(self: Any) -> None:
        await anext(self.datagrams)
        begun.append(self.client_address)
        await gate.wait()

    with contextlib.ExitStack() as stack:
        [one, two], [other] = peers_of(stack, "127.0.0.1", 2), peers_of(stack, "127.0.0.2", 1)
        async with serving(handler(handle), limits=aioecho.Limits(max_sessions=2)) as (server, address):
            one.send(b"x", address)
            two.send(b"x", address)
            await settle(lambda: len(begun) == 2)
            later = other if what == "newcomer" else one
            later.send(b"1", address)
            await settle(lambda: server.stats.received == 3)
            stop = asyncio.create_task(server.shutdown(10))
            await settle(lambda: not server.is_serving())
            sessions = list(server.connections)
            if what == "successor":
                for session in sessions:
                    session.expire()
                one.send(b"2", address)
                await settle(lambda: server.stats.received == 4)
            for session in sessions:
                session.kick("by a test")
            await settle(lambda: len(begun) == 3)
            gate.set()
            report = await stop
        assert begun[2] == later.sock.getsockname()
        assert report.completed == 1
        # What a session that was kicked had not read is not charged to the stop.
        assert server.stats.drops == ({} if what == "newcomer" else {"session ended": 1})


async def test_hundreds_of_ports_of_one_host_keep_no_newcomer_out(peer: Peer) -> None:
    with contextlib.ExitStack() as stack:
        many = peers_of(stack, "127.0.0.2", 400)
        async with serving(Counting, limits=aioecho.Limits(max_sessions=100)) as (server, address):
            for each in many:
                each.send(b"", address)
                await asyncio.sleep(0)
            await settle(lambda: server.stats.received == 400)
            assert server.stats.active == 100
            for number in range(1, 4):
                for each in many:
                    each.send(b"", address)
                    await asyncio.sleep(0)
                assert await peer.ask(b"", address) == b"%d " % number
                await settle(lambda: server.stats.received == 400 + number * 401)  # noqa: B023
                assert server.stats.active == 100


async def test_max_per_host_holds_for_sessions() -> None:
    with contextlib.ExitStack() as stack:
        many, others = peers_of(stack, "127.0.0.1", 4), peers_of(stack, "127.0.0.2", 2)
        async with serving(Counting, limits=aioecho.Limits(max_per_host=2)) as (server, address):
            for each in many:
                each.send(b"", address)
            for each in others:
                assert await each.ask(b"", address) == b"1 "
            assert server.stats.drops == {"per host": 2}
            assert await many[0].ask(b"end", address) == b"1 "
            assert (await many[0].receive())[0] == b"2 end"
            await settle(lambda: server.stats.active == 3)
            assert await many[2].ask(b"", address) == b"1 "
            server.limits = aioecho.Limits(max_per_host=3)
            assert await many[3].ask(b"", address) == b"1 "
            check(server)


async def test_max_connections_holds_for_sessions(peer: Peer) -> None:
    with Peer(address=("127.0.0.1", 0)) as other:
        async with serving(Counting, limits=aioecho.Limits(max_connections=1)) as (server, address):
            assert await peer.ask(b"", address) == b"1 "
            other.send(b"", address)
            await settle(lambda: server.stats.drops == {"too many sessions": 1})
            server.limits = aioecho.Limits(max_connections=2)
            assert await other.ask(b"", address) == b"1 "


async def test_accept_rate_holds_for_sessions_that_begin() -> None:
    with contextlib.ExitStack() as stack:
        *many, late = peers_of(stack, "127.0.0.1", 21)
        async with serving(Counting, limits=aioecho.Limits(accept_rate=5)) as (server, address):
            began = time.monotonic()
            for each in many:
                each.send(b"", address)
            await settle(lambda: server.stats.received == 20)
            seconds = time.monotonic() - began
            assert 5 <= server.stats.active <= 6 + 5 * seconds
            assert server.stats.drops == {"accept rate": 20 - server.stats.active}
            assert await many[0].ask(b"", address) == b"1 "
            assert (await many[0].receive())[0] == b"2 "  # a known peer has no rate
            before = server.stats.active
            while server.stats.active == before:
                late.send(b"", address)
                await asyncio.sleep(0.02)
            check(server)


@pytest.mark.parametrize("swallows", [False, True])
async def test_a_session_whose_handler_goes_on_after_its_datagrams_is_cancelled(
    swallows: bool, peer: Peer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioecho.datagrams.run.SWALLOWED_FOR", 0.05)

    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            await self.reply(data)
        while True:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                if not swallows:
                    raise

    timeouts = aioecho.Timeouts(session=0.05, datagram_handler=0.2)
    async with serving(handler(handle), timeouts=timeouts) as (server, address):
        for _ in range(2):
            assert await peer.ask(b"x", address) == b"x"
            await settle(lambda: not server.connections)
        assert server.stats.reasons == {"datagram_handler": 2}
        assert server.stats.cancelled == 2
    [first, *_] = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert first.startswith("cancelled <Session with 127.0.0.1:")


async def test_a_session_that_hears_its_peer_may_run_longer_than_a_datagrams_handler(peer: Peer) -> None:
    async with serving(Counting, timeouts=aioecho.Timeouts(datagram_handler=0.05)) as (server, address):
        began = time.monotonic()
        count = 0
        while time.monotonic() < began + 0.3:
            count += 1
            assert await peer.ask(b"", address) == b"%d " % count
            await asyncio.sleep(0.01)
        assert server.stats.active == 1


@pytest.mark.parametrize("how", ["closed", "removed"])
async def test_the_session_of_a_unix_peer_that_is_gone_ends(how: str, tmp_path: Path) -> None:
    ended = asyncio.Event()

    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            await self.reply(data)
        ended.set()

    async with aioecho.UnixDatagramServer(tmp_path / "server", handler(handle)) as server:
        to = os.fspath(tmp_path / "server")
        with Peer(socket.AF_UNIX, str(tmp_path / "peer")) as peer:
            assert await peer.ask(b"1", to) == b"1"
            peer.send(b"2", to)
        if how == "removed":
            (tmp_path / "peer").unlink()
        async with asyncio.timeout(20):  # of the 60 seconds for which a peer may be silent
            await ended.wait()
        await settle(lambda: server.stats.completed == 1)
        assert server.stats.send_errors >= 1
        if how == "closed":
            (tmp_path / "peer").unlink()
        with Peer(socket.AF_UNIX, str(tmp_path / "peer")) as peer:
            assert await peer.ask(b"4", to) == b"4"
        check(server)


@pytest.mark.slow
@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.soak)])
async def test_a_flood_of_spoofed_peers_is_bounded_and_known_peers_are_served(peer: Peer, count: int) -> None:
    most = 0
    async with aioecho.serve(
        Counting, "udp://127.0.0.1:0", limits=aioecho.Limits(max_sessions=500), timeouts=aioecho.Timeouts(session=2)
    ) as server:
        address = server.server_address
        sent = answered = 0
        assert await peer.ask(b"", address) == b"1 "
        heard = time.monotonic()
        for number in range(count):
            host = f"127.{number % 200 + 1}.{number // 200 % 200}.{number // 40_000 + 1}"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((host, 0))
                sock.sendto(b"spoofed", address)
            if number % 100 == 0:
                await settle(lambda: server.stats.received + server.stats.kernel_drops == number + sent + 2)  # noqa: B023
                most = max(most, len(server.connections))
                with within(2 - (time.monotonic() - heard)):  # else it is a new one
                    assert await peer.ask(b"", address) == b"%d " % (sent + 2)
                heard = time.monotonic()
                sent += 1
        check(server)
        assert most == 500
        assert server.stats.drops["too many sessions"] > 0
        assert server.stats.kernel_drops == answered == 0


async def test_a_stop_ends_the_datagrams_after_those_that_have_come(peer: Peer) -> None:
    gate = asyncio.Event()
    seen: dict[Any, list[bytes]] = defaultdict(list)
    with Peer(address=("127.0.0.1", 0)) as idle, Peer(address=("127.0.0.1", 0)) as late:
        async with serving(gated(gate, seen)) as (server, address):
            for data in (b"1", b"2", b"3"):
                peer.send(data, address)
            idle.send(b"x", address)
            await settle(lambda: server.stats.received == 4)
            late.send(b"just in time", address)
            stopping = asyncio.create_task(server.shutdown(10))
            await settle(lambda: server.stats.active == 3)
            gate.set()
            report = await stopping
        assert report.completed == 3
        assert seen[peer.sock.getsockname()] == [b"1", b"2", b"3"]
        assert seen[late.sock.getsockname()] == [b"just in time"]
        assert server.stats.handled == 5


async def test_a_stop_cancels_those_that_do_not_end(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            while data == b"stubborn":
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(100)
            await asyncio.sleep(100)

    with Peer(address=("127.0.0.1", 0)) as stubborn:
        async with serving(handler(handle)) as (server, address):
            stubborn.send(b"stubborn", address)
            for data in (b"1", b"2"):
                peer.send(data, address)
            await settle(lambda: server.stats.handled == 2)
            await settle(lambda: server.stats.queued == 1)
            report = await server.shutdown(0)
    assert (report.completed, report.cancelled, report.aborted) == (0, 1, 1)
    assert server.stats.drops == {"stopped": 1}
    assert "was cut off: <Session with 127.0.0.1:" in caplog.text


async def test_a_session_that_is_cut_off_before_it_began_was_cancelled(peer: Peer) -> None:
    async with serving(Counting) as (server, address):
        peer.send(b"1", address)
        report = await server.shutdown(0)  # the loop has not turned since
        assert (report.completed, report.cancelled, report.aborted) == (0, 1, 0)
        assert (server.stats.completed, server.stats.cancelled) == (0, 1)
        assert server.stats.drops == {"stopped": 1}


@pytest.mark.parametrize("where", ["verify_request", "__init__", "setup", "handle", "finish"])
async def test_a_method_that_raises_is_reported_and_stops_nothing(
    where: str, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: Any) -> None:
        raise ValueError(f"in {where}")

    async def fails_later(self: Any) -> None:
        fails()

    async def handle(self: Any) -> None:
        await anext(self.datagrams)

    methods = {"handle": handle}
    if where != "verify_request":
        methods[where] = fails if where == "__init__" else fails_later
    async with serving(handler(methods.pop("handle"), **methods)) as (server, address):
        if where == "verify_request":
            server.verify_request = fails
        peer.send(b"", address)
        await settle(lambda: server.stats.failed == 1)
        if where == "verify_request":
            del server.verify_request
        server.RequestHandlerClass = Counting
        assert await peer.ask(b"x", address) == b"1 x"
    [record] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert str(record.exc_info[1]) == f"in {where}"


async def test_a_peer_can_be_refused(peer: Peer) -> None:
    class Server(aioecho.UDPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            return False

    async with Server(("127.0.0.1", 0), Counting) as server:
        for _ in range(3):
            peer.send(b"", server.server_address)
        await settle(lambda: server.stats.received == 3 and not server.connections)
        assert server.stats.rejected >= 1
        assert server.stats.drops == {"refused": 3}
        check(server)


async def test_a_wait_can_time_out_and_loses_nothing(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        await self.reply(await anext(self.datagrams))
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await anext(self.datagrams)
        await self.reply(b"speak")
        reading = asyncio.create_task(anext(self.datagrams))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="another coroutine is already waiting"):
            await anext(self.datagrams)
        await self.reply(await reading)
        await self.reply(await asyncio.wait_for(anext(self.datagrams), 10))

    async with serving(handler(handle)) as (server, address):
        assert await peer.ask(b"1", address) == b"1"
        assert (await peer.receive())[0] == b"speak"
        assert await peer.ask(b"2", address) == b"2"
        assert await peer.ask(b"3", address) == b"3"
        await settle(lambda: server.stats.completed == 1)


async def test_a_datagram_that_meets_a_cancellation_is_not_lost(peer: Peer) -> None:
    seen = []

    async def handle(self: Any) -> None:
        task = asyncio.current_task()
        while len(seen) < 3:
            try:
                seen.append(await anext(self.datagrams))
                tasks.append(task)
            except asyncio.CancelledError:
                task.uncancel()

    tasks: list[Any] = []
    async with serving(handler(handle)) as (server, address):
        peer.send(b"1", address)
        await settle(lambda: seen)
        peer.send(b"2", address)
        tasks[0].cancel()  # in the same turn
        await settle(lambda: len(seen) == 2)
        tasks[0].cancel()
        peer.send(b"3", address)
        await settle(lambda: server.stats.completed == 1)
    assert seen == [b"1", b"2", b"3"]


async def test_a_session_has_a_context_and_a_task_of_its_own(peer: Peer) -> None:
    variable = contextvars.ContextVar("variable", default=0)

    async def handle(self: Any) -> None:
        task = asyncio.current_task()
        async for _ in self.datagrams:
            variable.set(variable.get() + 1)
            assert asyncio.current_task() is task
            await self.reply(b"%d" % variable.get())

    with Peer(address=("127.0.0.1", 0)) as other:
        async with serving(handler(handle)) as (server, address):
            assert [await peer.ask(b"", address) for _ in range(3)] == [b"1", b"2", b"3"]
            assert await other.ask(b"", address) == b"1"
            assert server.stats.failed == 0


async def test_whoever_makes_handlers_says_whether_they_are_for_sessions(peer: Peer) -> None:
    async with serving(functools.partial(Counting)) as (_, address):
        assert await peer.ask(b"x", address) == b"1 x"
    async with serving(lambda *arguments: Counting(*arguments), sessions=True) as (_, address):
        assert await peer.ask(b"x", address) == b"1 x"


async def test_a_peer_has_a_session_with_each_address_that_it_asks(peer: Peer) -> None:
    async with aioecho.serve(Counting, "udp://*:0") as server:
        port = server.server_address[1]
        with Peer() as client:
            for host, expected in (("127.0.0.1", b"1 "), ("127.0.0.2", b"1 "), ("127.0.0.1", b"2 ")):
                client.send(b"", (host, port))
                assert await client.receive() == (expected, (host, port))


async def test_sessions_over_unix_sockets(tmp_path: Path) -> None:
    async with aioecho.UnixDatagramServer(tmp_path / "server", Counting) as server:
        with Peer(socket.AF_UNIX, str(tmp_path / "a")) as a, Peer(socket.AF_UNIX, str(tmp_path / "b")) as b:
            to = os.fspath(tmp_path / "server")
            assert [await a.ask(b"", to), await b.ask(b"", to), await a.ask(b"", to)] == [b"1 ", b"1 ", b"2 "]
        check(server)


async def test_a_session_that_is_often_in_an_unbroken_block_has_one_timer_at_a_stop(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle(self: Any) -> None:
        async for data in self.datagrams:
            for _ in range(1000):
                async with self.unbroken():
                    pass
            await self.reply(data)

    asked = 0
    drain = Session.drain

    def count(self: Session) -> None:
        nonlocal asked
        asked += 1
        drain(self)

    monkeypatch.setattr(Session, "drain", count)
    monkeypatch.setattr("aioecho.datagrams.sessions.QUIET", 0.5)
    async with serving(handler(handle)) as (server, address):
        assert await peer.ask(b"x", address) == b"x"
        stop = asyncio.create_task(server.shutdown(10))
        await settle(lambda: not server.is_serving())
        assert await peer.ask(b"x", address) == b"x"
        assert (await stop).completed == 1
    assert 1000 <= asked < 1010


# Tasks beside a handler


async def test_the_tasks_of_a_session_end_with_it_before_finish(peer: Peer) -> None:
    events: list[str] = []

    class Beating(aioecho.DatagramSessionHandler):
        async def setup(self) -> None:
            self.beating = self.tasks.create_task(self.beat())

        async def handle(self) -> None:
            assert await anext(self.datagrams) == b"hello"
            await anext(self.datagrams)
            events.append("handle ended")

        async def beat(self) -> None:
            await self.reply(b"beat")
            try:
                await asyncio.Event().wait()
            finally:
                events.append("task ended")

        async def finish(self) -> None:
            assert self.beating.cancelled()
            events.append("finish")
            coroutine = self.beat()
            with pytest.raises(RuntimeError, match="the session ends"):
                self.tasks.create_task(coroutine)
            coroutine.close()

    async with serving(Beating) as (server, address):
        assert await peer.ask(b"hello", address) == b"beat"
        peer.send(b"bye", address)
        await settle(lambda: not server.connections)
        assert events == ["handle ended", "task ended", "finish"]
        assert not server.beside
        assert server.stats.reasons == {"finished": 1}


@pytest.mark.parametrize("waits_for", ["datagrams", "event"])
async def test_what_a_task_raises_ends_the_session_and_is_the_handlers_error(
    waits_for: str, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    fail = asyncio.Event()

    async def failing() -> None:
        await fail.wait()
        raise ValueError("no more")

    async def handle(self: Any) -> None:
        self.tasks.create_task(failing())
        await self.reply(await anext(self.datagrams))
        await (asyncio.Event().wait() if waits_for == "event" else anext(self.datagrams))

    async with serving(handler(handle)) as (server, address):
        assert await peer.ask(b"hello", address) == b"hello"
        fail.set()
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"error": 1}
        assert await peer.ask(b"again", address) == b"again"  # the next session
    assert caplog.text.count("ValueError: no more") == 1


async def test_tasks_of_a_session_are_cancelled_at_the_end_of_the_grace(peer: Peer) -> None:
    ended = []

    async def beside() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def handle(self: Any) -> None:
        self.tasks.create_task(beside())
        await self.reply(await anext(self.datagrams))
        await asyncio.Event().wait()

    async with serving(handler(handle), grace=0.05) as (server, address):
        assert await peer.ask(b"hello", address) == b"hello"
        report = await server.shutdown()
    assert (report.cancelled, ended) == (1, [True])


# They were dropped when the session had ended.
@pytest.mark.parametrize("what", ["tasks", "finish"])
async def test_what_comes_while_a_sessions_tasks_and_finish_end_is_for_the_next(what: str, peer: Peer) -> None:
    ending, may_end = asyncio.Event(), asyncio.Event()
    seen: list[list[bytes]] = []

    async def end() -> None:
        ending.set()
        await may_end.wait()

    async def beside() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            if what == "tasks":
                await end()

    class Accompanied(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            seen.append([])
            self.tasks.create_task(beside())
            async for data in self.datagrams:
                seen[-1].append(data)
                if data == b"last":
                    await asyncio.sleep(0)
                    return

        async def finish(self) -> None:
            if what == "finish":
                await end()
            assert [data async for data in self.datagrams] == []

    async with serving(Accompanied) as (server, address):
        for data in (b"first", b"last"):
            peer.send(data, address)
        await ending.wait()
        for data in (b"a", b"b", b"c"):
            peer.send(data, address)
        await settle(lambda: server.stats.received == 5)
        may_end.set()
        await settle(lambda: server.stats.handled == 5)
        peer.send(b"last", address)
        await settle(lambda: server.stats.completed == 2)
        assert seen == [[b"first", b"last"], [b"a", b"b", b"c", b"last"]]
        assert not server.stats.drops


# The session was over, and so did not end for its peer's silence any more, from when on its time would have counted.
async def test_the_finish_of_a_session_is_cancelled_if_it_takes_too_long(peer: Peer) -> None:
    class Endless(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            await anext(self.datagrams)

        async def finish(self) -> None:
            await asyncio.Event().wait()

    async with serving(Endless, timeouts=aioecho.Timeouts(datagram_handler=0.05)) as (server, address):
        peer.send(b"x", address)
        await settle(lambda: server.stats.reasons["datagram_handler"] == 1)
        assert not server.connections


# It was dropped when the session had ended, though the server still read its peer.
async def test_what_comes_at_a_stop_once_the_datagrams_have_ended_is_for_the_next_session(peer: Peer) -> None:
    ended, may_return = asyncio.Event(), asyncio.Event()
    seen: list[list[bytes]] = []

    async def handle(self: Any) -> None:
        seen.append([data async for data in self.datagrams])
        ended.set()
        await may_return.wait()

    async with serving(handler(handle)) as (server, address):
        peer.send(b"first", address)
        await settle(lambda: server.stats.received == 1)
        stop = asyncio.create_task(server.shutdown(10))
        await ended.wait()
        peer.send(b"second", address)
        await settle(lambda: server.stats.received == 2)
        may_return.set()
        report = await stop
    assert seen == [[b"first"], [b"second"]]
    assert report.completed == 2
    assert not server.stats.drops
