"""Pictures of a run: figures against clients, and the candidate's ratios to the baseline as bars.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; every line has a marker and a dash of its own as
well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .catalog import BASELINE, CANDIDATE, SERVERS, by_name
from .findings import MAIN_FIGURE, describe_cell, find
from .plan import SCENARIOS
from .stats import FIGURES, Row

__all__ = ["draw_all"]

_BETTER, _WORSE, _SAME = "#0072b2", "#d55e00", "#999999"


def draw_all(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Draw what there are rows for, each as PNG and SVG into `folder`; names without ending -> what each shows."""
    drawings: dict[str, tuple[str, Callable[[], Any]]] = {
        "ratios": ("aioecho against ThreadingTCPServer", lambda: _draw_ratios(rows)),
        "throughput": (
            "Messages a second against clients",
            lambda: _draw_lines(rows, "clients", "achieved_rate", "messages a second"),
        ),
        "slow": (
            "A slow handler: messages a second against clients",
            lambda: _draw_lines(rows, "slow", "achieved_rate", "messages a second", ideal=10.0),
        ),
        "latency": (
            "99th percentile of latency at a fixed rate",
            lambda: _draw_lines(rows, "rate", "p99_us", "p99 latency, microseconds", linear_x=True),
        ),
        "processor": (
            "Processor time per message against clients",
            lambda: _draw_lines(rows, "clients", "server_cpu_us", "processor time per message, microseconds"),
        ),
        "memory": (
            "Memory against idle connections",
            lambda: _draw_lines(rows, "idle", "memory_kib", "memory of the server, MiB", scale=1 / 1024),
        ),
        "peers": ("Every server, 100 clients", lambda: _draw_bars(rows)),
    }
    drawn = {}
    for name, (title, draw) in drawings.items():
        figure = draw()
        if figure is not None:
            drawn[name] = title
            for ending in ("png", "svg"):
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(folder / f"{name}.{ending}", dpi=144, metadata=metadata)
    return drawn


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "aioecho"  # the same rows give the same file
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw_lines(
    rows: Sequence[Row],
    scenario: str,
    name: str,
    label: str,
    *,
    scale: float = 1.0,
    linear_x: bool = False,
    ideal: float | None = None,
) -> Any:
    """Draw one figure along a scenario's axis, least to greatest as bars; hollow where the generator set the pace."""
    mine = [row for row in rows if row.pinned and row.scenario == scenario and name in row.figures]
    mine = [row for row in mine if not by_name(row.server).peer]
    if len({row.x for row in mine}) < 2:
        return None
    figure, axes = _figure(9, 4.6)
    xs = sorted({row.x for row in mine})
    shown = [server for server in SERVERS if any(row.server == server.name for row in mine)]
    for i, server in enumerate(shown):
        step = i - (len(shown) - 1) / 2  # side by side, or one's spread would hide another's
        points = sorted((row for row in mine if row.server == server.name), key=lambda row: row.x)
        at = [row.x + step * 0.015 * (xs[-1] - xs[0]) if linear_x else row.x * 1.04**step for row in points]
        spreads = [row.figures[name] for row in points]
        ys = [spread.median * scale for spread in spreads]
        errors = [
            [(spread.median - spread.least) * scale for spread in spreads],
            [(spread.greatest - spread.median) * scale for spread in spreads],
        ]
        axes.errorbar(
            at,
            ys,
            errors,
            color=server.colour,
            linestyle=server.dash,
            marker=server.marker,
            capsize=2,
            elinewidth=1,
            linewidth=1.8,
            label=server.label,
        )
        hollow = [(x, y) for row, x, y in zip(points, at, ys, strict=True) if row.status == "bound"]
        if hollow:
            axes.plot(*zip(*hollow, strict=True), "o", mfc="white", mec=server.colour, ms=9, linestyle="none", zorder=3)
    if ideal is not None:
        axes.plot(xs, [ideal * x for x in xs], color="#bbbbbb", linewidth=1, zorder=0, label="waiting alone")
    from matplotlib.ticker import LogLocator

    axes.set(xscale="linear" if linear_x else "log", yscale="log")
    axes.set_xticks(xs, [f"{x:,}" for x in xs])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:,.10g}")
    axes.set(xlabel=SCENARIOS[scenario].axis, ylabel=label)
    if any(row.status == "bound" for row in mine):
        axes.plot([], [], "o", mfc="white", mec="#555555", ms=9, linestyle="none", label="generator-bound")
    axes.grid(True, which="major", alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _draw_ratios(rows: Sequence[Row]) -> Any:
    """Draw the candidate's advantage over the baseline: to the right it is better, whichever way the figure counts."""
    bars = []
    for finding in sorted(find(rows, (CANDIDATE,)), key=lambda finding: not finding.row.pinned):
        ratio = finding.ratio
        if ratio is None or finding.figure != MAIN_FIGURE[SCENARIOS[finding.row.scenario].measure]:
            continue
        value, low, high = ratio.value, ratio.low, ratio.high
        if not FIGURES[finding.figure].more_is_better:
            value, low, high = 1 / value, 1 / high, 1 / low
        what = {"achieved_rate": "messages/s", "server_cpu_us": "processor time"}
        what |= {"connection_kib": "memory", "elapsed_s": "time"}
        colour = {"better": _BETTER, "worse": _WORSE, "same": _SAME}[finding.verdict]
        bars.append((f"{describe_cell(finding.row)}: {what[finding.figure]}", value, low, high, colour))
    if not bars:
        return None
    figure, axes = _figure(9, 1.3 + 0.3 * len(bars))
    positions = range(len(bars), 0, -1)
    for y, (_, value, low, high, colour) in zip(positions, bars, strict=True):
        axes.barh(y, value - 1, left=1, color=colour, height=0.65)
        axes.plot([low, high], [y, y], color="black", linewidth=1.2)
        text = f"{value:.2f}" if value < 10 else f"{value:.1f}"
        at, side = (max(high, value), "left") if value >= 1 else (min(low, value), "right")
        axes.annotate(
            text,
            (at, y),
            (4 if side == "left" else -4, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    least, most = min(bar[2] for bar in bars), max(bar[3] for bar in bars)
    margin = max(1.35, (most / least) ** 0.1)  # a tenth of the axis, for the figures
    axes.set_xlim(min(0.7, least / margin), max(1.5, most * margin))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(list(positions), [bar[0] for bar in bars], fontsize=9)
    candidate, baseline = by_name(CANDIDATE).label, by_name(BASELINE).label
    axes.set_xlabel("times better, with 95 % interval")
    axes.set_title(f"{candidate} against {baseline} (left of 1: {baseline} is better)", fontsize=11, loc="right")
    axes.grid(True, axis="x", alpha=0.25)
    return figure


def _draw_bars(rows: Sequence[Row]) -> Any:
    """Draw every server's throughput at 100 clients, greatest first."""
    mine = [row for row in rows if row.pinned and row.scenario == "clients" and row.x == 100 and row.figures]
    if not any(by_name(row.server).peer for row in mine):
        return None
    mine.sort(key=lambda row: row.figures["achieved_rate"].median)
    figure, axes = _figure(8, 0.9 + 0.32 * len(mine))
    for y, row in enumerate(mine):
        spread = row.figures["achieved_rate"]
        server = by_name(row.server)
        bound = row.status == "bound"
        axes.barh(y, spread.median, color="white" if bound else server.colour, edgecolor=server.colour, height=0.65)
        axes.plot([spread.least, spread.greatest], [y, y], color="black", linewidth=1.2)
        text = f" {spread.median:,.0f}" + (" or more (generator-bound)" if bound else "")
        axes.text(max(spread.greatest, spread.median), y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(mine)), [by_name(row.server).label for row in mine], fontsize=9)
    axes.set_xlim(0, max(row.figures["achieved_rate"].greatest for row in mine) * 1.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel="messages a second, 100 clients, 64 bytes, closed loop, one processor")
    axes.grid(True, axis="x", alpha=0.25)
    return figure
