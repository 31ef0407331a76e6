"""All that has come, for one handler: what was read in one turn of the loop, or while the batch before was handled."""

import asyncio
from collections.abc import Collection
from typing import Any

from aioecho.config import Limits
from aioecho.datagrams.run import DatagramRun
from aioecho.datagrams.serving import DatagramServing
from aioecho.datagrams.task import DatagramTask
from aioecho.net.datagram_socket import DatagramTransport
from aioecho.serving.ends import Reason

__all__ = ["Batch", "BatchDispatcher", "check_batch_limits"]

AddressedDatagrams = list[tuple[bytes, Any]]  # with their senders' addresses

NO_MAX_PER_HOST = "max_per_host is for handlers of one host, and a batch is of many: leave it out, and set max_queue"


def check_batch_limits(limits: Limits) -> None:
    """Raise ValueError if a limit is set that handlers of batches cannot have."""
    if limits.max_per_host is not None:
        raise ValueError(NO_MAX_PER_HOST)


class Batch(DatagramRun):
    """Datagrams with a handler that runs, in `server.connections`. They have no one `client_address`: it is None."""

    __slots__ = ("_RequestHandlerClass", "_server")

    def __init__(self, server: DatagramServing, datagrams: AddressedDatagrams, transport: DatagramTransport) -> None:
        self._server = server
        self._RequestHandlerClass = server.RequestHandlerClass
        self.request = (datagrams, transport)
        self.client_address = self.handler = None
        self.reason: Reason = "finished"
        self.was_aborted = False
        self.place = self._since = self._cancelled_at = None
        self.begin("batch")

    def __repr__(self) -> str:
        return f"<Batch of {self.size} datagrams, handler={self.handler!r}>"

    @property
    def size(self) -> int:
        """How many datagrams it has."""
        return len(self.request[0])

    def __call__(self, task: "asyncio.Task[None]") -> None:
        """Count how it has ended."""
        self.finish()
        super().__call__(task)

    def drain(self) -> None:
        """Do nothing: it ends by itself."""


class BatchDispatcher:
    """Collects the datagrams of `server`, and begins a handler for all that have come when the one before has ended.

    In place of a :class:`~aioecho.datagrams.dispatcher.Dispatcher`, with the same methods.
    """

    __slots__ = ("_batch", "_longest", "_most", "_room", "_running", "_server", "_transport", "_waiting", "at_once")

    at_once: int

    def __init__(self, server: DatagramServing, running: Collection[Any]) -> None:
        self._server, self._running = server, running
        # By what replies to them, as on a socket that is bound to every address: a batch has one transport.
        self._waiting: dict[DatagramTransport, AddressedDatagrams] = {}
        self._transport: DatagramTransport | None = None  # the last one, and
        self._batch: AddressedDatagrams = []  # what waits for it
        self._most = self._room = 0
        self.at_once = 0
        self.apply(server.limits)

    def apply(self, limits: Limits) -> None:
        """Apply `max_datagram` and `max_queue` from now on."""
        self._longest = limits.max_datagram
        self._room += limits.max_queue - self._most
        self._most = limits.max_queue

    def receive(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        """Add a datagram to the next batch, or drop it. It is counted at the end of the turn."""
        if len(data) > self._longest:
            self._server.drop("truncated", client_address)
        elif self._room <= 0:
            self._server.drop("queue full", client_address)
        else:
            if transport is not self._transport:
                self._transport, self._batch = transport, self._waiting.setdefault(transport, [])
            self._batch.append((data, client_address))
            self._room -= 1

    def end_turn(self) -> None:
        """Count what has come, and begin a handler for it unless one runs."""
        if self._waiting:
            stats = self._server.live_stats
            new = self._most - self._room - stats.queued
            stats.received += new
            stats.queued += new
            if not self._running:
                self.begin_queued()

    def has_queued(self) -> bool:
        """Return whether datagrams wait for a handler."""
        return bool(self._waiting)

    def begin_queued(self) -> None:
        """Begin a handler for the datagrams that wait: the one before has ended."""
        transport = next(iter(self._waiting))
        datagrams = self._waiting.pop(transport)
        self._forget(len(datagrams))
        self._server.live_stats.handled += len(datagrams)
        batch = Batch(self._server, datagrams, transport)
        self._server.register_connection(batch)
        if self._server.on_accept is not None and len(datagrams) > 1:
            self._server.on_accept(len(datagrams) - 1)  # it has counted one
        batch.count_time()

    def drop_queued(self) -> None:
        """Drop the datagrams that wait, as the server stops."""
        self._waiting.clear()
        stats = self._server.live_stats
        stats.drops["stopped"] += stats.queued
        self._forget(stats.queued)

    def _forget(self, count: int) -> None:
        self._transport = None
        self._room += count
        self._server.live_stats.queued -= count

    # What a Dispatcher has for its spare task.

    def first_step(self) -> DatagramTask | None:
        """Return None: each handler is registered before its first step."""
        return None

    def is_stepping(self) -> bool:
        """Return False, likewise."""
        return False

    def count_all(self) -> None:
        """Do nothing: each handler is counted."""

    def stop(self) -> None:
        """Do nothing: there is no spare task."""
