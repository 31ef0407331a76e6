"""The benchmark of bad peers: it measures every kind on every server, and one command makes the table of the docs."""

import os
from types import SimpleNamespace

import pytest

from benchmarks import abuse

pytestmark = pytest.mark.alike

SAMPLE = {"kind": "drips", "server": "aioecho", "log_lines_per_s": 0.0, "grown_kib": 512, "peers": 20, "errors": 0}


def test_every_kind_of_bad_peer_is_measured_on_every_server(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(abuse, "_measure", lambda kind, name, *_: measured.append((kind, name)))
    monkeypatch.setattr(abuse, "find_missing", lambda server: server.name == "streams")
    processors = os.sched_getaffinity(0)
    abuse.run_abuse(lambda text: None)
    assert measured == [(kind, name) for kind in abuse.KINDS for name in abuse.SERVERS if name != "streams"]
    assert os.sched_getaffinity(0) == processors


def test_an_interruption_ends_it_though_the_load_generator_returns_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    monkeypatch.setattr("aioecho.load.load", lambda settings: SimpleNamespace(interrupted=True))
    with pytest.raises(KeyboardInterrupt):
        abuse.run_abuse(lambda text: None, ("threading",), 1.5)


def test_the_table_tells_what_is_never_ended_and_what_was_lost() -> None:
    samples = [
        {**SAMPLE, "gone_s": 2.04, "p99_us": 1500.0},
        {**SAMPLE, "gone_s": None, "p99_us": 2500.0, "errors": 3, "server": "threading"},
        {**SAMPLE, "gone_s": None, "p99_us": None, "kind": "resets", "log_lines_per_s": 1234.5},
    ]
    assert abuse.make_table(samples).splitlines()[2:] == [
        "| sends a byte now and then | aioecho (uvloop) | 0.0 | 0.5 | 2.0 | 1.5 |",
        "| sends a byte now and then | ThreadingTCPServer | 0.0 | 0.5 | never | 2.5, 3 lost |",
        "| resets in mid-reply | aioecho (uvloop) | 1,234.5 | 0.5 |  | all lost |",
    ]


@pytest.mark.slow
def test_real_bad_peers_are_measured() -> None:
    pytest.importorskip("numpy")
    sample = abuse._measure("resets", "aioecho-asyncio", 1.5, None)
    assert sample["peers"] > 20
    assert sample["errors"] == 0
    assert sample["p99_us"] > 0
