"""The one connection that a program is started with: on a socket, as by inetd and systemd, or on pipes."""

import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import LOOPS
from programs import Program, read_line

import aioecho
from aioecho.echo import Echo

SERVE = ("serve", "upper", "--bind", "stdio:")


@LOOPS
def test_a_socket_on_descriptor_0_is_served_and_then_the_program_ends(loop: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Program.aioecho(*SERVE, "--loop", loop, stdin=theirs, stdout=theirs) as program:
        theirs.close()
        ours.settimeout(30)
        ours.sendall(b"one\n")
        assert read_line(ours) == b"ONE\n"
        ours.sendall(b"two\n")
        ours.shutdown(socket.SHUT_WR)
        assert read_line(ours) == b"TWO\n"
        assert ours.recv(100) == b""
        assert program.wait() == 0
        assert program.stderr() == ""


def test_under_inetd_logs_do_not_go_to_the_client() -> None:
    """There stderr is the socket too, and what is printed would be as well."""
    script = (
        "import sys, logging, aioecho\n"
        "logging.basicConfig(level='DEBUG')\n"
        "class Prints(aioecho.StreamRequestHandler):\n"
        "    async def handle(self):\n"
        "        print('printed', flush=True)\n"
        "        print('an error', file=sys.stderr, flush=True)\n"
        "        logging.error('logged')\n"
        "        await self.send(await self.reader.read())\n"
        "aioecho.run(Prints, 'stdio:')\n"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=theirs, stderr=theirs)
        theirs.close()
        ours.settimeout(30)
        ours.sendall(b"hello")
        ours.shutdown(socket.SHUT_WR)
        received = b""
        while data := ours.recv(100):
            received += data
        assert received == b"hello"
        assert process.wait(30) == 0


@LOOPS
def test_pipes_are_served(loop: str) -> None:
    lines = b"".join(b"line %d\n" % number for number in range(50_000))
    with Program.aioecho(*SERVE, "--loop", loop, stdin=subprocess.PIPE, is_fresh=True) as program:
        output, _ = program.process.communicate(lines, timeout=40)
        assert output == lines.upper()
        assert (program.process.returncode, program.stderr()) == (0, "")


def test_a_client_that_stays_does_not_keep_the_program_from_its_end() -> None:
    with Program.aioecho("serve", "daytime", "--bind", "stdio:", stdin=subprocess.PIPE) as program:
        assert program.line()
        assert program.wait() == 0


def test_a_signal_drains_it() -> None:
    with Program.aioecho(*SERVE, stdin=subprocess.PIPE) as program:
        program.write(b"a\n")
        assert program.line() == "A"
        assert program.stop(signal.SIGTERM) == 0


def test_the_status_is_1_if_the_handler_failed(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "import aioecho\nclass Fails(aioecho.StreamRequestHandler):\n    async def handle(self):\n        raise ValueError\n"
    )
    with Program.aioecho("serve", "fails:Fails", "--bind", "stdio:", cwd=tmp_path) as program:
        status, output, errors = program.end()
    assert (status, output) == (1, b"")
    assert "ValueError" in errors


@pytest.mark.skipif(shutil.which("socat") is None, reason="socat is not installed")
def test_socat_starts_it_for_a_client() -> None:
    command = f"EXEC:{sys.executable} -m aioecho serve upper --bind stdio\\:"
    with Program("socat", "-t", "30", "-", command, stdin=subprocess.PIPE) as program:
        output, _ = program.process.communicate(b"one\ntwo\n", timeout=40)
        assert output == b"ONE\nTWO\n"


def test_a_listening_socket_is_no_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, Program.aioecho(*SERVE, stdin=sock) as program:
        status, _, errors = program.end()
    assert (status, errors.count("\n")) == (1, 1)
    assert "descriptor 0 is no connection of a stream: to serve on a bound socket use fd://0" in errors


def test_it_goes_with_nothing_else() -> None:
    with pytest.raises(ValueError, match="stdio: is one connection"):
        aioecho.serve(Echo, "stdio:", "tcp://127.0.0.1:0")
    with pytest.raises(ValueError, match="stdio: is one connection"):
        aioecho.TCPServer("stdio:", Echo)
    with pytest.raises(ValueError, match="it needs one worker"):
        aioecho.run(Echo, "stdio:", workers=2)
