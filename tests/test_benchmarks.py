"""The benchmark suite: its arithmetic on known data, its data file, its plan, its report, and one small real run."""

import contextlib
import importlib.util
import json
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from timing import in_time, more_than

pytest.importorskip("numpy")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("rich")

from click.testing import CliRunner

from benchmarks import crowd, report, runner
from benchmarks.audience import Audience
from benchmarks.burst import send_burst
from benchmarks.catalog import BASELINE, CANDIDATE, SERVERS, by_name, find_missing
from benchmarks.cli import main
from benchmarks.findings import find, find_main, write_sentences, write_standing
from benchmarks.plan import PEER_ROUNDS, Cell, Plan, make_plan
from benchmarks.processes import ROOT, ServerProcess
from benchmarks.scenarios import SCENARIOS
from benchmarks.senders import SENDERS, make_record, send
from benchmarks.stats import compute_ratio, make_rows, summarise
from benchmarks.tables import make_summary, make_tables, to_markdown

HEADER = {
    "kind": "run",
    "plan": "quick",
    "command": "python -m benchmarks run --quick",
    "started_at": "2026-01-02T03:04:05Z",
    "commit": None,
    "python": "CPython 3.11.7",
    "system": "Linux",
    "processor": "a <fast> one",
    "processors": 2,
    "memory_gib": 4.0,
    "openssl": "OpenSSL 3",
    "versions": {"uvloop": "0.22"},
    "pinning": "pinned",
    "fairness": "alike",
}


def sample(server, repeat, rate, cell="pinned/clients/100", **more):
    figures = {"achieved_rate": rate, "p50_us": 100.0, "p99_us": 200.0, "server_cpu_us": 1e6 / rate, "memory_kib": 2048}
    figures |= {"errors": 0, "problem": None, "generator_bound": False, "generator_cpu_share": 0.5}
    return {"kind": "sample", "cell": cell, "server": server, "repeat": repeat, **figures, **more}


def samples(server, rates, **more):
    return [sample(server, repeat, rate, **more) for repeat, rate in enumerate(rates)]


def row_of(rows, server):
    return next(row for row in rows if row.server == server)


# Arithmetic.


def test_a_summary_is_median_least_and_greatest():
    spread = summarise([5, 1, 2, 9, 3])
    assert (spread.median, spread.least, spread.greatest, spread.count) == (3, 1, 9, 5)
    with pytest.raises(ValueError, match="no values"):
        summarise([])


def test_a_ratio_of_constants_has_no_width():
    ratio = compute_ratio([30, 30, 30], [10, 10, 10])
    assert (ratio.value, ratio.low, ratio.high) == (3, 3, 3)
    assert ratio.differs


def test_a_ratio_resamples_rounds_and_not_sides():
    # Every round has ratio 2, though both sides vary by a factor of 16.
    ratio = compute_ratio([2, 4, 8, 16, 32], [1, 2, 4, 8, 16])
    assert (ratio.low, ratio.value, ratio.high) == (2, 2, 2)


def test_the_interval_is_the_bootstraps():
    # Medians of 3 draws out of rounds 1, 2, 3 over a constant: 1 in 7/27, 2 in 13/27, 3 in 7/27.
    ratio = compute_ratio([1, 2, 3], [1, 1, 1])
    assert (ratio.low, ratio.value, ratio.high) == (1, 2, 3)
    assert not ratio.differs
    # One of five rounds stands out: to be the median it must be drawn 3 times of 5, which is 5.8 %, over 2.5 %.
    assert compute_ratio([1, 1, 1, 1, 9], [1] * 5).high == 9
    assert compute_ratio([1, 1, 1, 1, 9], [1] * 5).low == 1
    # Of nine rounds 5 draws are needed, 0.14 %: no longer in the interval.
    assert compute_ratio([1] * 8 + [9], [1] * 9).high == 1


@pytest.mark.parametrize(("a", "b"), [([], []), ([1], [1, 2]), ([1], [0])])
def test_a_ratio_of_nothing_is_refused(a, b):
    with pytest.raises(ValueError, match=r"expected as many|positive"):
        compute_ratio(a, b)


def test_rows_carry_medians_and_ratios_against_the_baseline():
    rows = make_rows([*samples("aioecho", [20, 40, 60]), *samples(BASELINE, [10, 20, 30])])
    ours, theirs = row_of(rows, "aioecho"), row_of(rows, BASELINE)
    assert ours.status == theirs.status == "measured"
    assert ours.figures["achieved_rate"].median == 40
    assert ours.ratios["achieved_rate"].value == 2
    assert ours.ratios["server_cpu_us"].value == pytest.approx(2), "half the cost is twice as good"
    assert ours.ratios["p99_us"].value == 1
    assert theirs.ratios == {}


def test_a_figure_of_nought_gives_no_ratio():
    rows = make_rows([*samples("aioecho", [20], server_cpu_us=0.0), *samples(BASELINE, [10])])
    assert "server_cpu_us" not in row_of(rows, "aioecho").ratios
    assert row_of(rows, "aioecho").ratios["achieved_rate"].value == 2


def test_a_row_with_an_error_in_any_repeat_is_void():
    broken = [*samples("aioecho", [20, 40]), sample("aioecho", 2, 60, errors=3, problem="reset: by peer")]
    row = row_of(make_rows([*broken, *samples(BASELINE, [10, 20, 30])]), "aioecho")
    assert (row.status, row.why, row.figures, row.ratios) == ("void", "reset: by peer", {}, {})


def test_nothing_is_compared_with_a_void_baseline():
    rows = make_rows([*samples("aioecho", [20, 40]), *samples(BASELINE, [10, 20], errors=1)])
    assert row_of(rows, "aioecho").ratios == {}
    assert row_of(rows, BASELINE).status == "void"


def test_a_baseline_that_has_answered_nothing_in_a_turn_is_said_to():
    nothing = sample(BASELINE, 1, 1.0) | {"achieved_rate": 0.0, "p50_us": None, "p99_us": None}
    del nothing["server_cpu_us"]
    rows = make_rows([*samples("aioecho", [20, 40]), sample(BASELINE, 0, 10), nothing])
    finding = next(finding for finding in find(rows) if finding.is_main)
    assert (finding.verdict, finding.ratio) == ("undecided", None)
    assert finding.why == "ThreadingTCPServer: 0 messages in a turn"
    assert "no ratio" in to_markdown(make_summary(rows, [("clients", 100)]))


def test_a_generator_bound_row_keeps_its_figures_and_gives_no_ratio():
    bound = [*samples("aioecho", [20, 40]), sample("aioecho", 2, 60, generator_bound=True)]
    rows = make_rows([*bound, *samples(BASELINE, [10, 20, 30]), *samples("streams", [5, 5, 5])])
    row = row_of(rows, "aioecho")
    assert (row.status, row.ratios) == ("bound", {})
    assert row.figures["achieved_rate"].median == 40
    assert "1 of 3 repeats" in row.why
    assert row_of(rows, "streams").ratios
    rows = make_rows([*samples("aioecho", [20]), *samples(BASELINE, [10], generator_bound=True)])
    assert row_of(rows, "aioecho").ratios == {}


def test_a_ratio_uses_the_rounds_that_both_took():
    rows = make_rows([*samples("aioecho", [20, 40, 60]), *samples(BASELINE, [10, 10])])
    assert row_of(rows, "aioecho").ratios["achieved_rate"].value == 3
    assert row_of(rows, "aioecho").figures["achieved_rate"].count == 3


# The data file.


def test_lines_cut_short_are_left_out_and_the_last_run_is_found(tmp_path):
    path = tmp_path / "data.jsonl"
    old, new = samples("aioecho", [1]), samples("aioecho", [2, 3])
    text = "\n".join(map(json.dumps, [HEADER, *old, HEADER, *new])) + '\n{"kind": "sam'
    path.write_text(text)
    lines = runner.last_run(runner.read_lines(path))
    assert [line.get("achieved_rate") for line in lines] == [None, 2, 3]
    assert runner.find_done(lines) == {("pinned/clients/100", "aioecho", 0), ("pinned/clients/100", "aioecho", 1)}
    assert runner.last_run([]) == []


@pytest.fixture
def counted_plan(monkeypatch):
    """A plan of four turns whose measuring only counts."""
    cell = Cell(scenario="clients", x=1, clients=1, servers=("streams", "threading"))
    taken = []

    def measure(self, cell, servers, name):
        if len(taken) == measure.interrupt_at:
            raise KeyboardInterrupt
        taken.append(name)
        return {"achieved_rate": 1.0, "errors": 0}

    measure.interrupt_at = None
    monkeypatch.setattr(runner._Run, "_start", lambda self, cell, names, stack: dict.fromkeys(names))
    monkeypatch.setattr(runner._Run, "_measure", measure)
    return Plan("quick", (cell,), 2, 0.1, 0.0), taken, measure


def test_servers_take_turns(counted_plan, tmp_path):
    plan, taken, _ = counted_plan
    runner.run_plan(plan, tmp_path / "data.jsonl", HEADER)
    assert taken == ["streams", "threading", "streams", "threading"]


def test_an_interrupted_run_loses_nothing_and_resumes(counted_plan, tmp_path):
    plan, taken, measure = counted_plan
    path = tmp_path / "data.jsonl"
    measure.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        runner.run_plan(plan, path, HEADER)
    with path.open("a") as file:
        file.write('{"kind": "sample", "cell": "pinn')  # as if it had been killed in mid-write
    assert len(runner.find_done(runner.read_lines(path))) == 3
    measure.interrupt_at = None
    runner.run_plan(plan, path, HEADER, resume=True)
    assert taken == ["streams", "threading", "streams", "threading"], "no turn was taken twice"
    lines = runner.last_run(runner.read_lines(path))
    assert [line["kind"] for line in lines] == ["run", "sample", "sample", "sample", "resumed", "sample"]
    runner.run_plan(plan, path, HEADER)
    assert len(taken) == 8, "without resume a new run begins"
    assert len(runner.read_lines(path)) == 11, "and the old one stays in the file"


def test_a_run_of_another_plan_is_not_resumed(counted_plan, tmp_path):
    plan, _, _ = counted_plan
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**HEADER, "plan": "full"}) + "\n")
    with pytest.raises(ValueError, match="'full', not 'quick'"):
        runner.run_plan(plan, path, HEADER, resume=True)


# The plan.


@pytest.mark.parametrize(("name", "minutes"), [("quick", 3), ("full", 35)])
def test_a_plan_fits_its_time_and_repeats_enough(name, minutes):
    plan = make_plan(name)
    assert plan.total_s < minutes * 60
    assert plan.total_s * (1.04 + runner.RETAKEN_SHARE) < 38 * 60, "4 % more than the estimate, and what is taken again"
    assert plan.repeats >= 5
    keys = [cell.key for cell in plan.cells]
    assert len(set(keys)) == len(keys)
    assert any(not cell.pinned for cell in plan.cells)
    for cell in plan.cells:
        assert BASELINE in cell.servers
        assert CANDIDATE in cell.servers
        assert plan.count_rounds(cell, CANDIDATE) == plan.count_rounds(cell, BASELINE) >= 3
        for server in map(by_name, cell.servers):
            assert cell.churn or cell.clients <= server.max_clients


def test_the_full_plan_asks_every_question():
    assert {cell.scenario for cell in make_plan("full").cells} == SCENARIOS.keys()
    assert {cell.clients for cell in make_plan("full").cells if cell.scenario == "clients"} == {1, 10, 100, 1000, 5000}


def test_a_plan_can_be_narrowed():
    plan = make_plan("full", ["slow"], ["aioecho", "threading"])
    assert {cell.scenario for cell in plan.cells} == {"slow"}
    assert {cell.servers for cell in plan.cells} == {("aioecho", "threading")}


def test_every_question_is_put_to_socketservers_servers_asyncio_streams_and_a_bare_protocol():
    asked: dict[str, set[str]] = {}
    for cell in make_plan("full").cells:
        asked.setdefault(cell.scenario, set()).update(cell.servers)
    for scenario, servers in asked.items():
        missing = {"threading", "forking", "streams", "protocol"} - servers
        if SCENARIOS[scenario].datagrams:
            missing -= {"streams"}  # asyncio has none of datagrams
        if scenario == "records":
            missing -= {"protocol"}
            assert "batch" in servers, "a bare protocol that splits a whole chunk"
        if scenario in ("many", "arrivals", "udp-rate", "broadcast"):
            missing -= {"forking"}  # too many clients or too few a second for it; processes share no list of clients
        assert not missing, scenario


def test_peers_and_what_hardly_differs_take_fewer_turns():
    cell = Cell(scenario="idle", x=1, servers=("aioecho", "threading", "trio"), rounds=4)
    plan = Plan("full", (cell,), 5, 1.0, 0.0)
    assert [plan.count_rounds(cell, name) for name in cell.servers] == [4, 4, PEER_ROUNDS]
    assert plan.count_turns() == 4 + 4 + PEER_ROUNDS


def test_names_are_unique_and_modules_exist():
    assert len({server.name for server in SERVERS}) == len(SERVERS)
    for server in SERVERS:
        assert (ROOT / "benchmarks" / "servers" / f"{server.module}.py").exists()


RATE = Cell(scenario="rate", x=50, fraction=0.5, servers=("threading",))


def a_pass(repeats=50):
    return runner._Run(Plan("full", (RATE,), repeats, 1.0, 0.0), set(), lambda line: None, lambda text, seconds: None)


@pytest.mark.parametrize(
    ("bound", "repeats", "retaken"),
    [([], 50, None), ([True], 50, 1), ([True] * 9, 50, runner.RETAKES), ([True] * 9, 30, 1), ([True] * 9, 1, None)],
)
def test_a_bound_turn_at_a_fixed_rate_is_taken_again_if_there_is_time(monkeypatch, bound, repeats, retaken):
    found = []

    def load(self, cell, process, rate, duration_s):
        is_bound = rate is None or (bound.pop() if bound else False)
        found.append(is_bound)
        return {"errors": 0, "achieved_rate": 1000.0, "generator_bound": is_bound}

    monkeypatch.setattr(runner._Run, "_load", load)
    servers = {"threading": None}
    figures = a_pass(repeats)._measure(RATE, servers, "threading")
    assert (figures.get("retaken"), figures["generator_bound"]) == (retaken, found[-1])
    assert len(found) == 2 + (retaken or 0), "the first finds the capacity"
    figures = a_pass()._measure(Cell(scenario="clients", x=1, servers=("threading",)), servers, "threading")
    assert figures["generator_bound"], "as fast as it goes the generator is bound because the server is quick"
    assert "retaken" not in figures


def test_capacity_is_found_for_each_kind_of_load(monkeypatch):
    loads = []

    def load(self, cell, process, rate, duration_s):
        loads.append((cell.key, rate))
        return {"errors": 0, "achieved_rate": 1e6 / cell.size_bytes, "generator_bound": False}

    monkeypatch.setattr(runner._Run, "_load", load)
    pass_ = a_pass()
    for size in (100, 1000):
        cell = Cell(scenario="sizes", x=size, size_bytes=size, fraction=0.5, servers=("threading",))
        pass_._measure(cell, {"threading": None}, "threading")
        pass_._measure(cell, {"threading": None}, "threading")
    assert loads == [
        ("pinned/sizes/100", None),
        ("pinned/sizes/100", 5000.0),
        ("pinned/sizes/100", 5000.0),
        ("pinned/sizes/1000", None),
        ("pinned/sizes/1000", 500.0),
        ("pinned/sizes/1000", 500.0),
    ]


def test_what_only_does_records_is_asked_for_nothing_else():
    for name in ("quick", "full"):
        for cell in make_plan(name).cells:
            assert ("batch" in cell.servers) == (cell.scenario == "records")
    cells = [cell for cell in make_plan("full").cells if cell.scenario == "records"]
    assert [cell.x for cell in cells] == list(SCENARIOS["records"].loads)
    for cell in make_plan("full").cells:
        if cell.sender or cell.tls or cell.broadcast:
            assert {"aioecho", "aioecho-asyncio", "streams", "streams-asyncio"} < set(cell.servers), "both loops"


# The report.


def run_lines():
    fast = {"cell": "pinned/slow/1000"}
    return [
        HEADER,
        *samples("aioecho", [200, 210, 190, 205, 195]),
        *samples(BASELINE, [100, 105, 95, 102, 98]),
        *samples("aioecho", [50, 52, 48, 51, 49], **fast),
        *samples(BASELINE, [100, 101, 99, 102, 98], **fast),
        *samples("aioecho", [500] * 5, cell="pinned/clients/1000", generator_bound=True),
        *samples(BASELINE, [100] * 5, cell="pinned/clients/1000"),
        *samples("aioecho", [7] * 5, cell="free/clients/10"),
        *samples(BASELINE, [7, 8, 6, 7, 7], cell="free/clients/10"),
        *samples("aioecho", [7, 7.1, 6.9], cell="free/clients/100"),
        *samples(BASELINE, [7] * 3, cell="free/clients/100"),
        *samples("streams", [1] * 5, errors=2, problem="closed early: | <gone>"),
        {"kind": "left out", "server": "trio", "why": "trio is not installed"},
    ]


def test_the_words_follow_from_the_data():
    findings = find(make_rows(run_lines()))
    [ahead] = [text for text in write_sentences(findings, ("ahead",)) if text.startswith("as fast as it goes, 100 cl")]
    assert ahead.startswith("as fast as it goes, 100 clients: messages 2.00 (")
    [behind] = write_sentences(findings, ("behind",))
    assert behind.startswith("slow handler, 1,000 clients: messages 0.50 (")
    level = write_sentences(findings, ("level",))
    assert "as fast as it goes, 100 clients, all processors: messages 1.00 (0.99-1.01) times as good" in level[-1]
    undecided = write_sentences(findings, ("undecided",))
    assert undecided[0] == (
        "as fast as it goes, 1,000 clients: aioecho (uvloop): the generator used over 90 % of its processor in 5 of 5 repeats"
    )
    assert undecided[1].startswith(
        "as fast as it goes, 10 clients, all processors: messages 1.00 (0.88-1.17) times as good;"
    )
    assert len(undecided) == 2


def test_the_standing_names_every_load_once_and_loads_of_one_scenario_together():
    def both(cell, ours, theirs, **more):
        return [*samples("aioecho", ours, cell=cell, **more), *samples(BASELINE, theirs, cell=cell)]

    rows = make_rows(
        [
            *both("pinned/slow/10", [10] * 3, [5] * 3),
            *both("pinned/slow/1000", [1000] * 3, [5] * 3),
            *both("pinned/clients/1", [4] * 3, [5] * 3),
            *both("pinned/clients/10", [5] * 3, [5] * 3),
            *both("pinned/clients/100", [5, 6, 7], [6, 6, 6]),
            *both("pinned/clients/1000", [9] * 3, [6] * 3, generator_bound=True),
            *both("free/clients/1", [6] * 3, [5] * 3),
        ]
    )
    assert write_standing(find_main(rows)) == {
        "ahead": "slow handler, 10 and 1,000 clients (2.00 to 200); as fast as it goes, 1 client, all processors (1.20)",
        "level": "as fast as it goes, 10 clients (1.00)",
        "behind": "as fast as it goes, 1 client (0.80)",
        "undecided": "as fast as it goes, 100 clients (1.00); as fast as it goes, 1,000 clients",
    }
    assert write_standing([])["level"] == "nowhere"


@pytest.mark.once
def test_each_rival_has_ratios_of_its_own(tmp_path):
    data = tmp_path / "quick.jsonl"
    lines = [
        HEADER,
        *record_lines(),
        *samples("aioecho", [6] * 3),
        *samples("streams", [4] * 3),
        *samples(BASELINE, [2] * 3),
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert CliRunner().invoke(main, ["report", str(data)]).exit_code == 0
    text = (tmp_path / "quick" / "report.md").read_text()
    assert "| load | figure | ThreadingTCPServer | asyncio streams (uvloop) | bare Protocol (uvloop) |" in text
    assert "| 3.00 (3.00-3.00) ahead | 1.50 (1.50-1.50) ahead |  |" in text
    assert "| 8.00 (8.00-8.00) ahead |  | 0.40 (0.40-0.40) behind |" in text, "the batch protocol stands in"
    assert "### Against asyncio streams (uvloop)\n\n- **Ahead**: as fast as it goes, 100 clients (1.50).\n" in text


@pytest.mark.once
def test_words_for_other_candidates_datagrams_and_partial_data():
    rows = make_rows(
        [
            *samples("aioecho", [200, 210], cell="pinned/udp/10"),
            *samples(BASELINE, [100, 105], cell="pinned/udp/10"),
            *samples("aioecho-workers", [50, 52], cell="free/churn/16"),
            *samples(BASELINE, [100, 105], cell="free/churn/16"),
            *samples("aioecho", [5, 5], cell="pinned/slow/10"),  # the run ended before the baseline's turn
            sample("aioecho", 0, 7, cell="pinned/gone/10"),  # a scenario of an older suite
            {
                "kind": "sample",
                "cell": "pinned/example/50",
                "server": "aioecho",
                "repeat": 0,
                "elapsed_s": 2.1,
                "errors": 0,
            },
            {
                "kind": "sample",
                "cell": "pinned/example/50",
                "server": BASELINE,
                "repeat": 0,
                "elapsed_s": 2.1,
                "errors": 0,
            },
        ]
    )
    findings = find(rows)
    ahead = write_sentences(findings, ("ahead",))
    assert [text for text in ahead if text.startswith("datagrams as fast as it goes, 10 clients: messages 2.00 (")]
    behind = write_sentences(findings, ("behind",))
    assert [
        text for text in behind if text.startswith("aioecho (2 workers), a connection per message, 16 at a time, all")
    ]
    level = write_sentences(findings, ("level",))
    assert any(
        text.startswith("the tutorials' example, 50 clients at once: time until all are served 1.00") for text in level
    )
    assert any("p99 1.00" in text for text in level)
    text = "\n".join(map(to_markdown, make_tables(rows, pinned=True)))
    assert "ThreadingUDPServer" in text
    assert "| seconds |" in text
    assert "the tutorials' example" in to_markdown(make_summary(rows))


def cost(server, cell, us):
    """Turns of a scenario that has no latencies."""
    figures = {"achieved_rate": 1e6 / us, "server_cpu_us": us, "memory_kib": 2048, "errors": 0, "problem": None}
    return [
        {"kind": "sample", "cell": f"pinned/{cell}", "server": server, "repeat": repeat, **figures}
        for repeat in range(3)
    ]


def record_lines():
    return [
        *(line for x in SCENARIOS["records"].loads for line in cost("aioecho", f"records/{x}", 0.4)),
        *(line for x in SCENARIOS["records"].loads for line in cost(BASELINE, f"records/{x}", 3.2)),
        *cost("batch", "records/2", 0.16),
        *cost("aioecho", "server-first/16", 100),
        *cost(BASELINE, "server-first/16", 50),
    ]


@pytest.mark.once
def test_records_and_connections_have_words_and_tables_of_their_own():
    rows = make_rows(record_lines())
    ahead = write_sentences(find(rows), ("ahead",))
    assert "records, 64-byte lines, 256 in flight: processor time per record 8.00 (8.00-8.00) times as good" in ahead
    assert write_sentences(find(rows), ("behind",)) == [
        "connections that the server ends, 16 at a time: processor time per connection 0.50 (0.50-0.50) times as good"
    ]
    records, connections = make_tables(rows, pinned=True)
    assert records.header == (
        "load",
        "server",
        "records/s",
        "processor us/record",
        "memory, MiB",
        "processor time, times as good as ThreadingTCPServer",
    )
    assert ("64-byte lines, 256 in flight", "aioecho (uvloop)") in {row[:2] for row in records.rows}
    assert "connections/s" in connections.header
    [batch] = [row for row in records.rows if row[1] == "batch Protocol (uvloop)"]
    assert batch[3] == "0.160 (0.160-0.160)"
    assert batch[5] == "20.0 (20.0-20.0)"
    assert "| records, 100-byte lines, one way | processor time per record, us | 3.20 | 0.40 | 8.00 (8.00-8.00) |" in (
        to_markdown(make_summary(rows))
    )


@pytest.mark.once
def test_tables_mark_void_and_bound_rows():
    tables = make_tables(make_rows(run_lines()), pinned=True)
    text = "\n".join(map(to_markdown, tables))
    assert "void: closed early: \\| <gone>" in text
    assert text.count("generator-bound") == 2
    assert "2.00 (" in text
    assert all(len(row) == len(tables[0].header) for row in tables[0].rows)
    summary = to_markdown(make_summary(make_rows(run_lines())))
    assert "slow handler, 1,000 clients" in summary
    assert "1,000 clients | messages, 1/s | 100" in summary
    assert "500" not in summary, "a bound row gives no ratio"


@pytest.mark.once
def test_a_brief_summary_has_all_its_loads():
    loads = [("clients", 100), ("clients", 1000)]
    summary = to_markdown(make_summary(make_rows(run_lines()), loads)).splitlines()
    assert len(summary) == 4
    assert "| 100 | 200 | 2.00 (" in summary[2].replace(".0 ", " ")
    assert summary[3].endswith("| 100.0 | 500.0 | no ratio |")


@pytest.mark.once
def test_the_report_is_written_whole(tmp_path):
    data = tmp_path / "quick.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in [*run_lines(), *record_lines()]))
    outcome = CliRunner().invoke(main, ["report", str(data)])
    assert outcome.exit_code == 0, outcome.output
    page = (tmp_path / "quick" / "report.html").read_text()
    assert "<svg" in page
    assert "a &lt;fast&gt; one" in page
    assert "python -m benchmarks run --quick" in page
    assert "src=" not in page, "nothing is loaded from elsewhere"
    assert "trio is not installed" in page
    text = (tmp_path / "quick" / "report.md").read_text()
    for name in ("ratios", "records", "connections"):
        assert f"({name}.svg)" in text
        picture = (tmp_path / "quick" / f"{name}.svg").read_text()
        width = re.search(r'<svg [^>]*?width="([0-9.]+)pt"', picture)
        assert float(width[1]) / 72 * 96 <= 390, "a telephone need not shrink it"
        assert "@media(prefers-color-scheme:dark)" in picture
        assert re.search(r"<title>(aioecho|Processor time)", picture)
        assert "microseconds" in picture or "times as good" in picture
    first = text.split("\n\n")[:3]
    assert first[1].startswith(
        "aioecho (uvloop) against ThreadingTCPServer, measured by `python -m benchmarks run --quick`"
    )
    assert [line.split("**")[1] for line in first[2].splitlines()] == [
        "Ahead",
        "Level, within 5 %",
        "Behind",
        "Undecided",
    ]
    assert "\n## Undecided\n" in text
    assert re.search(r"<h2 id=.undecided.>Undecided</h2>", page)
    assert page.count("prefers-color-scheme") > 3


@pytest.mark.once
def test_the_readmes_block_is_replaced_and_nothing_else(tmp_path):
    data, readme = tmp_path / "full.jsonl", tmp_path / "README.md"
    data.write_text("".join(json.dumps(line) + "\n" for line in run_lines()))
    readme.write_text(f"before\n{report.README_BEGIN}\nold\n{report.README_END}\nafter\n")
    for _ in range(2):
        outcome = CliRunner().invoke(main, ["report", str(data), "--readme", str(readme)])
        assert outcome.exit_code == 0, outcome.output
    text = readme.read_text()
    assert text.startswith(f"before\n{report.README_BEGIN}\n![")
    assert text.endswith(f"{report.README_END}\nafter\n")
    assert "(full/ratios.svg)" in text
    assert "- Behind: slow handler, 1,000 clients (0.50).\n" in text
    assert "old" not in text
    readme.write_text("no markers")
    assert "benchmarks:begin" in CliRunner().invoke(main, ["report", str(data), "--readme", str(readme)]).stderr


def test_a_file_without_a_run_is_one_clear_line(tmp_path):
    (tmp_path / "data.jsonl").write_text("")
    outcome = CliRunner().invoke(main, ["report", str(tmp_path / "data.jsonl")])
    assert outcome.exit_code == 1
    assert outcome.stderr == "Error: data.jsonl holds no run with anything measured\n"


def test_list_names_servers_and_scenarios():
    outcome = CliRunner().invoke(main, ["list"])
    assert outcome.exit_code == 0
    for name in (*SCENARIOS, "threading", "easynetwork"):
        assert f"  {name} " in outcome.output


# Real servers.


@pytest.mark.parametrize("name", [server.name for server in SERVERS if not server.peer and not server.only_records])
@pytest.mark.parametrize("mode", ["echo", "lines"])
def test_each_server_echoes(name, mode):
    from aioecho.load.run import LoadSettings, load

    if find_missing(by_name(name)):
        pytest.skip(f"there is no {find_missing(by_name(name))}")

    with ServerProcess(by_name(name), ("--mode", mode)) as process:
        result = load(
            LoadSettings(
                endpoint=f"tcp://127.0.0.1:{process.port}",
                connections=1,
                duration_s=0.1,
                warmup_s=0,
                lines=mode == "lines",
            )
        )
        assert (result.problem, result.errors) == (None, 0)
        more_than(10, result.messages)
        assert process.process.poll() is None
        assert process.memory_kib() > 1000
        assert process.cpu_s() > 0


@pytest.mark.parametrize("name", [server.name for server in SERVERS if server.datagram_label])
def test_each_datagram_server_echoes(name):
    from aioecho.load.run import LoadSettings, load

    with ServerProcess(by_name(name), ("--mode", "udp"), datagrams=True) as process:
        result = load(LoadSettings(endpoint=f"udp://127.0.0.1:{process.port}", duration_s=0.3, warmup_s=0))
    assert (result.problem, result.errors) == (None, 0)
    more_than(10, result.messages)


@pytest.mark.parametrize("name", [server.name for server in SERVERS if server.example])
def test_the_example_is_served_to_many_at_once(name):
    if find_missing(by_name(name)):
        pytest.skip(f"there is no {find_missing(by_name(name))}")
    with ServerProcess(by_name(name), ("--mode", "example", "--delay", "0.2")) as process:
        burst = send_burst(("127.0.0.1", process.port), 20, 10)
    assert (burst.lost, burst.problem) == (0, None)
    assert burst.elapsed_s >= (0.4 if name.endswith("-10") else 0.2), "ten at a time, or all"
    in_time(burst.elapsed_s, (1.0 if name.endswith("-10") else 0.4) + 1)


@pytest.mark.parametrize(
    ("sender", "names"),
    [
        ("lines", ["batch"]),
        ("frames", ["aioecho", "aioecho-readexactly", "threading", "streams", "batch"]),
        ("one-way", ["aioecho", "aioecho-batches", "threading", "streams", "batch"]),
        ("server-first", ["aioecho", "threading", "streams", "protocol"]),
    ],
)
def test_servers_answer_records_and_requests(sender, names):
    with contextlib.ExitStack() as stack:
        processes = [ServerProcess(by_name(name), ("--mode", SENDERS[sender].mode)) for name in names]
        for process in processes:  # side by side: starting takes most of the time
            process.launch()
            stack.callback(process.stop)
        for name, process in zip(names, processes, strict=True):
            process.wait_until_listening()
            before = process.cpu_s()
            sent = send(sender, ("127.0.0.1", process.port), 16, 64, 0.02)
            assert (sent.problem, sent.count % 16) == (None, 0), name
            assert sent.count >= 16, name
            assert sent.own_cpu_s < sent.elapsed_s + 0.01, name
            process.settle()
            assert process.cpu_s() > before, name


def test_a_broadcast_reaches_all_receivers_of_every_server_that_has_one():
    names = [server.name for server in SERVERS if server.broadcast and not server.name.endswith("-asyncio")]
    assert {"aioecho", "threading", "streams", "protocol"} == set(names)
    with contextlib.ExitStack() as stack:
        processes = [ServerProcess(by_name(name), ("--mode", "broadcast")) for name in names]
        for process in processes:
            process.launch()
            stack.callback(process.stop)
        for process in processes:
            process.wait_until_listening()
            with Audience(("127.0.0.1", process.port), 20) as audience:
                heard = audience.hear(64, 0.05)
            assert (heard.problem, heard.count % 20) == (None, 0)
            assert heard.count >= 20


def test_a_wrong_broadcast_is_told(answering):
    with Audience(answering(lambda data: None, greeting=b"."), 1) as audience:
        assert audience.hear(64, 0.01).problem.startswith("expected b'message 0 x")
    with pytest.raises(OSError, match="a receiver was not greeted"), Audience(answering(bytes.upper, greeting=b"!"), 1):
        pass


def test_the_processor_time_of_ended_threads_counts():
    with ServerProcess(by_name("threading"), ("--mode", "lines")) as process:
        before = process.cpu_s()
        sent = send("lines", ("127.0.0.1", process.port), 16, 64, 0.1)
        process.settle()
        used = process.cpu_s() - before
    assert sent.problem is None
    assert used > sent.count * 0.2e-6, "no thread is left that used it"


@pytest.fixture
def answering():
    """Start a server of one connection after another, each answered by a function of (request bytes) -> reply bytes."""
    with contextlib.ExitStack() as stack:

        def start(answer, greeting=b""):
            class Handler(socketserver.BaseRequestHandler):
                def handle(self):
                    self.request.sendall(greeting)
                    while data := self.request.recv(1 << 20):
                        reply = answer(data)
                        if reply is None:
                            return
                        self.request.sendall(reply)
                    self.request.sendall(b"0\n")  # a wrong count, or too many replies

            server = stack.enter_context(socketserver.TCPServer(("127.0.0.1", 0), Handler))
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return server.server_address

        yield start


@pytest.mark.parametrize(
    ("sender", "answer", "problem"),
    [
        ("lines", bytes.upper, "a reply differs from its record"),
        ("frames", lambda data: None, "the server closed early"),
        ("lines", lambda data: data, "more replies than records"),
        ("one-way", lambda data: b"", r"\d+ lines were sent, and the server says b'0\\n'"),
        ("server-first", lambda data: None, r"expected b'REQUEST 0 X+', got b''|reset"),
        ("client-first", bytes.upper, r"expected b'request 0 x+', got b'REQUEST 0 X+'"),
    ],
)
def test_a_wrong_or_missing_reply_is_told(answering, sender, answer, problem):
    sent = send(sender, answering(answer), 1, 64, 0.01)
    assert re.search(problem, sent.problem)


def test_a_record_is_as_long_as_it_says():
    assert make_record("lines", 64) == b"x" * 63 + b"\n"
    assert make_record("frames", 64) == b"\0\0\0\x3c" + b"y" * 60


def test_a_burst_tells_of_wrong_and_missing_replies():
    with ServerProcess(by_name("threading"), ("--mode", "echo")) as process:
        burst = send_burst(("127.0.0.1", process.port), 3, 0.3)  # neither upper case, nor does it ever close
    assert burst.lost == 3
    assert burst.problem == "no reply within 0.3 s"
    assert send_burst(("127.0.0.1", 1), 3, 1).lost == 3


def test_a_server_that_does_not_start_says_why():
    broken = by_name("threading")
    with pytest.raises(OSError, match="unrecognized arguments: --nonsense"), ServerProcess(broken, ("--nonsense",)):
        pass


def test_an_interrupted_start_ends_the_server(monkeypatch):
    monkeypatch.setattr(ServerProcess, "wait_until_listening", lambda self: signal.raise_signal(signal.SIGINT))
    process = ServerProcess(by_name("threading"))
    with pytest.raises(KeyboardInterrupt), process:
        pass
    assert process.process.returncode == -signal.SIGKILL


def test_servers_end_with_a_suite_that_was_killed():
    program = """if True:
        from benchmarks.catalog import by_name
        from benchmarks.processes import ServerProcess
        with ServerProcess(by_name("threading")) as process:
            print(process.port, flush=True)
            input()
    """
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as suite:
        try:
            client = socket.create_connection(("127.0.0.1", int(suite.stdout.readline())), 10)
        finally:
            suite.kill()
    with client, contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b"", "its server is gone"


def test_a_terminated_run_ends_as_an_interrupted_one(monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runner, "run_plan", lambda *args, **options: signal.raise_signal(signal.SIGTERM))
    outcome = CliRunner().invoke(main, ["run", "--quick", "--output", str(tmp_path / "data.jsonl")])
    assert outcome.exit_code == 1
    assert "interrupted; what was measured is kept" in outcome.output
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_has_failed_is_said_in_a_line(monkeypatch, tmp_path):
    def fail(*args):
        raise OSError("the server does not listen")

    monkeypatch.setattr(crowd, "run_crowd", fail)
    path = tmp_path / "data.jsonl"
    outcome = CliRunner().invoke(main, ["run", "--scenario", "crowd"])
    assert (outcome.exit_code, outcome.output) == (1, "Error: the server does not listen\n")

    def lose(plan, path, header, **options):
        left_out = {"kind": "left out", "server": "aioecho", "why": "uvloop is not installed"}
        void = [sample("threading", repeat, 1, "x/slow/1", errors=1, problem="no reply") for repeat in range(2)]
        path.write_text("".join(json.dumps(line) + "\n" for line in [header | {"kind": "run"}, left_out, *void]))

    monkeypatch.setattr(runner, "run_plan", lose)
    outcome = CliRunner().invoke(main, ["run", "--quick", "--output", str(path)])
    assert outcome.exit_code == 1
    assert outcome.output.splitlines()[1:] == [
        "left out: aioecho: uvloop is not installed",
        "void: x/slow/1, threading: no reply",
        "Error: nothing was measured",
    ]
    outcome = CliRunner().invoke(main, ["run", "--quick", "--scenario", "broadcast", "--server", "gevent"])
    assert outcome.exit_code == 2
    assert "none of these servers takes part in these scenarios" in outcome.output


def test_a_small_run_measures_and_leaves_out_what_is_missing(tmp_path, monkeypatch):
    cells = (
        Cell(scenario="clients", x=2, clients=2, servers=("threading", "streams", "trio")),
        Cell(scenario="rate", x=50, clients=2, fraction=0.5, servers=("threading", "streams")),
        Cell(scenario="slow", x=2, clients=2, delay_s=0.01, servers=("threading",)),
        Cell(scenario="idle", x=20, clients=20, idle=True, servers=("threading", "streams")),
        Cell(scenario="udp", x=2, clients=2, servers=("threading", "protocol")),
        Cell(scenario="example", x=3, clients=3, delay_s=0.05, example=True, servers=("threading",)),
        Cell(scenario="records", x=2, clients=1, sender="lines", depth=256, servers=("threading", "batch")),
        Cell(scenario="tls", x=2, clients=2, tls=True, fraction=0.1, servers=("threading", "streams")),
    )
    monkeypatch.setattr(runner, "find_missing", lambda server: server.requires if server.name == "trio" else "")
    path = tmp_path / "data.jsonl"
    runner.run_plan(Plan("quick", cells, 1, 0.1, 0.0), path, HEADER)
    lines = runner.last_run(runner.read_lines(path))
    assert {"kind": "left out", "server": "trio", "why": "trio is not installed"} in lines
    rows = make_rows(lines)
    assert {row.status for row in rows} <= {"measured", "bound"}, [row.why for row in rows]
    [idle] = [row for row in rows if row.scenario == "idle" and row.server == "threading"]
    assert 5 < idle.figures["connection_kib"].median < 200
    [steady] = [row for row in rows if row.scenario == "rate" and row.server == "streams"]
    assert steady.offered_rate == pytest.approx(
        next(ln for ln in lines if ln["kind"] == "calibration")["slowest_rate"] / 2, rel=2
    )
    assert steady.figures["server_cpu_us"].median > 1
    [batch] = [row for row in rows if row.server == "batch"]
    assert 0 < batch.figures["server_cpu_us"].median < 50
    expected = {"clients", "rate", "slow", "idle", "udp", "example", "records"} | (
        {"tls"} if runner.shutil.which("openssl") else set()
    )
    assert {row.scenario for row in rows} == expected


@pytest.mark.skipif(importlib.util.find_spec("locust") is None, reason="locust is not installed")
def test_locust_loads_an_endpoint_from_a_master_and_two_workers(tmp_path):
    class Echo(socketserver.BaseRequestHandler):
        def handle(self):
            while data := self.request.recv(65536):
                self.request.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Echo) as server, Server(("127.0.0.1", 0), Echo) as free:
        port = free.server_address[1]
        free.server_close()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        # As a program of its own: locust monkey-patches whatever process imports it.
        locust = [
            sys.executable,
            "-m",
            "locust",
            "-f",
            str(ROOT / "benchmarks" / "locustfile.py"),
            "--master-port",
            str(port),
        ]
        csv = tmp_path / "result"
        master = subprocess.Popen(
            [*locust, "--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", str(port), "--headless", "-u", "4",
             "-r", "4", "-t", "3s", "--expect-workers", "2", "--host", f"tcp://127.0.0.1:{server.server_address[1]}",
             "--csv", str(csv), "--only-summary"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )  # fmt: skip
        workers = [
            subprocess.Popen(
                [*locust, "--worker", "--master-host", "127.0.0.1"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=tmp_path,
            )
            for _ in range(2)
        ]
        try:
            said, _ = master.communicate(timeout=45)
            for worker in workers:
                worker.wait(10)
        finally:
            for process in (master, *workers):
                process.kill()
                process.wait()
            server.shutdown()
            thread.join()
    assert master.returncode == 0, said
    header, line, *_ = Path(f"{csv}_stats.csv").read_text().splitlines()
    stats = dict(zip(header.split(","), line.split(","), strict=True))
    assert int(stats["Request Count"]) > 100
    assert int(stats["Failure Count"]) == 0
    assert float(stats["Median Response Time"]) >= 10, "microseconds, for in milliseconds it would be 0"


def test_a_crowd_is_as_large_as_the_machine_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.crowd._meminfo", lambda: {"MemAvailable": 4_000_000})
    assert crowd.choose_count() == 102_000
    monkeypatch.setattr("benchmarks.crowd._meminfo", lambda: {"MemAvailable": 400_000_000})
    assert crowd.choose_count() == 250_000
    monkeypatch.setattr("benchmarks.crowd._meminfo", lambda: {"MemAvailable": 1000})
    assert crowd.choose_count() == 1000


def test_a_crowd_is_measured_alone() -> None:
    for arguments in (["--scenario", "crowd", "--quick"], ["--connections", "1000"]):
        outcome = CliRunner().invoke(main, ["run", *arguments])
        assert outcome.exit_code == 2
        assert "crowd" in outcome.output


@pytest.mark.slow
def test_a_crowd_is_held_echoed_replaced_and_drained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("_SETTLE", "_AT_REST", "_TALKING"):
        monkeypatch.setattr(f"benchmarks.crowd.{name}", 0.5)
    said: list[str] = []
    found = crowd.run_crowd(said.append, 400)
    assert (found["workers"], found["held"], found["wrong"]) == (2, 400, {})
    assert found["restart_ended"] >= 400
    assert (found["stop_ended"], found["stop_status"]) == (400, 0)
    assert found["restart_reset"] == found["stop_reset"] == 0
    assert "| connections held | 400, over 2 workers |" in crowd.write_table(tmp_path / "crowd.md", found)
    table = crowd.make_table({**found, "stop_s": 30.0, "stop_status": None, "stop_cpu_s": None})
    assert "| all stopped in | not ended after 30.0 s |\n| processor time of the workers for it | not ended |" in table
    assert said[0] == "400 connect"
