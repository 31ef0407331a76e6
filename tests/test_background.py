"""A server in a thread of its own, used by synchronous code."""

import asyncio
import contextlib
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import check_identity
from programs import ROOT, Program, ask, connect, read_line

import aioecho
from aioecho.echo import Upper
from aioecho.runtime.loops import LOOPS

ANYWHERE = "tcp://127.0.0.1:0"


@pytest.fixture(autouse=True)
def threads_are_back() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("loop", LOOPS)
def test_it_serves_as_soon_as_the_block_begins_and_is_drained_at_its_end(loop: str) -> None:
    with aioecho.run_in_thread(Upper, ANYWHERE, loop=loop) as server:
        assert server.names == ("tcp://{}:{}".format(*server.server_address),)
        idle = connect(server.names[0])
        assert ask(server.names[0], b"x\n") == b"X\n"
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert idle.recv(1) == b""
    idle.close()
    assert server.stats.completed == 2
    check_identity(server.server)


def test_blocking_handlers_serve_too() -> None:
    class Blocking(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.readline().upper())

    with aioecho.run_in_thread({Blocking: ANYWHERE, Upper: ANYWHERE}) as server:
        assert [ask(name, b"x\n") for name in server.names] == [b"X\n"] * 2


@pytest.mark.parametrize("loop", LOOPS)
def test_reading_the_stats_in_another_thread_changes_nothing(loop: str) -> None:
    entered, may_go_on = threading.Event(), threading.Event()

    class Held(aioecho.DatagramRequestHandler):
        async def handle(self) -> None:
            entered.set()
            may_go_on.wait(20)
            await self.reply(self.data)

    with (
        aioecho.run_in_thread(Held, "udp://127.0.0.1:0", loop=loop) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
    ):
        sock.settimeout(20)
        sock.sendto(b"x", server.server_address)
        assert entered.wait(20)
        # A datagram's handler is counted when it has ended, or waits for something. This one may end at once.
        assert (server.stats.active, len(server.connections)) == (0, 0)
        may_go_on.set()
        assert sock.recv(9) == b"x"
    assert (server.stats.handled, server.stats.completed, server.stats.active) == (1, 1, 0)
    check_identity(server.server)


def test_what_is_wrong_with_the_start_is_raised_there() -> None:
    with pytest.raises(ValueError, match="bad endpoint"):
        aioecho.run_in_thread(Upper, "nonsense")
    with pytest.raises(ValueError, match="no event loop"):
        aioecho.run_in_thread(Upper, ANYWHERE, loop="trio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = "tcp://{}:{}".format(*taken.getsockname())
        with pytest.raises(aioecho.EndpointError, match="cannot listen on"), aioecho.run_in_thread(Upper, endpoint):
            pytest.fail("it began")


def test_shutdown_can_be_called_in_any_thread_and_more_than_once() -> None:
    class Held(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            entered.set()
            may_go_on.wait(20)
            self.request.sendall(b"done")

    entered, may_go_on = threading.Event(), threading.Event()
    with aioecho.run_in_thread(Held, ANYWHERE) as server:
        sock = connect(server.names[0])
        assert entered.wait(10)
        reports: list[Any] = []
        threads = [threading.Thread(target=lambda: reports.append(server.shutdown(20))) for _ in range(5)]
        for thread in threads:
            thread.start()
        may_go_on.set()
        for thread in threads:
            thread.join(20)
        assert sock.recv(10) == b"done"
        sock.close()
        assert len(reports) == 5
        assert {report.completed for report in reports} == {1}
    assert server.shutdown() == reports[0]


@pytest.mark.parametrize("kind", ["Blocking", "Async", "InExecutor"])
def test_a_handler_may_shut_its_server_down(kind: str) -> None:
    class Blocking(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            assert server.shutdown() is None
            self.request.sendall(b"stopping")

    class Async(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            assert server.shutdown() is None
            await self.send(b"stopping")

    class InExecutor(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            assert await asyncio.to_thread(server.shutdown) is None
            await self.send(b"stopping")

    handlers: dict[str, Any] = {"Blocking": Blocking, "Async": Async, "InExecutor": InExecutor}
    with aioecho.run_in_thread(handlers[kind], ANYWHERE) as server:
        assert ask(server.names[0]) == b"stopping"
        report = server.shutdown()
        assert report is not None
        assert report.completed == 1


def test_a_grace_that_is_none_is_refused() -> None:
    with (
        aioecho.run_in_thread(Upper, ANYWHERE) as server,
        pytest.raises(ValueError, match="grace must be a number of seconds"),
    ):
        server.shutdown(-1)


def test_what_a_handler_ends_a_program_with_is_raised_at_the_end() -> None:
    class Exits(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            sys.exit(7)

    def let_it_exit() -> None:
        with aioecho.run_in_thread(Exits, ANYWHERE) as server:
            with connect(server.names[0]) as sock, contextlib.suppress(ConnectionError):
                assert sock.recv(1) == b""
            server._thread.join(20)

    with pytest.raises(SystemExit) as caught:
        let_it_exit()
    assert caught.value.code == 7


PROGRAM = """
import signal, threading
import aioecho
from aioecho.echo import Upper

with aioecho.run_in_thread(Upper, "tcp://127.0.0.1:0") as server:
    print("listening on", server.names[0], flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
print(server.stats.completed)
"""


def test_signals_stay_the_programs(tmp_path: Any) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    with Program(sys.executable, "-X", "dev", "program.py", cwd=tmp_path) as program:
        with connect(program.listening()) as sock:
            sock.sendall(b"x\n")
            assert read_line(sock) == b"X\n"
            program.signal(signal.SIGINT)
            assert sock.recv(1) == b""
        assert program.wait() == 0
        assert program.stderr() == ""
        assert program.line() == "1"


@pytest.mark.parametrize("loop", LOOPS)
def test_its_shutdown_can_be_awaited_in_another_loop(loop: str) -> None:
    in_hand, finish = threading.Event(), threading.Event()

    class Slow(aioecho.StreamRequestHandler):
        async def handle(self) -> None:
            line = await self.reader.readline()
            in_hand.set()
            await asyncio.to_thread(finish.wait, 30)
            await self.send(line)

    with aioecho.run_in_thread(Slow, ANYWHERE, loop=loop) as background:
        sock = connect(background.names[0])
        sock.sendall(b"last words\n")
        assert in_hand.wait(10)

        async def stop() -> aioecho.DrainReport:
            stopping = asyncio.create_task(background.server.shutdown(20))
            while background.server.is_serving():
                await asyncio.sleep(0.001)
            finish.set()
            return await stopping

        report = asyncio.run(stop())
        assert (report.completed, report.cancelled, report.aborted) == (1, 0, 0)
        assert sock.recv(100) == b"last words\n"
        sock.close()


@pytest.mark.parametrize("loop", LOOPS)
def test_ctrl_c_before_it_is_ready_leaves_nothing_that_serves(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = threading.Event()

    def hear(*_: object) -> None:
        if not heard.is_set():
            heard.set()
            raise KeyboardInterrupt

    async def interrupt(self: aioecho.BaseServer) -> None:
        # Again and again: what comes between Python's last look at signals and its wait for a lock does not end that wait.
        while not heard.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await asyncio.sleep(0.01)
        await asyncio.Event().wait()  # as long as a host's name is looked up

    monkeypatch.setattr(aioecho.BaseServer, "start", interrupt)
    before = signal.signal(signal.SIGINT, hear)
    try:
        with pytest.raises(KeyboardInterrupt), aioecho.run_in_thread(Upper, ANYWHERE, loop=loop):
            raise AssertionError("it was not ready")
    finally:
        signal.signal(signal.SIGINT, before)


SUBINTERPRETER = """
import asyncio
import socket
import socketserver
import sys
import threading

sys.path[:] = {path!r}
import aioecho
from aioecho.echo import Upper
from aioecho.runtime.loops import loop_factory

def say(function, *arguments, **options):
    try:
        print(function(*arguments, **options), flush=True)
    except Exception as error:
        print(f"{{type(error).__name__}}: {{error}}", flush=True)

class Last(aioecho.StreamRequestHandler):
    async def handle(self):
        line = await self.reader.readline()
        self.server.begin_shutdown()
        await self.send(line.upper())

say(lambda: type(loop_factory("auto")()).__name__)
say(loop_factory, "uvloop")
say(aioecho.run_in_thread, Upper, "{anywhere}", loop="uvloop")
say(aioecho.run_in_thread(Upper, "{anywhere}").__enter__ if sys.version_info < (3, 12) else
    lambda: aioecho.run_in_thread(Upper, "{anywhere}"))
say(aioecho.run, Upper, "{anywhere}", workers=2)
sock = socket.create_server(("127.0.0.1", 0))
with socket.create_connection(sock.getsockname()) as client:
    client.sendall(b"served\\n")
    aioecho.run(Last, sock=sock)
    print(client.recv(100), flush=True)
"""

IN_SUBINTERPRETER = """
import os, sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
run = getattr(interpreters, "exec", None) or interpreters.run_string
failure = run(interpreters.create(), sys.argv[1])
print(failure and failure.errdisplay, flush=True)
os._exit(0)  # some versions crash when they destroy one
"""


def test_a_subinterpreter_serves_on_asyncios_loop_and_says_what_it_can_not() -> None:
    text = SUBINTERPRETER.format(path=[str(ROOT), *sys.path], anywhere=ANYWHERE)
    with Program(sys.executable, "-c", IN_SUBINTERPRETER, text) as program:
        code, output, errors = program.end()
    no_uvloop = 'ImportError: uvloop does not load in a subinterpreter: use loop="asyncio", or "auto"'
    no_thread = (
        "RuntimeError: run_in_thread() needs a daemon thread, which a subinterpreter does not have: use"
        " `async with aioecho.serve(...)` in a loop of the subinterpreter's own, or run_in_thread() in the main interpreter"
    )
    no_workers = "RuntimeError: worker processes are started from the main interpreter alone, as signals reach no other"
    expected = ["_UnixSelectorEventLoop", no_uvloop, no_uvloop, no_thread, no_workers, r"b'SERVED\n'", "None"]
    assert output.decode().splitlines() == expected
    assert (code, errors) == (0, "")


def test_a_call_that_the_end_of_the_server_overtakes_is_told_so() -> None:
    begun = threading.Semaphore(0)

    async def wait() -> None:
        begun.release()
        await asyncio.Event().wait()

    with ThreadPoolExecutor(4) as executor:
        with aioecho.run_in_thread(Upper, "tcp://127.0.0.1:0") as server:
            calls = [executor.submit(server.call, wait) for _ in range(4)]
            for _ in calls:
                assert begun.acquire(timeout=10)
        for call in calls:
            with pytest.raises(RuntimeError, match="the server has ended"):
                call.result(10)


def test_call_runs_functions_and_coroutines_in_the_servers_loop() -> None:
    async def add(one: int, two: int) -> int:
        await asyncio.sleep(0)
        assert asyncio.get_running_loop() is server.loop
        return one + two

    def fail() -> None:
        raise KeyError("mine")

    with aioecho.run_in_thread(Upper, "tcp://127.0.0.1:0") as server:
        assert server.call(server.server.broadcast, b"x") == 0
        assert server.call(add, 1, two=2) == 3
        assert server.call(add(3, 4)) == 7
        with pytest.raises(KeyError, match="mine"):
            server.call(fail)
        with pytest.raises(TypeError, match="takes a function"):
            server.call(5)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="for other threads"):
            server.call(lambda: server.call(fail))
    coroutine = add(1, 2)
    with pytest.raises(RuntimeError, match="closed"):
        server.call(coroutine)
    assert coroutine.cr_frame is None
