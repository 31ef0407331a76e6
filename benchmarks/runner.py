"""Run a plan: servers take turns at each cell, round after round, and every turn is a line in the data file at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aioecho.load.run import LoadSettings, load

from .audience import Audience
from .burst import send_burst
from .catalog import by_name, find_missing
from .plan import Cell, Plan
from .processes import HOST, ServerProcess, choose_processors
from .senders import Sent, send

__all__ = ["GENERATOR_RATE", "RETAKES", "Sample", "find_done", "last_run", "read_lines", "run_plan"]

# Messages a second that an open loop can send with processor time to spare, on a slow machine too.
GENERATOR_RATE = 25_000

# The share of a processor over which a generator counts as the one that set the pace, as in the load generator.
GENERATOR_BOUND_SHARE = 0.9

# How often, at most, a turn at a fixed rate is taken again that was generator-bound: others use the machine too.
RETAKES = 2

# The most that turns taken again may add to a run, as a share of its time.
RETAKEN_SHARE = 0.05

Sample = dict[str, Any]  # one turn of one server at one cell, as in the data file


def read_lines(path: Path) -> list[Sample]:
    """Read a data file's lines; one that an interruption cut short is left out."""
    lines: list[Sample] = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def last_run(lines: list[Sample]) -> list[Sample]:
    """Give the lines from the last run's header on."""
    starts = [i for i, line in enumerate(lines) if line.get("kind") == "run"]
    return lines[starts[-1] :] if starts else []


def find_done(lines: list[Sample]) -> set[tuple[str, str, int]]:
    """Find which turns have been taken: cell, server, repeat."""
    return {(line["cell"], line["server"], line["repeat"]) for line in lines if line.get("kind") == "sample"}


def run_plan(
    plan: Plan,
    path: Path,
    header: Sample,
    *,
    resume: bool = False,
    report: Callable[[str, float], None] = lambda text, seconds: None,
) -> None:
    """Measure what the plan says and append it to `path`, after a header line that begins a new run.

    With `resume` the file's last run goes on: turns that it has are not taken again. `report` is called with what is
    about to be measured and how many estimated seconds of the plan are now behind. A server that is not installed or
    does not start is left out, with a line that says why.

    Raises:
        ValueError: `resume`, and the file's last run had another plan (caller).
    """
    lines = last_run(read_lines(path)) if resume and path.exists() else []
    if lines and lines[0]["plan"] != plan.name:
        raise ValueError(f"the last run in {path.name} was {lines[0]['plan']!r}, not {plan.name!r}")
    done = find_done(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_short = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:

        def write(line: Sample) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        if cut_short:
            file.write("\n")
        write({**header, "kind": "resumed" if lines else "run", "plan": plan.name})
        _Run(plan, done, write, report).run()


class _Run:
    """One pass through a plan."""

    def __init__(
        self,
        plan: Plan,
        done: set[tuple[str, str, int]],
        write: Callable[[Sample], None],
        report: Callable[[str, float], None],
    ) -> None:
        self.plan = plan
        self.done = done
        self.write = write
        self.report = report
        self.processors = choose_processors()
        self.behind_s = 0.0
        self.retaking_s = RETAKEN_SHARE * plan.total_s  # left to take turns again
        self.ca_file: str | None = None
        self.left_out: set[str] = set()
        self.slowest: dict[tuple[object, ...], float] = {}

    def run(self) -> None:
        allowed = os.sched_getaffinity(0)
        try:
            if self.processors is not None:
                os.sched_setaffinity(0, {self.processors[1]})
            for cells in _group(self.plan.cells):
                self._run_group(cells)
        finally:
            os.sched_setaffinity(0, allowed)

    def _run_group(self, cells: list[Cell]) -> None:
        """Run cells that share processes."""
        wanted = {name for cell in cells for name in cell.servers if self._to_do(cell, name)}
        with contextlib.ExitStack() as stack:
            servers: dict[str, ServerProcess] = {}
            if not cells[0].idle:
                servers = self._start(cells[0], wanted, stack)
            for cell in cells:
                for repeat in range(self.plan.repeats):
                    for name in cell.servers:
                        if repeat >= self.plan.count_rounds(cell, name):
                            continue
                        self.report(f"{cell.key}, {by_name(name).label}, {repeat + 1}", self.behind_s)
                        self.behind_s += self.plan.cost_s(cell, name)
                        if (cell.key, name, repeat) in self.done or name in self.left_out:
                            continue
                        if cell.idle:
                            figures = self._measure_idle(cell, name)
                        elif cell.example and name in servers:
                            figures = self._measure_example(cell, servers[name])
                        elif cell.broadcast and name in servers:
                            figures = self._measure_broadcast(cell, servers[name])
                        elif cell.sender and name in servers:
                            figures = self._measure_sender(cell, servers[name])
                        elif name in servers:
                            figures = self._measure(cell, servers, name)
                        else:
                            continue
                        sample = {"kind": "sample", "cell": cell.key, "server": name, "repeat": repeat, **figures}
                        self.write(sample)
        self.report("", self.behind_s)

    def _to_do(self, cell: Cell, name: str) -> bool:
        return any((cell.key, name, repeat) not in self.done for repeat in range(self.plan.count_rounds(cell, name)))

    def _start(self, cell: Cell, names: set[str], stack: contextlib.ExitStack) -> dict[str, ServerProcess]:
        """Start the servers side by side; they cost nothing while it is not their turn."""
        arguments: list[str] = ["--mode", cell.mode]
        if cell.delay_s:
            arguments += ["--delay", str(cell.delay_s)]
        if cell.tls:
            certificate = _make_certificate(Path(stack.enter_context(_scratch())))
            if certificate is None:
                self.write({"kind": "left out", "cell": cell.key, "why": "no openssl to make a certificate"})
                return {}
            arguments += ["--cert", certificate[0], "--key", certificate[1]]
            self.ca_file = certificate[0]
        started: dict[str, ServerProcess] = {}
        for name in sorted(names):
            if missing := find_missing(by_name(name)):
                self._leave_out(name, f"{missing} is not installed")
                continue
            started[name] = self._process(cell, name, tuple(arguments))
            started[name].launch()
            stack.callback(started[name].stop)
        for name, process in list(started.items()):
            try:
                process.wait_until_listening()
            except OSError as error:
                self.write({"kind": "left out", "server": name, "cell": cell.key, "why": str(error)})
                del started[name]
        for process in started.values():
            process.settle()
        return started

    def _process(self, cell: Cell, name: str, arguments: tuple[str, ...] = ()) -> ServerProcess:
        processors = {self.processors[0]} if cell.pinned and self.processors else None
        return ServerProcess(by_name(name), arguments, processors, datagrams=cell.datagrams)

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out.add(name)
        self.write({"kind": "left out", "server": name, "why": why})

    def _measure(self, cell: Cell, servers: dict[str, ServerProcess], name: str) -> Sample:
        rate = None
        if cell.fraction is not None:
            rate = cell.fraction * min(GENERATOR_RATE, self._find_slowest(cell, servers))
        figures = self._load(cell, servers[name], rate, self.plan.duration_s)
        retaken, cost_s = 0, self.plan.cost_s(cell, name)
        while rate is not None and figures["generator_bound"] and retaken < RETAKES and self.retaking_s >= cost_s:
            retaken += 1
            self.retaking_s -= cost_s
            figures = {**self._load(cell, servers[name], rate, self.plan.duration_s), "retaken": retaken}
        return figures

    def _find_slowest(self, cell: Cell, servers: dict[str, ServerProcess]) -> float:
        """Measure once, in closed loop, what the slowest of a cell's servers carries, in messages a second."""
        key = (cell.launch, cell.servers, cell.clients, cell.size_bytes, cell.depth, cell.churn)
        if key not in self.slowest:
            rates = {}
            for name in cell.servers:
                if name in servers:
                    figures = self._load(cell, servers[name], None, self.plan.duration_s)
                    if not figures["errors"]:
                        rates[name] = figures["achieved_rate"]
            self.slowest[key] = min(rates.values(), default=1000.0)
            self.write({"kind": "calibration", "cell": cell.key, "slowest_rate": self.slowest[key], "rates": rates})
        return self.slowest[key]

    def _load(self, cell: Cell, process: ServerProcess, rate: float | None, duration_s: float) -> Sample:
        read: list[tuple[float, float]] = []

        def on_window(opening: bool) -> None:
            read.append((process.cpu_s(), time.perf_counter()))

        result = load(
            LoadSettings(
                endpoint=f"{'udp' if cell.datagrams else 'tcp'}://{HOST}:{process.port}",
                connections=cell.clients,
                depth=cell.depth,
                rate=rate,
                churn=cell.churn,
                size_bytes=cell.size_bytes,
                lines=cell.lines,
                # What waits 100 ms needs time for enough rounds.
                duration_s=duration_s + 5 * cell.delay_s,
                warmup_s=self.plan.warmup_s + 2 * cell.delay_s,
                tls=cell.tls,
                ca_file=self.ca_file if cell.tls else None,
            ),
            on_window=on_window,
        )
        if result.interrupted:
            raise KeyboardInterrupt
        memory_kib = process.memory_kib()
        process.settle()
        figures: Sample = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in result.as_dict().items()
            if name in _KEPT or (name.startswith("errors_") and value)
        }
        figures["memory_kib"] = memory_kib
        if len(read) == 2:
            cpu_s, wall_s = read[1][0] - read[0][0], read[1][1] - read[0][1]
            figures["server_cpu_share"] = round(cpu_s / wall_s, 4)
            if result.achieved_rate:
                figures["server_cpu_us"] = round(cpu_s / wall_s / result.achieved_rate * 1e6, 3)
        return figures

    def _measure_example(self, cell: Cell, process: ServerProcess) -> Sample:
        """Measure how long it takes until each of so many clients has its one reply."""
        burst = send_burst((HOST, process.port), cell.clients, 20 * cell.delay_s)
        figures: Sample = {"elapsed_s": round(burst.elapsed_s, 3), "errors": burst.lost, "problem": burst.problem}
        process.settle()
        return figures

    def _measure_sender(self, cell: Cell, process: ServerProcess) -> Sample:
        """Measure what a record or a connection costs: the processor time until the server is at rest again."""

        def load_for(duration_s: float) -> Sent:
            sent = send(cell.sender, (HOST, process.port), cell.depth, cell.size_bytes, duration_s)
            process.settle()
            return sent

        load_for(self.plan.warmup_s)
        before = process.cpu_s()
        sent = load_for(self.plan.sending_s)
        return self._describe(sent, process.cpu_s() - before, process)

    def _measure_broadcast(self, cell: Cell, process: ServerProcess) -> Sample:
        """Measure what a broadcast costs for each of its receivers, which are connected before."""
        try:
            with Audience((HOST, process.port), cell.clients) as audience:
                audience.hear(cell.size_bytes, self.plan.warmup_s)
                process.settle()
                before = process.cpu_s()
                sent = audience.hear(cell.size_bytes, self.plan.duration_s)
                process.settle()
                figures = self._describe(sent, process.cpu_s() - before, process)
        except OSError as error:
            figures = {"errors": 1, "problem": str(error)}
        process.settle()
        return figures

    def _describe(self, sent: Sent, cpu_s: float, process: ServerProcess) -> Sample:
        share = sent.own_cpu_s / sent.elapsed_s
        return {
            "achieved_rate": round(sent.count / sent.elapsed_s, 3),
            "messages": sent.count,
            "server_cpu_us": round(cpu_s / sent.count * 1e6, 4) if sent.count else None,
            "server_cpu_share": round(cpu_s / sent.elapsed_s, 4),
            "generator_cpu_share": round(share, 4),
            "generator_bound": share > GENERATOR_BOUND_SHARE,
            "memory_kib": process.memory_kib(),
            "errors": int(sent.problem is not None),
            "problem": sent.problem,
        }

    def _measure_idle(self, cell: Cell, name: str) -> Sample:
        """Measure what a fresh server's memory grows by when so many clients say one thing and stay."""
        if missing := find_missing(by_name(name)):
            return {"errors": 0, "problem": f"{missing} is not installed", "left_out": True}
        clients: list[socket.socket] = []
        problem = None
        try:
            with contextlib.ExitStack() as stack:
                process = stack.enter_context(self._process(cell, name))
                process.settle()
                before = process.memory_kib()
                try:
                    for _ in range(cell.clients):
                        client = stack.enter_context(socket.create_connection((HOST, process.port), 10))
                        clients.append(client)
                        client.sendall(b"x" * cell.size_bytes)
                    for client in clients:
                        if not client.recv(cell.size_bytes):
                            raise ConnectionError("the server closed a connection")
                except OSError as error:
                    problem = str(error)
                process.settle()
                memory = process.memory_kib()
        except OSError as error:
            return {"errors": 1, "problem": str(error)}
        return {
            "errors": 0 if problem is None else cell.clients - len(clients) or 1,
            "problem": problem,
            "memory_kib": memory,
            "connection_kib": round((memory - before) / max(1, len(clients)), 3),
        }


_KEPT = {
    "offered_rate", "achieved_rate", "messages", "mean_us", "min_us", "p50_us", "p90_us", "p99_us", "p999_us", "max_us",
    "errors", "problem", "generator_cpu_share", "generator_bound", "measured_s", "started_at",
}  # fmt: skip


def _group(cells: tuple[Cell, ...]) -> Iterator[list[Cell]]:
    group: list[Cell] = []
    for cell in cells:
        if group and cell.launch != group[0].launch:
            yield group
            group = []
        group.append(cell)
    if group:
        yield group


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        yield folder


def _make_certificate(folder: Path) -> tuple[str, str] | None:
    """Make a certificate for localhost that is its own authority; None where there is no openssl."""
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    certificate, key = str(folder / "cert.pem"), str(folder / "key.pem")
    subprocess.run(
        [
            openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key
