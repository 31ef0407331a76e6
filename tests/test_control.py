"""Live control: what `server.connections` tells, and the control socket as its clients meet it."""

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import check_identity, settle
from helpers import ANYWHERE, ON_ONE_LOOP, check_mistake, close, handler, invoke
from programs import Program, ask, connect, read_line

import aioecho
from aioecho.cli.ctl import format_cells
from aioecho.cli.top import _screen
from aioecho.datagrams.handover import Handover
from aioecho.echo import DatagramEcho
from aioecho.ops.control import BURST, MOST_CLIENTS, RATE, parse_control
from aioecho.ops.control_request import parse_request
from aioecho.ops.control_server import make_control
from aioecho.ops.control_view import IN_A_TURN, ServerView
from aioecho.several import make_servers, servers_of
from aioecho.workers.channel import Channel
from aioecho.workers.control import SupervisorControl
from aioecho.workers.single import run_server
from aioecho.workers.watching import WorkerWatch
from aioecho.workers.worker import _Worker


async def wait(self: Any) -> None:
    self.label = "user 7"
    await self.reader.read()


async def greet(self: Any) -> None:
    self.label = "user 7"
    await self.send(b"hello\n")
    await self.reader.read()


def say(path: Path, line: str, newline: str = "\n", half_close: bool = True) -> list[dict[str, Any]]:
    """Send a control socket a line, and return the lines of the answer."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        sock.sendall((line + newline).encode())
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := sock.recv(2**16):
            received += chunk
    return [json.loads(text) for text in received.splitlines()]


def only(path: Path, line: str) -> dict[str, Any]:
    (answer,) = say(path, line)
    return answer


def eventually(path: Path, line: str, condition: Any, seconds: float = 20) -> dict[str, Any]:
    import time

    deadline = time.monotonic() + seconds
    while not condition(answer := say(path, line)[-1]):
        assert time.monotonic() < deadline, answer
        time.sleep(0.02)
    return answer


@pytest.mark.asyncio
async def test_a_kicked_connection_ends_as_cancelled_and_kicked() -> None:
    async with aioecho.TCPServer(ANYWHERE, handler(wait)) as server:
        reader, writer = await asyncio.open_connection(*server.server_address)
        await settle(lambda: any(each.label == "user 7" for each in server.connections))
        (connection,) = server.connections
        assert isinstance(connection, aioecho.LiveConnection)
        assert connection.id == "1"
        assert server.connections.get("1") is connection
        assert connection.since <= asyncio.get_running_loop().time()
        writer.write(b"12345")
        await settle(lambda: connection.bytes().received == 5)
        assert connection.bytes().unsent == 0
        connection.kick("by a test")
        with contextlib.suppress(ConnectionResetError):  # what the handler has not read by then
            assert await reader.read() == b""
        await settle(lambda: not server.connections)
        assert server.stats.cancelled == 1
        assert server.stats.reasons == {"kicked": 1}
        assert connection.id == ""
        check_identity(server)
        await close(writer)


@pytest.mark.asyncio
async def test_ids_are_never_used_again() -> None:
    async with aioecho.TCPServer(ANYWHERE, handler(wait)) as server:
        seen = []
        for _ in range(3):
            _, writer = await asyncio.open_connection(*server.server_address)
            await settle(lambda: len(server.connections) == 1)
            seen += [connection.id for connection in server.connections]
            await close(writer)
            await settle(lambda: not server.connections)
        assert seen == ["1", "2", "3"]


@pytest.mark.asyncio
async def test_looking_for_connections_keeps_the_loop_for_a_part_of_them_at_a_time(tmp_path: Path) -> None:
    turns = 0

    def count_turns() -> None:
        nonlocal turns, handle
        turns += 1
        handle = asyncio.get_running_loop().call_soon(count_turns)

    async def turns_of(line: str) -> int:
        before = turns
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(line.encode() + b"\n")
        assert b'"shown": 0' in await reader.read()
        await close(writer)
        return turns - before

    path = tmp_path / "control"
    async with (
        aioecho.UnixStreamServer(str(tmp_path / "service"), handler(wait)) as server,
        make_control(f"unix:{path}", server, lambda: None) as control,
    ):
        await control.start()
        handle = asyncio.get_running_loop().call_soon(count_turns)
        few = await turns_of("list host=10.0.0.0/8")
        clients = [await asyncio.open_unix_connection(tmp_path / "service") for _ in range(450)]
        await settle(lambda: len(server.connections) == 450)
        many = await turns_of("list host=10.0.0.0/8")
        handle.cancel()
        assert many - few >= 450 // IN_A_TURN
        for _, writer in clients:
            await close(writer)


@ON_ONE_LOOP
async def test_to_look_for_an_id_gives_no_other_connection_one(tmp_path: Path) -> None:
    async with aioecho.TCPServer(ANYWHERE, handler(wait)) as server:
        clients = [await asyncio.open_connection(*server.server_address) for _ in range(3)]
        await settle(lambda: len(server.connections) == 3)
        view = ServerView(server)
        assert view.kick(["99"]) == []
        assert view.look("98") is None
        *_, last = server.connections
        assert last.id == "1"
        assert view.kick(["1"]) == ["1"]
        await settle(lambda: len(server.connections) == 2)
        for _, writer in clients:
            await close(writer)


@pytest.mark.asyncio
async def test_clients_that_read_nothing_or_trace_do_not_delay_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "control"
    async with aioecho.TCPServer(ANYWHERE, handler(wait, __qualname__="x" * 2**18)) as server:
        clients = [await asyncio.open_connection(*server.server_address) for _ in range(4)]
        await settle(lambda: sum(each.handler is not None for each in server.connections) == 4)
        async with make_control(f"unix:{path}", server, lambda: None) as control:
            await control.start()
            unread, tracing = socket.socket(socket.AF_UNIX), await asyncio.open_unix_connection(path, limit=2**20)
            unread.connect(str(path))
            unread.sendall(b"list\n")
            assert await asyncio.to_thread(unread.recv, 1) == b"{"
            found = next(iter(server.connections))
            tracing[1].write(f"trace {found.id}\n".encode())
            assert (await tracing[0].readline()).startswith(b"{")
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 2  # 10 s were given to what is unread
        unread.close()
        await close(tracing[1])
        assert not [record for record in caplog.records if record.levelno > 20]
        for _, writer in clients:
            await close(writer)


@ON_ONE_LOOP
async def test_of_a_label_that_a_peer_has_made_long_a_part_is_told(tmp_path: Path) -> None:
    async def handle(self: Any) -> None:
        self.label = (await self.reader.readline()).decode()
        await self.reader.read()

    path = tmp_path / "control"
    async with (
        aioecho.TCPServer(ANYWHERE, handler(handle)) as server,
        make_control(f"unix:{path}", server, lambda: None) as control,
    ):
        await control.start()
        _, writer = await asyncio.open_connection(*server.server_address)
        writer.write(b"x" * 60_000 + b"\n")
        await settle(lambda: any(each.label is not None for each in server.connections))
        reader, asking = await asyncio.open_unix_connection(path)
        asking.write(b"list\n")
        assert json.loads(await reader.readline())["label"] == "x" * 200
        for each in (writer, asking):
            await close(each)


@ON_ONE_LOOP
async def test_a_flood_of_commands_is_answered_at_a_bounded_rate(tmp_path: Path) -> None:
    path = tmp_path / "control"
    async with (
        aioecho.TCPServer(ANYWHERE, handler(wait)) as server,
        make_control(f"unix:{path}", server, lambda: None) as control,
    ):
        await control.start()
        reader, writer = await asyncio.open_unix_connection(path)
        began = asyncio.get_running_loop().time()
        writer.write(b"interactive\n" + b"status\n" * (BURST + 20))
        writer.write_eof()
        assert (await reader.read()).count(b'"ok": true') == BURST + 20
        assert asyncio.get_running_loop().time() - began >= 19 / RATE
        await close(writer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "waiting.py").write_text(
        "import aioecho\n"
        "class Waiting(aioecho.StreamRequestHandler):\n"
        "    async def handle(self):\n"
        "        self.label = 'waits'\n"
        "        await self.send(b'hello\\n')\n"
        "        async for line in self.reader:\n"
        "            await self.send(line)\n"
    )
    return tmp_path


def serve(folder: Path, *arguments: str) -> Program:
    return Program.aioecho(
        "serve", "waiting:Waiting", "--port", "0", "--control", "unix:control.sock", *arguments, cwd=folder
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_control_socket_lists_and_kicks_in_all_processes(folder: Path, workers: str) -> None:
    path = folder / "control.sock"
    with serve(folder, "--workers", workers) as program:
        endpoint = program.listening()
        assert path.stat().st_mode & 0o777 == 0o600
        clients = [connect(endpoint) for _ in range(6)]
        try:
            assert all(read_line(client) == b"hello\n" for client in clients)
            *rows, last = say(path, "list sort=sent limit=50")
            assert last == {"ok": True, "shown": 6, "matched": 6}
            assert {row["client"] for row in rows} == {f"127.0.0.1:{client.getsockname()[1]}" for client in clients}
            assert {row["label"] for row in rows} == {"waits"}
            assert {row["handler"] for row in rows} == {"Waiting"}
            assert all(row["sent_bytes"] == 6 for row in rows)
            assert len({row["id"] for row in rows}) == 6
            ages = [row["age_s"] for row in say(path, "list")[:-1]]
            assert ages == sorted(ages, reverse=True)
            if workers == "2":
                assert all(row["id"].startswith(f"{row['worker']}.") for row in rows)
            assert len(say(path, "list limit=2")) == 3
            assert say(path, "list older=1h")[-1]["matched"] == 0
            assert say(path, "list host=127.0.0.0/8")[-1]["matched"] == 6
            assert say(path, "list host=10.0.0.1")[-1]["matched"] == 0
            victim = rows[0]
            answer = only(path, json.dumps({"command": "kick", "ids": [victim["id"], "77.1"]}))
            assert answer == {"ok": True, "kicked": [victim["id"]], "gone": ["77.1"]}
            status = eventually(path, "status", lambda found: found["stats"]["active"] == 5)
            assert status["reasons"] == {"kicked": 1}
            assert len(status["workers"]) == (2 if workers == "2" else 0)
            trace = say(path, f"trace {rows[1]['id']} every=0.1 count=2")
            assert [line["id"] for line in trace[:2]] == [rows[1]["id"]] * 2
            assert trace[0]["waits_at"] == "waiting.py:6"
            assert trace[2] == {"ok": True, "ended": False}
        finally:
            for client in clients:
                client.close()
        assert program.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_limits_and_pause_that_were_set_live_hold_in_workers_that_start_later(folder: Path, workers: str) -> None:
    path = folder / "control.sock"
    with serve(folder, "--workers", workers) as program:
        endpoint = program.listening()
        assert only(path, "limits max_connections=1 overflow=reject")["ok"] is True
        assert only(path, "timeouts idle=30")["ok"] is True
        assert only(path, "pause")["ok"] is True
        if workers == "2":
            assert only(path, "workers 3") == {"ok": True, "workers": 3}
            assert only(path, "reload")["ok"] is True
            eventually(
                path,
                "status",
                lambda found: (
                    sorted(int(each["name"]) for each in found["workers"]) >= [4]
                    and all(each["state"] == "paused" for each in found["workers"])
                ),
            )
        status = only(path, "status")
        assert status["limits"]["max_connections"] == 1
        assert status["timeouts"]["idle"] == 30
        assert status["state"] == "paused"
        with connect(endpoint) as waiting:
            assert only(path, "status")["stats"]["accepted"] == 0
            assert only(path, "resume")["ok"] is True
            assert read_line(waiting) == b"hello\n"
        assert only(path, "drain grace=5")["ok"] is True
        assert program.wait() == 0


def test_the_sums_of_status_count_workers_that_have_ended_too(folder: Path) -> None:
    path = folder / "control.sock"
    with serve(folder, "--workers", "2") as program:
        endpoint = program.listening()
        for _ in range(5):
            assert ask(endpoint, b"x\n") == b"hello\nx\n"
        with connect(endpoint) as client:
            assert read_line(client) == b"hello\n"
            before = eventually(path, "status", lambda found: found["stats"]["completed"] == 5)
            assert before["stats"]["accepted"] == 6
            (victim,) = (worker for worker in before["workers"] if worker["active"])
            os.kill(victim["pid"], signal.SIGKILL)
            status = eventually(
                path, "status", lambda found: victim["pid"] not in [each["pid"] for each in found["workers"]]
            )
        assert status["stats"]["accepted"] == 6
        assert status["stats"]["completed"] == 5
        assert status["stats"]["failed"] == 1
        assert status["reasons"] == {"finished": 5, "worker died": 1}
        assert only(path, "reload")["ok"] is True
        numbers = {each["name"] for each in before["workers"]} | {"3"}
        status = eventually(path, "status", lambda found: not numbers & {each["name"] for each in found["workers"]})
        assert status["stats"]["accepted"] == 6
        assert status["reasons"] == {"finished": 5, "worker died": 1}
        assert program.stop() == 0


@ON_ONE_LOOP
async def test_kick_limits_pause_and_drain_hold_under_load_in_two_workers(folder: Path) -> None:
    async def talk() -> tuple[bytes, bytes]:
        """Exchange lines until the end; return what was asked last, and what has come as its answer."""
        host, port = endpoint.removeprefix("tcp://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        asked, answer = b"", await reader.readline()
        with contextlib.suppress(ConnectionError):
            while answer:
                asked, answer = b"x" * 100 + b"\n", b""
                writer.write(asked)
                answer = await reader.readline()
        await close(writer)
        return asked, answer

    async def tell(line: str) -> list[dict[str, Any]]:
        return await asyncio.to_thread(say, path, line)

    path = folder / "control.sock"
    with serve(folder, "--workers", "2") as program:
        endpoint = program.listening()
        clients: list[asyncio.Task[Any]] = []
        workers: list[dict[str, Any]] = [{}]
        while not all(worker.get("active") for worker in workers):  # one may take all of a few
            clients += [asyncio.create_task(talk()) for _ in range(40)]
            while (status := (await tell("status"))[0])["stats"]["active"] < len(clients):
                pass
            workers = status["workers"]
        count = len(clients)
        *rows, _ = await tell("list sort=received")
        victims = [row["id"] for row in rows[::5]]
        assert {row["worker"] for row in rows} == {"1", "2"}
        (answer,) = await tell(f"kick {' '.join(victims)}")
        assert (answer["ok"], sorted(answer["kicked"])) == (True, sorted(victims))
        await settle(lambda: sum(client.done() for client in clients) == len(victims))
        assert (await tell("limits max_connections=1000 overflow=reject"))[0]["ok"] is True
        assert (await tell("pause"))[0]["ok"] is True
        waiting = asyncio.create_task(talk())
        assert (await tell("status"))[0]["stats"]["accepted"] == count
        assert (await tell("resume"))[0]["ok"] is True
        while (status := (await tell("status"))[0])["stats"]["accepted"] <= count:
            pass
        assert status["reasons"] == {"kicked": len(victims)}
        assert status["limits"]["max_connections"] == 1000
        assert not waiting.done()
        assert sum(client.done() for client in clients) == len(victims)
        assert (await tell("drain grace=10"))[0]["ok"] is True
        for asked, answered in await asyncio.gather(*clients, waiting):
            assert answered in (b"", asked)  # never a part of one
        assert await asyncio.to_thread(program.wait) == 0
        assert "Traceback" not in program.stderr()


@ON_ONE_LOOP
async def test_of_several_servers_one_is_named_or_all_are_meant(tmp_path: Path) -> None:
    def make() -> list[aioecho.BaseServer]:
        limits = aioecho.Limits(max_connections=7)
        return [
            aioecho.TCPServer(ANYWHERE, handler(greet), limits=limits),
            aioecho.TCPServer(ANYWHERE, handler(greet)),
            aioecho.UDPServer(ANYWHERE, DatagramEcho),
        ]

    async def tell(line: str) -> dict[str, Any]:
        (answer,) = await asyncio.to_thread(say, path, line)
        return answer

    path = tmp_path / "control"
    program = make_servers(make)
    first, second, third = servers_of(program)
    async with program, make_control(f"unix:{path}", program, lambda: None) as control:
        await control.start()
        assert (await tell("limits server=2 max_connections=3"))["ok"] is True
        assert (await tell("timeouts idle=30"))["ok"] is True
        assert [each.limits.max_connections for each in (first, second, third)] == [7, 3, None]
        assert [each.timeouts.idle for each in (first, second, third)] == [30, 30, 30]
        answer = await tell("limits max_connections=5 accept_rate=9")  # which is not for datagrams
        assert answer["error"].startswith("server 3: accept_rate")
        assert [each.limits.max_connections for each in (first, second, third)] == [7, 3, None]
        assert (await tell("limits server=1"))["limits"]["max_connections"] == 7
        told = (await tell("limits"))["servers"]
        assert [each["limits"]["max_connections"] for each in told] == [7, 3, None]
        clients = [await asyncio.open_connection(*each.server_address) for each in (first, second, second)]
        for reader, _ in clients:
            assert await reader.readline() == b"hello\n"
        *rows, last = await asyncio.to_thread(say, path, "list server=2")
        assert (len(rows), last["matched"]) == (2, 2)
        assert (await asyncio.to_thread(say, path, "list"))[-1]["matched"] == 3
        assert (await tell("pause server=2"))["ok"] is True
        status = await tell("status")
        assert status["state"] == "serving"
        assert [(each["server"], each["state"], each["active"]) for each in status["servers"]] == [
            (1, "serving", 1),
            (2, "paused", 2),
            (3, "serving", 0),
        ]
        assert (await tell("pause"))["ok"] is True
        assert program.is_paused
        assert program.metrics().get("aioecho_paused") == 1
        assert (await tell("resume server=1"))["ok"] is True
        assert [each.is_paused for each in (program, first, second, third)] == [False, False, True, True]
        for line in ("limits server=4 max_connections=1", "limits server=4", "pause server=4", "list server=4"):
            assert "there is no server 4" in (await tell(line))["error"]
        assert "server must be a whole number" in (await tell("pause server=x"))["error"]
        status, output, _ = await asyncio.to_thread(invoke, "ctl", "--control", f"unix:{path}", "limits")
        heads = [text for text in output.decode().splitlines() if text.startswith("server ")]
        assert heads == [f"server {number}, {each.names[0]}:" for number, each in enumerate(servers_of(program), 1)]
        status, output, _ = await asyncio.to_thread(invoke, "ctl", "--control", f"unix:{path}", "status")
        assert f"server 2  paused  active 2  listening on {second.names[0]}\n" in output.decode()
        for _, writer in clients:
            await close(writer)


def test_what_was_set_live_for_one_server_holds_for_that_one_in_workers_that_start_later(folder: Path) -> None:
    (folder / "two.py").write_text(
        "import aioecho, waiting\n"
        "def make():\n"
        "    return [\n"
        "        aioecho.serve(waiting.Waiting, 'tcp://127.0.0.1:0', limits=aioecho.Limits(backlog=backlog))\n"
        "        for backlog in (7, 8)\n"
        "    ]\n"
    )
    path = folder / "c"
    arguments = ("serve", "two:make", "--factory", "--workers", "2", "--control", "unix:c", "--metrics", "unix:m")
    with Program.aioecho(*arguments, cwd=folder) as program:
        endpoints = [program.listening() for _ in range(2)]
        metrics = ask(f"unix:{folder / 'm'}", b"GET /metrics HTTP/1.1\r\nConnection: close\r\n\r\n").decode()
        for endpoint, backlog in zip(endpoints, (7, 8), strict=True):
            assert f'aioecho_accept_queue_limit{{endpoint="{endpoint}"}} {backlog}\n' in metrics
        assert only(path, "limits server=2 max_connections=1")["ok"] is True
        assert only(path, "pause server=1")["ok"] is True
        assert "there is no server 3" in only(path, "limits server=3 max_connections=1")["error"]
        assert only(path, "reload")["ok"] is True
        status = eventually(path, "status", lambda found: {each["name"] for each in found["workers"]} == {"3", "4"})
        found = [(each["limits"]["max_connections"], each["state"]) for each in status["servers"]]
        assert found == [(None, "paused"), (1, "serving")]
        with connect(endpoints[0]) as waiting, connect(endpoints[1]) as served:
            assert read_line(served) == b"hello\n"
            assert only(path, "resume")["ok"] is True
            assert read_line(waiting) == b"hello\n"
            waiting.sendall(b"half a line")
            assert only(path, "reload")["ok"] is True
            status = eventually(
                path, "status", lambda found: "draining" in [each["state"] for each in found["workers"]]
            )
            assert status["state"] == "serving"
        assert program.stop() == 0


@ON_ONE_LOOP
async def test_limits_that_workers_cannot_have_are_not_set_for_later_ones_either() -> None:
    server = aioecho.UDPServer(ANYWHERE, DatagramEcho)
    control = SupervisorControl(None, server)
    with pytest.raises(ValueError, match="accept_rate"):
        await control.set_live("limits", {"accept_rate": 5}, None)
    worker: Any = SimpleNamespace(number=1)
    assert control.orders(worker)["settings"] == [{"limits": {}, "timeouts": {}, "paused": False}]


def test_what_is_set_as_a_worker_starts_is_not_undone_by_its_order() -> None:
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    server = aioecho.TCPServer(ANYWHERE, handler(greet))
    what: Any = SimpleNamespace(max_requests=None, is_measured=False)
    heritage, successor = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    handover = Handover(None, successor)
    settings = {"limits": {"max_connections": 1}, "timeouts": {}, "paused": True}
    ours.send("serve", number=1, settings=[settings, settings])
    ours.send("ask", serial=1, what="control.limits", values={"changes": {"max_connections": 2}})
    ours.send("ask", serial=2, what="control.resume", values={})
    ours.send("end", why="")
    with ours.sock, theirs.sock, heritage, handover, asyncio.Runner() as runner:
        runner.run(_Worker(server, theirs, what, handover).run())
    assert (server.limits.max_connections, server.is_paused) == (2, False)


@ON_ONE_LOOP
async def test_counts_that_come_late_do_not_replace_newer_ones() -> None:
    watch = WorkerWatch(set(), Any, Any, healthcheck=None, metrics=None, is_stopping=lambda: False)  # type: ignore[arg-type]
    worker: Any = SimpleNamespace(last_told=0, stats={}, reasons={}, metrics=(0, {}))
    for told, expected in ((1, 1), (3, 3), (2, 3), (4, 4)):
        watch.keep_counts(worker, {"told": told, "stats": {"accepted": told}, "reasons": {}})
        assert worker.stats == {"accepted": expected}


def test_to_drain_again_or_by_a_signal_lets_connections_go_on(folder: Path) -> None:
    path = folder / "control.sock"
    with serve(folder, "--workers", "2") as program, connect(program.listening()) as client:
        assert read_line(client) == b"hello\n"
        client.sendall(b"half")
        for _ in range(2):
            assert only(path, "drain grace=60")["ok"] is True
        program.signal(signal.SIGTERM)
        eventually(path, "status", lambda found: found["state"] == "draining")
        client.sendall(b" a line\n")
        assert read_line(client) == b"half a line\n"
        assert program.wait() == 0


@pytest.mark.parametrize("width", [80, 120])
def test_top_shows_ids_and_numbers_whole_beside_long_names(width: int) -> None:
    rich = pytest.importorskip("rich.console")
    from rich.cells import cell_len

    sizes = dict.fromkeys(("received_bytes", "sent_bytes", "unsent_bytes"), 34_500_000)
    names = {"handler": "h" * 40, "label": "日本語" * 50, "client": f"/run/{'x' * 90}/end"}
    row = {"id": "107.12345", "age_s": 700_000, **names, **sizes}
    status = {"state": "serving", "pid": 7, "uptime_s": 5, "reasons": {}, "endpoints": ["unix:" + "y" * 200]}
    counts = dict.fromkeys(("active", "accepted", "completed", "failed", "cancelled", "rejected"), 12_345_678)
    workers = [{"name": str(n), "slot": n, "pid": 10_000 + n, "state": "serving"} for n in range(1, 65)]
    console = rich.Console(width=width, file=io.StringIO())
    shown = _screen({**status, "stats": counts, "workers": workers}, None, [row, {}], "age", 8, width)
    console.print(shown)
    lines = console.file.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    (line,) = (line for line in lines if line.startswith("107.12345"))
    assert line.split()[2:6] == ["8d02h", "34.5M", "34.5M", "34.5M"]
    assert "/end" in line
    assert "日" in line
    assert "and 57 more workers" in [line.strip() for line in lines]


def test_what_a_client_calls_itself_does_not_steer_the_terminal() -> None:
    sizes = dict.fromkeys(("received_bytes", "sent_bytes", "unsent_bytes"), 0)
    row = {"id": "1", "client": "/run/\x1b[2J\n", "age_s": 1, "handler": None, "label": "\x1b]0;x\x07", **sizes}
    assert format_cells(row)[1::6] == ("/run/?[2J?", "?]0;x?")


def test_limits_that_differ_between_workers_are_told_of_every_one(folder: Path) -> None:
    (folder / "own.py").write_text(
        "import aioecho, dataclasses\n"
        "class Own(aioecho.StreamRequestHandler):\n"
        "    async def handle(self):\n"
        "        self.server.limits = dataclasses.replace(self.server.limits, max_connections=7)\n"
    )
    with Program.aioecho(
        "serve", "own:Own", "--port", "0", "--workers", "2", "--control", "unix:c", cwd=folder
    ) as program:
        ask(program.listening())
        answer = eventually(folder / "c", "limits", lambda found: "differing" in found)
        values = answer["differing"]["limits"]["max_connections"]
        assert sorted(values.values(), key=str) == [7, None]
        status, output, _ = invoke("ctl", "--control", f"unix:{folder / 'c'}", "limits")
        (line,) = (line for line in output.decode().splitlines() if line.startswith("max_connections"))
        assert (status, "7 in worker " in line, "none in worker " in line) == (0, True, True)
        assert program.stop() == 0


def test_mistakes_are_one_line_that_says_what_to_do(folder: Path) -> None:
    path = folder / "control.sock"
    with serve(folder) as program:
        program.listening()
        for line, expected in {
            "lits": "there is no command 'lits': expected one of status, list",
            "list colour=red": "list does not take 'colour'",
            "list older=soon": "older must be seconds",
            "list host=nowhere": "host must be an address or a network",
            "list sort=name": "sort must be one of age",
            "list worker=1": "there are no workers",
            "kick": "kick takes the ids",
            "limits max_conections=5": "there is no 'max_conections': expected one of max_connections",
            "limits max_connections=-5": "max_connections must be a whole number",
            "list worker=x": "worker must be a whole number",
            "limits max-conections=5": "there is no 'max_conections'",
            "timeouts idle=soon": "idle must be a number of seconds",
            "trace 1 count=x": "count must be a whole number",
            '{"command": "trace", "id": "1", "every": null, "count": 0}': "count must be a whole number",
            '{"command": ' + "[" * 30_000: "this is no JSON",
            "trace 99": "there is no connection '99'",
            "workers +1": "there are no workers: start the program with --workers",
            "reload-tls": "there is nothing to reload",
            "{not json": "this is no JSON",
            '{"comand": "list"}': 'expected {"command"',
            "GET / HTTP/1.1": "speaks no HTTP",
        }.items():
            answer = only(path, line)
            assert answer["ok"] is False
            assert expected in answer["error"], line
        assert only(path, "timeouts idle=5m max-age=1h")["set"] == {"idle": 300, "max_age": 3600}
        assert say(path, "status", newline="")[0]["ok"] is True  # at the end of the stream
        assert say(path, "status", half_close=False)[0]["ok"] is True  # and it is closed by the server
        assert [line["ok"] for line in say(path, "interactive\npause\nresume")] == [True, True]
        assert program.stop() == 0
        assert "Traceback" not in program.stderr()


def test_a_flood_of_the_control_socket_harms_no_client_of_the_service(folder: Path) -> None:
    path = folder / "control.sock"
    with serve(folder) as program:
        endpoint = program.listening()
        flood = []
        for _ in range(MOST_CLIENTS + 4):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(10)
            sock.connect(str(path))
            flood.append(sock)
        assert b"clients are connected" in flood[-1].recv(1000)
        with connect(endpoint) as client:
            assert read_line(client) == b"hello\n"
        flood[0].sendall(b"x" * 200_000)
        assert b"a line may have" in flood[0].recv(1000)
        for sock in flood:
            sock.close()
        eventually(path, "status", lambda found: found["ok"])
        os.kill(program.process.pid, signal.SIGTERM)
        assert program.wait() == 0
        assert "Traceback" not in program.stderr()


@ON_ONE_LOOP
async def test_of_clients_that_come_at_once_the_first_ones_are_served(tmp_path: Path) -> None:
    path = tmp_path / "control"
    async with (
        aioecho.TCPServer(ANYWHERE, handler(wait)) as server,
        make_control(f"unix:{path}", server, lambda: None) as control,
    ):
        flood = [await asyncio.open_unix_connection(path) for _ in range(MOST_CLIENTS + 4)]
        await control.start()  # which accepts all of them
        assert b"clients are connected" in await flood[-1][0].read()
        flood[0][1].write(b"help\n")
        assert b'"ok": true' in await flood[0][0].read()
        for _, writer in flood:
            await close(writer)


def test_ctl_shows_the_status_and_the_connections(tmp_path: Path) -> None:
    control = f"unix:{tmp_path / 'control.sock'}"
    server, is_serving = aioecho.serve(handler(greet), f"unix:{tmp_path / 'service.sock'}"), threading.Event()
    thread = threading.Thread(
        target=run_server, args=(server,), kwargs={"control": control, "when_serving": lambda _: is_serving.set()}
    )
    thread.start()
    try:
        assert is_serving.wait(20)
        with connect(server.names[0]) as client:
            assert read_line(client) == b"hello\n"
            status, output, _ = invoke("ctl", "--control", control, "status")
            assert (status, output.splitlines()[0].partition(b",")[0]) == (0, b"serving")
            assert f"listening on {server.names[0]}\n".encode() in output
            assert b"active 1  accepted 1" in output
            status, output, _ = invoke("ctl", "--control", control, "list", "--sort", "age")
            head, row, count = output.decode().splitlines()
            assert (status, head.split()[0], row.split()[0]) == (0, "ID", "1")
            assert row.endswith("user 7")
            assert count == "1 of 1 connections"
            check_mistake(invoke("ctl", "--control", control, "lits"), "there is no command 'lits'", status=1)
            pytest.importorskip("rich")
            status, output, _ = invoke("top", "--control", control, "--every", "0.2", "--count", "2")
            assert status == 0
            assert all(len(line) <= 80 for line in output.decode().splitlines())
            lines = [line.split() for line in output.decode().splitlines()]
            assert ["active", "accepted", "completed", "failed", "cancelled", "rejected"] in lines
            assert ["in", "all", "1", "1", "0", "0", "0", "0"] in lines
            assert ["per", "second", "0.0", "0.0", "0.0", "0.0", "0.0"] in lines
            assert any(line[0] == "1" and line[-2:] == ["user", "7"] for line in lines if line)
            with contextlib.ExitStack() as others:
                for _ in range(MOST_CLIENTS):
                    others.enter_context(socket.socket(socket.AF_UNIX)).connect(str(tmp_path / "control.sock"))
                outcome = invoke("top", "--control", control, "--count", "1")
                check_mistake(outcome, "clients are connected: try again", status=1)
            eventually(tmp_path / "control.sock", "status", lambda found: found["ok"])
        assert invoke("ctl", "--control", control, "drain")[:2] == (0, b"done\n")
    finally:
        with contextlib.suppress(RuntimeError):  # it has ended
            server.begin_shutdown(0)
        thread.join(20)
    assert not thread.is_alive()
    check_mistake(invoke("ctl", "--control", control, "status"), "is the server running", status=1)


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ("tcp://127.0.0.1:1", "a control socket is a Unix socket"),
        ("unix:/run/c?proxy=v1", "no balancer stands in front of a control socket"),
    ],
)
def test_what_is_no_control_socket_is_refused_by_server_and_client(control: str, message: str) -> None:
    check_mistake(invoke("serve", "--check-config", "--control", control), message)
    check_mistake(invoke("ctl", "--control", control, "status"), message)


def test_a_value_by_its_name_means_what_it_means_by_its_place() -> None:
    assert parse_request(b"workers count=+1") == parse_request(b"workers +1") == ("workers", {"count": "+1"})
    assert parse_request(b"trace id=1.27 count=3") == parse_request(b"trace 1.27 count=3")
    assert parse_request(b"trace id=27")[1] == {"id": "27"}


def test_a_control_socket_may_be_given_an_owner() -> None:
    assert str(parse_control("unix:/run/c?owner=1&group=2")) == "unix:/run/c?mode=600&owner=1&group=2"


def test_a_control_path_that_cannot_be_bound_is_told_of_before_the_server_listens(tmp_path: Path) -> None:
    server, bound = aioecho.serve(handler(greet), "tcp://127.0.0.1:0"), []
    server.when_bound = lambda: bound.append(server.names)
    with pytest.raises(aioecho.EndpointError, match="absent"):
        run_server(server, control=f"unix:{tmp_path / 'absent' / 'control.sock'}")
    assert bound == []


@pytest.mark.parametrize("workers", ["1", "2"])
def test_serve_ends_with_one_line_if_the_control_path_cannot_be_bound(folder: Path, workers: str) -> None:
    with Program.aioecho(
        "serve", "--port", "0", "--workers", workers, "--control", "unix:absent/c", cwd=folder
    ) as program:
        outcome = program.end()
    check_mistake(outcome, "unix:absent/c", status=1)
    assert outcome[1] == b""
