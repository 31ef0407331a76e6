"""The end of all workers: how they are told to stop, sooner or at once, and what became of their connections."""

import asyncio
import logging
import signal
from collections.abc import Collection, Mapping
from typing import Any

from aioecho.net import systemd
from aioecho.serving.drain import OVER_GRACE
from aioecho.stats import DrainReport
from aioecho.workers.signals import log_stop
from aioecho.workers.slots import WorkerProcess

__all__ = ["STOP_TIMEOUT", "Stop"]

logger = logging.getLogger("aioecho.supervisor")

STOP_TIMEOUT = 2.0
"""Seconds for a worker to end by itself if it is told to end at once."""


class Stop:
    """The stop of all workers. It begins once.

    Args:
        workers: the processes that have not ended; the supervisor's own set, which changes.
        grace: seconds that handlers have to finish, unless another number is asked for.
    """

    def __init__(self, workers: Collection[WorkerProcess], grace: float) -> None:
        self._workers = workers
        self._grace = grace
        self._signal: signal.Signals | None = None
        self._began_at = 0.0
        self._is_at_once = False
        self._drained = {"completed": 0, "cancelled": 0, "aborted": 0, "unfinished": 0}

    def begin(self, number: signal.Signals | None, grace: float | None) -> None:
        """Tell all workers to drain, because of a signal or not. `grace` takes the place of the usual one."""
        self._signal = number
        self._began_at = asyncio.get_running_loop().time()
        seconds = self._grace if grace is None else grace
        systemd.notify_stopping(seconds + OVER_GRACE)
        for worker in self._workers:
            if not worker.is_leaving:
                worker.leave("drain", seconds + OVER_GRACE, grace)
            elif grace is not None:
                worker.leave_sooner(grace, grace + OVER_GRACE)

    def hasten(self, number: signal.Signals | None, grace: float | None) -> None:
        """Let the shorter grace hold, the one from before or this one. A second signal ends all at once."""
        if number is None or self._signal is None:
            self._signal = self._signal or number
            seconds = self._grace if grace is None else grace
            for worker in self._workers:
                worker.leave_sooner(seconds, seconds + OVER_GRACE)
        elif not self._is_at_once:  # once: further signals do not put the end off
            self._is_at_once = True
            for worker in self._workers:
                worker.channel.send("end", why=f"by a second signal, {number.name}")
                worker.kill_after(STOP_TIMEOUT)

    def on_draining(self, worker: WorkerProcess, message: Mapping[str, Any]) -> None:
        """Log for how many connections of a worker it waits, if it was a signal."""
        if self._signal is not None and message["count"]:
            log_stop(logger, self._signal, message["count"], message["what"], self._grace, str(worker))

    def on_end(self, worker: WorkerProcess, is_lost: bool) -> None:
        """Count what became of the connections of a worker that has ended. One that is lost counts as one aborted."""
        self._drained["aborted"] += is_lost
        worker.add_report(self._drained)

    def report(self) -> DrainReport:
        """Return what became of all connections."""
        return DrainReport(**self._drained, seconds=asyncio.get_running_loop().time() - self._began_at)
