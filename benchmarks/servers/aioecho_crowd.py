"""An echo server of aioecho with workers, which say at their end for how long their loops have stood still at the most.

``python -m benchmarks.servers.aioecho_crowd PORT WORKERS FOLDER``. A worker watches its loop from the first SIGUSR2 on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aioecho
from aioecho.echo import Echo

__all__: list[str] = []

_TICK_S = 0.001


class _Watch:
    """Measures the longest time between two ticks of a loop, and the processor time that the process has used in it."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0
        self._last: tuple[float, float] | None = None

    def tick(self) -> None:
        """Measure from the last tick to this one, and call again."""
        now = time.perf_counter(), time.process_time()
        if self._last is not None:
            self.wall_s = max(self.wall_s, now[0] - self._last[0] - _TICK_S)
            self.cpu_s = max(self.cpu_s, now[1] - self._last[1])
        self._last = now
        asyncio.get_running_loop().call_later(_TICK_S, self.tick)

    def start(self) -> None:
        """Begin to tick, once."""
        if self._last is None:
            self.tick()


@contextlib.asynccontextmanager
async def _watching(server: Any) -> AsyncIterator[None]:
    watch = _Watch()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, watch.start)
    yield
    told = {"wall_s": watch.wall_s, "cpu_s": watch.cpu_s, "accepted": server.stats.accepted}
    (Path(os.environ["CROWD_FOLDER"]) / f"{os.getpid()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    os.environ["CROWD_FOLDER"] = sys.argv[3]
    report = aioecho.run(
        Echo,
        f"tcp://127.0.0.1:{sys.argv[1]}",
        workers=int(sys.argv[2]),
        lifespan=_watching,
        limits=aioecho.Limits(backlog=4096),
        # Thousands of keepalive probes are due in one tick of the kernel's timers. With all clients on one machine they do not
        # fit into the loopback interface's queue of net.core.netdev_max_backlog packets, and what was dropped looks lost.
        timeouts=aioecho.Timeouts(keepalive=None),
    )
    print(json.dumps({"completed": report.completed, "cancelled": report.cancelled, "aborted": report.aborted}))
