"""What the supervisor asks its workers for while they serve: their stats, and whether they still answer."""

import asyncio
import logging
from collections import Counter
from collections.abc import Collection, Mapping

from aioecho.net import systemd
from aioecho.workers.slots import WorkerProcess, WorkerState

__all__ = ["StatsLog", "WorkerWatchdog"]

logger = logging.getLogger("aioecho.supervisor")

# Checks within the time that a worker may take to answer: it is killed too late by such a part at the most.
CHECKS_PER_TIMEOUT = 4

# Seconds to wait for the stats of workers that do not answer.
STATS_TIMEOUT = 1.0


class StatsLog:
    """Asks the workers for their stats, and logs them with their sum once all have answered, or a second later.

    Args:
        workers: the processes that have not ended; the supervisor's own set, which changes.
    """

    def __init__(self, workers: Collection[WorkerProcess]) -> None:
        self._workers = workers
        self.ended: Counter[str] = Counter()
        """What workers that have ended had counted."""
        self.ended_reasons: Counter[str] = Counter()
        """Likewise, why their connections had ended."""
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
        """Keep the counts of a worker that has ended.

        Of one that has not said its last, as it was killed, they are the last ones that it has told. What it had then that was
        active counts as failed, so that no sum goes back, and all add up.
        """
        counts = dict(worker.stats)
        for name, value in worker.stats.items():
            kind, _, what = name.rpartition(".")
            if what == "active":
                counts[name] = 0
                counts[f"{kind}.failed" if kind else "failed"] += value
                self.ended_reasons["worker died"] += value
            elif what == "queued":
                counts[name] = 0
                counts[f"{kind}.drops" if kind else "drops"] += value
        self.ended.update(counts)
        self.ended_reasons.update(worker.reasons)

    def stop(self) -> None:
        """Wait for no answers any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _log(self) -> None:
        self.stop()
        total = self.ended.copy()
        for worker in sorted(self._workers, key=lambda worker: worker.slot.number):
            total.update(worker.stats)
            old = " (old: it has not answered)" if worker in self._asked else ""
            logger.info("stats of %s: %s%s", worker, _format_counts(worker.stats), old)
        self._asked.clear()
        logger.info("stats of all workers, and those before them: %s", _format_counts(total))


class WorkerWatchdog:
    """Kills a worker whose event loop does not answer, so that it is replaced; feeds systemd's watchdog.

    A worker that a debugger has attached to is never killed. The time in which this process itself was stopped does not count.

    Args:
        workers: as for :class:`StatsLog`.
        timeout: seconds that a worker may take to answer; None is for ever. If systemd has set a watchdog for this process,
            no longer than that.
    """

    def __init__(self, workers: Collection[WorkerProcess], timeout: float | None) -> None:
        self._workers = workers
        self._timeout = timeout
        self._systemds = systemd.Watchdog()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin."""
        self._systemds.start()
        timeouts = [seconds for seconds in (self._systemds.seconds, self._timeout) if seconds is not None]
        if timeouts:
            seconds = min(timeouts)
            self._check(seconds, asyncio.get_running_loop().time())

    def stop(self) -> None:
        """Look after the workers no more."""
        self._systemds.stop()
        if self._timer is not None:
            self._timer.cancel()

    def _check(self, seconds: float, expected: float) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        was_stopped = now - expected > seconds / 2  # so were the workers, as whatever stops one process here stops all
        for worker in self._workers:
            if worker.state is not WorkerState.SERVING:
                continue
            if worker.pinged_at is None:
                worker.pinged_at = now
                worker.channel.send("ping")
            elif was_stopped:
                worker.pinged_at = now
            elif now - worker.pinged_at >= seconds:
                if _is_traced(worker.process.pid):
                    worker.pinged_at = now
                else:
                    worker.kill("hangs", f": its event loop has not run for {seconds:g} s")
        when = now + seconds / CHECKS_PER_TIMEOUT
        self._timer = loop.call_at(when, self._check, seconds, when)


def _is_traced(pid: int) -> bool:
    """Tell whether a debugger is attached to a process; only Linux tells."""
    try:
        with open(f"/proc/{pid}/status", "rb") as status:  # the process's name, in it, may be no text
            return any(line.startswith(b"TracerPid:") and int(line.split()[1]) for line in status)
    except OSError:
        return False


def _format_counts(stats: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in stats.items())
