"""Pictures of a run: figures against clients, and the candidate's ratios to the baseline as bars.

Every picture has a title and units of its own. Its width, and its colours in a dark theme, are what `theme` says. Colours are
Okabe and Ito's, which colour-blind readers can tell apart; every line has a marker and a dash of its own as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .catalog import BASELINE, CANDIDATE, SERVERS, by_name
from .findings import Finding, describe_cell, find_main
from .scenarios import SCENARIOS
from .stats import Row
from .tables import BRIEF
from .theme import make_figure, save

__all__ = ["draw_all"]

_COLOURS = {"ahead": "#0072b2", "behind": "#d55e00", "level": "#999999", "undecided": "#999999"}


def draw_all(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Draw what there are rows for as SVG into `folder`; names without ending -> what each shows."""
    against = f"{by_name(CANDIDATE).label} against {by_name(BASELINE).label}"
    drawings: dict[str, tuple[str, Callable[[str], Any]]] = {
        "ratios": (against, lambda title: _draw_ratios(title, rows)),
        "brief": (f"{against}, a few loads", lambda title: _draw_ratios(title, rows, BRIEF)),
        "throughput": (
            "Messages a second against clients",
            lambda title: _draw_lines(title, rows, "clients", "achieved_rate", "messages a second"),
        ),
        "records": (
            "Processor time per record",
            lambda title: _draw_costs(title, rows, ("records",)),
        ),
        "connections": (
            "Processor time per connection",
            lambda title: _draw_costs(title, rows, ("server-first", "client-first")),
        ),
        "broadcast": (
            "Processor time per receiver",
            lambda title: _draw_costs(title, rows, ("broadcast",)),
        ),
        "tls": (
            "Processor time per TLS message",
            lambda title: _draw_costs(title, rows, ("tls", "tls-16k")),
        ),
        "slow": (
            "A slow handler: messages a second against clients",
            lambda title: _draw_lines(title, rows, "slow", "achieved_rate", "messages a second", ideal=10.0),
        ),
        "latency": (
            "99th percentile of latency at a fixed rate",
            lambda title: _draw_lines(title, rows, "rate", "p99_us", "p99 latency, microseconds", linear_x=True),
        ),
        "processor": (
            "Processor time per message against clients",
            lambda title: _draw_lines(
                title, rows, "clients", "server_cpu_us", "processor time per message, microseconds"
            ),
        ),
        "memory": (
            "Memory against idle connections",
            lambda title: _draw_lines(title, rows, "idle", "memory_kib", "memory of the server, MiB", scale=1 / 1024),
        ),
        "peers": ("Messages a second of every server, 100 clients", lambda title: _draw_bars(title, rows)),
    }
    drawn = {}
    for name, (title, draw) in drawings.items():
        figure = draw(title)
        if figure is not None:
            drawn[name] = title
            save(figure, folder / f"{name}.svg")
    return drawn


def _draw_lines(
    title: str,
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
    figure, axes = make_figure(title, 5.6)
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
    axes.set_xlabel(SCENARIOS[scenario].axis, fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    if any(row.status == "bound" for row in mine):
        axes.plot([], [], "o", mfc="white", mec="#555555", ms=9, linestyle="none", label="generator-bound")
    axes.grid(True, which="major", alpha=0.25)
    figure.legend(loc="outside lower left", ncols=2, fontsize=7, frameon=False, columnspacing=0.8, handlelength=2)
    return figure


def _draw_costs(title: str, rows: Sequence[Row], scenarios: Sequence[str]) -> Any:
    """Draw what each server uses for one record, connection or message, a panel for each load, least to greatest as a line.

    Behind a bar: its figure and how many times as good as the baseline it is; white where the generator set the pace.
    """
    mine = [row for row in rows if row.pinned and row.scenario in scenarios and "server_cpu_us" in row.figures]
    loads = sorted({(scenarios.index(row.scenario), row.x) for row in mine})
    if not loads:
        return None
    panels = [
        sorted(
            (row for row in mine if (scenarios.index(row.scenario), row.x) == load),
            key=lambda row: -[server.name for server in SERVERS].index(row.server),
        )
        for load in loads
    ]
    height = 1.1 + sum(0.65 + 0.2 * len(panel) for panel in panels)
    figure, every = make_figure(f"{title}, microseconds: shorter is better", height, len(panels))
    from matplotlib.ticker import MaxNLocator

    for axes, panel in zip(every if len(panels) > 1 else [every], panels, strict=True):
        medians = sorted(row.figures["server_cpu_us"].median for row in panel)
        # One that costs many times what the others do is cut at the edge, or nothing would be seen of them.
        most = medians[-2] * 1.3 if len(medians) > 2 and medians[-1] > 4 * medians[-2] else medians[-1]
        for y, row in enumerate(panel):
            spread, ratio, server = row.figures["server_cpu_us"], row.ratios.get("server_cpu_us"), by_name(row.server)
            bound = row.status == "bound"
            axes.barh(y, spread.median, color="white" if bound else server.colour, edgecolor=server.colour, height=0.7)
            is_cut = spread.median > most
            if not is_cut:
                axes.plot([spread.least, min(spread.greatest, 1.3 * most)], [y, y], color="#555555", linewidth=1)
            text = f"{spread.median:,.0f}" if spread.median >= 100 else f"{spread.median:.3g}"
            if ratio is not None:
                text += f" ({ratio.value:.2f})" if ratio.value < 10 else f" ({ratio.value:.0f})"
            if is_cut:
                text += ", cut"
            axes.annotate(
                text,
                (1.75 * most if is_cut else min(max(spread.greatest, spread.median), 1.3 * most), y),
                (-4 if is_cut else 4, 0),
                textcoords="offset points",
                ha="right" if is_cut else "left",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
        axes.set_yticks(range(len(panel)), [by_name(row.server).label for row in panel], fontsize=8)
        axes.set_xlim(0, 1.75 * most)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_title(describe_cell(panel[0]), fontsize=9, loc="right")
        axes.grid(True, axis="x", alpha=0.25)
    unit = SCENARIOS[scenarios[0]].unit
    figure.supxlabel(
        f"microseconds of the server's processor per {unit}\n(in brackets: times as good as {by_name(BASELINE).label})",
        fontsize=8,
    )
    return figure


def _draw_ratios(title: str, rows: Sequence[Row], loads: Sequence[tuple[str, int]] | None = None) -> Any:
    """Draw the candidate's advantage over the baseline: to the right it is better, whichever way the figure counts.

    With `loads`, given as (scenario, x), of these cells alone, and of the pinned ones.
    """
    found = [
        finding
        for finding in sorted(find_main(rows), key=lambda finding: not finding.row.pinned)
        if finding.ratio is not None
        and (loads is None or (finding.row.pinned and (finding.row.scenario, finding.row.x) in loads))
    ]
    if not found:
        return None
    heads = {id(group[0]): text for text, group in _split_by_processors(found) if group}
    figure, axes = make_figure(title, 1.35 + 0.36 * len(found) + 0.36 * len(heads))
    what = {"achieved_rate": "messages/s", "server_cpu_us": "processor time"}
    what |= {"connection_kib": "memory", "elapsed_s": "time"}
    y = top = len(found) + len(heads)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
    for finding in found:
        ratio, row = finding.ratio, finding.row
        assert ratio is not None
        value, low, high = ratio.value, ratio.low, ratio.high
        write = partial(axes.text, 0, transform=axes.get_yaxis_transform(), va="bottom", bbox=paper)
        if id(finding) in heads:
            write(y=y + 0.1, s=heads[id(finding)], fontsize=8, fontweight="bold")
            y -= 1
        cell = describe_cell(replace(row, pinned=True))
        write(y=y + 0.25, s=f"{cell}: {what[finding.figure]}", fontsize=7.5)  # above its bar
        axes.barh(y, value - 1, left=1, color=_COLOURS[finding.verdict], height=0.4)
        axes.plot([low, high], [y, y], color="black", linewidth=1.2)
        at, side = (max(high, value), "left") if value >= 1 else (min(low, value), "right")
        axes.annotate(
            f"{value:.2f}" if value < 10 else f"{value:.1f}",
            (at, y),
            (4 if side == "left" else -4, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=8,
            bbox=paper,
        )
        y -= 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ratios = [finding.ratio for finding in found if finding.ratio is not None]
    least, most = min(ratio.low for ratio in ratios), max(ratio.high for ratio in ratios)
    margin = max(1.35, (most / least) ** 0.13)  # of the axis, for the figures
    axes.set_xlim(min(0.7, least / margin), max(1.5, most * margin))
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks([])
    axes.set_ylim(0.5, top + 0.9)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(
        f"times as good, with 95 % interval\nleft of 1 {by_name(BASELINE).label} is better, right of it aioecho;\n"
        "blue: ahead, orange: behind, grey: level or undecided",
        fontsize=8,
    )
    axes.grid(True, axis="x", alpha=0.25)
    return figure


def _split_by_processors(found: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    return [
        (text, [finding for finding in found if finding.row.pinned == pinned])
        for pinned, text in (
            (True, "Server and generator on a processor each"),
            (False, "Server free to use all processors"),
        )
    ]


def _draw_bars(title: str, rows: Sequence[Row]) -> Any:
    """Draw every server's throughput at 100 clients, greatest first."""
    mine = [row for row in rows if row.pinned and row.scenario == "clients" and row.x == 100 and row.figures]
    if not any(by_name(row.server).peer for row in mine):
        return None
    from matplotlib.ticker import MaxNLocator

    mine.sort(key=lambda row: row.figures["achieved_rate"].median)
    figure, axes = make_figure(title, 1.1 + 0.27 * len(mine))
    for y, row in enumerate(mine):
        spread = row.figures["achieved_rate"]
        server = by_name(row.server)
        bound = row.status == "bound"
        axes.barh(y, spread.median, color="white" if bound else server.colour, edgecolor=server.colour, height=0.65)
        axes.plot([spread.least, spread.greatest], [y, y], color="black", linewidth=1.2)
        text = f" {spread.median:,.0f}" + (" or more" if bound else "")
        axes.text(max(spread.greatest, spread.median), y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(mine)), [by_name(row.server).label for row in mine], fontsize=8)
    axes.set_xlim(0, max(row.figures["achieved_rate"].greatest for row in mine) * 1.5)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.set_xlabel(
        "messages a second, 64 bytes, closed loop, one processor\n(or more: white bars, the generator set the pace)",
        fontsize=8,
        loc="right",
    )
    axes.grid(True, axis="x", alpha=0.25)
    return figure
