"""Programs that tests start: servers and clients as processes of their own, ended by their process ids."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any, Self

from warm import Fork

__all__ = [
    "ROOT",
    "Program",
    "ask",
    "can_connect",
    "connect",
    "descriptors_of",
    "eventually",
    "narrow",
    "read_line",
    "state_of",
    "workers_of",
]

ROOT = Path(__file__).resolve().parent.parent

AIOECHO = (sys.executable, "-m", "aioecho")


class Program:
    """A process; at the end of ``with`` it is gone, whatever happened. Its stderr is kept in a file, and so never blocks it.

    ``python -m aioecho`` is a fork of a process that has imported it, unless it has to be fresh.
    """

    def __init__(self, *command: str | Path, cwd: Path | None = None, is_fresh: bool = False, **options: Any) -> None:
        # Found also where it is not installed, and from any folder; a handler's module is to be found as by a user.
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
        environment.update(own := options.pop("env", {}))
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        options = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": self.errors,
            "start_new_session": True,
            **options,
        }
        self.process: Any
        if is_fresh or command[:3] != AIOECHO or any(name.startswith("PYTHON") for name in own):
            self.process = subprocess.Popen([str(part) for part in command], cwd=cwd, env=environment, **options)
        else:
            del options["start_new_session"]  # as always
            self.process = Fork([str(part) for part in command[3:]], cwd=cwd, env=environment, **options)

    @classmethod
    def aioecho(cls, *arguments: str | Path, **options: Any) -> Self:
        """Start ``python -m aioecho`` with these arguments."""
        return cls(*AIOECHO, *arguments, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, SIGKILL)  # a group of its own: a shell's children end with it
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # it had unsent data for the process that was killed
                    pipe.close()
        self.errors.close()

    def stderr(self) -> str:
        """Return what it has written to stderr by now, but not what debug mode says of callbacks on a busy machine."""
        text = os.pread(self.errors.fileno(), 10**6, 0).decode()
        return re.sub(r"^.*Executing <.* took \d+\.\d+ seconds\n", "", text, flags=re.MULTILINE)

    def says(self, pattern: str) -> re.Match[str]:
        """Wait until what it has written to stderr matches a pattern, and return the match."""

        def look() -> re.Match[str] | None:
            has_ended = self.process.poll() is not None
            match = re.search(pattern, self.stderr())
            assert match or not has_ended, self.stderr()
            return match

        return eventually(look)  # type: ignore[no-any-return]

    def write(self, data: bytes) -> None:
        """Write to its stdin, which has to be a pipe."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def line(self) -> str:
        """Return the next line of its stdout."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")

    def listening(self) -> str:
        """Return the endpoint of its next "listening on" line."""
        line = self.line()
        assert line.startswith("listening on "), (line, self.stderr())
        return line.removeprefix("listening on ")

    def signal(self, number: int = SIGTERM) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def catches(self, number: int) -> bool:
        """Tell whether it has a handler for a signal."""
        mask = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)

    def wait(self) -> int:
        """Return its exit status, once it has ended."""
        return self.process.wait(timeout=40)

    def stop(self, number: int = SIGTERM) -> int:
        """Send it a signal and return its exit status."""
        self.signal(number)
        return self.wait()

    def end(self, timeout: float = 40) -> tuple[int, bytes, str]:
        """Return its exit status, the rest of its stdout, and its stderr, once it has ended."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output, self.stderr()


def connect(endpoint: str, timeout: float = 30) -> socket.socket:
    """Return a socket that is connected to an endpoint, and does not wait for ever."""
    kind, _, rest = endpoint.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(rest.replace("@", "\0", 1) if rest.startswith("@") else rest)
        except OSError:
            sock.close()
            raise
    else:
        host, _, port = rest.removeprefix("//").rpartition(":")
        sock = socket.create_connection((host.strip("[]").replace("*", "127.0.0.1"), int(port)))
    sock.settimeout(timeout)
    return sock


def narrow(address: Any) -> socket.socket:
    """Return a connected socket whose kernel takes little that nobody reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(30)
    sock.connect(address)
    return sock


def ask(endpoint_or_socket: str | socket.socket, sent: bytes = b"") -> bytes:
    """Send bytes and the end of the stream, and return all that comes back."""
    sock = connect(endpoint_or_socket) if isinstance(endpoint_or_socket, str) else endpoint_or_socket
    with sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        received: list[bytes] = []
        while chunk := sock.recv(2**16):
            received.append(chunk)
    return b"".join(received)


def read_line(sock: socket.socket) -> bytes:
    """Return the next line from a socket, or what there is at the end."""
    line = b""
    while not line.endswith(b"\n") and (byte := sock.recv(1)):
        line += byte
    return line


def eventually(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Return what `condition()` returns, once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "what was waited for did not come about"
        time.sleep(0.01)
    return found


def workers_of(program: Program) -> set[int]:
    """Return the process ids of its children that have not ended."""
    pid = program.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in children if state_of(int(child)) not in ("Z", "")}


def state_of(pid: int) -> str:
    """Return the letter of a process's state; nothing if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("latin-1").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def descriptors_of(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def can_connect(endpoint: str) -> bool:
    """Tell whether a server listens there, by a connection."""
    try:
        connect(endpoint).close()
    except OSError:
        return False
    return True
