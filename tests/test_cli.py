"""The command line as users meet it: its output and its exit status.

What needs a process (signals, standard streams, descriptors) runs in one. What only reads what a command said calls it in
this process, by `invoke`; that a process says the same is a test, too.
"""

import asyncio
import os
import platform
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from helpers import check_mistake, invoke, needs_ipv6
from programs import Program, ask, connect, read_line
from timing import in_time

import aioecho
from aioecho import client
from aioecho.echo import DATAGRAM_HANDLERS, HANDLERS, EchoFrames
from aioecho.framing import FixedSize, Framing, LengthPrefixed, Lines, Netstrings
from aioecho.framing.spec import FRAMINGS

ANYWHERE = ("--bind", "tcp://127.0.0.1:0")
SIGNALS = [signal.SIGTERM, signal.SIGINT]

# A handler that answers at once, works for as many seconds as it was told, and answers again.
SLOW = """
import asyncio
import aioecho

class Slow(aioecho.StreamRequestHandler):
    async def handle(self):
        seconds = await self.reader.readline()
        await self.send(b"begun\\n")
        await asyncio.sleep(float(seconds or 0))
        await self.send(b"done\\n")

async def make(*arguments):
    return Slow(*arguments)

"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


@contextmanager
def serving(*arguments: str | Path, **options: object) -> Iterator[tuple[Program, str]]:
    """Run a server on some port; its endpoint comes with it."""
    with Program.aioecho("serve", *arguments, *ANYWHERE, **options) as server:
        yield server, server.listening()


def run(*arguments: str | Path, **options: object) -> tuple[int, bytes, str]:
    """Run the command line to its end, as users start it: exit status, stdout, stderr."""
    with Program.aioecho(*arguments, is_fresh=True, **options) as program:
        return program.end()


@contextmanager
def serving_here(name: str, context: ssl.SSLContext | None = None) -> Iterator[str]:
    """Serve a ready-made handler in a thread of this process, for a client that is what is tested."""
    with aioecho.run_in_thread(HANDLERS[name], "tcp://127.0.0.1:0", ssl=context) as server:
        yield server.names[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["serve", "ecko"],
        ["serve", "--uds", "absent/app.sock", "--log-level", "warning"],
        ["serve", "--port", "70000"],
        ["send", "unix:absent", "x"],
        ["load", "unix:absent"],
    ],
    ids=" ".join,
)
def test_a_process_says_what_the_same_command_says_here(folder: Path, arguments: list[str]) -> None:
    # Here click's stdout is of UTF-8, in any locale.
    assert run(*arguments, cwd=folder, env={"PYTHONIOENCODING": "utf-8"}) == invoke(*arguments, cwd=folder)


# Serving


@pytest.mark.alike
@pytest.mark.exclusive
def test_alone_it_serves_echo_on_port_9999() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", 9999))
        except OSError:
            pytest.skip("port 9999 is taken")
    with Program.aioecho(is_fresh=True) as server:
        assert server.listening() == "tcp://127.0.0.1:9999"
        assert ask("tcp://127.0.0.1:9999", b"Hello, Server!\n") == b"Hello, Server!\n"
        assert server.stop() == 0


@pytest.mark.parametrize("handler", ["echo", "upper", "discard", "chargen", "daytime", "time"])
def test_each_ready_made_handler_is_served(handler: str) -> None:
    with serving(handler) as (server, endpoint):
        received = ask(endpoint, b"Hello, Server!\n")
        match handler:
            case "echo":
                assert received == b"Hello, Server!\n"
            case "upper":
                assert received == b"HELLO, SERVER!\n"
            case "discard":
                assert received == b""
            case "chargen":
                assert received.startswith(b' !"#$%&')
            case "daytime":
                assert received.endswith(b"-UTC\r\n")
            case "time":
                assert abs(struct.unpack("!L", received)[0] - 2_208_988_800 - time.time()) < 10
        assert server.stop() == 0
        assert server.process.stdout.read() == b""  # type: ignore[union-attr]
        assert "Traceback" not in server.stderr()


def check_line(program: Program) -> None:
    """A client that copies its stdin to the server, and the server's answer to its stdout, gets it in upper case."""
    program.write(b"Hello, Server!\n")
    assert program.line() == "HELLO, SERVER!", program.stderr()


@pytest.mark.skipif(shutil.which("nc") is None, reason="there is no nc on this machine")
def test_nc_is_answered() -> None:
    with serving("upper") as (server, endpoint):
        host, port = endpoint.removeprefix("tcp://").split(":")
        with Program("nc", host, port, stdin=subprocess.PIPE) as client:
            check_line(client)
        assert server.stop() == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl on this machine")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_openssl_is_answered_over_tls(tls: SimpleNamespace, version: str) -> None:
    with serving("upper", "--ssl-certfile", tls.files.server) as (server, endpoint):
        address = endpoint.removeprefix("tcp://")
        trust = ("-CAfile", tls.files.ca, "-verify_return_error")
        command = ("openssl", "s_client", "-quiet", version, *trust, "-connect", address)
        with Program(*command, stdin=subprocess.PIPE) as client:
            check_line(client)
        assert server.stop() == 0
        assert "Traceback" not in server.stderr()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl on this machine")
def test_mutual_tls_serves_openssl_with_a_certificate_and_none_without(tls: SimpleNamespace) -> None:
    files = tls.files
    arguments = ("upper", "--ssl-certfile", files.server, "--ssl-ca-certs", files.ca)
    with serving(*arguments) as (server, endpoint):
        command = ("openssl", "s_client", "-quiet", "-CAfile", files.ca, "-connect", endpoint.removeprefix("tcp://"))
        with Program(*command, "-cert", files.client, "-key", files.client, stdin=subprocess.PIPE) as client:
            check_line(client)
        with Program(*command, stdin=subprocess.PIPE) as client:
            _, output, _ = client.end()
            assert output == b""
        assert server.stop() == 0
        assert "no TLS handshake with" in server.stderr()
        assert "Traceback" not in server.stderr()


def test_a_private_key_in_a_file_of_its_own_may_have_a_password(tls: SimpleNamespace, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    pem = tls.files.server.read_bytes()
    key = serialization.load_pem_private_key(pem, None)
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    (tmp_path / "cert.pem").write_bytes(pem[pem.index(b"-----BEGIN CERTIFICATE") :])
    files = ("--ssl-certfile", tmp_path / "cert.pem", "--ssl-keyfile", tmp_path / "key.pem")
    with (
        serving("upper", *files, "--ssl-keyfile-password", "secret") as (_, endpoint),
        tls.client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1") as sock,
    ):
        sock.sendall(b"hello\n")
        assert read_line(sock) == b"HELLO\n"
    serve = ("serve", *files, *ANYWHERE)
    encrypted = "key.pem: the private key is encrypted: give its password with --ssl-keyfile-password"
    check_mistake(invoke(*serve), "cannot use", "cert.pem", encrypted)
    check_mistake(invoke(*serve, "--ssl-keyfile-password", "guess"), "key.pem: the password is not the private key's")
    missing = "cert.pem: there is no private key (PEM) in cert.pem: name its file with --ssl-keyfile"
    check_mistake(invoke("serve", "--ssl-certfile", "cert.pem", cwd=tmp_path), missing)
    no_certificate = "there is no certificate (PEM) in key.pem"
    check_mistake(invoke("serve", "--ssl-certfile", "key.pem", cwd=tmp_path), no_certificate)
    mismatch = ("serve", "--ssl-certfile", "cert.pem", "--ssl-keyfile", tls.files.client)
    check_mistake(invoke(*mismatch, cwd=tmp_path), "the private key is not that of the certificate")


def test_several_endpoints_are_served_each_with_its_line(folder: Path) -> None:
    arguments = ("--bind", "tcp://127.0.0.1:0", "-b", "unix:app.sock?mode=600", "--uds", "second.sock")
    with Program.aioecho("serve", "upper", *arguments, cwd=folder) as server:
        endpoints = [server.listening() for _ in range(3)]
        assert endpoints[1:] == ["unix:app.sock", "unix:second.sock"]
        assert (folder / "app.sock").stat().st_mode & 0o777 == 0o600
        assert ask(endpoints[0], b"x\n") == b"X\n"
        for name in ("app.sock", "second.sock"):
            with socket.socket(socket.AF_UNIX) as sock:
                descriptor = os.open(folder, os.O_PATH)
                sock.connect(f"/proc/self/fd/{descriptor}/{name}")  # short, however deep the folder is
                os.close(descriptor)
                assert ask(sock, b"x\n") == b"X\n"
        assert server.stop() == 0
    assert not (folder / "app.sock").exists()
    assert not (folder / "second.sock").exists()


def test_an_inherited_descriptor_is_served() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.fileno()
        with Program.aioecho("serve", "--fd", str(number), pass_fds=[number]) as server:
            assert server.listening() == f"tcp://127.0.0.1:{sock.getsockname()[1]}"
            assert ask(f"tcp://127.0.0.1:{sock.getsockname()[1]}", b"x") == b"x"
            assert server.stop() == 0


def test_host_and_port_are_a_tcp_endpoint() -> None:
    with Program.aioecho("serve", "--host", "127.0.0.2", "--port", "0") as server:
        endpoint = server.listening()
        assert endpoint.startswith("tcp://127.0.0.2:")
        assert ask(endpoint, b"x") == b"x"
    with Program.aioecho("serve", "--port", "0") as server:
        assert server.listening().startswith("tcp://127.0.0.1:")


@needs_ipv6
def test_a_host_may_be_an_ipv6_address() -> None:
    with Program.aioecho("serve", "--host", "::1", "--port", "0") as server:
        endpoint = server.listening()
        assert endpoint.startswith("tcp://[::1]:")
        assert ask(endpoint, b"x") == b"x"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "auto"])
def test_the_loop_can_be_chosen(tmp_path: Path, loop: str) -> None:
    (tmp_path / "which.py").write_text(
        "import asyncio, aioecho\n"
        "class Which(aioecho.StreamRequestHandler):\n"
        "    async def handle(self):\n"
        "        await self.send(type(asyncio.get_running_loop()).__module__.encode())\n"
    )
    with serving("which:Which", "--loop", loop, cwd=tmp_path) as (server, endpoint):
        assert ask(endpoint).startswith(b"asyncio" if loop == "asyncio" else b"uvloop")
        assert server.stop() == 0


def test_nobody_has_to_read_where_it_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.fileno()
        reading, writing = os.pipe()
        os.close(reading)
        with Program.aioecho("serve", "--fd", str(number), pass_fds=[number], stdout=writing) as server:
            os.close(writing)
            assert ask(f"tcp://127.0.0.1:{sock.getsockname()[1]}", b"x") == b"x"
            assert server.stop() == 0
            assert "Traceback" not in server.stderr()


def without(streams: str, *command: str | Path) -> list[str | Path]:
    """Return a command that is started with standard streams closed, as ``>&-`` does."""
    return ["/bin/sh", "-c", f'exec "$@" {streams}', "sh", *command]


@pytest.mark.parametrize(
    ("way", "streams"),
    [(way, "<&- >&- 2>&-") for way in ("one process", "workers", "run", "run with workers")] + [("workers", ">&-")],
)
def test_it_serves_and_ends_well_without_standard_streams(folder: Path, way: str, streams: str) -> None:
    (folder / "script.py").write_text(
        "import sys, aioecho, slow\n"
        "if __name__ == '__main__':\n"
        "    aioecho.run(slow.Slow, *sys.argv[2:], workers=int(sys.argv[1]))\n"
    )
    workers = "2" if "workers" in way else "1"
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint, number = f"tcp://127.0.0.1:{sock.getsockname()[1]}", sock.fileno()
        command: list[str | Path] = (
            [sys.executable, "script.py", workers, f"fd://{number}", "unix:app.sock"]
            if "run" in way
            else [sys.executable, "-m", "aioecho", "serve", "slow:Slow", "--workers", workers, "--uds", "app.sock"]
        )
        if "run" not in way:
            command += ["--fd", str(number)]
        with Program(*without(streams, *command), cwd=folder, pass_fds=[number]) as server:
            assert ask(endpoint, b"0\n") == b"begun\ndone\n"
            assert server.stop() == 0
            errors = server.stderr()
    assert "Assertion" not in errors  # of libuv, in any of its processes
    assert "Traceback" not in errors


def test_it_serves_though_it_can_not_write_where_it_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, open("/dev/full", "wb") as full:
        number = sock.fileno()
        with Program.aioecho("serve", "--fd", str(number), pass_fds=[number], stdout=full) as server:
            assert ask(f"tcp://127.0.0.1:{sock.getsockname()[1]}", b"x") == b"x"
            assert server.stop() == 0
            assert "cannot write to stdout where it listens: No space left on device" in server.stderr()
            assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["load", "--help"]])
def test_what_it_can_not_write_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "aioecho", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=20
        )
    assert (done.returncode, done.stderr) == (1, "Error: cannot write to stdout: No space left on device\n")


def test_the_log_level_decides_what_goes_to_stderr() -> None:
    with serving("--log-level", "info") as (server, _):
        assert server.stop() == 0
        assert "INFO aioecho.server: listening on tcp://127.0.0.1:" in server.stderr()
        assert "shut down in" in server.stderr()
    with serving("--log-level", "warning") as (server, _):
        assert server.stop() == 0
        assert server.stderr() == ""


LOUD = """
import logging
import aioecho

logger = logging.getLogger("loud")

class Loud(aioecho.StreamRequestHandler):
    async def handle(self):
        async for line in self.reader:
            if line != b"quiet\\n":
                logger.error("%d %s", self.server.stats.accepted, "x" * 1000)
            await self.send(line)
"""


@contextmanager
def loud_server(folder: Path, *arguments: str) -> Iterator[tuple[Program, str, int]]:
    """A server with much to log; where it listens, and the reading end of the pipe that its stderr is."""
    (folder / "loud.py").write_text(LOUD)
    reading, writing = os.pipe()
    try:
        try:
            server = Program.aioecho("serve", "loud:Loud", *ANYWHERE, *arguments, cwd=folder, stderr=writing)
        finally:
            os.close(writing)
        with server:
            yield server, server.listening(), reading
    finally:
        os.close(reading)


def talk(sock: socket.socket, count: int) -> None:
    for number in range(count):
        sock.sendall(b"%d\n" % number)
        assert read_line(sock) == b"%d\n" % number


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_log_that_is_not_read_does_not_stop_the_server(folder: Path, workers: str) -> None:
    with loud_server(folder, "--workers", workers) as (server, endpoint, _):
        with connect(endpoint) as sock:
            talk(sock, 2000)  # 2 MB for a pipe of 64 KiB, and a queue of 1 MiB
        assert server.stop() == 0  # within a second, for which it waits for the reader


def test_what_was_dropped_of_a_log_is_counted_when_it_is_read_again(folder: Path) -> None:
    with (
        loud_server(folder, "--log-queue", "100000") as (server, endpoint, reading),
        open(reading, "rb", closefd=False) as log,
    ):
        with connect(endpoint) as sock:
            talk(sock, 1000)
            logged = dropped = 0
            while logged + dropped < 1000:
                line = log.readline()
                assert line.endswith(b"\n")
                if match := re.search(
                    rb" WARNING aioecho\.cli: (\d+) log records were dropped: stderr could not be", line
                ):
                    dropped += int(match[1])
                else:
                    logged += line.endswith(b"x" * 1000 + b"\n")
            assert logged >= 100  # what the queue holds
            assert logged + dropped == 1000
            assert dropped  # on a busy machine in several parts, as the log may be written while records come
            talk(sock, 20)
        assert server.stop() == 0
        rest = log.read()
        assert rest.count(b"x" * 1000 + b"\n") == 20
        assert b"dropped" not in rest


def test_without_a_queue_the_log_is_written_at_once(folder: Path) -> None:
    with loud_server(folder, "--log-queue", "0") as (server, endpoint, reading):
        with connect(endpoint) as sock:
            talk(sock, 1)
            assert b"x" * 1000 in os.read(reading, 4096)
        assert server.stop() == 0


def test_a_log_whose_reader_is_gone_does_not_stop_the_server(folder: Path) -> None:
    with loud_server(folder) as (server, endpoint, reading):
        with open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), reading)  # closes it
        with connect(endpoint) as sock:
            talk(sock, 100)
        before = processor_seconds(server)
        with connect(endpoint) as sock:
            for _ in range(20):
                sock.sendall(b"quiet\n")
                assert read_line(sock) == b"quiet\n"
                time.sleep(0.05)  # time in which it has nothing to do
        in_time(processor_seconds(server) - before, 0.5)
        assert server.stop() == 0


def processor_seconds(program: Program) -> float:
    fields = Path(f"/proc/{program.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_end_of_the_log_is_not_lost(folder: Path) -> None:
    with loud_server(folder) as (server, endpoint, reading), open(reading, "rb", closefd=False) as log:
        with connect(endpoint) as sock:
            talk(sock, 30)  # less than the pipe holds
        assert server.stop() == 0
        lines = log.read().splitlines()
    assert sum(line.endswith(b"x" * 1000) for line in lines) == 30
    assert b" INFO aioecho.drain: shut down in " in lines[-1]


def test_at_the_limit_of_connections_clients_wait() -> None:
    with serving("--limit-concurrency", "1") as (server, endpoint):
        with connect(endpoint) as first, connect(endpoint) as second:
            first.sendall(b"1")
            assert first.recv(1) == b"1"
            second.sendall(b"2")
            second.settimeout(0.1)
            with pytest.raises(TimeoutError):
                second.recv(1)
            first.shutdown(socket.SHUT_WR)
            second.settimeout(30)
            assert second.recv(1) == b"2"
        assert server.stop() == 0


# Handlers of the user's


def test_a_class_is_imported_from_the_current_folder(folder: Path) -> None:
    with serving("slow:Slow", cwd=folder) as (server, endpoint):
        assert ask(endpoint, b"0\n") == b"begun\ndone\n"
        assert server.stop() == 0


def test_a_class_is_imported_from_the_folder_that_is_named(folder: Path) -> None:
    with serving("slow:Slow", "--app-dir", folder) as (server, endpoint):
        assert ask(endpoint, b"0\n") == b"begun\ndone\n"
        assert server.stop() == 0


def test_a_class_may_be_in_a_package_or_a_class(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "deep.py").write_text(
        SLOW + "\nclass Outer:\n    class Inner(Slow):\n        pass\n\nnot_a_handler = 7\n"
    )
    with serving("package.deep:Outer.Inner", cwd=tmp_path) as (server, endpoint):
        assert ask(endpoint, b"0\n") == b"begun\ndone\n"
        assert server.stop() == 0
    check_mistake(
        invoke("serve", "package.deep:not_a_handler", cwd=tmp_path), "RequestHandlerClass must be callable", "7"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ecko",
            [
                "no handler is called 'ecko' (did you mean echo?)",
                "echo, upper, discard, chargen, daytime, time",
                "module:Class",
            ],
        ),
        ("absent:Slow", ["no module 'absent' in {folder} nor among the installed ones"]),
        ("slow.absent:Slow", ["no module 'slow.absent' in {folder}"]),
        ("slow:Fast", ["no 'Fast' in module 'slow' ({folder}/slow.py)"]),
        ("slow:Slw", ["no 'Slw' in module 'slow' ({folder}/slow.py) (did you mean Slow?)"]),
        ("slow:Slow.absent", ["no 'Slow.absent' in module 'slow'"]),
        ("slow.py:Slow", ["no module 'slow.py'", "leave out .py, and say slow:Slow"]),
        ("./slow.py", ["no handler is called './slow.py'", "for your own say slow:Class"]),
        ("tcp://127.0.0.1:9999", ["an endpoint is given by --bind tcp://127.0.0.1:9999"]),
        ("slow:", ["no handler is called 'slow:'"]),
        (":Slow", ["no handler is called ':Slow'"]),
        (".slow:Slow", ["no handler is called '.slow:Slow'"]),
        ("slow:aioecho.StreamRequestHandler", ["StreamRequestHandler has no handle()"]),
        ("slow:make", ["make is a coroutine function"]),
    ],
)
def test_a_name_that_is_wrong_gets_one_line_that_says_where_it_was_looked_for(
    folder: Path, name: str, expected: list[str]
) -> None:
    outcome = invoke("serve", name, cwd=folder)
    check_mistake(outcome, *(part.replace("{folder}", str(folder.resolve())) for part in expected))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import no_such_thing_as_this", "ModuleNotFoundError: No module named 'no_such_thing_as_this'"),
        ("from os import no_such_thing", "ImportError: cannot import name 'no_such_thing'"),
        ("raise ValueError('its own trouble')", "ValueError: its own trouble"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_module_that_fails_shows_its_own_traceback(tmp_path: Path, source: str, expected: str) -> None:
    (tmp_path / "own.py").write_text(source)
    code, output, errors = invoke("serve", "own:Handler", cwd=tmp_path)
    assert (code, output) == (1, b"")
    assert errors.startswith("Error: cannot import 'own', which raised ")
    assert "own.py" in errors
    assert expected in errors
    assert not any(name in errors for name in ("click", "aioecho", "importlib"))


def test_a_module_that_serves_as_it_is_imported_gets_one_line(tmp_path: Path) -> None:
    source = "import aioecho, aioecho.echo\naioecho.run(aioecho.echo.Upper, 'fd://99')\n"
    (tmp_path / "unguarded.py").write_text(source)
    check_mistake(
        invoke("serve", "unguarded:Upper", cwd=tmp_path),
        "the module 'unguarded' starts its server whenever it is imported: call run() under `if __name__",
    )


# What can't be


def test_a_port_that_is_taken_gets_one_line_and_status_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        outcome = invoke("serve", "--bind", endpoint)
        check_mistake(outcome, f"cannot listen on {endpoint}: Address already in use", status=1)
        outcome = invoke("serve", *ANYWHERE, "--bind", endpoint)
        check_mistake(outcome, f"cannot listen on {endpoint}: Address already in use", status=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bind", "tcp://no-such-host.invalid:0"], "cannot resolve the host of tcp://no-such-host.invalid:0"),
        (["--bind", "tcp://192.0.2.1:0"], "cannot listen on tcp://192.0.2.1:0: Cannot assign requested address"),
        (["--uds", "x" * 120], "AF_UNIX path too long"),
        (["--uds", "absent/app.sock"], "cannot listen on unix:absent/app.sock: No such file or directory"),
        (["--uds", "slow.py"], "cannot listen on unix:slow.py: a file that is not a socket is in the way"),
        (["--fd", "98765"], "cannot listen on fd://98765: Bad file descriptor"),
        (["--fd", "{file}"], "cannot listen on fd://{file}: Socket operation on non-socket"),
    ],
)
def test_an_endpoint_that_can_not_be_gets_one_line_and_status_1(
    folder: Path, arguments: list[str], expected: str
) -> None:
    with (folder / "slow.py").open() as file:
        arguments = [part.replace("{file}", str(file.fileno())) for part in arguments]
        outcome = invoke("serve", *arguments, cwd=folder)
        check_mistake(outcome, expected.replace("{file}", str(file.fileno())), status=1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--bind", ":9999"], "bad endpoint ':9999': write 127.0.0.1:9999, or *:9999"),
        (["--bind", "tcp://localhost:70000"], "a port is at most 65535"),
        (["--ssl-certfile", "absent.pem"], "cannot use absent.pem: No such file or directory"),
        (["--ssl-certfile", "slow.py"], "cannot use slow.py: "),
        (["--ssl-keyfile", "key.pem"], "TLS needs a certificate: --ssl-certfile"),
        (["--ssl-ca-certs", "ca.pem"], "TLS needs a certificate: --ssl-certfile"),
        (["--bind", "tcp://*:465?tls=on"], "tcp://*:465?tls=on needs a certificate: give ssl= (--ssl-certfile)"),
    ],
)
def test_a_mistake_on_the_command_line_gets_one_line_and_status_2(
    folder: Path, arguments: list[str], expected: str
) -> None:
    check_mistake(invoke("serve", *arguments, cwd=folder), expected)


def test_certificate_authorities_that_can_not_be_read_are_named(tls: SimpleNamespace, folder: Path) -> None:
    arguments = ("serve", "--ssl-certfile", tls.files.server, "--ssl-ca-certs")
    check_mistake(invoke(*arguments, "absent.pem", cwd=folder), "cannot use absent.pem: No such file or directory")
    check_mistake(invoke(*arguments, "slow.py", cwd=folder), "cannot use slow.py: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sevre"],
        ["serve", "--port", "70000"],
        ["serve", "--loop", "twisted"],
        ["serve", "--backlog", "0"],
        ["serve", "--limit-concurrency", "0"],
        ["serve", "--timeout-graceful-shutdown", "-1"],
        ["serve", "--no-such-option"],
        ["send"],
        ["send", "tcp://127.0.0.1:9", "x", "--timeout", "0"],
    ],
)
def test_wrong_usage_is_explained_with_status_2(arguments: list[str]) -> None:
    code, output, errors = invoke(*arguments)
    assert code == 2
    assert output == b""
    assert "Usage: " in errors
    assert "Error: " in errors
    assert "Traceback" not in errors


def test_the_version_names_python_and_the_loop() -> None:
    code, output, errors = invoke("--version")
    assert (code, errors) == (0, "")
    pattern = rf"aioecho {re.escape(aioecho.__version__)} \(Python {platform.python_version()}, uvloop [\d.]+\)\n"
    assert re.fullmatch(pattern, output.decode())


def test_help_shows_what_there_is() -> None:
    for option in ("--help", "-h"):
        code, output, _ = invoke(option)
        assert code == 0
        for word in ("serve", "send", "load", "tcp://127.0.0.1:9999", "python -m aioecho"):
            assert word in output.decode()
    code, output, _ = invoke("serve", "--help")
    assert code == 0
    for word in ("module:Class", "--bind", "unix:PATH", "--ssl-certfile", "SIGTERM", "exit status"):
        assert word in output.decode()
    code, output, _ = invoke("send", "--help")
    assert code == 0
    assert "stdin" in output.decode()


@pytest.mark.parametrize("command", [[], ["serve"], ["send"], ["load"]], ids=str)
def test_help_fits_a_terminal_and_leaves_nothing_out(command: list[str]) -> None:
    with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
        _, output, _ = invoke(*command, "--help")
    text = output.decode()
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "..." not in text.replace("[ARGS]...", "")
    assert not re.search("INTEGER|FLOAT|RANGE", text)


def test_help_names_every_framing_and_every_ready_made_handler() -> None:
    for command in ("serve", "send", "load"):
        text = re.sub(r"-\n\s+", "-", invoke(command, "--help")[1].decode())
        assert [name for name in FRAMINGS if not re.search(rf"\b{name}\b", text.partition("--framing")[2])] == []
    text = invoke("serve", "--help")[1].decode()
    assert [name for name in HANDLERS if f"\n      {name} " not in text] == []


# Signals


@pytest.fixture(params=["cli", "run"])
def slow_server(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[Program, str]]:
    """The slow handler served for as long as it takes: by the command line, and by a script with run()."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        number = sock.fileno()
        if request.param == "cli":
            arguments = ["serve", "slow:Slow", "--fd", str(number)]
            server = Program.aioecho(*arguments, cwd=folder, pass_fds=[number])
        else:
            (folder / "script.py").write_text(
                "import sys, aioecho, slow\n"
                "report = aioecho.run(slow.Slow, sys.argv[1])\n"
                "sys.exit(1 if report.cancelled or report.aborted else 0)\n"
            )
            command = [sys.executable, "script.py", f"fd://{number}"]
            server = Program(*command, cwd=folder, pass_fds=[number])
    with server:
        yield server, endpoint


def begin(endpoint: str, seconds: bytes) -> socket.socket:
    """Have a handler begin work for so many seconds."""
    sock = connect(endpoint)
    sock.sendall(seconds + b"\n")
    assert read_line(sock) == b"begun\n"
    return sock


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_lets_handlers_finish(slow_server: tuple[Program, str], number: int) -> None:
    server, endpoint = slow_server
    with begin(endpoint, b"0.3") as busy, connect(endpoint) as idle:
        server.signal(number)
        assert read_line(idle) == b"begun\n"  # it has met the end of its stream, in place of a request
        assert read_line(busy) == b"done\n"
    assert server.wait() == 0
    assert "Traceback" not in server.stderr()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_it_at_once(slow_server: tuple[Program, str], number: int) -> None:
    server, endpoint = slow_server
    with begin(endpoint, b"60") as busy, connect(endpoint) as idle:
        began = time.monotonic()
        server.signal(number)
        assert read_line(idle) == b"begun\n"  # the drain has begun
        server.signal(number)
        assert busy.recv(100) == b""
        assert server.wait() == 1
        assert time.monotonic() - began < 10
    assert "Traceback" not in server.stderr()


def test_what_does_not_finish_within_the_grace_is_cut_off_with_status_1(folder: Path) -> None:
    with (
        serving("slow:Slow", "--timeout-graceful-shutdown", "0.1", cwd=folder) as (server, endpoint),
        begin(endpoint, b"60") as busy,
    ):
        server.signal()
        assert busy.recv(100) == b""
        assert server.wait() == 1
        assert "cut off when the grace was over: 1 cancelled" in server.stderr()
        assert "Traceback" not in server.stderr()


def test_a_signal_when_all_is_over_ends_what_is_left_with_the_status(folder: Path) -> None:
    (folder / "stays.py").write_text(
        "import threading\nfrom slow import Slow\nthreading.Thread(target=threading.Event().wait).start()\n"
    )
    with serving("stays:Slow", cwd=folder) as (server, _):
        server.signal()
        while not server.catches(signal.SIGTTIN):  # which it does then alone
            time.sleep(0.01)
        server.signal()
        assert server.wait() == 0


def test_run_gives_one_line_and_status_1_if_it_can_not_listen(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        script = f"import aioecho, slow; aioecho.run(slow.Slow, {endpoint!r})"
        with Program(sys.executable, "-c", script, cwd=folder) as program:
            code, _, errors = program.end()
    assert code == 1
    assert errors == f"aioecho: cannot listen on {endpoint}: Address already in use\n"


# Sending


def test_send_sends_its_argument_as_a_line() -> None:
    with serving_here("upper") as endpoint:
        assert invoke("send", endpoint, "Hello, Server!") == (0, b"HELLO, SERVER!\n", "")
        assert invoke("send", endpoint, os.fsdecode("größe".encode())) == (0, "GRößE\n".encode(), "")
        assert invoke("send", endpoint, "") == (0, b"\n", "")


def test_send_sends_the_lines_of_stdin_as_they_come() -> None:
    with serving_here("upper") as endpoint, Program.aioecho("send", endpoint, stdin=subprocess.PIPE) as client:
        for number in range(3):
            client.write(b"line %d\n" % number)
            assert client.line() == f"LINE {number}"
        client.write(b"no end")
        assert client.end() == (0, b"NO END", "")


# Frames


@pytest.mark.parametrize(
    "text",
    [
        "lines",
        "length:2,little",
        r"delimited:\x1c\r,start=\x0b",
        "slip",
        "cobs",
        "netstrings",
        "varint",
        "content-length",
    ],
)
def test_send_sends_lines_as_frames_and_writes_frames_as_lines(text: str) -> None:
    with serving("upper", "--framing", text) as (server, endpoint):
        with Program.aioecho("send", endpoint, "--framing", text, stdin=subprocess.PIPE) as client:
            for number in range(3):
                client.write(b"line %d\n" % number)
                assert client.line() == f"LINE {number}"
            client.write(b"no end")
            assert client.end() == (0, b"NO END\n", "")
        assert invoke("send", endpoint, "Hello, Server!", "--framing", text) == (0, b"HELLO, SERVER!\n", "")
        assert server.stop() == 0


def test_a_text_with_a_newline_is_one_frame() -> None:
    with serving_framed(Netstrings()) as endpoint:
        assert invoke("send", endpoint, "a\nb", "--framing", "netstrings") == (0, b"a\nb\n", "")
        assert invoke("send", endpoint, "", "--framing", "netstrings") == (0, b"\n", "")


@contextmanager
def serving_framed(framing: Framing, context: ssl.SSLContext | None = None) -> Iterator[str]:
    handler = type("Framed", (EchoFrames,), {"framing": framing})
    with aioecho.run_in_thread(handler, "tcp://127.0.0.1:0", ssl=context) as server:
        yield server.names[0]


def test_send_over_tls_ends_when_as_many_frames_have_come_as_were_sent(tls: SimpleNamespace) -> None:
    with serving_framed(Netstrings(), tls.server) as endpoint:
        arguments = ("send", endpoint, "--ca", tls.files.ca, "--framing", "netstrings")
        with Program.aioecho(*arguments, stdin=subprocess.PIPE) as client:
            client.write(b"one\ntwo\nthree")
            assert client.end() == (0, b"one\ntwo\nthree\n", "")


def test_send_takes_frames_up_to_16_mib(tmp_path: Path) -> None:
    line = b"x" * 3_000_000 + b"\n"
    (tmp_path / "line").write_bytes(line * 2)
    with serving_framed(LengthPrefixed(4)) as endpoint, open(tmp_path / "line", "rb") as file:
        assert run("send", endpoint, "--framing", "length:4", stdin=file) == (0, line * 2, "")


@pytest.mark.parametrize(
    ("reply", "output", "expected"),
    [
        (b"3:abc,4:d", b"abc\n", "{} closed the connection in the middle of a message, after 3 bytes"),
        (b"3:abc,x", b"abc\n", "{} sent no length, in at most 10 digits before b':': b'x'"),
        (b"99999999:", b"", "{} sent a frame of 99999999 bytes, over the limit of 16777216 bytes"),
        (b"", b"", "the connection to {} broke: it was closed without an answer"),
    ],
)
def test_send_says_what_is_wrong_with_what_comes(reply: bytes, output: bytes, expected: str) -> None:
    class Reply(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            await self.reader.read(100)
            await self.send(reply)

    with aioecho.run_in_thread(Reply, "tcp://127.0.0.1:0") as server:
        endpoint = server.names[0]
        code, received, errors = invoke("send", endpoint, "abc", "--framing", "netstrings")
    assert (code, received) == (1, output)
    assert errors == f"Error: {expected.format(endpoint)}\n"


OWN_FRAMING = """
from aioecho.framing import FixedSize, Lines

class Own(Lines):
    pass

EIGHT = FixedSize(8)
NUMBER = 8
"""


def test_a_framing_of_ones_own_is_imported_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "own_framing.py").write_text(OWN_FRAMING)
    with Program.aioecho("serve", "--framing", "own_framing:EIGHT", *ANYWHERE, cwd=tmp_path) as server:
        endpoint = server.listening()
        assert invoke("send", endpoint, "12345678", "--framing", "own_framing:EIGHT", cwd=tmp_path)[1] == b"12345678\n"
        assert server.stop() == 0
    with serving_framed(Lines()) as endpoint:
        assert invoke("send", endpoint, "hello", "--framing", "own_framing:Own", cwd=tmp_path)[1] == b"hello\n"


def test_workers_serve_frames() -> None:
    with serving("upper", "--framing", "netstrings", "--workers", "2") as (server, endpoint):
        assert invoke("send", endpoint, "hello", "--framing", "netstrings") == (0, b"HELLO\n", "")
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["send", "unix:x", "y", "--framing", "lenght:4"],
            "no framing is called 'lenght' (did you mean 'length'?): there are",
        ),
        (["send", "unix:x", "y", "--framing", "mine"], "cobs; for your own say module:object"),
        (["send", "unix:x", "y", "--framing", "length:9"], "size must be a number of bytes from 1 to 8, not 9"),
        (["send", "unix:x", "y", "--framing", "absent:X"], "no module 'absent' in "),
        (["send", "unix:x", "y", "--framing", "own_framing:Absent"], "no 'Absent' in module 'own_framing'"),
        (
            ["send", "unix:x", "y", "--framing", "own_framing:NUMBER"],
            "own_framing:NUMBER is no framing, but 8: expected ",
        ),
        (["send", "unix:x", "y", "--framing", "own_framing:FixedSize"], "own_framing:FixedSize needs arguments ("),
        (["send", "udp://127.0.0.1:9", "y", "--framing", "lines"], "a framing is for streams"),
        (["load", "unix:x", "--framing", "length:9"], "size must be a number of bytes from 1 to 8, not 9"),
        (["serve", "--framing", "length:9"], "size must be a number of bytes from 1 to 8, not 9"),
        (
            ["serve", "daytime", "--framing", "lines"],
            "--framing is for the ready-made echo and upper over streams, not for day",
        ),
        (["serve", "own_framing:Own", "--framing", "lines"], "a class of yours has a `framing` of its own"),
        (["serve", "-b", "udp://127.0.0.1:0", "--framing", "lines"], "not for echo over datagrams"),
    ],
)
def test_a_framing_that_can_not_be_gets_one_line(tmp_path: Path, arguments: list[str], expected: str) -> None:
    (tmp_path / "own_framing.py").write_text(OWN_FRAMING)
    check_mistake(invoke(*arguments, cwd=tmp_path), expected)


def test_a_line_that_is_no_frame_is_a_mistake_of_the_callers() -> None:
    with serving_framed(FixedSize(8)) as endpoint:
        check_mistake(invoke("send", endpoint, "hello", "--framing", "fixed:8"), "a frame must have 8 bytes, not 5")


def test_send_copies_a_large_file(tmp_path: Path) -> None:
    data = b"".join(b"%d\n" % number for number in range(200_000))
    (tmp_path / "data").write_bytes(data)
    with serving_here("echo") as endpoint, open(tmp_path / "data", "rb") as file:
        assert run("send", endpoint, stdin=file) == (0, data, "")


def test_send_speaks_tls(tls: SimpleNamespace) -> None:
    with serving_here("upper", tls.server) as endpoint:
        assert invoke("send", endpoint, "hello", "--ca", tls.files.ca) == (0, b"HELLO\n", "")
        with Program.aioecho("send", endpoint, "--ca", tls.files.ca, stdin=subprocess.PIPE) as client:
            client.write(b"one\ntwo\n")
            assert (client.line(), client.line()) == ("ONE", "TWO")
            # Only now does it learn that this was all.
            assert client.end() == (0, b"", "")
        outcome = invoke("send", endpoint, "hello", "--tls")
        check_mistake(outcome, f"cannot connect to {endpoint}: the certificate is not accepted: ", status=1)


@pytest.mark.parametrize("handler", ["echo", "upper"])
def test_send_over_tls_says_that_its_last_line_has_no_end(tls: SimpleNamespace, handler: str) -> None:
    # Its reply is not known to be all, or does not come: the server is not told that this was all.
    replies = b"a\nb\nc" if handler == "echo" else b"A\nB\n"
    with serving_here(handler, tls.server) as endpoint:
        arguments = ("send", endpoint, "--ca", tls.files.ca, "--timeout", "0.5")
        with Program.aioecho(*arguments, stdin=subprocess.PIPE) as client:
            client.write(b"a\nb\nc")
            code, output, errors = client.end()
    assert (code, output) == (1, replies)
    reason = "the last line was sent without its end, which over TLS has to be a newline"
    assert errors == f"Error: {endpoint} has sent nothing for 0.5 s: {reason}\n"


def test_send_over_tls_to_who_does_not_speak_it_says_so() -> None:
    with serving_here("echo") as endpoint:
        outcome = invoke("send", endpoint, "hello", "--tls", "--timeout", "5")
        check_mistake(outcome, f"cannot connect to {endpoint}: ", status=1)


def test_send_to_a_server_that_wants_a_certificate_says_so(tls: SimpleNamespace) -> None:
    with serving_here("upper", tls.mutual) as endpoint:
        outcome = invoke("send", endpoint, "hello", "--ca", tls.files.ca)
        check_mistake(outcome, f"the connection to {endpoint} broke: ", status=1)


def test_send_with_an_authority_that_can_not_be_read_says_so(tmp_path: Path) -> None:
    outcome = invoke("send", "tcp://127.0.0.1:9", "x", "--ca", "absent.pem", cwd=tmp_path)
    check_mistake(outcome, "cannot use absent.pem: No such file or directory")


def test_send_to_where_nobody_listens_says_so() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        check_mistake(invoke("send", endpoint, "x"), f"cannot connect to {endpoint}: Connection refused", status=1)
    check_mistake(
        invoke("send", "unix:absent", "x"), "cannot connect to unix:absent: No such file or directory", status=1
    )
    outcome = invoke("send", "tcp://no-such-host.invalid:9", "x")
    check_mistake(outcome, "cannot connect to tcp://no-such-host.invalid:9: ", status=1)


@pytest.mark.parametrize("endpoint", [":9999", "fd://0"])
def test_send_to_what_is_no_endpoint_says_so(endpoint: str) -> None:
    check_mistake(invoke("send", endpoint, "x"), endpoint, "tcp://HOST:PORT")


def test_send_gives_up_on_a_server_that_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        outcome = invoke("send", endpoint, "x", "--timeout", "0.2")
        check_mistake(outcome, f"{endpoint} has sent nothing for 0.2 s", status=1)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:0", "udp://127.0.0.1:0"])
async def test_silence_is_limited_only_once_all_is_sent(endpoint: str) -> None:
    async def requests() -> AsyncIterator[bytes]:
        yield b"one\n"
        await asyncio.sleep(0.5)  # time is the subject: longer than the limit
        yield b"two\n"

    received: list[bytes] = []
    handler = (DATAGRAM_HANDLERS if endpoint.startswith("udp") else HANDLERS)["upper"]
    async with aioecho.serve(handler, endpoint) as server:
        await client.exchange(server.names[0], requests(), received.append, timeout=0.4)
    assert b"".join(received) == b"ONE\nTWO\n"


def test_send_says_that_nothing_came() -> None:
    with serving_here("discard") as endpoint:
        outcome = invoke("send", endpoint, "x")
        check_mistake(outcome, f"the connection to {endpoint} broke: it was closed without an answer", status=1)
        assert run("send", endpoint) == (0, b"", "")


def test_send_says_that_the_connection_broke() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        with Program.aioecho("send", endpoint, "x") as client:
            accepted, _ = sock.accept()
            assert accepted.recv(100) == b"x\n"
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()
            check_mistake(client.end(), f"the connection to {endpoint} broke: Connection reset by peer", status=1)


def test_send_ends_when_nobody_reads_what_it_writes() -> None:
    with (
        serving_here("chargen") as endpoint,
        Program.aioecho("send", endpoint, stdin=subprocess.PIPE) as client,
    ):
        assert client.line().startswith(' !"#$%&')
        assert client.process.stdout is not None
        client.process.stdout.close()
        assert client.wait() == 1
        assert client.stderr() == ""


def test_send_says_that_its_output_can_not_be_written() -> None:
    with serving_here("upper") as endpoint, open("/dev/full", "wb") as full:
        with Program.aioecho("send", endpoint, "x", stdout=full) as client:
            assert client.wait() == 1
            assert client.stderr() == "Error: cannot write to stdout: No space left on device\n"
        with Program(*without(">&-", sys.executable, "-m", "aioecho", "send", endpoint, "x")) as client:
            check_mistake(client.end(), "cannot write to stdout: it is closed", status=1)


def test_send_ends_with_the_server_though_stdin_goes_on() -> None:
    with (
        serving_here("daytime") as endpoint,
        Program.aioecho("send", endpoint, stdin=subprocess.PIPE) as client,
    ):
        assert client.line().endswith("-UTC\r")
        assert client.wait() == 0
        assert client.stderr() == ""


def test_send_talks_to_unix_sockets(folder: Path) -> None:
    name = f"unix:@aioecho-send-{os.getpid()}"
    arguments = ("serve", "upper", "--uds", "app.sock", "--bind", name)
    with Program.aioecho(*arguments, cwd=folder) as server:
        assert [server.listening(), server.listening()] == [name, "unix:app.sock"]
        assert invoke("send", "unix:app.sock", "x", cwd=folder) == (0, b"X\n", "")
        assert invoke("send", name, "x") == (0, b"X\n", "")


def test_a_certificate_that_nobody_knows_is_refused(tls: SimpleNamespace) -> None:
    import trustme

    stranger = ssl.create_default_context(cafile=tls.files.ca)
    trustme.CA().issue_cert("stranger@example.org").configure_cert(stranger)
    arguments = ("upper", "--ssl-certfile", tls.files.server, "--ssl-ca-certs", tls.files.ca)
    with serving(*arguments) as (server, endpoint):
        with connect(endpoint) as plain, stranger.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            # With TLS 1.3 a client has done its part of the handshake by now, and learns of it later, or never.
            try:
                received = sock.recv(100)
            except OSError:
                received = b""
            assert received == b""
        assert server.stop() == 0
        assert "no TLS handshake with" in server.stderr()
