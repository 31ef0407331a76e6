"""Choosing an event loop, and ending what runs in it."""

import asyncio
import logging
from asyncio.tasks import _unregister_task  # documented for whoever makes tasks: docs, "Extending asyncio"
from collections.abc import Callable

__all__ = ["LOOPS", "end_other_tasks", "loop_factory"]

logger = logging.getLogger("aioecho.loops")

# Seconds that tasks which were left have to end when they are cancelled.
CANCEL_TIMEOUT = 0.25

LOOPS = ("auto", "uvloop", "asyncio")


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes an event loop of the kind `name`: "uvloop", "asyncio", or "auto", which is uvloop if installed.

    Raises:
        ValueError: there is no such kind.
        ImportError: "uvloop" was asked for and is not installed.
    """
    if name not in LOOPS:
        raise ValueError(f"no event loop is called {name!r}: choose one of {', '.join(LOOPS)}")
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    try:
        import uvloop
    except ImportError:
        if name == "uvloop":
            raise
        return asyncio.SelectorEventLoop
    return uvloop.new_event_loop


async def end_other_tasks() -> None:
    """Cancel every other task of the running loop, before it is closed; forget those that swallow it.

    asyncio's Runner would wait for those for ever. They are named in the log.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        _, stubborn = await asyncio.wait(others, timeout=CANCEL_TIMEOUT)
        for task in stubborn:
            logger.error("left behind, as it would not end when cancelled: %r", task)
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was said
            _unregister_task(task)
