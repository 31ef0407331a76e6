"""A crowd: so many connections held at once over worker processes, and what they cost while next to none speaks."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .processes import HOST, start_module

__all__ = ["NAME", "QUESTION", "choose_count", "make_table", "run_crowd", "write_table"]

NAME = "crowd"
QUESTION = "As many connections as the machine can hold, over worker processes. What do they cost, and how do they end?"

# Connections of a process, by its descriptors: a worker may have a sixteenth more than its share.
_SHARE = 0.9

# Bytes of memory that a connection with both of its ends takes, of processes and kernel, and the part of what is free.
_BYTES, _PART = 20_000, 0.5

# Seconds.
_SETTLE = 7.0
_AT_REST = 10.0
_TALKING = 10.0
_RESTART = 120.0
_STOP = 30.0

# Messages a second, over all connections.
_RATE = 1000


def choose_count() -> int:
    """Return how many connections this machine can hold: by its free memory, and at most 250,000."""
    free = 0
    with contextlib.suppress(OSError):
        free = _meminfo()["MemAvailable"] * 1024
    return max(1000, min(250_000, int(free * _PART / _BYTES) // 1000 * 1000))


def run_crowd(report: Callable[[str], object], count: int | None = None) -> dict[str, Any]:
    """Hold `count` connections, and measure. Call `report` with what is about to be done."""
    count = count or choose_count()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    workers = max(2, -(-count // int(min(hard, 20_000) * _SHARE)))
    try:
        with tempfile.TemporaryDirectory() as folder, _serving(workers, folder) as (server, port):
            return _measure(report, count, workers, server, port, Path(folder))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def _serving(workers: int, folder: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    arguments = (str(port), str(workers), folder)
    server = start_module(
        "benchmarks.servers.aioecho_crowd", *arguments, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        end = time.monotonic() + 60
        while len(_children(server.pid)) < workers or not _accepts(port):
            if server.poll() is not None or time.monotonic() > end:
                raise OSError("the server does not listen")
            time.sleep(0.1)
        yield server, port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


def _measure(
    report: Callable[[str], object],
    count: int,
    workers: int,
    server: subprocess.Popen[str],
    port: int,
    folder: Path,
) -> dict[str, Any]:
    found: dict[str, Any] = {"connections": count, "workers": workers}
    time.sleep(workers / 4)  # the last of them load
    memory, kernel = _memory_kib(server.pid), _kernel_kib()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(_Process(port, _part(count, workers, n), n)) for n in range(workers)]

        def ask(**order: Any) -> list[Any]:
            for client in clients:
                client.send(order)
            answers = [client.receive() for client in clients]
            found["wrong"] = sum((collections.Counter(answer["wrong"]) for answer in answers), collections.Counter())
            found["held"] = sum(answer["held"] for answer in answers)
            return [answer["answer"] for answer in answers]

        report(f"{count:,} connect")
        began = time.monotonic()
        ask(do="open")
        found["connect_s"] = time.monotonic() - began
        found["most_of_a_worker"] = max(_descriptors(child) for child in _children(server.pid))
        report("rest")
        time.sleep(_SETTLE)  # the sweeps after their messages
        found["worker_kib"] = (_memory_kib(server.pid) - memory) / count
        found["kernel_kib"] = (_kernel_kib() - kernel) / count
        used, began = _cpu_s(server.pid), time.monotonic()
        time.sleep(_AT_REST)
        found["rest_percent"] = 100 * (_cpu_s(server.pid) - used) / (time.monotonic() - began)
        report(f"{_RATE:,} messages a second")
        latencies = sorted(us for each in ask(do="talk", rate=_RATE / workers, seconds=_TALKING) for us in each)
        found["p50_us"], found["p99_us"] = latencies[len(latencies) // 2], latencies[len(latencies) * 99 // 100]
        report("every one echoes")
        began = time.monotonic()
        ask(do="echo")
        found["echo_s"] = time.monotonic() - began

        report("all workers are replaced")
        before = set(_children(server.pid))
        _watch_loops(before)
        began = time.monotonic()
        server.send_signal(signal.SIGHUP)
        ends = ask(do="watch", reopens=True, seconds=_RESTART)
        found["restart_s"] = time.monotonic() - began
        found["restart_ended"] = sum(end["ended"] for end in ends)
        found["restart_reset"] = sum(end["reset"] for end in ends)
        while before & set(_children(server.pid)) and time.monotonic() < began + _RESTART:
            time.sleep(0.1)
        found["restart_still"] = _stood_still(folder)  # a worker says it at its end

        report("all stop")
        _watch_loops(set(_children(server.pid)))
        for client in clients:
            client.send({"do": "watch", "reopens": False, "seconds": _STOP})
        began, used = time.monotonic(), _all_cpu_s(server.pid)
        others = resource.getrusage(resource.RUSAGE_CHILDREN)
        server.send_signal(signal.SIGTERM)
        try:
            found["stop_status"] = server.wait(timeout=_STOP)
        except subprocess.TimeoutExpired:
            found["stop_status"] = None
        found["stop_s"] = time.monotonic() - began
        all_used = resource.getrusage(resource.RUSAGE_CHILDREN)
        stop_cpu_s = all_used.ru_utime + all_used.ru_stime - others.ru_utime - others.ru_stime - used
        # The processor time of children that have not been waited for is not known.
        found["stop_cpu_s"] = None if found["stop_status"] is None else max(0.0, stop_cpu_s)
        ends = [client.receive()["answer"] for client in clients]
        found["stop_ended"] = sum(end["ended"] for end in ends)
        found["stop_reset"] = sum(end["reset"] for end in ends)
        found["stop_still"] = _stood_still(folder)
    return found


class _Process:
    """A process of clients: see crowd_clients.py."""

    def __init__(self, port: int, count: int, number: int) -> None:
        arguments = (str(port), str(count), str(number))
        self.process = start_module(
            "benchmarks.crowd_clients", *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def send(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise OSError("a process of clients has ended") from None

    def receive(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise OSError("a process of clients has ended")
        return json.loads(line)


def _part(count: int, parts: int, number: int) -> int:
    return count * (number + 1) // parts - count * number // parts


def _accepts(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection((HOST, port), 1).close()
        return True
    return False


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _descriptors(pid: int) -> int:
    with contextlib.suppress(OSError):
        return len(os.listdir(f"/proc/{pid}/fd"))
    return 0


def _memory_kib(pid: int) -> int:
    total = 0
    for member in (pid, *_children(pid)):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total


def _cpu_s(pid: int) -> float:
    total = 0.0
    for member in (pid, *_children(pid)):
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~member << 3) | 2)  # another process's clock: Linux's MAKE_PROCESS_CPUCLOCK
    return total


def _all_cpu_s(pid: int) -> float:
    """Return the processor time of a process, of its children, and of those that have ended."""
    ticks = 0
    for member in (pid, *_children(pid)):
        with contextlib.suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _meminfo() -> dict[str, int]:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def _kernel_kib() -> int:
    return _meminfo()["Slab"]


def _watch_loops(workers: set[int]) -> None:
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGUSR2)


def _stood_still(folder: Path) -> dict[str, float]:
    """Return the longest standstill of a loop that has ended by now, in ms, and forget it."""
    told = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(ValueError):
            told.append(json.loads(path.read_text()))
            path.unlink()
    return {name: 1000 * max((each[f"{name}_s"] for each in told), default=0.0) for name in ("wall", "cpu")}


def make_table(found: dict[str, Any]) -> str:
    """Return what was found as a table in Markdown."""
    rows = [
        ("connections held", f"{found['held']:,}, over {found['workers']} workers"),
        ("connected and accepted in", f"{found['connect_s']:.1f} s"),
        ("replies that were wrong or lost", _wrong(found["wrong"])),
        ("descriptors of the worker that has most", f"{found['most_of_a_worker']:,}"),
        ("memory of the processes, per connection", f"{found['worker_kib']:.1f} KiB"),
        ("memory of the kernel, both ends, per connection", f"{found['kernel_kib']:.1f} KiB"),
        ("processor time of all at rest", f"{found['rest_percent']:.2f} % of one processor"),
        (f"echo among them, {_RATE:,} messages a second", f"p50 {found['p50_us']:,} us, p99 {found['p99_us']:,} us"),
        ("one message on every one", f"{found['echo_s']:.1f} s"),
        ("all workers replaced in", f"{found['restart_s']:.1f} s"),
        ("drained then, and reset", f"{found['restart_ended']:,}, {found['restart_reset']:,}"),
        ("longest standstill of a loop then", _still(found["restart_still"])),
        ("all stopped in", _stop(found["stop_s"], found["stop_status"])),
        ("processor time of the workers for it", _stop_cpu(found["stop_cpu_s"])),
        ("drained then, and reset", f"{found['stop_ended']:,}, {found['stop_reset']:,}"),
        ("longest standstill of a loop then", _still(found["stop_still"])),
    ]
    return "\n".join(["| what | figure |", "|---|---|", *(f"| {what} | {figure} |" for what, figure in rows)]) + "\n"


def write_table(path: Path, found: dict[str, Any]) -> str:
    """Write the table with its command to a file, and return the table."""
    table = make_table(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks run --scenario {NAME} --connections {found['connections']}"
    path.write_text(f"`{command}`\n\n{table}")
    return table


def _wrong(wrong: dict[str, int]) -> str:
    return ", ".join(f"{how} {count:,}" for how, count in sorted(wrong.items())) or "0"


def _stop(seconds: float, status: int | None) -> str:
    return f"not ended after {seconds:.1f} s" if status is None else f"{seconds:.1f} s, exit status {status}"


def _stop_cpu(seconds: float | None) -> str:
    return "not ended" if seconds is None else f"{seconds:.1f} s, on {os.cpu_count()} processors"


def _still(still: dict[str, float]) -> str:
    return f"{still['cpu']:.1f} ms of processor time, {still['wall']:.1f} ms by the clock"
