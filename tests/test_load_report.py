"""What a load shows and writes: tables, a histogram, a series over time, files, thresholds."""

import io
import json
import os
import stat
from collections import Counter

import pytest

pytest.importorskip("rich")

from test_load import echo, invoke, result_of, run, serving
from timing import more_than

from aioecho.load.histogram import draw_histogram
from aioecho.load.latencies import Latencies
from aioecho.load.plot import write_plot
from aioecho.load.report import print_result, write_hdr
from aioecho.load.run import _result
from aioecho.load.settings import LoadSettings, Tally


@pytest.mark.parametrize("longest", [999, 1_234_567, 12_345_678, 3_600_000_000])
def test_latencies_are_shown_whole_at_80_columns(longest, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    print_result(result_of(dict.fromkeys((longest - 2, longest - 1, longest), 10), rate=1.0))
    shown = capsys.readouterr().out
    assert f"{longest:,}" in shown
    assert f"{longest - 1:,}" in shown
    assert "…" not in shown
    rows = shown.splitlines()[:-2]  # the remarks are not broken where no terminal is
    assert max(map(len, rows[1:])) <= 80


def test_a_histogram_has_a_row_for_each_power_of_two():
    lines = list(draw_histogram(Latencies({1: 1, 2: 40, 3: 40, 8: 1}), 80))
    assert [line.split() for line in lines] == [
        ["below", "messages"],
        ["2", "▌", "1", "1.2", "%"],
        ["4", "█" * 40, "80", "97.6", "%"],
        ["8", "0", "0.0", "%"],
        ["16", "▌", "1", "1.2", "%"],
    ]


def test_a_histogram_shows_every_message_in_at_most_12_rows_as_wide_as_the_terminal():
    counts = {1: 1, 900: 1_000_000, 3_600_000_000: 1}
    for width in (40, 80, 200):
        heading, *rows = draw_histogram(Latencies(counts), width)
        assert len(rows) <= 12
        assert max(map(len, (heading, *rows))) <= width
        assert rows[0].split()[1] == rows[-1].split()[1] == "▏", "one in a million shows"
        assert sum(int(row.split()[-3].replace(",", "")) for row in rows) == sum(counts.values())
    assert "█" not in "".join(draw_histogram(Latencies(counts), 80, is_ascii=True))
    assert list(draw_histogram(Latencies({}), 80)) == []


def test_a_run_has_a_series_that_adds_up():
    with serving(echo) as server:
        result = run(server.endpoint, duration_s=1.7)
    assert result.problem is None
    more_than(1, len(result.series), "intervals")
    ends = [part.start_s + part.seconds for part in result.series]
    assert [part.start_s for part in result.series] == pytest.approx([0, *ends[:-1]])
    assert sum(part.latencies.total for part in result.series) == result.messages
    assert all(part.latencies.total for part in result.series)
    assert ends[-1] == pytest.approx(result.measured_s)


def series_of(*series):
    tallies = []
    for parts in series:
        counts = Counter()
        for _, _, part in parts:
            counts.update(part)
        tallies.append(Tally(counts=counts, series=parts, replies=counts.total(), measured_s=3.0))
    return _result(LoadSettings(endpoint="unix:x"), tallies, "2026-01-01T00:00:00Z")


def test_the_series_of_processes_are_added_second_by_second():
    result = series_of(
        [(0.0, 1.01, {100: 1}), (1.01, 1.23, {100: 2}), (2.24, 0.76, {100: 3})],
        [(0.0, 1.2, {100: 10}), (1.2, 0.8, {900: 20}), (2.0, 1.0, {100: 30})],
    )
    assert [part.latencies.counts for part in result.series] == [{100: 11}, {100: 2, 900: 20}, {100: 33}]
    assert [(part.start_s, part.seconds) for part in result.series] == [(0.0, 1.2), (1.01, 1.23), (2.0, 1.0)]


PARTS = [(0.0, 1.0, {100: 9, 5000: 1}), (1.0, 1.0, {}), (2.0, 1.0, {200: 10})]


def test_the_log_has_an_interval_a_second():
    log = io.BytesIO()
    write_hdr(series_of(PARTS), log)
    rows = [line.split(",") for line in log.getvalue().decode().splitlines()[3:]]
    assert [row[:3] for row in rows] == [
        ["0.000", "1.000", "5000.000"],
        ["1.000", "1.000", "0.000"],
        ["2.000", "1.000", "200.000"],
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the package's own, from 3.15 on
def test_hdrhistogram_reads_the_intervals(tmp_path):
    histogram_module, log_module = pytest.importorskip("hdrh.histogram"), pytest.importorskip("hdrh.log")
    with open(tmp_path / "r.hdr", "wb") as file:
        write_hdr(series_of(PARTS), file)
    reader = log_module.HistogramLogReader(str(tmp_path / "r.hdr"), histogram_module.HdrHistogram(1, 3_600_000_000, 3))
    found = []
    while histogram := reader.get_next_interval_histogram():
        found.append((histogram.get_start_time_stamp(), histogram.get_total_count()))
    reader.close()
    assert found == [(0, 10), (1000, 0), (2000, 10)]


def test_the_plot_has_the_series(monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    savefig = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda figure, *a, **o: (drawn.append(figure), savefig(figure, *a, **o))
    )
    picture = io.BytesIO()
    write_plot(series_of(PARTS), picture, "svg")
    assert picture.getvalue().startswith(b"<?xml")
    over_time = drawn[0].axes[1]
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in over_time.get_lines()}
    assert lines == {"max": ([1, 3], [5000, 200]), "p99": ([1, 3], [5000, 200]), "p50": ([1, 3], [100, 200])}


def test_thresholds_that_pass_are_listed_too():
    with serving(echo) as server:
        outcome = invoke(
            server.endpoint, "-t", 0.1, "--warmup", 0, "--fail-if", "errors>0", "--fail-if", "p99_us>123456789"
        )
    assert outcome.exit_code == 0
    *_, first, second = outcome.stdout.splitlines()
    assert first == "passed: not errors > 0, it is 0"
    assert second.startswith("passed: not p99_us > 123456789, it is ")


@pytest.mark.parametrize("option", ["--json", "--hdr", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_the_run(option):
    outcome = invoke("tcp://127.0.0.1:1", option, "/no/folder/r.svg")
    assert outcome.exit_code == 2
    assert outcome.stderr == "Error: cannot write /no/folder/r.svg: No such file or directory\n"


def test_a_file_keeps_what_it_has_until_there_is_a_result(tmp_path):
    (tmp_path / "r.json").write_text("x" * 100_000)
    assert invoke("tcp://127.0.0.1:1", "--fail-if", "p99>1", "--json", tmp_path / "r.json").exit_code == 2
    assert (tmp_path / "r.json").read_text() == "x" * 100_000
    with serving(echo) as server:
        assert invoke(server.endpoint, "-t", 0.1, "--warmup", 0, "--json", tmp_path / "r.json").exit_code == 0
    assert json.loads((tmp_path / "r.json").read_text())["errors"] == 0


def test_stdout_has_the_file_alone_where_that_is_asked_for():
    with serving(echo) as server:
        arguments = (server.endpoint, "-t", 0.1, "--warmup", 0, "--fail-if", "errors>0")
        as_json = invoke(*arguments, "--json", "-")
        as_log = invoke(*arguments, "--hdr", "-")
        as_plot = invoke(*arguments, "--plot", "-")
    assert json.loads(as_json.stdout)["errors"] == 0
    assert as_log.stdout.startswith("#[aioecho load")
    assert as_plot.stdout.startswith("<?xml")
    for outcome in (as_json, as_log, as_plot):
        assert outcome.exit_code == 0
        assert "p99.9" in outcome.stderr
        assert "passed: not errors > 0, it is 0" in outcome.stderr
    twice = invoke("tcp://127.0.0.1:1", "--json", "-", "--hdr", "-")
    assert twice.exit_code == 2
    assert "only one of --json, --hdr and --plot can be - for stdout" in twice.stderr


def test_a_pipe_is_written_as_a_file_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert stat.S_ISFIFO(os.fstat(reading).st_mode)
        with serving(echo) as server:
            outcome = invoke(server.endpoint, "-t", 0.1, "--warmup", 0, "--json", tmp_path / "pipe")
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        assert json.loads(os.read(reading, 65536))["errors"] == 0
    finally:
        os.close(reading)
