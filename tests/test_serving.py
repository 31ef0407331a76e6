"""Choosing the server for some endpoints; and datagrams at the command line."""

import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from helpers import check_mistake, invoke, needs_ipv6
from programs import Program

import aioecho
from aioecho import client
from aioecho.choice import are_for_datagrams
from aioecho.echo import DATAGRAM_HANDLERS, DatagramEcho, Echo
from aioecho.server import StreamServer


@pytest.fixture
def nobody() -> str:
    """An endpoint at which nobody is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    return f"udp://127.0.0.1:{port}"


def send(endpoint: str, stdin: bytes) -> tuple[int, bytes, str]:
    """Send what a process reads on its stdin."""
    with Program.aioecho("send", endpoint, stdin=subprocess.PIPE) as program:
        program.write(stdin)
        return program.end()


def test_the_server_follows_from_the_endpoints() -> None:
    for endpoint in ("udp://127.0.0.1:0", "udp://[::1]:0", "unixgram:x", "unixgram:@x"):
        assert type(aioecho.serve(DatagramEcho, endpoint)) is aioecho.DatagramServer
    assert type(aioecho.serve(Echo, "tcp://127.0.0.1:0", "unix:x")) is StreamServer
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as stream:
        assert are_for_datagrams(f"fd://{datagrams.fileno()}")
        assert not are_for_datagrams(f"fd://{stream.fileno()}")
        with pytest.raises(ValueError, match=r"sock is for streams and fd://\d+ is for datagrams: give a handler cl"):
            are_for_datagrams(f"fd://{datagrams.fileno()}", sock=stream)
        assert not are_for_datagrams(f"fd://{datagrams.fileno()}", RequestHandlerClass=Echo)
        assert are_for_datagrams(sock=stream, RequestHandlerClass=DatagramEcho)
    assert not are_for_datagrams("fd://987654")


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("kind", ["udp", pytest.param("udp6", marks=needs_ipv6), "unixgram"])
def test_it_serves_datagrams_and_sends_them(kind: str, loop: str, tmp_path: Path) -> None:
    endpoint = {"udp": "udp://127.0.0.1:0", "udp6": "udp://[::1]:0", "unixgram": f"unixgram:{tmp_path}/sock?mode=660"}
    with Program.aioecho("serve", "upper", "--loop", loop, "--bind", endpoint[kind]) as server:
        where = server.listening()
        assert where.startswith(endpoint[kind].rstrip("0").removesuffix("?mode=66"))
        assert invoke("send", where, "Hello, Server!") == (0, b"HELLO, SERVER!\n", "")
        code, output, errors = send(where, b"one\ntwo\nthree")
        assert (code, sorted(output.replace(b"THREE", b"THREE\n").split()), errors) == (
            0,
            [b"ONE", b"THREE", b"TWO"],
            "",
        )
        if kind == "udp":
            assert send(where, b"") == (0, b"", "")
        assert server.stop(signal.SIGTERM) == 0
        assert "Traceback" not in server.stderr()
    assert not (tmp_path / "sock").exists()


def test_send_says_when_nobody_is_there(nobody: str, tmp_path: Path) -> None:
    check_mistake(invoke("send", nobody, "hello"), f"cannot receive from {nobody}: Connection refused", status=1)
    absent = f"unixgram:{tmp_path}/none"
    check_mistake(invoke("send", absent, "hello"), f"cannot connect to {absent}: No such file or directory", status=1)


def test_send_gives_up_on_a_reply_that_does_not_come() -> None:
    with aioecho.run_in_thread(DATAGRAM_HANDLERS["discard"], "udp://127.0.0.1:0") as server:
        where = server.names[0]
        outcome = invoke("send", where, "--timeout", "0.2", "hello")
        assert outcome == (1, b"", f"Error: {where} has sent nothing for 0.2 s\n")


def test_mistakes_at_the_command_line_are_one_line(tmp_path: Path) -> None:
    for arguments, message in (
        (
            ["serve", "aioecho.echo:Echo", "--bind", "tcp://127.0.0.1:0", "--bind", "udp://127.0.0.1:0"],
            "tcp://127.0.0.1:0 is for streams and udp://127.0.0.1:0 is for datagrams: give a handler class for each",
        ),
        (
            ["serve", "aioecho.echo:Echo", "--bind", "udp://127.0.0.1:0"],
            "Echo is a handler of streams: it can't serve datagrams, as on udp://127.0.0.1:0",
        ),
        (["send", "--tls", "udp://127.0.0.1:9", "x"], "TLS is for streams, and udp://127.0.0.1:9 is for datagrams"),
        (["send", "udp://127.0.0.1", "x"], "bad endpoint 'udp://127.0.0.1'"),
    ):
        check_mistake(invoke(*arguments, cwd=tmp_path), message)


async def test_a_client_does_not_connect_to_what_only_a_server_can_use() -> None:
    with pytest.raises(ValueError, match=r"cannot connect to udp://127\.0\.0\.1:9: only to tcp://HOST:PORT"):
        await client.open_connection("udp://127.0.0.1:9")

    async def nothing() -> AsyncIterator[bytes]:
        yield b""

    forms = r"tcp://HOST:PORT, unix:PATH, udp://HOST:PORT and unixgram:PATH"
    with pytest.raises(ValueError, match=rf"cannot connect to fd://3: only to {forms}"):
        await client.exchange("fd://3", nothing(), print, timeout=1)
