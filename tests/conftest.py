"""Every async test runs on asyncio's loop and on uvloop, in debug mode if not slow, and fails if it leaves anything behind."""

import asyncio
import contextlib
import fcntl
import gc
import heapq
import itertools
import os
import signal
import ssl
import sys
import time
import traceback
import zlib
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio
import timing
import trustme
import uvloop

import aioecho
from aioecho.datagrams import sessions
from aioecho.testing import pytest_aioecho


class _Own(tuple[tuple[FrameType, int], ...]):
    """A function's own frame, without the ones that called it."""


def _walk(frame: FrameType, walk: Any = traceback.walk_stack) -> Any:
    own = sys._getframe(1).f_back  # futures and tasks note the whole stack of the code that makes them
    return _Own([(frame, frame.f_lineno)]) if frame is own else walk(frame)


def _extract(
    frames: Any, extract: Any = traceback.StackSummary.extract, lookup_lines: bool = True, **options: Any
) -> Any:
    if lookup_lines and not isinstance(frames, _Own):
        return extract(frames, lookup_lines=lookup_lines, **options)
    return traceback.StackSummary(  # without a look at the sources, which the loops do not want
        traceback.FrameSummary(frame.f_code.co_filename, line, frame.f_code.co_name, lookup_line=False)
        for frame, line in itertools.islice(frames, 2)
    )


# Of the stack that debug mode notes with each callback, future and task. All of it took a third of the processor's time.
traceback.walk_stack, traceback.StackSummary.extract = _walk, _extract  # type: ignore[assignment,method-assign]

# Seconds that what a test leaves has to end by itself.
LEFT_FOR = 5.0


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Any]:
    return {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(timing)
    if not config.pluginmanager.has_plugin("pytest_aioecho"):  # it is run from its sources
        config.pluginmanager.register(pytest_aioecho, "pytest_aioecho")
    # A shell without job control has what it starts with & ignore Ctrl-C, and so would the programs that tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Turns:
    """Lets processes that are given the same path run their tests in three turns: one begins when all have ended the last.

    First come those that run beside any others, then the timed ones beside their like, then the exclusive ones, each alone.
    """

    def __init__(self, path: str) -> None:
        # Descriptors, which the end of the process closes: files would complain of that, after pytest's last word.
        self._locks = [os.open(f"{path}.{number}", os.O_WRONLY | os.O_CREAT) for number in range(3)]
        for lock in self._locks[:2]:
            fcntl.flock(lock, fcntl.LOCK_SH)
        self._turn = 0

    @staticmethod
    def of(item: pytest.Item) -> int:
        return 2 if item.get_closest_marker("exclusive") else 1 if item.get_closest_marker("timed") else 0

    def begin(self, turn: int) -> None:
        for lock in self._locks[self._turn : turn]:
            for operation in (fcntl.LOCK_UN, fcntl.LOCK_EX, fcntl.LOCK_UN):
                fcntl.flock(lock, operation)
        self._turn = max(turn, self._turn)
        if turn == 2:
            fcntl.flock(self._locks[2], fcntl.LOCK_EX)

    def end(self) -> None:
        fcntl.flock(self._locks[2], fcntl.LOCK_UN)  # also where a process that was forked has it open


# Only .ci/run sets these. By themselves the tests of one Python run one after the other, in the order of their files.
SHARD = os.environ.get("AIOECHO_TESTS_SHARD")
TURNS = Turns(os.environ["AIOECHO_TESTS_TURNS"]) if "AIOECHO_TESTS_TURNS" in os.environ else None


# The files that are divided between the shards by their functions. Most of their tests wait, in the same turn.
DIVIDED = {"test_timeouts.py"}

# How much longer than others of their size some files take.
WEIGHTS = {"test_check.py": 5, "test_crowds.py": 6, "test_workers.py": 3}


def files_of(number: int, count: int) -> set[str]:
    """Return the names of the files that a shard runs whole: by their sizes, and so the same in any process.

    It imports no others: to import all tests takes as long as a sixth of them.
    """
    paths = Path(__file__).parent.glob("test_*.py")
    sizes = {path.name: path.stat().st_size * WEIGHTS.get(path.name, 1) for path in paths}
    shards = [(0, shard, set[str]()) for shard in range(1, count + 1)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if name not in DIVIDED:
            size, shard, names = heapq.heappop(shards)
            names.add(name)
            heapq.heappush(shards, (size + sizes[name], shard, names))
    return next(names for _, shard, names in shards if shard == number)


FILES = None if SHARD is None else files_of(*map(int, SHARD.split("/"))) | DIVIDED


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    is_others = FILES is not None and collection_path.match("test_*.py") and collection_path.name not in FILES
    return True if is_others else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if SHARD is not None:
        number, count = map(int, SHARD.split("/"))

        def is_others(item: pytest.Item) -> bool:
            function = item.nodeid.partition("[")[0]  # so that what is parametrized stays together
            return item.path.name in DIVIDED and zlib.crc32(function.encode()) % count != number - 1

        config.hook.pytest_deselected(items=[item for item in items if is_others(item)])
        items[:] = [item for item in items if not is_others(item)]
    if TURNS is not None:
        items.sort(key=TURNS.of)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # what is waited for here is not of the time that a test has
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    if TURNS is None:
        return (yield)
    TURNS.begin(TURNS.of(item))
    try:
        return (yield)
    finally:
        TURNS.end()


def keep_what_there_is() -> None:
    """Let the garbage collections below, of which each test has two, not look at what there is by now."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    keep_what_there_is()


_number = itertools.count(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if not next(_number) % 5:  # in the end there would be more of pytest's reports than of all that a test makes
        keep_what_there_is()


def open_descriptors() -> dict[str, str]:
    """Return what this process has open: descriptors, with what each is."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that listdir() itself had open
            found[number] = os.readlink(f"/proc/self/fd/{number}")
    return found


async def settle(condition: Any = None, seconds: float = 15.0) -> None:
    """Let the loop turn until `condition()` holds, or a few times if there is none. No time passes but what it needs.

    For how long it may wait is no bound to what is tested: a test that is about that says so by `timing`.
    """
    if condition is None:
        for _ in range(10):
            await asyncio.sleep(0)
        return
    deadline, turns = time.monotonic() + seconds, 0
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come about"
        turns += 1
        await asyncio.sleep(0 if turns < 50 else 0.005)  # mostly it takes some turns, and only seldom time


@pytest_asyncio.fixture(autouse=True)
async def nothing_is_left_behind(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Fail a test that leaves a task or a descriptor, or makes its loop report an error."""
    if not isinstance(request.node, pytest_asyncio.plugin.PytestAsyncioFunction):
        yield
        return
    loop = asyncio.get_running_loop()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda loop, context: errors.append(context))
    if request.node.get_closest_marker("slow"):
        # Crowds show what does not grow, is not lost and stays within its bounds. In debug mode, in which tests of a few
        # show the rest, they would take ten times as long: a loop notes then for each call by which way it came about.
        loop.set_debug(False)
    # A busy machine makes callbacks slow, and a test that counts warnings is not to find one of that.
    loop.slow_callback_duration = float("inf")
    tasks_before = asyncio.all_tasks()
    descriptors_before = open_descriptors()
    yield

    def left() -> Any:
        tasks = asyncio.all_tasks() - tasks_before - {asyncio.current_task()}
        descriptors = {n: what for n, what in open_descriptors().items() if n not in descriptors_before}
        # Not the loops' own: epoll, eventfd, and the descriptor that libuv keeps in reserve.
        return tasks or {n: what for n, what in descriptors.items() if "event" not in what and what != "/dev/null"}

    deadline = time.monotonic() + LEFT_FOR
    while left() and time.monotonic() < deadline:
        gc.collect()
        await asyncio.sleep(0.01)
    loop.set_exception_handler(None)
    assert not left()
    gc.collect()
    await asyncio.sleep(0)
    assert not errors


@pytest.fixture
def sessions_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that are not about how long the peer of a session must be silent at a stop: it is a second."""
    monkeypatch.setattr(sessions, "QUIET", 0.05)


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A certificate authority with a server's and a client's certificate, as contexts and as files."""
    authority = trustme.CA()
    server_certificate = authority.issue_cert("localhost", "127.0.0.1", "::1")
    client_certificate = authority.issue_cert("client@example.org")
    folder = tmp_path_factory.mktemp("tls")
    files = SimpleNamespace(
        ca=folder / "ca.pem", server=folder / "server.pem", client=folder / "client.pem", folder=folder
    )
    authority.cert_pem.write_to_path(files.ca)
    server_certificate.private_key_and_cert_chain_pem.write_to_path(files.server)
    client_certificate.private_key_and_cert_chain_pem.write_to_path(files.client)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_certificate.configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    mutual = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_certificate.configure_cert(mutual)
    authority.configure_trust(mutual)
    mutual.verify_mode = ssl.CERT_REQUIRED
    known_client = ssl.create_default_context()
    authority.configure_trust(known_client)
    client_certificate.configure_cert(known_client)

    def as_debians() -> ssl.SSLContext:
        """Return a new context as Debian's and Ubuntu's Pythons make it, which leaves the versions to OpenSSL."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server_certificate.configure_cert(context)
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        return context

    return SimpleNamespace(
        server=server, client=client, mutual=mutual, known_client=known_client, files=files, as_debians=as_debians
    )


def check_identity(server: aioecho.BaseServer) -> None:
    """The accounting holds at any moment."""
    s = server.stats
    assert s.accepted == s.active + s.completed + s.failed + s.cancelled + s.rejected
    assert s.active == len(server.connections)
    assert sum(s.reasons.values()) == s.accepted - s.active
