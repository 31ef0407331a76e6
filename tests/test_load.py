"""The load generator: what it sends, how it judges replies, what it counts, and what its command does with that."""

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time

import pytest
from timing import in_time, more_than

pytest.importorskip("rich")

from click.testing import CliRunner
from helpers import needs_ipv6
from hypothesis import given
from hypothesis import strategies as st

import aioecho
from aioecho.cli.load import load_command
from aioecho.echo import EchoFrames
from aioecho.framing import (
    COBS,
    SLIP,
    ContentLength,
    Delimited,
    FixedSize,
    Framing,
    LengthPrefixed,
    Lines,
    Netstrings,
    OctetCounted,
    Varint,
    parse_framing,
)
from aioecho.load.hdr_log import encode_histogram
from aioecho.load.latencies import Latencies
from aioecho.load.messages import make_pool
from aioecho.load.plot import write_plot
from aioecho.load.report import Condition, remarks, write_hdr
from aioecho.load.run import LoadResult, LoadSettings, load
from aioecho.load.settings import parse_target


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    context = None

    def get_request(self):
        sock, address = super().get_request()
        if self.context:
            sock = self.context.wrap_socket(sock, server_side=True)
        return sock, address

    def handle_error(self, request, client_address):
        pass

    @property
    def endpoint(self):
        host, port = self.server_address[:2]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


class IPv6Server(Server):
    address_family = socket.AF_INET6


class UnixServer(Server):
    address_family = socket.AF_UNIX

    @property
    def endpoint(self):
        return f"unix:{self.server_address}"


@contextlib.contextmanager
def serving(handle, server_class=Server, address=("127.0.0.1", 0), context=None):
    """Serve `handle(sock)` in threads of its own."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with contextlib.suppress(OSError):
                handle(self.request)

    with server_class(address, Handler) as server:
        server.context = context
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)


def run(endpoint, **options):
    options = {"connections": 3, "duration_s": 0.15, "warmup_s": 0.05, "timeout_s": 2} | options
    return load(LoadSettings(endpoint=endpoint, **options))


def check_count(sent, rate, duration_s):
    """Check how many messages an open loop has sent, or counted as lost: all that fell due, however late it was itself."""
    assert sent == pytest.approx(rate * duration_s, abs=2)


def test_what_falls_due_while_the_generator_itself_stands_still_is_sent_and_late():
    def stand_still(progress):
        if progress.phase == "measuring":
            time.sleep(0.5)  # beyond the end

    with serving(echo) as server:
        settings = LoadSettings(endpoint=server.endpoint, connections=3, rate=500, duration_s=0.4, warmup_s=0.05)
        result = load(settings, on_progress=stand_still)
    check_count(result.messages, 500, 0.4)
    assert result.errors == 0
    assert result.max_us > 100_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 5},
        {"size_bytes": 1},
        {"size_bytes": 300_000, "depth": 2, "duration_s": 0.3},
        {"lines": True},
        {"lines": True, "size_bytes": 1},
        {"churn": True},
        {"rate": 500.0},
        {"rate": 500.0, "depth": 3, "size_bytes": 5000},
        {"rate": 300.0, "churn": True},
    ],
    ids=str,
)
def test_an_echo_server_gives_a_clean_result(options):
    with serving(echo) as server:
        result = run(server.endpoint, **options)
    assert result.problem is None
    assert result.errors == 0
    more_than(20, result.messages)
    assert 0 < result.min_us <= result.p50_us <= result.p99_us <= result.p9999_us <= result.max_us
    assert result.bytes_received == pytest.approx(result.achieved_rate * result.measured_s * result.size_bytes, rel=0.5)
    if "rate" in options:
        assert result.mode == "open"
        check_count(result.messages, options["rate"], 0.15)
        assert result.offered_rate == options["rate"]
        assert result.corrected_p99_us is None
    else:
        assert result.mode == "closed"
        # What the correction adds to a few long ones is shorter than they: so it may be less than the p99 itself.
        assert result.corrected_p99_us >= result.p50_us


def test_unix_endpoints_are_loaded(tmp_path):
    with serving(echo, UnixServer, str(tmp_path / "s")) as server:
        assert run(server.endpoint).errors == 0
        more_than(20, run(server.endpoint, churn=True).messages)


@needs_ipv6
def test_ipv6_endpoints_are_loaded():
    with serving(echo, IPv6Server, ("::1", 0)) as server:
        assert run(server.endpoint).errors == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "two.example").configure_cert(context)
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return context, str(path)


@pytest.mark.parametrize("options", [{}, {"churn": True}, {"size_bytes": 200_000}, {"rate": 200.0}], ids=str)
def test_tls_is_spoken_and_verified(certificates, options):
    context, ca_file = certificates
    with serving(echo, context=context) as server:
        result = run(server.endpoint, tls=True, ca_file=ca_file, **options)
    assert (result.problem, result.errors) == (None, 0)
    more_than(5, result.messages)


def test_a_certificate_nobody_vouches_for_is_a_connect_error(certificates):
    with serving(echo, context=certificates[0]) as server:
        result = run(server.endpoint, tls=True)
    assert result.errors_connect == 3
    assert "CERTIFICATE_VERIFY_FAILED" in result.problem


def test_several_processes_share_the_load_and_add_up():
    with serving(echo) as server:
        result = run(server.endpoint, processes=2, connections=5, rate=1000.0, duration_s=0.5)
        assert (result.problem, result.errors) == (None, 0)
        check_count(result.messages, 1000, 0.5)
        assert sum(result.latencies.counts.values()) == result.messages


def test_processes_that_cannot_connect_say_so():
    result = run("tcp://127.0.0.1:1", processes=2)
    assert "refused" in result.problem
    assert result.messages == 0


# Replies that are not what was sent.


def stale(sock):
    previous = b""
    while data := sock.recv(64):
        sock.sendall(previous or data)
        previous = data


def flipped(sock):
    for count in range(1_000_000):
        data = sock.recv(64)
        sock.sendall(data if count < 50 else data[:-1] + bytes([data[-1] ^ 1]))


def twice(sock):
    while data := sock.recv(64):
        sock.sendall(data * 2)


def banner(sock):
    sock.sendall(b"220 ready\r\n")
    echo(sock)


@pytest.mark.parametrize("handle", [stale, flipped, twice, banner])
def test_wrong_bytes_are_noticed(handle):
    with serving(handle) as server:
        result = run(server.endpoint)
    assert result.errors_wrong_bytes == result.errors > 0
    assert "wrong bytes" in result.problem


def test_replies_swapped_between_connections_are_noticed():
    barrier, held = threading.Barrier(2), {}

    def swap(sock):
        mine = sock.recv(64)
        held[len(held)] = mine
        barrier.wait(30)
        sock.sendall(held[0] if mine is held[1] else held[1])

    with serving(swap) as server:
        result = run(server.endpoint, connections=2)
    assert result.errors_wrong_bytes == 2


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("size", [1, 2, 64, 4096, 1_000_000])
def test_the_pool_holds_whole_different_messages_and_repeats_its_start(size, lines):
    pool, period = make_pool(size, lines)
    assert period % size == 0
    assert pool[period:] == (pool * 3)[: len(pool) - period]
    messages = [pool[i : i + size] for i in range(0, min(period, size * 64), size)]
    if lines:
        assert all(message.endswith(b"\n") and message.count(b"\n") == 1 for message in messages)
    if size >= 64:
        assert len(set(messages)) == len(messages)


# Frames.


@contextlib.contextmanager
def serving_frames(framing, **options):
    handler = type("Framed", (EchoFrames,), {"framing": framing})
    with aioecho.run_in_thread(handler, "tcp://127.0.0.1:0", **options) as server:
        yield server.names[0]


@pytest.mark.parametrize(
    "framing",
    [
        Lines(),
        Delimited(b"\x1c\r", start=b"\x0b"),
        Delimited(b"x"),
        LengthPrefixed(2),
        LengthPrefixed(2, offset=4, strip=False),
        FixedSize(64),
        Varint(),
        Netstrings(),
        OctetCounted(),
        ContentLength(),
        SLIP(),
        COBS(),
    ],
    ids=repr,
)
def test_every_framing_is_loaded(framing):
    with serving_frames(framing) as endpoint:
        result = run(endpoint, framing=framing, depth=3)
    assert (result.problem, result.errors) == (None, 0)
    more_than(20, result.messages)
    assert parse_framing(result.framing) == framing


@pytest.mark.parametrize(
    "options",
    [
        {"size_bytes": 1},
        {"size_bytes": 300_000, "depth": 2},
        {"churn": True},
        {"rate": 500.0},
        {"rate": 500.0, "depth": 3, "size_bytes": 5000},
        {"rate": 300.0, "churn": True},
        {"processes": 2, "connections": 2},
    ],
    ids=str,
)
def test_frames_are_loaded_in_every_way(options):
    with serving_frames(SLIP(), limits=aioecho.Limits(max_buffer=2**21)) as endpoint:
        result = run(endpoint, framing=SLIP(), **options)
    assert (result.problem, result.errors) == (None, 0)
    if "rate" in options:
        check_count(result.messages, options["rate"], 0.15)
    else:
        more_than(2, result.messages)


def test_frames_are_loaded_over_tls(certificates):
    context, ca_file = certificates
    with serving(echo, context=context) as server:
        result = run(server.endpoint, framing=LengthPrefixed(4), tls=True, ca_file=ca_file)
    assert (result.problem, result.errors) == (None, 0)
    more_than(20, result.messages)


def slip_without_leading_end(sock):
    """Answer as SLIP implementations do that write END only after a packet: other bytes, the same frames."""
    buffer = bytearray()
    while data := sock.recv(65536):
        buffer += data
        frames, used, _ = SLIP().split(buffer)
        del buffer[:used]
        sock.sendall(b"".join(SLIP().join(frame)[1:] for frame in frames))


@pytest.mark.parametrize("depth", [1, 4])
def test_a_reply_is_the_frame_and_not_the_bytes_it_takes(depth):
    with serving(slip_without_leading_end) as server:
        result = run(server.endpoint, framing=SLIP(), depth=depth)
    assert (result.problem, result.errors) == (None, 0)
    more_than(20, result.messages)


def in_pieces(sock):
    """Answer byte by byte."""
    while data := sock.recv(65536):
        for byte in data:
            sock.sendall(bytes((byte,)))


def test_a_reply_may_come_in_pieces():
    with serving(in_pieces) as server:
        result = run(server.endpoint, framing=Netstrings(), connections=1)
    assert (result.problem, result.errors) == (None, 0)
    more_than(2, result.messages)


def other_frame(sock):
    while sock.recv(65536):
        sock.sendall(b"64:" + b"x" * 64 + b",")


def longer_frame(sock):
    while sock.recv(65536):
        sock.sendall(b"99999:")


def twice_the_frame(sock):
    while data := sock.recv(65536):
        sock.sendall(data * 2)


def half_more(sock):
    while data := sock.recv(65536):
        sock.sendall(data + data[:10])


def no_frame(sock):
    while sock.recv(65536):
        sock.sendall(b"hello\n")


@pytest.mark.parametrize(
    ("handle", "said"),
    [
        (other_frame, "expected the frame b"),
        (longer_frame, "frame of 99999 bytes, over the limit of 64 bytes"),
        (twice_the_frame, "more than it was sent"),
        (half_more, "more than it was sent"),
        (no_frame, "the peer sent no length"),
    ],
)
def test_frames_that_are_wrong_are_noticed(handle, said):
    with serving(handle) as server:
        result = run(server.endpoint, framing=Netstrings())
    assert result.errors_wrong_bytes == result.errors > 0
    assert said in result.problem


class Overlooks(Framing):
    """A framing that finds no end and does not look at its max_size."""

    def split(self, buffer, scanned=0):
        return ([], 0, len(buffer) + 1) if len(buffer) > 64 else ([bytes(buffer)], len(buffer), len(buffer) + 1)

    def join(self, frame):
        return frame


def test_a_framing_that_overlooks_its_limit_does_not_buffer_for_ever():
    with serving(lambda sock: echo_much(sock)) as server:
        result = run(server.endpoint, framing=Overlooks())
    assert result.errors_wrong_bytes == result.errors > 0
    assert "over the limit" in result.problem


def echo_much(sock):
    while sock.recv(65536):
        sock.sendall(bytes(10**6))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"framing": FixedSize(8)}, "framing fixed:8 has no frames of 64 bytes: a frame must have 8 bytes, not 64"),
        ({"framing": Lines(max_size=10)}, "has no frames of 64 bytes"),
        ({"framing": Delimited(b"1")}, None),
        ({"framing": Lines(), "lines": True}, "lines and framing exclude one another"),
        ({"framing": Lines(), "endpoint": "udp://127.0.0.1:1"}, "framing is for streams"),
    ],
    ids=str,
)
def test_a_framing_that_cannot_be_loaded_with_is_refused(options, said):
    if said is None:  # digits need not be among what it is made of
        LoadSettings(**{"endpoint": "unix:x", **options})
        return
    with pytest.raises(ValueError, match=re.escape(said)):
        LoadSettings(**{"endpoint": "unix:x", **options})


def test_the_command_loads_with_a_framing(tmp_path, monkeypatch):
    (tmp_path / "loads_framing.py").write_text("from aioecho.framing import LengthPrefixed\nMINE = LengthPrefixed(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    with serving_frames(LengthPrefixed(3)) as endpoint:
        for text in ("length:3", "loads_framing:MINE"):
            outcome = invoke(endpoint, "--framing", text, "-t", 0.2, "--warmup", 0, "--json", tmp_path / "r.json")
            assert outcome.exit_code == 0, outcome.output
            assert "frames (length:3) of 64 bytes" in outcome.stdout
            assert json.loads((tmp_path / "r.json").read_text())["framing"] == "length:3"


# Servers that fail.


def test_a_server_that_is_not_there_is_a_connect_error():
    result = run("tcp://127.0.0.1:1")
    assert result.errors_connect == result.errors == 3
    assert result.problem == "connect: Connection refused"
    assert (result.messages, result.p99_us) == (0, None)


def test_a_server_that_closes_early_is_told_from_one_that_resets():
    def close_after_100(sock):
        for _ in range(100):
            sock.sendall(sock.recv(64))
        sock.recv(64)

    def reset_after_100(sock):
        for _ in range(100):
            sock.sendall(sock.recv(64))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()  # here, for socketserver would shut it down first, which a client sees as an orderly end

    with serving(close_after_100) as server:
        closed = run(server.endpoint, warmup_s=0, duration_s=20)
    with serving(reset_after_100) as server:
        reset = run(server.endpoint, warmup_s=0)
    assert closed.errors_closed_early == closed.errors == 3
    assert reset.errors_reset == reset.errors == 3
    assert closed.messages > 0, "what was measured so far is reported"
    assert closed.measured_s < 10
    assert "last connection was lost" in closed.problem


@pytest.mark.parametrize("size_bytes", [64, 4096, 300_000])
def test_an_end_that_comes_together_with_a_reply_is_seen_at_once(size_bytes):
    def end_after_the_third(sock):
        for _ in range(3):
            sock.sendall(sock.recv(size_bytes, socket.MSG_WAITALL))
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    with serving(end_after_the_third) as server:
        result = run(server.endpoint, warmup_s=0, size_bytes=size_bytes, duration_s=20, timeout_s=20)
    assert result.errors_closed_early == result.errors == 3
    assert result.measured_s < 5


def test_a_message_without_a_reply_times_out():
    def answer_once(sock):
        sock.sendall(sock.recv(64))
        while sock.recv(64):
            pass

    with serving(answer_once) as server:
        result = run(server.endpoint, timeout_s=0.2, warmup_s=0)
    assert result.errors_timed_out == result.errors == 3


def test_open_loop_counts_what_was_due_and_never_answered():
    def answer_once(sock):
        sock.sendall(sock.recv(64))
        while sock.recv(64):
            pass

    with serving(answer_once) as server:
        result = run(server.endpoint, rate=100.0, timeout_s=1, warmup_s=0, duration_s=0.5)
    assert result.messages == 0
    check_count(result.errors_timed_out, 100, 0.5)


def test_churn_goes_on_after_a_lost_connection_and_gives_up_when_all_fail():
    taken = 0

    def refuse_some(sock):
        nonlocal taken
        taken += 1
        if taken % 20:
            sock.sendall(sock.recv(64))

    def refuse_from_the_tenth(sock):
        nonlocal taken
        taken += 1
        if taken < 10:
            sock.sendall(sock.recv(64))

    with serving(refuse_some) as server:
        result = run(server.endpoint, churn=True, duration_s=0.6)
    more_than(20, result.messages)
    assert result.errors_closed_early + result.errors_reset == result.errors > 1
    taken = 0
    with serving(refuse_from_the_tenth) as server:
        result = run(server.endpoint, churn=True, connections=20, duration_s=20)
    assert "in a row failed" in result.problem
    assert result.measured_s < 10


def stalling(seconds):
    """An echo that is shared by all connections and stands still once, 0.25 s after the first message."""
    lock, began = threading.Lock(), []

    def handle(sock):
        while data := sock.recv(64):
            with lock:
                began.append(time.monotonic())
                if began[0] + 0.25 < began[-1] and began[0] > 0:
                    began[0] = 0
                    threading.Event().wait(seconds)
            sock.sendall(data)

    return handle


@pytest.mark.timed
def test_a_stall_shows_in_the_p99_of_an_open_loop():
    with serving(stalling(0.5)) as server:
        result = run(server.endpoint, connections=4, rate=500.0, duration_s=1.25)
    assert result.errors == 0
    check_count(result.messages, 500, 1.25)
    assert result.p99_us > 400_000
    assert result.p90_us > 200_000, "250 of 625 messages fell due during the stall"
    in_time(result.p99_us, 650_000)
    in_time(result.p50_us, 100_000)


@pytest.mark.alike
@pytest.mark.exclusive
def test_a_stall_hides_in_a_closed_loop_which_says_so():
    with serving(stalling(0.5)) as server:
        result = run(server.endpoint, connections=4, duration_s=1.25)
    assert result.max_us > 450_000
    in_time(4 / result.messages, 0.01, "the share of the four that were slow")
    assert result.corrected_p99_us > 250_000
    [said] = [remark for remark in remarks(result) if "closed loop hides" in remark]
    assert "at most 4 slow messages" in said
    assert f"{result.corrected_p99_us:,.0f} us" in said
    in_time(result.p99_us, 100_000)


# Datagrams.


@contextlib.contextmanager
def serving_datagrams(answer, family=socket.AF_INET, address=("127.0.0.1", 0)):
    """Serve by `answer(data, peer, send)` in an asyncio.DatagramProtocol; give the endpoint."""

    class Protocol(asyncio.DatagramProtocol):
        def connection_made(self, transport):
            self.transport = transport

        def datagram_received(self, data, peer):
            answer(data, peer, self.transport.sendto)

    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.bind(address)
    loop = asyncio.new_event_loop()
    transport, _ = loop.run_until_complete(loop.create_datagram_endpoint(Protocol, sock=sock))
    thread = threading.Thread(target=loop.run_forever)
    name = f"unixgram:{address}" if family == socket.AF_UNIX else f"udp://127.0.0.1:{sock.getsockname()[1]}"
    thread.start()
    try:
        yield name
    finally:
        loop.call_soon_threadsafe(transport.close)
        loop.call_soon_threadsafe(loop.call_soon, loop.stop)
        thread.join()
        loop.close()


def echo_datagram(data, peer, send):
    send(data, peer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 5},
        {"size_bytes": 8},
        {"size_bytes": 65_507},
        {"rate": 500.0},
        {"rate": 500.0, "depth": 3, "processes": 2},
    ],
    ids=str,
)
def test_a_datagram_echo_gives_a_clean_result(options):
    with serving_datagrams(echo_datagram) as endpoint:
        result = run(endpoint, **options)
    assert (result.problem, result.errors, result.late_replies, result.duplicate_replies) == (None, 0, 0, 0)
    more_than(20, result.messages)
    assert 0 < result.min_us <= result.p50_us <= result.p99_us <= result.max_us
    if "rate" in options:
        check_count(result.messages, options["rate"], 0.15)
    else:
        assert result.bytes_received == pytest.approx(result.messages * result.size_bytes, rel=0.5)


def test_unix_datagram_sockets_are_loaded(tmp_path):
    with serving_datagrams(echo_datagram, socket.AF_UNIX, str(tmp_path / "s")) as endpoint:
        result = run(endpoint)
        assert (result.problem, result.errors) == (None, 0)
        more_than(20, result.messages)
        # More than the ten that wait in the server's queue: the generator waits for room.
        assert run(endpoint, connections=40).errors == 0
        # A Unix datagram may be longer than one of UDP.
        result = run(endpoint, size_bytes=100_000, connections=1)
        assert (result.problem, result.errors) == (None, 0)


def test_a_lost_datagram_times_out_and_its_slot_goes_on():
    count = 0

    def lose_some(data, peer, send):
        nonlocal count
        count += 1
        if count % 50:
            send(data, peer)

    with serving_datagrams(lose_some) as endpoint:
        result = run(endpoint, timeout_s=0.05, duration_s=1)
        assert result.errors_timed_out == result.errors > 3
        more_than(100, result.messages, "messages that were not lost")
        assert result.problem == "messages were lost: timed out: no reply within 0.05 s"
        result = run(endpoint, timeout_s=0.1, rate=500.0, duration_s=0.5)
        check_count(result.messages + result.errors_timed_out, 500, 0.5)


def test_a_reply_that_comes_twice_or_late_is_counted_as_that():
    held = []

    def twice(data, peer, send):
        send(data, peer)
        send(data, peer)

    def late_once(data, peer, send):
        if len(held) < 3:
            held.append((data, peer))
        elif len(held) == 3 and peer == held[0][1]:  # its slot goes on, so its time is over
            for one in held:
                send(*one)
            held.append(None)
        if len(held) > 3:
            send(data, peer)

    with serving_datagrams(twice) as endpoint:
        result = run(endpoint)
    assert (result.errors, result.late_replies) == (0, 0)
    assert result.duplicate_replies >= result.messages - 3
    assert "to datagrams that had been answered" in " ".join(remarks(result))

    def answer_first_then_late(data, peer, send):
        if peer in known:
            late_once(data, peer, send)
        else:
            known.add(peer)
            send(data, peer)

    known = set()
    with serving_datagrams(answer_first_then_late) as endpoint:
        result = run(endpoint, timeout_s=0.05, duration_s=1.5, warmup_s=0)
    in_time(result.errors_timed_out, 4, "the number of those that had no reply within 0.05 s")
    assert result.late_replies == result.errors_timed_out == result.errors == 3
    more_than(20, result.messages)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: b"\xff" * 64,
    ],
)
def test_wrong_datagrams_are_noticed(spoil):
    with serving_datagrams(lambda data, peer, send: send(spoil(data), peer)) as endpoint:
        result = run(endpoint)
    assert result.errors_wrong_bytes == result.errors >= 3
    assert "wrong bytes: expected b" in result.problem


def test_datagrams_swapped_between_sockets_are_noticed():
    seen = []

    def swap(data, peer, send):
        seen.append((data, peer))
        if len(seen) == 2:
            send(seen[0][0], seen[1][1])
            send(seen[1][0], seen[0][1])

    with serving_datagrams(swap) as endpoint:
        result = run(endpoint, connections=2, timeout_s=0.3)
    assert result.errors_wrong_bytes >= 1
    assert result.messages == 0


def test_nobody_at_a_port_for_datagrams_is_a_connect_error():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    result = run(f"udp://127.0.0.1:{port}")
    assert result.errors_connect == result.errors == 3
    assert result.problem == "connect: Connection refused"
    assert run("unixgram:@nobody").problem == "connect: Connection refused"


def with_two_addresses(monkeypatch, first):
    """Have a name resolve to `first`, and then to 127.0.0.1."""
    resolve = socket.getaddrinfo

    def getaddrinfo(host, *rest, **options):
        if host != "two.example":
            return resolve(host, *rest, **options)
        return [*resolve(first, *rest, **options), *resolve("127.0.0.1", *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("options", [{}, {"churn": True}, {"tls": True}], ids=str)
def test_the_next_address_of_a_host_is_tried_when_the_first_refuses(certificates, monkeypatch, options):
    with_two_addresses(monkeypatch, "127.0.0.99")
    context, ca_file = certificates if "tls" in options else (None, None)
    with serving(echo, context=context) as server:
        result = run(f"tcp://two.example:{server.server_address[1]}", ca_file=ca_file, **options)
    assert result.errors == 0, result.problem
    assert result.messages > 0


def test_the_next_address_of_a_host_is_tried_for_datagrams_too(monkeypatch):
    with_two_addresses(monkeypatch, "127.0.0.99")
    with serving_datagrams(echo_datagram) as endpoint:
        result = run(endpoint.replace("127.0.0.1", "two.example"))
    assert result.errors == 0, result.problem
    assert result.messages > 0


def test_a_host_of_which_all_addresses_refuse_is_a_connect_error(monkeypatch):
    with_two_addresses(monkeypatch, "127.0.0.99")
    for scheme in ("tcp", "udp"):
        result = run(f"{scheme}://two.example:1")
        assert result.errors_connect == result.errors == 3
        assert result.problem == "connect: Connection refused"


@pytest.mark.parametrize("silently", [True, False])
def test_a_datagram_server_that_dies_ends_the_run(silently):
    count = 0

    def die(data, peer, send):
        nonlocal count
        count += 1
        if count == 200:
            died.set()
        if count < 200:
            send(data, peer)

    died = threading.Event()
    with contextlib.ExitStack() as stack:
        server = contextlib.ExitStack()
        stack.push(server)
        endpoint = server.enter_context(serving_datagrams(die))
        if not silently:
            threading.Thread(target=lambda: (died.wait(10), server.close())).start()
        result = run(endpoint, connections=20, timeout_s=0.05, warmup_s=0, duration_s=30)
    assert "datagrams in a row failed: " + ("timed out" if silently else "") in result.problem
    assert 0 < result.messages < 200
    assert result.measured_s < 15
    if not silently:
        assert result.errors_connect > 0


@pytest.mark.timed
def test_a_stall_shows_in_the_p99_of_open_loop_datagrams():
    began = []

    def stall(data, peer, send):
        began.append(time.monotonic())
        if began[0] and began[0] + 0.3 < began[-1]:
            began[0] = 0
            threading.Event().wait(0.5)
        send(data, peer)

    with serving_datagrams(stall) as endpoint:
        result = run(endpoint, connections=4, rate=500.0, duration_s=1.5)
    assert (result.problem, result.errors) == (None, 0)
    assert result.p99_us > 350_000
    in_time(result.p99_us, 800_000)


@pytest.mark.parametrize(
    "option", [{"churn": True}, {"lines": True}, {"tls": True}, {"size_bytes": 7}, {"size_bytes": 65_508}]
)
def test_what_only_streams_can_is_refused_for_datagrams(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        LoadSettings(endpoint="udp://127.0.0.1:1", **option)


@pytest.mark.alike
@pytest.mark.exclusive
def test_the_generators_own_processor_use_is_told():
    with serving(echo) as server:
        busy, idle = run(server.endpoint, connections=20), run(server.endpoint, rate=100.0)
    assert busy.generator_bound == (busy.generator_cpu_share > 0.9)
    assert idle.generator_cpu_share > 0
    in_time(idle.generator_cpu_share, 0.5)
    assert not idle.generator_bound


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:80",
        "tcp://[::1]:7",
        "tcp://localhost:65535",
        "unix:/run/a b",
        "unix:x?mode=660",
        "udp://h:1",
        "unixgram:x",
    ],
)
def test_endpoints_are_read(endpoint):
    assert str(parse_target(endpoint)) == endpoint.partition("?")[0]


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        ":80",
        "tcp://127.0.0.1",
        "tcp://h:0",
        "tcp://h:65536",
        "tcp://::1:80",
        "unix:",
        "fd://3",
        "ftp://h:1",
    ],
)
def test_other_endpoints_are_refused_with_what_was_expected(endpoint):
    with pytest.raises(ValueError, match=r"expected tcp://HOST:PORT|at most 65535"):
        LoadSettings(endpoint=endpoint)


@pytest.mark.parametrize(
    "options",
    [
        {"connections": 0},
        {"size_bytes": 0},
        {"depth": 0},
        {"duration_s": 0},
        {"timeout_s": 0},
        {"warmup_s": -1},
        {"rate": 0},
        {"duration_s": float("inf")},
        {"timeout_s": float("inf")},
        {"warmup_s": float("nan")},
        {"rate": float("inf")},
        {"rate": 1e12},
        {"processes": 20},
        {"churn": True, "depth": 2},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options)).split("_")[0]):
        LoadSettings(endpoint="unix:x", **options)


# The command.


def invoke(*arguments):
    return CliRunner().invoke(load_command, [str(argument) for argument in arguments])


def test_the_command_prints_a_table_and_writes_its_files(tmp_path):
    with serving(echo) as server:
        outcome = invoke(
            server.endpoint, "-c", 4, "-t", 0.3, "--warmup", 0, "--json", tmp_path / "r.json",
            "--hdr", tmp_path / "r.hdr", "--plot", tmp_path / "r.svg", "--fail-if", "errors>0",
        )  # fmt: skip
    assert outcome.exit_code == 0, outcome.output
    for word in ("p50", "p90", "p99.9", "p99.99", "max", "achieved/s", "timed out", "closed loop", "generator:"):
        assert word in outcome.stdout
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["connections"] == 4
    assert result["errors"] == 0
    *_, legend, interval = (tmp_path / "r.hdr").read_text().splitlines()
    assert legend == '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"'
    begin, seconds, longest, _ = interval.split(",")
    assert (float(begin), float(longest)) == (0, result["max_us"])
    assert float(seconds) == pytest.approx(result["measured_s"], abs=0.001)
    plot = (tmp_path / "r.svg").read_text()
    assert plot.startswith("<?xml")


def test_a_condition_that_holds_fails_the_command():
    with serving(echo) as server:
        outcome = invoke(server.endpoint, "-t", 0.2, "--warmup", 0, "--fail-if", "p99_us>1", "--fail-if", "errors>0")
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("failed: p99_us > 1, it is ")
    assert "errors" not in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fail-if", "p99>1"], "corrected_p99_us"),
        (["--fail-if", "p99_us is high"], "FIELD OPERATOR NUMBER"),
        (["--fail-if", "p99_us>fast"], "FIELD OPERATOR NUMBER"),
        (["--plot", "x.gif"], ".png or .svg"),
        (["--rate", "-1"], "rate must be above 0"),
        (["--framing", "lenght:2"], "did you mean 'length'?"),
        (["--framing", "fixed:8"], "a frame must have 8 bytes, not 64"),
    ],
)
def test_bad_usage_exits_with_2_before_anything_is_sent(arguments, said):
    outcome = invoke("tcp://127.0.0.1:1", *arguments)
    assert outcome.exit_code == 2
    assert said in outcome.stderr


def test_an_absent_server_gives_one_clear_line_and_exit_1():
    outcome = invoke("tcp://127.0.0.1:1")
    assert outcome.exit_code == 1
    assert outcome.stderr == "tcp://127.0.0.1:1: connect: Connection refused\n"


@pytest.mark.parametrize("host", ["no.invalid", "a" * 64 + ".invalid"])
def test_a_host_that_does_not_resolve_is_named(host):
    outcome = invoke(f"tcp://{host}:9", "-t", 0.1)
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith(f"Error: cannot resolve the host of tcp://{host}:9: ")


def test_ctrl_c_reports_what_was_measured_so_far(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from aioecho.cli.load import load_command\nif __name__ == '__main__':\n    load_command()\n")
    seen = threading.Event()
    count = 0

    def handle(sock):
        nonlocal count
        while data := sock.recv(64):
            sock.sendall(data)
            count += 1
            if count > 200:
                seen.set()

    for processes in ("1", "2"):
        seen.clear()
        count = 0
        with serving(handle) as server:
            environment = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(__file__))}
            command = [sys.executable, script, server.endpoint, "-t", "30", "--warmup", "0", "--processes", processes]
            with subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                assert seen.wait(20)
                process.send_signal(signal.SIGINT)
                out, err = process.communicate(timeout=20)
        assert process.returncode == 1, err
        assert "interrupted: this is what was measured so far" in out
        assert "p99.9" in out
        assert "Traceback" not in err


def test_a_process_that_loads_imports_no_extra_before_it_must():
    code = (
        "import sys, aioecho.load\n"
        "assert not {'rich', 'numpy', 'matplotlib', 'click'} & sys.modules.keys()\n"
        "import aioecho.cli.load, aioecho.load.report\n"
        "assert not {'rich', 'numpy', 'matplotlib'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.path.dirname(os.path.dirname(__file__)))


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    outcome = invoke("tcp://127.0.0.1:1")
    assert outcome.exit_code == 1
    assert 'pip install "aioecho[bench]"' in outcome.stderr


def test_the_load_command_runs_where_warnings_are_errors():
    root = os.path.dirname(os.path.dirname(__file__))
    with serving(echo) as server:
        command = [
            sys.executable,
            "-W",
            "error",
            "-m",
            "aioecho",
            "load",
            server.endpoint,
            "-t",
            "0.1",
            "--warmup",
            "0",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "p99.9" in done.stdout


# The arithmetic, on known data.


def result_of(counts, **changes):
    from aioecho.load.run import _result
    from aioecho.load.settings import Tally

    tally = Tally(counts=counts, replies=sum(counts.values()), measured_s=changes.pop("measured_s", 1.0))
    return _result(LoadSettings(endpoint="unix:x", **changes), [tally], "2026-01-01T00:00:00Z")


def test_percentiles_of_known_values():
    result = result_of(dict.fromkeys(range(1, 1001), 1), connections=1, rate=1000.0)
    assert (result.min_us, result.p50_us, result.p90_us, result.p99_us, result.p999_us, result.max_us) == (
        1, 500, 900, 990, 999, 1000
    )  # fmt: skip
    assert result.mean_us == 500.5
    assert result.messages == 1000


def test_the_correction_fills_in_what_a_pause_left_out():
    # One message a millisecond and one of 100 ms: the pause swallowed 99 that would have taken 99, 98 ... ms.
    result = result_of({1000: 900, 100_000: 1}, connections=1, measured_s=0.901)
    assert result.p99_us == 1000
    assert result.corrected_p99_us == pytest.approx(90_000, rel=0.02)


def list_corrected(counts, interval_us):
    """List every latency that the correction counts, in order: the long way."""
    listed = []
    for value, count in counts.items():
        for less in range(0, max(value - interval_us, 0) + 1, interval_us):
            listed += [value - less] * count
    return sorted(listed)


@given(
    st.dictionaries(st.integers(1, 3000), st.integers(1, 20), min_size=1, max_size=20),
    st.integers(1, 4000),
    st.floats(0, 100),
)
def test_percentiles_are_those_of_all_latencies_in_order(counts, interval_us, percent):
    latencies, corrected = Latencies(counts), list_corrected(counts, interval_us)
    plain = sorted(value for value, count in counts.items() for _ in range(count))
    for listed, found in (
        (plain, latencies.percentile(percent)),
        (corrected, latencies.corrected_percentile(percent, interval_us)),
    ):
        assert found == listed[max(1, int(percent / 100 * len(listed) + 0.5)) - 1]


def test_a_histogram_is_encoded_as_hdrhistogram_encodes_it():
    # What hdrhistogram 0.10.8 made of the same counts, less its compression: its header, then the buckets.
    header = "1c84931300000010 00000000 00000003 0000000000000001 00000000d693a400 3ff0000000000000"
    buckets = "01 02 f91f 04 06 c113 9003 a1b702 e0c508"
    counts = {1: 1, 2047: 2, 2048: 3, 5000: 200, 3_600_000_000: 70_000}
    assert encode_histogram(counts) == bytes.fromhex(header + buckets)
    above = encode_histogram({3_600_000_000: 1, 10**12: 1})
    assert above == encode_histogram({3_600_000_000: 2}), "what took over an hour is counted as an hour"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package's own, from 3.15 on
def test_hdrhistogram_reads_the_log(tmp_path):
    histogram_module, log_module = pytest.importorskip("hdrh.histogram"), pytest.importorskip("hdrh.log")
    counts = {7: 3, 900: 40, 2049: 1, 70_000: 2000, 1_000_000: 5, 123_456_789: 1}
    with open(tmp_path / "r.hdr", "wb") as file:
        write_hdr(result_of(counts, measured_s=2.5), file)
    expected = histogram_module.HdrHistogram(1, 3_600_000_000, 3)
    for value, count in counts.items():
        expected.record_value(value, count)
    reader = log_module.HistogramLogReader(str(tmp_path / "r.hdr"), histogram_module.HdrHistogram(1, 3_600_000_000, 3))
    found = reader.get_next_interval_histogram()
    assert reader.get_next_interval_histogram() is None
    reader.close()
    assert found.get_total_count() == sum(counts.values())
    assert [(step.value_iterated_to, step.count_at_value_iterated_to) for step in found.get_recorded_iterator()] == [
        (step.value_iterated_to, step.count_at_value_iterated_to) for step in expected.get_recorded_iterator()
    ]
    assert (found.get_start_time_stamp(), found.get_end_time_stamp()) == (0, 2500)


def test_conditions_compare_and_unmeasured_values_meet_them():
    result = result_of({10: 5})
    assert isinstance(result, LoadResult)
    assert Condition.parse("p99_us >= 10").holds(result)
    assert not Condition.parse("p99_us>10").holds(result)
    assert Condition.parse("messages!=4").holds(result)
    assert Condition.parse("p99_us<1").holds(result_of({}))


def test_a_result_with_nothing_measured_can_still_be_written():
    result = result_of({})
    plot, log = io.BytesIO(), io.BytesIO()
    write_plot(result, plot, "png")
    write_hdr(result, log)
    assert plot.getvalue().startswith(b"\x89PNG")
    assert log.getvalue().startswith(b"#[aioecho load")
    assert json.loads(json.dumps(result.as_dict()))["p50_us"] is None
