"""How many processors this process may use, which is not how many the host has."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["count_processors", "cpu_quota"]


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


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many processors the control group of this process may use, as 1.5; infinity if it has no quota.

    `root` is where ``proc`` and ``sys`` are looked for. Both versions of control groups are read, and the group's parents,
    as their quotas hold for it too. What cannot be read is no quota.
    """
    with contextlib.suppress(OSError, ValueError):
        return min(_quotas(root), default=math.inf)
    return math.inf


def _quotas(root: Path) -> Iterator[float]:
    groups = {}  # the group's path by hierarchy: "" is version 2's, "cpu" version 1's
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            groups[controller] = group
    for line in _lines(root / "proc/self/mountinfo"):
        # proc(5): the 4th field is the mount's root, the 5th where it is; the type and its options stand behind the "-".
        fields, _, behind = line.partition(" - ")
        mount_root, mount_point = fields.split(" ")[3:5]
        kind, _, options = behind.split(" ", 2)  # by one space: what is mounted may be an empty string
        if kind == "cgroup2" and "" in groups:
            read, group = _read_quota_2, groups[""]
        elif kind == "cgroup" and "cpu" in options.split(",") and "cpu" in groups:
            read, group = _read_quota_1, groups["cpu"]
        else:
            continue
        if group.startswith("/.."):  # outside of what this namespace shows
            continue
        # In a container the mount shows the container's group alone, and what leads to it is not to be seen.
        inner = os.path.relpath(group, mount_root) if (group + "/").startswith(mount_root.rstrip("/") + "/") else "."
        top = root / mount_point.lstrip("/")
        folder = top / inner
        for level in (folder, *folder.parents):
            if not level.is_relative_to(top):
                break
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                yield read(level)


def _lines(path: Path) -> list[str]:
    # In any locale: a name may be no text in this one, and is not this process's business.
    return os.fsdecode(path.read_bytes()).split("\n")[:-1]


def _read_quota_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text().split()
    return math.inf if quota == "max" else int(quota) / int(period)


def _read_quota_1(folder: Path) -> float:
    quota = int((folder / "cpu.cfs_quota_us").read_text())
    return math.inf if quota < 0 else quota / int((folder / "cpu.cfs_period_us").read_text())
