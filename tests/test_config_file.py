"""The options of `serve` that make a service: its configuration file, settings, PID file, user, reload and log files."""

import dataclasses
import importlib
import logging
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
from helpers import check_mistake, invoke
from programs import ROOT, Program, ask, eventually

from aioecho import Limits, Timeouts
from aioecho.cli.process import PIDFile
from aioecho.cli.serve import serve_command
from aioecho.cli.settings import make_limits, make_timeouts
from aioecho.net import checking
from aioecho.runtime.log_files import give_log_files

ANYWHERE = ("--bind", "tcp://127.0.0.1:0")
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root may serve as another user")


def parse(*arguments: str | Path) -> dict[str, Any]:
    """Return what `serve` makes of its arguments."""
    with serve_command.make_context("serve", [str(each) for each in arguments]) as context:
        return context.params


def write(folder: Path, text: str) -> Path:
    file = folder / "server.toml"
    file.write_text(text)
    return file


# The file


def test_a_file_has_the_options_names_as_keys(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        'handler = "upper"\nbind = ["tcp://127.0.0.1:0", "unix:app.sock"]\nworkers = "auto"\nreuse-port = true\n'
        'timeout-graceful-shutdown = 2.5\nmax-per-host = 7\ntimeout-idle = "none"\nlog-level = "debug"\n',
    )
    options = parse("--config", file)
    assert options["handler"] == "upper"
    assert options["endpoints"] == ("tcp://127.0.0.1:0", "unix:app.sock")
    assert (options["workers"], options["reuse_port"], options["grace"]) == ("auto", True, 2.5)
    assert (options["max_per_host"], options["log_level"]) == (7, "debug")
    assert make_timeouts(options).idle is None


def test_an_option_on_the_command_line_wins(tmp_path: Path) -> None:
    file = write(tmp_path, "max-per-host = 7\nbacklog = 5\naccess-log = true\n")
    options = parse("--config", file, "--max-per-host", "8", "--no-access-log")
    assert (options["max_per_host"], options["backlog"], options["access_log"]) == (8, 5, False)
    assert parse("--max-per-host", "8", "--config", file)["max_per_host"] == 8


def test_a_port_on_the_command_line_takes_the_place_of_all_endpoints_in_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, f'bind = "unix:{tmp_path}/app.sock"\nmax-connections = 9\n')
    with Program.aioecho("serve", "--config", file, "--port", "0", "--limit-concurrency", "4") as server:
        assert server.listening().startswith("tcp://127.0.0.1:")
        assert not (tmp_path / "app.sock").exists()
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_per_host = 1", "there is no key 'max_per_host'; the nearest is 'max-per-host'"),
        ("worker = 1", "there is no key 'worker'; the nearest is 'workers'"),
        ("[serve]\nworkers = 1", "'serve' is a table, and there are none"),
        ('config = "other.toml"', "there is no key 'config'; the nearest is"),
        ("workers = 2.5", "workers: '2.5' is neither a number from 1 nor auto"),
        ("workers = true", "workers: expected a number, not true"),
        ("reload = 1", "reload: expected true or false, not 1"),
        ("backlog = {}", "backlog: expected a number, not a table"),
        ("max-per-host = 0", "max-per-host: max_per_host must be a whole number from 1 to 2147483647, not 0"),
        ('max-per-host = "many"', "max-per-host: 'many' is no whole number, nor none"),
        ('max-threads = "none"', "max-threads: 'none' is no whole number"),
        ("timeout-idle = -1", "timeout-idle: idle must be a number of seconds above 0, or None, not -1.0"),
        ('overflow = "drop"', "overflow: overflow must be 'wait' or 'reject', not 'drop'"),
        ("workers = ", "Invalid value (at "),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, text)
    check_mistake(invoke("serve", "--config", "server.toml", "--check-config", cwd=tmp_path), "server.toml: ", message)


def test_a_file_that_is_not_there_is_a_mistake(tmp_path: Path) -> None:
    outcome = invoke("serve", "--config", "absent.toml", cwd=tmp_path)
    check_mistake(outcome, "cannot read absent.toml: No such file or directory")


def test_a_check_binds_nothing_and_tells_by_its_status(tmp_path: Path) -> None:
    write(tmp_path, f'bind = "unix:{tmp_path}/app.sock"\npid = "{tmp_path}/server.pid"\n')
    status, output, errors = invoke("serve", "--config", "server.toml", "--check-config", cwd=tmp_path)
    assert (status, output, errors) == (0, b"", "the configuration is valid\n")
    assert [path.name for path in tmp_path.iterdir()] == ["server.toml"]
    check_mistake(invoke("serve", "absent:Handler", "--check-config", cwd=tmp_path), "no module 'absent'")
    check_mistake(invoke("serve", "--ssl-certfile", "x.pem", "--check-config", cwd=tmp_path), "x.pem")
    check_mistake(invoke("serve", "--allow", "10.0.0.1/8", "--check-config"), "allow: '10.0.0.1/8' is no network")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pid", "absent/x"], "cannot write absent/x: No such file or directory"),
        (["--pid", "file/x"], "cannot write file/x: Not a directory"),
        (["--pid", "folder"], "cannot write folder: Is a directory"),
        (["--uds", "absent/x"], "cannot listen on unix:absent/x: No such file or directory"),
        (["--uds", "file"], "cannot listen on unix:file: a file that is not a socket is in the way"),
        (["--uds", "x" * 200], "path too long"),
        (["--bind", "unix:x?owner=no-such-user"], "no user is called 'no-such-user'"),
        (["--bind", "unixgram:x?group=no-such-group"], "no group is called 'no-such-group'"),
        (["--uds", "x", "--control", "unix:./x"], "cannot listen on unix:./x?mode=600: it is asked for twice"),
        (["--control", "unix:absent/x"], "cannot listen on unix:absent/x?mode=600: No such file or directory"),
        (["--metrics", "unix:absent/x"], "cannot listen on unix:absent/x: No such file or directory"),
        (
            ["--port", "7999", "--metrics", "127.0.0.1:7999"],
            "cannot listen on tcp://127.0.0.1:7999: it is asked for twice",
        ),
        (["--bind", "udp://239.1.1.1:5000?interface=absent0"], "no network interface is called 'absent0'"),
        (["--host", "192.0.2.1"], "cannot listen on tcp://192.0.2.1:9999: Cannot assign requested address"),
        (["--host", "no-such-host.invalid"], "cannot resolve the host of tcp://no-such-host.invalid:9999"),
    ],
)
def test_a_check_tells_what_would_keep_it_from_its_start(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    check_mistake(invoke("serve", *arguments, "--check-config", cwd=tmp_path), message, status=1)
    assert sorted(tmp_path.iterdir()) == before


def test_a_check_beside_the_program_that_runs_finds_no_mistake(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(tmp_path / "app.sock"))
        alive.listen()
        alive.setblocking(False)
        file = tmp_path / "server.pid"
        file.write_text(f"{os.getppid()}\n")
        arguments = ("--port", taken.getsockname()[1], "--uds", tmp_path / "app.sock", "--pid", file)
        status, _, errors = invoke("serve", *map(str, arguments), "--check-config")
        assert (status, errors) == (0, "the configuration is valid\n")
        assert file.read_text() == f"{os.getppid()}\n"
        with pytest.raises(BlockingIOError):  # no client that says nothing
            alive.accept()


def test_a_check_gets_no_datagrams_of_the_program_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[Any] = []
    monkeypatch.setattr(checking, "join_group", lambda sock, endpoint: bound.append(sock.getsockname()))
    with socket.socket(type=socket.SOCK_DGRAM) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        endpoint = f"udp://127.0.0.1:{taken.getsockname()[1]}?reuse_port"
        assert invoke("serve", "--bind", endpoint, "--check-config")[0] == 0
    assert bound == []


# Limits and timeouts


def test_each_limit_and_timeout_has_an_option() -> None:
    given = {Limits: {"overflow": "reject", "shed": "idle"}, Timeouts: {"max_age_jitter": 0.5}}
    for kind, prefix in ((Limits, ""), (Timeouts, "timeout-")):
        for field in dataclasses.fields(kind):
            value = given[kind].get(field.name, 3)
            options = parse(f"--{prefix}{field.name.replace('_', '-')}", str(value))
            made: Any = make_limits(options, limit_concurrency=None) if kind is Limits else make_timeouts(options)
            assert made == kind(**{field.name: value})


def test_without_an_option_limits_and_timeouts_are_the_defaults() -> None:
    options = parse()
    assert make_limits(options, limit_concurrency=None) == Limits()
    assert make_timeouts(options) == Timeouts()


def test_concurrency_is_three_limits_unless_they_are_given() -> None:
    limits = make_limits(parse("--max-sessions", "9"), limit_concurrency=4)
    assert (limits.max_connections, limits.max_handlers, limits.max_sessions) == (4, 4, 9)


def test_help_says_of_each_what_its_documentation_says() -> None:
    options = {param.name: param for param in serve_command.params if isinstance(param, click.Option)}
    context = click.Context(serve_command)
    for kind, prefix in ((Limits, ""), (Timeouts, "timeout_")):
        for field in dataclasses.fields(kind):
            record = options[prefix + field.name].get_help_record(context)
            assert record is not None
            assert len(record[1].split()) > 5, record  # more than the default


# The process


def test_the_pid_file_is_there_while_it_listens(tmp_path: Path) -> None:
    file = tmp_path / "server.pid"
    file.write_text("stale\n")
    for workers in ("1", "2"):
        with Program.aioecho("serve", *ANYWHERE, "--pid", file, "--workers", workers) as server:
            server.listening()
            assert file.read_text() == f"{server.process.pid}\n"
            status, _, errors = invoke("serve", *ANYWHERE, "--pid", file)
            assert (status, errors) == (
                1, f"Error: {file}: process {server.process.pid} is running; stop it, or remove the file\n",
            )  # fmt: skip
            assert server.stop() == 0
        assert list(tmp_path.iterdir()) == []


def test_a_pid_file_of_a_process_that_has_ended_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "server.pid"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    file.write_text(f"{ended.pid}\n")
    with Program.aioecho("serve", *ANYWHERE, "--pid", file) as server:
        server.listening()
        assert file.read_text() == f"{server.process.pid}\n"
        assert server.stop() == 0


def test_a_pid_file_that_another_program_has_written_since_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "server.pid"
    file = PIDFile(str(path))
    file.write()
    path.write_text("1\n")  # in place, as a shell does
    file.remove()
    assert path.read_text() == "1\n"


def test_a_pid_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    path, other = tmp_path / "server.pid", tmp_path / "other"
    other.write_text("x\n")
    (tmp_path / f"server.pid.{os.getpid()}").symlink_to(other)
    file = PIDFile(str(path))
    file.write()
    assert (path.read_text(), other.read_text()) == (f"{os.getpid()}\n", "x\n")
    file.remove()
    assert list(tmp_path.iterdir()) == [other]


def test_a_pid_file_that_can_not_be_written_is_said_before_it_listens(tmp_path: Path) -> None:
    status, output, errors = invoke("serve", *ANYWHERE, "--pid", tmp_path / "absent" / "server.pid")
    assert (status, output) == (1, b"")
    assert errors.startswith("Error: cannot write ")
    assert errors.endswith("No such file or directory\n")


def ids_of(process: int) -> set[str]:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {part for line in lines if line.startswith(("Uid:", "Gid:")) for part in line.split()[1:]}


def children_of(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@AS_ROOT
def test_a_file_that_a_link_in_the_place_of_a_log_leads_to_is_not_given_to_the_user(tmp_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    other, link, log = (tmp_path / name for name in ("other", "link.log", "server.log"))
    other.touch()
    link.symlink_to(other)
    logger = logging.getLogger("test_config_file")
    handlers = [logging.FileHandler(path) for path in (link, log)]
    try:
        for handler in handlers:
            logger.addHandler(handler)
        give_log_files(nobody.pw_uid, None)
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
    assert (other.stat().st_uid, log.stat().st_uid) == (0, nobody.pw_uid)


@AS_ROOT
@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_serves_is_the_users_once_it_listens(tmp_path: Path, workers: str) -> None:
    nobody = pwd.getpwnam("nobody")
    arguments = ("--user", "nobody", "--group", str(nobody.pw_gid), "--workers", workers)
    file, log = tmp_path / "server.pid", tmp_path / "server.log"
    (tmp_path / "log.toml").write_text(
        f'[handlers.file]\nclass = "logging.FileHandler"\nfilename = "{log}"\n[root]\nhandlers = ["file"]\n'
    )
    control, app, own, metrics = (tmp_path / name for name in ("control.sock", "app.sock", "own.sock", "metrics.sock"))
    binds = ("--bind", f"unix:{app}?mode=660", "--bind", f"unix:{own}?owner=0", "--metrics", f"unix:{metrics}")
    more = (*binds, "--control", f"unix:{control}", "--log-config", tmp_path / "log.toml")
    with Program.aioecho("serve", *ANYWHERE, *arguments, *more, "--pid", file) as server:
        endpoint = server.listening()
        assert (control.stat().st_uid, control.stat().st_mode & 0o777) == (nobody.pw_uid, 0o600)
        assert (app.stat().st_uid, app.stat().st_gid, app.stat().st_mode & 0o777) == (
            nobody.pw_uid,
            nobody.pw_gid,
            0o660,
        )
        assert [path.stat().st_uid for path in (metrics, log, own, file)] == [nobody.pw_uid, nobody.pw_uid, 0, 0]
        serving = [server.process.pid] if workers == "1" else children_of(server.process.pid)
        assert len(serving) == int(workers)
        for process in serving:
            assert ids_of(process) == {str(nobody.pw_uid), str(nobody.pw_gid)}
        assert ask(endpoint, b"x\n") == b"x\n"
        assert server.stop() == 0
    assert not file.exists() or file.read_text() == ""  # the user may not remove it from root's folder


@pytest.mark.alike
@AS_ROOT
@pytest.mark.exclusive
def test_a_port_below_1024_is_served_by_a_user() -> None:
    with Program.aioecho("serve", "--port", "514", "--user", "nobody") as server:
        if server.process.stdout is not None and not (line := server.line()):
            pytest.skip(f"port 514 is taken: {server.stderr()}")
        assert line == "listening on tcp://127.0.0.1:514"
        assert ask("tcp://127.0.0.1:514", b"x\n") == b"x\n"
        assert server.stop() == 0


def test_an_unknown_user_or_group_is_a_mistake() -> None:
    check_mistake(invoke("serve", "--user", "no-such-user"), "--user no-such-user: there is no such user")
    check_mistake(invoke("serve", "--group", "no-such-group"), "--group no-such-group: there is no such group")


@pytest.mark.parametrize("number", ["4294967295", "99999999999999999999", "9" * 5000])
@pytest.mark.parametrize("option", ["user", "group"])
def test_the_number_of_a_user_or_group_that_none_can_have_is_a_mistake(option: str, number: str) -> None:
    said = f"--{option} {number[:40]}: the number of a {option} is at most 4294967294"
    check_mistake(invoke("serve", f"--{option}", number), said)


# Reload

# In place of the extra: it tells of a change when the file `changed` appears.
WATCHFILES = """
import os, time
class PythonFilter:
    pass
def watch(folder, *, watch_filter, raise_interrupt):
    while True:
        if os.path.exists(os.path.join(folder, "changed")):
            os.unlink(os.path.join(folder, "changed"))
            yield {(1, os.path.join(folder, "app.py"))}
        time.sleep(0.01)
"""

APP = """
import aioecho
class Handler(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(b"%s")
"""


@pytest.mark.parametrize("kind", ["own", "real"])
def test_a_changed_file_replaces_what_serves(tmp_path: Path, kind: str) -> None:
    if kind == "real":
        pytest.importorskip("watchfiles")
    else:
        (tmp_path / "stand-in").mkdir()
        (tmp_path / "stand-in" / "watchfiles.py").write_text(WATCHFILES)
    app = tmp_path / "app.py"
    app.write_text(APP % "one")
    path = os.pathsep.join([str(ROOT), str(tmp_path / "stand-in"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    with Program.aioecho("serve", "app:Handler", *ANYWHERE, "--reload", cwd=tmp_path, env=environment) as server:
        endpoint = server.listening()
        assert ask(endpoint) == b"one"
        eventually(lambda: ask(endpoint) == b"two" or change(app, APP % "two"))
        server.says(r"app\.py changed: reloading")  # a thread of its own writes the log
        eventually(lambda: "the old one serves on" in server.stderr() or change(app, "a mistake"))
        assert ask(endpoint) == b"two"
        assert server.stop() == 0


def change(app: Path, text: str) -> None:
    """Write a program, and again a second later if need be: what watches it may not have begun."""
    if app.read_text() != text or time.time() - app.stat().st_mtime > 1:
        app.write_text(text)
        (app.parent / "changed").touch()


def test_reload_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    check_mistake(invoke("serve", *ANYWHERE, "--reload"), '--reload needs watchfiles: pip install "aioecho[reload]"')


# On a terminal


@pytest.mark.parametrize("workers", ["1", "2"])
def test_on_a_terminal_it_says_once_what_runs_and_how_to_stop_it(workers: str) -> None:
    pty = importlib.import_module("pty")
    ours, theirs = pty.openpty()
    with Program.aioecho("serve", *ANYWHERE, "--workers", workers, stderr=theirs, env={"TERM": "xterm"}) as server:
        os.close(theirs)
        server.listening()
        text = b""
        while b"twice for at once" not in text:
            text += os.read(ours, 2**16)
        assert server.stop(signal.SIGINT) == 0
        try:
            while chunk := os.read(ours, 2**16):
                text += chunk
        except OSError:  # Linux's way to tell that all have closed it
            pass
        os.close(ours)
        lines = text.decode().splitlines()
        [index] = [index for index, line in enumerate(lines) if line.startswith("to stop: Ctrl-C")]
        assert f", process {server.process.pid}, uvloop " in lines[index - 1]
        assert lines[index - 1].endswith(", 2 workers") is (workers == "2")
        assert "\x1b[32mINFO\x1b[0m aioecho." in text.decode()
