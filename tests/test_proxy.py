"""PROXY headers, served: which client a handler sees, what is rejected and why, and what balancers really send."""

import asyncio
import contextlib
import logging
import os
import pickle
import shutil
import socket
import socketserver
import ssl
import struct
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ask, check_mistake, close, handler, invoke, reset
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import Program
from programs import ask as ask_program
from timing import more_than

import aioecho
from aioecho.net.proxy_header import SIGNATURE_OF_V2, ProxyHeaderError, find_missing, parse
from aioecho.net.proxy_tlvs import crc32c

LINE = b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 443\r\n"
CLIENT = ("192.0.2.1", 40000)
LOCAL = SIGNATURE_OF_V2 + b"\x20\x00\x00\x00"
HERE = aioecho.ProxyProtocol(trusted=["127.0.0.1"])


def binary(source: str = "192.0.2.1", port: int = 40000, tlvs: bytes = b"", *, family: int = 0x11) -> bytes:
    body = socket.inet_aton(source) + socket.inet_aton("198.51.100.2") + struct.pack("!HH", port, 443) + tlvs
    return SIGNATURE_OF_V2 + struct.pack("!BBH", 0x21, family, len(body)) + body


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def with_checksum(header: bytes) -> bytes:
    header = header[:14] + struct.pack("!H", len(header) - 16 + 7) + header[16:] + tlv(3, bytes(4))
    return header[:-4] + struct.pack("!I", crc32c(header))


def wrong(header: bytes) -> bytes:
    return header[:-1] + bytes([header[-1] ^ 1])


class Tell(aioecho.StreamRequestHandler):
    """Says which client it sees, and echoes."""

    async def handle(self) -> None:
        header = self.writer.get_extra_info("proxy")
        async for line in self.reader:
            await self.send(f"{self.client_address} v{header.version} ".encode() + line)


class TellBlocking(socketserver.StreamRequestHandler):
    """The same."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(f"{self.client_address} v{self.request.proxy.version} ".encode() + line)


BOTH = pytest.mark.parametrize("Handler", [Tell, TellBlocking])


@contextlib.asynccontextmanager
async def serving(Handler: Any = Tell, proxy: Any = HERE, **options: Any) -> AsyncIterator[aioecho.BaseServer]:
    async with aioecho.TCPServer(ANYWHERE, Handler, proxy=proxy, **options) as server:
        yield server
        await settle(lambda: not server.connections)
        check_identity(server)


async def end_of(server: aioecho.BaseServer, sent: bytes, *, by_reset: bool = False) -> str:
    """Connect, send, and close or reset; return the one reason of a connection that is new."""
    before = server.stats.reasons.copy()
    sock = socket.create_connection(server.server_address)
    sock.sendall(sent)
    if by_reset:
        count = server.stats.accepted
        await settle(lambda: server.stats.accepted > count)
        await settle()
        reset(sock)
    else:
        sock.close()
    await settle(lambda: server.stats.reasons != before)
    (reason,) = (server.stats.reasons - before).elements()
    return reason


# What a handler sees


@BOTH
@pytest.mark.parametrize("header", [LINE, binary(), with_checksum(binary(tlvs=tlv(4, b"x" * 900)))])
async def test_a_handler_sees_the_client_that_the_header_names(Handler: Any, header: bytes) -> None:
    async with serving(Handler) as server:
        version = 1 if header == LINE else 2
        assert await ask(server, header + b"hello\nyou\n") == b"%b v%d hello\n%b v%d you\n" % (
            *(str(CLIENT).encode(), version) * 2,
        )
        await settle(lambda: server.stats.reasons["finished"] == 1)


@BOTH
@pytest.mark.parametrize("header", [LINE, binary(tlvs=tlv(5, b"id"))])
async def test_a_header_may_come_byte_by_byte(Handler: Any, header: bytes) -> None:
    async with serving(Handler) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        for byte in header + b"hello\n":
            writer.write(bytes([byte]))
            await writer.drain()
            await settle()
        assert await reader.readline() == b"%b v%d hello\n" % (str(CLIENT).encode(), 1 if header == LINE else 2)
        await close(writer)


@BOTH
@pytest.mark.parametrize(
    "header",
    [
        LOCAL,
        SIGNATURE_OF_V2 + b"\x20\x11\x00\x13" + b"\xff" * 19,  # with a body
        SIGNATURE_OF_V2 + b"\x21\x00\x00\x05hello",  # UNSPEC
        b"PROXY UNKNOWN\r\n",
        b"PROXY UNKNOWN ffff::1 x y z\r\n",
    ],
)
async def test_without_a_client_named_the_real_one_counts_and_the_body_is_skipped(Handler: Any, header: bytes) -> None:
    async with serving(Handler, limits=aioecho.Limits(max_per_host=1)) as server:
        streams = [await asyncio.open_connection(*server.server_address) for _ in range(2)]
        for reader, writer in streams:  # both at once: how many clients they are is not known
            writer.write(header + b"hello\n")
            address = writer.get_extra_info("sockname")
            assert await reader.readline() == b"%b v%d hello\n" % (str(address).encode(), header[0:1] == b"P" or 2)
        for _, writer in streams:
            await close(writer)


async def test_everything_in_a_header_is_extra_info_of_the_writer() -> None:
    seen: list[Any] = []

    async def keep(self: Any) -> None:
        seen.append(self.writer.get_extra_info("proxy"))
        seen.append(self.writer.get_extra_info("peername"))
        seen.append(self.writer.get_extra_info("nothing", 7))

    tls = tlv(0x20, b"\x07\0\0\0\0" + tlv(0x21, b"TLSv1.3") + tlv(0x22, b"client") + tlv(0x23, b"AES"))
    tlvs = (
        tlv(1, b"h2") + tlv(2, b"b.example") + tlv(5, b"one") + tls + tlv(0xEA, b"\1vpce-1") + tlv(0xEE, b"\1\5\0\0\0")
    )
    async with serving(handler(keep)) as server:
        await ask(server, with_checksum(binary(tlvs=tlvs)) + b"x")
        header, peer, nothing = seen
        assert (header.source, header.destination) == (CLIENT, ("198.51.100.2", 443))
        assert (header.alpn, header.authority, header.unique_id) == (b"h2", "b.example", b"one")
        assert (header.tls.version, header.tls.cipher, header.tls.common_name) == ("TLSv1.3", "AES", "client")
        assert (header.aws_vpce_id, header.azure_link_id, header.has_checksum) == ("vpce-1", 5, True)
        assert len(header.tlvs) == 7
        assert peer[0] == "127.0.0.1"
        assert nothing == 7


@BOTH
async def test_verify_request_sees_the_client(Handler: Any) -> None:
    seen = []
    async with serving(Handler) as server:
        server.verify_request = lambda request, address: seen.append(address) or False  # type: ignore[func-returns-value,method-assign]
        with contextlib.suppress(OSError):
            assert await ask(server, LINE + b"hello\n") == b""
        assert seen == [CLIENT]
        await settle(lambda: server.stats.reasons["refused"] == 1)


async def test_a_server_may_speak_first() -> None:
    async def greet(self: Any) -> None:
        await self.send(b"220 %b\r\n" % self.client_address[0].encode())
        await self.send(await self.reader.readline())

    async with serving(handler(greet)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(LINE)
        assert await reader.readline() == b"220 192.0.2.1\r\n"
        await close(writer)


async def test_a_connection_without_proxy_has_none() -> None:
    async def tell(self: Any) -> None:
        await self.send(repr(self.writer.get_extra_info("proxy")).encode())

    async with aioecho.TCPServer(ANYWHERE, handler(tell)) as server:
        assert await ask(server, LINE) == b"None"


# TLS behind it


@BOTH
@pytest.mark.parametrize("size", [1, 7, 93, 2**16])
async def test_tls_may_follow_in_the_same_segment(Handler: Any, size: int, tls: SimpleNamespace) -> None:
    async with serving(Handler, ssl=tls.server) as server:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = tls.client.wrap_bio(incoming, outgoing, server_hostname="localhost")
        reader, writer = await asyncio.open_connection(*server.server_address)
        sent = LINE

        async def step(action: Any) -> Any:
            nonlocal sent
            while True:
                try:
                    return action()
                except ssl.SSLWantReadError:
                    sent += outgoing.read()
                    for start in range(0, len(sent), size):
                        writer.write(sent[start : start + size])
                        await writer.drain()
                        await settle()
                    sent = b""
                    incoming.write(await reader.read(2**16))

        await step(client.do_handshake)
        client.write(b"hello\n")
        assert await step(lambda: client.read(100)) == b"%b v1 hello\n" % str(CLIENT).encode()
        await close(writer)


@BOTH
async def test_a_balancers_check_of_a_server_with_tls_is_a_probe(Handler: Any, tls: SimpleNamespace) -> None:
    async with serving(Handler, ssl=tls.server) as server:
        assert await end_of(server, LOCAL) == "probe"
        assert await end_of(server, LOCAL, by_reset=True) == "probe"
        assert await end_of(server, LOCAL + b"\x16\x03") == "handshake"


# What is rejected


REJECTED = {
    "proxy missing": b"GET / HTTP/1.1\r\n\r\n",
    "proxy version": LINE,
    "proxy malformed": SIGNATURE_OF_V2 + b"\x2f\x11\x00\x0c" + bytes(12),
    "proxy too large": SIGNATURE_OF_V2 + b"\x21\x11\x10\x00",
    "proxy checksum": wrong(with_checksum(binary())),
}


@BOTH
@pytest.mark.parametrize("reason", REJECTED)
async def test_what_is_no_acceptable_header_is_rejected_for_a_reason_of_its_own(
    Handler: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Handler, aioecho.ProxyProtocol(trusted=["127.0.0.0/8"], versions=(2,))) as server:
        with contextlib.suppress(OSError):
            assert await ask(server, REJECTED[reason] + b"hello\n") == b""
        await settle(lambda: server.stats.rejected == 1)
        assert server.stats.reasons == {reason: 1}
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@BOTH
async def test_a_peer_that_is_not_trusted_is_rejected_before_a_byte_is_read(Handler: Any) -> None:
    async with serving(Handler, aioecho.ProxyProtocol(trusted=["10.0.0.0/8", "::1"])) as server:
        for sent in (b"", LINE + b"hello\n"):
            with socket.create_connection(server.server_address) as client, contextlib.suppress(OSError):
                client.sendall(sent)
                assert await asyncio.to_thread(client.recv, 100) == b""
        await settle(lambda: server.stats.rejected == 2)
        assert server.stats.reasons == {"proxy untrusted": 2}


@BOTH
@pytest.mark.parametrize("sent", [b"", LINE[:20], binary()[:27]])
async def test_a_header_that_is_not_whole_in_time_is_rejected(
    Handler: Any, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aioecho.server")
    async with serving(Handler, timeouts=aioecho.Timeouts(proxy=0.1)) as server:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(*server.server_address)
            writer.write(sent)
            assert await reader.read() == b""
        assert time.monotonic() - began > 0.09
        await close(writer)
        assert server.stats.reasons == {"proxy timeout": 1}
    (message,) = [record.getMessage() for record in caplog.records if "no PROXY header" in record.getMessage()]
    assert "Timeouts.proxy, 0.1 s" in message
    assert ("with the client's first bytes" in message) is not sent


@BOTH
async def test_a_limit_per_host_counts_the_client(Handler: Any) -> None:
    async with serving(Handler, limits=aioecho.Limits(max_per_host=1)) as server:
        streams = []
        for number in (1, 2, 1):
            reader, writer = await asyncio.open_connection(*server.server_address)
            streams.append(writer)
            writer.write(binary(f"192.0.2.{number}") + b"hello\n")
            with contextlib.suppress(OSError):
                assert bool(await reader.readline()) is (len(streams) < 3)
        server.limits = aioecho.Limits(max_per_host=1)  # counts anew
        assert server.stats.reasons == {"per host": 1}
        for writer in streams:
            await close(writer)
        await settle(lambda: not server.connections)
        assert await ask(server, binary("192.0.2.1") + b"x\n")


async def test_clients_without_an_address_are_not_one_host() -> None:
    async with serving(Tell, limits=aioecho.Limits(max_per_host=1)) as server:
        streams = [await asyncio.open_connection(*server.server_address) for _ in range(2)]
        for reader, writer in streams:
            writer.write(b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\nx\n")  # varnish, for Unix sockets
            assert await reader.readline() == b"('0.0.0.0', 0) v1 x\n"
        for _, writer in streams:
            await close(writer)


# Probes


@BOTH
@pytest.mark.parametrize("by_reset", [False, True])
async def test_an_end_behind_a_header_is_a_probe_and_no_failure(
    Handler: Any, by_reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Handler) as server:
        for sent in (b"", LOCAL, LINE, binary()):
            assert await end_of(server, sent, by_reset=by_reset) == "probe"
        assert await end_of(server, LINE[:9], by_reset=by_reset) == "proxy malformed"
        assert server.stats.completed == 4
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


@BOTH
async def test_a_client_that_has_sent_something_is_no_probe(Handler: Any) -> None:
    async with serving(Handler) as server:
        assert await end_of(server, LINE + b"part", by_reset=True) == "connection lost"
        await ask(server, LINE + b"hello\n")
        await settle(lambda: server.stats.reasons["finished"] == 1)


async def test_a_handler_that_only_speaks_has_finished() -> None:
    async def speak(self: Any) -> None:
        await self.send(b"12:00\n")

    async with serving(handler(speak)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(LINE)
        assert await reader.read() == b"12:00\n"
        await close(writer)
        await settle(lambda: server.stats.reasons == {"finished": 1})


async def test_a_handlers_mistake_is_one_for_a_probe_too(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(self: Any) -> None:
        await self.reader.read()
        raise LookupError

    async with serving(handler(fail)) as server:
        assert await end_of(server, LINE) == "error"
    assert [record.levelno for record in caplog.records if record.levelno > logging.INFO] == [logging.ERROR]


async def test_a_handler_that_waits_elsewhere_is_told_of_a_probes_end() -> None:
    async def wait(self: Any) -> None:
        await asyncio.Event().wait()

    async with serving(handler(wait)) as server:
        assert await end_of(server, LINE, by_reset=True) == "probe"


# Stops


@BOTH
async def test_a_stop_waits_for_a_header_that_has_begun_and_not_for_one_that_has_not(Handler: Any) -> None:
    async with aioecho.TCPServer(ANYWHERE, Handler, proxy=HERE) as server:
        silent, begun = [await asyncio.open_connection(*server.server_address) for _ in range(2)]
        begun[1].write(LINE[:20])
        await settle(lambda: len(server.connections) == 2)
        await asyncio.sleep(0.15)  # past aioecho.serving.draining.FRESH
        stop = asyncio.create_task(server.shutdown(10))
        with contextlib.suppress(OSError):
            assert await asyncio.wait_for(silent[0].read(), 5) == b""
        begun[1].write(LINE[20:] + b"hello\n")
        begun[1].write_eof()
        assert await begun[0].read() == b"%b v1 hello\n" % str(CLIENT).encode()
        report = await stop
        assert (report.cancelled, report.aborted) == (0, 0)
        assert server.stats.reasons == {"proxy timeout": 1, "finished": 1}
        for _, writer in (silent, begun):
            await close(writer)


@BOTH
async def test_a_client_whose_header_ends_as_the_server_stops_has_time_to_speak(Handler: Any) -> None:
    async with aioecho.TCPServer(ANYWHERE, Handler, proxy=HERE) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(LINE[:20])
        await settle(lambda: len(server.connections) == 1)
        await asyncio.sleep(0.15)  # past aioecho.serving.draining.FRESH
        stop = asyncio.create_task(server.shutdown(10))
        await asyncio.sleep(0.05)
        writer.write(LINE[20:])
        await asyncio.sleep(0.05)  # less than FRESH
        writer.write(b"hello\n")
        assert await reader.read() == b"%b v1 hello\n" % str(CLIENT).encode()
        assert (await stop).completed == 1
        await close(writer)


@BOTH
async def test_the_end_of_the_grace_ends_the_wait_for_a_header(Handler: Any) -> None:
    async with aioecho.TCPServer(ANYWHERE, Handler, proxy=HERE) as server:
        _, writer = await asyncio.open_connection(*server.server_address)
        writer.write(LINE[:20])
        await settle(lambda: len(server.connections) == 1)
        await settle()
        report = await asyncio.wait_for(server.shutdown(0.2), 5)
        assert report.cancelled == 1
        assert server.stats.reasons == {"cancelled": 1}
        await close(writer)


@BOTH
async def test_a_connection_can_be_aborted_while_its_header_is_read(Handler: Any) -> None:
    async with serving(Handler) as server:
        for sent in (b"", LINE[:20]):
            reader, writer = await asyncio.open_connection(*server.server_address)
            writer.write(sent)
            await settle(lambda: len(server.connections) == 1)
            await settle()
            for connection in server.connections:
                assert connection.client_address == writer.get_extra_info("sockname")
                connection.abort()
            with contextlib.suppress(OSError):
                assert await reader.read() == b""
            await close(writer)
        assert server.stats.reasons == {"cancelled": 2}


@BOTH
async def test_clients_that_wait_for_room_at_a_stop_are_served_behind_their_headers(Handler: Any) -> None:
    limits = aioecho.Limits(max_connections=1, max_per_host=2)
    async with aioecho.TCPServer(ANYWHERE, Handler, proxy=HERE, limits=limits) as server:
        streams = [await asyncio.open_connection(*server.server_address) for _ in range(3)]
        for _, writer in streams:
            writer.write(LINE + b"hello\n")
        assert await streams[0][0].readline()
        stop = asyncio.create_task(server.shutdown(10))
        for reader, writer in streams[:2]:
            writer.write_eof()
            assert (await reader.read()).endswith(b"hello\n") or reader is streams[0][0]
            await close(writer)
        await settle(lambda: server.stats.completed == 2)
        server.end_at_once("by the test")
        await stop
        await close(streams[2][1])
        check_identity(server)


@BOTH
async def test_a_header_may_be_longer_than_the_buffer(Handler: Any) -> None:
    async with serving(Handler, limits=aioecho.Limits(max_buffer=100)) as server:
        sent = binary(tlvs=tlv(4, b"x" * 3900)) + b"hello\n" * 20
        assert (await ask(server, sent)).count(b"v2 hello\n") == 20


# Unix sockets, and where it is set


@BOTH
async def test_peers_of_a_unix_socket_are_trusted(Handler: Any, tmp_path: Path) -> None:
    async with aioecho.serve(Handler, f"unix:{tmp_path}/s?mode=600&proxy=any") as server:
        assert server.names == (f"unix:{tmp_path}/s",)
        for header, version in ((LINE, 1), (binary(), 2)):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
            writer.write(header + b"hello\n")
            writer.write_eof()
            assert await reader.read() == b"%b v%d hello\n" % (str(CLIENT).encode(), version)
            await close(writer)


async def test_each_endpoint_may_have_its_own() -> None:
    async def tell(self: Any) -> None:
        await self.send(repr(self.client_address[0]).encode())

    endpoints = (
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:0?proxy=v1&proxy_from=127.0.0.1",
        "tcp://127.0.0.1:0?proxy_from=*&proxy=v2",
    )
    async with aioecho.serve(handler(tell), *endpoints) as server:
        plain, first, second = (sock.getsockname() for sock in server.sockets)
        assert await ask(plain) == b"'127.0.0.1'"
        assert await ask(first, LINE) == b"'192.0.2.1'"
        assert await ask(second, binary()) == b"'192.0.2.1'"
        for address, sent in ((first, binary()), (second, LINE)):
            with contextlib.suppress(OSError):
                assert await ask(address, sent) == b""
        await settle(lambda: server.stats.reasons["proxy version"] == 2)


@pytest.mark.parametrize("make", [aioecho.TCPServer, aioecho.UDPServer])
def test_over_the_network_a_server_is_not_made_without_a_trusted_balancer(make: Any) -> None:
    Handler = Tell if make is aioecho.TCPServer else TellDatagram
    with pytest.raises(
        ValueError, match=r"^no balancer is trusted to send PROXY headers to (tcp|udp)://127.0.0.1:0: "
    ) as caught:
        make(ANYWHERE, Handler, proxy=aioecho.ProxyProtocol())
    assert "\n" not in str(caught.value)


async def test_a_socket_that_is_passed_is_not_served_without_a_trusted_balancer() -> None:
    with socket.create_server(ANYWHERE) as sock:
        server = aioecho.serve(Tell, f"fd://{os.dup(sock.fileno())}?proxy=any")
        with pytest.raises(aioecho.EndpointError, match="no balancer is trusted to send PROXY headers to tcp://127"):
            await server.start()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tcp://127.0.0.1:0?proxy=v3&proxy_from=*", "the PROXY protocol is v1, v2, any, not 'v3'"),
        ("tcp://127.0.0.1:0?proxy_from=10.0.0.0/8", "proxy_from= goes with proxy=v1, proxy=v2 or proxy=any"),
        ("tcp://127.0.0.1:0?proxy=v1&proxy_from=10.0.0.1/8", "'10.0.0.1/8', which is neither an address, a network"),
        ("tcp://127.0.0.1:0?proxy=v1&proxy=v2&proxy_from=*", "an option is there twice"),
        ("tcp://127.0.0.1:0?proxy=v1&proxy_from=*&more", "tcp:// takes no options"),
        ("stdio:?proxy=v1", "stdio: takes no options"),
        ("tcp://127.0.0.1:0?tls=yes", "tls= is on or off"),
        ("tcp://127.0.0.1:0?tls=on&tls=off", "an option is there twice"),
        ("tls://127.0.0.1:0", "write tcp://127.0.0.1:0, and give the server a certificate by ssl= (--ssl-certfile)"),
    ],
)
def test_options_of_an_endpoint_that_make_no_sense_are_named(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match="bad endpoint") as caught:
        aioecho.serve(Tell, text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"trusted": "10.0.0.0/8"}, TypeError, "trusted must be a list of networks"),
        ({"trusted": ["10.0.0.0/33"]}, ValueError, "trusted has '10.0.0.0/33'"),
        ({"trusted": [""]}, ValueError, "trusted has ''"),
        ({"versions": ()}, ValueError, r"versions must be 1, 2 or both, not \(\)"),
        ({"versions": (3,)}, ValueError, "versions must be 1, 2 or both"),
        ({"versions": 2}, TypeError, "versions must be a tuple"),
        ({"max_size": 10}, ValueError, "max_size must be a whole number of bytes from 28"),
        ({"max_size": True}, ValueError, "max_size"),
    ],
)
def test_a_proxy_protocol_that_makes_no_sense_is_not_made(options: Any, error: Any, complaint: str) -> None:
    with pytest.raises(error, match=complaint):
        aioecho.ProxyProtocol(**options)
    with pytest.raises(TypeError, match=r"proxy must be an aioecho\.ProxyProtocol"):
        aioecho.TCPServer(ANYWHERE, Tell, proxy=options)


def test_a_proxy_protocol_can_be_sent_to_a_worker() -> None:
    proxy = aioecho.ProxyProtocol(trusted=["10.0.0.0/8", "2001:db8::/32"], versions=(2,), max_size=100)
    sent = pickle.loads(pickle.dumps(proxy))
    assert sent == proxy
    assert hash(sent) == hash(proxy)
    for host, is_trusted in (("10.1.2.3", True), ("11.0.0.1", False)):
        assert sent.trusts((host, 1)) is is_trusted
        assert sent.trusts((f"::ffff:{host}", 1, 0, 0)) is is_trusted
    assert sent.trusts(("2001:db8::1", 1, 0, 0))
    assert sent.trusts("")


@pytest.mark.parametrize(
    "text",
    [
        "tcp://*:9?proxy=any&proxy_from=10.0.0.0/8,::1",
        "unix:/s?mode=600&proxy=v1&tls=off",
        "fd://3?proxy=v2",
        "fd://3?tls=off",
    ],
)
def test_an_endpoint_shows_its_options(text: str) -> None:
    assert str(aioecho.serve(Tell, text).endpoints[0]) == text


# Datagrams


class TellDatagram(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        version = self.request[1].get_extra_info("proxy").version
        await self.reply(f"{self.client_address} v{version} ".encode() + self.data)


class TellSession(aioecho.DatagramSessionHandler):
    async def handle(self) -> None:
        count = 0
        async for data in self.datagrams:
            count += 1
            await self.reply(f"{self.client_address} {count} ".encode() + data)


class TellDatagramBlocking(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        data, sock = self.request
        self.wfile.write(f"{self.client_address} v{sock.proxy.version} ".encode() + data)


class Balancer:
    """A socket that sends a server datagrams as a balancer does."""

    def __init__(self, server: aioecho.BaseServer) -> None:
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.connect(server.server_address)

    async def ask(self, data: bytes) -> bytes:
        self.sock.send(data)
        return await asyncio.get_running_loop().run_in_executor(None, self._receive)

    def _receive(self) -> bytes:
        self.sock.settimeout(10)
        return self.sock.recv(2**16)

    def __enter__(self) -> "Balancer":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


@pytest.mark.parametrize("Handler", [TellDatagram, TellDatagramBlocking])
@pytest.mark.parametrize("host", ["127.0.0.1", ""])
async def test_a_datagrams_handler_sees_the_client_and_replies_by_the_balancer(Handler: Any, host: str) -> None:
    async with aioecho.UDPServer((host, 0), Handler, proxy=HERE) as server:
        with Balancer(server) as balancer:
            assert await balancer.ask(binary(family=0x12) + b"one") == b"%b v2 one" % str(CLIENT).encode()
            assert await balancer.ask(LINE + b"two") == b"%b v1 two" % str(CLIENT).encode()  # nginx says TCP4
            here = str(balancer.sock.getsockname()).encode()
            assert await balancer.ask(LOCAL + b"three") == b"%b v2 three" % here
        assert server.stats.received == 3


async def test_sessions_are_of_a_client_behind_a_balancer() -> None:
    async with aioecho.UDPServer(ANYWHERE, TellSession, proxy=HERE) as server:
        with Balancer(server) as one, Balancer(server) as other:
            first, second = binary("192.0.2.1", family=0x12), binary("192.0.2.2", family=0x12)
            replies = [await one.ask(first + b"a"), await one.ask(second + b"b"), await one.ask(first + b"c")]
            assert replies == [b"('192.0.2.1', 40000) 1 a", b"('192.0.2.2', 40000) 1 b", b"('192.0.2.1', 40000) 2 c"]
            assert await other.ask(first + b"d") == b"('192.0.2.1', 40000) 1 d"
        assert len(server.connections) == 3
        await server.shutdown(0)


async def test_datagrams_without_an_acceptable_header_are_dropped() -> None:
    proxy = aioecho.ProxyProtocol(trusted=["127.0.0.1"], versions=(2,))
    sent = {**REJECTED, "truncated": binary() + bytes(1000)}
    limits = aioecho.Limits(max_datagram=1000)
    async with aioecho.UDPServer(ANYWHERE, TellDatagram, proxy=proxy, limits=limits) as server:
        with Balancer(server) as balancer:
            for data in sent.values():
                balancer.sock.send(data)
            balancer.sock.send(binary()[:20])
            await settle(lambda: sum(server.stats.drops.values()) == len(sent) + 1)
            assert server.stats.drops == {**dict.fromkeys(sent, 1), "proxy malformed": 2}
            assert await balancer.ask(binary() + b"x")
    async with aioecho.UDPServer(ANYWHERE, TellDatagram, proxy=aioecho.ProxyProtocol(trusted=["10.0.0.0/8"])) as server:
        with Balancer(server) as balancer:
            balancer.sock.send(binary() + b"x")
            await settle(lambda: server.stats.drops == {"proxy untrusted": 1})


async def test_a_limit_per_host_counts_the_clients_of_datagrams() -> None:
    limits = aioecho.Limits(max_per_host=1)
    async with aioecho.UDPServer(ANYWHERE, TellSession, proxy=HERE, limits=limits) as server:
        with Balancer(server) as balancer:
            for port in (1, 2):
                balancer.sock.send(binary(port=port, family=0x12))
            await settle(lambda: server.stats.drops == {"per host": 1})
            assert await balancer.ask(binary("192.0.2.9", family=0x12))
        await server.shutdown(0)


# Together with the lists of networks, and with the access log


@BOTH
@pytest.mark.parametrize("lists", [{"allow": ["192.0.2.0/24"]}, {"deny": ["127.0.0.0/8", "203.0.113.0/24"]}])
async def test_the_networks_judge_the_client_and_not_its_balancer(Handler: Any, lists: Any) -> None:
    async with serving(Handler, **lists) as server:
        assert (await ask(server, LINE + b"x\n")).endswith(b" v1 x\n")
        assert await end_of(server, LINE.replace(b"192.0.2.1", b"203.0.113.1") + b"x\n") == "not allowed"
        assert await end_of(server, binary("203.0.113.1")) == "not allowed"
        assert await end_of(server, LOCAL) == "probe"  # the balancer speaks for itself
        assert server.stats.rejected == 2


async def test_a_client_without_an_address_is_in_no_network_that_is_allowed() -> None:
    async with serving(allow=["192.0.2.0/24"]) as server:
        assert await end_of(server, binary("0.0.0.0")) == "not allowed"


async def test_the_networks_judge_the_clients_of_datagrams() -> None:
    async with aioecho.UDPServer(ANYWHERE, TellDatagram, proxy=HERE, allow=["192.0.2.0/24"]) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(server.server_address)
            sock.send(binary("203.0.113.1", family=0x12) + b"x")
            sock.send(binary(family=0x12) + b"x")
            sock.send(LOCAL + b"x")
            await settle(lambda: server.stats.handled == 2)
        assert server.stats.drops == {"not allowed": 1}


@BOTH
@pytest.mark.parametrize("with_tls", [False, True])
async def test_the_access_log_counts_what_comes_behind_the_header(
    Handler: Any, with_tls: bool, tls: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioecho.access")

    def records() -> list[Any]:
        return [record for record in caplog.records if record.name == "aioecho.access"]

    async with serving(Handler, access_log=True, ssl=tls.server if with_tls else None) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        writer.write(LINE)
        await settle(lambda: server.connections and next(iter(server.connections)).client_address == CLIENT)
        if with_tls:
            await writer.start_tls(tls.client, server_hostname="127.0.0.1")
        writer.write(b"hello\n")
        answer = await reader.readline()
        await close(writer)
        await settle(records)
        name = server.names[0]
    [record] = records()
    assert record.getMessage().split()[:2] == ["192.0.2.1:40000", name]
    assert (record.client_address, record.endpoint, record.reason) == (CLIENT, name, "finished")
    assert (record.tls_seconds is not None) == with_tls
    if with_tls and Handler is TellBlocking:  # whose bytes are not counted
        assert (record.bytes_in, record.bytes_out, record.first_byte_seconds) == (0, 0, None)
    else:
        assert (record.bytes_in, record.bytes_out) == (6, len(answer))
        # uvloop's clock ticks once a millisecond: no more can be said of a time that is as short.
        assert 0 <= record.first_byte_seconds <= record.seconds


@BOTH
async def test_with_the_header_in_the_same_segment_the_payload_alone_is_counted(
    Handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aioecho.access")
    async with serving(Handler, access_log=True) as server:
        answer = await ask(server, LINE + b"hello\n")
        assert await end_of(server, LINE) == "probe"
    [record] = [record for record in caplog.records if record.name == "aioecho.access"]  # none of the probe
    assert (record.bytes_in, record.bytes_out, record.outcome) == (6, len(answer), "completed")
    assert 0 <= record.first_byte_seconds <= record.seconds


@BOTH
async def test_a_measured_server_reads_headers_too(Handler: Any) -> None:
    async with serving(Handler) as server:
        server.metrics()
        answer = await ask(server, LINE + b"hello\n")
        assert answer.endswith(b"hello\n")
        assert await end_of(server, LINE) == "probe"


# What is malformed


def mutated(random: Random) -> bytes:
    """Return a header that is wrong in some way, mostly."""
    header = bytearray(
        random.choice((LINE, binary(), LOCAL, with_checksum(binary(tlvs=tlv(5, b"id"))), b"PROXY UNKNOWN\r\n"))
    )
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(header) or 1)
        match random.randrange(4):
            case 0:
                header[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                del header[at : at + random.randint(1, 9)]
            case 2:
                header[at:at] = random.randbytes(random.randint(1, 9))
            case 3:
                header[at:] = b""
    return bytes(header)


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_to_read_what_is_missing_takes_no_byte_of_what_follows(number: int) -> None:
    random = Random(number)
    for _ in range(100):  # of each number: 10,000 in all
        data = mutated(random) + b"what follows"
        received = b""
        with contextlib.suppress(ProxyHeaderError):
            while (header := parse(received)) is None:
                missing = find_missing(received)
                assert missing > 0
                received += data[len(received) : len(received) + missing]
                if len(received) == len(data):
                    break
            else:
                assert len(received) == header.size


@BOTH
async def test_no_malformed_header_is_accepted_or_keeps_a_place(Handler: Any) -> None:
    random = Random(18)
    accepted = []
    limits, timeouts = aioecho.Limits(max_connections=50), aioecho.Timeouts(proxy=0.2)
    async with serving(Handler, limits=limits, timeouts=timeouts) as server:
        server.verify_request = lambda request, address: accepted.append(address) or True  # type: ignore[func-returns-value,method-assign]
        expected = 0

        async def send(data: bytes) -> None:
            nonlocal expected
            with contextlib.suppress(ProxyHeaderError):
                expected += parse(data) is not None
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(*server.server_address)
                writer.write(data)
                try:
                    await asyncio.wait_for(reader.read(1), 0.4 if random.random() < 0.2 else 0.01)
                except TimeoutError:
                    pass
                finally:
                    await close(writer)

        for _ in range(10):
            await asyncio.gather(*(send(mutated(random)) for _ in range(50)))
        await settle(lambda: not server.connections)
        assert len(accepted) <= expected
        more_than(expected - 1, len(accepted), "valid headers")  # on a busy machine one may be read too late
        assert server.stats.failed == 0
        assert set(server.stats.reasons) > {"proxy missing", "proxy malformed", "proxy timeout"}


# The shell, and workers


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--proxy-protocol", "v1"], "no balancer is trusted to send PROXY headers to tcp://127.0.0.1:9999"),
        (["--proxy-allow-from", "10.0.0.0/8"], "--proxy-allow-from goes with --proxy-protocol"),
        (["--proxy-protocol", "any", "--proxy-allow-from", "10.0.0.0/8,,x"], "--proxy-allow-from has ''"),
        (["--bind", "tcp://*:0?proxy=v2"], "no balancer is trusted to send PROXY headers to tcp://*:0"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(arguments: list[str], complaint: str) -> None:
    check_mistake(invoke("serve", *arguments), complaint)


SERVES_TELL = """
import socketserver
import aioecho
class Tell(aioecho.StreamRequestHandler):
    async def handle(self):
        header = self.writer.get_extra_info("proxy")
        async for line in self.reader:
            await self.send(repr((self.client_address, header and header.version)).encode() + line)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_the_command_line_serves_behind_a_balancer(workers: int, tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(SERVES_TELL)
    with Program.aioecho(
        *("serve", "tell:Tell", "--workers", str(workers), "--proxy-protocol", "any"),
        *("--proxy-allow-from", "10.0.0.0/8,127.0.0.1", "--bind", "tcp://127.0.0.1:0"),
        *("--bind", f"unix:{tmp_path}/s", "--bind", "tcp://127.0.0.1:0?proxy=v2&proxy_from=127.0.0.0/8"),
        cwd=tmp_path,
    ) as server:
        first, path, second = (server.listening() for _ in range(3))
        for endpoint in (first, path):
            assert ask_program(endpoint, LINE + b"x\n") == b"(('192.0.2.1', 40000), 1)x\n"
            assert ask_program(endpoint, binary() + b"x\n") == b"(('192.0.2.1', 40000), 2)x\n"
        assert ask_program(second, binary() + b"x\n") == b"(('192.0.2.1', 40000), 2)x\n"
        with contextlib.suppress(OSError):
            assert ask_program(second, LINE) == b""
        assert server.stop() == 0
        assert "WARNING" not in server.stderr()


# Real balancers

HAPROXY = shutil.which("haproxy", path=os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin")))
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")


def free_port() -> int:
    with socket.create_server(ANYWHERE) as sock:
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def haproxy(folder: Path, sections: str) -> Iterator[None]:
    """Run HAProxy until the end of the block."""
    (folder / "haproxy.cfg").write_text(
        "global\n  maxconn 100\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 30s\n  timeout server 30s\n"
        + sections
    )
    assert HAPROXY is not None
    with Program(HAPROXY, "-db", "-f", folder / "haproxy.cfg") as program:
        yield
        program.stop()


async def connect_when_there(port: int, **options: Any) -> Any:
    for _ in range(500):
        with contextlib.suppress(OSError):
            return await asyncio.open_connection("127.0.0.1", port, **options)
        await asyncio.sleep(0.01)
    raise AssertionError("nothing listens there")


@needs_haproxy
@BOTH
@pytest.mark.parametrize(("option", "version"), [("send-proxy", 1), ("send-proxy-v2", 2)])
async def test_haproxys_clients_are_seen(Handler: Any, option: str, version: int, tmp_path: Path) -> None:
    async with serving(Handler) as server:
        port, back = free_port(), server.server_address[1]
        with haproxy(tmp_path, f"listen l\n  bind 127.0.0.1:{port}\n  server s 127.0.0.1:{back} {option}\n"):
            reader, writer = await connect_when_there(port)
            writer.write(b"hello\n")
            client = str(writer.get_extra_info("sockname")).encode()
            assert await reader.readline() == b"%b v%d hello\n" % (client, version)
            await close(writer)


@needs_haproxy
async def test_haproxy_tells_of_tls_and_its_unique_id(tls: SimpleNamespace, tmp_path: Path) -> None:
    headers: list[Any] = []

    async def tell(self: Any) -> None:
        headers.append(self.writer.get_extra_info("proxy"))
        await self.send(await self.reader.readline())

    async with serving(handler(tell), ssl=tls.server) as server:
        port, back = free_port(), server.server_address[1]
        with haproxy(
            tmp_path,
            f"listen l\n  bind 127.0.0.1:{port} ssl crt {tls.files.server} ca-file {tls.files.ca} verify optional alpn x\n"
            "  unique-id-format %ci-%cp\n"
            f"  server s 127.0.0.1:{back} ssl verify none send-proxy-v2-ssl-cn"
            " proxy-v2-options cert-key,cert-sig,ssl-cipher,authority,crc32c,unique-id\n",
        ):
            for context, name in ((tls.client, None), (tls.known_client, "client@example.org")):
                reader, writer = await connect_when_there(port, ssl=context, server_hostname="localhost")
                writer.write(b"hello\n")
                assert await reader.readline() == b"hello\n"
                host, number = writer.get_extra_info("sockname")
                await close(writer)
                header = headers[-1]
                assert header.source == (host, number)
                assert header.unique_id == f"{host}-{number}".encode()
                assert header.authority == "localhost"
                assert header.has_checksum
                assert (header.tls.version, header.tls.is_tls, header.tls.is_verified) == (
                    "TLSv1.3",
                    True,
                    name is not None,
                )
                assert header.tls.cipher.startswith("TLS_")
                assert name is None or name in (header.tls.common_name or name)


@needs_haproxy
@BOTH
@pytest.mark.parametrize("with_tls", [False, True])
async def test_haproxys_health_checks_are_probes(
    Handler: Any, with_tls: bool, tls: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Handler, ssl=tls.server if with_tls else None) as server:
        back = server.server_address[1]
        # A check lasts as long at the most: cut off in its TLS handshake it would be one that has failed.
        every = "300ms" if with_tls else "50ms"
        check = f"check inter {every} fastinter {every} downinter {every}"
        servers = [f"{check} send-proxy", f"{check} send-proxy-v2", f"{check} check-send-proxy send-proxy-v2"]
        if with_tls:
            servers += [f"{each} ssl verify none" for each in servers]
        lines = "".join(f"  server s{number} 127.0.0.1:{back} {each}\n" for number, each in enumerate(servers))
        with haproxy(tmp_path, f"listen l\n  bind 127.0.0.1:{free_port()}\n{lines}"):
            await settle(lambda: server.stats.reasons["probe"] >= 50)
            # Before the balancer is ended, maybe in the middle of a handshake.
            assert set(server.stats.reasons) == {"probe"}
            assert (server.stats.failed, server.stats.rejected) == (0, 0)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
