"""Which handler gets a datagram, where every datagram has its own: at once, after others have ended, or none: it is dropped."""

import asyncio
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

from aioecho.config import Limits
from aioecho.datagrams.serving import DatagramServing
from aioecho.datagrams.task import NOT_STEPPED, AtOnce, DatagramTask, OneDatagram
from aioecho.net.datagram_transport import DatagramSource, DatagramTransport
from aioecho.stats import DatagramStats

__all__ = ["BEGUN_PER_TURN", "Dispatcher"]

BEGUN_PER_TURN = 64
"""Handlers that begin in one turn of the loop, of datagrams that waited for room."""


class Dispatcher:
    """Begins a handler for each datagram of `server`, and keeps the spare task for handlers that never wait.

    `running` are the handlers that wait, a collection that changes.
    """

    __slots__ = ("_at_once", "_begins_queued", "_longest", "_most", "_queue", "_running", "_server", "_spare")

    _task_class = DatagramTask

    def __init__(self, server: DatagramServing, running: Collection[Any]) -> None:
        self._server, self._running = server, running
        self._spare: DatagramTask | None = None
        self._queue: deque[OneDatagram] = deque()
        self._begins_queued = False
        self._at_once = AtOnce()
        self.apply(server.limits)

    def apply(self, limits: Limits) -> None:
        """Apply `max_datagram`, `max_handlers` and `max_connections` from now on."""
        self._longest = limits.max_datagram
        self._most = min(limits.max_handlers, limits.max_connections or limits.max_handlers)
        self.count_all()  # the next one: it meets the new limits
        self.begin_queued_later()  # there may be room for them now

    def add_uncounted(self, stats: DatagramStats, is_running: bool) -> None:
        """Add to `stats` the handlers that `live_stats` do not count: that ended without waiting, and one that runs."""
        at_once = self._at_once.count
        stats.accepted += at_once + is_running
        stats.active += is_running
        stats.completed += at_once
        if at_once:
            stats.reasons["finished"] += at_once
        self._add_datagrams(stats, at_once + is_running)

    def _add_datagrams(self, stats: DatagramStats, count: int) -> None:
        stats.received += count
        stats.handled += count

    def serve(self, datagrams: Iterator[tuple[bytes, Any]], source: DatagramSource) -> OSError | MemoryError | None:
        """Begin a handler for every datagram that `datagrams` reads from `source`, or queue the datagram, or drop it.

        Return what reading has raised.
        """
        while True:
            spare = self._spare
            if (
                spare is None
                or spare.needs_slow_path
                or len(self._running) >= self._most
                or self._queue
                or (yielded := spare.step(datagrams, source)) is NOT_STEPPED
            ):
                try:
                    data, client_address = next(datagrams)
                except StopIteration:
                    return None
                except (OSError, MemoryError) as error:
                    return error
                if len(data) > source.longest:
                    self._server.drop("truncated", client_address)
                else:
                    self._receive_slowly(OneDatagram(data, client_address, source.transport))
            else:
                raised = spare.read_error
                if yielded is spare.parking and not spare.needs_slow_path:
                    if raised is not None:
                        spare.read_error = None  # its traceback refers to the task's frame
                    return raised
                self._settle(spare, yielded)
            if not source.is_reading:
                return None

    def receive(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        """Begin a handler for a datagram, queue the datagram, or drop it."""
        if len(data) > self._longest:
            self._server.drop("truncated", client_address)
        else:
            one = OneDatagram(data, client_address, transport)
            self.serve(iter(one), one)

    def _receive_slowly(self, datagram: OneDatagram) -> None:
        """Receive a datagram that may have to wait or to be dropped, or that is to be counted as its handler begins."""
        stats, limits = self._server.live_stats, self._server.limits
        client_address = datagram.client_address
        has_room = len(self._running) < self._most and not self._queue
        if not has_room and len(self._queue) >= limits.max_queue:
            self._server.drop("queue full", client_address)
        elif limits.max_per_host is not None and (reason := self._server.admit(client_address)) is not None:
            self._server.drop(reason, client_address)
        elif has_room:
            self._begin(datagram)
        else:
            stats.received += 1
            stats.queued += 1
            self._queue.append(datagram)

    def end_turn(self) -> None:
        """Do nothing: every datagram was given its handler, or queued, or dropped."""

    def _begin(self, datagram: OneDatagram) -> None:
        if asyncio.current_task() is not None:  # it is read in a handler, or a task closes the server
            later = self._task_class(self._server, self._at_once, datagram)
            self._register(later)
            later.count_end()
            return
        spare = self._spare
        if spare is None or spare.is_retired:
            self._spare = spare = self._task_class(self._server, self._at_once)
        spare.needs_slow_path = True  # it is counted by itself
        self._settle(spare, spare.step(iter(datagram), datagram))

    def _settle(self, task: DatagramTask, yielded: Any) -> None:
        """Do what remains to be done about a datagram after its task was resumed and has yielded something."""
        if task is self._spare:
            self._spare = None
        is_free = task.settle(yielded)
        if not task.is_counted:
            self._register(task)
        if is_free:
            self._server.note_end(task)
            task.reset()
            self._spare = task
            self._server.close_if_done()
        else:
            task.count_end()

    def _register(self, task: DatagramTask) -> None:
        task.is_counted = task.needs_slow_path = True
        self._server.live_stats.received += 1
        self._server.live_stats.handled += 1
        self._server.register_connection(task)

    # Datagrams that wait for room.

    def has_queued(self) -> bool:
        """Return whether datagrams wait for a handler."""
        return bool(self._queue)

    def begin_queued(self) -> None:
        """Begin datagrams that wait in the queue, as far as there is room; the rest in the loop's next turn."""
        self._begins_queued = False
        for _ in range(BEGUN_PER_TURN):
            if not self._queue or len(self._running) >= self._most:
                return
            datagram = self._queue.popleft()
            self._server.live_stats.queued -= 1
            self._server.live_stats.received -= 1  # it is counted again where it is begun
            self._begin(datagram)
        self.begin_queued_later()

    def begin_queued_later(self) -> None:
        """Begin them in the loop's next turn."""
        if self.has_queued() and not self._begins_queued:
            self._begins_queued = True
            asyncio.get_running_loop().call_soon(self.begin_queued)

    def drop_queued(self) -> None:
        """Drop the datagrams that wait, as the server stops."""
        if self._queue:
            self._server.live_stats.drops["stopped"] += len(self._queue)
            self._server.live_stats.queued -= len(self._queue)
            for datagram in self._queue:
                self._server.release(datagram.client_address)
            self._queue.clear()

    # The spare task.

    def first_step(self) -> DatagramTask | None:
        """Return the handler that takes its first step right now, if it is not registered; nearly all never are."""
        spare = self._spare
        return None if spare is None or spare.is_counted or not spare.is_stepping() else spare

    def is_stepping(self) -> bool:
        """Return whether a handler takes its first step right now."""
        return self._spare is not None and self._spare.is_stepping()

    def count_all(self) -> None:
        """Count each datagram as its handler begins, from the next one on."""
        if self._spare is not None:
            self._spare.needs_slow_path = True

    def stop(self) -> None:
        """End the spare task."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.retire()
