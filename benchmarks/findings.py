"""What the rows say in words: where the candidate wins, where the baseline is as good or better, what stays open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .catalog import BASELINE, CANDIDATE, CANDIDATES, by_name
from .plan import SCENARIOS
from .stats import FIGURES, Ratio, Row

__all__ = [
    "MAIN_FIGURE",
    "Finding",
    "describe_cell",
    "find",
    "format_ratio",
    "format_si",
    "label_of",
    "name_load",
    "title_of",
    "write_sentences",
]

# Besides its own measure, what a scenario is judged by; memory only where connections idle, for there it is the point.
_JUDGED = {"rate": ("achieved_rate", "p99_us", "server_cpu_us"), "cpu": ("server_cpu_us", "p99_us")}
_JUDGED["memory"] = ("connection_kib",)
_JUDGED["time"] = ("elapsed_s",)

MAIN_FIGURE = {"rate": "achieved_rate", "cpu": "server_cpu_us", "memory": "connection_kib", "time": "elapsed_s"}


@dataclass(frozen=True)
class Finding:
    """One figure of the candidate at one cell against the baseline.

    `verdict`: "better", "worse", "same" (the interval holds 1), or "open" (no ratio, for the reason in `why`).
    """

    row: Row
    figure: str
    verdict: str
    ratio: Ratio | None = None
    why: str = ""


def find(rows: Iterable[Row], candidates: Sequence[str] = CANDIDATES) -> list[Finding]:
    """Judge the candidates' rows, figure by figure; a cell without the baseline gives no finding."""
    rows = list(rows)
    baselines = {(row.pinned, row.scenario, row.x): row for row in rows if row.server == BASELINE}
    found = []
    for row in rows:
        baseline = baselines.get((row.pinned, row.scenario, row.x))
        if row.server not in candidates or baseline is None or row.scenario not in SCENARIOS:
            continue
        for name in _JUDGED[SCENARIOS[row.scenario].measure]:
            ratio = row.ratios.get(name)
            if ratio is None:
                at_fault = row if row.status != "measured" else baseline
                if at_fault.status != "measured":
                    why = f"{label_of(at_fault.server, row.scenario)}: {at_fault.why}"
                    found.append(Finding(row, name, "open", None, why))
                continue
            verdict = "same" if not ratio.differs else "better" if ratio.value > 1 else "worse"
            found.append(Finding(row, name, verdict, ratio))
    return found


def label_of(server: str, scenario: str) -> str:
    """Say what a server is called in a scenario: with datagrams the standard library's has another name."""
    found = by_name(server)
    return (SCENARIOS[scenario].datagrams and found.datagram_label) or found.label


def title_of(figure: str, scenario: str) -> str:
    """Say what a figure is called in a scenario: what is counted may be messages, records or connections."""
    return FIGURES[figure].title.replace("message", SCENARIOS[scenario].unit)


def name_load(row: Row) -> str:
    """Say where a row stands on its scenario's axis."""
    return SCENARIOS[row.scenario].loads.get(row.x) or format_si(row.x)


def format_si(number: float) -> str:
    """Write a count as people read it: 64, 1,000, 64 KiB."""
    return f"{number:,.0f}"


def format_ratio(ratio: Ratio | None) -> str:
    """Write a ratio with its interval, to three digits, as `1.42 (1.38-1.47)`."""
    if ratio is None:
        return "-"
    return f"{_three(ratio.value)} ({_three(ratio.low)}-{_three(ratio.high)})"


def _three(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def describe_cell(row: Row) -> str:
    """Name a cell in a few words, as in `slow handler, 1,000 clients`."""
    short = {
        "clients": "as fast as it goes, {} client{s}",
        "rate": "fixed rate at {} % of capacity",
        "many": "fixed rate, {} clients",
        "slow": "slow handler, {} clients",
        "sizes": "messages of {} bytes at a fixed rate",
        "lines": "lines as fast as it goes, {} in flight",
        "lines-rate": "lines at {} % of capacity",
        "churn": "a connection per message, {} at a time",
        "arrivals": "a connection per message at {} % of capacity",
        "tls": "TLS at a fixed rate, {} client{s}",
        "tls-16k": "TLS, 16 KiB messages, {} client{s}",
        "records": "records, {}",
        "server-first": "connections that the server ends, {} at a time",
        "client-first": "connections that the client ends, {} at a time",
        "idle": "{} idle connections",
        "udp": "datagrams as fast as it goes, {} client{s}",
        "udp-rate": "datagrams at {} % of capacity",
        "example": "the tutorials' example, {} clients at once",
    }
    text = short.get(row.scenario, row.scenario + " {}").format(name_load(row), s="" if row.x == 1 else "s")
    return text if row.pinned else f"{text}, all processors"


def write_sentences(findings: Iterable[Finding], verdicts: tuple[str, ...], *, brief: bool = False) -> list[str]:
    """Write one sentence for each cell that has findings of these verdicts; figures that agree share it.

    With `brief`, that nothing could be shown is said only of the figure that the scenario is about.
    """
    cells: dict[str, list[str]] = {}
    for finding in findings:
        is_main = finding.figure == MAIN_FIGURE[SCENARIOS[finding.row.scenario].measure]
        if finding.verdict in verdicts and (is_main or finding.verdict != "same" or not brief):
            title = title_of(finding.figure, finding.row.scenario)
            said = finding.why if finding.ratio is None else f"{title} {format_ratio(finding.ratio)} times as good"
            if finding.verdict == "same":
                said += ", no difference shown"
            server = finding.row.server
            cell = describe_cell(finding.row)
            parts = cells.setdefault(cell if server == CANDIDATE else f"{by_name(server).label}, {cell}", [])
            if said not in parts:
                parts.append(said)
    return [f"{cell}: {'; '.join(parts)}" for cell, parts in cells.items()]
