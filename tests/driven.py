"""Coroutines that are run as a connection's is."""

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any

from aioecho.runtime.driver import Driver
from aioecho.streams.protocol import StreamProtocol

__all__ = ["drive"]


def drive(coroutine: Coroutine[Any, Any, Any], protocol: StreamProtocol) -> "asyncio.Task[Any]":
    """Have a coroutine run by a task, as a connection's, which the protocol may step."""
    protocol.driver = driver = Driver()

    async def outermost() -> Any:
        driver.step_inner(coroutine)
        result = None
        try:
            result = await coroutine
            error = driver.take_inner_end(None)
        except BaseException as raised:
            error = driver.take_inner_end(raised)
        if error is not None:
            try:
                raise error
            finally:
                del error
        return result

    driver.start(outermost(), asyncio.get_running_loop(), contextvars.copy_context(), "driven")
    return driver.task
