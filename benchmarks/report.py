"""Make a run's report: Markdown, pictures, one HTML page with all of it, and the README's block."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .catalog import BASELINE, CANDIDATE, RIVALS, STANDS_IN, by_name
from .findings import VERDICTS, Finding, find, find_main, write_sentences, write_standing
from .plots import draw_all
from .runner import GENERATOR_RATE, RETAKES, Sample, last_run, read_lines
from .scenarios import SCENARIOS
from .stats import Row, make_rows
from .tables import BRIEF, Table, make_comparison, make_summary, make_tables, to_markdown

__all__ = ["README_BEGIN", "README_BRIEF", "README_END", "refresh_readme", "write_report"]

README_BEGIN, README_END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
README_BRIEF = "<!-- benchmarks:begin brief -->"

_METHOD = (
    "Every server is a process of its own and sends back what it gets; every reply is compared with what was sent.",
    "Figures are medians, least and greatest in brackets; servers take turns, round after round. Ratios are of "
    "medians, their 95 % intervals by bootstrap over rounds. They say how many times as good as the baseline a server is: "
    "above 1 it is better, whichever way the figure counts.",
    "Ahead and behind: the interval leaves 1 out. Level: all of it is within 5 % of 1. Undecided: neither, or no ratio.",
    "A row in which a message was lost is void. A row in which the generator used over 90 % of its processor is "
    "generator-bound: its figures are a lower bound for the server and give no ratio. At a fixed rate such a turn is "
    f"first taken again, at most {RETAKES} times, and while the run has time to spare for that.",
    f"Capacity is what the slowest of a table's servers carried in closed loop just before, or {GENERATOR_RATE:,} "
    "messages a second if that is less: what the generator can send at fixed times.",
    "The processor time of records, of connections that are named by their end, and of broadcasts is what the server uses "
    "from the first byte until it is at rest again, divided by their number. Their client sends large pieces or at a fixed "
    "pace, and compares replies as a whole.",
    "Closed loop hides stalls (while a server stands still nothing is sent), so compare latencies in the open-loop "
    "tables, where they count from the moment a message was due.",
)

_MEANT = {"ahead": "Ahead", "level": "Level, within 5 %", "behind": "Behind", "undecided": "Undecided"}


def write_report(data: Path, folder: Path) -> list[Path]:
    """Write `report.md`, `report.html` and the pictures of a data file's last run into `folder`.

    Raises:
        ValueError: the file holds no run, or a run without any turn (caller).
    """
    lines, rows = _load(data)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    drawn = draw_all(rows, folder)
    found = _compare(lines, rows)
    page = _describe(lines, rows)
    page["comparison"] = make_comparison(found)
    page["others"] = {by_name(name).label: write_standing(f) for name, f in found.items() if name != BASELINE}
    (folder / "report.md").write_text(_markdown(page, drawn))
    (folder / "report.html").write_text(_html(page, drawn, folder))
    return [folder / "report.html", folder / "report.md", *(folder / f"{name}.svg" for name in drawn)]


def refresh_readme(readme: Path, data: Path, folder: Path) -> None:
    """Replace what stands between a page's two benchmark markers by the run's chart, table and findings.

    Where the first marker is README_BRIEF, chart and table are those of the few loads of `tables.BRIEF`.

    Raises:
        ValueError: the page lacks the markers (caller).
    """
    text = readme.read_text()
    is_brief = README_BRIEF in text
    first_line = README_BRIEF if is_brief else README_BEGIN
    begin, end = text.find(first_line), text.find(README_END)
    if begin < 0 or end < begin:
        raise ValueError(f"{readme.name} has no lines {README_BEGIN} and {README_END}")
    lines, rows = _load(data)
    page = _describe(lines, rows)
    where = Path(os.path.relpath(folder, readme.parent)).as_posix()
    candidate, baseline = by_name(CANDIDATE).label, by_name(BASELINE).label
    name = "brief" if is_brief else "ratios"
    block = [
        first_line,
        f"![How many times as good as {baseline} {candidate} is, by load]({where}/{name}.svg)",
        "",
        page["lead"],
        "",
        *(f"- {_MEANT[verdict]}: {said}." for verdict, said in page["standing"].items()),
        "",
        to_markdown(make_summary(rows, BRIEF) if is_brief else page["summary"]),
    ]
    if not is_brief:
        block += ["", f"All tables, the environment and the method: [{where}/report.md]({where}/report.md)."]
    readme.write_text(text[:begin] + "\n".join(block) + "\n" + text[end:])


def _load(data: Path) -> tuple[list[Sample], list[Row]]:
    lines = last_run(read_lines(data))
    rows = make_rows(lines)
    if not rows:
        raise ValueError(f"{data.name} holds no run with anything measured")
    return lines, rows


def _compare(lines: Sequence[Sample], rows: Sequence[Row]) -> dict[str, list[Finding]]:
    """Judge the candidate against each rival by the main figures: rival -> findings, where there are any."""
    found = {BASELINE: find_main(rows)}
    for rival in RIVALS:
        if rival != BASELINE:
            mine = [
                {**line, "server": STANDS_IN.get(line["server"], line["server"])}
                for line in lines
                if "cell" in line and line.get("server") in (CANDIDATE, rival, *STANDS_IN)
            ]
            found[rival] = find_main(make_rows(mine, rival), rival)
    return {rival: findings for rival, findings in found.items() if findings}


def _describe(lines: Sequence[Sample], rows: Sequence[Row]) -> dict[str, Any]:
    """Gather what both the Markdown and the HTML report say."""
    findings = find(rows)
    header = lines[0]
    candidate, baseline = by_name(CANDIDATE).label, by_name(BASELINE).label
    datagrams = (
        " (datagrams: ThreadingUDPServer)"
        if any(SCENARIOS[row.scenario].datagrams for row in rows if row.scenario in SCENARIOS)
        else ""
    )
    counts = {spread.count for row in rows if row.server in (CANDIDATE, BASELINE) for spread in row.figures.values()}
    turns = " to ".join(map(str, sorted({min(counts, default=0), max(counts, default=0)})))
    left_out = dict.fromkeys(
        f"{by_name(line['server']).label}{' at ' + line['cell'] if 'cell' in line else ''}: {line['why']}"
        if "server" in line
        else f"{line['cell']}: {line['why']}"
        for line in lines
        if line.get("kind") == "left out"
    )
    missing = [f"resumed at {line['started_at']}" for line in lines if line.get("kind") == "resumed"]
    return {
        "environment": header,
        "facts": {
            "command": f"{header['command']}",
            "started": header["started_at"],
            "commit": header.get("commit") or "unknown",
            "Python": header["python"],
            "system": header["system"],
            "processors": f"{header['processors']} x {header['processor']}",
            "memory": f"{header['memory_gib']} GiB",
            "versions": ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
            "TLS": header["openssl"],
            "pinning": header["pinning"],
            "fairness": header["fairness"],
        },
        "lead": f"{candidate} against {baseline}{datagrams}, measured by `{header['command']}` on {header['processors']} "
        f"processors ({header['processor']}), {header['python']}, uvloop {header['versions'].get('uvloop', '-')}. In "
        f"brackets: how many times as good {candidate} is, by the figure that the load is about; above 1 it is better. "
        f"Medians of {turns} turns, server and generator on a processor each but where it says all processors.",
        "standing": write_standing(find_main(rows)),
        "remarks": [*left_out, *missing],
        "method": _METHOD,
        "summary": make_summary(rows),
        **{verdict: write_sentences(findings, (verdict,)) for verdict in VERDICTS},
        "pinned": make_tables(rows, pinned=True),
        "free": make_tables(rows, pinned=False),
        "free_note": _describe_sharing(rows),
        "candidate": candidate,
        "baseline": baseline,
        "meant": _MEANT,
    }


def _describe_sharing(rows: Sequence[Row]) -> str:
    """Say how much of the processors server and generator used together where the server was free to choose."""
    sums = [
        row.server_cpu_share + row.generator_cpu_share
        for row in rows
        if not row.pinned and row.server_cpu_share and row.generator_cpu_share and row.scenario == "clients"
    ]
    if not sums:
        return ""
    text = f"As fast as it goes, server and generator together used {min(sums):.2f} to {max(sums):.2f} processors."
    if max(sums) < 1.1:
        text += " So the kernel ran both on one, and the other stood idle: compare these tables among themselves only."
    return text


def _markdown(page: dict[str, Any], drawn: dict[str, str]) -> str:
    def bullets(items: Sequence[str], otherwise: str) -> list[str]:
        return [f"- {item}" for item in items or [otherwise]]

    def section(tables: Sequence[Table]) -> list[str]:
        return [text for t in tables for text in (f"### {t.title}", "", t.note, "", to_markdown(t), "")]

    def standing(said: Mapping[str, str], end: str = "") -> list[str]:
        return [
            f"- **{_MEANT[verdict]}**: {text}.{end if verdict == 'undecided' else ''}" for verdict, text in said.items()
        ]

    parts = ["# Benchmarks", "", page["lead"], "", *standing(page["standing"], " [Why](#undecided)"), ""]
    if "ratios" in drawn:
        parts += [f"![{drawn['ratios']}](ratios.svg)", ""]
    parts += [f"## {page['candidate']} against others", ""]
    parts += ["How many times as good it is as the others, with the 95 % interval:", ""]
    parts += [to_markdown(page["comparison"]), ""]
    for label, said in page["others"].items():
        parts += [f"### Against {label}", "", *standing(said), ""]
    parts += [
        "## Undecided",
        "",
        f"Against {page['baseline']}: more turns, or a faster generator, would be needed.",
        "",
    ]
    parts += [*bullets(page["undecided"], "nothing"), ""]
    parts += [f"## Every figure against {page['baseline']}", ""]
    for verdict in VERDICTS[:-1]:
        parts += [f"### {_MEANT[verdict]}", "", *bullets(page[verdict], "nowhere"), ""]
    parts += ["## How to read this", "", *bullets(page["method"], ""), ""]
    parts += [f"- {name}: {'`' + value + '`' if name == 'command' else value}" for name, value in page["facts"].items()]
    parts += [""]
    if page["remarks"]:
        parts += ["Left out or interrupted:", "", *bullets(page["remarks"], ""), ""]
    parts += ["## Server and generator on a processor each", "", *section(page["pinned"])]
    if page["free"]:
        parts += ["## Server free to use all processors", "", page["free_note"], "", *section(page["free"])]
    parts += ["## Pictures", ""]
    parts += [text for name, title in drawn.items() for text in (f"### {title}", "", f"![{title}]({name}.svg)", "")]
    return "\n".join(parts).rstrip() + "\n"


def _html(page: dict[str, Any], drawn: dict[str, str], folder: Path) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pictures = {}
    for name, title in drawn.items():
        svg = (folder / f"{name}.svg").read_text()
        # Each picture has ids of its own, and an XML prologue that HTML does not want.
        svg = svg[svg.index("<svg") :].replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-")
        pictures[name] = (title, svg.replace('href="#', f'href="#{name}-'))
    return environment.get_template("report.html.j2").render(**page, pictures=pictures)
