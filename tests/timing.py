"""Upper bounds of time: what is late gets another try, and what is late each time fails, unless the machine was busy each time.

How long something takes depends on what else the machine does, and no bound that means anything holds on every machine at every
moment. So tests state such bounds by :func:`in_time`, :func:`more_than` and :func:`within`, and one that fails by nothing else
is run again, as if it had not been, after a pause. If other programs took most of the processors during each attempt, time can
not be judged, and the test is skipped with that as the reason. All else fails at once: replies, counts, lower bounds, memory,
what is left behind. What was repeated is listed at the end, so that it shows when a bound is no good. conftest.py registers
this module as a plugin.
"""

import contextlib
import os
import time
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

__all__ = ["ATTEMPTS", "PAUSE", "TooLate", "in_time", "more_than", "within"]

# How often a test may run at the most.
ATTEMPTS = 5

# Seconds between the first two attempts, growing by as many with each: what has kept the machine busy may be over by then.
PAUSE = 1.0

# The share of all processors from which on the other programs leave too little for a bound of time to mean anything.
BUSY = 0.5

# How often a test may run at the most if the machine was busy each time: it hardly becomes idle within seconds.
ATTEMPTS_WHEN_BUSY = 3


class TooLate(AssertionError):
    """Something took longer than it may, and nothing else is wrong."""


def in_time(took: float, bound: float, what: str = "it") -> None:
    """Assert that what depends on how busy the machine is stays below its bound: seconds, or the share of a processor."""
    if not took < bound:
        raise TooLate(f"{what} took {took:.4g}, and less than {bound:.4g} is in time")


def more_than(least: float, done: float, what: str = "messages") -> None:
    """Assert that more than the least was done in the time that there was, which depends on how busy the machine is."""
    if not done > least:
        raise TooLate(f"{done:.4g} {what} is not more than {least:.4g}")


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Assert that what is inside takes less. What fails in there is put down to that, if it took longer.

    For what goes wrong when the test itself is not quick enough, such as a client that is to speak before a timeout ends it.
    """
    began = time.monotonic()
    try:
        yield
    except Exception as error:
        took = time.monotonic() - began
        if took < seconds:
            raise
        raise TooLate(f"it failed after {took:.4g} s, and less than {seconds:.4g} s is in time") from error
    in_time(time.monotonic() - began, seconds)


def processor_seconds() -> tuple[float, float]:
    """Return what all programs have used of the processors, and what this one has with its children that have ended.

    Programs of low priority give way, and so do not count, unless this one is such a program. Only Linux tells; elsewhere the
    machine never seems busy.
    """
    own = sum(os.times()[:4])
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _, _, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except (OSError, ValueError):
        return own, own
    of_low_priority = nice if os.nice(0) > 0 else 0
    return (user + of_low_priority + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), own


class Others:
    """What other programs use of the processors, from when it is made."""

    def __init__(self) -> None:
        self._began, (self._all, self._own) = time.monotonic(), processor_seconds()

    def share(self) -> float:
        """Return the share of all processors that they have used by now."""
        used, own = processor_seconds()
        available = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return ((used - self._all) - (own - self._own)) / available


# The plugin


LATE = pytest.StashKey[str | None]()  # how the attempt of a test was too late, if that is all that failed in its call
TIMEOUT = pytest.StashKey[Any]()  # pytest-timeout's settings for a test
REPEATED = pytest.StashKey[list[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPEATED] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test, in place of pytest itself, and again if it was too late."""
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    was_busy = True  # each time
    for attempt in range(1, ATTEMPTS + 1):
        item.stash[LATE] = None
        others = Others()
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        late, failed = item.stash[LATE], [report.when for report in reports if report.failed]
        if late is None or failed != ["call"]:  # what the fixtures find at its end is no matter of time
            break
        share = others.share()
        was_busy = was_busy and share >= BUSY
        late = f"{late}; others took {max(0, share):.0%} of the processors"
        item.config.stash[REPEATED].append(f"{item.nodeid}, attempt {attempt} of {ATTEMPTS}: {late}")
        if was_busy and attempt == ATTEMPTS_WHEN_BUSY:
            for report in reports:
                if report.when == "call":
                    path, line, _ = item.location
                    report.outcome, report.longrepr = (
                        "skipped",
                        (path, line or 0, f"Skipped: the machine is busy: {late}"),
                    )
            break
        if attempt < ATTEMPTS:
            time.sleep(PAUSE * attempt)
            restart_timeout(item)
    for report in reports:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    # Not the error itself: its traceback has all that the attempt has made.
    if call.when == "call" and call.excinfo is not None and isinstance(call.excinfo.value, TooLate):
        item.stash[LATE] = str(call.excinfo.value)
    return (yield)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    item.stash[TIMEOUT] = settings


def restart_timeout(item: pytest.Item) -> None:
    """Give a test its full time again, of which pytest-timeout lets a test have one, and none after an error."""
    if TIMEOUT in item.stash and not item.stash[TIMEOUT].func_only:
        item.ihook.pytest_timeout_cancel_timer(item=item)
        item.ihook.pytest_timeout_set_timer(item=item, settings=item.stash[TIMEOUT])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[REPEATED]:
        terminalreporter.section("too late, and so repeated")
        for line in config.stash[REPEATED]:
            terminalreporter.line(line)
