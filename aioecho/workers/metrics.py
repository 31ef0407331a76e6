"""The metrics of all workers: what a worker tells its supervisor of them, and what the supervisor makes of it.

A worker tells its values once a second, and whenever it is asked. The supervisor keeps the last ones: when a worker has
ended its counts are added to the ones of its slot, whatever it died of, so that no count goes back.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

from aioecho.metrics import Metrics, Values
from aioecho.net.bound import BoundSocket
from aioecho.net.kernel import datagram_memory
from aioecho.serving.base import BaseServer
from aioecho.serving.measuring import add_accept_queue, begin_measuring, measure_in_turns, tell_measures
from aioecho.workers.slots import WorkerProcess, WorkerState
from aioecho.workers.sockets import SupervisorSockets

__all__ = ["CAUSES", "WorkerMetrics", "WorkerReports"]

CAUSES = ("start", "added", "reload", "replaced", "died", "killed", "hung")
"""Why a worker is started: at the beginning; by SIGTTIN; by SIGHUP; as the one before it wanted to be replaced, by max_requests
or its SIGTERM; as the one before it died by itself; was killed by SIGKILL; or was killed by the supervisor, as it hung."""

# Seconds between two reports of a worker: so much of what it counted is lost if it is killed.
REPORT_EVERY = 1.0

# What the supervisor knows better: its sockets are the ones that the workers share.
SUPERVISORS_OWN = (
    "aioecho_accept_queue_length",
    "aioecho_accept_queue_limit",
    "aioecho_datagrams_dropped_by_kernel",
)

# What is 1 or 0, also where two workers of a slot tell it.
FLAGS = ("aioecho_draining", "aioecho_paused")


class WorkerReports:
    """A worker's side: tells the metrics of its server.

    Args:
        server: measured from now on; it may not be started yet.
        send: called with each report.
    """

    def __init__(self, server: BaseServer, send: Callable[[Any], object]) -> None:
        begin_measuring(server)
        self._server = server
        self._send = send
        self._number = 0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Report from now on."""
        self._timer = asyncio.get_running_loop().call_later(REPORT_EVERY, self._report)

    def stop(self) -> None:
        """Report no more."""
        if self._timer is not None:
            self._timer.cancel()

    async def answer(self) -> tuple[int, Values]:
        """Return a report, after a look at all connections."""
        return self._make(await measure_in_turns(self._server))

    def last(self) -> tuple[int, Values]:
        """Return a report, without such a look."""
        return self._make(tell_measures(self._server))

    def _make(self, metrics: Metrics) -> tuple[int, Values]:
        self._number += 1
        for name in SUPERVISORS_OWN:
            metrics.values.pop(name, None)
        return self._number, metrics.values

    def _report(self) -> None:
        self._send(self.last())
        self.start()


class WorkerMetrics:
    """The supervisor's side: gathers the metrics of all workers, and has its own.

    Args:
        workers: the processes that have not ended; the supervisor's own set, which changes.
        sockets: what they serve on.
        ask: asks them, and passes what they answer in time to :meth:`on_report`.
    """

    def __init__(
        self, workers: Collection[WorkerProcess], sockets: SupervisorSockets, ask: Callable[[], Awaitable[object]]
    ) -> None:
        self._workers = workers
        self._sockets = sockets
        self._ask = ask
        self._starts = dict.fromkeys(CAUSES, 0)
        self._ended: dict[int, Metrics] = {}  # by the number of the slot
        self._kernel_drops: dict[BoundSocket, int] = {}  # also of sockets that are closed by now

    def note_start(self, cause: str) -> None:
        """Count the start of a worker; see :data:`CAUSES`."""
        self._starts[cause] += 1

    def on_report(self, worker: WorkerProcess, report: Any) -> None:
        """Keep what a worker has told, unless it has told something newer."""
        if report[0] > worker.metrics[0]:
            worker.metrics = report[0], report[1]

    def add_ended(self, worker: WorkerProcess) -> None:
        """Keep the counts of a worker that has ended."""
        ended = self._ended.setdefault(worker.slot.number, Metrics())
        values = worker.metrics[1]
        ended.add_values(values, only_counted=True)
        # It was killed: what it had then was lost. So the connections add up.
        for kind in ("connections", "datagram_handlers"):
            for lost in filter(None, values.get(f"aioecho_{kind}_active", {}).values()):
                ended.add(f"aioecho_{kind}_ended", lost, "failed", "worker died")

    async def collect(self) -> Sequence[tuple[str, Metrics]]:
        """Return the metrics of all slots, with their numbers, and the supervisor's own.

        What a worker does not tell in time is taken from its last report.
        """
        await self._ask()
        slots = {
            number: Metrics() for number in sorted({*self._ended, *(worker.slot.number for worker in self._workers)})
        }
        for number, ended in self._ended.items():
            slots[number].add_values(ended.values)
        for worker in self._workers:
            slots[worker.slot.number].add_values(worker.metrics[1])
        for metrics in slots.values():
            for name in FLAGS:
                if name in metrics.values:
                    metrics.values[name] = {key: min(value, 1) for key, value in metrics.values[name].items()}
        return [("", self._own()), *((str(number), metrics) for number, metrics in slots.items())]

    def _own(self) -> Metrics:
        metrics = Metrics()
        metrics.add("aioecho_workers", sum(worker.state is WorkerState.SERVING for worker in self._workers))
        for cause, count in self._starts.items():
            metrics.add("aioecho_worker_starts", count, cause)
        for bound in self._sockets.all:
            if bound.sock.type == socket.SOCK_DGRAM:
                if bound.sock.fileno() >= 0:
                    self._kernel_drops[bound] = datagram_memory(bound.sock)[1]
                metrics.add("aioecho_datagrams_dropped_by_kernel", self._kernel_drops.get(bound, 0))
            else:
                add_accept_queue(metrics, bound.name, bound.sock)
        return metrics
