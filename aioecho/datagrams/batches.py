"""All that has come, for one handler: what was read in one turn of the loop, or while the batch before was handled."""

from collections.abc import Collection, Iterator
from operator import itemgetter
from typing import Any

from aioecho.config import Limits
from aioecho.datagrams.dispatcher import BEGUN_PER_TURN, Dispatcher
from aioecho.datagrams.serving import DatagramServing
from aioecho.datagrams.task import DatagramTask, OneDatagram
from aioecho.net.datagram_transport import DatagramSource, DatagramTransport
from aioecho.stats import DatagramStats

__all__ = ["Batch", "BatchDispatcher", "check_batch_limits"]

data_of: Any = itemgetter(0)

AddressedDatagrams = list[tuple[bytes, Any]]  # with their senders' addresses

NO_MAX_PER_HOST = "max_per_host is for handlers of one host, and a batch is of many: leave it out, and set max_queue"


def check_batch_limits(limits: Limits) -> None:
    """Raise ValueError if a limit is set that handlers of batches cannot have."""
    if limits.max_per_host is not None:
        raise ValueError(NO_MAX_PER_HOST)


class Batch(DatagramTask):
    """Datagrams with a handler that runs, in `server.connections`. They have no one `client_address`: it is None.

    To its task they are one datagram: its data is the list.
    """

    __slots__ = ("size",)

    size: int
    """How many datagrams it has."""

    called = "batch"

    def __repr__(self) -> str:
        return f"<Batch of {self.size} datagrams, handler={self.handler!r}>"


class BatchDispatcher(Dispatcher):
    """Collects the datagrams of `server`, and begins a handler for all that have come when the one before has ended."""

    __slots__ = ("_batch", "_capacity", "_room", "_size", "_transport", "_waiting")

    _task_class = Batch

    def __init__(self, server: DatagramServing, running: Collection[Any]) -> None:
        # By what replies to them, as on a socket that is bound to every address: a batch has one transport.
        self._waiting: dict[DatagramTransport, AddressedDatagrams] = {}
        self._transport: DatagramTransport | None = None  # the last one, and
        self._batch: AddressedDatagrams = []  # what waits for it
        self._capacity = self._room = 0
        self._size = 0  # of the batch that was begun last
        super().__init__(server, running)

    def apply(self, limits: Limits) -> None:
        """Apply `max_datagram` and `max_queue` from now on."""
        super().apply(limits)
        self._room += limits.max_queue - self._capacity
        self._capacity = limits.max_queue

    def serve(self, datagrams: Iterator[tuple[bytes, Any]], source: DatagramSource) -> OSError | MemoryError | None:
        """Add what `datagrams` reads from `source` to the next batch, or drop it, and do as at the end of a turn.

        Return what reading has raised.
        """
        new: AddressedDatagrams = []
        error = None
        try:
            if source.has_one_transport:
                new.extend(datagrams)  # without a line of Python for every datagram
            else:
                for data, client_address in datagrams:
                    self.receive(data, client_address, source.transport)
        except (OSError, MemoryError) as caught:
            error = caught
        if not new:
            pass
        elif len(new) <= self._room and max(map(len, map(data_of, new))) <= source.longest:
            self._find_batch(source.transport).extend(new)
            self._room -= len(new)
        else:
            for data, client_address in new:
                self.receive(data, client_address, source.transport)
        self.end_turn()
        return error

    def receive(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        """Add a datagram to the next batch, or drop it. It is counted at the end of the turn."""
        if len(data) > self._longest:
            self._server.drop("truncated", client_address)
        elif self._room <= 0:
            self._server.drop("queue full", client_address)
        else:
            self._find_batch(transport).append((data, client_address))
            self._room -= 1

    def _find_batch(self, transport: DatagramTransport) -> AddressedDatagrams:
        if transport is not self._transport:
            self._transport, self._batch = transport, self._waiting.setdefault(transport, [])
        return self._batch

    def end_turn(self) -> None:
        """Count what has come, and begin a handler for it unless one runs."""
        if self._waiting:
            stats = self._server.live_stats
            new = self._capacity - self._room - stats.queued
            stats.received += new
            stats.queued += new
            if not (self._begins_queued or self.is_stepping()):
                self.begin_queued()

    def has_queued(self) -> bool:
        """Return whether datagrams wait for a handler."""
        return bool(self._waiting)

    def begin_queued(self) -> None:
        """Begin a handler for the datagrams that wait, if none runs. If it ends at once, begin the next.

        With PROXY headers every datagram is a batch: after BEGUN_PER_TURN the rest waits for the loop's next turn.
        """
        self._begins_queued = False
        for _ in range(BEGUN_PER_TURN):
            if not self._waiting or self._running:
                return
            transport = next(iter(self._waiting))
            datagrams = self._waiting.pop(transport)
            self._size = len(datagrams)
            self._forget(self._size)
            self._server.live_stats.handled += self._size
            if isinstance(self._spare, Batch):
                self._spare.size = self._size
            one = OneDatagram(datagrams, None, transport)
            super().serve(iter(one), one)
        self.begin_queued_later()

    def _add_datagrams(self, stats: DatagramStats, count: int) -> None:
        """Do nothing: they were counted as they came."""

    def _register(self, task: DatagramTask) -> None:
        assert isinstance(task, Batch)
        task.size = self._size
        task.is_counted = task.needs_slow_path = True
        self._server.register_connection(task)
        if self._server.on_accept is not None and task.size > 1:
            self._server.on_accept(task.size - 1)  # it has counted one

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
