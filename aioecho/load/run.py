"""Load an echo server and measure it: `load(LoadSettings(endpoint=...))` gives a `LoadResult`.

Closed loop: every one of `connections` keeps `depth` messages in flight, and latency counts from the moment of sending. Open
loop (`rate`): messages fall due at fixed times whatever the server does; a message goes to the connection that has been free
longest, or waits until one is; latency counts from the moment the message was due, so a stalled server cannot hide
behind messages that were never sent ("coordinated omission").

This module starts the processes and makes one result of their counts; an `Engine` is what runs in each.
"""

from __future__ import annotations

import select
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from aioecho.framing import format_framing
from aioecho.load.datagrams import DatagramEngine
from aioecho.load.engine import Engine
from aioecho.load.exchanges import ExchangeEngine
from aioecho.load.frames import FrameEngine
from aioecho.load.latencies import Interval, Latencies
from aioecho.load.settings import ERROR_CLASSES, LoadProgress, LoadSettings, Tally, is_datagram
from aioecho.load.streams import StreamEngine

__all__ = ["ERROR_CLASSES", "LoadProgress", "LoadResult", "LoadSettings", "load"]

_BOUND_CPU_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class LoadResult:
    """What one run measured. Latencies in microseconds, None where no message was measured; rates in messages a second.

    `offered_rate` is None in closed loop, where the server sets the pace. `achieved_rate` counts the replies received
    within the window of `measured_s`; the latencies also cover the messages of the window answered after its end.
    With a script `size_bytes` is the longest message's.
    Errors are counted in messages lost, at least one a connection, from the first connection on, warm-up included.
    `late_replies` came after their datagrams had been counted as timed out, `duplicate_replies` after another reply to the
    same datagram: neither is an error more, and with streams there are none.
    `corrected_p99_us` and `corrected_p999_us` estimate, for closed loop only, what an open loop at the achieved rate
    would have seen. `generator_bound`: the generator used over 90 % of a core, so it, not the server, set the pace.
    """

    endpoint: str
    mode: str  # "closed" or "open"
    connections: int
    depth: int
    size_bytes: int
    lines: bool
    framing: str | None  # as parse_framing() reads it
    script: str | None  # in short
    churn: bool
    tls: bool
    processes: int
    started_at: str  # ISO 8601, UTC
    warmup_s: float
    measured_s: float
    offered_rate: float | None
    achieved_rate: float
    messages: int
    bytes_sent: int
    bytes_received: int
    mean_us: float | None
    min_us: float | None
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    p999_us: float | None
    p9999_us: float | None
    max_us: float | None
    corrected_p99_us: float | None
    corrected_p999_us: float | None
    errors: int
    errors_connect: int
    errors_reset: int
    errors_closed_early: int
    errors_timed_out: int
    errors_wrong_bytes: int
    late_replies: int
    duplicate_replies: int
    generator_cpu_share: float
    generator_bound: bool
    interrupted: bool
    problem: str | None
    latencies: Latencies = field(repr=False, compare=False, metadata={"json": False})
    series: tuple[Interval, ...] = field(default=(), repr=False, compare=False, metadata={"json": False})

    def as_dict(self) -> dict[str, Any]:
        """Return every field but `latencies` and `series`, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("json", True)}


def load(
    settings: LoadSettings,
    *,
    on_progress: Callable[[LoadProgress], None] | None = None,
    on_window: Callable[[bool], None] | None = None,
) -> LoadResult:
    """Run one load and return its result; KeyboardInterrupt ends the run early and returns what was measured.

    A server that is absent, dies or answers wrong does not raise: `problem` says so in the result. With several
    `processes` every process gets its share of connections and rate, all start measuring together, and their counts are added.
    `on_window` is called with True when measuring starts and with False when it ends, to read the server's
    processor time there; with one process only. The soft limit of open files is raised to the hard one, and stays so.

    Raises:
        ValueError: `on_window` with several processes (caller).
        OSError: the endpoint's host does not resolve (caller), or the system has no epoll.
        ssl.SSLError: `ca_file` holds no certificates (caller).
    """
    if on_window is not None and settings.processes > 1:
        raise ValueError("on_window needs processes=1: several processes have no moment in common")
    if not hasattr(select, "epoll"):
        raise OSError("the load generator needs epoll, which only Linux has")
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if settings.processes == 1:
        tallies = [_make_engine(settings, 0, 1).run(on_progress, on_window)]
    else:
        tallies = _Shares(settings, on_progress).run()
    return _result(settings, tallies, started_at)


def _make_engine(settings: LoadSettings, share: int, shares: int, control: Any = None) -> Engine:
    kind: type[Engine] = StreamEngine
    if is_datagram(settings.endpoint):
        kind = DatagramEngine
    elif settings.script is not None:
        kind = ExchangeEngine
    elif settings.framing is not None:
        kind = FrameEngine
    return kind(settings, share, shares, control)


def _serve_share(settings: LoadSettings, share: int, control: Any) -> None:
    """Run one share in a process of its own, on the parent's word, and send the tally up."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    try:
        engine = _make_engine(settings, share, settings.processes, control)
        control.send(engine.run(control.send))
    except Exception as error:
        control.send(Tally(problem=f"{type(error).__name__}: {error}"))


class _Shares:
    """The shares of a load in processes of their own, which are told when to go and when to stop, and what they have told."""

    def __init__(self, settings: LoadSettings, on_progress: Callable[[LoadProgress], None] | None) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._pipes: dict[Any, int] = {}  # the parent's ends -> share
        self._ready: set[int] = set()
        self._reports: dict[int, LoadProgress] = {}
        self._tallies: dict[int, Tally] = {}
        self._is_stopping = False

    def run(self) -> list[Tally]:
        """Run all of them, and return their tallies. KeyboardInterrupt stops them."""
        from multiprocessing.connection import wait

        processes = self._start()
        while len(self._tallies) < self._settings.processes:
            try:
                readable: list[Any] = wait([pipe for pipe, share in self._pipes.items() if share not in self._tallies])
                for pipe in readable:
                    self._receive(pipe)
            except KeyboardInterrupt:
                self._stop()
        for process in processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        return list(self._tallies.values())

    def _start(self) -> list[Any]:
        import multiprocessing

        context = multiprocessing.get_context("spawn")
        processes = []
        for share in range(self._settings.processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve_share, args=(self._settings, share, theirs), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            self._pipes[ours] = share
        return processes

    def _receive(self, pipe: Any) -> None:
        share, count = self._pipes[pipe], self._settings.processes
        try:
            message = pipe.recv()
        except (EOFError, ConnectionResetError):  # the latter if it had not read a word that was told to it
            message = Tally(problem=f"generator process {share} died")
        if isinstance(message, Tally):
            self._tallies[share] = message
            if not self._is_stopping and share not in self._ready:
                self._stop()  # a share that could not even start makes the others meaningless
        elif message == "ready":
            self._ready.add(share)
            if len(self._ready) == count:
                self._tell("go")
        else:
            self._reports[share] = message
            if self._on_progress is not None and len(self._reports) == count:
                self._on_progress(_add_progress(list(self._reports.values())))
                self._reports.clear()

    def _stop(self) -> None:
        self._is_stopping = True
        self._tell("stop")

    def _tell(self, word: str) -> None:
        for pipe, share in self._pipes.items():
            if share not in self._tallies:
                with suppress(OSError):
                    pipe.send(word)


def _add_progress(reports: Sequence[LoadProgress]) -> LoadProgress:
    total = {name: sum(getattr(report, name) for report in reports) for name in ("replies", "rate", "errors")}
    return LoadProgress(**{**asdict(reports[0]), **total})


def _result(settings: LoadSettings, tallies: Sequence[Tally], started_at: str) -> LoadResult:
    """Add up the processes' tallies and take the percentiles."""
    counts: Counter[int] = Counter()
    for tally in tallies:
        counts.update(tally.counts)
    latencies = Latencies(counts)
    measured_s = max(tally.measured_s for tally in tallies)
    rate = sum(tally.replies / tally.measured_s for tally in tallies if tally.measured_s)
    corrected_p99 = corrected_p999 = None
    if settings.rate is None and rate:
        # A message in flight should have taken its turn every `interval_us`.
        interval_us = max(1, round(settings.connections * settings.depth / rate * 1e6))
        corrected_p99 = latencies.corrected_percentile(99, interval_us)
        corrected_p999 = latencies.corrected_percentile(99.9, interval_us)
    errors = [sum(tally.errors[i] for tally in tallies) for i in range(len(ERROR_CLASSES))]
    share = max((tally.cpu_s / tally.measured_s for tally in tallies if tally.measured_s), default=0.0)
    return LoadResult(
        endpoint=settings.endpoint,
        mode="closed" if settings.rate is None else "open",
        connections=settings.connections,
        depth=settings.depth,
        size_bytes=settings.message_bytes,
        lines=settings.lines,
        framing=None if settings.framing is None else format_framing(settings.framing),
        script=None if settings.script is None else str(settings.script),
        churn=settings.churn,
        tls=settings.tls,
        processes=settings.processes,
        started_at=started_at,
        warmup_s=settings.warmup_s,
        measured_s=measured_s,
        offered_rate=settings.rate,
        achieved_rate=rate,
        messages=latencies.total,
        bytes_sent=sum(tally.bytes_sent for tally in tallies),
        bytes_received=sum(tally.bytes_received for tally in tallies),
        mean_us=latencies.mean_us,
        min_us=latencies.min_us,
        p50_us=latencies.percentile(50),
        p90_us=latencies.percentile(90),
        p99_us=latencies.percentile(99),
        p999_us=latencies.percentile(99.9),
        p9999_us=latencies.percentile(99.99),
        max_us=latencies.max_us,
        corrected_p99_us=corrected_p99,
        corrected_p999_us=corrected_p999,
        errors=sum(errors),
        **{f"errors_{name}": count for name, count in zip(ERROR_CLASSES, errors, strict=True)},
        late_replies=sum(tally.late for tally in tallies),
        duplicate_replies=sum(tally.duplicates for tally in tallies),
        generator_cpu_share=share,
        generator_bound=share > _BOUND_CPU_SHARE,
        interrupted=any(tally.interrupted for tally in tallies),
        problem=next((tally.problem for tally in tallies if tally.problem), None),
        latencies=latencies,
        series=_add_series(tallies),
    )


def _add_series(tallies: Sequence[Tally]) -> tuple[Interval, ...]:
    """Add up what the processes counted in the same second: their intervals begin within some milliseconds of another."""
    added: dict[int, list[tuple[float, float, dict[int, int]]]] = {}
    for tally in tallies:
        for part in tally.series:
            added.setdefault(round(part[0]), []).append(part)
    series = []
    for _, parts in sorted(added.items()):
        counts: Counter[int] = Counter()
        for part in parts:
            counts.update(part[2])
        series.append(Interval(min(part[0] for part in parts), max(part[1] for part in parts), Latencies(counts)))
    return tuple(series)
