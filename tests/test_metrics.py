"""Metrics: what a server measures, its text, and the port that tells it, for one process and for workers."""

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ask, ask_by_datagram, check_mistake, close, handler, invoke, reset
from programs import ROOT, Program, connect
from programs import ask as ask_blocking

import aioecho
from aioecho.echo import DatagramEcho, Echo
from aioecho.metrics import FAMILIES, Histogram, Metrics, format_metrics
from aioecho.ops.http import MOST, MOST_OF_HEAD
from aioecho.ops.metrics import MetricsEndpoint, parse_metrics_address, prefers_openmetrics
from aioecho.serving.measuring import measure_in_turns

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
        assert await ask(server, b"x" * 1000, ssl=tls.client, server_hostname="localhost") == b"x" * 1000
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
        reader, writer = await asyncio.open_connection(*server.server_address)
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
        time.sleep(0.8)  # noqa: ASYNC251 - what is measured
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
    names = {name for kind in (plain, measured) for parent in kind.__mro__ for name in vars(parent)}
    assert {name for name in names if getattr(plain, name, None) is not getattr(measured, name, None)} <= {
        *("wire", "__doc__", "__module__", "__slots__", "__dict__", "__weakref__", "__abstractmethods__"),
        *(
            "__firstlineno__",
            "__static_attributes__",
            "__init_subclass__",
            "__subclasshook__",
            "__class__",
            "_abc_impl",
        ),
    }


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
