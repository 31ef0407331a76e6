"""Worker processes as users meet them: real processes, signals, exit statuses."""

import fcntl
import math
import os
import re
import signal
import socket
import struct
import sys
import time
import zipapp
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import check_mistake, invoke
from programs import (
    Program,
    ask,
    can_connect,
    connect,
    descriptors_of,
    eventually,
    read_line,
    state_of,
    workers_of,
)
from timing import in_time

import aioecho
from aioecho.echo import Upper
from aioecho.workers.control_groups import cpu_quota
from aioecho.workers.order import store_order
from aioecho.workers.processors import count_processors

# Tells which process serves; then does as it is told, and answers with the same line.
HANDLER = """
import asyncio
import os
import time
import aioecho

class Obedient(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(b"%d\\n" % os.getpid())
        async for line in self.reader:
            match line.split():
                case [b"sleep", seconds]:
                    await asyncio.sleep(float(seconds))
                case [b"block", seconds]:
                    time.sleep(float(seconds))
                case [b"exit", status]:
                    os._exit(int(status))
                case [b"name", name]:
                    with open("/proc/self/comm", "wb", buffering=0) as file:
                        file.write(name)
            await self.send(line)
"""

# Its workers are loaded only once there is a file `gate`. The parent imports it first.
GATED = """
import os
import time
try:
    os.close(os.open("loaded", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    while not os.path.exists("gate"):
        time.sleep(0.01)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "handlers.py").write_text(HANDLER)
    return tmp_path


# The command line, with another timeout of the supervisor's.
IMPATIENT = (
    "from aioecho import cli; from aioecho.workers import restarts, stopping, supervisor;"
    " supervisor.{0} = restarts.{0} = stopping.{0} = {1}; cli.main()"
)


@contextmanager
def serving(
    folder: Path, *arguments: str | Path, workers: int | str = 2, **timeouts: float
) -> Iterator[tuple[Program, str]]:
    """Run workers on some port; the endpoint comes with them. `timeouts` has one of the supervisor's."""
    command = ("serve", "handlers:Obedient", "--workers", str(workers), "--port", "0", *arguments)
    how = ["-c", IMPATIENT.format(*timeouts.popitem())] if timeouts else ["-m", "aioecho"]
    with Program(sys.executable, *how, *command, cwd=folder) as program:
        yield program, program.listening()


def pid_of(endpoint: str) -> int:
    """Return which worker has served a connection."""
    return int(ask(endpoint))


@contextmanager
def talking(endpoint: str, order: bytes = b"") -> Iterator[tuple[socket.socket, int]]:
    """Be connected, to a worker that has accepted; with its process id."""
    with connect(endpoint) as sock:
        pid = int(read_line(sock))
        sock.sendall(order)
        yield sock, pid


def last_line(program: Program) -> str:
    return program.stderr().splitlines()[-1]


# Serving


@pytest.mark.parametrize("way", [(), ("--reuse-port",), ("--loop", "asyncio")])
def test_every_worker_serves(folder: Path, way: tuple[str, ...]) -> None:
    with serving(folder, *way) as (program, endpoint):
        workers = workers_of(program)
        assert len(workers) == 2
        seen = set()
        # A worker that is busy leaves the next client to another one.
        eventually(lambda: seen.add(pid_of(endpoint)) or seen == workers)
        assert program.stop() == 0
        assert program.process.stdout is not None
        assert program.process.stdout.read() == b""  # one line for the endpoint, not one a worker
        assert "Traceback" not in program.stderr()


@pytest.mark.alike
def test_auto_is_one_worker_for_each_processor(folder: Path) -> None:
    with serving(folder, workers="auto") as (program, _):
        assert len(workers_of(program)) == count_processors()
        assert program.stop() == 0


def test_processors_are_those_that_python_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioecho.workers.processors.cpu_quota", lambda: math.inf)
    if sys.version_info < (3, 13):
        assert count_processors() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert count_processors() == 3
    monkeypatch.setattr(os, "process_cpu_count", lambda: None)  # not known
    assert count_processors() == 1
    monkeypatch.setattr(os, "process_cpu_count", lambda: 64)
    for quota, count in [(1.5, 2), (4.0, 4), (0.2, 1), (100.0, 64)]:
        monkeypatch.setattr("aioecho.workers.processors.cpu_quota", lambda quota=quota: quota)
        assert count_processors() == count


V1_MOUNTS = """\
31 30 0:27 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory
32 30 0:28 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
"""
V2_MOUNTS = "25 30 0:26 {root} /sys/fs/cgroup rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1, V2 = "sys/fs/cgroup/cpu,cpuacct", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("mounts", "root", "group", "files", "quota"),
    [
        (V2_MOUNTS, "/", "0::/", {f"{V2}/cpu.max": "150000 100000"}, 1.5),
        (V2_MOUNTS, "/", "0::/a/b", {f"{V2}/a/b/cpu.max": "max 100000", f"{V2}/a/cpu.max": "200000 100000"}, 2.0),
        (V2_MOUNTS, "/", "0::/a/b", {f"{V2}/a/b/cpu.max": "50000 100000", f"{V2}/a/cpu.max": "200000 100000"}, 0.5),
        (V2_MOUNTS, "/box", "0::/box", {f"{V2}/cpu.max": "300000 100000"}, 3.0),
        (V2_MOUNTS, "/", "0::/../elsewhere", {f"{V2}/cpu.max": "300000 100000"}, math.inf),
        (V2_MOUNTS, "/", "0::/", {f"{V2}/cpu.max": "max 100000"}, math.inf),
        (V2_MOUNTS, "/", "0::/", {f"{V2}/cpu.max": "nonsense"}, math.inf),
        (V2_MOUNTS, "/", "0::/", {}, math.inf),
        (V1_MOUNTS, "/", "4:cpu,cpuacct:/a\n0::/", {f"{V1}/a/cpu.cfs_quota_us": "250000"}, 2.5),
        (V1_MOUNTS, "/", "4:cpu,cpuacct:/a/b\n0::/", {f"{V1}/a/b/cpu.cfs_quota_us": "-1"}, math.inf),
        (V1_MOUNTS, "/docker/7", "4:cpu,cpuacct:/docker/7\n0::/", {f"{V1}/cpu.cfs_quota_us": "50000"}, 0.5),
        (V1_MOUNTS, "/docker/7", "4:cpu,cpuacct:/docker/77\n0::/", {f"{V1}/cpu.cfs_quota_us": "50000"}, 0.5),
        (V1_MOUNTS + V2_MOUNTS, "/", "4:cpu,cpuacct:/a\n0::/", {f"{V1}/a/cpu.cfs_quota_us": "100000"}, 1.0),
        ("", "/", "0::/", {}, math.inf),
        # What else is mounted: from an empty string, and where the name is no UTF-8.
        ("20 30 0:20 / /tmp/a rw - tmpfs  rw\n" + V2_MOUNTS, "/", "0::/", {f"{V2}/cpu.max": "150000 100000"}, 1.5),
        ("20 30 0:20 / /caf\udce9 rw - ext4 /b rw\n" + V2_MOUNTS, "/", "0::/", {f"{V2}/cpu.max": "150000 100000"}, 1.5),
    ],
)
def test_the_quota_is_the_least_of_the_group_and_its_parents(
    tmp_path: Path, mounts: str, root: str, group: str, files: dict[str, str], quota: float
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(group + "\n")
    (tmp_path / "proc/self/mountinfo").write_bytes(os.fsencode(mounts.format(root=root)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
        if name.endswith("cfs_quota_us"):
            (tmp_path / name).with_name("cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == quota


def test_without_control_groups_there_is_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) == math.inf


def test_one_worker_is_this_process(folder: Path) -> None:
    with serving(folder, workers=1) as (program, endpoint):
        assert pid_of(endpoint) == program.process.pid
        assert program.stop() == 0


@pytest.mark.parametrize("workers", ["0", "-1", "many", ""])
def test_a_number_of_workers_that_is_none_is_a_mistake(workers: str) -> None:
    code, output, errors = invoke("serve", "--workers", workers)
    assert (code, output) == (2, b"")
    assert errors.splitlines()[-1].startswith("Error: Invalid value for '--workers': ")


@pytest.mark.alike
def test_endpoints_of_all_kinds_are_shared(folder: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        Program.aioecho(
            "serve", "handlers:Obedient", "--workers", "2", "--reuse-port",
            "--bind", "tcp://localhost:0", "--bind", "unix:app.sock?mode=600", "--fd", str(sock.fileno()),
            cwd=folder, pass_fds=[sock.fileno()],
        ) as program,
    ):  # fmt: skip
        name = "tcp://{}:{}".format(*sock.getsockname())
        endpoints = [program.listening() for _ in range(3)]
        assert endpoints[1:] == ["unix:app.sock", name]
        assert (folder / "app.sock").stat().st_mode & 0o777 == 0o600
        workers = workers_of(program)
        for endpoint in (endpoints[0], f"unix:{folder}/app.sock", name):
            assert pid_of(endpoint) in workers
        program.signal(signal.SIGHUP)
        eventually(lambda: not workers & workers_of(program))  # one that leaves accepts until it has heard of it
        assert (folder / "app.sock").exists()
        assert pid_of(f"unix:{folder}/app.sock") in workers_of(program)
        assert program.stop() == 0
        assert not (folder / "app.sock").exists()


def test_what_can_not_be_bound_is_said_once(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = str(sock.getsockname()[1])
        outcome = invoke("serve", "--workers", "2", "--port", port)
        assert outcome == (1, b"", f"Error: cannot listen on tcp://127.0.0.1:{port}: Address already in use\n")


# From a program


PROGRAM = """
import os
import sys
import aioecho

class Here(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(b"%d %s\\n" % (os.getpid(), __name__.encode()))

if __name__ == "__main__":
    report = aioecho.run(Here, f"fd://{sys.argv[1]}", workers=2, grace=5)
    print(type(report).__name__, flush=True)
"""


@contextmanager
def running(folder: Path, text: str, *command: str, arguments: tuple[str, ...] = ()) -> Iterator[tuple[Program, str]]:
    """Run a program on a socket that listens already; the endpoint of that comes with it."""
    (folder / "program.py").write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        number, endpoint = sock.fileno(), "tcp://{}:{}".format(*sock.getsockname())
        command = (*(command or ("program.py",)), str(number), *arguments)
        with Program(sys.executable, "-W", "error", *command, cwd=folder, pass_fds=[number]) as program:
            yield program, endpoint


@pytest.mark.parametrize("command", [("program.py",), ("-m", "program")])
def test_a_program_serves_its_own_handler(folder: Path, command: tuple[str, ...]) -> None:
    with running(folder, PROGRAM, "-X", "dev", *command) as (program, endpoint):
        pid, name = ask(endpoint).split()
        assert int(pid) in workers_of(program)
        assert name == b"__mp_main__"
        assert program.stop() == 0
        assert program.line() == "DrainReport"
        assert program.stderr() == ""


# One worker is enough where it is about what that imports.
ALONE = """
import os
import sys
import tempfile
import aioecho

class Here(aioecho.StreamRequestHandler):
    async def handle(self):
        if await self.reader.readline() == b"raise\\n":
            raise KeyError("oh")
        await self.send(b"%s %d\\n" % (__name__.encode(), "AIOECHO_WORKER" in os.environ))
        await self.reader.read()

if __name__ == "__main__":
    tempfile.tempdir = "/nonexistent"
    aioecho.run(Here, f"fd://{sys.argv[1]}", max_requests=1000, grace=20, loop=sys.argv[2])
"""


def run_alone(folder: Path, *command: str, loop: str = "auto") -> Any:
    """Run ALONE, which has to be where `command` looks for it."""
    return running(folder, ALONE, *command, arguments=(loop,))


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_program_in_a_folder_or_an_archive_serves_its_own_handler(folder: Path, kind: str) -> None:
    (folder / "app").mkdir()
    (folder / "app/__main__.py").write_text(ALONE)
    if kind == "archive":
        zipapp.create_archive(folder / "app", folder / "app.pyz")
    with run_alone(folder, "app" if kind == "folder" else "app.pyz") as (program, endpoint):
        # No folder for temporary files was needed, nor does the mark of the worker's start go on to its children.
        assert ask(endpoint, b"any\n") == b"__mp_main__ 0\n"
        assert program.stop() == 0
        assert program.stderr() == ""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_an_error_in_a_worker_is_recorded_and_clients_that_are_gone_hold_up_no_stop(folder: Path, loop: str) -> None:
    # With warnings as errors and in debug mode, which Python 3.15 warns in of modules without a loader.
    with run_alone(folder, "-X", "dev", "program.py", loop=loop) as (program, endpoint):
        assert ask(endpoint, b"raise\n") == b""
        for number in range(12):
            with connect(endpoint) as sock:
                if number % 2:
                    sock.sendall(b"any\n")
                if number % 3 == 0:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        began = time.monotonic()
        assert program.stop() == 0
        took = time.monotonic() - began
        errors = program.stderr()
        assert errors.startswith("the handler of the connection from ")
        assert errors.count("Traceback") == 1
        assert 'raise KeyError("oh")\n' in errors
        assert re.search(r"^KeyError: 'oh'\n\Z", errors, re.MULTILINE)
        in_time(took, 10)


@pytest.mark.skipif(sys.version_info < (3, 15), reason="Python imports nothing lazily before 3.15")
def test_workers_serve_where_all_imports_are_lazy(folder: Path) -> None:
    with run_alone(folder, "-X", "lazy_imports=all", "program.py") as (program, endpoint):
        assert ask(endpoint, b"any\n") == b"__mp_main__ 0\n"
        assert program.stop() == 0
        assert "Traceback" not in program.stderr()


MULTIPROCESSING = """
import asyncio
import multiprocessing
import sys
import aioecho

def double(connection):
    connection.send(connection.recv() * 2)

class Here(aioecho.StreamRequestHandler):
    async def handle(self):
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=double, args=(theirs,))
        process.start()
        ours.send(21)
        await self.send(b"%d" % await asyncio.to_thread(ours.recv))
        process.join()

if __name__ == "__main__":
    process = multiprocessing.get_context(sys.argv[1]).Process(
        target=aioecho.run, args=(Here, "unix:here.sock"), kwargs={"max_requests": 1000}
    )
    process.start()
    print(process.pid, flush=True)
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_of_a_process_of_multiprocessings_serve_and_so_may_start_such(folder: Path, method: str) -> None:
    (folder / "program.py").write_text(MULTIPROCESSING)
    with Program(sys.executable, "program.py", method, cwd=folder) as program:
        endpoint = f"unix:{folder}/here.sock"
        eventually(lambda: can_connect(endpoint))
        assert ask(endpoint) == b"42"
        os.kill(int(program.line()), signal.SIGTERM)
        assert program.wait() == 0
        assert program.stderr() == ""


def test_a_frozen_program_is_told_that_it_has_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(
        SystemExit, match=r"^aioecho: a frozen program can't start worker processes, .*: use one worker"
    ):
        aioecho.run(Nothing, "tcp://127.0.0.1:0", workers=2)
    monkeypatch.delattr(sys, "frozen")
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(SystemExit, match=r"^aioecho: can't start worker processes, as sys.executable names no Python"):
        aioecho.run(Nothing, "tcp://127.0.0.1:0", workers=2)


FROZEN = """
import sys
import aioecho
from aioecho.echo import Upper

with open("starts", "a") as starts:
    starts.write("start\\n")
sys.executable = "./program"
aioecho.run(Upper, "tcp://127.0.0.1:0", workers=1, reuse_port=True)
"""


@pytest.mark.alike
@pytest.mark.parametrize("closed", ["", "3<&- 4<&- 5<&- 6<&- 7<&- 8<&- 9<&-"])
def test_an_executable_that_runs_the_program_again_does_not_do_so_without_end(folder: Path, closed: str) -> None:
    (folder / "program.py").write_text(FROZEN)
    (folder / "program").write_text(f"#!/bin/sh\nexec {sys.executable} program.py {closed}\n")
    (folder / "program").chmod(0o755)
    with Program("./program", cwd=folder) as program:
        code, _, errors = program.end()
        assert code == 1
        assert (folder / "starts").read_text() == "start\n" * 2
        line = r"aioecho: .*\./program runs the program again in place of a worker process: use one worker, .*\n"
        if closed:  # the way to the supervisor, too: so there are two
            line += r"aioecho: worker 1 \(process \d+\) ended with exit status 1 before it was ready\n"
        assert re.fullmatch(line, errors)


def test_an_order_is_kept_in_memory_or_else_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read(descriptor: int) -> bytes:
        with open(descriptor, "rb") as file:
            return os.pread(file.fileno(), 100, 0)

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nonexistent"))
    assert read(store_order(b"an order")) == b"an order"
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(aioecho.AioechoError, match=r"^cannot store what workers are to do: .*: set TMPDIR"):
        store_order(b"an order")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert read(store_order(b"an order")) == b"an order"
    assert not any(tmp_path.iterdir())


@pytest.mark.alike
def test_a_program_without_the_guard_is_told_so(folder: Path) -> None:
    with running(folder, PROGRAM.replace('if __name__ == "__main__":', "if True:")) as (program, _):
        code, _, errors = program.end()
        assert code == 1
        assert re.fullmatch(r"aioecho: worker \d \(process \d+\) could not start: .*__main__.*\n", errors)


@pytest.mark.parametrize(
    ("argument", "named"), [("lambda *args: None", "<lambda>"), ("type('Made', (Here,), {})", "Made"), ("open", None)]
)
def test_a_handler_that_can_not_be_sent_is_named(folder: Path, argument: str, named: str | None) -> None:
    if named is None:
        argument, named = "functools.partial(Here, lock=__import__('threading').Lock())", "lock"
    text = PROGRAM.replace("run(Here,", f"run({argument},").replace("import os\n", "import os, functools\n")
    with running(folder, text) as (program, _):
        code, _, _ = program.end()
        assert code == 1
        assert last_line(program).startswith("TypeError: worker processes import the handler")
        assert named in last_line(program)


def test_a_handler_of_a_program_without_a_file_is_refused(folder: Path) -> None:
    with running(folder, "", "-c", PROGRAM) as (program, _):
        code, _, _ = program.end()
        assert code == 1
        assert last_line(program).endswith("put the handler's class into a module")


MAPPING = """
import os
import socketserver
import sys
import aioecho

class Fast(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(b"fast %d" % os.getpid())

class Blocking(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"blocking %d" % os.getpid())

if __name__ == "__main__":
    handlers = {
        Fast: ["tcp://localhost:0", "unix:fast.sock"],
        Blocking: (f"fd://{sys.argv[1]}", "unix:blocking.sock"),
    }
    aioecho.run(handlers, workers=2, reuse_port=True)
"""


def test_workers_serve_several_handlers_blocking_ones_among_them(folder: Path) -> None:
    with running(folder, MAPPING) as (program, endpoint):
        # Sockets that are bound once and sockets that every worker has do not change places.
        expected = {
            endpoint: b"blocking",
            f"unix:{folder}/fast.sock": b"fast",
            f"unix:{folder}/blocking.sock": b"blocking",
        }
        for where, name in expected.items():
            eventually(lambda: can_connect(where))  # noqa: B023 - at once
            kind, pid = ask(where).split()
            assert kind == name
            assert int(pid) in workers_of(program)
        assert program.stop() == 0
        assert program.stderr() == ""


def test_several_handlers_take_no_socket_without_a_handler() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(TypeError, match="no handler class is named"):
        aioecho.serve({Nothing: "tcp://127.0.0.1:0"}, sock=sock)


HANGS = """
import os
import signal
import sys
import time
import aioecho
from aioecho.workers import supervisor

class Here(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(b"%d" % os.getpid())

def set_patience(*_):
    supervisor.START_TIMEOUT = 0.2 if os.path.exists("hang") else 60

if __name__ == "__main__":
    signal.signal(signal.SIGUSR2, set_patience)
    set_patience()
    aioecho.run(Here, f"fd://{sys.argv[1]}", workers=2)
elif os.path.exists("hang"):
    time.sleep(60)
"""


@pytest.mark.alike
def test_a_worker_that_hangs_when_it_starts_ends_all(folder: Path) -> None:
    (folder / "hang").touch()
    with running(folder, HANGS) as (program, _):
        code, _, errors = program.end()
        assert code == 1
        worker = r"worker \d \(process \d+\) is not ready after 0.2 s"
        assert re.search(rf"^aioecho: {worker}\n\Z", errors, re.MULTILINE)


@pytest.mark.alike
def test_a_restart_whose_worker_hangs_is_called_off(folder: Path) -> None:
    with running(folder, HANGS) as (program, endpoint):
        before: set[int] = set()
        eventually(lambda: before.add(int(ask(endpoint))) or len(before) == 2)
        (folder / "hang").touch()
        program.signal(signal.SIGUSR2)
        program.signal(signal.SIGHUP)
        eventually(lambda: "is not ready after 0.2 s: the old one serves on" in program.stderr())
        eventually(lambda: workers_of(program) == before)
        (folder / "hang").unlink()
        program.signal(signal.SIGUSR2)
        program.signal(signal.SIGHUP)
        eventually(lambda: int(ask(endpoint)) not in before and not before & workers_of(program))
        assert program.stop() == 0


# Datagrams


DATAGRAMS = """
import os
import aioecho

class Single(aioecho.DatagramRequestHandler):
    async def handle(self):
        await self.reply(b"%d" % os.getpid())

class Session(aioecho.DatagramSessionHandler):
    async def handle(self):
        count = 0
        async for data in self.datagrams:
            count += 1
            await self.reply(b"%d %d" % (os.getpid(), count))
"""


def exchange(sock: socket.socket) -> bytes:
    sock.send(b"any")
    return sock.recv(100)


@contextmanager
def sending(endpoint: str) -> Iterator[socket.socket]:
    host, port = endpoint.removeprefix("udp://").split(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        sock.connect((host, int(port)))
        yield sock


@contextmanager
def serving_datagrams(folder: Path, handler: str, *arguments: str) -> Iterator[tuple[Program, str]]:
    (folder / "datagrams.py").write_text(DATAGRAMS)
    command = ("serve", f"datagrams:{handler}", "--workers", "2", "--bind", "udp://127.0.0.1:0", *arguments)
    with Program.aioecho(*command, cwd=folder) as program:
        yield program, program.listening()


@pytest.mark.alike
@pytest.mark.parametrize("way", [(), ("--reuse-port",)])
def test_workers_serve_datagrams_and_a_restart_loses_none(folder: Path, way: tuple[str, ...]) -> None:
    with serving_datagrams(folder, "Single", *way) as (program, endpoint), sending(endpoint) as sock:
        before = workers_of(program)
        assert int(exchange(sock)) in before
        program.signal(signal.SIGHUP)
        eventually(lambda: "replaced all" in program.stderr() or not exchange(sock))
        eventually(lambda: int(exchange(sock)) in workers_of(program) - before)
        program.signal(signal.SIGUSR1)
        # A worker that has been replaced may say its last words behind it.
        line = eventually(lambda: re.search(r"stats of all workers.*\n", program.stderr()))[0]
        counts = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}
        assert counts["received"] == counts["handled"] > 2
        assert counts["drops"] == counts["queued"] == 0
        assert program.stop() == 0
        assert "Traceback" not in program.stderr()


@pytest.mark.alike
@pytest.mark.parametrize("handler", ["Single", "Session"])
def test_a_worker_that_has_had_its_datagrams_is_replaced(folder: Path, handler: str) -> None:
    limits = ("--reuse-port", "--limit-max-requests", "5")
    with serving_datagrams(folder, handler, *limits) as (program, endpoint):
        before = workers_of(program)

        def is_new() -> bool:
            with sending(endpoint) as sock:
                return int(exchange(sock).split()[0]) not in before

        eventually(is_new)
        assert program.stop() == 0
        assert "Traceback" not in program.stderr()


@pytest.mark.alike
def test_a_session_stays_with_its_worker(folder: Path) -> None:
    with serving_datagrams(folder, "Session", "--reuse-port") as (program, endpoint), ExitStack() as stack:
        seen = Counter()
        for _ in range(40):
            sock = stack.enter_context(sending(endpoint))
            (pid, first), *following = [exchange(sock).split() for _ in range(3)]
            assert [first, *following] == [b"1", [pid, b"2"], [pid, b"3"]]
            seen[int(pid)] += 1
        assert set(seen) == workers_of(program)
        assert program.stop() == 0


@pytest.mark.parametrize("arguments", [(), ("--reuse-port", "--bind", "unixgram:s.sock")])
def test_sessions_that_workers_can_not_divide_are_refused(folder: Path, arguments: tuple[str, ...]) -> None:
    (folder / "datagrams.py").write_text(DATAGRAMS)
    command = ("serve", "datagrams:Session", "--workers", "2", "--bind", "udp://127.0.0.1:0", *arguments)
    check_mistake(invoke(*command, cwd=folder), "a peer's datagrams would go to several workers")


TLS = """
import functools
import ssl
import sys
import aioecho
from aioecho.echo import Upper

def make_context(file):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(file)
    return context

if __name__ == "__main__":
    make = functools.partial(make_context, "server.pem")
    aioecho.run(Upper, f"fd://{sys.argv[1]}", workers=2, ssl=make)
"""


def test_workers_speak_tls(folder: Path, tls: SimpleNamespace) -> None:
    (folder / "server.pem").write_bytes(tls.files.server.read_bytes())
    with running(folder, TLS) as (program, endpoint):
        with tls.client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1") as sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"
        assert program.stop() == 0
    with running(folder, TLS.replace("ssl=make)", "ssl=make())")) as (program, _):
        assert program.end()[0] == 1
        assert last_line(program).startswith("TypeError: worker processes each need a context of their own")
    with running(folder, TLS.replace("workers=2, ", "")) as (program, endpoint):
        with tls.client.wrap_socket(connect(endpoint), server_hostname="127.0.0.1") as sock:
            sock.sendall(b"hello\n")
            assert read_line(sock) == b"HELLO\n"
        assert program.stop() == 0


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "two", None])
def test_a_number_of_workers_that_makes_no_sense_is_refused(workers: Any) -> None:
    if workers is True:
        with pytest.raises(ValueError, match="workers must be"):
            aioecho.run(Nothing, "tcp://127.0.0.1:0", workers=workers, max_requests=1)
        return
    with pytest.raises((ValueError, TypeError)):
        aioecho.run(Nothing, "tcp://127.0.0.1:0", workers=workers)


async def test_in_a_running_loop_run_says_what_to_use() -> None:
    with pytest.raises(RuntimeError, match=r"serve\(\.\.\.\)` in it, or aioecho.run_in_thread\(\)"):
        aioecho.run(Nothing, "tcp://127.0.0.1:0")


class Nothing(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        pass


# A worker whose event loop is held up


@pytest.mark.alike
@pytest.mark.parametrize("way", [(), ("--reuse-port",)])
def test_a_worker_that_hangs_is_replaced_and_its_clients_wait_no_longer(folder: Path, way: tuple[str, ...]) -> None:
    with serving(folder, *way, "--timeout-worker-healthcheck", "0.5") as (program, endpoint), ExitStack() as stack:
        hangs = stack.enter_context(connect(endpoint))
        pid = int(read_line(hangs))
        hangs.sendall(b"name caf\xe9\n")  # which is no UTF-8, and stands in /proc
        read_line(hangs)
        hangs.sendall(b"block 60\n")
        eventually(lambda: "nanosleep" in Path(f"/proc/{pid}/wchan").read_text())  # it accepts no more
        # With a socket for every worker, some of these wait in the queue of the one that hangs.
        clients = [stack.enter_context(connect(endpoint)) for _ in range(20)]
        for sock in clients:
            assert int(read_line(sock)) != pid
        eventually(lambda: state_of(pid) in ("", "Z"))
        # Waited for, as a thread of its own writes the log: a busy machine may run it after the worker has gone.
        program.says(rf"\(process {pid}\) hangs, and is killed: its event loop has not run for 0\.5 s")
        eventually(lambda: len(workers_of(program)) == 2)
        assert program.stop() == 0


@pytest.mark.alike
def test_a_worker_that_is_busy_for_less_is_not_killed(folder: Path) -> None:
    with serving(folder, "--timeout-worker-healthcheck", "10") as (program, endpoint), connect(endpoint) as sock:
        workers = workers_of(program)
        read_line(sock)
        sock.sendall(b"block 1\n")
        assert read_line(sock) == b"block 1\n"
        assert workers_of(program) == workers
        assert program.stop() == 0


# Attaches to a process as a debugger does, and lets it run on, until it is killed.
DEBUGGER = """
import ctypes, sys
seize = ctypes.CDLL(None, use_errno=True).ptrace(0x4206, int(sys.argv[1]), None, None)
print("attached" if seize == 0 else "not attached", flush=True)
sys.stdin.read()
"""


@pytest.mark.alike
def test_a_worker_that_a_debugger_is_attached_to_is_not_killed(folder: Path) -> None:
    with serving(folder, "--timeout-worker-healthcheck", "0.2") as (program, endpoint), connect(endpoint) as sock:
        pid = int(read_line(sock))
        with Program(sys.executable, "-c", DEBUGGER, str(pid), stdin=PIPE) as debugger:
            if debugger.line() != "attached":
                pytest.skip("this system lets no debugger attach")
            sock.sendall(b"block 1.5\n")
            assert read_line(sock) == b"block 1.5\n"
        assert "hangs" not in program.stderr()
        assert program.stop() == 0


@pytest.mark.alike
def test_workers_are_not_killed_for_the_time_in_which_all_were_stopped(folder: Path) -> None:
    with serving(folder, "--timeout-worker-healthcheck", "1") as (program, endpoint):
        workers = workers_of(program)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            if number == signal.SIGCONT:
                time.sleep(2.5)  # as a container that was frozen; time is the subject
            os.killpg(program.process.pid, number)
        time.sleep(1)
        assert pid_of(endpoint) in workers
        assert workers_of(program) == workers
        assert program.stop() == 0


@pytest.mark.parametrize("seconds", [0, -1, math.inf, True, "30"])
def test_a_health_check_that_is_no_time_is_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match="timeout_worker_healthcheck must be a number of seconds above 0, or None"):
        aioecho.run(Upper, "tcp://127.0.0.1:0", workers=2, timeout_worker_healthcheck=seconds)


@pytest.mark.parametrize(
    "options", [{"max_requests": 0}, {"max_requests": 1.5}, {"max_requests": 1, "max_requests_jitter": -1}]
)
def test_a_number_of_requests_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_requests"):
        aioecho.run(Nothing, "tcp://127.0.0.1:0", workers=2, **options)


def test_workers_are_refused_in_another_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool, pytest.raises(RuntimeError, match="main thread"):
        pool.submit(aioecho.run, Nothing, "tcp://127.0.0.1:0", workers=2).result()


# Workers that come and go


def test_a_worker_that_dies_is_replaced(folder: Path) -> None:
    with serving(folder) as (program, endpoint):
        before = workers_of(program)
        descriptors = descriptors_of(program.process.pid)
        victim = pid_of(endpoint)
        os.kill(victim, signal.SIGKILL)
        eventually(lambda: len(workers_of(program) - before) == 1)
        eventually(lambda: pid_of(endpoint) not in before)
        assert state_of(victim) == ""  # not a zombie
        eventually(lambda: descriptors_of(program.process.pid) == descriptors)
        assert re.search(rf"worker \d \(process {victim}\) was killed by SIGKILL; it is replaced", program.stderr())
        assert program.stop() == 0


@pytest.mark.alike
def test_a_client_of_a_dead_workers_socket_is_served_by_the_next(folder: Path) -> None:
    # With a socket for each worker, clients are in the queue of one that is dead.
    with serving(folder, "--reuse-port") as (program, endpoint):
        os.kill(victim := pid_of(endpoint), signal.SIGSTOP)
        socks = [connect(endpoint) for _ in range(40)]
        os.kill(victim, signal.SIGKILL)
        pids = {int(read_line(sock)) for sock in socks}
        assert len(pids) == 2
        assert victim not in pids
        for sock in socks:
            sock.close()
        assert program.stop() == 0


@pytest.mark.alike
@pytest.mark.parametrize("status", [0, 3])
def test_a_worker_that_ends_before_it_is_ready_ends_all(folder: Path, status: int) -> None:
    (folder / "bad.py").write_text(
        GATED.replace("time.sleep(0.01)", f"os._exit({status})") + "from handlers import Obedient\n"
    )
    with Program.aioecho("serve", "bad:Obedient", "--workers", "2", "--port", "0", cwd=folder) as program:
        code, output, errors = program.end()
        assert (code, output) == (1, b"")
        assert re.fullmatch(
            rf"Error: worker \d \(process \d+\) ended with exit status {status} before it was ready\n", errors
        )


@pytest.mark.alike
def test_a_worker_that_is_killed_before_the_first_is_ready_ends_all(folder: Path) -> None:
    (folder / "gated.py").write_text(GATED + HANDLER)
    with Program.aioecho("serve", "gated:Obedient", "--workers", "2", "--port", "0", cwd=folder) as program:
        workers = eventually(lambda: len(found := workers_of(program)) == 2 and found)
        os.kill(min(workers), signal.SIGKILL)
        code, output, errors = program.end()
        assert (code, output) == (1, b"")
        assert re.fullmatch(r"Error: worker \d \(process \d+\) was killed by SIGKILL before it was ready\n", errors)


def test_what_a_module_raises_in_a_worker_is_told_with_its_traceback(folder: Path) -> None:
    (folder / "bad.py").write_text(
        GATED.replace("time.sleep(0.01)", "raise KeyError('oh')") + "from handlers import Obedient\n"
    )
    with Program.aioecho("serve", "bad:Obedient", "--workers", "2", "--port", "0", cwd=folder) as program:
        code, output, errors = program.end()
        assert (code, output) == (1, b"")
        assert errors.count("KeyError: 'oh'") == 1  # of one worker
        assert last_line(program) == "KeyError: 'oh'"  # the traceback begins with the module's own frames
        line = r"Error: worker \d \(process \d+\) could not start: cannot import 'bad', which raised KeyError"
        assert re.search(f'^{line}\nTraceback .*:\n  File ".*bad.py", line ', errors, re.MULTILINE)


@pytest.mark.alike
def test_workers_that_die_too_often_end_all(folder: Path) -> None:
    arguments = ("--limit-max-requests", "1000")
    with serving(folder, *arguments, workers=1, FIRST_DELAY=0.01) as (program, endpoint):
        began = time.monotonic()
        victims = set()
        while program.process.poll() is None:
            with suppress(OSError, ValueError), talking(endpoint, b"exit 7\n") as (sock, pid):
                victims.add(pid)
                sock.recv(1)
        took = time.monotonic() - began
        assert len(victims) == 8
        assert took > 0.63
        delays = re.findall(r"it is replaced in (\S+) s", program.stderr())
        assert delays == ["0", "0.01", "0.02", "0.04", "0.08", "0.16", "0.32"]
        assert program.process.returncode == 1
        expected = r"Error: worker 1 \(process \d+\) ended with exit status 7, as 7 in its place before it, .*"
        assert re.fullmatch(expected, last_line(program))
        in_time(took, 20)


@pytest.mark.alike
def test_workers_end_with_their_parent(folder: Path) -> None:
    with serving(folder, "--timeout-graceful-shutdown", "0.2") as (program, endpoint):
        workers = workers_of(program)
        # The idle one first: a worker that has accepted it, and then blocks, does not answer it.
        with talking(endpoint) as (idle, _), talking(endpoint, b"block 30\n") as (_, blocked):
            program.process.kill()
            assert idle.recv(1) == b""
            eventually(lambda: not any(state_of(pid) for pid in workers - {blocked}))
            eventually(lambda: state_of(blocked) == "")  # by force, as its loop hangs
        host, port = endpoint.removeprefix("tcp://").split(":")
        with socket.create_server((host, int(port))):
            pass


@pytest.mark.alike
def test_kill_of_a_worker_replaces_it_first(folder: Path) -> None:
    with serving(folder) as (program, endpoint), talking(endpoint, b"sleep 0.3\n") as (sock, pid):
        os.kill(pid, signal.SIGTERM)
        assert read_line(sock) == b"sleep 0.3\n"
        assert sock.recv(1) == b""
        eventually(lambda: state_of(pid) == "")
        assert len(workers_of(program)) == 2
        assert "replaced in" not in program.stderr()  # it did not count as a death
        assert program.stop() == 0


@pytest.mark.alike
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_are_recycled_after_so_many_connections(folder: Path, workers: int) -> None:
    limits = ("--limit-max-requests", "5", "--limit-max-requests-jitter", "3")
    with serving(folder, *limits, workers=workers) as (program, endpoint):
        first = workers_of(program)
        seen = set()
        eventually(lambda: seen.add(pid_of(endpoint)) or len(seen - first) >= 2)
        eventually(lambda: not first & workers_of(program))
        assert program.stop() == 0
        assert "ERROR" not in program.stderr()


@pytest.mark.alike
def test_usr1_logs_the_stats_of_all(folder: Path) -> None:
    with serving(folder) as (program, endpoint):
        for _ in range(10):
            ask(endpoint, b"hello\n")
        total = "stats of all workers, and those before them: "
        with talking(endpoint):
            program.signal(signal.SIGUSR1)
            eventually(lambda: total + "accepted=11 active=" in program.stderr())
            assert len(re.findall(r"stats of worker \d", program.stderr())) == 2
        program.signal(signal.SIGHUP)
        eventually(lambda: "replaced all" in program.stderr() and len(workers_of(program)) == 2)
        # The counts of ended workers are kept, once they have ended.
        expected = total + "accepted=11 active=0 completed=11"
        eventually(lambda: program.signal(signal.SIGUSR1) or expected in program.stderr())
        assert program.stop() == 0
    with serving(folder, workers=1) as (program, endpoint):
        ask(endpoint)
        program.signal(signal.SIGUSR1)
        eventually(lambda: "stats: Stats(accepted=1, " in program.stderr())
        assert program.stop() == 0


@pytest.mark.alike
def test_a_reload_that_fails_leaves_the_old_workers(folder: Path) -> None:
    with serving(folder) as (program, endpoint):
        before = workers_of(program)
        (folder / "handlers.py").write_text("class Obedient: nonsense nonsense")
        program.signal(signal.SIGHUP)
        eventually(lambda: "the old one serves on" in program.stderr())
        assert workers_of(program) == before
        assert pid_of(endpoint) in before
        (folder / "handlers.py").write_text(HANDLER)
        program.signal(signal.SIGHUP)
        eventually(lambda: program.stderr().count("replaced all") == 1)
        eventually(lambda: len(workers_of(program)) == 2 and not workers_of(program) & before)
        assert program.stop() == 0


@pytest.mark.slow
def test_a_socket_for_each_worker_divides_long_lived_connections_evenly(folder: Path) -> None:
    with serving(folder, "--reuse-port", workers=4) as (program, endpoint), ExitStack() as stack:
        pids = Counter(stack.enter_context(talking(endpoint))[1] for _ in range(400))
        assert set(pids) == workers_of(program)
        assert min(pids.values()) >= 50  # a share is 100, and its standard deviation 9
        program.signal()
        stack.close()
        assert program.wait() == 0


# Signals: what is sent, the exit status in the end, and the most seconds that it takes

TERM, INT, HUP, TTIN, TTOU = (getattr(signal, f"SIG{name}") for name in ("TERM", "INT", "HUP", "TTIN", "TTOU"))


def ids(value: Any) -> str:
    return "-".join(number.name for number in value) if isinstance(value, tuple) else str(value)


@pytest.mark.alike
@pytest.mark.parametrize("numbers", [(TERM,), (INT, INT)], ids=ids)
def test_a_stop_while_it_starts_is_at_once(folder: Path, numbers: tuple[int, ...]) -> None:
    (folder / "gated.py").write_text(GATED + HANDLER)
    with Program.aioecho("serve", "gated:Obedient", "--workers", "2", "--port", "0", cwd=folder) as program:
        workers = eventually(lambda: (found := workers_of(program)) and len(found) == 2 and found)
        began = time.monotonic()
        for number in numbers:
            program.signal(number)
        assert program.end() == (0, b"", program.stderr())
        took = time.monotonic() - began
        assert not any(state_of(pid) for pid in workers)
        assert "ERROR" not in program.stderr()
        in_time(took, 2)


@pytest.mark.alike
@pytest.mark.parametrize(("number", "count"), [(HUP, 2), (TTIN, 3), (TTOU, 1)], ids=ids)
def test_a_change_while_it_starts_is_made(folder: Path, number: int, count: int) -> None:
    (folder / "gated.py").write_text(GATED + HANDLER)
    with Program.aioecho("serve", "gated:Obedient", "--workers", "2", "--port", "0", cwd=folder) as program:
        eventually(lambda: len(workers_of(program)) == 2)
        program.signal(number)
        if number != HUP:
            eventually(lambda: len(workers_of(program)) == count)
        (folder / "gate").touch()
        endpoint = program.listening()
        if number == HUP:
            eventually(lambda: "replaced all" in program.stderr())
        eventually(lambda: len(workers_of(program)) == count)
        assert pid_of(endpoint) in workers_of(program)
        assert program.stop() == 0


@pytest.mark.alike
def test_a_change_while_it_binds_is_none(folder: Path) -> None:
    with ExitStack() as lock:
        # A start in a folder waits its turn there, for a second.
        lock.callback(os.close, descriptor := os.open(folder, os.O_RDONLY))
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        command = ("serve", "handlers:Obedient", "--workers", "2", "--bind", "unix:app.sock")
        with Program.aioecho(*command, cwd=folder) as program:
            opened = Path(f"/proc/{program.process.pid}/fd")
            eventually(lambda: program.catches(TTOU) and any(link.resolve() == folder for link in opened.iterdir()))
            for number in (HUP, TTIN, TTOU):
                program.signal(number)
            time.sleep(0.1)  # for it to hear them: it does nothing then that could be waited for
            lock.close()
            assert program.listening() == "unix:app.sock"
            assert len(workers_of(program)) == 2
            assert program.stop() == 0
            assert "Traceback" not in program.stderr()


def test_a_stop_in_service_ends_idle_connections(folder: Path) -> None:
    with serving(folder) as (program, endpoint), talking(endpoint) as (idle, _):
        began = time.monotonic()
        program.signal(TERM)
        assert idle.recv(1) == b""
        assert program.wait() == 0
        took = time.monotonic() - began
        assert "ERROR" not in program.stderr()
        in_time(took, 2)


@pytest.mark.alike
def test_two_stops_in_service_are_no_worse_than_one_if_there_is_nothing_to_cut_off(folder: Path) -> None:
    with serving(folder) as (program, _):
        began = time.monotonic()
        for _ in range(2):
            program.signal(INT)
        assert program.wait() == 0
        took = time.monotonic() - began
        assert "ERROR" not in program.stderr()
        in_time(took, 2)


@pytest.mark.alike
def test_a_change_in_service_loses_no_client(folder: Path) -> None:
    with serving(folder) as (program, endpoint):
        for number, count in ((HUP, 2), (TTIN, 3), (TTOU, 2), (TTOU, 1)):
            with talking(endpoint, b"sleep 0.3\n") as (busy, _):
                before = workers_of(program)
                program.signal(number)
                if number == HUP:
                    eventually(lambda: "replaced all" in program.stderr())
                    eventually(lambda: pid_of(endpoint) in workers_of(program) - before)  # noqa: B023 - at once
                assert read_line(busy) == b"sleep 0.3\n"
            eventually(lambda: len(workers_of(program)) == count)  # noqa: B023 - likewise
            eventually(lambda: pid_of(endpoint) in workers_of(program))
        assert program.stop() == 0


@pytest.mark.alike
def test_sockets_come_and_go_with_their_workers(folder: Path) -> None:
    with serving(folder, "--reuse-port") as (program, endpoint), talking(endpoint, b"sleep 0.3\n") as (busy, _):
        descriptors = descriptors_of(program.process.pid)
        program.signal(TTIN)
        third = eventually(lambda: len(found := workers_of(program)) == 3 and found)
        eventually(lambda: pid_of(endpoint) in third)
        for count in (2, 1):  # one at a time: two signals of a kind are one, if they come together
            program.signal(TTOU)
            eventually(lambda: len(workers_of(program)) == count)  # noqa: B023 - at once
        assert read_line(busy) == b"sleep 0.3\n"
        for _ in range(10):
            assert pid_of(endpoint) in workers_of(program)
        program.signal(TTIN)
        eventually(lambda: len(workers_of(program)) == 2)
        eventually(lambda: descriptors_of(program.process.pid) == descriptors)
        assert program.stop() == 0


@pytest.mark.alike
def test_the_last_worker_stays(folder: Path) -> None:
    with serving(folder) as (program, endpoint):
        for _ in range(3):
            program.signal(TTOU)
            eventually(lambda: len(workers_of(program)) == 1)
        assert pid_of(endpoint) in workers_of(program)
        program.signal(TTIN)
        eventually(lambda: len(workers_of(program)) == 2)
        assert program.stop() == 0


@pytest.mark.alike
@pytest.mark.parametrize(
    ("first", "then", "status", "least", "most"),
    [
        (TERM, (TERM,), 1, 0, 3),
        (INT, (), 0, 0.5, 3),
        (INT, (INT,), 1, 0, 3),
        (TERM, (INT,), 1, 0, 3),
        (TERM, (HUP, TTIN, TTOU), 0, 0.5, 3),
    ],
    ids=ids,
)
def test_a_drain_ends_by_itself_or_by_a_second_stop(
    folder: Path, first: int, then: tuple[int, ...], status: int, least: float, most: float
) -> None:
    order = b"sleep 0.5\n" if status == 0 else b"sleep 20\n"
    with serving(folder) as (program, endpoint), ExitStack() as stack:
        workers = workers_of(program)
        began = time.monotonic()
        busy, _ = stack.enter_context(talking(endpoint, order))
        program.signal(first)
        eventually(lambda: len(workers_of(program)) == 1)  # the idle one has ended
        for number in then:
            program.signal(number)
        received = read_line(busy)
        assert received == (order if status == 0 else b"")
        assert program.wait() == status
        took = time.monotonic() - began
        assert took > least
        assert not any(state_of(pid) for pid in workers)
        in_time(took, most)


@pytest.mark.alike
def test_what_outlasts_the_grace_is_cut_off_with_status_1(folder: Path) -> None:
    with (
        serving(folder, "--timeout-graceful-shutdown", "0.2") as (program, endpoint),
        talking(endpoint, b"sleep 30\n"),
        talking(endpoint, b"sleep 30\n"),
    ):
        began = time.monotonic()
        assert program.stop() == 1
        took = time.monotonic() - began
        counts = re.findall(r"cut off when the grace was over: (\d) cancelled", program.stderr())
        assert sum(map(int, counts)) == 2
        in_time(took, 3)


@pytest.mark.alike
def test_a_worker_that_hangs_is_killed_in_the_end(folder: Path) -> None:
    with serving(folder, STOP_TIMEOUT=0.5) as (program, endpoint), talking(endpoint, b"block 30\n") as (_, pid):
        began = time.monotonic()
        program.signal(TERM)
        eventually(lambda: len(workers_of(program)) == 1)
        # However often it is asked: that does not put it off.
        eventually(lambda: "does not end, and is killed" in program.stderr() or program.signal(TERM))
        assert program.wait() == 1
        took = time.monotonic() - began
        assert state_of(pid) == ""
        in_time(took, 5)


@pytest.mark.alike
def test_a_signal_to_the_whole_group_is_one(folder: Path) -> None:
    for number in (INT, TERM):  # Ctrl-C, and what systemd does by default
        with serving(folder) as (program, endpoint), talking(endpoint, b"sleep 0.3\n") as (busy, _):
            os.killpg(program.process.pid, number)
            assert read_line(busy) == b"sleep 0.3\n"
            assert program.wait() == 0


@pytest.mark.alike
def test_a_stop_says_what_the_workers_wait_for_and_that_a_signal_ended_it(folder: Path) -> None:
    with serving(folder) as (program, endpoint), talking(endpoint, b"sleep 30\n"), talking(endpoint, b"sleep 30\n"):
        program.signal(INT)
        told = (
            r"SIGINT: stopping; waiting for (\d) connections? of worker \d \(process \d+\), at most [\d.]+ s; a second"
        )
        eventually(lambda: sum(map(int, re.findall(told, program.stderr()))) == 2)
        program.signal(TERM)
        assert program.wait() == 1
        counts = re.findall(r"cut off by a second signal, SIGTERM: (\d) cancelled", program.stderr())
        assert sum(map(int, counts)) == 2
        assert "grace was over" not in program.stderr()


def test_a_process_that_a_worker_forks_ends_at_sigterm(folder: Path) -> None:
    (folder / "forks.py").write_text(
        "import multiprocessing, os, signal, aioecho\n"
        "class Forks(aioecho.StreamRequestHandler):\n"
        "    async def handle(self):\n"
        "        child = multiprocessing.get_context('fork').Process(target=signal.pause)\n"
        "        child.start()\n"
        "        os.kill(child.pid, signal.SIGTERM)\n"
        "        child.join()\n"
        "        await self.send(b'%d\\n' % child.exitcode)\n"
    )
    command = ("serve", "forks:Forks", "--bind", "tcp://127.0.0.1:0", "--workers", "2")
    with Program.aioecho(*command, cwd=folder) as program:
        endpoint = program.listening()
        with connect(endpoint) as sock:
            assert read_line(sock) == b"-15\n"
        assert program.stop() == 0
