"""What a program opens before it serves and closes after it has drained: a context manager in a task of its own."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

__all__ = ["Lifespan", "MakeLifespan"]

logger = logging.getLogger("aioecho.server")

MakeLifespan = Callable[[Any], AbstractAsyncContextManager[Any]]
"""What makes the context manager, for a server."""

# Seconds that its end has at the least, however little of the grace is left, and that it has to end in when it is cancelled.
LEAST, CANCELLED = 1.0, 0.25


class Lifespan:
    """Enters the context manager that ``make(server)`` returns, and leaves it in the same task.

    `on_end` is called if it ends before :meth:`end` is called: a task group in it, for instance, has been cancelled.
    """

    def __init__(self, make: MakeLifespan, server: Any, on_end: Callable[[], object]) -> None:
        self._make = make
        self._server = server
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None
        self.has_failed = False

    async def begin(self) -> Any:
        """Enter it, and return what it yields. Raise what it raises."""
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[Any] = loop.create_future()
        self._over = asyncio.Event()
        self._task = task = loop.create_task(self._run(begun))
        try:
            await asyncio.wait({task, begun}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.end(0)
            raise
        if begun.done():
            task.add_done_callback(self._ended)
            return begun.result()
        self._task = None
        task.result()  # raises
        raise RuntimeError(f"the lifespan {self._make!r} ended without yielding")

    async def _run(self, begun: "asyncio.Future[Any]") -> None:
        manager = self._make(self._server)
        if not hasattr(type(manager), "__aenter__"):
            if asyncio.iscoroutine(manager):
                manager.close()
            raise TypeError(
                f"the lifespan {self._make!r} returned {manager!r}, which is no async context manager: decorate it with"
                " @contextlib.asynccontextmanager"
            )
        async with manager as state:
            begun.set_result(state)
            await self._over.wait()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.has_failed = True
            logger.error("the lifespan raised", exc_info=error)
        if not self._over.is_set():
            self.has_failed = True
            self._on_end()

    async def end(self, seconds: float) -> None:
        """Leave it, within `seconds` or one if that is more; then cancel it. What it raises is logged."""
        task, self._task = self._task, None
        if task is None:
            return
        self._over.set()
        await asyncio.wait({task}, timeout=max(seconds, LEAST))
        if not task.done():
            logger.error("the lifespan took longer to end than the grace, and is cancelled")
            self.has_failed = True
            task.cancel()
            await asyncio.wait({task}, timeout=CANCELLED)
