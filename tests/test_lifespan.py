"""What a program opens before it serves, and closes after it has drained."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import settle
from helpers import ANYWHERE, ask, ask_by_datagram, close
from programs import Program, can_connect, eventually
from programs import ask as ask_program

import aioecho


class Tell(aioecho.StreamRequestHandler):
    async def handle(self) -> None:
        await self.reader.readline()
        await self.send(repr(self.state).encode())


class TellDatagram(aioecho.DatagramRequestHandler):
    async def handle(self) -> None:
        self.reply(repr(self.state).encode())


class Recorded:
    """A lifespan that notes what happens, and can be made to fail."""

    def __init__(self, *, fails: str = "") -> None:
        self.events: list[Any] = []
        self.fails = fails

    @contextlib.asynccontextmanager
    async def __call__(self, server: aioecho.BaseServer) -> AsyncIterator[str]:
        task = asyncio.current_task()
        self.events.append(("entered", server.is_serving()))
        if self.fails == "start":
            raise ValueError("no database")
        try:
            yield "the state"
        finally:
            assert asyncio.current_task() is task
            self.events.append(("left", server.is_serving(), len(server.connections)))
            if self.fails == "end":
                raise ValueError("not closed")
            if self.fails == "hangs":
                await asyncio.Event().wait()


async def test_it_is_entered_before_the_server_serves_and_left_after_the_drain() -> None:
    lifespan = Recorded()
    async with aioecho.TCPServer(ANYWHERE, Tell, lifespan=lifespan) as server:
        assert lifespan.events == [("entered", False)]
        assert server.state == "the state"
        assert await ask(server) == b"'the state'"
        reader, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: bool(server.connections))
        writer.write(b"\n")
        await server.shutdown()
        assert await reader.read() == b"'the state'"
        await close(writer)
    assert lifespan.events == [("entered", False), ("left", False, 0)]
    assert not server.has_failed()


async def test_a_handler_may_have_a_state_of_its_own() -> None:
    class Own(Tell):
        async def setup(self) -> None:
            self.state = f"{self.state}, mine"

    async with aioecho.TCPServer(ANYWHERE, Own, lifespan=Recorded()) as server:
        assert await ask(server) == b"'the state, mine'"
    async with aioecho.TCPServer(ANYWHERE, Tell) as server:
        assert await ask(server) == b"None"


async def test_a_service_of_streams_and_datagrams_has_one() -> None:
    lifespan = Recorded()
    handlers: Any = {Tell: "tcp://127.0.0.1:0", TellDatagram: "udp://127.0.0.1:0"}
    async with aioecho.serve(handlers, lifespan=lifespan) as server:
        assert await ask(server) == b"'the state'"
        assert await asyncio.to_thread(ask_by_datagram, server.names[1]) == b"'the state'"
        assert len(lifespan.events) == 1
    assert lifespan.events[1:] == [("left", False, 0)]


async def test_its_failure_is_the_starts() -> None:
    server = aioecho.TCPServer(ANYWHERE, Tell, lifespan=Recorded(fails="start"))
    with pytest.raises(ValueError, match="no database"):
        await server.start()
    assert not server.is_serving()
    await server.shutdown()


async def test_one_that_does_not_yield_is_a_mistake() -> None:
    class Empty:
        async def __aenter__(self) -> None:
            raise asyncio.CancelledError

        async def __aexit__(self, *_: object) -> None:
            pass

    server = aioecho.TCPServer(ANYWHERE, Tell, lifespan=lambda _: Empty())
    with pytest.raises(asyncio.CancelledError):
        await server.start()
    await server.shutdown()


async def test_it_is_left_when_the_server_cannot_listen() -> None:
    async with aioecho.TCPServer(ANYWHERE, Tell) as other:
        lifespan = Recorded()
        server = aioecho.TCPServer(other.server_address, Tell, lifespan=lifespan)
        with pytest.raises(aioecho.EndpointError):
            await server.start()
        assert lifespan.events == [("entered", False), ("left", False, 0)]


async def test_what_it_raises_at_the_end_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with aioecho.TCPServer(ANYWHERE, Tell, lifespan=Recorded(fails="end")) as server:
        assert await ask(server) == b"'the state'"
    assert "the lifespan raised" in caplog.text
    assert "not closed" in caplog.text
    assert server.has_failed()


async def test_an_end_that_hangs_is_cancelled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aioecho.serving.lifespan.LEAST", 0.05)
    async with aioecho.TCPServer(ANYWHERE, Tell, lifespan=Recorded(fails="hangs"), grace=0.1) as server:
        pass
    assert "took longer to end than the grace" in caplog.text
    assert server.has_failed()


async def test_a_task_of_it_that_fails_stops_the_server(caplog: pytest.LogCaptureFixture) -> None:
    fail = asyncio.Event()

    async def work() -> None:
        await fail.wait()
        raise ValueError("the background task failed")

    @contextlib.asynccontextmanager
    async def lifespan(server: aioecho.BaseServer) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            working = tasks.create_task(work())
            yield
            working.cancel()

    server = aioecho.TCPServer(ANYWHERE, Tell, lifespan=lifespan)
    serving = asyncio.create_task(server.serve_forever())
    await settle(server.is_serving)
    assert await ask(server) == b"None"
    fail.set()
    await serving
    assert server.has_failed()
    assert "the background task failed" in caplog.text


PROGRAM = """
import contextlib
import aioecho

@contextlib.asynccontextmanager
async def lifespan(server):
    if {fails!r} == "start":
        raise ValueError("no database")
    yield "open"
    if {fails!r} == "end":
        raise ValueError("not closed")
    print("closed", flush=True)

class Tell(aioecho.StreamRequestHandler):
    async def handle(self):
        await self.send(self.state.encode())

if __name__ == "__main__":
    aioecho.run(Tell, "unix:s", workers={workers}, lifespan=lifespan)
"""


@pytest.mark.parametrize(("workers", "fails"), [(1, ""), (2, ""), (2, "start"), (1, "end"), (2, "end")])
def test_each_process_of_a_program_has_its_own(tmp_path: Path, workers: int, fails: str) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.format(workers=workers, fails=fails))
    with Program(sys.executable, "program.py", cwd=tmp_path) as program:
        if fails == "start":
            code, output, errors = program.end()
            assert code == 1
            assert "no database" in errors
            return
        eventually(lambda: can_connect(f"unix:{tmp_path / 's'}"))
        assert ask_program(f"unix:{tmp_path / 's'}") == b"open"
        program.process.terminate()
        code, output, errors = program.end()
    if fails:
        assert "not closed" in errors
        assert code == 1
        assert "the lifespan of" in errors.splitlines()[-1]
    else:
        assert code == 0
        # The second worker may not have come to serve; and two that write at once mix their lines.
        assert not output.replace(b"closed", b"").strip()
        assert 1 <= output.count(b"closed") <= workers
