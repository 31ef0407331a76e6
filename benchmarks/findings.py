"""What the rows say in words: where the candidate is ahead of the baseline, level with it or behind, and what is undecided."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .catalog import BASELINE, CANDIDATE, CANDIDATES, by_name
from .scenarios import SCENARIOS, name_cells
from .stats import FIGURES, Ratio, Row

__all__ = [
    "MAIN_FIGURE",
    "VERDICTS",
    "Finding",
    "describe_cell",
    "find",
    "find_main",
    "format_ratio",
    "label_of",
    "name_load",
    "title_of",
    "write_sentences",
    "write_standing",
]

VERDICTS = ("ahead", "level", "behind", "undecided")

# Besides its own measure, what a scenario is judged by; memory only where connections idle, for there it is the point.
_JUDGED = {"rate": ("achieved_rate", "p99_us", "server_cpu_us"), "cpu": ("server_cpu_us", "p99_us")}
_JUDGED["memory"] = ("connection_kib",)
_JUDGED["time"] = ("elapsed_s",)

MAIN_FIGURE = {"rate": "achieved_rate", "cpu": "server_cpu_us", "memory": "connection_kib", "time": "elapsed_s"}


@dataclass(frozen=True)
class Finding:
    """One figure of the candidate at one cell against the baseline.

    `verdict`: "level" (all of the interval is within 5 % of 1); else "ahead" or "behind" (the interval leaves 1 out); or
    "undecided" (it does not; or there is no ratio, for the reason in `why`).
    """

    row: Row
    figure: str
    verdict: str
    ratio: Ratio | None = None
    why: str = ""

    @property
    def is_main(self) -> bool:
        """Whether it is the figure that its scenario is about."""
        return self.figure == MAIN_FIGURE[SCENARIOS[self.row.scenario].measure]


def find(rows: Iterable[Row], candidates: Sequence[str] = CANDIDATES, baseline: str = BASELINE) -> list[Finding]:
    """Judge the candidates' rows, figure by figure; a cell without the baseline gives no finding.

    `rows` must have been made with the same baseline.
    """
    rows = list(rows)
    baselines = {(row.pinned, row.scenario, row.x): row for row in rows if row.server == baseline}
    found = []
    for row in rows:
        theirs = baselines.get((row.pinned, row.scenario, row.x))
        if row.server not in candidates or theirs is None or row.scenario not in SCENARIOS:
            continue
        for name in _JUDGED[SCENARIOS[row.scenario].measure]:
            ratio = row.ratios.get(name)
            if ratio is None:
                at_fault = row if row.status != "measured" else theirs
                if at_fault.status != "measured":
                    why = f"{label_of(at_fault.server, row.scenario)}: {at_fault.why}"
                    found.append(Finding(row, name, "undecided", None, why))
                elif name in row.figures and name in theirs.figures:  # there is no ratio to 0
                    at_fault = row if row.figures[name].least <= 0 else theirs
                    why = f"{label_of(at_fault.server, row.scenario)}: 0 {title_of(name, row.scenario)} in a turn"
                    found.append(Finding(row, name, "undecided", None, why))
                continue
            if ratio.is_level:
                verdict = "level"
            elif ratio.differs:
                verdict = "ahead" if ratio.value > 1 else "behind"
            else:
                verdict = "undecided"
            found.append(Finding(row, name, verdict, ratio))
    return found


def find_main(rows: Iterable[Row], baseline: str = BASELINE) -> list[Finding]:
    """Judge the candidate by the one figure that a scenario is about."""
    return [finding for finding in find(rows, (CANDIDATE,), baseline) if finding.is_main]


def label_of(server: str, scenario: str) -> str:
    """Say what a server is called in a scenario: with datagrams the standard library's has another name."""
    found = by_name(server)
    return (SCENARIOS[scenario].datagrams and found.datagram_label) or found.label


def title_of(figure: str, scenario: str) -> str:
    """Say what a figure is called in a scenario: what is counted may be messages, records or connections."""
    return FIGURES[figure].title.replace("message", SCENARIOS[scenario].unit)


def name_load(row: Row) -> str:
    """Say where a row stands on its scenario's axis."""
    return SCENARIOS[row.scenario].loads.get(row.x) or f"{row.x:,}"


def format_ratio(ratio: Ratio | None) -> str:
    """Write a ratio with its interval, to three digits, as `1.42 (1.38-1.47)`."""
    if ratio is None:
        return "-"
    return f"{_three(ratio.value)} ({_three(ratio.low)}-{_three(ratio.high)})"


def _three(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def describe_cell(row: Row) -> str:
    """Name a cell in a few words, as in `slow handler, 1,000 clients`."""
    return _describe_cells([row])


def _describe_cells(rows: Sequence[Row]) -> str:
    text = name_cells(SCENARIOS[rows[0].scenario], sorted(row.x for row in rows))
    return text if rows[0].pinned else f"{text}, all processors"


def write_standing(findings: Iterable[Finding]) -> Mapping[str, str]:
    """Write for each verdict one sentence that lists the loads, with their ratios in brackets, the greatest first.

    Loads of one scenario share a place in it. A load without a ratio stands there without one.
    """
    groups: dict[tuple[str, str, bool, bool], list[Finding]] = {}
    for finding in findings:
        row = finding.row
        groups.setdefault((finding.verdict, row.scenario, row.pinned, finding.ratio is None), []).append(finding)
    said: dict[str, list[tuple[float, str]]] = {verdict: [] for verdict in VERDICTS}
    for (verdict, *_), group in groups.items():
        values = sorted(finding.ratio.value for finding in group if finding.ratio is not None)
        text = _describe_cells([finding.row for finding in group])
        if values:
            ends = dict.fromkeys((_three(values[0]), _three(values[-1])))
            text += f" ({' to '.join(ends)})"
        said[verdict].append((-values[-1] if values else 0.0, text))
    return {verdict: "; ".join(text for _, text in sorted(parts)) or "nowhere" for verdict, parts in said.items()}


def write_sentences(findings: Iterable[Finding], verdicts: tuple[str, ...]) -> list[str]:
    """Write one sentence for each cell that has findings of these verdicts; figures that agree share it."""
    cells: dict[str, list[str]] = {}
    for finding in findings:
        if finding.verdict in verdicts:
            title = title_of(finding.figure, finding.row.scenario)
            said = finding.why if finding.ratio is None else f"{title} {format_ratio(finding.ratio)} times as good"
            server = finding.row.server
            cell = describe_cell(finding.row)
            parts = cells.setdefault(cell if server == CANDIDATE else f"{by_name(server).label}, {cell}", [])
            if said not in parts:
                parts.append(said)
    return [f"{cell}: {'; '.join(parts)}" for cell, parts in cells.items()]
