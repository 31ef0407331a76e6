"""What the control groups of this process allow it, as the ones of a container or of a systemd unit do."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["cpu_quota", "memory_left"]


def cpu_quota(root: Path = Path("/")) -> float:
    """Return how many processors the control group of this process may use, as 1.5; infinity if it has no quota.

    `root` is where ``proc`` and ``sys`` are looked for. Both versions of control groups are read, and the group's parents,
    as their quotas hold for it too. What cannot be read is no quota.
    """

    def read(folder: Path, version: int) -> float:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
            return math.inf if quota == "max" else int(quota) / int(period)
        quota = (folder / "cpu.cfs_quota_us").read_text()
        return math.inf if int(quota) < 0 else int(quota) / int((folder / "cpu.cfs_period_us").read_text())

    least = math.inf
    for folder, version in _find_groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            least = min(least, read(folder, version))
    return least


def memory_left(root: Path = Path("/")) -> float:
    """Return how many bytes of memory the control group of this process may still take; infinity if it has no limit.

    Read as :func:`cpu_quota` is. Pages of files that are not in use do not count as taken: the kernel drops them first.
    """

    def read(folder: Path, version: int) -> float:
        most, used, idle = (
            ("memory.max", "memory.current", "inactive_file")
            if version == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        limit = (folder / most).read_text().strip()
        if limit == "max":
            return math.inf
        files = (folder / "memory.stat").read_text().partition(f"\n{idle} ")[2].split()
        return max(0, int(limit) - int((folder / used).read_text()) + int(files[0] if files else 0))

    least = math.inf
    for folder, version in _find_groups(root, "memory"):
        with contextlib.suppress(OSError, ValueError):
            least = min(least, read(folder, version))
    return least


def _find_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the folders of the process' groups that may have this controller's files, with the version, 1 or 2."""
    with contextlib.suppress(OSError, ValueError):
        yield from _read_groups(root, controller)


def _read_groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    groups = {}  # the group's path by hierarchy: "" is version 2's, "cpu" version 1's
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        for name in controllers.split(","):
            groups[name] = group
    for line in _lines(root / "proc/self/mountinfo"):
        # proc(5): the 4th field is the mount's root, the 5th where it is; the type and its options stand behind the "-".
        fields, _, behind = line.partition(" - ")
        mount_root, mount_point = fields.split(" ")[3:5]
        kind, _, options = behind.split(" ", 2)  # by one space: what is mounted may be an empty string
        if kind == "cgroup2" and "" in groups:
            version, group = 2, groups[""]
        elif kind == "cgroup" and controller in options.split(",") and controller in groups:
            version, group = 1, groups[controller]
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
            yield level, version


def _lines(path: Path) -> list[str]:
    # In any locale: a name may be no text in this one, and is not this process's business.
    return os.fsdecode(path.read_bytes()).split("\n")[:-1]
