"""A rolling restart: every worker is replaced, one after another."""

import logging
from collections.abc import Callable, Collection, Sequence

from aioecho.net import systemd
from aioecho.workers.slots import WorkerProcess, WorkerSlot

__all__ = ["RollingRestart"]

logger = logging.getLogger("aioecho.supervisor")


class RollingRestart:
    """What is still to be done of a rolling restart. systemd is told when it begins, and when it ends.

    Args:
        replace: starts the successor of a slot's worker.
        tell_ready: tells systemd that the restart has ended.
    """

    def __init__(self, replace: Callable[[WorkerSlot], None], tell_ready: Callable[[], None]) -> None:
        self._replace = replace
        self._tell_ready = tell_ready
        self._pending: list[WorkerSlot] = []
        self._is_under_way = False

    def begin(self, slots: Sequence[WorkerSlot]) -> None:
        """Let the workers of all these slots be replaced. A restart that is under way begins anew."""
        self._pending = list(slots)
        if not self._is_under_way:
            self._is_under_way = True
            logger.info("replacing all workers")
            systemd.notify_reloading("replacing all workers")

    def advance(self, slots: Sequence[WorkerSlot], workers: Collection[WorkerProcess]) -> None:
        """Replace the next worker if it is time for that. Call it when a worker has begun to serve, or has ended.

        Args:
            slots: the present ones.
            workers: all processes that have not ended.
        """
        if not self._is_under_way or any(slot.successor for slot in slots):
            return
        while self._pending:
            slot = self._pending[0]
            if slot not in slots or slot.worker is None:  # removed meanwhile, or its next worker will be new anyway
                del self._pending[0]
                continue
            # A slot has two processes at most: the one before the one that serves has to be gone.
            if slot.is_serving and not any(worker.slot is slot and worker.is_leaving for worker in workers):
                del self._pending[0]
                self._replace(slot)
            return
        self._end()
        logger.info("replaced all workers")

    def call_off(self) -> None:
        """Replace no more of them."""
        self._pending.clear()
        if self._is_under_way:
            self._end()

    def _end(self) -> None:
        self._is_under_way = False
        self._tell_ready()
