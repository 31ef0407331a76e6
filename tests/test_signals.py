"""The signals of a program that serves: what they do, what is said of them, and that they are given back."""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import LOOPS
from programs import connect, read_line

import aioecho
from aioecho.echo import Upper

FORKED = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


class Slow(aioecho.StreamRequestHandler):
    """Says that it has begun, and does not end by itself."""

    async def handle(self) -> None:
        await self.send(b"begun\n")
        await asyncio.Event().wait()


def run_here(handler: Any, client: Callable[[str], None], **options: Any) -> aioecho.DrainReport:
    """Run a server in this thread, the main one, and `client`, called with the endpoint, in another; it ends the server."""
    failures: list[BaseException] = []

    def call(endpoint: str) -> None:
        try:
            client(endpoint)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    with socket.create_server(("127.0.0.1", 0)) as sock:
        endpoint = "tcp://{}:{}".format(*sock.getsockname())
        thread = threading.Thread(target=call, args=(endpoint,))

        class Starting(handler):  # type: ignore[misc]
            pass

        thread.start()
        try:
            report = aioecho.run(Starting, sock=sock, **options)
        finally:
            thread.join()
    if failures:
        raise failures[0]
    return report


@pytest.fixture
def own_handlers() -> Iterator[dict[int, Any]]:
    """Handlers of the program's own, for all signals that a server takes."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    handlers: dict[int, Any] = {number: lambda *_: None for number in numbers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    yield handlers
    for number, previous in before.items():
        signal.signal(number, previous)


def taken() -> dict[int, Any]:
    return {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)}


@LOOPS
def test_run_gives_back_the_signals_that_it_took(loop: str, own_handlers: dict[int, Any]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        before = signal.set_wakeup_fd(ours.fileno())
        try:

            def client(endpoint: str) -> None:
                with connect(endpoint) as sock:
                    sock.sendall(b"a\n")
                    assert read_line(sock) == b"A\n"
                    assert taken() != own_handlers
                    os.kill(os.getpid(), signal.SIGTERM)
                    assert sock.recv(1) == b""

            run_here(Upper, client, loop=loop)
            assert taken() == own_handlers
            assert signal.set_wakeup_fd(ours.fileno()) == ours.fileno()
        finally:
            signal.set_wakeup_fd(before)


@LOOPS
def test_run_gives_them_back_after_an_error(loop: str, own_handlers: dict[int, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, pytest.raises(SystemExit, match="Address already in use"):
        aioecho.run(Upper, "tcp://{}:{}".format(*sock.getsockname()), loop=loop)
    assert taken() == own_handlers


@LOOPS
def test_a_hangup_does_not_end_a_server_of_one_process(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def client(endpoint: str) -> None:
        with connect(endpoint) as sock:
            sock.sendall(b"one\n")
            assert read_line(sock) == b"ONE\n"
            os.kill(os.getpid(), signal.SIGHUP)
            sock.sendall(b"two\n")
            assert read_line(sock) == b"TWO\n"
            with connect(endpoint) as other:
                other.sendall(b"three\n")
                assert read_line(other) == b"THREE\n"
            os.kill(os.getpid(), signal.SIGTERM)
            assert sock.recv(1) == b""

    assert run_here(Upper, client, loop=loop).cancelled == 0
    assert [record.getMessage() for record in caplog.records if "SIGHUP" in record.getMessage()] == [
        "SIGHUP: there is nothing to reload; connections go on"
    ]


@LOOPS
@pytest.mark.parametrize(("number", "level"), [(signal.SIGINT, logging.WARNING), (signal.SIGTERM, logging.INFO)])
def test_it_says_what_it_waits_for_and_what_ended_that(
    loop: str, number: signal.Signals, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    def client(endpoint: str) -> None:
        with connect(endpoint) as one, connect(endpoint) as two:
            assert read_line(one) == read_line(two) == b"begun\n"
            said = (
                f"{number.name}: stopping; waiting for 2 connections, at most 30 s; a second signal ends them at once"
            )
            os.kill(os.getpid(), number)
            while (level, said) not in {(record.levelno, record.getMessage()) for record in tuple(caplog.records)}:
                assert not select_readable(one), "it ended before it said so"
            os.kill(os.getpid(), number)
            assert one.recv(1) == two.recv(1) == b""

    assert run_here(Slow, client, loop=loop).cancelled == 2
    assert f"cut off by a second signal, {number.name}: 2 cancelled, 0 aborted" in caplog.text
    assert "grace was over" not in caplog.text


def select_readable(sock: socket.socket) -> bool:
    """Tell whether there is something to read, or the end, within a hundredth of a second."""
    sock.settimeout(0.01)
    try:
        return sock.recv(1, socket.MSG_PEEK) is not None
    except TimeoutError:
        return False
    finally:
        sock.settimeout(30)


@LOOPS
def test_a_stop_without_connections_warns_of_nothing(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    def client(endpoint: str) -> None:
        with connect(endpoint) as sock:
            sock.sendall(b"a\n")
            assert read_line(sock) == b"A\n"
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        os.kill(os.getpid(), signal.SIGINT)

    run_here(Upper, client, loop=loop)
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []


class Forks(aioecho.StreamRequestHandler):
    """Forks a child that does not end by itself, tells its process id, and echoes."""

    async def handle(self) -> None:
        read, write = os.pipe()

        def wait() -> None:
            # An interrupt that comes before is lost if it comes in what Python, or a library, does after a fork.
            os.write(write, b"x")
            signal.pause()

        child = multiprocessing.get_context("fork").Process(target=wait)
        child.start()
        os.read(read, 1)
        os.close(read)
        os.close(write)
        await self.send(b"%d\n" % (child.pid or 0))
        while line := await self.reader.readline():
            await self.send(line)


@FORKED
@LOOPS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_forked_child_ends_it_and_not_the_server(loop: str, number: signal.Signals) -> None:
    def client(endpoint: str) -> None:
        with connect(endpoint) as sock:
            child = int(read_line(sock))
            try:
                os.kill(child, number)
                _, status = os.waitpid(child, 0)
            except BaseException:
                os.kill(child, signal.SIGKILL)
                raise
            # Ctrl-C raises KeyboardInterrupt there, of which multiprocessing makes a status of 1, once it has begun.
            assert os.waitstatus_to_exitcode(status) in ({1, -number} if number == signal.SIGINT else {-number})
            sock.sendall(b"still here\n")
            assert read_line(sock) == b"still here\n"
            os.kill(os.getpid(), signal.SIGTERM)
            assert sock.recv(1) == b""

    assert run_here(Forks, client, loop=loop).cancelled == 0
