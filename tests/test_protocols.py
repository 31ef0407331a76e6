"""The pages on protocols: the code of each serves the real clients that the page shows, and shows what the page says."""

import re
import smtplib
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from consoles import need, replay
from documents import Blocks, ask_server, execute, output_of, served
from helpers import ask_by_datagram
from programs import ROOT, Program, connect

import aioecho
from aioecho.serving import sweeper

PAGES = ROOT / "docs" / "pages" / "protocols"
BLOCKS = Blocks(*sorted(PAGES.glob("*.md")))
runs = BLOCKS.runs


def free_port() -> str:
    """Return a port that is free for streams and for datagrams."""
    while True:
        with (
            suppress(OSError),
            socket.create_server(("127.0.0.1", 0)) as stream,
            socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        ):
            datagrams.bind(stream.getsockname())
            return str(stream.getsockname()[1])


@contextmanager
def program(name: str) -> Iterator[tuple[aioecho.BackgroundServer, dict[str, str]]]:
    """Serve a page's program; with the server, and what the ports that the program names are here."""
    ports = {port: free_port() for port in re.findall(r"://127\.0\.0\.1:(\d+)", BLOCKS[name])}

    def replace(text: str) -> str:
        return re.sub(r"(?<=://127\.0\.0\.1:)\d+", lambda match: ports[match[0]], text)

    with served(BLOCKS[name], replace) as server:
        yield server, ports


def check_output(text: str) -> None:
    """Run a client's program and check that it prints what the comments of its own on their lines say."""
    expected = re.findall(r"^\s*# (.*)$", text, re.MULTILINE)
    assert [line.rstrip() for line in output_of(text).splitlines()] == expected


def test_every_block_has_a_name_of_its_own_and_is_run() -> None:
    assert not BLOCKS.unnamed
    assert set(BLOCKS) == BLOCKS.have_run


@pytest.mark.parametrize("page", [path.name for path in PAGES.glob("*.md")])
def test_links_lead_to_what_is_there(page: str) -> None:
    path = PAGES / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("name", [name for name in BLOCKS if name.endswith(".py")])
def test_a_program_is_of_20_to_60_lines(name: str) -> None:
    assert 20 <= len([line for line in BLOCKS[name].splitlines() if line]) <= 60


# index.md


@runs("chat-try")
def test_the_chat_serves_telnet() -> None:
    chat = Blocks(PAGES.parent / "start.md")["chat.py"]
    with served(chat) as server:
        replay(BLOCKS["chat-try"], {"9999": server.names[0].rpartition(":")[2]})
    assert server.stats.reasons == {"finished": 1}


# resp.md


@runs("store.py", "resp-try")
def test_the_store_serves_redis_cli_and_redis_benchmark() -> None:
    with program("store.py") as (_, ports):
        replay(BLOCKS["resp-try"], ports)


def test_the_store_answers_what_is_malformed() -> None:
    with program("store.py") as (server, _):
        for sent, reply in (
            (b"\r\nPING\r\n", b"+PONG\r\n"),
            (b"*0\r\nPING\r\n", b"+PONG\r\n"),
            (b"*x\r\nPING\r\n", b"-ERR Protocol error: expected '*' and a number up to 1024\r\n"),
            (b"*1\r\n$-1\r\n", b"-ERR Protocol error: expected '$' and a number up to 1048576\r\n"),
            (b"*2\r\n$3\r\nGET\r\n$1048574\r\n", b"-ERR Protocol error: expected '$' and a number up to 1048573\r\n"),
            (b"*1\r\n$4\r\nPI", b""),
        ):
            assert ask_server(server, sent) == reply
        assert ask_server(server, b"x" * 100_000).startswith(b"-ERR Protocol error: ")
        assert server.stats.failed == 1


# syslog.md


@contextmanager
def logs(tls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, dict[str, str]]]:
    monkeypatch.chdir(tls.files.folder)
    with program("logs.py") as (server, ports):
        yield server, ports


def wait_for_lines(capsys: pytest.CaptureFixture[str], count: int) -> list[str]:
    """Return what the program has printed, once there are so many lines, in any order."""
    shown = ""
    while shown.count("\n") < count:
        shown += capsys.readouterr().out
        time.sleep(0.005)
    host = socket.gethostname()
    return sorted(shown.replace(host, "vm").replace(host.partition(".")[0], "vm").splitlines())


@runs("logs.py", "syslog-try", "syslog-shown")
def test_the_receiver_gets_what_logger_sends_over_tcp_tls_and_udp(
    tls: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with logs(tls, monkeypatch) as (_, ports):
        replay(BLOCKS["syslog-try"], ports)
        shown = BLOCKS["syslog-shown"].splitlines()
        assert wait_for_lines(capsys, len(shown)) == sorted(shown)


@runs("rsyslog.conf")
def test_the_receiver_gets_what_rsyslog_forwards(
    tls: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    need("rsyslogd", "logger")
    with logs(tls, monkeypatch) as (server, ports):
        path = tmp_path / "log"
        (tmp_path / "rsyslog.conf").write_text(
            f'global(workDirectory="{tmp_path}")\nmodule(load="imuxsock" SysSock.Use="off")\n'
            f'input(type="imuxsock" Socket="{path}")\n' + BLOCKS["rsyslog.conf"].replace("601", ports["601"])
        )
        command = ("rsyslogd", "-n", "-f", tmp_path / "rsyslog.conf", "-i", tmp_path / "pid")
        with Program(*command) as daemon:
            while not path.exists():
                assert daemon.process.poll() is None, daemon.stderr()
                time.sleep(0.005)
            for text in ("one", "two"):
                with Program("logger", "-u", path, "-p", "local3.err", "-t", "app", text) as client:
                    assert client.end() == (0, b"", "")
            assert wait_for_lines(capsys, 2) == ["local3.err vm app one", "local3.err vm app two"]
            assert server.stats.streams.accepted == 1


def test_the_receiver_notes_what_is_malformed_or_too_long(
    tls: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with logs(tls, monkeypatch) as (server, _):
        sent = b"<999>no such priority\n<>\n9000 " + b"x" * 9000 + b"<0>1 broken\n12345678901 x\n"
        assert ask_server(server, sent) == b""
        assert wait_for_lines(capsys, 4) == [
            "kern.emerg 127.0.0.1 - 1 broken",
            "syslog.notice 127.0.0.1 - a message of more than 8192 bytes",
            "user.notice 127.0.0.1 - <999>no such priority",
            "user.notice 127.0.0.1 - <>",
        ]
    assert server.stats.streams.reasons == {"framing": 1}


# dns.md


@runs("names.py", "dns-try")
def test_the_name_server_answers_dig_over_udp_and_over_tcp() -> None:
    with program("names.py") as (server, ports):
        replay(BLOCKS["dns-try"], ports)
    assert server.stats.streams.completed == 2
    assert server.stats.datagrams.handled == 6


def test_the_name_server_answers_what_is_malformed() -> None:
    header, question = b"\1\2\1\0\0\1\0\0\0\0\0\0", b"\3www\7example\0\0\1\0\1"
    format_error = b"\1\2\x81\1" + bytes(8)
    with program("names.py") as (server, ports):
        for query in (
            header,
            header + question[:-1],
            header + b"\xc0\x0c\0\1\0\1",
            header + b"\3www",
            header + b"\x40" + b"w" * 64 + question,
            header + b"\1w" * 130 + question,
            header[:5] + b"\2" + header[6:] + question,
        ):
            assert ask_by_datagram(server.names[1], query) == format_error
            assert ask_server(server, struct.pack("!H", len(query)) + query) == b"\0\x0c" + format_error
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.connect(("127.0.0.1", int(ports["53"])))
            client.settimeout(10)
            for unanswered in (b"", header[:11], b"\1\2\x81\0" + header[4:] + question):
                client.send(unanswered)
            client.send(header + question)
            assert client.recv(1000).startswith(b"\1\2\x85\0\0\1\0\2")
    assert server.stats.datagrams.drops == {}
    assert server.stats.datagrams.reasons.keys() == {"finished"}


# smtp.md


@runs("mail.py", "smtp-try")
def test_the_mail_server_takes_a_mail_from_swaks(tls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tls.files.folder)
    with program("mail.py") as (server, ports):
        replay(BLOCKS["smtp-try"], ports)
    [(sender, recipients, lines)] = server.server.RequestHandlerClass.inbox
    assert (sender, recipients) == (b"bob@b.example", [b"ann@mail.example"])
    assert b"Subject: hello" in lines
    assert b".dot" in lines


@runs("smtp-client")
def test_the_mail_server_takes_a_mail_from_smtplib(tls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tls.files.folder)
    with program("mail.py") as (server, ports):
        check_output(BLOCKS["smtp-client"].replace(", 25)", f", {ports['25']})"))
    [(_, recipients, lines)] = server.server.RequestHandlerClass.inbox
    assert recipients == [b"ann@mail.example"]
    assert lines == [b"Subject: hello", b"", b"Are you well?"]


def test_the_mail_server_answers_what_is_malformed(tls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tls.files.folder)
    with program("mail.py") as (server, ports):
        sent = b"\r\nFOO\r\nEHLO\r\nDATA\r\nMAIL FROM:<a@b\r\nNOOP\n.\nRSET\r\nQUIT\r\nNOOP\r\n"
        numbers = [line[:3] for line in ask_server(server, sent).splitlines()]
        assert numbers == [b"220", b"500", b"500", b"503", b"530", b"530", b"500", b"221"]
        assert ask_server(server, b"x" * 100_000).splitlines()[1:] == [b"500 5.5.2 the line is too long"]
        with smtplib.SMTP("127.0.0.1", int(ports["25"])) as client:
            client.starttls(context=tls.client)
            # To end a message with a lone newline is smuggling: nothing ends there.
            client.ehlo()
            assert [client.docmd(command)[0] for command in ("MAIL FROM:<>", "MAIL FROM:<>", "DATA")] == [250, 503, 503]
            assert [client.docmd(command)[0] for command in ("RCPT TO:<a@mail.example>", "DATA")] == [250, 354]
            client.send("one\n.\nMAIL FROM:<eve@b>\n.\r\n..two\r\n.\r\n")
            assert client.getreply()[0] == 250
            assert client.docmd("RCPT TO:<a@mail.example>")[0] == 503
            for command in ("MAIL FROM:<>", "RCPT TO:<a@mail.example>", "DATA"):
                client.docmd(command)
            client.send("\r\n".join(["x" * 60_000] * 20 + [".", ""]))
            assert client.getreply()[0] == 552
            # 452 and not 550: the client sends the mail to the others later, and does not take them for absent.
            client.docmd("MAIL FROM:<>")
            replies = [client.docmd("RCPT TO:<a@mail.example>")[0] for _ in range(101)]
            assert replies == [250] * 100 + [452]
    [(_, _, lines)] = server.server.RequestHandlerClass.inbox
    assert lines == [b"one\n.\nMAIL FROM:<eve@b>\n.", b".two"]


# statsd.md


def flushed(capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    return {name: float(value) for name, value, _ in map(str.split, capsys.readouterr().out.splitlines())}


@runs("metrics.py", "statsd-try", "statsd-shown")
def test_metrics_that_nc_sends_are_summed_up(capsys: pytest.CaptureFixture[str]) -> None:
    with program("metrics.py") as (server, ports):
        replay(BLOCKS["statsd-try"], ports)
    lines = (line.rpartition(" ")[0] for line in capsys.readouterr().out.splitlines())
    assert list(lines) == [line.rpartition(" ")[0] for line in BLOCKS["statsd-shown"].splitlines()]
    assert server.stats.datagrams.handled == 4


def test_metrics_that_are_malformed_are_counted_and_the_others_taken(capsys: pytest.CaptureFixture[str]) -> None:
    bad = [b"", b"x", b"x:1", b":1|c", b"x:|c", b"x:nan|c", b"x:1|c|@0", b"x:1|c|@2", b"x:1|c|@1|y", b"x:1|h", b"\xff"]
    with program("metrics.py") as (server, ports):
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.sendto(b"\n".join([b"a:1|c", *bad, b"a:1|c"]), ("127.0.0.1", int(ports["8125"])))
        assert ask_server(server, b"a.b 1234567 2\nx\n\xff 1 2\nx y 2\nx nan 2\nc.d 3 4") == b""
    assert flushed(capsys) == {
        "a": 2, "statsd.bad_lines_seen": len(bad), "carbon.bad_lines_seen": 4, "a.b": 1234567, "c.d": 3,
    }  # fmt: skip


# mllp.md


@runs("ward.py", "mllp-client")
def test_the_ward_acknowledges_what_the_package_hl7_sends() -> None:
    pytest.importorskip("hl7", reason="not tried: there is no Python package hl7 on this machine")
    with program("ward.py") as (server, ports):
        check_output(BLOCKS["mllp-client"].replace("2575", ports["2575"]))
    assert list(server.server.RequestHandlerClass.messages) == [(b"desk", b"7")]


def test_the_ward_rejects_what_is_malformed_and_takes_the_next_message() -> None:
    good = b"\x0bMSH|^~\\&|desk||||||ADT^A01|8|T|2.5\r\x1c\r"
    with program("ward.py") as (server, _):
        for bad in (b"\x0b\x1c\r", b"hello\x1c\r", b"\x0bMSH|\x1c\r", b"\x0b" + b"x" * 2**21 + b"\x1c\r"):
            replies = ask_server(server, bad + good)
            assert re.findall(rb"\rMSA\|(\w\w)\|", replies) == [b"AR", b"AA"]
            assert b"||ACK|8|T|2.5\r" in replies


# modbus.md


@runs("device.py", "modbus-client")
def test_the_device_serves_pymodbus() -> None:
    pytest.importorskip("pymodbus", reason="not tried: there is no Python package pymodbus on this machine")
    with program("device.py") as (_, ports):
        check_output(BLOCKS["modbus-client"].replace("=502", f"={ports['502']}"))


def test_the_device_answers_what_is_malformed_with_the_protocols_exceptions() -> None:
    with program("device.py") as (server, _):
        for request, reply in (
            ("01", "81 01"),
            ("ff", "ff 01"),
            ("03", "83 03"),
            ("03 0000 007e", "83 03"),
            ("03 0000 0001 00", "83 03"),
            ("03 ffff 0001", "83 02"),
            ("06 0064 0001", "86 02"),
            ("10 0000 0002 02 0001", "90 03"),
            ("10 0000 0001 03 0001", "90 03"),
            ("10 0000 0000 00", "90 03"),
        ):
            sent, expected = bytes.fromhex(request), bytes.fromhex("0009 0000 0003 05" + reply)
            frame = struct.pack("!3HB", 9, 0, len(sent) + 1, 5) + sent
            assert ask_server(server, frame * 2) == expected * 2
        assert ask_server(server, b"GET / HTTP/1.1\r\n\r\n") == b""
        assert ask_server(server, bytes.fromhex("0009 0000 0001 05")) == b""
    assert server.stats.reasons.keys() <= {"finished", "too long"}


# http.md


@pytest.mark.slow
@runs("web.py", "http-try")
def test_the_endpoint_serves_curl_and_wrk() -> None:
    with program("web.py") as (server, ports):
        replay(BLOCKS["http-try"], ports)
    assert not server.stats.reasons["error"]


def test_the_endpoint_answers_what_is_malformed() -> None:
    good = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with program("web.py") as (server, _):
        for bad, status in (
            (b"HELLO\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\n\r\n", b"400"),
            (b"POST /upper HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
            (b"POST /upper HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", b"400"),
            (b"POST /upper HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n", b"501"),
            (b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n", b"431"),
            (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n" + good, b"200"),
            (b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\nHELLO\r\n\r\n", b"200"),
        ):
            statuses = re.findall(rb"HTTP/1.1 (\d+)", ask_server(server, good + bad))
            assert statuses[:2] == [b"200", status]
    assert not server.stats.reasons["error"]


# mqtt.md


@runs("broker.py", "mqtt-try")
def test_the_broker_serves_mosquittos_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subscribed = tmp_path / "subscribed"
    with program("broker.py") as (server, ports):
        handler = server.server.RequestHandlerClass
        join = handler.join

        def tell(self: Any, pattern: str) -> None:
            join(self, pattern)
            subscribed.touch()

        monkeypatch.setattr(handler, "join", tell)
        # What is published sooner than a busy machine has subscribed is never received.
        wait = f"until rm '{subscribed}' 2>/dev/null; do sleep 0.01; done"
        replay(BLOCKS["mqtt-try"], {**ports, "sleep 0.3": wait}, tmp_path)
    assert not server.stats.reasons["error"]


CONNECT, CONNACK = b"\x10\x0d\0\4MQTT\4\2\0\x3c\0\1x", b"\x20\2\0\0"


def test_the_broker_closes_on_what_is_malformed() -> None:
    with program("broker.py") as (server, _):
        assert ask_server(server, CONNECT + b"\x82\6\0\1\0\1a\0" + b"\x32\6\0\1a\0\2!" + b"\xc0\0") == (
            CONNACK + b"\x90\3\0\1\0" + b"\x30\4\0\1a!" + b"\x40\2\0\2" + b"\xd0\0"
        )
        assert ask_server(server, b"\x10\x0d\0\4MQTT\5\2\0\x3c\0\1x") == b"\x20\2\0\1"
        for first in (b"GET / HTTP/1.1\r\n\r\n", b"\xc0\0", CONNECT[:-1], b"\x10\xff\xff\xff\xff\1"):
            assert ask_server(server, first) == b""
        for bad in (
            CONNECT,
            b"\x30\xff\xff\xff\x7f",
            b"\x30\3\0\5a",
            b"\x30\5\0\3a/#",
            b"\x30\3\0\1\xff",
            b"\x32\4\0\1a\0",
            b"\x34\5\0\1a\0\1",
            b"\x80\6\0\1\0\1a\0",
            b"\x82\7\0\1\0\2a+\0",
            b"\x82\5\0\1\0\1a",
            b"\x82\2\0\1",
            b"\xf0\0",
        ):
            assert ask_server(server, CONNECT + bad + b"\xc0\0") == CONNACK, bad
    assert server.stats.reasons.keys() <= {"finished", "incomplete", "too long"}


@pytest.mark.slow
def test_the_broker_disconnects_a_client_that_is_silent_for_longer_than_its_keep_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sweeper, "LONGEST", 0.05)  # it is five seconds
    with program("broker.py") as (server, _), connect(server.names[0]) as client:
        client.sendall(CONNECT.replace(b"\x3c", b"\1"))
        assert client.recv(100) == CONNACK
        assert client.recv(100) == b""
        while not server.stats.reasons:
            time.sleep(0.01)
    assert server.stats.reasons == {"idle": 1}


def test_the_brokers_filters_match_as_the_protocol_says() -> None:
    matches = execute(BLOCKS["broker.py"].replace("__main__", "broker"))["matches"]
    for pattern, topic in (("a/+", "a/b"), ("a/#", "a"), ("a/#", "a/b/c"), ("#", "a/b"), ("+/+", "/a"), ("a", "a"),
                           ("$SYS/#", "$SYS/a")):  # fmt: skip
        assert matches(pattern, topic)
    for pattern, topic in (("a/+", "a"), ("a/+", "a/b/c"), ("a", "b"), ("+", "/a"), ("a/#", "b/a"), ("a/b/#", "a"),
                           ("#", "$SYS/a"), ("+/a", "$SYS/a")):  # fmt: skip
        assert not matches(pattern, topic)


# gps.md


@runs("trackers.py", "gps-try", "gps-shown", "gps-report")
def test_a_trackers_reports_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    assert BLOCKS["gps-report"].strip() in BLOCKS["gps-try"].replace("\\\n", "")
    with program("trackers.py") as (_, ports):
        replay(BLOCKS["gps-try"], ports)
    assert capsys.readouterr().out == BLOCKS["gps-shown"]


def test_what_is_malformed_of_a_tracker_is_skipped_up_to_a_point(capsys: pytest.CaptureFixture[str]) -> None:
    number = b"359710049095095"
    login, bad = b"##,imei:%b,A;" % number, b"imei:%b,tracker,x;\r\n" % number
    with program("trackers.py") as (server, _):
        assert ask_server(server, login + bad * 10 + number + b";") == b"LOADON"
        assert ask_server(server, login + bad * 11 + number + b";") == b"LOAD"
        assert ask_server(server, number + b";") == b""
        assert ask_server(server, b"\xff" * 5000) == b""
    assert server.stats.reasons == {"finished": 3, "too long": 1}
    assert capsys.readouterr().out == ""


# tftp.md


@runs("boot.py", "tftp-try")
def test_files_are_transferred_by_tftp_and_by_atftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with program("boot.py") as (_, ports):
        replay(BLOCKS["tftp-try"], ports)


def test_a_transfer_answers_what_is_malformed_and_ignores_what_comes_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "boot").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "boot" / "kernel").write_bytes(bytes(700))
    with program("boot.py") as (server, ports), socket.socket(type=socket.SOCK_DGRAM) as client:
        server.server.RequestHandlerClass.patience = 0.05
        client.settimeout(10)
        where = ("127.0.0.1", int(ports["69"]))
        for request, code in ((b"", 4), (b"\0", 4), (b"\0\1kernel", 4), (b"\0\7kernel\0octet\0", 4), (b"\0\1\0octet\0", 4),
                              (b"\0\1kernel\0mail\0", 0), (b"\0\1../secret\0octet\0", 1), (b"\0\1\xff\0octet\0", 1),
                              (b"\0\1.\0octet\0", 1), (b"\0\2kernel\0octet\0", 6), (b"\0\2..\0octet\0", 6),
                              (b"\0\1" + b"x" * 256 + b"\0octet\0", 4),
                              (b"\0\1" + b"\xff" * 255 + b"\0octet\0", 1)):  # fmt: skip
            client.sendto(request, where)
            reply, came_from = client.recvfrom(1000)
            assert (reply[:4], came_from[1] != where[1]) == (b"\0\5\0" + bytes([code]), True), request
        client.sendto(b"\0\5\0\0\0", where)  # an error, which is not answered
        client.sendto(b"\0\2new\0octet\0", where)
        reply, transfer = client.recvfrom(1000)
        assert reply == b"\0\4\0\0"
        client.sendto(b"\0\3\0\1" + bytes(513), transfer)  # a block too long
        while (reply := client.recv(1000)) == b"\0\4\0\0":
            pass  # sent again, as the block was late
        assert reply[:4] == b"\0\5\0\3"
        assert not (tmp_path / "boot" / "new").exists()
        client.sendto(b"\0\1kernel\0OCTET\0blksize\0001024\0", where)
        reply, transfer = client.recvfrom(1000)
        assert reply == b"\0\3\0\1" + bytes(512)
        assert client.recv(1000) == reply  # it comes again as it was not acknowledged
        for _ in range(2):
            client.sendto(b"\0\4\0\1", transfer)
        replies = {client.recv(1000) for _ in range(2)}
        assert replies <= {reply, b"\0\3\0\2" + bytes(188)}
        client.sendto(b"\0\5\0\0enough\0", transfer)
