"""One load result as a picture: latency by percentile, and over time. matplotlib belongs to the `bench` extra."""

from __future__ import annotations

from typing import Any, BinaryIO

from aioecho.load.run import LoadResult

__all__ = ["write_plot"]

_NINES = (2, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


def write_plot(result: LoadResult, file: BinaryIO, format: str) -> None:
    """Plot latency by percentile, the axis spreading 90, 99, 99.9 ... evenly, and over time; `format` is "png" or "svg"."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    by_percentile, over_time = figure.subplots(2, 1)
    _plot_percentiles(result, by_percentile)
    _plot_series(result, over_time)
    load = f"{result.offered_rate:,.0f} msg/s offered" if result.offered_rate else "closed loop"
    by_percentile.set_title(
        f"{result.endpoint}: {result.connections:,} connections, {result.size_bytes:,} bytes, {load}, "
        f"{result.achieved_rate:,.0f} msg/s",
        fontsize=10,
    )
    figure.savefig(file, dpi=150, format=format)


def _plot_percentiles(result: LoadResult, axes: Any) -> None:
    below, xs, ys = 0, [], []
    for value, count in result.latencies.counts.items():
        # Drawn where the value's first message is: the last one of all would lie at infinity.
        xs.append(result.messages / (result.messages - below))
        ys.append(value)
        below += count
    if xs:
        xs.append(result.messages)
        ys.append(ys[-1])
        axes.step(xs, ys, where="post", color="#0072b2")
        axes.set_xscale("log")
        _scale_latencies(axes)
    shown = [n for n in _NINES if n <= max(10, result.messages)]
    axes.set_xticks(shown, [f"{100 * (1 - 1 / n):g}" for n in shown])
    axes.minorticks_off()
    axes.set(xlabel="percentile", ylabel="latency, microseconds")
    axes.grid(True, which="major", alpha=0.3)


def _plot_series(result: LoadResult, axes: Any) -> None:
    """Plot median, p99 and maximum of every second, and how many messages it had."""
    parts = [part for part in result.series if part.latencies.total]
    ends = [part.start_s + part.seconds for part in parts]
    for name, color, values in (
        ("max", "#d55e00", [part.latencies.max_us for part in parts]),
        ("p99", "#0072b2", [part.latencies.percentile(99) for part in parts]),
        ("p50", "#009e73", [part.latencies.percentile(50) for part in parts]),
    ):
        axes.plot(ends, values, marker=".", color=color, label=name)
    rates = axes.twinx()
    if parts:
        _scale_latencies(axes)
        rates.stairs([part.latencies.total / part.seconds for part in result.series], _edges(result), color="#999999")
        rates.set_ylim(bottom=0)
        axes.set_xlim(0, ends[-1])
        axes.legend(loc="upper left", fontsize=8)
    rates.yaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="seconds", ylabel="latency, microseconds")
    rates.set_ylabel("messages a second (grey)")
    axes.grid(True, which="major", alpha=0.3)


def _scale_latencies(axes: Any) -> None:
    """Spread latencies by their powers, with whole numbers of microseconds for 1, 2 and 5 of every power of ten."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.minorticks_off()


def _edges(result: LoadResult) -> list[float]:
    """Return where the intervals of the series begin, and where the last one ends."""
    last = result.series[-1]
    return [part.start_s for part in result.series] + [last.start_s + last.seconds]
