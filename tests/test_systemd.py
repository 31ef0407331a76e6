"""systemd's protocols: against a socket that listens in its place, and with its own tools where they are installed."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import check_mistake, invoke
from programs import Program, ask, connect, eventually, read_line, state_of, workers_of
from test_workers import HANDLER, pid_of, talking
from timing import in_time, within

from aioecho.net import systemd


class Manager:
    """Hears what a service tells systemd."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.status = ""
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self._sock.settimeout(20)

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._sock.close()

    def hear(self, timeout: float = 20) -> str:
        """Return the next message, without its STATUS: that is `status` from now on."""
        self._sock.settimeout(timeout)
        lines = self._sock.recv(4096).decode().split("\n")
        for line in lines:
            if line.startswith("STATUS="):
                self.status = line.removeprefix("STATUS=")
        return "\n".join(line for line in lines if not line.startswith("STATUS="))

    def hear_until(self, expected: str, *besides: str) -> None:
        """Wait for a message; before it come only those named `besides`."""
        while (message := self.hear()) != expected:
            assert message in besides

    def hears_nothing_for(self, seconds: float) -> bool:
        """Drop what is there already; whether silence follows."""
        self._sock.setblocking(False)
        try:
            while True:
                self._sock.recv(4096)
        except BlockingIOError:
            pass
        try:
            self.hear(seconds)
        except (TimeoutError, BlockingIOError):
            return True
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "handlers.py").write_text(HANDLER)
    return tmp_path


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify") if request.param == "path" else f"@aioecho-notify-{os.getpid()}") as manager:
        yield manager


@pytest.fixture
def manager_at_path(tmp_path: Path) -> Iterator[Manager]:
    with Manager(str(tmp_path / "notify")) as manager:
        yield manager


@contextmanager
def service(manager: Manager, folder: Path, *arguments: str, **environment: str) -> Iterator[tuple[Program, str]]:
    command = ("serve", "handlers:Obedient", "--port", "0", *arguments)
    with Program.aioecho(*command, cwd=folder, env={"NOTIFY_SOCKET": manager.address, **environment}) as program:
        yield program, program.listening()


STOPPING = r"STOPPING=1\nEXTEND_TIMEOUT_USEC=(\d+)"


@pytest.mark.parametrize("workers", [1, 2])
def test_systemd_is_told_of_the_start_and_of_the_end(manager: Manager, folder: Path, workers: int) -> None:
    arguments = ("--workers", str(workers), "--timeout-graceful-shutdown", "7")
    with service(manager, folder, *arguments) as (program, endpoint):
        assert manager.hear() == "READY=1"
        assert manager.status == f"{'2 workers ' if workers == 2 else ''}listening on {endpoint}"
        with talking(endpoint):
            program.signal()
            match = re.fullmatch(STOPPING, manager.hear())
            assert match
            assert manager.status == "draining"
            assert 7e6 < int(match[1]) < 17e6  # as long as the drain may take
            assert program.wait() == 0
        assert manager.hears_nothing_for(0)
        assert program.stderr().count("WARNING") == 0


def test_systemd_is_told_of_a_reload(manager_at_path: Manager, folder: Path) -> None:
    manager = manager_at_path
    with service(manager, folder, "--workers", "2") as (program, _):
        assert manager.hear() == "READY=1"
        workers = workers_of(program)
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        program.signal(signal.SIGHUP)
        match = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", manager.hear())
        assert match
        assert before <= int(match[1]) < before + 10e6
        assert manager.status == "replacing all workers"
        assert manager.hear() == "READY=1"
        assert manager.status.startswith("2 workers listening on tcp://")
        eventually(lambda: not workers & workers_of(program))
        (folder / "handlers.py").unlink()
        program.signal(signal.SIGHUP)
        assert manager.hear().startswith("RELOADING=1\n")
        assert manager.hear() == "READY=1"  # it is, with the old workers
        assert program.stop() == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_systemd_is_told_of_a_drain_by_live_control(manager_at_path: Manager, folder: Path, workers: int) -> None:
    manager, control = manager_at_path, f"unix:{folder / 'control.sock'}"
    with service(manager, folder, "--workers", str(workers), "--control", control) as (program, endpoint):
        assert manager.hear() == "READY=1"
        with talking(endpoint):
            assert invoke("ctl", "--control", control, "drain", "grace=3600")[0] == 0
            match = re.fullmatch(STOPPING, manager.hear())
            assert match
            assert int(match[1]) > 3600e6  # though TimeoutStopSec is 90 s
            program.signal()  # what systemctl stop does: the shorter grace
            assert program.wait() == 0


@pytest.mark.timed
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_watchdog_is_fed_by_the_event_loop(manager_at_path: Manager, folder: Path, loop: str) -> None:
    manager = manager_at_path
    with service(manager, folder, "--loop", loop, WATCHDOG_USEC="200000") as (program, endpoint):
        manager.hear_until("READY=1", "WATCHDOG=1")
        began = time.monotonic()
        for _ in range(10):
            assert manager.hear() == "WATCHDOG=1"
        took = time.monotonic() - began
        assert took > 0.5  # not the second that they come in: some may have waited to be heard
        in_time(took, 1.5)
        with talking(endpoint, b"block 1\n") as (sock, _):
            with within(1):
                eventually(lambda: manager.hears_nothing_for(0.3), 1)
            assert read_line(sock) == b"block 1\n"
            assert manager.hear() == "WATCHDOG=1"
        with talking(endpoint, b"sleep 0.5\n"):  # and all through the drain
            program.signal()
            while not manager.hear().startswith("STOPPING=1"):
                pass
            for _ in range(3):
                assert manager.hear() == "WATCHDOG=1"
        assert program.wait() == 0


def test_a_worker_whose_loop_hangs_is_replaced(manager_at_path: Manager, folder: Path) -> None:
    manager = manager_at_path
    with service(manager, folder, "--workers", "2", WATCHDOG_USEC="500000") as (program, endpoint):
        manager.hear_until("READY=1", "WATCHDOG=1")
        with talking(endpoint, b"block 30\n") as (_, hangs):
            # systemd hears from the supervisor all the time.
            while state_of(hangs):
                with within(1):
                    assert manager.hear() == "WATCHDOG=1"
        eventually(lambda: len(workers_of(program)) == 2)
        program.says(rf"\(process {hangs}\) hangs, and is killed")  # a thread of its own writes the log
        eventually(lambda: pid_of(endpoint) != hangs)
        assert program.stop() == 0


def test_a_watchdog_for_somebody_else_is_not_fed(manager_at_path: Manager, folder: Path) -> None:
    manager = manager_at_path
    with service(manager, folder, WATCHDOG_USEC="100000", WATCHDOG_PID="1") as (program, _):
        assert manager.hear() == "READY=1"
        assert manager.hears_nothing_for(0.3)
        assert program.stop() == 0


@pytest.mark.parametrize("address", ["/absent/notify", "nonsense", ""])
def test_who_can_not_be_told_is_no_reason_not_to_serve(folder: Path, address: str) -> None:
    with Program.aioecho("serve", "--port", "0", env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "x"}) as program:
        assert ask(program.listening(), b"hello") == b"hello"
        assert program.stop() == 0
        assert "Traceback" not in program.stderr()
        assert ("cannot tell systemd READY=1" in program.stderr()) == address.startswith("/")


def test_handlers_do_not_inherit_what_was_for_the_service(manager_at_path: Manager, folder: Path) -> None:
    (folder / "handlers.py").write_text(
        "import os, aioecho\n"
        "class Obedient(aioecho.StreamRequestHandler):\n"
        "    async def handle(self):\n"
        "        await self.send(repr({*os.environ} & {'NOTIFY_SOCKET', 'WATCHDOG_USEC', 'LISTEN_FDS'}).encode())\n"
    )
    with service(manager_at_path, folder, "--workers", "2", WATCHDOG_USEC="9000000") as (program, endpoint):
        assert ask(endpoint) == b"set()"
        assert program.stop() == 0


@pytest.mark.skipif(shutil.which("systemd-notify") is None, reason="systemd-notify is not installed")
def test_messages_are_those_of_systemd_notify(manager_at_path: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_at_path
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    for assignments in (["READY=1"], ["STOPPING=1", "EXTEND_TIMEOUT_USEC=5"]):
        subprocess.run(["systemd-notify", "--no-block", *assignments], check=True)
        theirs = manager.hear()
        assert systemd.notify(*assignments)
        assert manager.hear() == theirs


# Sockets


def test_sockets_have_the_names_that_systemd_gave_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def passed(fds: str, names: str | None = None, pid: int | str = os.getpid()) -> list[tuple[str, int]]:
        monkeypatch.setenv("LISTEN_PID", str(pid))
        monkeypatch.setenv("LISTEN_FDS", fds)
        monkeypatch.delenv("LISTEN_FDNAMES", raising=False)
        if names is not None:
            monkeypatch.setenv("LISTEN_FDNAMES", names)
        return systemd.listen_fds()

    assert passed("2", "web:admin") == [("web", 3), ("admin", 4)]
    assert passed("2", "web:web") == [("web", 3), ("web", 4)]
    assert passed("1") == [("unknown", 3)]
    assert passed("2", "web") == [("web", 3), ("unknown", 4)]
    assert passed("1", "web:admin") == [("web", 3)]
    assert passed("0", "") == passed("-1", "web") == passed("x", "web") == passed("", "") == []
    assert passed("1", "web", pid=1) == passed("1", "web", pid="") == passed("1", "web", pid="x") == []


# Puts sockets where systemd does, and becomes the program: the process id stays.
ACTIVATE = """
import os, sys
count, names, *command = sys.argv[1:]
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=count, LISTEN_FDNAMES=names)
os.execv(sys.executable, [sys.executable, "-m", "aioecho", "serve", *command])
"""


@contextmanager
def activated(names: str, *arguments: str, socks: tuple[socket.socket, ...]) -> Iterator[Program]:
    moved = [os.dup2(sock.fileno(), 100 + number) for number, sock in enumerate(socks)]
    script = "".join(f"import os; os.dup2({n}, {3 + i}, inheritable=True)\n" for i, n in enumerate(moved)) + ACTIVATE
    try:
        with Program(sys.executable, "-c", script, str(len(socks)), names, *arguments, pass_fds=moved) as program:
            yield program
    finally:
        for number in moved:
            os.close(number)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_endpoint_is_all_sockets_of_a_name(tmp_path: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.socket(socket.AF_UNIX) as two:
        two.bind(str(tmp_path / "app.sock"))
        two.listen()
        names = ["tcp://{}:{}".format(*one.getsockname()), f"unix:{tmp_path}/app.sock"]
        with activated("web:web", "--bind", "systemd:web", "--workers", workers, socks=(one, two)) as program:
            assert [program.listening(), program.listening()] == names
            for name in names:
                assert ask(name, b"hello") == b"hello"
            program.signal(signal.SIGTERM)
            assert program.wait() == 0
        assert (tmp_path / "app.sock").exists()  # it is systemd's


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sockets_for_datagrams_are_served_too(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "app.sock"
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as two,
        socket.create_server(("127.0.0.1", 0)) as stream,
    ):
        one.bind(("127.0.0.1", 0))
        two.bind(str(path))
        names = ["udp://{}:{}".format(*one.getsockname()), f"unixgram:{path}"]
        arguments = ("upper", "--bind", "systemd:app", "--workers", workers)
        with activated("web:app:app", *arguments, socks=(stream, one, two)) as program:
            assert [program.listening(), program.listening()] == names
            for address in (one.getsockname(), str(path)):
                with socket.socket(two.family if isinstance(address, str) else one.family, socket.SOCK_DGRAM) as peer:
                    peer.bind(str(tmp_path / "peer") if isinstance(address, str) else ("127.0.0.1", 0))
                    peer.settimeout(20)
                    peer.sendto(b"hello", address)
                    assert peer.recv(99) == b"HELLO"
            program.signal(signal.SIGTERM)
            assert program.wait() == 0
        assert path.exists()  # it is systemd's
        with activated("app:app", "aioecho.echo:DatagramEcho", "--bind", "systemd:app", socks=(one, stream)) as program:
            code, _, errors = program.end()
            assert code == 1
            assert "it is not a UDP or Unix datagram socket" in errors


def test_a_name_that_systemd_has_not_passed_is_told() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
        activated("web:admin", "--bind", "systemd:api", socks=(one, two)) as program,
    ):
        code, _, errors = program.end()
        assert code == 1
        expected = "Error: cannot listen on systemd:api: systemd has passed none of this name, but web, admin\n"
        assert errors.endswith(expected)
    expected = "cannot listen on systemd:api: systemd has passed no sockets to this process"
    check_mistake(invoke("serve", "--bind", "systemd:api"), expected, status=1)
    assert invoke("serve", "--bind", "systemd:")[0] == 2


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
@pytest.mark.parametrize("workers", ["1", "2"])
def test_systemd_starts_it_by_its_first_client(tmp_path: Path, workers: str) -> None:
    path = tmp_path / "app.sock"
    paths = f"PYTHONPATH={Path(__file__).resolve().parent.parent}"
    command = [
        "systemd-socket-activate", "--fdname=web", "-l", path, "-E", paths,
        sys.executable, "-m", "aioecho", "serve", "upper", "--bind", "systemd:web", "--workers", workers,
    ]  # fmt: skip
    with Program(*command) as program:
        eventually(path.exists)
        endpoint = f"unix:{path}"
        with eventually(lambda: try_to_connect(endpoint)) as sock:  # it is started by this, and accepts it then
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"
            assert program.listening() == endpoint
            program.signal()
            assert sock.recv(1) == b""
        assert program.wait() == 0
        assert path.exists()


def try_to_connect(endpoint: str) -> socket.socket | None:
    try:
        return connect(endpoint)
    except ConnectionRefusedError:  # bound, and not yet listening
        return None
