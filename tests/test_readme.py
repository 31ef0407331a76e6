"""The README: each of its code blocks is run, by the test that names it."""

import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from programs import ROOT, Program, ask, connect, read_line

README = (ROOT / "README.md").read_text("utf-8")

# A fence's first word is its language, its second one names it: ```python upper
FENCE = re.compile(r"^```(?P<language>\S*)(?: (?P<name>\S+))?\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = {match["name"]: match["text"] for match in FENCE.finditer(README)}
RUN: set[str] = set()

Test = TypeVar("Test", bound=Callable[..., Any])


def runs(name: str) -> Callable[[Test], Test]:
    """Mark a test as the one that runs a block."""
    RUN.add(name)
    return lambda test: test


@contextmanager
def serving(text: str, folder: Path) -> Iterator[tuple[Program, str]]:
    """Run a block that serves on port 9999, but on a socket that listens already; with the endpoint of that."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number = sock.fileno()
        endpoint = "tcp://{}:{}".format(*sock.getsockname())
        (folder / "program.py").write_text(replaced(text, f'"fd://{number}"'))
        with Program(sys.executable, "program.py", cwd=folder, pass_fds=[number]) as server:
            yield server, endpoint


def replaced(text: str, address: str) -> str:
    changed = text.replace('"tcp://127.0.0.1:9999"', address).replace('("127.0.0.1", 9999)', address)
    assert changed != text
    return changed


def output_of(name: str, folder: Path) -> str:
    """Run a block that ends, and return its output."""
    (folder / "program.py").write_text(BLOCKS[name])
    with Program(sys.executable, "-X", "dev", "-W", "error", "program.py", cwd=folder) as program:
        code, output, errors = program.end()
    assert (code, errors) == (0, "")
    return output.decode()


def test_every_block_has_a_name_of_its_own_and_is_run() -> None:
    fences = re.findall(r"^\s*(?:```|~~~)", README, re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS), "a fence without a name, or two of one name"
    assert set(BLOCKS) == RUN


def test_it_opens_with_a_sentence_a_handler_and_two_commands() -> None:
    matches = list(FENCE.finditer(README))
    assert [match["language"] for match in matches[:4]] == ["python", "sh", "sh", "python"]
    assert len(matches[0]["text"].splitlines()) <= 12
    assert matches[1]["text"].count("\n") == matches[2]["text"].count("\n") == 1
    before = README[: matches[0].start()].strip().splitlines()
    assert before[0] == "# aioecho"
    assert len(before) == 3


# The handlers


@runs("upper")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_handler_at_the_top_answers_in_upper_case(tmp_path: Path, number: int) -> None:
    with serving(BLOCKS["upper"], tmp_path) as (server, endpoint):
        with connect(endpoint) as sock:
            sock.sendall(b"Hello, Server!\n")
            assert read_line(sock) == b"HELLO, SERVER!\n"
            server.signal(number)
            assert sock.recv(1) == b""
        assert server.wait() == 0
        assert server.stderr() == ""


@runs("client")
def test_the_client_gets_its_answer(tmp_path: Path) -> None:
    with serving(BLOCKS["upper"], tmp_path) as (_, endpoint):
        script = replaced(BLOCKS["client"], '("127.0.0.1", {})'.format(endpoint.rpartition(":")[2]))
        with Program(sys.executable, "-c", script) as client:
            assert client.end() == (0, b"HELLO, SERVER!\n", "")


@runs("life")
def test_a_handler_lives_as_is_told(tmp_path: Path) -> None:
    with serving(BLOCKS["life"], tmp_path) as (server, endpoint), connect(endpoint) as sock:
        assert read_line(sock) == b"Hello, 127.0.0.1!\n"
        assert ask(endpoint, b"1\n2\n") == b"Hello, 127.0.0.1!\n1\n2\n"
        assert server.line() == "2 lines; 1 others are connected"
        assert server.stop() == 0
        assert server.line() == "0 lines; 0 others are connected"


@runs("slow")
def test_slow_handlers_keep_nobody_waiting(tmp_path: Path) -> None:
    output = output_of("slow", tmp_path)
    assert all(rf"b'CLIENT {number}\n'" in output for number in range(5))
    assert output.endswith(" 2 s\n")


@runs("arguments")
def test_arguments_come_with_partial(tmp_path: Path) -> None:
    with serving(BLOCKS["arguments"], tmp_path) as (server, endpoint):
        assert ask(endpoint) == b"Good morning!\n"
        assert server.stop() == 0


# Servers


@runs("hooks")
def test_the_hooks_are_called(tmp_path: Path) -> None:
    with serving(BLOCKS["hooks"], tmp_path) as (server, endpoint):
        assert ask(endpoint, b"hello\n") == b"HELLO\n"
        with connect(endpoint) as sock:
            sock.sendall(b"x" * 200_000)  # longer than a line may be
            assert server.line().startswith("a handler raised ValueError(")
    refusing = BLOCKS["hooks"].replace('startswith("127.")', 'startswith("10.")')
    with serving(refusing, tmp_path) as (_, endpoint), connect(endpoint) as sock:
        assert sock.recv(1) == b""


@runs("tls")
def test_tls_serves_known_clients_alone(tmp_path: Path, tls: SimpleNamespace) -> None:
    shutil.copy(tls.files.server, tmp_path / "server.pem")
    shutil.copy(tls.files.ca, tmp_path / "clients-ca.pem")
    with serving(BLOCKS["tls"], tmp_path) as (server, endpoint):
        with tls.known_client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1") as sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"
        with connect(endpoint) as plain, tls.client.wrap_socket(plain, server_hostname="127.0.0.1") as sock:
            try:
                received = sock.recv(1)
            except (ssl.SSLError, ConnectionError):
                received = b""
            assert received == b""
        assert server.stop() == 0


@contextmanager
def serving_datagrams(name: str, folder: Path) -> Iterator[tuple[Program, socket.socket]]:
    """Run a block that serves datagrams on port 9999, but on a socket that is bound already; with one connected to that."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        sock.bind(("127.0.0.1", 0))
        client.connect(sock.getsockname())
        client.settimeout(30)
        number = sock.fileno()
        text = BLOCKS[name].replace('"udp://127.0.0.1:9999"', f'"fd://{number}"')
        assert text != BLOCKS[name]
        (folder / "program.py").write_text(text)
        with Program(sys.executable, "program.py", cwd=folder, pass_fds=[number]) as server:
            yield server, client


@runs("datagrams")
def test_a_slow_datagram_keeps_nobody_waiting(tmp_path: Path) -> None:
    with serving_datagrams("datagrams", tmp_path) as (server, client):
        for data in (b"three", b"two", b"one"):
            client.send(data)
        assert [client.recv(100) for _ in range(3)] == [b"2", b"1", b"unknown"]
        assert server.stop() == 0
        assert server.stderr() == ""


@runs("sessions")
def test_a_session_keeps_what_its_peer_sent(tmp_path: Path) -> None:
    with serving_datagrams("sessions", tmp_path) as (server, client):
        for number, total in ((1, b"1"), (2, b"3"), (3, b"6")):
            client.send(b"%d" % number)
            assert client.recv(100) == total
        assert server.stop() == 0
        assert server.stderr() == ""


@runs("limits")
def test_the_limits_and_timeouts_are_taken(tmp_path: Path) -> None:
    with serving(BLOCKS["limits"], tmp_path) as (server, endpoint):
        assert ask(endpoint, b"hello") == b"hello"
        assert server.stop() == 0


@runs("timeouts")
def test_a_handler_says_goodbye_when_time_is_up(tmp_path: Path) -> None:
    quick = BLOCKS["timeouts"].replace("message=5", "message=0.1")
    with serving(quick, tmp_path) as (server, endpoint):
        assert ask(endpoint, b"hello\n") == b"hello\n"
        with connect(endpoint) as sock:
            sock.sendall(b"hello\nwor")
            with sock.makefile("rb") as replies:
                assert replies.read() == b"hello\nbye: no message within 0.1 s\n"
        assert server.stop() == 0


@runs("stop")
def test_a_stop_loses_no_reply(tmp_path: Path) -> None:
    assert output_of("stop", tmp_path) == "b'LAST WORDS\\n'\n1 0 0\n"


# Processes, and what stands before them


@runs("workers")
def test_the_program_with_workers_serves(tmp_path: Path) -> None:
    with serving(BLOCKS["workers"], tmp_path) as (server, endpoint):
        assert ask(endpoint, b"hello\n") == b"HELLO\n"
        assert server.stop() == 0
        assert server.stderr() == ""


@runs("echo.socket")
@runs("echo.service")
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
        while "Listening on" not in program.stderr():
            assert program.process.poll() is None
        assert ask(f"tcp://{address}", b"hello\n") == b"HELLO\n"
        assert program.stop() == 0


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


@runs("haproxy.cfg")
@pytest.mark.skipif(shutil.which("haproxy") is None, reason="there is no haproxy on this machine")
def test_behind_haproxy_one_server_can_be_stopped(tmp_path: Path) -> None:
    command = ("haproxy", "-db", "-f", tmp_path / "haproxy.cfg")
    with behind(BLOCKS["haproxy.cfg"], *command) as (servers, endpoint):
        check_that_one_can_be_stopped(servers, endpoint)


@runs("nginx.conf")
@pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx on this machine")
def test_behind_nginx_one_server_can_be_stopped(tmp_path: Path) -> None:
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
    built = subprocess.run(["nginx", "-V"], capture_output=True, text=True, check=True).stderr.split()
    if not (module.exists() or "--with-stream" in built):
        pytest.skip("nginx has no stream module on this machine")
    load = f"load_module {module};\n" if module.exists() else ""
    besides = f"{load}daemon off;\npid {tmp_path}/pid;\nerror_log stderr;\nevents {{}}\n"
    command = ("nginx", "-p", tmp_path, "-e", "stderr", "-c", tmp_path / "nginx.conf")
    with behind(besides + BLOCKS["nginx.conf"], *command) as (servers, endpoint):
        check_that_one_can_be_stopped(servers, endpoint)


# Inside an application


@runs("web")
def test_it_runs_in_the_lifespan_of_a_web_application(tmp_path: Path) -> None:
    # uvicorn's listening socket is inherited too, so that nothing has to be waited for.
    with socket.create_server(("127.0.0.1", 0)) as web, socket.create_server(("127.0.0.1", 0)) as upper:
        (tmp_path / "web.py").write_text(replaced(BLOCKS["web"], f'"fd://{upper.fileno()}"'))
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


@runs("tasks")
def test_it_runs_beside_other_tasks(tmp_path: Path) -> None:
    assert output_of("tasks", tmp_path) == "b'ONE OF MANY TASKS\\n'\n"


@runs("pytest")
def test_it_runs_in_a_test(tmp_path: Path) -> None:
    (tmp_path / "test_upper.py").write_text(BLOCKS["pytest"])
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\nasyncio_default_fixture_loop_scope = function\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    with Program(*command, cwd=tmp_path, env={"PYTEST_ADDOPTS": ""}) as program:
        code, output, errors = program.end()
    assert code == 0, (output, errors)
    assert b"1 passed" in output


# Blocking handlers, and what comes from socketserver


@runs("blocking")
def test_blocking_and_async_handlers_serve_side_by_side(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = replaced(BLOCKS["blocking"], f'"fd://{other.fileno()}"').replace("time.sleep(2)", "time.sleep(0.02)")
        text = text.replace('"tcp://127.0.0.1:9998"', '"tcp://127.0.0.1:0"')
        (tmp_path / "program.py").write_text(text)
        with Program(sys.executable, "program.py", cwd=tmp_path, pass_fds=[other.fileno()]) as server:
            assert ask("tcp://{}:{}".format(*other.getsockname()), b"slow") == b"SLOW"
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(tmp_path / "fast.sock"))
                sock.sendall(b"fast")
                assert sock.recv(10) == b"FAST"
            assert server.stop() == 0
            assert server.stderr() == ""


@runs("background")
def test_a_server_runs_in_a_thread(tmp_path: Path) -> None:
    assert output_of("background", tmp_path) == "b'HELLO\\n'\n1\n"


@runs("compat")
def test_the_port_is_one_line(tmp_path: Path) -> None:
    # It binds the address itself, so that a free port is asked for, and the program made to tell which.
    text = (
        BLOCKS["compat"]
        .replace("9999", "0")
        .replace(
            "    server.serve_forever()", "    print(*server.server_address, flush=True)\n    server.serve_forever()"
        )
    )
    (tmp_path / "program.py").write_text(text)
    with Program(sys.executable, "program.py", cwd=tmp_path) as server:
        assert ask("tcp://{}:{}".format(*server.line().split()), b"hello\n") == b"HELLO\n"
        server.signal(signal.SIGINT)
        assert server.wait() != 0
        assert "KeyboardInterrupt" in server.stderr()


# The command line


def commands(name: str) -> list[str]:
    """Return the command lines of a block, for the Python that runs the tests."""
    return [line.replace("python ", f"'{sys.executable}' ") for line in BLOCKS[name].splitlines()]


@runs("serve")
@pytest.mark.parametrize("number", range(4))
def test_the_servers_of_the_command_line_serve(tmp_path: Path, tls: SimpleNamespace, number: int) -> None:
    (tmp_path / "chat.py").write_text(BLOCKS["upper"].replace("Upper", "Room"))
    shutil.copy(tls.files.server, tmp_path / "server.pem")
    shutil.copy(tls.files.ca, tmp_path / "clients-ca.pem")
    lines = commands("serve")
    assert len(lines) == 4
    # What names a port is given another: these may be taken.
    command = re.sub(r":7000\b|--port 7000", lambda match: match[0].replace("7000", "0"), lines[number])
    if command == lines[number]:
        command += " --port 0"
    with Program("sh", "-c", f"exec {command}", cwd=tmp_path) as server:
        endpoint = server.listening()
        if "server.pem" in command:
            sock: socket.socket = tls.known_client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1")
        else:
            sock = connect(endpoint)
        with sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == (b"hello\n" if "server.pem" in command else b"HELLO\n")
        if "app.sock" in command:
            assert server.listening() == "unix:app.sock"
        assert server.stop() == 0


@runs("send")
def test_the_clients_of_the_command_line_are_answered(tmp_path: Path) -> None:
    with serving(BLOCKS["upper"], tmp_path) as (_, endpoint):
        expected = [b"HELLO, SERVER!\n", b"ONE\nTWO\n", b""]
        for command, output in zip(commands("send"), expected, strict=True):
            with Program("sh", "-c", command.replace("tcp://127.0.0.1:9999", endpoint)) as client:
                code, received, errors = client.end()
                assert (code, errors) == (0, "")
                assert received == output or (not output and b"Usage: " in received)


# The two commands


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the repository holds, and nothing else."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(listing, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is not a git checkout")
    folder = tmp_path / "checkout"
    for name in done.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@contextmanager
def shell(command: str, folder: Path, **environment: str) -> Iterator[Program]:
    """Run a command as on a fresh machine: `python3` is the Python of the tests, and nothing is installed for it."""
    programs = folder.parent / "bin"
    programs.mkdir(exist_ok=True)
    python = programs / "python3"
    python.write_text(f'#!/bin/sh\nexec "{os.path.realpath(sys.executable)}" "$@"\n')
    python.chmod(0o755)
    search = f"{programs}:{os.environ['PATH']}"
    with Program("sh", "-c", command, cwd=folder, env={"PATH": search, "PYTHONPATH": "", **environment}) as program:
        yield program


@pytest.mark.slow
@pytest.mark.timeout(300)
@runs("install-and-run")
def test_the_first_command_installs_and_serves(checkout: Path) -> None:
    # To its end goes only that it takes a free port. exec, so that the process is the server at last.
    setup, _, serve = BLOCKS["install-and-run"].strip().rpartition(" && ")
    for _ in range(2):  # the second time on what is there
        with shell(f"({setup}) >&2 && exec {serve} serve --port 0", checkout) as server:
            endpoint = server.listening()
            assert ask(endpoint, b"Hello, Server!\n") == b"Hello, Server!\n"
            assert server.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
@runs("install-and-test")
def test_the_second_command_installs_and_finds_the_tests(checkout: Path) -> None:
    with shell(BLOCKS["install-and-test"], checkout, PYTEST_ADDOPTS="--collect-only -q") as program:
        code, output, errors = program.end(timeout=590)
    assert code == 0, (output[-2000:], errors)
    assert b"tests/test_readme.py::test_the_second_command_installs_and_finds_the_tests" in output
