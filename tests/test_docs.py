"""The documentation's pages: each code block is run, by the test that names it, and its tables are what the code has."""

import ast
import asyncio
import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import words
from click.testing import CliRunner
from documents import Blocks, ask_server, execute, load, output_of, served
from helpers import invoke, reset
from programs import ROOT, Program, ask, can_connect, connect, eventually, read_line

import aioecho
from aioecho.check import run
from aioecho.cli import main
from aioecho.echo import Echo, Upper
from aioecho.framing import LengthPrefixed

PAGES = ROOT / "docs" / "pages"
# The pages on protocols are test_protocols.py's.
BLOCKS = Blocks(*sorted(path for path in PAGES.rglob("*.md") if path.parent.name != "protocols"))
runs = BLOCKS.runs


def read_page(name: str) -> str:
    return (PAGES / name).read_text("utf-8")


def test_every_block_has_a_name_of_its_own_and_is_run() -> None:
    assert not BLOCKS.unnamed
    assert set(BLOCKS) == BLOCKS.have_run


# What pages say that can be looked up


@pytest.mark.once
def test_the_words_are_plain() -> None:
    found, total = words.count([str(ROOT / "README.md"), str(ROOT / "CHANGELOG.md"), str(PAGES)])
    assert total > 5000
    assert found.total() <= total / 1000, found


@pytest.mark.once
def test_words_are_counted_in_prose_alone(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("Each `who` is\n```python\nwho = nobody\n```\n[a](who) one.\n")
    (tmp_path / "module.py").write_text(
        '"""Who is?"""\n\n# those\nx = "nobody"\n\nclass A:\n    y: int\n    """whose"""\n'
    )
    found, total = words.count([str(tmp_path / "page.md")])
    assert (dict(found), total) == ({"each": 1}, 4)
    found, _ = words.count([str(tmp_path / "module.py")])
    assert dict(found) == {"who": 1, "those": 1, "whose": 1}


@pytest.mark.once
@runs("words")
def test_the_command_that_counts_words_counts_them() -> None:
    command, of_package = BLOCKS["words"].splitlines()
    with Program("sh", "-c", command.replace("python ", f"'{sys.executable}' "), cwd=ROOT) as program:
        code, output, errors = program.end()
    assert (code, errors) == (0, "")
    assert re.match(rb"\d\.\d\d in 1,000 words \(\d+ of [\d,]+\)", output)
    assert of_package == "python tests/words.py aioecho"


@pytest.mark.once
@pytest.mark.parametrize("page", ["../../README.md", "../../CHANGELOG.md", *(path.name for path in PAGES.glob("*.md"))])
def test_links_lead_to_what_is_there(page: str) -> None:
    path = PAGES / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if not target.startswith(("http", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_the_reference_has_every_name_that_users_get() -> None:
    reference = "".join(path.read_text("utf-8") for path in (PAGES / "reference").glob("*.md"))
    assert set(aioecho.__all__) - {"__version__"} <= set(re.findall(r"^::: aioecho\.(\w+)$", reference, re.MULTILINE))


def test_pages_speak_of_every_name_that_users_get() -> None:
    text = "".join(path.read_text("utf-8") for path in (ROOT / "README.md", *PAGES.glob("*.md")))
    assert [name for name in aioecho.__all__ if name not in text and name != "__version__"] == []


@pytest.mark.parametrize("kind", [aioecho.Limits, aioecho.Timeouts])
def test_the_table_of_limits_has_every_name_and_its_default(kind: Any) -> None:
    rows = re.findall(rf"^\| `{kind.__name__}\.(\w+)` \| [^|]+ \| `([^`]+)`", read_page("limits.md"), re.MULTILINE)
    expected = {field.name: field.default for field in dataclasses.fields(kind)}
    assert {name: ast.literal_eval(default) for name, default in rows} == expected


def test_the_timeouts_of_the_example_are_the_defaults() -> None:
    # All but the first four limits: the page says so.
    arguments = re.findall(r"^        (\w+)=([^,]+),", BLOCKS["limits"], re.MULTILINE)
    defaults = {**dataclasses.asdict(aioecho.Limits()), **dataclasses.asdict(aioecho.Timeouts())}
    assert [name for name, value in arguments if eval(value) != defaults[name]] == [
        "max_connections", "overflow", "max_per_host", "accept_rate",
    ]  # fmt: skip


@pytest.mark.parametrize(("command", "page"), [("serve", "cli.md"), ("send", "cli.md"), ("load", "benchmarks.md")])
def test_the_tables_of_options_have_them_all(command: str, page: str) -> None:
    assert isinstance(main, click.Group)
    found = main.get_command(click.Context(main), command)
    assert found is not None
    options = {option for param in found.params if isinstance(param, click.Option) for option in param.opts}
    text = read_page(page)
    assert [option for option in options if option.startswith("--") and f"`{option}" not in text] == []


def test_the_table_of_loggers_has_them_all() -> None:
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "aioecho").rglob("*.py"))
    logged = set(re.findall(r'getLogger\("(aioecho[\w.]*)"\)', sources))
    assert logged == set(re.findall(r"^\| `(aioecho[\w.]*)` \|", read_page("logging.md"), re.MULTILINE))


@pytest.mark.once
@pytest.mark.timeout(120)
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        "docs/mkdocs.yml",
        "-d",
        str(tmp_path / "site"),
    ]
    with Program(*command, cwd=ROOT, env={"NO_MKDOCS_2_WARNING": "1"}) as program:
        code, _, errors = program.end(timeout=100)
    assert code == 0, errors
    reference = (tmp_path / "site" / "reference" / "servers.html").read_text()
    assert 'id="aioecho.TCPServer"' in reference
    assert ":class:" not in reference


# start.md


@runs("room.py", "say")
def test_the_room_is_a_program_to_which_a_line_can_be_said(tmp_path: Path) -> None:
    with served(BLOCKS["room.py"]) as server, connect(server.names[0]) as listener:
        listener.sendall(b"hello?\n")
        assert read_line(listener) == b"hello?\n"
        command = shlex.split(BLOCKS["say"].replace("tcp://127.0.0.1:9999", server.names[0]))
        outcome = CliRunner().invoke(main, command[3:])
        assert (outcome.exit_code, outcome.output) == (0, "Hello, Room!\n")
        assert read_line(listener) == b"Hello, Room!\n"


@runs("chat.py")
def test_a_member_that_does_not_read_is_cut_off_and_the_others_go_on() -> None:
    text = BLOCKS["chat.py"].replace("2**20", "2**16")
    assert text != BLOCKS["chat.py"]
    with served(text) as server, connect(server.names[0]) as deaf, connect(server.names[0]) as speaker:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
        deaf.sendall(b"Deaf\n")
        with speaker.makefile("rb") as replies:
            speaker.sendall(b"Speaker\n")
            while b"Speaker: has joined\n" not in replies.readline():
                pass
            while server.stats.reasons["broadcast"] == 0:
                speaker.sendall(b"x" * 2**15 + b"\n")
                replies.readline()
            speaker.sendall(b"the end\n")
            while replies.readline() != b"Speaker: the end\n":
                pass
    assert server.stats.completed == 1


PAGES_TESTS = (
    "test_board.py",
    "test_chat.py",
    "test_upper.py",
    "test_legacy.py",
    "test_port.py",
    "test_network.py",
    "test_unit.py",
    "test_time.py",
)


@runs("board.py", *PAGES_TESTS)
def test_the_tests_on_the_pages_pass(tmp_path: Path) -> None:
    has_looptime = importlib.util.find_spec("looptime") is not None
    names = [name for name in PAGES_TESTS if has_looptime or name != "test_time.py"]
    for name in ("board.py", "chat.py", *names):
        (tmp_path / name).write_text(BLOCKS[name])
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\npythonpath = .\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_aioecho") is None:  # it is run from its sources
        command += ["-p", "aioecho.testing.pytest_aioecho"]
    with Program(*command, cwd=tmp_path, env={"PYTEST_ADDOPTS": ""}) as program:
        code, output, errors = program.end()
    assert code == 0, (output, errors)
    assert b"%d passed" % (len(names) + 1) in output


@pytest.mark.once
def test_state_a_task_and_a_test_take_no_more_than_forty_lines() -> None:
    lines = (BLOCKS["board.py"] + BLOCKS["test_board.py"]).splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


# handlers.md


@runs("life")
def test_a_handler_lives_as_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with served(BLOCKS["life"]) as server, connect(server.names[0]) as sock:
        assert read_line(sock) == b"Hello, 127.0.0.1!\n"
        assert ask_server(server, b"1\n2\n") == b"Hello, 127.0.0.1!\n1\n2\n"
        while len(server.connections) > 1:  # it has ended for its client, and is counted a moment later
            time.sleep(0.001)
    assert capfd.readouterr().out.splitlines() == ["2 lines; 1 others are connected", "0 lines; 0 others are connected"]


@runs("slow")
def test_slow_handlers_keep_no_other_client_waiting() -> None:
    text = BLOCKS["slow"].replace("asyncio.sleep(2)", "asyncio.sleep(0.3)")
    assert text != BLOCKS["slow"]
    output = output_of(text)
    assert all(rf"b'CLIENT {number}\n'" in output for number in range(5))
    found = re.search(r" (\d+\.\d) s\n$", output)
    assert found
    assert 0.3 <= float(found[1]) < 5 * 0.3


@runs("arguments")
def test_arguments_come_with_partial() -> None:
    with served(BLOCKS["arguments"]) as server:
        assert ask_server(server) == b"Good morning!\n"


@runs("lifespan")
def test_a_database_is_open_while_the_server_serves(tmp_path: Path) -> None:
    text = BLOCKS["lifespan"].replace('"visits.db"', repr(str(tmp_path / "visits.db")))
    for expected in ([b"visit 1\n", b"visit 2\n"], [b"visit 3\n"]):
        with served(text) as server:
            assert [ask_server(server) for _ in expected] == expected


@runs("subscriber")
def test_a_publisher_notices_that_subscribers_go_and_says_goodbye() -> None:
    with served(BLOCKS["subscriber"]) as server:
        with connect(server.names[0]) as lost, connect(server.names[0]) as kept, kept.makefile("rb") as news:
            while sum(connection.handler is not None for connection in server.connections) < 2:
                time.sleep(0.001)
            reset(lost)
            while server.stats.active > 1:
                time.sleep(0.001)
            server.server.begin_shutdown()
            assert news.read() == b"goodbye\n"
        assert server.stats.reasons["connection lost"] == 1


@runs("tasks-beside")
def test_a_task_beside_the_handler_beats_while_it_reads() -> None:
    with (
        served(BLOCKS["tasks-beside"]) as server,
        connect(server.names[0]) as sock,
        sock.makefile("rb") as replies,
    ):
        assert replies.readline() == b"beat\n"
        sock.sendall(b"hello\n")
        assert replies.readline() == b"hello\n"


@runs("replies-from-tasks")
def test_replies_from_tasks_come_in_any_order_and_after_the_clients_end() -> None:
    framing = LengthPrefixed(4)
    with served(BLOCKS["replies-from-tasks"]) as server, connect(server.names[0]) as sock:
        sock.sendall(framing.join(b"1 0.2") + framing.join(b"2 0"))
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as replies:
            assert replies.read() == framing.join(b"2 done") + framing.join(b"1 done")
        with connect(server.names[0]) as other, other.makefile("rb") as replies:
            other.sendall(framing.join(b"3 0.7") + framing.join(b"4 0"))
            assert replies.read(10) == framing.join(b"4 done")
            server.server.begin_shutdown()
            assert replies.read() == framing.join(b"3 done")


@runs("factory")
def test_a_port_for_the_administrator_has_limits_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(BLOCKS["factory"].replace("9999", "0"))
    with Program.aioecho("serve", "program:make_servers", "--factory", cwd=tmp_path) as program:
        endpoint = program.listening()
        with connect(endpoint) as sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"
            assert ask(f"unix:{tmp_path / 'admin.sock'}") == b"1 connections\n"
        assert program.stop() == 0, program.stderr()


@runs("publish")
def test_a_room_of_two_workers_is_one_room(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text(BLOCKS["publish"].replace("tcp://127.0.0.1:9999", "unix:s"))
    with Program(sys.executable, "room.py", cwd=tmp_path) as program, ExitStack() as stack:
        eventually(lambda: can_connect(f"unix:{tmp_path / 's'}"))
        # Most likely in both, and if not, it is the same to them.
        members = [stack.enter_context(connect(f"unix:{tmp_path / 's'}")) for _ in range(8)]
        speaker = stack.enter_context(connect(f"unix:{tmp_path / 's'}"))
        for member in members:
            line = b""
            while not line:  # until it has joined
                speaker.sendall(b"hello\n")
                member.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    line = read_line(member)
            assert line == b"hello\n"
        assert program.stop() == 0, program.stderr()


@runs("timeouts")
def test_a_handler_says_goodbye_when_time_is_up() -> None:
    with served(BLOCKS["timeouts"].replace("message=5", "message=0.1")) as server:
        assert ask_server(server, b"hello\n") == b"hello\n"
        with connect(server.names[0]) as sock, sock.makefile("rb") as replies:
            sock.sendall(b"hello\nwor")
            assert replies.read() == b"hello\nbye: no message within 0.1 s\n"


# streams.md


@runs("frames")
def test_frames_come_back_and_too_long_ones_do_not() -> None:
    with served(BLOCKS["frames"]) as server:
        frames = b"".join(struct.pack("!I", len(text)) + text for text in (b"one", b"", b"three"))
        assert ask_server(server, frames) == frames.upper()
        assert ask_server(server, struct.pack("!I", 2**31)) == b""
        while server.connections:  # it has ended for its client, and is counted a moment later
            time.sleep(0.001)
    assert server.stats.failed == 1


@runs("upload")
def test_netstrings_follow_a_line() -> None:
    with served(BLOCKS["upload"]) as server:
        assert ask_server(server, b"a file\n3:one,5:three,") == b"a file: 8 bytes\n"


@runs("batches")
def test_lines_come_in_lists() -> None:
    with served(BLOCKS["batches"]) as server:
        assert ask_server(server, b"".join(b"%d\n" % number for number in range(100))) == b""
    assert server.server.RequestHandlerClass.rows == [b"%d" % number for number in range(100)]


@runs("statements")
def test_a_framing_of_ones_own_is_two_functions() -> None:
    with served(BLOCKS["statements"]) as server:
        assert ask_server(server, b"one; two;") == b"done: one;done: two;"
        assert ask_server(server, b"x" * 2**20 + b";") == b""  # over the limit for lines


@runs("too-long")
def test_after_a_line_too_long_the_next_is_whole() -> None:
    with served(BLOCKS["too-long"]) as server:
        sent = b"one\n" + b"x" * 100_000 + b"two\nthree\n"
        assert ask_server(server, sent) == b"ONE\na line has 65536 bytes at most\nTHREE\n"


@runs("bad-frames")
def test_after_a_frame_too_long_the_next_is_whole_and_after_what_is_none_there_is_no_next() -> None:
    with served(BLOCKS["bad-frames"]) as server:
        sent = b"3:one,70000:" + b"x" * 70_000 + b",3:two,nonsense4:four,"
        replies = b"3:ONE,31:a frame has 65536 bytes at most,3:TWO,16:that is no frame,"
        assert ask_server(server, sent) == replies


def test_the_table_of_framings_has_them_all() -> None:
    named = re.findall(r"^\| `(\w+)` \|.*\|.*\|$", read_page("streams.md"), re.MULTILINE)
    assert set(aioecho.framing.__all__) - {"Buffer", "Framing", "format_framing", "parse_framing"} <= set(named)


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        program = tmp_path / "program.py"
        program.write_text(BLOCKS["redis"].replace("tcp://127.0.0.1:6379", f"fd://{listening.fileno()}"))
        with Program(sys.executable, program, pass_fds=[listening.fileno()]):
            yield str(listening.getsockname()[1])


@runs("redis")
def test_the_example_speaks_the_protocol_of_redis(redis_port: str) -> None:
    with connect(f"tcp://127.0.0.1:{redis_port}") as sock, sock.makefile("rb") as replies:
        # A pipeline, in pieces, with a value that has what ends lines.
        stream = b"*3\r\n$3\r\nSET\r\n$1\r\nx\r\n$4\r\n1\r\n2\r\n*2\r\n$3\r\nGET\r\n$1\r\nx\r\n"
        stream += b"PING\r\nINCR n\r\nINCR x\r\nGET y\r\nnone\r\n"
        for at in range(0, len(stream), 7):
            sock.sendall(stream[at : at + 7])
        expected = [b"+OK", b"$4", b"1", b"2", b"+PONG", b":1", b"-ERR value is not an integer", b"$-1"]
        assert [replies.readline() for _ in expected] == [line + b"\r\n" for line in expected]
        assert replies.readline().startswith(b"-ERR unknown command")
        sock.sendall(b"*1\r\nPING\r\n")  # no length before it
        assert replies.read() == b""


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="there is no redis-cli on this machine")
def test_redis_cli_is_answered(redis_port: str) -> None:
    for command, reply in (("set x hello", "OK"), ("get x", "hello"), ("incr n", "1"), ("ping", "PONG"), ("get y", "")):
        with Program("redis-cli", "-p", redis_port, *command.split()) as client:
            assert client.end() == (0, reply.encode() + b"\n", "")


@pytest.mark.skipif(shutil.which("redis-benchmark") is None, reason="there is no redis-benchmark on this machine")
def test_redis_benchmark_is_answered(redis_port: str) -> None:
    command = (
        "redis-benchmark",
        "-p",
        redis_port,
        "-n",
        "2000",
        "-c",
        "5",
        "-P",
        "16",
        "-t",
        "ping,set,get,incr",
        "--csv",
    )
    with Program(*command) as client:
        code, output, _ = client.end()
    assert code == 0
    assert [line.split(b",")[0] for line in output.splitlines()[1:]] == [
        b'"PING_INLINE"', b'"PING_MBULK"', b'"SET"', b'"GET"', b'"INCR"',
    ]  # fmt: skip


# datagrams.md


@contextmanager
def datagrams(name: str) -> Iterator[socket.socket]:
    """Serve a block; with a socket that is connected to it."""
    with served(BLOCKS[name]) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(server.server_address)
        client.settimeout(30)
        yield client


@runs("datagrams")
def test_a_slow_datagram_keeps_no_other_waiting() -> None:
    with datagrams("datagrams") as client:
        for data in (b"three", b"two", b"one"):
            client.send(data)
        assert [client.recv(100) for _ in range(3)] == [b"2", b"1", b"unknown"]


@runs("statsd", "ingest")
@pytest.mark.parametrize("block", ["statsd", "ingest"])
def test_records_of_one_datagram_are_counted(block: str) -> None:
    with served(BLOCKS[block]) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"requests:1|c\nerrors:1|c\nrequests:1|c", server.server_address)
    # A stop has served what had come.
    assert server.server.RequestHandlerClass.counters == {b"requests": 2, b"errors": 1}


@runs("ingest")
def test_records_of_many_datagrams_are_counted() -> None:
    with served(BLOCKS["ingest"]) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        for data in (b"requests:1|c\nerrors:1|c\n", b"requests:1|c\n"):
            client.sendto(data, server.server_address)
    assert server.server.RequestHandlerClass.counters == {b"requests": 2, b"errors": 1}


@runs("sessions")
def test_a_session_keeps_what_its_peer_sent() -> None:
    with datagrams("sessions") as client:
        for number, total in ((1, b"1"), (2, b"3"), (3, b"6")):
            client.send(b"%d" % number)
            assert client.recv(100) == total


# blocking.md


@runs("blocking")
def test_blocking_and_async_handlers_serve_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with served(BLOCKS["blocking"].replace("time.sleep(2)", "time.sleep(0.02)")) as server:
        slow, fast, unix = server.names
        assert ask(slow, b"slow") == b"SLOW"
        assert ask(fast, b"fast") == b"FAST"
        assert ask(unix, b"fast") == b"FAST"


# porting.md


@runs("compat")
def test_the_port_is_one_line(tmp_path: Path) -> None:
    # It binds the address itself, so that a free port is asked for, and the program made to tell which.
    text = BLOCKS["compat"].replace("9999", "0").replace(
        "    server.serve_forever()", "    print(*server.server_address, flush=True)\n    server.serve_forever()"
    )  # fmt: skip
    (tmp_path / "program.py").write_text(text)
    with Program(sys.executable, "program.py", cwd=tmp_path) as server:
        assert ask("tcp://{}:{}".format(*server.line().split()), b"hello\n") == b"HELLO\n"
        server.signal(signal.SIGINT)
        assert server.wait() != 0
        assert "KeyboardInterrupt" in server.stderr()


@contextmanager
def program_on(text: str, folder: Path, *socks: socket.socket) -> Iterator[Program]:
    """Run a block that binds its addresses itself, on sockets that are bound already, in their order."""
    for sock in socks:
        text = text.replace('("127.0.0.1", 9999)', f'"fd://{sock.fileno()}"', 1)
    assert "9999" not in text
    (folder / "program.py").write_text(text)
    with Program(sys.executable, "program.py", cwd=folder, pass_fds=[sock.fileno() for sock in socks]) as program:
        yield program


@runs("both")
def test_streams_and_datagrams_are_served_by_one_program(tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        udp.bind(("127.0.0.1", 0))
        client.connect(udp.getsockname())
        client.settimeout(30)
        with program_on(BLOCKS["both"], tmp_path, tcp, udp) as program:
            assert ask("tcp://{}:{}".format(*tcp.getsockname()), b"stream\n") == b"STREAM\n"
            client.send(b"datagram")
            assert client.recv(100) == b"DATAGRAM"
            program.signal(signal.SIGINT)
            assert program.wait() != 0


# servers.md


@runs("hooks")
def test_the_hooks_are_called(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = "tcp://{}:{}".format(*sock.getsockname())
        with program_on(BLOCKS["hooks"], tmp_path, sock) as server:
            assert ask(endpoint, b"hello\n") == b"HELLO\n"
            with connect(endpoint) as client:
                client.sendall(b"x" * 200_000)  # longer than a line may be
                assert server.line().startswith("a handler raised ")
    names = execute(BLOCKS["hooks"].replace("__main__", "not the program").replace('"127."', '"10."'))

    async def refuse() -> bytes:
        async with names["Guarded"](("127.0.0.1", 0), Echo) as server:
            reader, writer = await asyncio.open_connection(*server.server_address)
            writer.write(b"hello\n")
            received = b""
            with contextlib.suppress(ConnectionError):  # it may be reset, over what it has sent
                received = await reader.read()
            writer.close()
            return received

    assert asyncio.run(refuse()) == b""


# limits.md, stopping.md


@runs("limits")
def test_the_limits_and_timeouts_are_taken() -> None:
    with served(BLOCKS["limits"]) as server:
        assert ask_server(server, b"hello") == b"hello"


@runs("networks")
def test_the_networks_are_taken() -> None:
    with served(BLOCKS["networks"]) as server:
        assert ask_server(server, b"hello") == b"hello"
    text = BLOCKS["networks"].replace('"10.1.2.3"', '"127.0.0.1"')
    with served(text) as server, connect(server.names[0]) as sock:
        assert sock.recv(5) == b""


@runs("stop")
def test_a_stop_loses_no_reply() -> None:
    assert output_of(BLOCKS["stop"]) == "b'LAST WORDS\\n'\n1 0 0\n"


@runs("steps")
def test_a_stop_breaks_no_exchange_that_is_held_together() -> None:
    assert output_of(BLOCKS["steps"]).splitlines() == [*(rf"b'block {number}\n'" for number in range(3)), "b''", "1 0"]
    broken = BLOCKS["steps"].replace("async with self.unbroken():", "if True:")
    assert r"b'block 2\n'" not in output_of(broken).splitlines()


@runs("sink")
def test_a_sink_tells_its_clients_first() -> None:
    with served(BLOCKS["sink"]) as server, connect(server.names[0]) as sock:
        sock.sendall(b"one\n")
        time.sleep(0.15)  # no fresh connection any more
        server.server.begin_shutdown(5)
        assert sock.recv(1) == b""
        sock.sendall(b"two\n")
    assert server.server.RequestHandlerClass.lines == [b"one\n", b"two\n"]


# tls.md


@pytest.fixture
def certificates(tmp_path: Path, tls: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The files that the pages name, in the current folder."""
    shutil.copy(tls.files.server, tmp_path / "server.pem")
    shutil.copy(tls.files.ca, tmp_path / "clients-ca.pem")
    monkeypatch.chdir(tmp_path)
    return tls


@runs("tls", "renewed")
@pytest.mark.parametrize("block", ["tls", "renewed"])
def test_tls_serves_known_clients_alone(certificates: SimpleNamespace, block: str) -> None:
    with served(BLOCKS[block]) as server:
        endpoint = server.names[0]
        with certificates.known_client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1") as sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"
        with connect(endpoint) as plain, certificates.client.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            try:
                received = sock.recv(1)
            except (ssl.SSLError, ConnectionError):
                received = b""
            assert received == b""


@runs("beside-plain")
def test_one_of_two_endpoints_speaks_no_tls(certificates: SimpleNamespace) -> None:
    with served(BLOCKS["beside-plain"]) as server:
        plain, secure = server.names
        with connect(plain) as sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"
        with certificates.client.wrap_socket(connect(secure), server_hostname="127.0.0.1") as sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"


@runs("starttls")
def test_starttls_goes_over_to_tls_and_reads_no_plain_text_after_the_command(certificates: SimpleNamespace) -> None:
    with served(BLOCKS["starttls"]) as server:
        endpoint = server.names[0]
        with connect(endpoint) as plain:
            assert read_line(plain) == b"hello\n"
            plain.sendall(b"x\nSTARTTLS\n")
            assert [read_line(plain), read_line(plain)] == [b"in the clear\n", b"go ahead\n"]
            with certificates.client.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
                sock.sendall(b"x\nSTARTTLS\nx\n")
                with sock.makefile("rb") as replies:
                    assert [replies.readline() for _ in range(3)] == [b"secure\n", b"it is TLS already\n", b"secure\n"]
        with connect(endpoint) as plain:
            assert read_line(plain) == b"hello\n"
            plain.sendall(b"STARTTLS\nx\n")  # slipped in before TLS
            assert read_line(plain) == b"go ahead\n"
            with pytest.raises((ssl.SSLError, ConnectionError)):
                certificates.client.wrap_socket(plain, server_hostname="127.0.0.1")


# logging.md


@runs("connections")
def test_the_records_of_connections_have_the_fields_that_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("aioecho.connection")
    level, handlers = logger.level, list(logger.handlers)
    try:
        with served(BLOCKS["connections"]) as server:
            assert ask_server(server, b"hello\n") == b"HELLO\n"
    finally:
        logger.setLevel(level)
        logger.handlers = handlers
    assert capsys.readouterr().out == "completed (finished): 6 in, 6 out\n"
    assert "`completed (finished): 6 in, 6 out`" in read_page("logging.md")


def shape_of(text: str) -> str:
    """Return a line of the access log with its figures and its port gone."""
    return re.sub(r"-?\d+", "0", text.replace("tcp://127.0.0.1", ""))


@runs("access-line", "access-json", "log.toml")
def test_the_access_log_is_as_it_is_shown(tls: SimpleNamespace, tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    assert "/var/log/aioecho/access.log" in BLOCKS["log.toml"]
    (tmp_path / "log.toml").write_text(BLOCKS["log.toml"].replace("/var/log/aioecho/access.log", str(log)))
    arguments = ("--port", "0", "--access-log", "--ssl-certfile", tls.files.server, "--log-config", "log.toml")
    with Program.aioecho("serve", *arguments, cwd=tmp_path) as server:
        endpoint = server.listening()
        with tls.client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1") as sock:
            sock.sendall(b"x\n")
            assert read_line(sock) == b"x\n"
            sock.unwrap().close()
        assert server.stop() == 0
    found, shown = json.loads(log.read_text()), json.loads(BLOCKS["access-json"])
    assert shape_of(found["message"]) == shape_of(BLOCKS["access-line"].strip())
    assert list(found) == list(shown)
    assert [type(value) for value in found.values()] == [type(value) for value in shown.values()]


@runs("log-config")
def test_the_program_that_configures_logging_in_workers_does(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        text = BLOCKS["log-config"].replace('"tcp://127.0.0.1:9999"', f'"fd://{sock.fileno()}"')
        (tmp_path / "program.py").write_text(text)
        with Program(sys.executable, "program.py", cwd=tmp_path, pass_fds=[sock.fileno()]) as server:
            assert ask("tcp://{}:{}".format(*sock.getsockname()), b"hello\n") == b"hello\n"
            assert server.stop() == 0
            assert re.search(r"^\d+ aioecho\.access: 127\.0\.0\.1:", server.stderr(), re.MULTILINE)


@runs("log-queue")
def test_an_application_whose_log_is_not_read_serves_on(tmp_path: Path) -> None:
    loud = """
class Echo(aioecho.StreamRequestHandler):
    async def handle(self):
        async for line in self.reader:
            logging.error("x" * 1000)
            await self.send(line)
"""
    text = BLOCKS["log-queue"].replace("from aioecho.echo import Echo", loud).replace("10_000", "100")
    reading, writing = os.pipe()
    with open(reading, "rb") as log, socket.create_server(("127.0.0.1", 0)) as listening:
        program = tmp_path / "program.py"
        program.write_text(text.replace("tcp://127.0.0.1:9999", f"fd://{listening.fileno()}"))
        with Program(sys.executable, program, stderr=writing, pass_fds=[listening.fileno()]) as server:
            os.close(writing)
            with connect("tcp://{}:{}".format(*listening.getsockname())) as sock:
                for _ in range(1000):
                    sock.sendall(b"hello\n")
                    assert read_line(sock) == b"hello\n"
            server.signal()
            *_, last = log
            assert server.wait() == 0
    logged = re.fullmatch(rb"INFO:root:(\d+) log records were dropped\n|.*", last)
    assert logged is not None
    assert 500 < int(logged[1]) < 900


# embedding.md


@runs("web.py")
def test_it_runs_in_the_lifespan_of_a_web_application(tmp_path: Path) -> None:
    # uvicorn's listening socket is inherited too, so that nothing has to be waited for.
    with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as upper:
        text = BLOCKS["web.py"].replace('("127.0.0.1", 9999)', f'"fd://{upper.fileno()}"')
        (tmp_path / "web.py").write_text(text)
        command = [sys.executable, "-m", "uvicorn", "web:app", "--fd", str(web.fileno())]
        with Program(*command, cwd=tmp_path, pass_fds=[web.fileno(), upper.fileno()]) as server:
            assert ask("tcp://{}:{}".format(*upper.getsockname()), b"hello\n") == b"HELLO\n"
            request = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            with connect("tcp://{}:{}".format(*web.getsockname())) as sock:
                sock.sendall(request)
                assert b"".join(iter(lambda: sock.recv(2**16), b"")).endswith(b'{"accepted":1}')
            # The signal is uvicorn's, which passes it on to itself at its end.
            assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
            assert "Application shutdown complete" in server.stderr()
            assert "Traceback" not in server.stderr()


@runs("names")
def test_tasks_have_the_names_of_their_handlers() -> None:
    assert output_of(BLOCKS["names"]) == "b'Upper\\n'\n['Upper for Ann']\n"


@runs("tasks")
def test_it_runs_beside_other_tasks() -> None:
    assert output_of(BLOCKS["tasks"]) == "b'ONE OF MANY TASKS\\n'\n"


@runs("background")
def test_a_server_runs_in_a_thread() -> None:
    assert output_of(BLOCKS["background"]) == "0\nb'HELLO\\n'\n1\n"


# client.md


def run_against(endpoint: str, name: str) -> str:
    """Run a block that connects to port 9999, but to `endpoint`, and return its output."""
    return output_of(BLOCKS[name].replace("tcp://127.0.0.1:9999", endpoint).replace("udp://127.0.0.1:9999", endpoint))


@runs("client")
def test_the_client_sends_receives_and_asks_or_says_why_not() -> None:
    class UpperUntilBye(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.reader:
                await self.send(line.upper())
                if line == b"bye\n":
                    return

    with aioecho.run_in_thread(UpperUntilBye, "tcp://127.0.0.1:0") as server:
        endpoint = server.names[0]
        assert run_against(endpoint, "client") == "b'HELLO'\nb'AND AGAIN'\nb'BYE'\n"
    assert run_against(endpoint, "client") == f"cannot connect to {endpoint}: Connection refused\n"


@runs("follow")
def test_the_subscriber_comes_back_and_subscribes_anew() -> None:
    said = []

    class News(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            said.append(await self.reader.readline())
            await self.send(b"news\n" if len(said) < 3 else b"stop\n")
            if len(said) == 1:
                await self.send(b"half a li")

    class Stop(Exception):
        pass

    printed = []

    def show(text: object) -> None:
        printed.append(str(text))
        if text == "stop":
            raise Stop

    with aioecho.run_in_thread(News, "tcp://127.0.0.1:0") as server:
        text = BLOCKS["follow"].replace("tcp://127.0.0.1:9999", server.names[0])
        module = {"__name__": "__main__", "print": show}
        with pytest.raises(Stop):
            exec(compile(text, "<block>", "exec"), module)
    assert said == [b"subscribe news\n"] * 3
    assert printed[0] == "news"
    assert printed[1].endswith("closed the connection in the middle of a message, after 9 bytes")
    assert printed[2:] == ["news", "stop"]


@runs("lookup-again")
def test_a_datagram_is_asked_again_until_its_reply_comes() -> None:
    seen = []

    class Lookup(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            seen.append(self.data)
            if len(seen) == 2:
                await self.reply(b"6 late")
                await self.reply(b"7 one is 1")

    with aioecho.run_in_thread(Lookup, "udp://127.0.0.1:0") as server:
        assert run_against(server.names[0], "lookup-again") == "b'7 one is 1'\n"
    assert seen == [b"7 one?", b"7 one?"]


@runs("connect")
def test_a_reader_and_a_writer_are_connected_or_say_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = output_of(BLOCKS["connect"])
    assert output == "b'HELLO\\n'\ncannot connect to unix:upper.sock: No such file or directory\n"


# cli.md


@runs("doctor")
def test_doctor_looks_at_the_limits_of_this_machine() -> None:
    status, output, errors = invoke(*shlex.split(BLOCKS["doctor"])[3:])
    assert errors == ""
    assert output.startswith(b"50,000 connections over 4 workers\n")
    assert status == (b"too low  " in output)


@runs("server.toml", "service")
def test_the_configuration_file_and_the_service_are_valid(tmp_path: Path) -> None:
    text = BLOCKS["server.toml"].replace("unix:/run/", f"unix:{tmp_path}/")  # in /run only root may make a socket
    assert "unix:/run/" in BLOCKS["server.toml"]
    (tmp_path / "server.toml").write_text(text)
    assert invoke("serve", "--config", "server.toml", "--check-config", cwd=tmp_path)[0] == 0
    arguments = shlex.split(BLOCKS["service"])[3:]
    if os.geteuid() == 0:  # only root may serve as another
        assert invoke(*arguments, "--check-config")[0] == 0


@runs("serve")
@pytest.mark.parametrize("number", range(5))
def test_the_servers_of_the_command_line_serve(certificates: SimpleNamespace, number: int) -> None:
    Path("chat.py").write_text(BLOCKS["room.py"])
    lines = BLOCKS["serve"].splitlines()
    assert len(lines) == 5
    # What names a port is given another: these may be taken.
    command = re.sub(r":7000\b|--port 7000", lambda match: match[0].replace("7000", "0"), lines[number])
    if command == lines[number]:
        command += " --port 0"
    with Program(sys.executable, *shlex.split(command)[1:]) as server:
        endpoint = server.listening()
        if "server.pem" in command:
            sock: socket.socket = certificates.known_client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1")
        else:
            sock = connect(endpoint)
        with sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == (b"HELLO\n" if "upper" in command else b"hello\n")
        if "app.sock" in command:
            assert server.listening() == "unix:app.sock"
        if "udp" in command:
            assert server.listening().startswith("udp://127.0.0.1:")
        assert server.stop() == 0


@runs("stdio")
def test_a_shell_can_have_one_connection_served() -> None:
    with Program("sh", "-c", BLOCKS["stdio"].replace("python ", f"'{sys.executable}' ")) as program:
        assert program.end() == (0, b"ONE\nTWO\n", "")


@runs("together")
def test_streams_and_datagrams_are_served_together(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(
        "import logging\nlogging.basicConfig(level='INFO')\n" + BLOCKS["together"].replace("9999", "0")
    )
    with Program(sys.executable, tmp_path / "together.py") as program:
        program.says("udp://")
        assert ask(program.says(r"tcp://\S+")[0], b"hello\n") == b"HELLO\n"
        assert program.stop() == 0


@runs("send")
def test_the_clients_of_the_command_line_are_answered() -> None:
    text, lines, usage = BLOCKS["send"].splitlines()
    with aioecho.run_in_thread(Upper, "tcp://127.0.0.1:0") as server:
        outcome = CliRunner().invoke(main, shlex.split(text.replace("tcp://127.0.0.1:9999", server.names[0]))[3:])
        assert (outcome.exit_code, outcome.output) == (0, "HELLO, SERVER!\n")
        command = lines.replace("python ", f"'{sys.executable}' ").replace("tcp://127.0.0.1:9999", server.names[0])
        with Program("sh", "-c", command) as client:
            assert client.end() == (0, b"ONE\nTWO\n", "")
    outcome = CliRunner().invoke(main, shlex.split(usage)[3:])
    assert outcome.exit_code == 0
    assert "Usage: " in outcome.output


@runs("framing")
def test_frames_go_through_the_command_line() -> None:
    serve, send, load = BLOCKS["framing"].splitlines()
    with Program(sys.executable, *shlex.split(serve)[1:], "--port", "0") as server:
        endpoint = server.listening()
        outcome = CliRunner().invoke(main, shlex.split(send.replace("tcp://127.0.0.1:9999", endpoint))[3:])
        assert (outcome.exit_code, outcome.output) == (0, "Hello, Server!\n")
        pytest.importorskip("rich")
        command = load.replace("tcp://127.0.0.1:9999", endpoint).replace("--duration 5", "--duration 0.2")
        outcome = CliRunner().invoke(main, shlex.split(command)[3:])
        assert outcome.exit_code == 0, outcome.output
        assert "frames (length:4) of 64 bytes" in outcome.output


# internals.md


@pytest.mark.once
def test_the_walks_go_through_files_that_exist() -> None:
    named = set(re.findall(r"`((?:\w+/)?\w+\.py)`", read_page("internals.md")))
    assert len(named) > 20
    assert [name for name in named if not (ROOT / "aioecho" / name).exists()] == []


@runs("waiting", "ps", "pstree")
@pytest.mark.skipif(sys.version_info < (3, 14), reason="asyncio has these tools from Python 3.14 on")
def test_the_tools_show_handlers_as_on_the_page(tmp_path: Path) -> None:
    rows = [row.split(maxsplit=3)[2:] for row in BLOCKS["ps"].splitlines() if " -> " in row]
    assert len(rows) == 4
    text, numbers = BLOCKS["waiting"], []
    with ExitStack() as stack:
        for port, kind in ((7001, socket.SOCK_STREAM), (7002, socket.SOCK_DGRAM), (7003, socket.SOCK_DGRAM)):
            bound, client = (stack.enter_context(socket.socket(socket.AF_INET, kind)) for _ in range(2))
            bound.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                bound.listen()
            client.connect(bound.getsockname())
            client.sendall(b"hello\n")
            text = text.replace(f'("127.0.0.1", {port})', f'"fd://{bound.fileno()}"')
            numbers.append(bound.fileno())
        (tmp_path / "server.py").write_text(text)
        with Program(sys.executable, "server.py", cwd=tmp_path, pass_fds=numbers) as program:

            def look(tool: str) -> str:
                command = [sys.executable, "-m", "asyncio", tool, str(program.process.pid)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode and re.search("[Pp]ermission|not permitted", done.stdout + done.stderr):
                    pytest.skip("this process may not look into another")
                return done.stdout

            while not all(re.search(rf" {name} +{re.escape(shown)} ", look("ps")) for name, shown in rows):
                assert program.process.poll() is None, program.stderr()
            tree = re.sub(r" \S*?((?:aioecho/|asyncio/)\w+(?:/\w+)?\.py|server\.py):(\d+)", r" \1", look("pstree"))
    for task in re.sub(r":\d+", "", BLOCKS["pstree"]).split("└── (T) ")[1:]:
        assert task in tree, tree


# benchmarks.md


@runs("load")
def test_the_load_generator_loads() -> None:
    lines = BLOCKS["load"].splitlines()
    assert len(lines) == 2
    with aioecho.run_in_thread(Echo, "tcp://127.0.0.1:0") as server:
        for line in lines:
            outcome = load(line, server.names[0])
            assert (outcome.exit_code, outcome.stderr) == (0, "")
            assert "p99" in outcome.stdout


@runs("load-others", "exchanges.txt")
def test_the_load_generator_loads_servers_that_do_not_echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = {b"PING": b"PONG\n", b"LOGIN me": b"welcome\n", b"GET one": b"value 1\n"}

    class Server(aioecho.StreamRequestHandler):
        greeting = b""

        async def handle(self) -> None:
            await self.send(self.greeting)
            async for line in self.reader:
                await self.send(replies[line.strip()])

    (tmp_path / "exchanges.txt").write_text(BLOCKS["exchanges.txt"])
    monkeypatch.chdir(tmp_path)
    for line in BLOCKS["load-others"].splitlines():
        handler = type("Handler", (Server,), {"greeting": b"hello there\n" if "--script" in line else b""})
        with aioecho.run_in_thread(handler, "tcp://127.0.0.1:0") as server:
            outcome = load(line, server.names[0])
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        assert "p99" in outcome.stdout


@pytest.mark.once
@runs("report")
def test_readme_and_page_say_what_the_last_full_run_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import report

    monkeypatch.setattr(report, "_load", functools.cache(report._load))  # most of the time
    *_, data, readme, first, other_readme, second = shlex.split(BLOCKS["report"])
    assert readme == other_readme == "--readme"
    for page in (first, second):
        text = (ROOT / page).read_text("utf-8")
        copy = tmp_path / page
        copy.parent.mkdir(parents=True, exist_ok=True)
        begin, end = text.index("<!-- benchmarks:begin"), text.index("<!-- benchmarks:end")
        stale = re.sub(r"\| \d[\d.,]* \|", "| 0 |", text[begin:end])
        assert stale != text[begin:end]
        copy.write_text(text[:begin] + stale + text[end:])
        report.refresh_readme(copy, ROOT / data, tmp_path / "benchmarks" / "results" / "full")
        assert copy.read_text("utf-8") == text, f"run: {BLOCKS['report']}"
        for picture in re.findall(r"\]\(([^)]*\.svg)\)", text):
            assert (ROOT / page).parent.joinpath(picture).is_file()
    rows = re.findall(r"^\| .+ (?:\(\d[\d.,]*-[\d.,]+\)|no ratio) \|$", (ROOT / first).read_text("utf-8"), re.MULTILINE)
    assert len(rows) == 6


# workers.md


@runs("workers")
def test_the_program_with_workers_serves(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        text = BLOCKS["workers"].replace('"tcp://127.0.0.1:9999"', f'"fd://{sock.fileno()}"')
        (tmp_path / "program.py").write_text(text.replace('"auto"', "2"))
        with Program(sys.executable, "program.py", cwd=tmp_path, pass_fds=[sock.fileno()]) as server:
            assert ask("tcp://{}:{}".format(*sock.getsockname()), b"hello\n") == b"HELLO\n"
            assert server.stop() == 0
            assert server.stderr() == ""


@runs("measured")
def test_the_program_that_measures_itself_prints_what_it_should() -> None:
    assert output_of(BLOCKS["measured"]) == "1\n6\n"


@runs("echo.socket", "echo.service")
def test_the_units_are_ones_and_their_command_serves(tmp_path: Path) -> None:
    command = re.search(r"ExecStart=(.*)", BLOCKS["echo.service"])
    name = re.search(r"FileDescriptorName=(.*)", BLOCKS["echo.socket"])
    assert command
    assert name
    python, *arguments = command[1].split()
    if shutil.which("systemd-analyze") is not None:
        for unit in ("echo.socket", "echo.service"):
            (tmp_path / unit).write_text(BLOCKS[unit].replace(python, "/bin/true").replace("/srv/echo", str(tmp_path)))
        with Program("systemd-analyze", "verify", "echo.socket", "echo.service", cwd=tmp_path) as program:
            # Only what it says of these: those of the machine may have their faults.
            _, _, errors = program.end()
            assert not [line for line in errors.splitlines() if "echo." in line], errors
    if shutil.which("systemd-socket-activate") is None:
        pytest.skip("systemd-socket-activate is not installed")
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        address = "{}:{}".format(*sock.getsockname())
    activate = ["systemd-socket-activate", f"--fdname={name[1]}", "-l", address, "-E", f"PYTHONPATH={ROOT}"]
    with Program(*activate, sys.executable, *arguments, cwd=tmp_path) as program:
        program.says("Listening on")
        assert ask(f"tcp://{address}", b"hello\n") == b"HELLO\n"
        assert program.stop() == 0


@runs("Dockerfile", "container.yaml")
def test_the_commands_of_the_container_serve_and_tell_health() -> None:
    instructions = [line.split(maxsplit=1) for line in BLOCKS["Dockerfile"].splitlines()]
    assert [name for name, _ in instructions] == ["FROM", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD"]
    python, *arguments = json.loads(instructions[-1][1])
    assert python == "python"
    port, health = instructions[4][1].split()
    assert {f"tcp://*:{port}", f"0.0.0.0:{health}"} < set(arguments)
    probes = re.findall(r"(\w+)Probe: \{httpGet: \{path: (\S+), port: (\d+)\}", BLOCKS["container.yaml"])
    assert [name for name, *_ in probes] == ["liveness", "readiness"]
    with Program(sys.executable, *(part.replace(port, "0").replace(health, "0") for part in arguments)) as server:
        assert ask(server.listening(), b"hello\n") == b"HELLO\n"
        found = server.says(r"metrics on http://\S+:(\d+)/metrics\n")  # a thread of it writes its log
        for _, path, where in probes:
            assert where == health
            with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}{path}", timeout=10) as reply:
                assert reply.status == 200
        kind, command = instructions[5][1].split(maxsplit=1)
        python, option, program = json.loads(command)
        assert (kind, python, option) == ("CMD", "python", "-c")
        assert health in program
        exec(program.replace(health, found[1]), {})
        assert server.stop() == 0
    with pytest.raises(OSError, match="refused"):
        exec(program.replace(health, found[1]), {})


@contextmanager
def behind(configuration: str, *command: str | Path) -> Iterator[tuple[list[Program], str]]:
    """Run a proxy in front of two servers; all that is in its way is written over its configuration's ports."""
    with ExitStack() as stack:
        servers = [stack.enter_context(Program.aioecho("serve", "upper", "--port", "0")) for _ in range(2)]
        for number, server in enumerate(servers, 9001):
            configuration = configuration.replace(f"127.0.0.1:{number}", server.listening().removeprefix("tcp://"))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            address = "{}:{}".format(*sock.getsockname())
        Path(command[-1]).write_text(configuration.replace("127.0.0.1:9000", address))
        proxy = stack.enter_context(Program(*command))
        while True:  # it does not tell when it serves
            assert proxy.process.poll() is None, proxy.stderr()
            try:
                connect(f"tcp://{address}").close()
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        yield servers, f"tcp://{address}"


def check_that_one_can_be_stopped(servers: list[Program], endpoint: str) -> None:
    for _ in range(20):
        assert ask(endpoint, b"hello\n") == b"HELLO\n"
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(lambda _: ask(endpoint, b"hello\n"), range(400))
        for _ in range(50):
            assert next(replies) == b"HELLO\n"
        assert servers[0].stop() == 0
        assert set(replies) == {b"HELLO\n"}
    assert ask(endpoint, b"hello\n") == b"HELLO\n"
    assert servers[1].stop() == 0


@runs("proxy")
def test_behind_a_balancer_the_client_is_greeted() -> None:
    with served(BLOCKS["proxy"].replace('if __name__ == "__main__":', "if True:")) as server:
        sent = b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 443\r\n"
        assert ask_server(server, sent) == b"hello 192.0.2.1, you asked for ('198.51.100.2', 443)\n"


@runs("haproxy.cfg")
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="there is no haproxy on this machine")
def test_behind_haproxy_one_server_can_be_stopped(tmp_path: Path) -> None:
    command = ("haproxy", "-db", "-f", tmp_path / "haproxy.cfg")
    with behind(BLOCKS["haproxy.cfg"], *command) as (servers, endpoint):
        check_that_one_can_be_stopped(servers, endpoint)


@runs("agent.cfg", "agent")
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="there is no haproxy on this machine")
def test_a_server_that_hangs_is_taken_out_by_haproxys_check_of_its_agent(tmp_path: Path) -> None:
    command = re.sub(r":9\d01\b", ":0", BLOCKS["agent"])
    with Program(sys.executable, *shlex.split(command)[1:]) as server, socket.socket() as sock:
        served, agent = (server.listening().rpartition(":")[2] for _ in range(2))
        sock.bind(("127.0.0.1", 0))
        proxied = "{}:{}".format(*sock.getsockname())
        sock.close()
        text = (
            BLOCKS["agent.cfg"].replace(":9001", f":{served}").replace("9101", agent).replace("127.0.0.1:9000", proxied)
        )
        # Sooner than a page would have it.
        text = (
            text.replace("inter 2s", "inter 100")
            .replace("check 1s", "check 300")
            .replace("inter 100 ", "inter 100 fall 1 ", 1)
        )
        text = text.replace("defaults\n", "global\n    stats socket " + str(tmp_path / "stats") + "\n\ndefaults\n", 1)
        (tmp_path / "agent.cfg").write_text(text)

        def status() -> tuple[str, str]:
            row = ask(f"unix:{tmp_path}/stats", b"show stat echo 4 -1\n").decode().splitlines()[1].split(",")
            return row[17], row[18]

        with Program("haproxy", "-db", "-f", tmp_path / "agent.cfg") as proxy:
            while True:
                assert proxy.process.poll() is None, proxy.stderr()
                with contextlib.suppress(OSError, IndexError):
                    if status() == ("UP", "100"):
                        break
                time.sleep(0.02)
            assert ask(f"tcp://{proxied}", b"hello\n") == b"HELLO\n"
            server.signal(signal.SIGSTOP)
            while status()[0] != "DOWN":
                time.sleep(0.02)
            server.signal(signal.SIGCONT)
            while status()[0] != "UP":
                time.sleep(0.02)
        assert server.stop() == 0


@runs("nginx.conf")
@pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx on this machine")
def test_behind_nginx_one_server_can_be_stopped(tmp_path: Path) -> None:
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    built = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=True).stderr.split()
    if not (module.exists() or "--with-stream" in built):
        pytest.skip("nginx has no stream module on this machine")
    loads = f"load_module {module};\n" if module.exists() else ""
    besides = f"{loads}daemon off;\npid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
    command = ("nginx", "-p", tmp_path, "-e", "stderr", "-c", tmp_path / "nginx.conf")
    with behind(besides + BLOCKS["nginx.conf"], *command) as (servers, endpoint):
        check_that_one_can_be_stopped(servers, endpoint)


@BLOCKS.runs("kick")
def test_the_page_on_live_control_kicks() -> None:
    execute(BLOCKS["kick"])


# check.md


@runs("counting.py", "check-count", "count-found", "count-test")
def test_the_mistake_on_the_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "counting.py").write_text(BLOCKS["counting.py"])
    monkeypatch.setattr(run, "CHECKS", {"segmentation": run.CHECKS["segmentation"]})
    code, output, _ = invoke(*shlex.split(BLOCKS["check-count"])[3:], cwd=tmp_path)
    assert code == 1
    assert BLOCKS["count-found"] in output.decode()
    assert BLOCKS["count-test"] in output.decode()


@runs("session.txt", "check-say")
def test_the_script_on_the_page_is_played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "session.txt").write_text(BLOCKS["session.txt"])
    (tmp_path / "store.py").write_text(
        "import aioecho\n\nclass Store(aioecho.StreamRequestHandler):\n    async def handle(self):\n"
        "        async for line in self.reader:\n            await self.send(b'OK\\n' if line[:3] == b'SET' else b'1\\n')\n"
    )
    monkeypatch.setattr(run, "CHECKS", {"replies": run.CHECKS["replies"]})
    code, output, _ = invoke(*shlex.split(BLOCKS["check-say"])[3:], cwd=tmp_path)
    assert code == 0, output


def test_the_table_of_checks_has_them_all() -> None:
    assert re.findall(r"^\| `([\w -]+)` \|", read_page("check.md"), re.MULTILINE) == [
        *run.CHECKS,
        *run.DATAGRAM_CHECKS,
        "reply size",
    ]
