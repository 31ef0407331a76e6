"""Which handler gets a datagram, where every datagram has its own: at once, after others have ended, or none: it is dropped."""

import asyncio
from collections import deque
from collections.abc import Collection
from typing import Any

from aioecho.config import Limits
from aioecho.datagrams.serving import DatagramServing
from aioecho.datagrams.task import DatagramTask
from aioecho.net.datagram_socket import DatagramTransport

__all__ = ["Dispatcher"]

# Handlers that begin in one turn of the loop, of datagrams that waited for room.
BEGUN_PER_TURN = 64


class Dispatcher:
    """Begins a handler for each datagram of `server`, and keeps the spare task for handlers that never wait.

    `running` are the handlers that wait, a collection that changes.
    """

    __slots__ = ("_begins_queued", "_longest", "_most", "_queue", "_running", "_server", "_spare", "at_once")

    at_once: int
    """Handlers that ended without waiting. The server's `live_stats` do not count them."""

    def __init__(self, server: DatagramServing, running: Collection[Any]) -> None:
        self._server, self._running = server, running
        self._spare: DatagramTask | None = None
        self._queue: deque[tuple[tuple[bytes, DatagramTransport], Any]] = deque()
        self._begins_queued = False
        self.at_once = 0
        self.apply(server.limits)

    def apply(self, limits: Limits) -> None:
        """Apply `max_datagram`, `max_handlers` and `max_connections` from now on."""
        self._longest = limits.max_datagram
        self._most = min(limits.max_handlers, limits.max_connections or limits.max_handlers)
        if limits.max_per_host is not None:
            self.count_all()
        self.begin_queued_later()  # there may be room for them now

    def receive(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        """Begin a handler for a datagram, queue the datagram, or drop it."""
        spare = self._spare
        if (
            spare is None
            or spare.needs_slow_path
            or spare.request is not None  # it is in its handler that this one was read
            or len(data) > self._longest
            or len(self._running) >= self._most
            or self._queue
            or not (spare.is_entered or spare.enter())
        ):
            self._receive_slowly(data, client_address, transport)
            return
        spare.request = (data, transport)
        spare.client_address = client_address
        yielded = spare.resume()
        if yielded is spare.parking and not spare.needs_slow_path:
            self.at_once += 1  # as nearly all do, so nothing else is done for a datagram
        else:
            self._settle(spare, yielded)

    def _receive_slowly(self, data: bytes, client_address: Any, transport: DatagramTransport) -> None:
        """Receive a datagram that may have to wait or to be dropped, or that is to be counted as its handler begins."""
        self.end_turn()
        stats, limits = self._server.live_stats, self._server.limits
        if len(data) > self._longest:
            self._server.drop("truncated", client_address)
            return
        has_room = len(self._running) < self._most and not self._queue
        if not has_room and len(self._queue) >= limits.max_queue:
            self._server.drop("queue full", client_address)
        elif limits.max_per_host is not None and (reason := self._server.admit(client_address)) is not None:
            self._server.drop(reason, client_address)
        elif has_room:
            self._begin((data, transport), client_address)
        else:
            stats.received += 1
            stats.queued += 1
            self._queue.append(((data, transport), client_address))

    def end_turn(self) -> None:
        """Let the spare task be the current one no longer, as it stays between the datagrams that are read in one turn."""
        spare = self._spare
        if spare is not None and spare.request is None:
            spare.leave()

    def _begin(self, request: tuple[bytes, DatagramTransport], client_address: Any) -> None:
        spare = self._spare
        if spare is None or spare.is_retired or spare.request is not None or not spare.enter():
            if asyncio.current_task() is not None:
                later = DatagramTask(self._server, request, client_address)
                self._register(later)
                later.count_end()
                return
            self._spare = spare = DatagramTask(self._server)
            spare.enter()
        spare.request = request
        spare.client_address = client_address
        self._settle(spare, spare.resume())

    def _settle(self, task: DatagramTask, yielded: Any) -> None:
        """Do what remains to be done about a datagram after its task was resumed and has yielded something."""
        if task is self._spare:
            self._spare = None
        task.leave()
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
            request, client_address = self._queue.popleft()
            self._server.live_stats.queued -= 1
            self._server.live_stats.received -= 1  # it is counted again where it is begun
            self._begin(request, client_address)
        self.begin_queued_later()

    def begin_queued_later(self) -> None:
        """Begin them in the loop's next turn."""
        if self._queue and not self._begins_queued:
            self._begins_queued = True
            asyncio.get_running_loop().call_soon(self.begin_queued)

    def drop_queued(self) -> None:
        """Drop the datagrams that wait, as the server stops."""
        if self._queue:
            self._server.live_stats.drops["stopped"] += len(self._queue)
            self._server.live_stats.queued -= len(self._queue)
            for _, client_address in self._queue:
                self._server.release(client_address)
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
