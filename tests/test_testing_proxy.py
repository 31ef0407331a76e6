"""The proxy that makes a network bad on purpose."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import settle
from helpers import ON_ONE_LOOP, close, handler

import aioecho
from aioecho import client
from aioecho.echo import Echo
from aioecho.testing import Faults, FaultyProxy


async def note_reads(self: Any) -> None:
    """Note every read, and reply with what was read at the end of the stream."""
    reads = self.server.state
    while data := await self.reader.read(2**16):
        reads.append(data)
    await self.send(b"".join(reads))


@contextlib.asynccontextmanager
async def behind(
    served: Any, endpoint: str = "tcp://127.0.0.1:0", **faults: Any
) -> AsyncIterator[tuple[FaultyProxy, Any, Any]]:
    """Give a proxy, and a client's reader and writer through it to a server whose `state` is a list."""
    async with aioecho.serve(served, endpoint, grace=0.1) as server:
        server.state = []
        async with FaultyProxy(server.names[0], **faults) as proxy:
            proxy.server = server  # type: ignore[attr-defined]
            reader, writer = await client.open_connection(proxy.endpoint)
            await settle(lambda: proxy.connections)
            try:
                yield proxy, reader, writer
            finally:
                await close(writer)


async def test_without_faults_all_passes_both_ways_and_so_do_ends() -> None:
    data = bytes(range(256)) * 4096
    async with behind(handler(note_reads)) as (proxy, reader, writer):
        writer.write(data)
        writer.write_eof()
        assert await reader.read() == data
        assert proxy.accepted == 1
        await settle(lambda: not proxy.connections)


async def test_unix_sockets_are_proxied_to_tcp_and_the_other_way(tmp_path: Path) -> None:
    path = f"unix:{tmp_path}/proxy.sock"
    async with behind(Echo, f"unix:{tmp_path}/server.sock", listen=path) as (proxy, reader, writer):
        writer.write(b"hello")
        assert await reader.readexactly(5) == b"hello"
        assert proxy.endpoint == path
        assert proxy.address == f"{tmp_path}/proxy.sock"
    assert not (tmp_path / "proxy.sock").exists()


async def test_slices_are_cut_at_the_same_bytes_for_the_same_seed() -> None:
    async def cut(seed: int, pieces: list[bytes]) -> list[int]:
        async with behind(handler(note_reads), slices=(1, 9), seed=seed) as (proxy, reader, writer):
            for piece in pieces:
                writer.write(piece)
                await settle()
            writer.write_eof()
            assert await reader.read() == b"x" * 60
            return [len(data) for data in proxy.server.state]

    whole = await cut(1, [b"x" * 60])
    assert max(whole) <= 9
    assert len(set(whole)) > 1
    assert await cut(1, [b"x" * 60]) == whole
    assert await cut(2, [b"x" * 60]) != whole


async def test_every_boundary_of_a_slice_stays_where_it_was_however_the_bytes_come() -> None:
    async with behind(handler(note_reads), slices=4) as (proxy, reader, writer):
        for piece in (b"ab", b"cdefg", b"hij"):
            writer.write(piece)
            await settle(lambda n=piece[-1:]: proxy.server.state and proxy.server.state[-1].endswith(n))
        writer.write_eof()
        assert await reader.read() == b"abcdefghij"
        assert proxy.server.state == [b"ab", b"cd", b"efg", b"h", b"ij"]


async def test_latency_delays_bytes_and_keeps_their_order() -> None:
    loop = asyncio.get_running_loop()
    async with behind(Echo, latency=0.05, jitter=0.02, seed=3) as (proxy, reader, writer):
        began = loop.time()
        for number in range(5):
            writer.write(b"%d" % number)
            await settle()
        assert await reader.readexactly(5) == b"01234"
        assert loop.time() - began >= 0.1 - 0.003  # there and back; uvloop's clock ticks in milliseconds
        proxy.set_faults(latency=0, jitter=0)
        assert proxy.to_client == proxy.to_server == Faults()


async def test_a_rate_bounds_bytes_a_second_of_one_direction() -> None:
    loop = asyncio.get_running_loop()
    async with behind(Echo) as (proxy, reader, writer):
        proxy.set_faults("to_client", rate=10_000)
        began = loop.time()
        writer.write(bytes(1_000))
        assert len(await reader.readexactly(1_000)) == 1_000
        # The last piece of 100 bytes is not waited for.
        assert loop.time() - began >= 0.09 - 0.015
        assert proxy.to_server.rate is None


async def test_a_reset_comes_after_so_many_bytes() -> None:
    async with behind(Echo) as (proxy, reader, writer):
        proxy.to_client = Faults(reset_after=5)
        writer.write(b"hello, world")
        assert await reader.readexactly(5) == b"hello"
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await settle(lambda: not proxy.connections and not proxy.server.stats.active)


async def test_all_connections_are_reset_at_any_time_in_a_partition_too() -> None:
    async with behind(handler(note_reads)) as (proxy, reader, writer):
        writer.write(b"hello")
        await settle(lambda: proxy.server.state)
        proxy.partition()
        writer.write(b"lost")
        await settle()
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await settle(lambda: not proxy.connections and not proxy.server.stats.active)
        assert proxy.server.state == [b"hello"]
        assert proxy.server.stats.reasons == {"connection lost": 1}


async def test_a_client_that_waits_for_the_server_is_reset_too() -> None:
    async with FaultyProxy("tcp://127.0.0.1:1") as proxy:
        proxy.partition()
        reader, writer = await client.open_connection(proxy.endpoint)
        await settle(lambda: proxy.accepted)
        await settle()
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await close(writer)


async def test_a_client_that_is_accepted_as_the_proxy_ends_is_disconnected() -> None:
    async with FaultyProxy("tcp://127.0.0.1:1") as proxy:
        sock = socket.create_connection(proxy.address, timeout=10)
        while not proxy.accepted:
            await asyncio.sleep(0)  # no turn more: on asyncio's loop the task that serves it has not begun
    with sock, contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""


async def test_a_partition_holds_bytes_and_ends_until_it_is_healed() -> None:
    async with behind(handler(note_reads)) as (proxy, reader, writer):
        writer.write(b"before,")
        await settle(lambda: proxy.server.state)
        proxy.partition("to_server")
        writer.write(b"in it")
        writer.write_eof()
        await settle()
        assert proxy.server.state == [b"before,"]
        assert not reader.at_eof()
        proxy.heal()
        assert await reader.read() == b"before,in it"


async def test_a_client_that_comes_in_a_partition_is_served_when_that_is_healed() -> None:
    async with behind(Echo) as (proxy, _, _):
        proxy.partition()
        reader, writer = await client.open_connection(proxy.endpoint)
        writer.write(b"hello")
        await settle(lambda: proxy.accepted == 2)
        await settle()
        assert proxy.server.stats.accepted == 1
        proxy.heal()
        assert await reader.readexactly(5) == b"hello"
        await close(writer)


async def test_one_direction_is_half_closed() -> None:
    async with behind(handler(note_reads)) as (proxy, reader, writer):
        writer.write(b"hello")
        await settle(lambda: proxy.server.state)
        proxy.half_close("to_server")
        writer.write(b"dropped")
        assert await reader.read() == b"hello"


async def test_a_peers_reset_is_passed_on_behind_its_bytes() -> None:
    async with behind(handler(note_reads), latency=0.02) as (proxy, _, writer):
        writer.write(b"hello")
        await settle(lambda: proxy.connections)
        await settle()
        aioecho.streams.outgoing.reset_when_closed(writer.transport)
        writer.transport.abort()
        await settle(lambda: proxy.server.stats.active == 0 and proxy.server.stats.accepted)
        assert proxy.server.state == [b"hello"]
        assert proxy.server.stats.reasons == {"connection lost": 1}


async def test_without_a_server_the_client_is_reset(tmp_path: Path) -> None:
    async with FaultyProxy(f"unix:{tmp_path}/none.sock") as proxy:
        reader, writer = await client.open_connection(proxy.endpoint)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        await close(writer)


async def test_a_sender_that_is_far_ahead_is_held_back() -> None:
    async with behind(handler(note_reads)) as (proxy, _, writer):
        proxy.partition()
        writer.write(bytes(2**25))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await writer.drain()
        proxy.reset()


@ON_ONE_LOOP
@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"latency": -1}, "latency must be seconds"),
        ({"jitter": float("nan")}, "jitter must be seconds"),
        ({"rate": 0}, "rate must be bytes a second"),
        ({"rate": float("inf")}, "rate must be bytes a second above 0, or None"),
        ({"slices": (3, 2)}, "slices must be a number of bytes"),
        ({"slices": 0}, "slices must be a number of bytes"),
        ({"reset_after": -1}, "reset_after must be a number of bytes"),
        ({"listen": "udp://127.0.0.1:0"}, "a FaultyProxy is for"),
    ],
)
async def test_faults_that_make_no_sense_are_told(faults: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaultyProxy("tcp://127.0.0.1:1", **faults)


@ON_ONE_LOOP
async def test_mistakes_are_told() -> None:
    proxy = FaultyProxy("tcp://127.0.0.1:1")
    with pytest.raises(TypeError, match="there is no fault delay"):
        proxy.set_faults(delay=1)
    with pytest.raises(ValueError, match="the direction is"):
        proxy.partition("up")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="the proxy listens inside its"):
        proxy.endpoint  # noqa: B018
