"""Batches: one handler for all the datagrams that have come."""

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import settle
from test_datagram import Peer, check, peer, serving
from test_proxy import HERE, binary
from timing import in_time

import aioecho
from aioecho.framing import Lines, Netstrings

__all__ = ["peer"]


def handler(handle: Callable[[Any], Any], **methods: Any) -> type[aioecho.DatagramBatchHandler]:
    return type("Handler", (aioecho.DatagramBatchHandler,), {"handle": handle, **methods})


class Gated(aioecho.DatagramBatchHandler):
    """Notes what came, and waits at the gate."""

    gate: asyncio.Event
    seen: list[list[bytes]]

    async def handle(self) -> None:
        self.seen.append([data for data, _ in self.datagrams])
        await self.gate.wait()


@pytest.fixture
def gated() -> type[Gated]:
    return type("Gated", (Gated,), {"gate": asyncio.Event(), "seen": []})


async def test_what_comes_while_a_batch_is_handled_is_the_next_batch(gated: type[Gated], peer: Peer) -> None:
    async with serving(gated) as (server, address):
        peer.send(b"0", address)
        await settle(lambda: gated.seen)
        for number in range(1, 101):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.queued == 100)
        assert (server.stats.active, server.stats.received, server.stats.handled) == (1, 101, 1)
        check(server)
        gated.gate.set()
        await settle(lambda: server.stats.completed == 2)
        assert gated.seen == [[b"0"], [b"%d" % number for number in range(1, 101)]]
        assert (server.stats.received, server.stats.handled) == (101, 101)


async def test_max_requests_counts_datagrams_and_not_batches(gated: type[Gated], peer: Peer) -> None:
    counts: list[int] = []
    async with serving(gated) as (server, address):
        server.on_accept = counts.append
        peer.send(b"0", address)
        await settle(lambda: gated.seen)
        for number in range(1, 11):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.queued == 10)
        gated.gate.set()
        await settle(lambda: server.stats.completed == 2)
        assert sum(counts) == 11


async def test_a_batch_has_its_senders_and_answers_them(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        assert self.client_address is None
        for data, client_address in self.datagrams:
            await self.reply(data.upper(), client_address)

    with Peer(address=("127.0.0.1", 0)) as other:
        async with serving(handler(handle)) as (_, address):
            peer.send(b"one", address)
            other.send(b"two", address)
            assert await peer.receive() == (b"ONE", address)
            assert await other.receive() == (b"TWO", address)


async def test_a_server_on_every_address_answers_from_the_one_that_was_asked(peer: Peer) -> None:
    async def handle(self: Any) -> None:
        for data, client_address in self.datagrams:
            await self.reply(data, client_address)

    async with aioecho.serve(handler(handle), "udp://0.0.0.0:0") as server:
        port = server.server_address[1]
        peer.send(b"a", ("127.0.0.1", port))
        peer.send(b"b", ("127.0.0.2", port))
        assert {await peer.receive(), await peer.receive()} == {
            (b"a", ("127.0.0.1", port)),
            (b"b", ("127.0.0.2", port)),
        }


async def test_frames_of_all_datagrams_come_with_their_senders(peer: Peer) -> None:
    seen: list[Any] = []

    async def handle(self: Any) -> None:
        seen.extend(self.frames)

    async with serving(handler(handle, framing=Lines())) as (_, address):
        peer.send(b"a\nb", address)
        peer.send(b"c\n", address)
        await settle(lambda: len(seen) == 3)
    assert seen == [(frame, peer.sock.getsockname()) for frame in (b"a", b"b", b"c")]


async def test_a_datagram_that_is_no_whole_frame_costs_no_other(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aioecho.datagram")
    seen: list[bytes] = []
    gate = asyncio.Event()

    async def handle(self: Any) -> None:
        await gate.wait()
        seen.extend(frame for frame, _ in self.frames)

    async with serving(handler(handle, framing=Netstrings(max_size=3))) as (server, address):
        peer.send(b"1:0,", address)
        await settle(lambda: server.connections)
        for data in (b"1:a,5:b", b"1:c,9:too long,", b"x", b"1:d,"):
            peer.send(data, address)
        await settle(lambda: server.stats.queued == 4)
        gate.set()
        await settle(lambda: server.stats.completed == 2)
    assert seen == [b"0", b"a", b"c", b"d"]
    left_out = [record for record in caplog.records if "left out the rest of a datagram" in record.message]
    assert [record.levelname for record in left_out] == ["DEBUG"] * 3


async def test_more_than_max_queue_is_dropped_and_so_is_what_is_too_long(gated: type[Gated], peer: Peer) -> None:
    limits = aioecho.Limits(max_queue=10, max_datagram=100)
    async with serving(gated, limits=limits) as (server, address):
        peer.send(b"first", address)
        await settle(lambda: gated.seen)
        peer.send(b"x" * 101, address)
        for number in range(15):
            peer.send(b"%d" % number, address)
        await settle(lambda: server.stats.received == 17)
        assert server.stats.drops == {"truncated": 1, "queue full": 5}
        server.limits = aioecho.Limits(max_queue=20, max_datagram=100)
        peer.send(b"more", address)
        await settle(lambda: server.stats.queued == 11)
        gated.gate.set()
    assert gated.seen == [[b"first"], [*(b"%d" % number for number in range(10)), b"more"]]


async def test_a_hook_that_refuses_a_batch_drops_all_of_it(gated: type[Gated], peer: Peer) -> None:
    asked: list[Any] = []

    async def verify(request: Any, client_address: Any) -> bool:
        asked.append((len(request[0]), client_address))
        await gated.gate.wait()
        return False

    async with serving(gated) as (server, address):
        server.verify_request = verify  # type: ignore[method-assign]
        peer.send(b"1", address)
        await settle(lambda: asked)
        peer.send(b"2", address)
        peer.send(b"3", address)
        await settle(lambda: server.stats.queued == 2)
        gated.gate.set()
        await settle(lambda: server.stats.rejected == 2)
        assert server.stats.drops == {"refused": 3}
        assert (server.stats.received, server.stats.handled) == (3, 0)
    assert asked == [(1, None), (2, None)]
    assert not gated.seen


async def test_a_mistake_ends_its_batch_alone(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[bytes] = []

    async def handle(self: Any) -> None:
        for data, _ in self.datagrams:
            if data == b"bad":
                raise ValueError("a mistake")
            seen.append(data)

    async with serving(handler(handle)) as (server, address):
        peer.send(b"bad", address)
        await settle(lambda: server.stats.failed == 1)
        peer.send(b"good", address)
        await settle(lambda: seen == [b"good"])
    assert [record.levelname for record in caplog.records if "raised" in record.message] == ["ERROR"]


async def test_a_batch_that_takes_too_long_is_cancelled_and_the_next_begins(gated: type[Gated], peer: Peer) -> None:
    timeouts = aioecho.Timeouts(datagram_handler=0.2)
    async with serving(gated, timeouts=timeouts) as (server, address):
        peer.send(b"1", address)
        await settle(lambda: gated.seen)
        peer.send(b"2", address)
        await settle(lambda: len(gated.seen) == 2)
        assert server.stats.reasons == {"datagram_handler": 1}
        gated.gate.set()


async def test_a_batch_that_nothing_ends_does_not_keep_the_next_waiting(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioecho.datagrams.run.SWALLOWED_FOR", 0.05)
    release = asyncio.Event()
    seen: list[bytes] = []

    async def handle(self: Any) -> None:
        seen.extend(data for data, _ in self.datagrams)
        while seen[0] in dict(self.datagrams) and not release.is_set():
            with contextlib.suppress(BaseException):  # also GeneratorExit
                await release.wait()

    async with serving(handler(handle), timeouts=aioecho.Timeouts(datagram_handler=0.1)) as (server, address):
        peer.send(b"1", address)
        await settle(lambda: seen)
        peer.send(b"2", address)
        await settle(lambda: seen == [b"1", b"2"])
        await settle(lambda: not server.connections)
        assert server.stats.reasons == {"datagram_handler": 1, "finished": 1}
        release.set()
        await settle()


async def test_a_stop_handles_what_has_come(gated: type[Gated], peer: Peer) -> None:
    async with serving(gated) as (server, address):
        peer.send(b"1", address)
        await settle(lambda: gated.seen)
        peer.send(b"2", address)  # it may still be the kernel's
        stopping = asyncio.create_task(server.shutdown(10))
        await settle(lambda: server.stats.queued == 1)
        gated.gate.set()
        report = await stopping
        assert gated.seen == [[b"1"], [b"2"]]
        assert (report.cancelled, report.aborted) == (0, 0)
        in_time(report.seconds, 5, "the stop")


async def test_what_waits_when_the_grace_is_over_is_counted_as_stopped(gated: type[Gated], peer: Peer) -> None:
    async with serving(gated) as (server, address):
        peer.send(b"1", address)
        await settle(lambda: gated.seen)
        peer.send(b"2", address)
        report = await server.shutdown(0.1)
        assert (report.cancelled, report.aborted) == (1, 0)
        assert server.stats.drops == {"stopped": 1}


async def test_a_batch_that_is_cut_off_before_it_begins_counts_as_cancelled(gated: type[Gated], peer: Peer) -> None:
    async with serving(gated) as (server, address):
        server.pause()
        peer.send(b"0", address)
        report = await server.shutdown(0)
        assert (report.completed, report.cancelled, report.aborted) == (0, 1, 0)
        assert (server.stats.completed, server.stats.cancelled) == (0, 1)
        check(server)


async def test_unix_sockets_send_batches_too(gated: type[Gated], tmp_path: Path) -> None:
    gated.gate.set()
    path = str(tmp_path / "s")
    async with aioecho.UnixDatagramServer(path, gated) as server:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
            sender.sendto(b"log", path)
        await settle(lambda: gated.seen == [[b"log"]])
        check(server)


@pytest.mark.parametrize("limit", ["max_per_host", "accept_rate"])
def test_a_limit_that_cannot_hold_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match=f"{limit} is for .*leave it out"):
        aioecho.UDPServer(("127.0.0.1", 0), handler(Gated.handle), limits=aioecho.Limits(**{limit: 1}))


def test_streams_are_refused() -> None:
    with pytest.raises(TypeError, match="handler of datagrams: it can't serve streams"):
        aioecho.TCPServer(("127.0.0.1", 0), Gated)


async def test_a_batch_is_counted_while_its_handler_takes_its_first_step(peer: Peer) -> None:
    seen: list[int] = []

    async def handle(self: Any) -> None:
        assert [each.handler for each in self.server.connections] == [self]
        stats = self.server.stats
        assert (stats.active, stats.accepted, stats.handled) == (1, len(seen) + 1, sum(seen) + len(self.datagrams))
        check(self.server)
        seen.append(len(self.datagrams))

    async with serving(handler(handle)) as (server, address):
        for total, count in ((1, 1), (6, 5), (7, 1)):
            for _ in range(count):
                peer.send(b"x", address)
            await settle(lambda total=total: sum(seen) == total)
        assert (server.stats.completed, server.stats.received) == (len(seen), 7)


@pytest.mark.parametrize("waits", [False, True])
async def test_what_is_read_as_a_batch_closes_its_server_is_the_next_batch(waits: bool, peer: Peer) -> None:
    seen: list[list[bytes]] = []
    running: list[Any] = []

    async def handle(self: Any) -> None:
        running.append(self)
        assert len(running) == 1
        seen.append([data for data, _ in self.datagrams])
        if b"close" in seen[-1]:
            peer.send(b"last", address)
            self.server.close()
        if waits:
            await asyncio.sleep(0)
        running.remove(self)

    async with serving(handler(handle)) as (server, address):
        peer.send(b"first", address)
        await settle(lambda: server.stats.completed == 1)
        peer.send(b"close", address)
        await settle(lambda: server.stats.completed == 3)
        assert seen == [[b"first"], [b"close"], [b"last"]]


# The next one, which ended at once, was counted before it, and so made the end of the drain.
async def test_a_drain_counts_a_batch_for_which_another_has_waited(peer: Peer) -> None:
    gate = asyncio.Event()
    seen: list[list[bytes]] = []

    async def handle(self: Any) -> None:
        seen.append([data for data, _ in self.datagrams])
        if len(seen) == 1:
            await gate.wait()

    async with serving(handler(handle)) as (server, address):
        peer.send(b"waits", address)
        await settle(lambda: seen)
        peer.send(b"at once", address)
        await settle(lambda: server.stats.queued == 1)
        stopping = asyncio.create_task(server.shutdown(20))
        await settle()
        gate.set()
        report = await stopping
    assert seen == [[b"waits"], [b"at once"]]
    assert (report.completed, server.stats.completed) == (2, 2)


async def queue_up(server: aioecho.UDPServer, peer: Peer, count: int) -> None:
    """Send a datagram for the first handler, and `count` more, where each is a batch."""
    for number in range(count + 1):
        peer.send(binary(family=0x12) + b"%d" % number, server.server_address)
        await settle(lambda number=number: server.stats.queued == number)  # type: ignore[misc]


# It began all that waited, a batch for every PROXY header, in one turn of the loop.
async def test_no_more_than_64_batches_begin_in_one_turn_of_the_loop(peer: Peer) -> None:
    gate = asyncio.Event()
    turn = 0
    begun: list[int] = []

    async def handle(self: Any) -> None:
        begun.append(turn)
        if len(begun) == 1:
            await gate.wait()

    async def count_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async with serving(handler(handle), proxy=HERE) as (server, _):
        await queue_up(server, peer, 300)
        counting = asyncio.create_task(count_turns())
        gate.set()
        await settle(lambda: not server.stats.queued)
        counting.cancel()
        assert Counter(begun[1:]).most_common(1)[0][1] <= 64
        assert (len(begun), server.stats.handled) == (301, 301)


async def test_batches_that_wait_for_the_next_turn_are_handled_before_a_stop_ends(peer: Peer) -> None:
    gate = asyncio.Event()
    count = 0

    async def handle(self: Any) -> None:
        nonlocal count
        count += 1
        if count == 1:
            await gate.wait()

    async with serving(handler(handle), proxy=HERE) as (server, _):
        await queue_up(server, peer, 200)
        stop = asyncio.create_task(server.shutdown(10))
        await settle(lambda: not server.is_serving())
        gate.set()
        report = await stop
        assert (count, report.completed, server.stats.drops) == (201, 201, {})
