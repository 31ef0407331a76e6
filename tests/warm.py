"""Forks of a process that has imported aioecho, for programs whose start is not the subject: it takes most of their time.

As a program, with a socket's descriptor as its argument, it is that process. What it forks goes on as ``python -m aioecho``.
"""

import atexit
import contextlib
import fcntl
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Fork"]

# What the command line imports when it comes to its commands.
COMMANDS = ("aioecho.cli.serve", "aioecho.cli.send", "aioecho.workers.program", "uvloop")


class Fork:
    """What subprocess.Popen is of a process: of a fork that runs the command line with some arguments."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path | None,
        env: Mapping[str, str],
        stdin: Any,
        stdout: Any,
        stderr: Any,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.stdin: Any = None
        self.stdout: Any = None
        self.returncode: int | None = None
        self._status, theirs = socket.socketpair()
        with contextlib.ExitStack() as opened:
            opened.callback(theirs.close)

            def descriptor(stream: Any, flags: int) -> int:
                """Return the fork's end of a standard stream, as subprocess.Popen takes it; ours is kept."""
                if stream == subprocess.DEVNULL:
                    opened.callback(os.close, number := os.open(os.devnull, flags))
                    return number
                if stream != subprocess.PIPE:
                    return stream if isinstance(stream, int) else stream.fileno()  # type: ignore[no-any-return]
                ends = os.pipe()
                reads = flags == os.O_RDONLY
                opened.callback(os.close, ends[0 if reads else 1])
                if reads:
                    self.stdin = open(ends[1], "wb")  # noqa: SIM115 - Program closes it, and the other
                else:
                    self.stdout = open(ends[0], "rb")  # noqa: SIM115
                return ends[0 if reads else 1]

            streams = [descriptor(stdin, os.O_RDONLY), descriptor(stdout, os.O_WRONLY), descriptor(stderr, os.O_WRONLY)]
            request = {
                "arguments": list(arguments),
                "cwd": str(cwd or Path.cwd()),
                "env": dict(env),
                "numbers": [0, 1, 2, *pass_fds],
            }
            socket.send_fds(_socket_of_it(), [json.dumps(request).encode()], [*streams, *pass_fds, theirs.fileno()])
        self.pid: int = struct.unpack("i", self._status.recv(4))[0]

    def _reap(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._status, select.POLLIN)
            if poll.poll(None if timeout is None else timeout * 1000):
                self.returncode = struct.unpack("i", self._status.recv(4))[0]
                self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        return self._reap(0)

    def wait(self, timeout: float | None = None) -> int:
        if (code := self._reap(timeout)) is None:
            raise subprocess.TimeoutExpired("python -m aioecho", timeout or 0)
        return code

    def communicate(self, timeout: float) -> tuple[bytes, None]:
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
        output = b"" if self.stdout is None else self.stdout.read()
        self.wait(timeout)
        return output, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


# Made here, as a test may not leave a descriptor behind.
_ours, _its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
_process: "subprocess.Popen[bytes] | None" = None


def _socket_of_it() -> socket.socket:
    """Return a socket of the process that forks, which is started when it is first asked for."""
    global _process
    if _process is None:
        command = [sys.executable, __file__, str(_its.fileno())]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        _process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=_its,
            pass_fds=[_its.fileno()],
            start_new_session=True,
        )
    return _ours


def _end_it() -> None:
    """Let it end, if it has begun, and wait for that: so what it has used of the processor counts to the tests."""
    if _process is not None:
        _ours.shutdown(socket.SHUT_RDWR)
        _process.wait(10)
    _ours.close()
    _its.close()


# In the process that forks


def _serve(requests: socket.socket) -> list[str]:
    """Fork for each request; return in the fork, with its arguments."""
    poll, forks = select.poll(), dict[int, tuple[int, socket.socket]]()
    poll.register(requests, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number != requests.fileno():
                pid, status = forks.pop(number)
                poll.unregister(number)
                os.close(number)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):  # no test waits for it any more
                    status.send(struct.pack("i", code))
                status.close()
                continue
            message, descriptors, _, _ = socket.recv_fds(requests, 2**20, 250)
            if not message:
                os._exit(0)  # the tests are over
            if (pid := os.fork()) == 0:
                for kept in (requests, *(status for _, status in forks.values())):
                    kept.detach()
                return _become(json.loads(message), descriptors)
            *given, last = descriptors
            for descriptor in given:
                os.close(descriptor)
            status = socket.socket(fileno=last)
            status.send(struct.pack("i", pid))
            forks[found := os.pidfd_open(pid)] = pid, status
            poll.register(found, select.POLLIN)


def _become(request: dict[str, Any], descriptors: list[int]) -> list[str]:
    """Make this process what it would be, had it been started; return its arguments."""
    os.setsid()
    numbers = request["numbers"]
    *given, _ = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, max(numbers) + 1) for descriptor in descriptors)
    for descriptor, number in zip(given, numbers, strict=True):
        os.dup2(descriptor, number)
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in numbers:
            with contextlib.suppress(OSError):  # the one of listdir()
                os.close(int(name))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = request["cwd"]
    return request["arguments"]  # type: ignore[no-any-return]


if __name__ == "__main__":
    for module in COMMANDS:
        __import__(module)
    gc.collect()
    gc.freeze()  # else each fork copies all of it, when it looks for garbage at its end
    sys.argv[1:] = _serve(socket.socket(fileno=int(sys.argv[1])))
    runpy.run_module("aioecho", run_name="__main__", alter_sys=True)
else:
    atexit.register(_end_it)
