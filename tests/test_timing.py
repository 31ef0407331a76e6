"""Too late is tried again, and nothing else is; on a busy machine it is skipped in the end. Each in a pytest of its own."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timing
from programs import ROOT
from timing import ATTEMPTS, ATTEMPTS_WHEN_BUSY, TooLate, in_time, more_than, within

pytestmark = pytest.mark.once

HEAD = """
import asyncio, os, time
import conftest, pytest, timing
from timing import in_time, within

timing.PAUSE = 0.01
timing.processor_seconds = lambda: (0.0, 0.0)  # no other program uses anything
conftest.LEFT_FOR = 0.1
runs = []
"""


def run(folder: Path, tests: str, *options: str) -> str:
    """Return what pytest says about these tests, which have this suite's conftest.py and settings."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "timing.py").write_text((ROOT / "tests" / "timing.py").read_text())
    (folder / "test_it.py").write_text(HEAD + tests)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        folder,
        "-p",
        "no:cacheprovider",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIOECHO_TESTS_")}
    done = subprocess.run([*command, *options, folder], capture_output=True, text=True, timeout=50, env=environment)
    assert done.stderr == ""
    return done.stdout


def test_what_is_too_late_twice_passes_the_third_time_and_is_reported(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
async def test_late(tmp_path):
    runs.append((tmp_path, asyncio.get_running_loop()))
    in_time(0 if len(runs) % 3 == 0 else 7, 1)
    assert len(set(runs)) == 3  # all its own each time
    runs.clear()

def test_late_too():
    runs.append(1)
    with within(0 if len(runs) < 3 else 10):
        assert len(runs) == 3
""",
    )
    assert "3 passed in" in output  # the first one on both loops
    summary = output.partition("too late, and so repeated")[2]
    assert summary.count("test_late[asyncio], attempt ") == summary.count("test_late[uvloop], attempt ") == 2
    assert f"test_late[uvloop], attempt 2 of {ATTEMPTS}: it took 7, and less than 1 is in time" in summary
    assert summary.count("test_late_too, attempt ") == 2


def test_what_is_always_too_late_fails(tmp_path: Path) -> None:
    output = run(tmp_path, "def test_late():\n    runs.append(1)\n    print(f'run {len(runs)}')\n    in_time(2, 1)\n")
    assert "1 failed in" in output
    assert f"\nrun {ATTEMPTS}\n" in output
    assert output.count(", attempt ") == ATTEMPTS
    assert "TooLate: it took 2, and less than 1 is in time" in output


def test_what_is_too_late_each_time_on_a_busy_machine_is_skipped_and_says_so(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
busy = lambda: (time.monotonic() * os.cpu_count(), 0.0)  # other programs use all

def test_late():
    timing.processor_seconds = busy
    runs.append(1)
    in_time(2, 1)

def test_otherwise():
    assert 2 < 1

def test_late_and_idle_once():
    runs.append(1)
    timing.processor_seconds = (lambda: (0.0, 0.0)) if len(runs) == 5 else busy
    in_time(2, 1)
""",
        "-rs",
    )
    assert "2 failed, 1 skipped in" in output
    assert "the machine is busy: it took 2, and less than 1 is in time; others took" in output
    assert output.count("test_late, attempt ") == ATTEMPTS_WHEN_BUSY
    assert output.count("test_late_and_idle_once, attempt ") == ATTEMPTS


def test_what_fails_by_anything_else_fails_at_once(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
@pytest.fixture(autouse=True)
def once(request):
    assert request.node.name not in runs
    runs.append(request.node.name)

def test_otherwise():
    assert 2 < 1

def test_otherwise_and_in_time():
    with within(10):
        assert 2 < 1

def test_otherwise_because_of_what_was_too_late():
    try:
        in_time(2, 1)
    finally:
        raise KeyError

@pytest.fixture
def leaving():
    yield
    assert 2 < 1

def test_late_and_something_left(leaving):
    in_time(2, 1)

async def test_late_and_a_descriptor_left():
    os.open("/", os.O_RDONLY)
    in_time(2, 1)
""",
    )
    assert "6 failed, 3 errors in" in output  # those of the fixtures, the last one's on both loops
    assert "attempt" not in output


def test_each_attempt_has_the_time_that_a_test_has(tmp_path: Path) -> None:
    output = run(
        tmp_path,
        """
def test_late():
    runs.append(1)
    time.sleep(0.8 if len(runs) < 4 else 60)
    in_time(2, 1)
""",
        "--timeout",
        "1.6",
    )
    assert "Failed: Timeout (>1.6s)" in output
    assert output.count(", attempt ") == 3


def test_a_bound_is_itself_too_much() -> None:
    in_time(0.99, 1)
    with pytest.raises(TooLate, match="the reply took 1, and less than 1 is in time"):
        in_time(1, 1, "the reply")
    with pytest.raises(TooLate), within(0):
        pass
    more_than(20, 21)
    with pytest.raises(TooLate, match="20 messages is not more than 20"):
        more_than(20, 20)
    with pytest.raises(KeyError), within(10):
        raise KeyError


def test_programs_of_low_priority_do_not_make_the_machine_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    stat = f"cpu  {3 * ticks} {5 * ticks} {2 * ticks} 900 0 0 0 0 0 0\n"  # user, nice, system, idle
    monkeypatch.setattr(timing, "open", lambda path: io.StringIO(stat), raising=False)
    for own, used in ((0, 5), (10, 10)):  # if it is such a program itself, its own time is in there
        monkeypatch.setattr(os, "nice", lambda increment, own=own: own)
        assert timing.processor_seconds()[0] == used
