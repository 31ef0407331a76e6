"""What the handlers of a server share: the program's state and its end, tasks of the server's own, messages to many."""

import asyncio
import functools
from collections.abc import Hashable
from typing import Any, Literal

from aioecho.serving.audience import MOST_UNSENT
from aioecho.serving.lifespan import Lifespan
from aioecho.serving.registry import Registry
from aioecho.serving.tasks import LEAST, Tasks

__all__ = ["Sharing"]


class Sharing(Registry):
    """The part of :class:`~aioecho.serving.base.BaseServer` that is the handlers' together."""

    state: Any = None
    _lifespan: Lifespan | None = None

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

        Raises:
            TypeError: the server is for datagrams, or `data` is no bytes.
            ValueError: `data` alone is more than `most` bytes.
            RuntimeError: this is not the thread of the server's event loop.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"what is broadcast is bytes, not {type(data).__name__}")
        if len(data) > most:
            raise ValueError(f"a broadcast of {len(data)} bytes is more than the {most} that may wait for a client")
        if full not in ("close", "skip"):
            raise ValueError(f"full must be 'close' or 'skip', not {full!r}")
        if self.event_loop is None or asyncio._get_running_loop() is not self.event_loop:
            raise RuntimeError(
                "broadcast() is called in the server's event loop: elsewhere use"
                " server.event_loop.call_soon_threadsafe(server.broadcast, data)"
            )
        return self.audience.send(bytes(data), to, but, most, full)

    async def _end_program(self) -> None:
        """End the server's tasks, then its lifespan."""
        seconds = 0 if self._drain is None else self._drain.seconds_left()
        await self.tasks.end(max(seconds, LEAST))
        if self._lifespan is not None:
            await self._lifespan.end(seconds)

    def has_failed(self) -> bool:
        """Tell whether its lifespan raised or ended too early."""
        return self._lifespan is not None and self._lifespan.has_failed
