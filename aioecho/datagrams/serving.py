"""What a datagram's task and a session need of their server, which is above them and makes them."""

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import Context
from typing import Any, Protocol

from aioecho.config import Limits, Timeouts
from aioecho.datagrams.handover import Handover
from aioecho.serving.drain import Served
from aioecho.serving.ends import Ended
from aioecho.serving.sweeper import TimeoutSweeper
from aioecho.stats import DatagramStats

__all__ = ["DatagramServing"]


class DatagramServing(Protocol):
    """A datagram server, as its handlers' tasks see it. For most see :class:`~aioecho.serving.registry.Registry`."""

    RequestHandlerClass: Any
    live_stats: DatagramStats
    task_context: Context
    timeout_sweeper: TimeoutSweeper
    handover: Handover | None
    on_accept: Callable[[int], object] | None
    beside: dict[Any, Any]

    @property
    def limits(self) -> Limits:
        """The limits that hold now."""

    @property
    def handler_timeouts(self) -> Timeouts:
        """The timeouts of the handler class, or else the server's."""

    @property
    def keep_backlog(self) -> bool:
        """Whether a shutdown leaves what comes to other processes, which read the same sockets."""

    @property
    def gets_datagrams(self) -> bool:
        """Whether datagrams reach its sessions: it reads, or a successor passes them on."""

    def read_on(self) -> None:
        """Read, unless the server is paused or another worker's turn has come; the peers of sessions as long as these live."""

    def stop_reading(self) -> None:
        """Leave what comes in the kernel's queues."""

    @property
    def is_draining(self) -> bool:
        """Whether a shutdown has begun."""

    @property
    def is_grace_over(self) -> bool:
        """Whether a shutdown cancels what is live still, and begins nothing any more."""

    @property
    def needs_slow_path(self) -> bool:
        """Whether each datagram is to be counted as its handler begins, and not only when it has ended."""

    def verify_request(self, request: Any, client_address: Any) -> bool | Awaitable[bool]:
        """Call the hook."""

    def call_handle_error(self, request: Any, client_address: Any, ended: Ended) -> None:
        """Call the hook, for the exception that is being handled."""

    def register_connection(self, connection: Served) -> None:
        """Count a handler as active until its end is counted."""

    def unregister_connection(self, connection: Any) -> None:
        """Count a handler that has ended."""

    def task_ended(self, ended: Any, task: "asyncio.Task[None]") -> None:
        """Count a handler at the end of its task."""

    def drop(self, reason: str, client_address: Any) -> None:
        """Count a datagram that no handler gets."""

    def admit(self, client_address: Any) -> str | None:
        """Count a datagram for which there is room. Return the reason to drop it, or None."""

    def release(self, client_address: Any) -> None:
        """Count the end of what was admitted, where no registered handler has ended."""

    def report_timeout(self, cancelled: Any) -> None:
        """Log that a handler took too long."""

    def note_end(self, task: Any) -> None:
        """Count the end of a handler that has not waited, and that was registered."""

    def close_if_done(self) -> None:
        """Close the sockets when no handler can have anything to send any more."""

    def replace(self, ended: Any) -> None:
        """Forget a session that has ended, and begin what has waited for that."""
