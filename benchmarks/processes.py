"""Servers as processes: starting, pinning, ending them, and reading from /proc what they use."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .catalog import Server

__all__ = ["HOST", "ROOT", "ServerProcess", "choose_processors", "start_module"]

HOST = "127.0.0.1"
ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT_S = 20.0
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

# Has the kernel kill this process as soon as its parent ends, then becomes another program. 1 is Linux's PR_SET_PDEATHSIG,
# which holds across execve(). In the program itself ctypes would count as its memory. A preexec_fn is unsafe beside threads.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def choose_processors() -> tuple[int, int] | None:
    """Choose one processor for servers and another for the generator; None where this process may use only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[-1]) if len(allowed) > 1 else None


def start_module(name: str, *arguments: str, **options: Any) -> subprocess.Popen[Any]:
    """Start ``python -m NAME ARGUMENTS`` from the repository's root, as a process that the kernel kills when this one ends.

    It does so also where this process is killed. `options` are Popen's. Call it in the main thread: the kernel watches the
    thread that starts the process.
    """
    starter = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
    return subprocess.Popen([*starter, sys.executable, "-m", name, *arguments], cwd=ROOT, **options)


class ServerProcess:
    """A context manager that starts a server on a free port of 127.0.0.1 and kills it with all it started.

    Raises:
        OSError: the server ended or did not listen within 20 seconds; its last words are in the message (system).
    """

    def __init__(
        self,
        server: Server,
        arguments: tuple[str, ...] = (),
        processors: set[int] | None = None,
        *,
        datagrams: bool = False,
    ) -> None:
        self.server = server
        self.arguments = arguments
        self.processors = processors
        self.datagrams = datagrams
        self.port = 0

    def __enter__(self) -> Self:
        self.launch()
        try:
            self.wait_until_listening()
        except BaseException:  # also an interruption
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def launch(self) -> None:
        """Start the process and return at once."""
        with socket.socket(type=socket.SOCK_DGRAM if self.datagrams else socket.SOCK_STREAM) as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in stop()
        self.process = start_module(
            f"benchmarks.servers.{self.server.module}",
            *self.server.arguments,
            str(self.port),
            *self.arguments,
            stdout=self.words,
            stderr=self.words,
            start_new_session=True,
        )

    def wait_until_listening(self) -> None:
        """Wait until it takes connections, then pin it to its processors (starting up is quicker on all of them)."""
        end = time.monotonic() + _START_TIMEOUT_S
        while True:
            if self._answers():
                break
            if self.process.poll() is not None or time.monotonic() > end:
                self.words.seek(0)
                said = self.words.read().strip().rpartition("\n")[2]
                raise OSError(f"{self.server.label} does not listen: {said or 'it said nothing'}")
            time.sleep(0.02)
        if self.processors is not None:
            for member in self._family():
                for task in os.listdir(f"/proc/{member}/task"):
                    os.sched_setaffinity(int(task), self.processors)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            if not self.datagrams:
                socket.create_connection((HOST, self.port), 1).close()
                return True
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.settimeout(0.2)
                sock.connect((HOST, self.port))
                sock.send(b"?")
                return bool(sock.recv(1))
        return False

    def stop(self) -> None:
        """Kill the process and all that it started, and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.words.close()

    def cpu_s(self) -> float:
        """Read the processor time used so far by the server and its children, in seconds.

        Ended threads are included to the nanosecond. Ended children are too once the server has waited for them, in the
        kernel's steps of 10 ms.
        """
        total = 0.0
        for member in self._family():
            with contextlib.suppress(OSError):
                total += time.clock_gettime(
                    (~member << 3) | 2
                )  # another process's clock: Linux's MAKE_PROCESS_CPUCLOCK
                if self.server.threads:
                    fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
                    total += sum(map(int, fields[13:15])) / _CLOCK_TICKS  # what ended children used
        return total

    def memory_kib(self) -> int:
        """Read the memory in use by the server and its children: pages shared with others count in part (PSS)."""
        for _ in range(10):
            total = 0
            for member in self._family():
                with contextlib.suppress(OSError):
                    for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                        if line.startswith("Pss:"):
                            total += int(line.split()[1])
            if total or self.process.poll() is not None:
                break
            time.sleep(0.05)  # it lives, and the kernel would not tell: seen once
        return total

    def settle(self, timeout_s: float = 3.0) -> None:
        """Wait until it has cleaned up after the last load, so that the next server has the processor to itself."""
        end = time.monotonic() + timeout_s
        before = self.cpu_s()
        while time.monotonic() < end:
            time.sleep(0.03)
            after = self.cpu_s()
            if after - before < 0.002:
                return
            before = after

    def _family(self) -> list[int]:
        """List the server and the children of main threads. No other thread forks here, and to ask 5,000 is slow."""
        members = [self.process.pid]
        for member in members:
            with contextlib.suppress(OSError):
                members += map(int, Path(f"/proc/{member}/task/{member}/children").read_text().split())
        return members
