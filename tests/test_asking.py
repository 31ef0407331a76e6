"""The supervisor's questions to its workers, over real socket pairs."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from aioecho.workers import channel as channel_module
from aioecho.workers.asking import Answering, Asking
from aioecho.workers.channel import Channel


class _Worker:
    may_have_clients = True

    def __init__(self, number: int, channel: Channel, theirs: Channel) -> None:
        self.slot = SimpleNamespace(number=number)
        self.process = SimpleNamespace(pid=number)
        self.channel = channel
        self.theirs = theirs


@contextlib.asynccontextmanager
async def pair(questions: dict[str, Callable[..., Any]], count: int = 1) -> AsyncIterator[tuple[Asking, list[Any]]]:
    """Give the supervisor's side, and what it has for each of `count` workers that answer `questions`."""
    loop = asyncio.get_running_loop()
    workers: list[Any] = []
    asking = Asking(workers)
    answerings = []
    for number in range(1, count + 1):
        ours, theirs = (Channel(sock) for sock in socket.socketpair())
        worker = _Worker(number, ours, theirs)
        workers.append(worker)
        answering = Answering(theirs, questions)
        answerings.append(answering)

        def read_ours(worker: Any = worker) -> None:
            for message in worker.channel.receive():
                asking.on_answer(worker, message)

        def read_theirs(theirs: Channel = theirs, answering: Answering = answering) -> None:
            for message in theirs.receive():
                answering.on_ask(message)

        for side, read in ((ours, read_ours), (theirs, read_theirs)):
            side.attach(loop)
            loop.add_reader(side.sock.fileno(), read)
    try:
        yield asking, workers
    finally:
        for answering in answerings:
            await answering.stop()
        for worker in workers:
            for side in (worker.channel, worker.theirs):
                if side.sock.fileno() >= 0:
                    loop.remove_reader(side.sock.fileno())
                    side.close()


@pytest.mark.asyncio
async def test_all_workers_are_asked_and_their_answers_gathered() -> None:
    async with pair({"double": lambda number: number * 2}, count=3) as (asking, workers):
        answers = await asking.ask("double", number=21)
        assert answers.values == dict.fromkeys(workers, 42)
        assert not answers.silent
        assert not answers.errors


@pytest.mark.asyncio
async def test_an_answer_larger_than_the_socket_holds_comes_whole_and_in_order() -> None:
    def many() -> Any:
        for number in range(200):
            yield [number, "x" * 50_000]

    async with pair({"many": many}, count=2) as (asking, workers):
        answers = await asking.ask("many", timeout=30)
        assert [[number for number, _ in answers.parts[worker]] for worker in workers] == [list(range(200))] * 2
        assert all(len(text) == 50_000 for worker in workers for _, text in answers.parts[worker])


@pytest.mark.asyncio
async def test_a_worker_that_does_not_answer_is_named_and_the_others_count() -> None:
    async def wait(number: int) -> int:
        if number == 0:
            await asyncio.get_running_loop().create_future()
        return number

    async with pair({"wait": wait}, count=2) as (asking, workers):
        asyncio.get_running_loop().remove_reader(workers[0].theirs.sock.fileno())  # it hangs
        answers = await asking.ask("wait", timeout=0.2, number=7)
        assert answers.silent == [workers[0]]
        assert answers.values == {workers[1]: 7}
        asked = asyncio.create_task(asking.ask("wait", timeout=30, number=0, workers=[workers[1]]))
        await asyncio.sleep(0)
        asking.on_end(workers[1])
        assert (await asked).silent == [workers[1]]


@pytest.mark.asyncio
async def test_what_a_question_raises_is_the_answer_of_that_worker() -> None:
    def mistake() -> None:
        raise ValueError("no such thing")

    async with pair({"mistake": mistake}) as (asking, workers):
        assert (await asking.ask("mistake")).errors == {workers[0]: "no such thing"}
        assert "knows nothing of 'this'" in (await asking.ask("this")).errors[workers[0]]
        assert "TypeError" in (await asking.ask("mistake", extra=1)).errors[workers[0]]


@pytest.mark.asyncio
async def test_what_waits_for_a_side_that_does_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "MOST_UNSENT", 2**20)
    ours, theirs = (Channel(sock) for sock in socket.socketpair())
    ours.attach(asyncio.get_running_loop())
    sent = 0
    while ours.send("text", text="x" * 100_000):
        sent += 1
        assert sent < 100
    received: list[Any] = []
    while len(received) < sent:
        received += theirs.receive()
        await asyncio.sleep(0)
    assert ours.send("last")
    assert [len(message["text"]) for message in received] == [100_000] * sent
    ours.close()
    theirs.close()
