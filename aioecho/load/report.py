"""Present one load result: a table, a line while it runs, JSON, an HdrHistogram log, a plot, and conditions to fail on.

rich and matplotlib belong to the `bench` extra and are imported where they are used.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aioecho.load.hdr_log import format_log
from aioecho.load.run import LoadResult
from aioecho.load.settings import ERROR_CLASSES, LoadProgress, is_datagram

__all__ = ["Condition", "LiveLine", "print_result", "write_hdr", "write_json", "write_plot"]

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
        return f"{self.name} {self.comparison} {self.number:g}"


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


def print_result(result: LoadResult) -> None:
    """Print the result as a table on standard output, and what to know before believing it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    what = "a connection per message" if result.churn else f"{result.depth} in flight on each"
    clients = "sockets" if is_datagram(result.endpoint) else "connections"
    kind = "lines" if result.lines else "messages" if result.framing is None else f"frames ({result.framing})"
    console.print(
        f"{escape(result.endpoint)}{' over TLS' if result.tls else ''}: {result.mode} loop, "
        f"{result.connections:,} {clients}, {what}, {escape(kind)} of {result.size_bytes:,} bytes, "
        f"{result.measured_s:.2f} s measured" + (f", {result.processes} processes" if result.processes > 1 else ""),
        soft_wrap=True,
    )
    latency = Table(title="latency, microseconds", title_justify="left")
    values = {
        "p50": result.p50_us,
        "p90": result.p90_us,
        "p99": result.p99_us,
        "p99.9": result.p999_us,
        "p99.99": result.p9999_us,
        "max": result.max_us,
        "mean": result.mean_us,
    }
    for name in values:
        latency.add_column(name, justify="right")
    latency.add_row(*map(_us, values.values()))
    traffic = Table(title="traffic", title_justify="left")
    for name in ("messages", "offered/s", "achieved/s", "bytes sent", "bytes received"):
        traffic.add_column(name, justify="right")
    offered = "as it goes" if result.offered_rate is None else f"{result.offered_rate:,.0f}"
    traffic.add_row(
        f"{result.messages:,}",
        offered,
        f"{result.achieved_rate:,.0f}",
        f"{result.bytes_sent:,}",
        f"{result.bytes_received:,}",
    )
    errors = Table(title="errors, in messages lost", title_justify="left")
    for name in ERROR_CLASSES:
        errors.add_column(name.replace("_", " "), justify="right")
    errors.add_row(*(f"{getattr(result, f'errors_{name}'):,}" for name in ERROR_CLASSES))
    for table in (traffic, latency, errors) if result.messages else (errors,):
        console.print(table)
    for remark in remarks(result):
        console.print(escape(remark), soft_wrap=True)


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


def write_json(result: LoadResult, path: Path) -> None:
    """Write the result's fields as one JSON object; every name carries its unit."""
    path.write_text(json.dumps(result.as_dict(), indent=2) + "\n")


def write_hdr(result: LoadResult, path: Path) -> None:
    """Write an HdrHistogram log with one interval, in microseconds; logs of several runs can be merged by adding."""
    comment = f"aioecho load, values in microseconds: {result.endpoint} at {result.started_at}"
    path.write_text(format_log(result.latencies.counts, seconds=result.measured_s, comment=comment))


def write_plot(result: LoadResult, path: Path) -> None:
    """Plot latency by percentile, the axis spreading 90, 99, 99.9 ... evenly, as PNG or SVG by the name's ending."""
    from matplotlib.figure import Figure

    below, xs, ys = 0, [], []
    for value, count in result.latencies.counts.items():
        # Drawn where the value's first message is: the last one of all would lie at infinity.
        xs.append(result.messages / (result.messages - below))
        ys.append(value)
        below += count
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if xs:
        xs.append(result.messages)
        ys.append(ys[-1])
        axes.step(xs, ys, where="post", color="#0072b2")
        axes.set(xscale="log", yscale="log")
    nines = [2, 10, 100, 1_000, 10_000, 100_000, 1_000_000]
    shown: list[Any] = [n for n in nines if n <= max(10, result.messages)]
    axes.set_xticks(shown, [f"{100 * (1 - 1 / n):g}" for n in shown])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="percentile", ylabel="latency, microseconds")
    load = f"{result.offered_rate:,.0f} msg/s offered" if result.offered_rate else "closed loop"
    axes.set_title(
        f"{result.endpoint}: {result.connections:,} connections, {result.size_bytes:,} bytes, {load}, "
        f"{result.achieved_rate:,.0f} msg/s",
        fontsize=10,
    )
    axes.grid(True, which="major", alpha=0.3)
    figure.savefig(path, dpi=150)
