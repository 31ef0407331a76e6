"""What the supervisor asks its workers for while they serve: their stats, and whether they still answer."""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping

from aioecho.net import systemd
from aioecho.workers.slots import WorkerProcess, WorkerState

__all__ = ["StatsLog", "WorkerWatchdog"]

logger = logging.getLogger("aioecho.supervisor")

# Seconds to wait for the stats of workers that do not answer.
STATS_TIMEOUT = 1.0


class StatsLog:
    """Asks the workers for their stats, and logs them with their sum once all have answered, or a second later.

    Args:
        workers: the processes that have not ended; the supervisor's own set, which changes.
    """

    def __init__(self, workers: Collection[WorkerProcess]) -> None:
        self._workers = workers
        self._ended: Counter[str] = Counter()
        self._asked: set[WorkerProcess] = set()
        self._timer: asyncio.TimerHandle | None = None

    def ask(self) -> None:
        """Ask all workers that may have clients. Do nothing while answers are awaited."""
        if self._asked:
            return
        self._asked = {worker for worker in self._workers if worker.may_have_clients}
        for worker in self._asked:
            worker.channel.send("stats")
        self._timer = asyncio.get_running_loop().call_later(STATS_TIMEOUT, self._log)

    def on_answer(self, worker: WorkerProcess) -> None:
        """Note that a worker has answered, or will not, as it has ended."""
        if worker in self._asked:
            self._asked.discard(worker)
            if not self._asked:
                self._log()

    def add_ended(self, worker: WorkerProcess) -> None:
        """Count a worker that has ended, if it has said its last stats."""
        if worker.report is not None:
            self._ended.update(worker.stats)

    def stop(self) -> None:
        """Wait for no answers any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _log(self) -> None:
        self.stop()
        total = self._ended.copy()
        for worker in sorted(self._workers, key=lambda worker: worker.slot.number):
            total.update(worker.stats)
            old = " (old: it has not answered)" if worker in self._asked else ""
            logger.info("stats of %s: %s%s", worker, _format_counts(worker.stats), old)
        self._asked.clear()
        logger.info("stats of all workers, and those before them: %s", _format_counts(total))


class WorkerWatchdog:
    """Feeds systemd's watchdog, and kills a worker if its event loop does not answer for as long as systemd waits.

    Args:
        workers: as for :class:`StatsLog`.
    """

    def __init__(self, workers: Collection[WorkerProcess]) -> None:
        self._workers = workers
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin, if systemd has set a watchdog for this process."""
        seconds = systemd.watchdog_seconds()
        if seconds is not None:
            self._feed(seconds)

    def stop(self) -> None:
        """Feed it no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _feed(self, seconds: float) -> None:
        systemd.notify("WATCHDOG=1")
        loop = asyncio.get_running_loop()
        now = loop.time()
        for worker in self._workers:
            if worker.state is not WorkerState.SERVING:
                continue
            if worker.pinged_at is None:
                worker.pinged_at = now
                worker.channel.send("ping")
            elif now - worker.pinged_at >= seconds:
                worker.kill("hangs")
        self._timer = loop.call_later(seconds / 2, self._feed, seconds)


def _format_counts(stats: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in stats.items())
