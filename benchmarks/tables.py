"""Rows as tables: which columns a scenario shows, and how a figure, its spread and its ratio are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .catalog import BASELINE, CANDIDATE, SERVERS, by_name
from .findings import Finding, describe_cell, find_main, format_ratio, label_of, name_load, title_of
from .scenarios import SCENARIOS
from .stats import FIGURES, Row, Spread

__all__ = ["BRIEF", "Table", "make_comparison", "make_summary", "make_tables", "to_markdown"]

BRIEF = (("clients", 1), ("rate", 50), ("arrivals", 50), ("slow", 5000), ("udp-rate", 50), ("idle", 1000))
"""The loads of a brief summary, as (scenario, x): those in which the two differ most, either way, and the plainest."""

_ORDER = {server.name: i for i, server in enumerate(SERVERS)}


@dataclass(frozen=True)
class Table:
    """A titled table of text; `numeric` says which columns align right."""

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]


def make_tables(rows: Sequence[Row], *, pinned: bool) -> list[Table]:
    """Make one table for each scenario that has rows, in the scenarios' order."""
    tables = []
    for scenario in SCENARIOS.values():
        mine = sorted(
            (row for row in rows if row.scenario == scenario.name and row.pinned == pinned),
            key=lambda row: (row.x, _ORDER.get(row.server, 0)),
        )
        if mine:
            tables.append(_make_table(mine))
    return tables


def _make_table(rows: Sequence[Row]) -> Table:
    scenario = SCENARIOS[rows[0].scenario]
    baseline = label_of(BASELINE, scenario.name)
    ratios: tuple[str, ...]
    if scenario.measure == "memory":
        columns = {"memory, MiB": "memory_kib", "KiB per connection": "connection_kib"}
        ratios = ("connection_kib",)
    elif scenario.measure == "time":
        columns = {"seconds": "elapsed_s"}
        ratios = ("elapsed_s",)
    else:
        columns = {f"{scenario.unit}s/s": "achieved_rate", "p50, us": "p50_us", "p99, us": "p99_us"}
        columns |= {f"processor us/{scenario.unit}": "server_cpu_us", "memory, MiB": "memory_kib"}
        ratios = ("achieved_rate", "server_cpu_us") if scenario.measure == "rate" else ("server_cpu_us", "p99_us")
    has_figures = any(row.figures for row in rows)
    known = {name for row in rows for name in row.figures}  # not every kind of load has latencies
    columns = {title: name for title, name in columns.items() if name in known or not has_figures}
    ratios = tuple(name for name in ratios if name in known or not has_figures)
    names = {"achieved_rate": f"{scenario.unit}s", "server_cpu_us": "processor time", "p99_us": "p99"}
    names |= {"connection_kib": "per connection", "elapsed_s": "seconds"}
    header = (
        scenario.axis,
        "server",
        *columns,
        *(f"{names[name]}, times as good as {baseline}" for name in ratios),
    )
    body, last = [], None
    for row in rows:
        x = "" if row.x == last else name_load(row)
        last = row.x
        label = label_of(row.server, scenario.name)
        if row.status == "void":
            body.append((x, label, f"void: {row.why}", *[""] * (len(header) - 3)))
            continue
        cells = [_write(row.figures.get(name), name) for name in columns.values()]
        if row.server == BASELINE and row.status == "measured":
            compared = ["1"] * len(ratios)
        elif row.status == "bound":
            compared = ["generator-bound"] * len(ratios)
        else:
            compared = [format_ratio(row.ratios.get(name)) for name in ratios]
        body.append((x, label, *cells, *compared))
    offered = sorted({(row.x, row.offered_rate) for row in rows if row.offered_rate})
    note = scenario.question
    if offered:
        rates = ", ".join(f"{rate:,.0f}" for _, rate in offered)
        note += f" Offered, messages a second: {rates}."
    return Table(scenario.title, note, header, tuple(body), (not scenario.loads, False, *[True] * (len(header) - 2)))


def _write(spread: Spread | None, name: str) -> str:
    """Write a median with least and greatest in brackets."""
    if spread is None:
        return "-"
    scale, digits = (1024, 1) if name == "memory_kib" else (1, 0)
    if name in ("server_cpu_us", "connection_kib", "elapsed_s"):
        digits = 2 if spread.median >= 1 else 3
    median, least, greatest = (
        f"{value / scale:,.{digits}f}" for value in (spread.median, spread.least, spread.greatest)
    )
    return f"{median} ({least}-{greatest})"


def make_summary(rows: Sequence[Row], loads: Sequence[tuple[str, int]] | None = None) -> Table:
    """Make the short table for a README: the candidate against the baseline, a line a cell, its main figure.

    With `loads`, given as (scenario, x), of these cells alone, and of all of them: also where there is no ratio.
    """
    body = []
    baselines = {(row.pinned, row.scenario, row.x): row for row in rows if row.server == BASELINE}
    for finding in find_main(rows):
        row = finding.row
        if loads is not None and (row.scenario, row.x) not in loads:
            continue
        if not row.pinned or (finding.ratio is None and loads is None):
            continue
        both = (
            baselines[row.pinned, row.scenario, row.x].figures.get(finding.figure),
            row.figures.get(finding.figure),
        )
        least = min((spread.median for spread in both if spread is not None), default=0)
        digits = 0 if least >= 1000 else 1 if least >= 1 else 2
        what = f"{title_of(finding.figure, row.scenario)}, {FIGURES[finding.figure].unit}"
        body.append(
            (
                describe_cell(row),
                what,
                *("void" if spread is None else f"{spread.median:,.{digits}f}" for spread in both),
                "no ratio" if finding.ratio is None else format_ratio(finding.ratio),
            )
        )
    header = (
        "load",
        "figure",
        f"{by_name(BASELINE).label} (datagrams: ThreadingUDPServer)"
        if any(SCENARIOS[row.scenario].datagrams for row in rows)
        else by_name(BASELINE).label,
        by_name(CANDIDATE).label,
        "times as good (95 % interval)",
    )
    return Table("", "", header, tuple(body), (False, False, True, True, True))


def make_comparison(found: Mapping[str, Sequence[Finding]]) -> Table:
    """Make the table of how many times as good the candidate is as each rival: rival -> findings by the main figure."""
    cells: dict[tuple[bool, str, int], dict[str, Finding]] = {}
    for rival, findings in found.items():
        for finding in findings:
            row = finding.row
            cells.setdefault((not row.pinned, row.scenario, row.x), {})[rival] = finding
    order = list(SCENARIOS)
    body = []
    for _, mine in sorted(cells.items(), key=lambda item: (item[0][0], order.index(item[0][1]), item[0][2])):
        first = next(iter(mine.values()))
        what = title_of(first.figure, first.row.scenario)
        ratios = (_write_verdict(mine.get(rival)) for rival in found)
        body.append((describe_cell(first.row), what, *ratios))
    header = ("load", "figure", *(by_name(rival).label for rival in found))
    return Table("", "", header, tuple(body), (False, False, *[True] * len(found)))


def _write_verdict(finding: Finding | None) -> str:
    if finding is None:
        return ""
    return "no ratio" if finding.ratio is None else f"{format_ratio(finding.ratio)} {finding.verdict}"


def to_markdown(table: Table) -> str:
    """Write a table in GitHub's Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|" + "|".join("--:" if numeric else "---" for numeric in table.numeric) + "|"
    return "\n".join([line(table.header), rule, *map(line, table.rows)])
