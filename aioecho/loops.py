"""Choosing an event loop."""

import asyncio
from collections.abc import Callable

__all__ = ["LOOPS", "loop_factory"]

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
