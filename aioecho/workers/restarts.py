"""When a worker that has died is replaced, and when that has happened too often."""

import signal

from aioecho.workers.slots import WorkerProcess, WorkerSlot, WorkerState

__all__ = ["LONGEST_DELAY", "count_death", "was_killed"]

# Seconds before a worker that has died is replaced: none the first time, then twice as long every time, until one lives.
FIRST_DELAY = 0.05
LONGEST_DELAY = 1.6
LIVES_AFTER = 10.0

# Deaths in a row, of one slot's workers, that end the whole. SIGKILL does not count: an administrator sends it, or the
# kernel when memory is short, and that says nothing of the worker.
TOO_OFTEN = 8


def was_killed(worker: WorkerProcess, status: int) -> bool:
    """Tell whether another process, or the kernel, has killed a worker that has ended with `status`.

    What passes, as a certificate that is written at the moment, counts as well: it says nothing of the worker.
    """
    return worker.may_retry or (status == -signal.SIGKILL and worker.state is not WorkerState.HUNG)


def count_death(slot: WorkerSlot, worker: WorkerProcess, status: int, now: float) -> float | str:
    """Count a death. Return the seconds after which to replace the worker, or the end of a sentence that says why not."""
    if worker.serving_since is not None and now - worker.serving_since >= LIVES_AFTER:
        slot.deaths = slot.crashes = 0
    if not was_killed(worker, status):
        slot.crashes += 1
        if slot.crashes >= TOO_OFTEN:
            return f"as {TOO_OFTEN - 1} in its place before it, soon after their start"
    delay = min(FIRST_DELAY * 2 ** (slot.deaths - 1), LONGEST_DELAY) if slot.deaths else 0.0
    slot.deaths += 1
    return delay
