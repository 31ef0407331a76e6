"""Present one load result: tables, a line while it runs, JSON, an HdrHistogram log, and conditions to fail on.

rich belongs to the `bench` extra and is imported where it is used.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self

from aioecho.load.hdr_log import format_log
from aioecho.load.histogram import draw_histogram
from aioecho.load.latencies import Interval
from aioecho.load.run import LoadResult
from aioecho.load.settings import ERROR_CLASSES, LoadProgress, is_datagram

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Condition", "LiveLine", "print_result", "remarks", "write_hdr", "write_json"]

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_NUMERIC = sorted(f.name for f in fields(LoadResult) if str(f.type) in ("int", "float", "float | None", "bool"))


@dataclass(frozen=True)
class Condition:
    """One `--fail-if`: a field of the result, a comparison, a number."""

    name: str
    comparison: str
    number: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `FIELD OPERATOR NUMBER`, such as `p99_us>2000`.

        Raises:
            ValueError: not of that form, or no such field; the message names the fields (caller).
        """
        match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|==|!=|>|<)\s*([-+.\w]+)\s*", text)
        try:
            name, comparison, number = match.groups() if match else ("", "", "")
            value = float(number)
        except ValueError:
            raise ValueError(f'expected FIELD OPERATOR NUMBER such as "p99_us>2000", not {text!r}') from None
        if name not in _NUMERIC:
            raise ValueError(f"no field {name!r} in a load result; there are {', '.join(_NUMERIC)}")
        return cls(name, comparison, value)

    def holds(self, result: LoadResult) -> bool:
        """Tell whether the result meets the condition; a value that was not measured meets every one."""
        value = getattr(result, self.name)
        return value is None or _OPERATORS[self.comparison](value, self.number)

    def __str__(self) -> str:
        return f"{self.name} {self.comparison} {self.number:.12g}"


class LiveLine:
    """A context manager whose `update` shows progress in one line on standard error, if that is a terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._status = console.status("connecting") if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._status is not None:
            self._status.stop()

    def update(self, progress: LoadProgress) -> None:
        """Show where the run is; fit to be `load`'s `on_progress`."""
        if self._status is not None:
            errors = f"  [red]{progress.errors:,} errors[/]" if progress.errors else ""
            self._status.update(
                f"{progress.phase} {progress.elapsed_s:.1f}/{progress.total_s:g} s  {progress.rate:,.0f} msg/s{errors}"
            )


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def print_result(result: LoadResult, *, to_stderr: bool = False) -> None:
    """Print the result as tables and a histogram on standard output, and what to know before believing it."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, stderr=to_stderr)
    is_whole = not console.is_terminal  # a line of text: what searches for it finds it
    what = "a connection per message" if result.churn else f"{result.depth} in flight on each"
    clients = "sockets" if is_datagram(result.endpoint) else "connections"
    kind = "lines" if result.lines else "messages" if result.framing is None else f"frames ({result.framing})"
    if result.script is not None:
        kind = f"{kind} {result.script},"
    console.print(
        f"{escape(result.endpoint)}{' over TLS' if result.tls else ''}: {result.mode} loop, "
        f"{result.connections:,} {clients}, {what}, {escape(kind)} of {result.size_bytes:,} bytes, "
        f"{result.measured_s:.2f} s measured" + (f", {result.processes} processes" if result.processes > 1 else ""),
        soft_wrap=is_whole,
    )
    if result.messages:
        traffic = {
            "messages": f"{result.messages:,}",
            "offered/s": "as it goes" if result.offered_rate is None else f"{result.offered_rate:,.0f}",
            "achieved/s": f"{result.achieved_rate:,.0f}",
            "bytes sent": f"{result.bytes_sent:,}",
            "bytes received": f"{result.bytes_received:,}",
        }
        latency = {
            "p50": result.p50_us,
            "p90": result.p90_us,
            "p99": result.p99_us,
            "p99.9": result.p999_us,
            "p99.99": result.p9999_us,
            "max": result.max_us,
            "mean": result.mean_us,
        }
        _print_table(console, "traffic", traffic)
        _print_table(console, "latency, microseconds", {name: _us(value) for name, value in latency.items()})
        for line in draw_histogram(result.latencies, console.width, is_ascii=console.options.ascii_only):
            console.print(line, markup=False, soft_wrap=True)
    errors = {name.replace("_", " "): f"{getattr(result, f'errors_{name}'):,}" for name in ERROR_CLASSES}
    _print_table(console, "errors, in messages lost", errors)
    for remark in remarks(result):
        console.print(escape(remark), soft_wrap=is_whole)


def _print_table(console: Console, title: str, values: Mapping[str, str]) -> None:
    """Print names above their values, or where the terminal is too narrow, beside them: a number is shown whole."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    if sum(max(len(name), len(value)) + 3 for name, value in values.items()) < console.width:
        for name in values:
            table.add_column(name, justify="right")
        table.add_row(*values.values())
    else:
        table.show_header = False
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, justify="right")
        for name, value in values.items():
            table.add_row(name, value)
    console.print(table)


def remarks(result: LoadResult) -> list[str]:
    """Say in sentences what the table alone would let a reader miss."""
    said = [f"generator: {result.generator_cpu_share:.0%} of a core"]
    if result.generator_bound:
        said[0] += "; generator_bound: it, and not the server, may have set the pace"
    if result.mode == "closed" and result.messages:
        in_flight = result.connections * result.depth
        said.append(
            f"closed loop hides a stall: while the server stands still nothing more is sent, so a pause counts as at "
            f"most {in_flight:,} slow messages. Had messages fallen due at the achieved rate, p99 would be about "
            f"{_us(result.corrected_p99_us)} us and p99.9 {_us(result.corrected_p999_us)} us; --rate measures it."
        )
    if result.mode == "open" and result.offered_rate and result.achieved_rate < 0.98 * result.offered_rate:
        said.append(
            f"the server kept up with {result.achieved_rate / result.offered_rate:.0%} of the offered rate; "
            "the rest waited, and the wait is in the latencies."
        )
    if 0 < result.messages < 10_000:
        said.append(f"{result.messages:,} messages are too few for p99.99: it is the largest value.")
    if result.late_replies or result.duplicate_replies:
        said.append(
            f"{result.late_replies:,} replies came after their datagram had timed out, and {result.duplicate_replies:,} "
            "to datagrams that had been answered."
        )
    if result.interrupted:
        said.append("interrupted: this is what was measured so far.")
    return said


def write_json(result: LoadResult, file: BinaryIO) -> None:
    """Write the result's fields as one JSON object; every name carries its unit."""
    file.write((json.dumps(result.as_dict(), indent=2) + "\n").encode())


def write_hdr(result: LoadResult, file: BinaryIO) -> None:
    """Write an HdrHistogram log in microseconds, an interval a second; logs of several runs can be merged by adding."""
    comment = f"aioecho load, values in microseconds: {result.endpoint} at {result.started_at}"
    series = result.series or (Interval(0.0, result.measured_s, result.latencies),)
    intervals = [(part.start_s, part.seconds, part.latencies.counts) for part in series]
    file.write(format_log(intervals, comment=comment).encode())
