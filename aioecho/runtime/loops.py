"""Choosing an event loop, and ending the tasks that are left in it."""

import asyncio
import logging
from asyncio.tasks import _unregister_task  # documented for code that makes tasks: docs, "Extending asyncio"
from collections.abc import Callable

from aioecho.runtime.interpreters import is_subinterpreter

__all__ = ["LOOPS", "end_other_tasks", "loop_factory"]

logger = logging.getLogger("aioecho.loops")

# Seconds that the tasks which are left have to end after they were cancelled.
CANCEL_TIMEOUT = 0.25

LOOPS = ("auto", "uvloop", "asyncio")


def loop_factory(name: str) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return a function that makes an event loop of the kind `name`: "uvloop", "asyncio", or "auto".

    "auto" is uvloop if it is installed, and asyncio's loop in a subinterpreter, where uvloop does not load.

    Raises:
        ValueError: there is no such kind.
        ImportError: "uvloop" was asked for, and is not installed or cannot be loaded in this interpreter.
    """
    if name not in LOOPS:
        raise ValueError(f"no event loop is called {name!r}: choose one of {', '.join(LOOPS)}")
    if name == "asyncio":
        return asyncio.SelectorEventLoop
    # uvloop is not tried there: Python 3.11 loads it, and it is then broken in every other interpreter of the process.
    if is_subinterpreter():
        if name == "uvloop":
            raise ImportError('uvloop does not load in a subinterpreter: use loop="asyncio", or "auto"')
        return asyncio.SelectorEventLoop
    try:
        import uvloop
    except ImportError:
        if name == "uvloop":
            raise
        return asyncio.SelectorEventLoop
    return uvloop.new_event_loop


async def end_other_tasks() -> None:
    """Cancel every other task of the running loop before the loop is closed, and abandon tasks that swallow it.

    asyncio's Runner would wait for these without end. They are named in the log.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        _, stubborn = await asyncio.wait(others, timeout=CANCEL_TIMEOUT)
        for task in stubborn:
            logger.error("left behind, as it would not end when cancelled: %r", task)
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # the line above has said it
            _unregister_task(task)
