"""What the supervisor knows of its workers: the processes with their states, and the slots that they serve in."""

import asyncio
import enum
import logging
import math
import socket
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from aioecho.metrics import Values
from aioecho.net.bound import BoundSocket
from aioecho.workers.channel import Channel

__all__ = ["WorkerProcess", "WorkerSlot", "WorkerState"]

logger = logging.getLogger("aioecho.processes")


class WorkerState(enum.Enum):
    """Where a worker is in its life, as the supervisor sees it."""

    LOADING = "imports what it serves"
    STARTING = "was told to serve"
    SERVING = "accepts"
    LEAVING = "was told to leave, and drains"
    DISCARDED = "was killed before it served, as it is not needed"
    HUNG = "was killed, as it did not do in time what was expected"


class WorkerProcess:
    """A worker process, and what is known of it."""

    def __init__(
        self,
        slot: "WorkerSlot",
        process: "subprocess.Popen[bytes]",
        channel: Channel,
        for_successor: socket.socket,
        when_closed: Callable[[], None],
    ) -> None:
        self.slot = slot
        self.process = process
        self.number = 0
        """Counts the processes that were started, from 1. No two have the same."""
        self.channel = channel
        self.for_successor = for_successor
        """For its successor: what is connected to it, for its sessions of datagrams."""
        self._when_closed = when_closed
        self.state = WorkerState.LOADING
        self.serving_since: float | None = None
        self.failure: str | None = None
        self.may_retry = False
        """Whether its start failed for what passes: a certificate that is written at the moment."""
        self.report: dict[str, Any] | None = None
        self.last_told = 0
        """Grows from one message with counts to the next."""
        self.stats: dict[str, int] = {}
        self.reasons: dict[str, int] = {}
        """Why its connections have ended, as its server's stats have it."""
        self.metrics: tuple[int, Values] = (0, {})
        """The last that it has told, and a number that grows from one report to the next."""
        self.is_paused = False
        """Whether it accepts no clients, as it has told last."""
        self.pinged_at: float | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def __str__(self) -> str:
        return f"worker {self.slot.number} (process {self.process.pid})"

    @property
    def is_leaving(self) -> bool:
        """Whether it was told to leave, so that its end needs no successor."""
        return self.state in (WorkerState.LEAVING, WorkerState.DISCARDED)

    @property
    def may_have_clients(self) -> bool:
        """Whether it was told to serve, so that connections may be lost with it."""
        if self.state is WorkerState.HUNG:
            return self.serving_since is not None
        return self.state in (WorkerState.STARTING, WorkerState.SERVING, WorkerState.LEAVING)

    def leave(self, how: str, timeout: float, grace: float | None = None) -> None:
        """Tell it to leave, "retire", "remove" or "drain", within `timeout` seconds. Kill it if it has not begun to accept.

        `grace` is for its connections, in seconds; None is its server's own.
        """
        if self.may_have_clients:
            self.state = WorkerState.LEAVING
            self.for_successor.close()
            self.channel.send(how, grace=grace)
            self.kill_after(timeout)
        else:
            self.state = WorkerState.DISCARDED
            self.process.kill()

    def leave_sooner(self, grace: float, timeout: float) -> None:
        """Tell one that was told to leave that its connections have `grace` seconds from now, unless they have less already."""
        if self.may_have_clients:
            self.channel.send("drain", grace=grace)
            if self._deadline is None or self._deadline.when() > asyncio.get_running_loop().time() + timeout:
                self.kill_after(timeout)

    def add_report(self, counts: dict[str, int]) -> None:
        """Add what it has reported at its end, if it has, to `counts`, which have their names."""
        for name, count in (self.report or {}).items():
            if name in counts:
                counts[name] += count

    def kill_after(self, seconds: float | None, why: str = "does not end") -> None:
        """Kill it so many seconds from now, and log `why`; None is never. This replaces the deadline of an earlier call."""
        if self._deadline is not None:
            self._deadline.cancel()
        if seconds is not None and seconds != math.inf:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.kill, why)

    def kill(self, why: str, details: str = "") -> None:
        """Kill it, as it hangs, and log `why`, and `details`, which follow a colon."""
        logger.error("%s %s, and is killed%s", self, why, details)
        if not self.is_leaving:
            self.state = WorkerState.HUNG
        self.failure = self.failure or why
        self.process.kill()

    def abandon(self) -> None:
        """Kill it without a word, and wait until it is gone."""
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        """Close what is connected to it."""
        self.channel.close()
        self.for_successor.close()
        self._when_closed()


class WorkerSlot:
    """A place for a worker: the one that serves, and perhaps its successor, which is about to replace it.

    Args:
        number: counts from 1, for people.
        sockets: what the slot's workers serve on, a list for every endpoint.
        own: the sockets among them that no other slot has.
    """

    def __init__(self, number: int, sockets: Sequence[Sequence[BoundSocket]], own: Sequence[BoundSocket]) -> None:
        self.number = number
        self.sockets = sockets
        self.own = own
        self.worker: WorkerProcess | None = None
        self.successor: WorkerProcess | None = None
        self.deaths = 0
        self.crashes = 0
        self.restart: asyncio.TimerHandle | None = None

    @property
    def is_serving(self) -> bool:
        """Whether its worker accepts."""
        return self.worker is not None and self.worker.serving_since is not None

    def close(self) -> None:
        """Close the sockets that are this slot's alone, and start no worker any more."""
        if self.restart is not None:
            self.restart.cancel()
        for bound in self.own:
            bound.refuse_clients()
            bound.close()
