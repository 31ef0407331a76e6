"""Questions over the channel: the supervisor asks its workers for something, and gathers what they answer.

A question is the message "ask", with a serial number, the name of what is asked for, and its values. The worker sends
"answer" messages with the same serial. Each carries a part, and the last one says that it is the last. A large answer is
made part by part, with a turn of the event loop between two parts, so that neither process is held up by it.
"""

import asyncio
import inspect
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from aioecho.exceptions import AioechoError
from aioecho.workers.channel import Channel
from aioecho.workers.slots import WorkerProcess

__all__ = ["Answering", "Answers", "Asking", "Question"]

ANSWER_TIMEOUT = 1.0
"""Seconds that workers have to answer."""

# Questions that a worker answers at a time. It refuses others, as it has hung since the first of these was asked.
MOST_QUESTIONS = 64

Question = Callable[..., Any]
"""What answers a question in a worker: called with the values by keyword.

It returns the answer, or an awaitable of it. An iterator, or an asynchronous one, gives the parts of a large answer; None of it
is no part, and only lets another turn of the event loop come.
"""


@dataclass
class Answers:
    """What workers have answered. A worker is in exactly one of the three."""

    parts: dict[WorkerProcess, list[Any]] = field(default_factory=dict)
    """The parts that each worker has sent, in order. A small answer is one part."""
    errors: dict[WorkerProcess, str] = field(default_factory=dict)
    """What has kept a worker from its answer, as text for people."""
    silent: list[WorkerProcess] = field(default_factory=list)
    """Workers that have not answered in time, or have ended meanwhile."""

    @property
    def values(self) -> dict[WorkerProcess, Any]:
        """The first part of each answer, for answers that have one part."""
        return {worker: parts[0] for worker, parts in self.parts.items()}


class _Gathering:
    """One question that was asked: which workers have not answered it yet, and what the others have."""

    def __init__(self, workers: Collection[WorkerProcess], done: "asyncio.Future[None]") -> None:
        self.waiting = set(workers)
        self.parts: dict[WorkerProcess, list[Any]] = {worker: [] for worker in workers}
        self.answers = Answers()
        self.done = done

    def settle(self, worker: WorkerProcess) -> bool:
        """Await nothing more of this worker; return whether anything was awaited of it."""
        if worker not in self.waiting:
            return False
        self.waiting.discard(worker)
        if not self.waiting and not self.done.done():
            self.done.set_result(None)
        return True


class Asking:
    """The supervisor's side: asks all workers that may have clients.

    Args:
        workers: the processes that have not ended; the supervisor's own set, which changes.
    """

    def __init__(self, workers: Collection[WorkerProcess]) -> None:
        self._workers = workers
        self._serials = itertools.count(1)
        self._gatherings: dict[int, _Gathering] = {}

    async def ask(
        self,
        what: str,
        /,
        *,
        timeout: float = ANSWER_TIMEOUT,
        workers: Collection[WorkerProcess] | None = None,
        **values: Any,
    ) -> Answers:
        """Ask `workers`, or all that may have clients, and return what they have answered within `timeout` seconds.

        `values` are sent as JSON. A worker that ends, or does not answer in time, is among the `silent` ones. This raises
        nothing because of a worker.
        """
        asked = [worker for worker in self._workers if worker.may_have_clients] if workers is None else list(workers)
        asked.sort(key=lambda worker: (worker.slot.number, worker.process.pid))
        serial = next(self._serials)
        gathering = _Gathering(asked, asyncio.get_running_loop().create_future())
        self._gatherings[serial] = gathering
        try:
            for worker in asked:
                if not worker.channel.send("ask", serial=serial, what=what, values=values):
                    gathering.settle(worker)
                    gathering.answers.silent.append(worker)
            if gathering.waiting:
                await asyncio.wait({gathering.done}, timeout=timeout)
        finally:
            del self._gatherings[serial]
        gathering.answers.silent += [worker for worker in asked if worker in gathering.waiting]
        return gathering.answers

    def on_answer(self, worker: WorkerProcess, message: Mapping[str, Any]) -> None:
        """Note a worker's message "answer". It may be too late: then it is dropped."""
        gathering = self._gatherings.get(message["serial"])
        if gathering is None or worker not in gathering.waiting:
            return
        if "error" in message:
            gathering.answers.errors[worker] = message["error"]
            gathering.settle(worker)
            return
        if "part" in message:
            gathering.parts[worker].append(message["part"])
        if message["is_last"]:
            gathering.answers.parts[worker] = gathering.parts[worker]
            gathering.settle(worker)

    def on_end(self, worker: WorkerProcess) -> None:
        """Await nothing of a worker that has ended."""
        for gathering in self._gatherings.values():
            if gathering.settle(worker):
                gathering.answers.silent.append(worker)


class Answering:
    """A worker's side: answers the supervisor's questions.

    Args:
        channel: attached to the running loop.
        questions: what answers them, by the name of what is asked for. The mapping may grow later.
    """

    def __init__(self, channel: Channel, questions: Mapping[str, Question]) -> None:
        self._channel = channel
        self._questions = questions
        self._tasks: set[asyncio.Task[None]] = set()

    def on_ask(self, message: Mapping[str, Any]) -> None:
        """Answer a message "ask": at once if that takes no waiting, or else in a task."""
        serial, what = message["serial"], message["what"]
        try:
            if what not in self._questions:
                raise ValueError(f"this worker knows nothing of {what!r}")
            answer = self._questions[what](**message["values"])
        except Exception as error:
            self._send_error(serial, error)
            return
        if not (inspect.isawaitable(answer) or isinstance(answer, Iterator | AsyncIterator)):
            self._channel.send("answer", serial=serial, part=answer, is_last=True)
        elif len(self._tasks) >= MOST_QUESTIONS:
            if inspect.iscoroutine(answer):
                answer.close()
            self._send_error(serial, RuntimeError(f"it has {MOST_QUESTIONS} questions to answer before this one"))
        else:
            task = asyncio.get_running_loop().create_task(self._answer(serial, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, serial: int, answer: Any) -> None:
        try:
            if inspect.isawaitable(answer):
                self._channel.send("answer", serial=serial, part=await answer, is_last=True)
                return
            async for part in _each_in_its_turn(answer):
                await self._channel.drain()
                if part is not None and not self._channel.send("answer", serial=serial, part=part, is_last=False):
                    return
            self._channel.send("answer", serial=serial, is_last=True)
        except Exception as error:
            self._send_error(serial, error)

    def _send_error(self, serial: int, error: Exception) -> None:
        text = str(error) if isinstance(error, AioechoError | ValueError) else f"{type(error).__name__}: {error}"
        self._channel.send("answer", serial=serial, error=text, is_last=True)

    async def stop(self) -> None:
        """Answer no more: cancel what is under way."""
        tasks: list[Awaitable[None]] = [*self._tasks]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _each_in_its_turn(parts: Any) -> AsyncIterator[Any]:
    """Yield the parts of an iterator of either kind, with a turn of the event loop behind each."""
    if isinstance(parts, AsyncIterator):
        async for part in parts:
            yield part
            await asyncio.sleep(0)
    else:
        for part in parts:
            yield part
            await asyncio.sleep(0)
