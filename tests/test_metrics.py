"""Metrics: what a server measures, its text, and the port that tells it, for one process and for workers."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ON_ONE_LOOP, ask, ask_by_datagram, check_mistake, close, handler, invoke, reset
from programs import ROOT, Program, connect, eventually, workers_of
from programs import ask as ask_blocking

import aioecho
from aioecho.echo import DatagramEcho, Echo
from aioecho.metrics import FAMILIES, Histogram, Metrics, format_metrics
from aioecho.net.kernel import wire_bytes
from aioecho.ops.http import MOST, MOST_OF_HEAD
from aioecho.ops.metrics import MetricsEndpoint, parse_metrics_address, prefers_openmetrics
from aioecho.serving import measures
from aioecho.serving.measuring import measure_in_turns
from aioecho.several import make_servers

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

PROMTOOL, PROMETHEUS = shutil.which("promtool"), shutil.which("prometheus")

# A line of the text: name, labels, value.
SAMPLE = re.compile(r'([a-z_]+)((?:\{(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)+\})?) (\S+)')


def parse(text: str) -> dict[str, float]:
    """Return the samples of a metrics' text by name and labels; fail if it is not in order."""
    assert text.endswith("\n")
    assert "\r" not in text
    lines = text.split("\n")[:-1]
    is_openmetrics = lines[-1] == "# EOF"
    samples: dict[str, float] = {}
    kind = family = ""
    seen = set()
    for line in lines[: -1 if is_openmetrics else None]:
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            assert family not in seen
            seen.add(family)
        elif line.startswith("# TYPE "):
            named, kind = line.split(" ")[2:]
            assert named == family
            assert kind in ("counter", "gauge", "histogram", *(("info",) if is_openmetrics else ()))
            assert (kind == "counter") == family.endswith("_total") or is_openmetrics
        elif line.startswith("# UNIT "):
            assert is_openmetrics
            named, unit = line.split(" ")[2:]
            assert named == family
            assert family.endswith(f"_{unit}")
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, labels, value = match.groups()
            suffixes = {"counter": ["_total"] if is_openmetrics else [""], "gauge": [""], "info": ["_info"]}
            suffixes["histogram"] = ["_bucket", "_sum", "_count"]
            assert name in [family + suffix for suffix in suffixes[kind]], line
            assert name + labels not in samples
            samples[name + labels] = float(value)
    return samples


def total(samples: dict[str, float], name: str) -> float:
    """Return the sum over all labels."""
    return sum(value for key, value in samples.items() if key.partition("{")[0] == name)


# What is measured.


@pytest.mark.asyncio
async def test_the_kernel_is_asked_for_no_bytes_when_a_connection_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[socket.socket] = []
    monkeypatch.setattr(measures, "wire_bytes", lambda sock: looks.append(sock) or wire_bytes(sock))
    server = aioecho.TCPServer(ANYWHERE, Echo)
    server.metrics()
    async with server:
        clients = []
        for count in (1, 2, 3, 4):
            clients.append(await asyncio.open_connection(*server.server_address))
            clients[-1][1].write(b"hello")
            assert await clients[-1][0].readexactly(5) == b"hello"
            assert server.stats.active == count
        assert len(looks) == 1  # for the first of its family of addresses
        for _, writer in clients:
            await close(writer)
        await settle(lambda: not server.connections)
        assert server.metrics().get("aioecho_wire_received_bytes") == 20


@pytest.mark.parametrize("way", ["tcp", "unix"])
async def test_connections_their_ends_times_and_bytes_are_measured(way: str, tmp_path: Path) -> None:
    server = aioecho.serve(Echo, "tcp://127.0.0.1:0" if way == "tcp" else f"unix:{tmp_path}/s")
    server.metrics()
    async with server:
        if way == "tcp":
            reader, writer = await asyncio.open_connection(*server.server_address)
        else:
            reader, writer = await asyncio.open_unix_connection(f"{tmp_path}/s")
        writer.write(b"x" * 1000)
        await reader.readexactly(1000)
        metrics = server.metrics()
        assert metrics.get("aioecho_connections") == metrics.get("aioecho_connections_active") == 1
        assert metrics.get("aioecho_wire_received_bytes") == metrics.get("aioecho_wire_sent_bytes") == 1000
        writer.write(b"y" * 234)
        await reader.readexactly(234)
        await close(writer)
        await settle(lambda: not server.connections)
        metrics = server.metrics()
        assert metrics.get("aioecho_connections_active") == 0
        assert metrics.get("aioecho_connections_ended", "completed", "finished") == 1
        assert metrics.get("aioecho_connection_duration_seconds") == 1
        assert metrics.get("aioecho_wire_received_bytes") == metrics.get("aioecho_wire_sent_bytes") == 1234
        check_identity(server)


async def test_a_blocking_handlers_bytes_are_measured() -> None:
    class Blocking(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line)

    async with aioecho.TCPServer(ANYWHERE, Blocking) as server:
        server.metrics()
        assert await ask(server, b"hello\n") == b"hello\n"
        await settle(lambda: not server.connections)
        metrics = server.metrics()
        assert metrics.get("aioecho_wire_received_bytes") == metrics.get("aioecho_wire_sent_bytes") == 6
        assert metrics.get("aioecho_connection_duration_seconds") == 1


async def test_bytes_of_tls_are_the_ones_on_the_wire(tls: Any) -> None:
    async with aioecho.TCPServer(ANYWHERE, Echo, ssl=tls.server) as server:
        server.metrics()
        options = {"ssl": tls.client, "server_hostname": "localhost"}
        reader, writer = await asyncio.open_connection(*server.server_address, **options)
        writer.write(b"x" * 1000)
        assert await reader.readexactly(1000) == b"x" * 1000
        await close(writer)
        await settle(lambda: not server.connections)
        metrics = server.metrics()
        assert metrics.get("aioecho_tls_handshake_seconds") == 1
        assert metrics.get("aioecho_tls_handshake_failures") == 0
        assert 1200 < metrics.get("aioecho_wire_received_bytes") < 3000
        assert 2000 < metrics.get("aioecho_wire_sent_bytes") < 6000  # the certificate too


@pytest.mark.parametrize("blocking", [False, True])
async def test_handshakes_that_fail_are_counted_apart(tls: Any, blocking: bool) -> None:
    made = type("Blocking", (socketserver.BaseRequestHandler,), {}) if blocking else Echo
    async with aioecho.TCPServer(ANYWHERE, made, ssl=tls.server) as server:
        server.metrics()
        await ask(server, b"this is no ClientHello\r\n\r\n")
        await settle(lambda: not server.connections and server.stats.rejected)
        metrics = server.metrics()
        assert metrics.get("aioecho_tls_handshake_failures") == 1
        assert metrics.get("aioecho_tls_handshake_seconds") == 0
        assert metrics.get("aioecho_connections_refused", "handshake") == 1
        assert metrics.get("aioecho_connection_duration_seconds") == 0


async def test_a_refused_client_is_counted_by_its_reason() -> None:
    class Refusing(aioecho.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return False

    async with Refusing(ANYWHERE, Echo) as server:
        await ask(server)
        await settle(lambda: not server.connections)
        metrics = server.metrics()
        assert metrics.get("aioecho_connections_refused", "refused") == 1
        assert total(parse(metrics.text()), "aioecho_connections_ended_total") == 0


async def test_what_is_unsent_is_measured() -> None:
    async def handle(self: Any) -> None:
        self.writer.write(b"x" * 8_000_000)
        await self.reader.read()

    async with aioecho.TCPServer(ANYWHERE, handler(handle), grace=0) as server:
        _reader, writer = await asyncio.open_connection(*server.server_address)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await settle(lambda: server.metrics().get("aioecho_unsent_bytes") > 10**6)
        metrics = await measure_in_turns(server)
        assert 10**6 < metrics.get("aioecho_unsent_bytes") < 8_000_000
        writer.transport.abort()
        await settle(lambda: not server.connections)
        assert server.metrics().get("aioecho_unsent_bytes") == 0


async def test_bytes_never_go_back_when_connections_end() -> None:
    async with aioecho.TCPServer(ANYWHERE, Echo) as server:
        last = (0.0, 0.0)

        def look() -> None:
            nonlocal last
            metrics = server.metrics()
            now = metrics.get("aioecho_wire_received_bytes"), metrics.get("aioecho_wire_sent_bytes")
            assert now[0] >= last[0]
            assert now[1] >= last[1]
            last = now

        look()
        for index in range(20):
            sock = socket.create_connection(server.server_address)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_sendall(sock, b"x" * 100)
            received = b""
            while len(received) < 100:
                received += await asyncio.get_running_loop().sock_recv(sock, 100)
            look()
            if index % 2:
                reset(sock)
            else:
                sock.close()
            await settle(lambda: not server.connections)
            look()
        assert last == (2000, 2000)


async def test_many_connections_are_looked_at_in_turns() -> None:
    async with aioecho.TCPServer(ANYWHERE, Echo) as server:
        server.metrics()
        clients = [await asyncio.open_connection(*server.server_address) for _ in range(20)]
        for reader, writer in clients:
            writer.write(b"x" * 10)
            await reader.readexactly(10)
        metrics = await measure_in_turns(server)
        assert metrics.get("aioecho_wire_received_bytes") == metrics.get("aioecho_wire_sent_bytes") == 200
        for _, writer in clients:
            await close(writer)


async def test_a_held_up_loop_shows_as_lag() -> None:
    async with aioecho.TCPServer(ANYWHERE, Echo) as server:
        server.metrics()
        await settle(lambda: server.metrics().get("aioecho_loop_lag_seconds") >= 1)
        before = server.metrics().values["aioecho_loop_lag_seconds"]["sum"]
        time.sleep(0.8)
        await settle(lambda: server.metrics().values["aioecho_loop_lag_seconds"]["sum"] >= before + 0.2)


async def test_the_accept_queue_is_measured() -> None:
    async with aioecho.TCPServer(ANYWHERE, Echo, limits=aioecho.Limits(backlog=7)) as server:
        server.pause()
        clients = [socket.create_connection(server.server_address) for _ in range(3)]
        metrics = server.metrics()
        (name,) = server.names
        assert metrics.get("aioecho_accept_queue_length", name) == 3
        assert metrics.get("aioecho_accept_queue_limit", name) == 7
        assert metrics.get("aioecho_paused") == 1
        server.resume()
        await settle(lambda: server.stats.accepted == 3)
        assert server.metrics().get("aioecho_accept_queue_length", name) == 0
        for sock in clients:
            sock.close()


async def test_datagrams_are_measured() -> None:
    async with aioecho.UDPServer(ANYWHERE, DatagramEcho, limits=aioecho.Limits(max_datagram=100)) as server:
        assert await asyncio.to_thread(ask_by_datagram, server.server_address) == b"hello"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x" * 101, server.server_address)
        await settle(lambda: server.stats.received == 2)
        metrics = server.metrics()
        assert metrics.get("aioecho_datagrams_received") == 2
        assert metrics.get("aioecho_datagrams_handled") == 1
        assert metrics.get("aioecho_datagrams_dropped", "truncated") == 1
        assert metrics.get("aioecho_datagram_handlers_ended", "completed", "finished") == 1
        assert "aioecho_connections_total" not in parse(metrics.text())


async def test_a_service_has_the_metrics_of_both_kinds() -> None:
    async with aioecho.serve({Echo: "tcp://127.0.0.1:0", DatagramEcho: "udp://127.0.0.1:0"}) as server:
        server.metrics()
        assert await ask(server) == b"x\n"
        address = server.sockets[1].getsockname()
        await asyncio.to_thread(ask_by_datagram, address)
        await settle(lambda: not server.connections)
        samples = parse(server.metrics().text())
        assert samples["aioecho_connections_total"] == 1
        assert samples["aioecho_datagram_handlers_total"] == 1
        assert samples["aioecho_draining"] == 0
        assert samples["aioecho_wire_received_bytes_total"] == 2


async def test_the_end_of_the_certificate_is_told(tls: Any) -> None:
    made = aioecho.TLS(tls.files.server)
    async with aioecho.TCPServer(ANYWHERE, Echo, ssl=made) as server:
        end = server.metrics().get("aioecho_tls_certificate_end_timestamp_seconds")
        assert end == made.load().not_after
        assert end > time.time()


@ON_ONE_LOOP
async def test_of_several_certificates_the_end_of_the_first_is_told(tls: Any) -> None:
    def make() -> list[aioecho.BaseServer]:
        return [aioecho.TCPServer(ANYWHERE, Echo, ssl=aioecho.TLS(tls.files.server)) for _ in range(2)]

    name, end = "aioecho_tls_certificate_end_timestamp_seconds", aioecho.TLS(tls.files.server).load().not_after
    async with make_servers(make) as program:
        assert program.metrics().get(name) == end
        of_slot = Metrics()  # of a worker and the one that it replaces
        for worker in (program.metrics(), Metrics({name: {"": end - 7}})):
            of_slot.add_values(worker.values)
        assert of_slot.get(name) == end - 7


async def test_a_message_takes_the_same_way_with_and_without_metrics() -> None:
    """The protocol's methods that a message goes through are the very same functions."""
    kinds = []

    class Noting(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            kinds.append(type(self.writer.protocol))

    for is_measured in (False, True):
        async with aioecho.TCPServer(ANYWHERE, Noting) as server:
            if is_measured:
                server.metrics()
            await ask(server)
    plain, measured = kinds
    assert plain is not measured
    assert plain.counts is measured.counts is False
    # Nothing but what every class has of its own, and the one slot.
    assert {name for name in vars(measured) if not name.startswith("__")} <= {"wire", "_abc_impl"}
    assert measured.__bases__ == (plain,)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="sys.monitoring is new in Python 3.12")
async def test_a_message_costs_as_many_instructions_with_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "LAG_EVERY", 1000.0)
    monitoring: Any = getattr(sys, "monitoring")  # noqa: B009 - mypy looks at 3.11
    folder, tool = str(Path(aioecho.__file__).parent), 4
    count = 0

    def note(code: Any, offset: int) -> Any:
        nonlocal count
        if not code.co_filename.startswith(folder):
            return monitoring.DISABLE
        count += 1
        return None

    async def measure(is_measured: bool) -> int:
        """Return how many instructions of aioecho's own a message takes, in the least of ten rounds."""
        nonlocal count
        async with aioecho.TCPServer(ANYWHERE, Echo) as server:
            if is_measured:
                server.metrics()
            with socket.create_connection(server.server_address) as sock:
                sock.setblocking(False)
                rounds = []
                for _ in range(10):
                    count = 0
                    for _ in range(10):
                        sock.send(b"hello")
                        while True:
                            await asyncio.sleep(0)
                            with contextlib.suppress(BlockingIOError):
                                assert sock.recv(5) == b"hello"
                                break
                    rounds.append(count)
            await settle(lambda: not server.connections)
            return min(rounds)

    monitoring.use_tool_id(tool, "instructions")
    try:
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, note)
        monitoring.set_events(tool, monitoring.events.INSTRUCTION)
        plain, measured = await measure(False), await measure(True)
    finally:
        monitoring.set_events(tool, 0)
        monitoring.free_tool_id(tool)
    assert plain == measured > 0


# The text.


def test_a_histograms_bounds_are_upper_ones() -> None:
    histogram = Histogram((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 7):
        histogram.note(seconds)
    assert histogram.counts == [2, 1, 1]
    assert histogram.sum == pytest.approx(7.65)


def test_a_label_is_escaped() -> None:
    metrics = Metrics()
    metrics.add("aioecho_accept_queue_length", 3, 'unix:/tmp/"a\\b"\n\x1f')
    assert r'{endpoint="unix:/tmp/\"a\\b\"\\n\\x1f"} 3' in metrics.text()
    parse(metrics.text())


def everything() -> Metrics:
    """Return metrics with a value in every family."""
    metrics = Metrics()
    for family in FAMILIES.values():
        if family.bounds:
            histogram = Histogram(family.bounds)
            histogram.note(0.3)
            metrics.add_histogram(family.name, histogram)
        else:
            metrics.add(family.name, 1, *family.labels)
    return metrics


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_text_is_in_order(openmetrics: bool) -> None:
    text = format_metrics([("", everything()), ("1", everything()), ("2", everything())], openmetrics=openmetrics)
    samples = parse(text)
    name = "aioecho_connection_duration_seconds"
    assert samples[name + '_bucket{worker="2",le="0.1"}'] == 0
    assert samples[name + '_bucket{worker="2",le="+Inf"}'] == samples[name + '_count{worker="2"}'] == 1
    assert samples['aioecho_connections_ended_total{worker="1",outcome="outcome",reason="reason"}'] == 1


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus)")
def test_promtool_finds_nothing_to_say() -> None:
    assert PROMTOOL is not None
    text = format_metrics([("", everything()), ("1", everything())])
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_documentation_has_every_metric() -> None:
    page = (ROOT / "docs" / "pages" / "metrics.md").read_text("utf-8")
    rows = re.findall(r"^\| `(aioecho_\w+)`(?: \| )([a-z]+) \| ([^|]*) \|", page, re.MULTILINE)
    suffixes = {"counter": "_total", "info": "_info"}
    expected = [
        (
            name + suffixes.get(kind, ""),
            "gauge" if kind == "info" else kind,
            ", ".join(f"`{label}`" for label in labels),
        )
        for name, kind, labels in ((family.name, family.kind, family.labels) for family in FAMILIES.values())
    ]
    assert [(name, kind, labels.strip()) for name, kind, labels in rows] == expected


@pytest.mark.parametrize(
    ("accept", "is_preferred"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", False),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text; version=1.0.0", True),
        ("application/openmetrics-text;version=0.0.1", False),
        ("application/openmetrics-text;q=0.2,text/plain;q=0.5", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=much,text/plain", False),
        (
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;"
            "version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            True,
        ),
    ],
)
def test_the_format_is_what_is_asked_for(accept: str, is_preferred: bool) -> None:
    assert prefers_openmetrics(accept) is is_preferred


@pytest.mark.parametrize(
    "text", ["127.0.0.1:9464", "[::1]:9464", "*:9464", "localhost:0", "unix:/run/m", "unix:m?mode=600"]
)
def test_addresses_of_the_port(text: str) -> None:
    assert parse_metrics_address(text) in (text, f"tcp://{text}")


@pytest.mark.parametrize("text", ["", "9464", ":9464", "127.0.0.1", "udp://127.0.0.1:9464", "http://localhost:9464/"])
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"metrics must be HOST:PORT, as 127.0.0.1:9464, or unix:PATH, not {text!r}")
    ):
        parse_metrics_address(text)


# The port, of one process.


async def ask_port(endpoint: MetricsEndpoint, request: bytes) -> bytes:
    """Send a request and return all that comes back until the port closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(endpoint))
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        await close(writer)


def port_of(endpoint: MetricsEndpoint) -> int:
    return int(endpoint.names[0].rpartition(":")[2])


def get(path: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join((f"{method} {path} HTTP/{version}", "Host: x", *lines, "", "")).encode()


async def test_the_port_answers_by_path_method_and_format() -> None:
    async with (
        aioecho.TCPServer(ANYWHERE, Echo) as server,
        MetricsEndpoint.of_server("127.0.0.1:0", server) as endpoint,
    ):
        for request, status, kind, body in (
            (get("/metrics", "Connection: close"), 200, TEXT, b"aioecho_connections_total 0\n"),
            (get("/metrics?name=x", "Connection: close"), 200, TEXT, b"aioecho_connections_total 0\n"),
            (
                get("/metrics", "Accept: application/openmetrics-text", "Connection: close"),
                200,
                OPENMETRICS,
                b"# EOF\n",
            ),
            (get("/metrics", version="1.0"), 200, TEXT, b"aioecho_build_info"),
            (get("/healthz", "Connection: close"), 200, "text/plain; charset=utf-8", b"ok\n"),
            (get("/readyz", "Connection: close"), 200, "text/plain; charset=utf-8", b"ready\n"),
            (get("/", "Connection: close"), 404, "text/plain; charset=utf-8", b"/metrics"),
            (get("/metrics", "Connection: close", method="DELETE"), 405, "text/plain; charset=utf-8", b"DELETE"),
            (get("/metrics", "Content-Length: 3", method="POST") + b"abc", 405, "text/plain; charset=utf-8", b"POST"),
            (b"\x16\x03\x01 nothing\r\n\r\n", 400, "text/plain; charset=utf-8", b"no HTTP request"),
            (b"GET / HTTP/1.1\r\nno header\r\n\r\n", 400, "text/plain; charset=utf-8", b"no header"),
            (get("/", version="2.0"), 505, "text/plain; charset=utf-8", b"HTTP/1.1"),
            (b"GET /" + b"x" * MOST_OF_HEAD + b" HTTP/1.1\r\n\r\n", 431, "text/plain; charset=utf-8", b"8192 bytes"),
        ):
            head, _, text = (await ask_port(endpoint, request)).partition(b"\r\n\r\n")
            assert head.startswith(f"HTTP/1.1 {status} ".encode()), request
            headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
            assert headers["Content-Type"] == kind
            assert int(headers["Content-Length"]) == len(text)
            assert headers["Connection"] == "close"
            assert (headers.get("Allow") == "GET, HEAD") is (status == 405)
            assert body in text
            if kind in (TEXT, OPENMETRICS):
                parse(text.decode())


async def test_a_connection_is_kept_and_head_has_no_body() -> None:
    async with (
        aioecho.TCPServer(ANYWHERE, Echo) as server,
        MetricsEndpoint.of_server("127.0.0.1:0", server) as endpoint,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(endpoint))
        writer.write(get("/healthz") * 3)
        for _ in range(3):
            assert b"keep-alive" in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readexactly(3) == b"ok\n"
        writer.write(get("/healthz", "Connection: close", method="HEAD"))
        assert (await reader.read()).endswith(
            b"Content-Length: 3\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        await close(writer)


async def test_a_server_is_ready_while_it_accepts() -> None:
    release = asyncio.Event()

    async def handle(self: Any) -> None:
        await release.wait()

    server = aioecho.TCPServer(ANYWHERE, handler(handle))
    async with MetricsEndpoint.of_server("127.0.0.1:0", server) as endpoint:

        async def readiness() -> bytes:
            answer = await ask_port(endpoint, get("/readyz", "Connection: close"))
            return answer[9:12] + b" " + answer.rpartition(b"\r\n")[2].strip()

        assert await readiness() == b"503 starting"
        await server.start()
        assert await readiness() == b"200 ready"
        server.pause()
        assert await readiness() == b"503 paused"
        server.resume()
        assert await readiness() == b"200 ready"
        _, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: len(server.connections) == 1)
        stop = asyncio.create_task(server.shutdown(20))
        await settle(lambda: not server.is_serving())
        assert await readiness() == b"503 draining"
        assert (await ask_port(endpoint, get("/healthz", "Connection: close"))).startswith(b"HTTP/1.1 200")
        assert b"aioecho_draining 1\n" in await ask_port(endpoint, get("/metrics", "Connection: close"))
        release.set()
        await stop
        await close(writer)


async def test_a_crowd_of_idle_clients_does_not_keep_a_scraper_out() -> None:
    async with (
        aioecho.TCPServer(ANYWHERE, Echo) as server,
        MetricsEndpoint.of_server("127.0.0.1:0", server) as endpoint,
    ):
        idle = []
        for _ in range(3 * MOST):
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(endpoint))
            writer.write(get("/healthz"))
            await reader.readuntil(b"ok\n")
            idle.append(writer)
        assert b"aioecho_connections_total 0\n" in await ask_port(endpoint, get("/metrics", "Connection: close"))
        assert server.stats.accepted == 0
        for writer in idle:
            await close(writer)


async def test_a_flood_of_requests_gathers_ten_times_a_second_at_the_most() -> None:
    gathered = 0

    async def collect() -> list[tuple[str, Metrics]]:
        nonlocal gathered
        gathered += 1
        return [("", everything())]

    async def find_obstacle() -> str:
        return ""

    async with MetricsEndpoint("127.0.0.1:0", collect, find_obstacle) as endpoint:
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def flood() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(endpoint))
            writer.write(get("/metrics") * 10 + get("/metrics", "Connection: close"))
            assert (await reader.read()).count(b"HTTP/1.1 200 OK") == 11
            await close(writer)

        await asyncio.gather(*(flood() for _ in range(10)))
        took = loop.time() - began
        assert took > 0.8  # 110 requests, of which 20 at once, at 100 a second
        assert 1 < gathered <= took / 0.1 + 1


async def test_a_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        async with aioecho.TCPServer(ANYWHERE, Echo) as server:
            with pytest.raises(aioecho.EndpointError, match=f"127.0.0.1:{port}"):
                await MetricsEndpoint.of_server(f"127.0.0.1:{port}", server).__aenter__()


# Programs.


def fetch(where: str, path: str = "/metrics") -> str:
    """Return what a metrics' port answers."""
    with urllib.request.urlopen(where + path, timeout=20) as answer:
        assert answer.headers["Content-Type"] in (TEXT, "text/plain; charset=utf-8")
        text: str = answer.read().decode()
        return text


@contextlib.contextmanager
def serving(*arguments: str | Path) -> Iterator[tuple[Program, str, str]]:
    """Serve echo on some port, with metrics: the program, its endpoint, and where its metrics are."""
    with Program.aioecho("serve", "--port", "0", "--metrics", "127.0.0.1:0", *arguments) as program:
        endpoint = program.listening()
        # A thread of the program's writes its log.
        match = eventually(lambda: re.search(r"metrics on (http://\S+)/metrics\n", program.stderr()))
        yield program, endpoint, match[1]


@pytest.mark.parametrize("arguments", [(), ("--workers", "2"), ("--workers", "2", "--reuse-port")])
def test_a_program_tells_of_all_its_processes(arguments: tuple[str, ...]) -> None:
    with serving(*arguments) as (program, endpoint, where):
        assert fetch(where, "/readyz") == "ready\n"
        for _ in range(10):
            assert ask_blocking(endpoint, b"hello\n") == b"hello\n"
        eventually(lambda: total(parse(fetch(where)), "aioecho_connections_active") == 0)
        samples = parse(fetch(where))
        assert total(samples, "aioecho_connections_total") == 10
        assert (
            total(samples, "aioecho_wire_received_bytes_total") == total(samples, "aioecho_wire_sent_bytes_total") == 60
        )
        assert samples[f'aioecho_accept_queue_length{{endpoint="{endpoint}"}}'] == 0
        workers = {match[1] for key in samples if (match := re.search(r'worker="(\w+)"', key))}
        assert workers == ({"1", "2"} if arguments else set())
        assert not arguments or samples["aioecho_workers"] == samples['aioecho_worker_starts_total{cause="start"}'] == 2
        assert program.stop() == 0


def test_the_port_may_be_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    with Program.aioecho("serve", "--port", "0", "--metrics", f"unix:{path}?mode=600") as program:
        program.listening()
        assert path.stat().st_mode & 0o777 == 0o600
        assert b"aioecho_connections_total 0\n" in ask_blocking(f"unix:{path}", get("/metrics", "Connection: close"))
        assert program.stop() == 0
        assert not path.exists()


def test_a_pause_of_workers_is_told_by_readyz_at_once(tmp_path: Path) -> None:
    control = f"unix:{tmp_path / 'control.sock'}"
    with serving("--workers", "2", "--control", control) as (program, _, where):
        for _ in range(3):
            assert invoke("ctl", "--control", control, "pause")[0] == 0
            with pytest.raises(urllib.error.HTTPError) as caught:
                fetch(where, "/readyz")
            assert (caught.value.code, caught.value.read()) == (503, b"paused\n")
            caught.value.close()
            assert invoke("ctl", "--control", control, "resume")[0] == 0
            assert fetch(where, "/readyz") == "ready\n"
        assert program.stop() == 0


def test_a_metrics_address_that_is_none_is_a_mistake() -> None:
    check_mistake(invoke("serve", "--metrics", "9464"), "metrics must be HOST:PORT", "'9464'")


def test_no_count_goes_back_when_workers_are_killed() -> None:
    with serving("--workers", "2") as (program, endpoint, where):
        for _ in range(20):
            ask_blocking(endpoint, b"hello\n")
        with connect(endpoint), connect(endpoint):
            eventually(lambda: total(parse(fetch(where)), "aioecho_connections_active") == 2)
            for pid in workers_of(program):
                os.kill(pid, signal.SIGKILL)
            eventually(lambda: parse(fetch(where))['aioecho_worker_starts_total{cause="killed"}'] == 2)
        eventually(lambda: parse(fetch(where))["aioecho_workers"] == 2)
        samples = parse(fetch(where))
        assert total(samples, "aioecho_connections_total") == 22
        assert total(samples, "aioecho_connections_active") == 0
        assert total(samples, "aioecho_connections_ended_total") == 22
        died = {key: value for key, value in samples.items() if "worker died" in key}
        assert sum(died.values()) == 2
        assert total(samples, "aioecho_wire_received_bytes_total") == 120
        program.signal(signal.SIGUSR1)
        line = eventually(lambda: re.search(r"stats of all workers.*: (accepted.*)\n", program.stderr()))[1]
        assert line.startswith("accepted=22 active=0 completed=20 failed=2 ")
        program.stop()


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [6, pytest.param(20, marks=pytest.mark.soak)])
def test_no_count_goes_back_in_fifty_scrapes_for_each_of_twenty_kills(wanted: int) -> None:
    with serving("--workers", "2") as (program, endpoint, where):
        is_over = threading.Event()

        def load() -> None:
            while not is_over.is_set():
                with contextlib.suppress(OSError):
                    ask_blocking(endpoint, b"hello\n")

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        kinds = {"_total", "_bucket", "_count", "_sum"}
        last: dict[str, float] = {}
        kills = 0
        try:
            for index in range(50 * wanted):
                samples = parse(fetch(where))
                counts = {key: value for key, value in samples.items() if any(f"{kind}{{" in key for kind in kinds)}
                back = {key: (last[key], counts.get(key)) for key in last if counts.get(key, -1) < last[key]}
                assert not back
                last = counts
                if index % 50 == 25:
                    victims = sorted(eventually(lambda: workers_of(program)))
                    os.kill(victims[index % len(victims)], signal.SIGKILL)
                    kills += 1
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
        assert kills == wanted
        # The next workers in a place come later the more often one was killed there.
        eventually(lambda: parse(fetch(where))['aioecho_worker_starts_total{cause="killed"}'] == wanted)
        assert total(last, "aioecho_connections_total") > 100
        program.stop()


@pytest.mark.alike
@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian's package prometheus)")
def test_a_real_prometheus_scrapes_it(tmp_path: Path) -> None:
    assert PROMETHEUS is not None
    with serving("--workers", "2") as (_, endpoint, where), socket.socket() as free:
        ask_blocking(endpoint, b"hello\n")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        config = tmp_path / "prometheus.yml"
        target = where.removeprefix("http://")
        config.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s}\n"
            f"scrape_configs: [{{job_name: aioecho, static_configs: [{{targets: ['{target}']}}]}}]\n"
        )
        command = (PROMETHEUS, f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/data")
        with Program(*command, f"--web.listen-address=127.0.0.1:{port}", cwd=tmp_path) as prometheus:

            def query(expression: str) -> Any:
                url = f"http://127.0.0.1:{port}/api/v1/query?query={expression}"
                try:
                    with urllib.request.urlopen(url, timeout=5) as answer:
                        return json.load(answer)["data"]["result"]
                except urllib.error.HTTPError as error:  # it starts
                    error.close()
                except OSError:
                    pass
                assert prometheus.process.poll() is None, prometheus.stderr()
                return None

            found = eventually(lambda: query("sum(aioecho_connections_total)"), 60)
            assert found[0]["value"][1] == "1"
            assert query("up")[0]["value"][1] == "1"
            assert len(query("aioecho_loop_lag_seconds_count")) == 2
