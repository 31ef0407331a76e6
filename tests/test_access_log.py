"""The access log, how records are written, and the networks that may connect."""

import asyncio
import ipaddress
import json
import logging
import os
import signal
import socket
import socketserver
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ON_ONE_LOOP, ask, ask_by_datagram, check_mistake, close, handler, invoke, needs_ipv6
from programs import ROOT, Program
from programs import ask as ask_program

import aioecho
from aioecho import Limits
from aioecho.cli.log_format import JSONFormatter, TextFormatter
from aioecho.echo import Echo, Upper
from aioecho.runtime.log_config import apply_log_config
from aioecho.runtime.log_files import reopen_log_files
from aioecho.serving.admission import host_of
from aioecho.serving.networks import read_networks


class BlockingUpper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


def records_of(caplog: pytest.LogCaptureFixture, name: str = "aioecho.access") -> list[Any]:
    return [record for record in caplog.records if record.name == name]


@pytest.fixture(autouse=True)
def level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "aioecho")


# A line for each connection


@pytest.mark.parametrize("kind", [Upper, BlockingUpper])
async def test_each_connection_is_a_line_when_it_has_ended(caplog: pytest.LogCaptureFixture, kind: Any) -> None:
    async with aioecho.TCPServer(ANYWHERE, kind, access_log=True) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        host, port = writer.get_extra_info("sockname")
        writer.write(b"hello\n")
        assert await reader.readline() == b"HELLO\n"
        assert not records_of(caplog)
        await close(writer)
        await settle(lambda: records_of(caplog))
        endpoint = server.names[0]
    [record] = records_of(caplog)
    words = record.getMessage().split()
    assert words[:2] == [f"{host}:{port}", endpoint]
    tls, first, total = map(int, words[2].split("/"))
    assert tls == -1
    assert 0 <= first <= total
    assert words[3:] == ["6/6", "completed", "finished"]
    assert record.client_address == (host, port)
    assert record.endpoint == endpoint
    assert record.tls_seconds is None
    assert 0 <= record.first_byte_seconds <= record.seconds


async def test_over_tls_the_line_has_the_time_of_the_handshake(
    caplog: pytest.LogCaptureFixture, tls: SimpleNamespace
) -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, access_log=True, ssl=tls.server) as server:
        reader, writer = await asyncio.open_connection(*server.server_address, ssl=tls.client)
        writer.write(b"x\n")
        assert await reader.readline() == b"X\n"
        await close(writer)
        await settle(lambda: records_of(caplog))
    [record] = records_of(caplog)
    assert record.tls_seconds is not None
    assert 0 <= record.tls_seconds <= record.first_byte_seconds
    assert (record.bytes_in, record.bytes_out) == (2, 2)  # the payload


async def test_a_connection_without_a_byte_has_no_time_of_its_first(caplog: pytest.LogCaptureFixture) -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, access_log=True) as server:
        assert await ask(server, b"") == b""
        await settle(lambda: records_of(caplog))
    [record] = records_of(caplog)
    assert record.first_byte_seconds is None
    assert record.getMessage().split()[2].startswith("-1/-1/")


async def test_a_rejected_connection_is_a_line_too(caplog: pytest.LogCaptureFixture) -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, access_log=True, deny=["127.0.0.0/8"]) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        assert await reader.read() == b""
        await close(writer)
        assert server.stats.reasons == {"not allowed": 1}
        check_identity(server)
        [record] = records_of(caplog)
        assert record.getMessage().endswith(f" {server.names[0]} -1/-1/0 0/0 rejected not allowed")


async def test_there_is_one_record_of_an_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aioecho.connection")
    async with aioecho.TCPServer(ANYWHERE, Upper) as server:
        await ask(server)
        await settle(lambda: records_of(caplog, "aioecho.connection"))
        assert not records_of(caplog)
        server.access_log = True
        await ask(server)
        await settle(lambda: records_of(caplog))
    assert len(records_of(caplog)) == len(records_of(caplog, "aioecho.connection")) == 1


async def test_without_an_access_log_nothing_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    counted: list[bool] = []

    async def handle(self: Any) -> None:
        counted.append(self.writer.transport.get_protocol().counts)
        await self.reader.read(1)

    for access_log in (False, True):
        async with aioecho.TCPServer(ANYWHERE, handler(handle), access_log=access_log) as server:
            await ask(server)
    assert counted == [False, True]


async def test_a_unix_client_can_not_forge_a_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    async with aioecho.UnixStreamServer(str(tmp_path / "s"), Echo, access_log=True) as server:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind("\0a b\n127.0.0.1:1")
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, server.server_address)
        await settle(lambda: records_of(caplog))
    [record] = records_of(caplog)
    assert record.getMessage().startswith(r"@a\x20b\n127.0.0.1:1 unix:")


# How records are written


def make_record(**fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "aioecho.x", "levelname": "INFO", "msg": "%d is", "args": (1,), **fields})


def test_json_has_the_records_own_fields() -> None:
    record = make_record(client_address=("::1", 7, 0, 0), bytes_in=3, tls_seconds=None)
    found = json.loads(JSONFormatter().format(record))
    assert found["message"] == "1 is"
    assert (found["level"], found["logger"], found["process"]) == ("INFO", "aioecho.x", os.getpid())
    assert (found["client_address"], found["bytes_in"], found["tls_seconds"]) == ("[::1]:7", 3, None)
    assert found["time"].endswith("+00:00")
    assert "args" not in found


def test_json_is_one_line_with_the_traceback() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        text = JSONFormatter().format(make_record(exc_info=sys.exc_info()))
    assert "\n" not in text
    assert "ValueError: two\nlines" in json.loads(text)["exception"]


def test_colors_are_of_the_level_alone() -> None:
    record = make_record()
    assert TextFormatter(has_colors=True).format(record).endswith(" \x1b[32mINFO\x1b[0m aioecho.x: 1 is")
    assert record.levelname == "INFO"
    assert TextFormatter().format(record).endswith(" INFO aioecho.x: 1 is")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_writes_the_access_log_as_json(workers: str) -> None:
    arguments = ("--access-log", "--log-format", "json", "--log-level", "warning", "--workers", workers)
    with Program.aioecho("serve", "upper", "--port", "0", *arguments) as server:
        endpoint = server.listening()
        assert ask_program(endpoint, b"x\n") == b"X\n"
        assert server.stop() == 0
        [line] = server.stderr().splitlines()
    found = json.loads(line)
    assert (found["logger"], found["endpoint"], found["reason"]) == ("aioecho.access", endpoint, "finished")
    assert (found["bytes_in"], found["bytes_out"]) == (2, 2)


# Logging by a file

TOML = """
[formatters.plain]
format = "%(name)s|%(message)s"
[handlers.file]
class = "logging.handlers.WatchedFileHandler"
filename = "{file}"
formatter = "plain"
[loggers.aioecho]
level = "INFO"
handlers = ["file"]
"""

INI = """
[loggers]
keys = root
[handlers]
keys = file
[formatters]
keys = plain
[logger_root]
level = INFO
handlers = file
[handler_file]
class = FileHandler
args = ({file!r},)
formatter = plain
[formatter_plain]
format = %(name)s|%(message)s
"""

JSON = {
    "formatters": {"plain": {"format": "%(name)s|%(message)s"}},
    "handlers": {"file": {"class": "logging.FileHandler", "filename": "FILE", "formatter": "plain"}},
    "root": {"level": "INFO", "handlers": ["file"]},
}


def write_config(folder: Path, suffix: str, log: Path) -> Path:
    text = {
        "toml": TOML.format(file=log),
        "ini": INI.format(file=str(log)),
        "json": json.dumps(JSON).replace("FILE", str(log)),
    }
    config = folder / f"log.{suffix}"
    config.write_text(text[suffix])
    return config


@pytest.mark.parametrize("suffix", ["toml", "ini", "json"])
def test_a_file_configures_logging_and_sighup_opens_the_log_anew(tmp_path: Path, suffix: str) -> None:
    log = tmp_path / "server.log"
    config = write_config(tmp_path, suffix, log)
    with Program.aioecho("serve", "--port", "0", "--log-config", config, "--access-log") as server:
        endpoint = server.listening()
        assert log.read_text() == f"aioecho.server|listening on {endpoint}\n"
        log.rename(tmp_path / "server.log.1")
        server.signal(signal.SIGHUP)
        while not log.exists() or "SIGHUP" not in log.read_text():
            assert server.process.poll() is None
        ask_program(endpoint, b"x\n")
        assert server.stop() == 0
        assert server.stderr() == ""
    assert "aioecho.access|127.0.0.1:" in log.read_text()
    assert "access" not in (tmp_path / "server.log.1").read_text()


def test_a_file_that_has_become_wrong_changes_nothing_at_sighup(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    config = write_config(tmp_path, "toml", log)
    with Program.aioecho("serve", "--port", "0", "--log-config", config) as server:
        server.listening()
        config.write_text(TOML.format(file=log).replace("WatchedFileHandler", "NoSuchHandler"))
        server.signal(signal.SIGHUP)
        while "SIGHUP: there is nothing" not in log.read_text():
            assert server.process.poll() is None
        assert server.stop() == 0
    assert "aioecho.logs|SIGHUP: logging stays as it was: " in log.read_text()
    assert "NoSuchHandler" in log.read_text()


def test_workers_log_by_the_file_too(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    config = write_config(tmp_path, "json", log)
    arguments = ("--log-config", config, "--access-log", "--workers", "2")
    with Program.aioecho("serve", "--port", "0", *arguments) as server:
        ask_program(server.listening(), b"x\n")
        assert server.stop() == 0
    assert "aioecho.access|127.0.0.1:" in log.read_text()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("log.json", "{", "log.json: Expecting property name"),
        ("log.json", "[]", "log.json: expected a mapping"),
        ("log.toml", "x = ", "log.toml: Invalid value"),
        ("log.toml", '[handlers.x]\nclass = "absent.Handler"', "log.toml: Unable to configure handler 'x'"),
        ("log.ini", "", "log.ini: "),
        ("log.yaml", "", "log.yaml: expected .json, .toml or .ini: write it as one of these"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    outcome = invoke("serve", "--log-config", name, "--check-config", cwd=tmp_path)
    check_mistake(outcome, message)


def test_a_file_that_can_not_be_read_is_a_mistake(tmp_path: Path) -> None:
    outcome = invoke("serve", "--log-config", "absent.toml", "--check-config", cwd=tmp_path)
    check_mistake(outcome, "cannot read ", "absent.toml: No such file or directory")


def test_what_fails_leaves_logging_as_it_was(tmp_path: Path) -> None:
    mine = logging.getLogger("mine.of.this.test")
    handler = logging.NullHandler()
    mine.addHandler(handler)
    mine.setLevel(logging.ERROR)
    (tmp_path / "log.toml").write_text(
        '[handlers.good]\nclass = "logging.NullHandler"\n'
        '[loggers."mine.of.this.test"]\nlevel = "DEBUG"\nhandlers = ["good"]\n[root]\nlevel = "NONE"\n'
    )
    with pytest.raises(ValueError, match="root"):
        apply_log_config(tmp_path / "log.toml")
    assert (mine.handlers, mine.level, mine.disabled) == ([handler], logging.ERROR, False)


def test_a_log_file_is_opened_anew_only_if_it_was_moved(tmp_path: Path) -> None:
    file = tmp_path / "x.log"
    mine = logging.getLogger("mine.of.this.file")
    handler = logging.FileHandler(file, mode="w")
    mine.addHandler(handler)
    try:
        mine.error("one")
        reopen_log_files()
        mine.error("two")
        assert file.read_text() == "one\ntwo\n"
        file.rename(tmp_path / "x.log.1")
        reopen_log_files()
        mine.error("three")
        assert file.read_text() == "three\n"
    finally:
        mine.removeHandler(handler)
        handler.close()


def test_a_log_file_that_cannot_be_opened_anew_is_written_on(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    mine = logging.getLogger("aioecho.logs")
    handler = logging.FileHandler(folder / "x.log")
    mine.addHandler(handler)
    try:
        mine.error("one")
        folder.rename(tmp_path / "moved")
        reopen_log_files()
        mine.error("two")
        lines = (tmp_path / "moved" / "x.log").read_text().splitlines()
        assert lines == ["one", f"cannot open {folder / 'x.log'} anew: No such file or directory", "two"]
    finally:
        mine.removeHandler(handler)
        handler.close()


# With run()

PROGRAM = """
import logging, sys
import aioecho
from aioecho.echo import Upper

def configure():
    logging.basicConfig(level=logging.INFO, format="%(name)s|%(message)s")

CONFIGS = {
    "function": configure,
    "mapping": {
        "formatters": {"plain": {"format": "%(name)s|%(message)s"}},
        "handlers": {"err": {"class": "logging.StreamHandler", "formatter": "plain"}},
        "root": {"level": "INFO", "handlers": ["err"]},
    },
}

if __name__ == "__main__":
    aioecho.run(Upper, sys.argv[3], workers=int(sys.argv[1]), access_log=True, log_config=CONFIGS[sys.argv[2]])
"""


@pytest.mark.parametrize("kind", ["function", "mapping"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_logging_that_run_is_given_reaches_the_workers(tmp_path: Path, workers: str, kind: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.fileno()
        command = (sys.executable, "program.py", workers, kind, f"fd://{number}")
        with Program(*command, cwd=tmp_path, pass_fds=[number], env={"PYTHONPATH": str(ROOT)}) as server:
            assert ask_program(f"tcp://127.0.0.1:{sock.getsockname()[1]}", b"x\n") == b"X\n"
            assert server.stop() == 0
            assert "aioecho.access|127.0.0.1:" in server.stderr()


# Networks


@pytest.mark.parametrize(
    ("allow", "deny", "host", "is_allowed"),
    [
        ([], ["10.0.0.0/8"], "10.1.2.3", False),
        ([], ["10.0.0.0/8"], "11.1.2.3", True),
        (["10.0.0.0/8"], [], "11.1.2.3", False),
        (["10.0.0.0/8"], [], "10.1.2.3", True),
        (["10.0.0.0/8"], ["10.1.0.0/16"], "10.1.2.3", False),
        (["10.1.0.0/16"], ["10.0.0.0/8"], "10.1.2.3", False),
        (["0.0.0.0/0"], [], "::1", False),
        (["::/0"], [], "10.1.2.3", False),
        (["2001:db8::/32"], [], "2001:db8:1::5", True),
        (["2001:db8::/32"], [], "2001:db9::5", False),
        ([], ["10.0.0.0/8"], "::ffff:10.1.2.3", False),
        ([], ["::ffff:10.0.0.0/104"], "10.1.2.3", False),
        ([], ["fe80::/10"], "fe80::1%eth0", False),
        (["192.0.2.1"], [], "192.0.2.1", True),
    ],
)
def test_networks_are_allowed_and_denied(allow: list[str], deny: list[str], host: str, is_allowed: bool) -> None:
    networks = read_networks(allow, deny)
    assert networks is not None
    assert networks.allow((host, 1)) is is_allowed
    assert networks.allow("/a/path") is True


def test_a_text_that_is_no_network_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"allow: 'example\.org' is no network, as 10\.0\.0\.0/8 is"):
        aioecho.serve(Echo, "tcp://127.0.0.1:0", allow=["example.org"])
    with pytest.raises(TypeError, match=r"deny must be a list of networks, not '10\.0\.0\.0/8'"):
        aioecho.serve(Echo, "tcp://127.0.0.1:0", deny="10.0.0.0/8")
    aioecho.serve(Echo, "tcp://127.0.0.1:0", deny=[ipaddress.ip_network("10.0.0.0/8")])  # type: ignore[list-item]


async def test_a_client_that_is_allowed_is_served() -> None:
    async with aioecho.TCPServer(ANYWHERE, Upper, allow=["127.0.0.1"]) as server:
        assert await ask(server) == b"X\n"


@needs_ipv6
async def test_an_ipv4_client_of_a_socket_for_both_families_is_in_its_ipv4_network() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as sock:
        port = sock.getsockname()[1]
        async with aioecho.serve(Upper, sock=sock.dup(), deny=["127.0.0.0/8"]) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert await reader.read() == b""
            await close(writer)
            assert await ask(("::1", port)) == b"X\n"
            assert server.stats.reasons["not allowed"] == 1


@pytest.mark.parametrize("sessions", [False, True])
async def test_a_datagram_of_a_denied_network_is_dropped(sessions_end_soon: None, sessions: bool) -> None:
    class Reply(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            self.reply(self.data)

    class ReplyToAll(aioecho.DatagramSessionHandler):
        async def handle(self) -> None:
            async for data in self.datagrams:
                await self.reply(data)

    kind: Any = ReplyToAll if sessions else Reply
    async with aioecho.UDPServer(ANYWHERE, kind, deny=["127.0.0.2/32"]) as server:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.2", 0))
            sock.sendto(b"x", server.server_address)
            await settle(lambda: server.stats.drops["not allowed"] == 1)
        assert await asyncio.to_thread(ask_by_datagram, server.server_address) == b"hello"


def test_an_ipv6_host_is_its_network_of_64_bits() -> None:
    assert host_of(("2001:db8:0:1::1", 1, 0, 0)) == host_of(("2001:db8:0:1:ffff::2", 2, 0, 0))
    assert host_of(("2001:db8:0:1::1", 1, 0, 0)) != host_of(("2001:db8:0:2::1", 1, 0, 0))
    assert host_of(("192.0.2.1", 1)) == "192.0.2.1"
    assert host_of(("fe80::1%eth0", 1, 0, 2)) != host_of(("fe80::2%eth0", 1, 0, 2))
    assert host_of(("64:ff9b::192.0.2.1", 1, 0, 0)) != host_of(("64:ff9b::192.0.2.2", 1, 0, 0))
    assert host_of("/a/path") is None


@ON_ONE_LOOP
async def test_max_per_host_counts_the_addresses_of_an_ipv6_network_together() -> None:
    async with aioecho.TCPServer(ANYWHERE, Echo, limits=Limits(max_per_host=2)) as server:
        admit = server.admission.admit
        assert [admit((f"2001:db8::{number}", 1, 0, 0)) for number in (1, 2, 3)] == [None, None, "per host"]
        assert admit(("2001:db8:0:1::1", 1, 0, 0)) is None
