"""What the supervisor hears of its workers while they serve, and tells others of them: stats, metrics, signs of life."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

from aioecho.ops.metrics import MetricsEndpoint
from aioecho.workers.asking import Asking
from aioecho.workers.health import StatsLog, WorkerWatchdog
from aioecho.workers.metrics import WorkerMetrics
from aioecho.workers.publishing import Relay
from aioecho.workers.slots import WorkerProcess, WorkerState
from aioecho.workers.sockets import SupervisorSockets

__all__ = ["WorkerWatch"]


# Seconds that /readyz waits for workers to tell whether they are paused. One that does not answer is what it told last.
READY_TIMEOUT = 0.3


class WorkerWatch:
    """The supervisor's view of all workers, as long as ``async with`` lasts.

    Args:
        workers: the processes that have not ended; the supervisor's own set, which changes.
        sockets: what they serve on.
        asking: asks them.
        healthcheck: seconds after which a worker that does not answer is killed; None is never.
        metrics: the address of the metrics' port, None for none.
        is_stopping: tells whether the supervisor drains.

    Raises:
        ValueError: `metrics` is no address.
    """

    def __init__(
        self,
        workers: Collection[WorkerProcess],
        sockets: SupervisorSockets,
        asking: Asking,
        *,
        healthcheck: float | None,
        metrics: str | None,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._workers = workers
        self._asking = asking
        self._is_stopping = is_stopping
        self._relay = Relay(workers)
        self._stats = StatsLog(workers)
        self._watchdog = WorkerWatchdog(workers, healthcheck)
        self._metrics = WorkerMetrics(workers, sockets, self._ask_for_metrics)
        self._endpoint: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
        if metrics is not None:
            self._endpoint = MetricsEndpoint(metrics, self._metrics.collect, self._find_obstacle)
        self.log_stats = self._stats.ask
        self.note_start = self._metrics.note_start

    async def __aenter__(self) -> Self:
        """Open the metrics' port.

        Raises:
            EndpointError: that can't be done.
        """
        await self._endpoint.__aenter__()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        self._watchdog.stop()
        self._stats.stop()
        await self._endpoint.__aexit__(None, None, None)

    def start(self) -> None:
        """Kill workers that hang, from now on."""
        self._watchdog.start()

    def on_message(self, worker: WorkerProcess, message: dict[str, Any]) -> None:
        """Take what a worker has told."""
        self.keep_counts(worker, message)
        match message[""]:
            case "answer":
                self._asking.on_answer(worker, message)
            case "publish":
                self._relay.on_publish(worker, message)
            case "stats":
                self._stats.on_answer(worker)
            case "pong":
                worker.pinged_at = None

    def on_end(self, worker: WorkerProcess) -> None:
        """Keep the counts of a worker that has ended, and await nothing more of it."""
        self._stats.add_ended(worker)
        self._metrics.add_ended(worker)
        self._stats.on_answer(worker)
        self._asking.on_end(worker)

    async def _ask_for_metrics(self) -> None:
        for worker, told in (await self._asking.ask("metrics")).values.items():
            self.keep_counts(worker, told)

    def keep_counts(self, worker: WorkerProcess, told: dict[str, Any]) -> None:
        """Keep the stats and the metrics that a worker has told, unless it has told newer ones.

        An answer is looked at when all workers have answered, and may be seconds old then.
        """
        if told.get("told", 0) > worker.last_told:
            worker.last_told, worker.stats, worker.reasons = told["told"], told["stats"], told["reasons"]
        if told.get("metrics") is not None:
            self._metrics.on_report(worker, told["metrics"])

    def counts(self) -> dict[str, dict[str, Mapping[str, int]]]:
        """Return the stats and reasons that were told last, by the number of the worker; under "" of all that have ended."""
        counts: dict[str, dict[str, Mapping[str, int]]] = {
            str(worker.number): {"stats": worker.stats, "reasons": worker.reasons} for worker in self._workers
        }
        counts[""] = {"stats": self._stats.ended, "reasons": self._stats.ended_reasons}
        return counts

    async def _find_obstacle(self) -> str:
        serving = [worker for worker in self._workers if worker.state is WorkerState.SERVING]
        if serving and not self._is_stopping():
            answers = await self._asking.ask("paused", timeout=READY_TIMEOUT, workers=serving)
            for worker, is_paused in answers.values.items():
                worker.is_paused = is_paused
        if self._is_stopping():
            return "draining"
        if not serving:
            return "no worker serves"
        return "paused" if all(worker.is_paused for worker in serving) else ""
