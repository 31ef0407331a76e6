"""Worker processes, and their places, as the supervisor keeps them; how one is started."""

import asyncio
import itertools
import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aioecho.net import systemd
from aioecho.net.binding import BoundSocket
from aioecho.workers.worker import SIGNALS, Channel

__all__ = ["Slot", "WorkerProcess", "start_worker", "tell_status"]

logger = logging.getLogger("aioecho.processes")

# Where a fresh interpreter finds this package.
FOLDER = str(Path(__file__).resolve().parents[2])


class WorkerProcess:
    """A worker process, and what is known of it."""

    def __init__(self, slot: "Slot", process: "subprocess.Popen[bytes]", channel: Channel) -> None:
        self.slot = slot
        self.process = process
        self.channel = channel
        self.may_serve = False  # it was told to: no killing it now without need
        self.ready_at: float | None = None
        self.is_leaving = False  # as it was told to
        self.failure: str | None = None
        self.report: dict[str, Any] | None = None
        self.stats: dict[str, int] = {}
        self.pinged_at: float | None = None
        self.was_given_up = False  # it hung, and was killed here
        self._deadline: asyncio.TimerHandle | None = None

    def __str__(self) -> str:
        return f"worker {self.slot.number} (process {self.process.pid})"

    def give_up_after(self, seconds: float | None, what: str = "does not end") -> None:
        """Kill it so many seconds from now, and log `what`; None is never. The last call counts."""
        if self._deadline is not None:
            self._deadline.cancel()
        if seconds is not None and seconds != math.inf:
            self._deadline = asyncio.get_running_loop().call_later(seconds, self.give_up, what)

    def give_up(self, what: str) -> None:
        """Kill it, and log `what`: it hangs."""
        logger.error("%s %s, and is killed", self, what)
        self.was_given_up = True
        self.failure = self.failure or what
        self.process.kill()


class Slot:
    """A place for a worker: the one that serves, and perhaps the one that is to take over."""

    def __init__(self, number: int, sockets: Sequence[Sequence[BoundSocket]], own: Sequence[BoundSocket]) -> None:
        self.number = number
        self.sockets = sockets  # of each endpoint
        self.own = own
        self.worker: WorkerProcess | None = None
        self.successor: WorkerProcess | None = None
        self.deaths = 0
        self.crashes = 0
        self.restart: asyncio.TimerHandle | None = None

    @property
    def is_serving(self) -> bool:
        """Whether its worker accepts."""
        return self.worker is not None and self.worker.ready_at is not None

    def close(self) -> None:
        """Close the sockets that are this slot's alone, and start no worker any more."""
        if self.restart is not None:
            self.restart.cancel()
        for each in self.own:
            each.close()


def start_worker(slot: Slot, order: int, grace: float) -> WorkerProcess:
    """Start a process for a slot. `order` is a descriptor from which it reads what to do; `grace` are its server's seconds.

    Raises:
        OSError: that can't be done.
    """
    numbers = [[each.sock.fileno() for each in group] for group in slot.sockets]
    ours, theirs = socket.socketpair()
    program = (
        f"import sys; sys.path.insert(0, {FOLDER!r}); from aioecho.workers.worker import main; "
        f"main({theirs.fileno()}, {order}, {numbers}, float('{grace}'))"
    )
    # As multiprocessing does. -P: what lies in the current folder is not to be taken for the standard library.
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [sys.executable, *flags, *([] if "-P" in flags else ["-P"]), "-c", program]
    environment = {name: value for name, value in os.environ.items() if name not in systemd.VARIABLES}
    # A worker that has no handlers yet would die of a signal to the whole group: it is born deaf.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), order, *itertools.chain(*numbers)],
        )
    except BaseException:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    return WorkerProcess(slot, process, Channel(ours))


def tell_status(status: int) -> str:
    """Say how a process ended, for the middle of a sentence."""
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-status}"
