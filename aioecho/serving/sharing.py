"""What the handlers of a server share: the program's state and its end, tasks of the server's own, messages to many."""

import asyncio
import functools
import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from aioecho.runtime.logs import BoundedLog
from aioecho.serving.audience import MOST_UNSENT
from aioecho.serving.lifespan import Lifespan
from aioecho.serving.registry import Registry
from aioecho.serving.tasks import LEAST, Tasks

__all__ = ["Sharing"]

logger = logging.getLogger("aioecho.server")


class Sharing(Registry):
    """The part of :class:`~aioecho.serving.base.BaseServer` that is the handlers' together."""

    state: Any = None
    _lifespan: Lifespan | None = None
    # The server that it is a part of, which has one start and one drain for all of its parts: see aioecho.several.
    composite: Any = None
    # In a worker process: passes a message on to the others, and returns False if there is no room for it.
    relay: Callable[[str, bytes, str], bool] | None = None

    if not TYPE_CHECKING:  # a type checker says so itself

        def __enter__(self) -> NoReturn:
            raise TypeError(
                f"a {type(self).__qualname__} is an `async with`, in a coroutine: a synchronous program uses"
                " aioecho.run(Handler, endpoint), or `with aioecho.run_in_thread(Handler, endpoint) as server`"
            )

        def __exit__(self, *exc_info: object) -> None: ...

    @functools.cached_property
    def _result_log(self) -> BoundedLog:
        return BoundedLog(logger, logging.WARNING)

    def report_result(self, handler: Any, result: object) -> None:
        """Log that handle() has returned data, at a bounded rate: it was meant for the peer, and is not sent."""
        # One that waits for its peer's end by `return await self.reader.read()` returns nothing that could be sent.
        if result and isinstance(result, bytes | bytearray | memoryview | str):
            self._result_log.report(
                "%s.handle() returned %s, which is not sent: send it by `await self.send(data)`",
                type(handler).__qualname__,
                type(result).__name__,
            )

    @functools.cached_property
    def tasks(self) -> Tasks:
        """Tasks of the server's own: ``server.tasks.create_task(coroutine)``. In the loop's thread only.

        They outlive the connection of a handler that makes them, and are cancelled when the server has drained, before the
        lifespan is left. What one raises is logged, and ends neither the server nor other tasks, as a handler's error does not.
        Where it is to end the server, make the task in a task group of the `lifespan`.
        """
        return Tasks("the server", self._task_failed)

    def _task_failed(self, error: Exception) -> None:
        self._mistake_log.report(error, "a task of the server raised")

    def broadcast(
        self,
        data: bytes,
        *,
        to: Hashable = None,
        but: Any = None,
        most: int = MOST_UNSENT,
        full: Literal["close", "skip"] = "close",
        local: bool = False,
    ) -> int:
        """Write a message to many clients, without waiting for any of them; return to how many.

        A client gets all of the message or nothing, and broadcasts in their order; a thousand are written to in a turn of the
        loop. Clients of blocking handlers get none, nor do clients before their handler's setup() has returned. What this meets
        on a client's connection concerns that connection alone. A broadcast is no answer to what that client has asked.

        Args:
            data: the message, in bytes.
            to: a group, of handlers that have called ``self.join(group)``; or a handler class; or None, for all.
            but: a handler; its client gets nothing. Such as the speaker's.
            most: bytes. A client for which more would wait to be sent than this is too slow.
            full: what happens to a client that is too slow: its connection is aborted, with the reason "broadcast"; or, with
                "skip", it does not get this message, and ``stats.skipped`` counts that.
            local: in a worker process, write to the clients of this process alone. Else :meth:`publish` is what reaches all.

        Raises:
            TypeError: the server is for datagrams, or `data` is no bytes.
            ValueError: `data` alone is more than `most` bytes.
            RuntimeError: this is not the thread of the server's event loop; or a worker process, and `local` is not True.
        """
        self._check_message(data, most, full)
        if self.relay is not None and not local:
            raise RuntimeError(
                "with workers, broadcast() reaches the clients of one process alone: use server.publish(group, data), or"
                " broadcast(..., local=True)"
            )
        return self.audience.send(bytes(data), to, but, most, full)

    def publish(self, topic: str, data: bytes, *, but: Any = None, full: Literal["close", "skip"] = "close") -> int:
        """Write a message to a group's clients in all worker processes; return to how many of this process.

        A topic is a group: a client hears it if its handler has called ``self.join(topic)``, in any worker. Without workers it
        is :meth:`broadcast` to that group. Never waits. In this process the message is written at once; to the others it goes
        through their parent. From one worker messages come in their order, from several in any. Where 4 MiB wait for a process
        already, the message does not reach it, and ``stats.unpublished`` counts that, there or here.

        Args:
            topic: a group's name, a str.
            data: the message, in bytes, a mebibyte at the most.
            but: a handler; its client gets nothing.
            full: what happens to a client that is too slow, as for :meth:`broadcast`.

        Raises:
            TypeError: the server is for datagrams, `topic` is no str, or `data` is no bytes.
            ValueError: `data` is more than a mebibyte.
            RuntimeError: this is not the thread of the server's event loop.
        """
        if not isinstance(topic, str):
            raise TypeError(f"a topic is a str, as it is sent to other processes, not {topic!r}")
        self._check_message(data, MOST_UNSENT, full)
        message = bytes(data)
        if self.relay is not None and not self.relay(topic, message, full):
            self.note_unpublished(1)
        return self.audience.send(message, topic, but, MOST_UNSENT, full)

    def deliver(self, topic: str, data: bytes, full: Literal["close", "skip"]) -> None:
        """Write what another worker has published. Not for users."""
        self.audience.send(data, topic, None, MOST_UNSENT, full)

    def note_unpublished(self, count: int) -> None:
        """Count messages that were dropped between workers. Not for users."""
        self.live_stats.unpublished += count

    def _check_message(self, data: bytes, most: int, full: str) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"what is broadcast is bytes, not {type(data).__name__}: encode it")
        if len(data) > most:
            raise ValueError(f"a broadcast of {len(data)} bytes is more than the {most} that may wait for a client")
        if full not in ("close", "skip"):
            raise ValueError(f"full must be 'close' or 'skip', not {full!r}")
        if self.event_loop is None or asyncio._get_running_loop() is not self.event_loop:
            raise RuntimeError(
                "broadcast() is called in the server's event loop: elsewhere use"
                " server.event_loop.call_soon_threadsafe(server.broadcast, data)"
            )

    def waits_for(self, task: object) -> bool:
        """Tell whether its drain waits for this task: of a handler, beside one, or of its own. Not for users."""
        return (
            any(connection.task is task for connection in self.connections)
            or any(task in beside.tasks or task is beside.goodbye for beside in self.beside.values())
            or task in self.tasks
        )

    async def _end_program(self) -> None:
        """End the server's tasks, then its lifespan."""
        await self.tasks.end(max(self._seconds_left(), LEAST))
        if self.composite is not None and self._drain is not None:
            await self.composite.wait_drained(self)
        if self._lifespan is not None:
            await self._lifespan.end(self._seconds_left())

    @property
    def is_grace_over(self) -> bool:
        """Whether a shutdown cancels what is live still, and begins nothing any more. Not for users."""
        return self._drain is not None and self._drain.is_over

    def _seconds_left(self) -> float:
        return 0 if self._drain is None else self._drain.seconds_left()

    def has_failed(self) -> bool:
        """Tell whether its lifespan raised or ended too early."""
        return self._lifespan is not None and self._lifespan.has_failed
