"""How many processors this process may use, which is not how many the host has."""

import math
import os

from aioecho.workers.control_groups import cpu_quota

__all__ = ["count_processors"]


def count_processors() -> int:
    """Return how many worker processes have a processor to run on; at least 1.

    The least of what Python counts (the processors that this process may be scheduled on, or PYTHON_CPU_COUNT) and of the
    control group's CPU quota, rounded up: one process uses one processor at most.
    """
    try:
        count = os.process_cpu_count()  # type: ignore[attr-defined, unused-ignore]  # 3.13
    except AttributeError:
        try:
            count = len(os.sched_getaffinity(0))
        except AttributeError:  # not on Linux
            count = os.cpu_count()
    return max(1, math.ceil(min(count or 1, cpu_quota())))
