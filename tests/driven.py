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
        try:
            return await coroutine
        finally:
            await driver.hand_back()

    driver.start(outermost(), asyncio.get_running_loop(), contextvars.copy_context(), "driven")
    return driver.task
