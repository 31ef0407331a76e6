"""Where a run took place: what a reader needs to judge its figures, and to repeat them."""

from __future__ import annotations

import os
import platform
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import aioecho

from .catalog import get_version
from .processes import ROOT, choose_processors
from .runner import Sample
from .servers._options import BACKLOG, READ_BYTES

__all__ = ["describe_environment"]

_DISTRIBUTIONS = ("uvloop", "trio", "anyio", "gevent", "twisted", "tornado", "easynetwork")


def describe_environment(command: str) -> Sample:
    """Describe machine, versions and method; no name of the machine or of a person, and no path."""
    processors = choose_processors()
    return {
        "command": command,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _read_after("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        "processors": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "openssl": ssl.OPENSSL_VERSION,
        "versions": {"aioecho": aioecho.__version__}
        | {name: version for name in _DISTRIBUTIONS if (version := get_version(name))},
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "pinning": "one processor only: server and generator share it"
        if processors is None
        else f"pinned: server on processor {processors[0]}, generator on {processors[1]}; "
        f"free: server on any, generator on {processors[1]}",
        "fairness": f"alike in all servers: backlog {BACKLOG}, TCP_NODELAY on, reads of up to {READ_BYTES} bytes",
    }


def _read_after(path: str, name: str) -> str:
    try:
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def _commit() -> str | None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return None
    done = subprocess.run(
        [git, "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
