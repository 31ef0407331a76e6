"""Live control of worker processes: the supervisor has the control socket, and asks and tells its workers."""

import itertools
import logging
import re
import signal
from collections.abc import Mapping
from typing import Any, Protocol, Self

from aioecho.net.endpoints import UnixEndpoint
from aioecho.ops.control import ControlServer
from aioecho.ops.control_commands import Gathered
from aioecho.ops.control_request import ControlError
from aioecho.ops.control_view import ServerView
from aioecho.serving.base import BaseServer
from aioecho.several import servers_of
from aioecho.workers.asking import Answers, Asking
from aioecho.workers.slots import WorkerProcess, WorkerSlot
from aioecho.workers.watching import WorkerWatch

__all__ = ["MOST_WORKERS", "ControlledSupervisor", "SupervisorControl"]

logger = logging.getLogger("aioecho.supervisor")

MOST_WORKERS = 1024
"""Workers that may be asked for live: a typing mistake is not to start a million."""


class ControlledSupervisor(Protocol):
    """What live control needs of the supervisor."""

    asking: Asking
    slots: list[WorkerSlot]
    workers: set[WorkerProcess]
    watch: WorkerWatch

    def add_slot(self) -> None:
        """Add a worker."""

    def remove_slot(self) -> None:
        """Remove a worker."""

    def replace_all(self) -> None:
        """Begin a rolling restart."""

    def stop(self, number: signal.Signals | None = None, grace: float | None = None) -> None:
        """Stop."""


class SupervisorControl:
    """What was set live, and a control socket if there is to be one.

    Args:
        where: the control socket; None for none.
        server: made as the workers' servers, and never started. What is set live is set here first, which checks it.

    `supervisor` is set by the supervisor that this is for.
    """

    supervisor: ControlledSupervisor

    def __init__(self, where: UnixEndpoint | None, server: BaseServer) -> None:
        self._server = None if where is None else ControlServer(where, self)
        self._view = ServerView(server)
        # Of every server, in their order.
        self._settings: list[dict[str, Any]] = [
            {"limits": {}, "timeouts": {}, "paused": False} for _ in servers_of(server)
        ]
        self._numbers = itertools.count(1)

    async def __aenter__(self) -> Self:
        """Listen on the control socket, if there is to be one; EndpointError if that can't be done."""
        if self._server is not None:
            await self._server.__aenter__()
            await self._server.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close it."""
        if self._server is not None:
            await self._server.__aexit__()

    def give_number(self, worker: WorkerProcess) -> None:
        """Number a process that was started."""
        worker.number = next(self._numbers)

    def orders(self, worker: WorkerProcess) -> dict[str, Any]:
        """Return what a worker that begins to serve has to know of all that was set live."""
        return {"number": worker.number, "settings": self._settings}

    # What the commands are carried out by.

    async def ask(self, what: str, *, worker: int | None = None, **values: Any) -> Gathered:
        """Ask all workers that may have clients, or one."""
        asked = [each for each in self.supervisor.workers if each.may_have_clients]
        if worker is not None:
            asked = [each for each in asked if each.number == worker]
            if not asked:
                raise ControlError(f"there is no worker {worker}: status tells which there are")
        answers = await self.supervisor.asking.ask(what, workers=asked, timeout=5.0, **values)
        if what == "control.status":
            for one, status in answers.values.items():
                self.supervisor.watch.keep_counts(one, status.pop("counts"))
        return _gathered(answers)

    def describe(self) -> dict[str, Any]:
        """Return the processes, and what they and the ones before them have told."""
        workers = sorted(self.supervisor.workers, key=lambda each: each.number)
        return {
            "workers": [
                {
                    "name": str(each.number),
                    "slot": each.slot.number,
                    "pid": each.process.pid,
                    "state": each.state.name.lower(),
                }
                for each in workers
            ],
            "counts": self.supervisor.watch.counts(),
        }

    async def set_live(self, kind: str, changes: Mapping[str, Any], server: int | None) -> Gathered:
        """Set limits or timeouts in all workers, and any that start later."""
        (self._view.set_limits if kind == "limits" else self._view.set_timeouts)(changes, server)
        for settings in self._select(server):
            settings[kind].update(changes)
        return await self.ask(f"control.{kind}", changes=dict(changes), server=server)

    async def set_paused(self, is_paused: bool, server: int | None) -> Gathered:
        """Pause or resume all workers, and any that start later."""
        (self._view.pause if is_paused else self._view.resume)(server)
        for settings in self._select(server):
            settings["paused"] = is_paused
        return await self.ask("control.pause" if is_paused else "control.resume", server=server)

    def _select(self, server: int | None) -> list[dict[str, Any]]:
        return self._settings if server is None else [self._settings[server - 1]]

    def drain(self, grace: float | None) -> None:
        """Stop."""
        logger.info("stopping, by live control")
        self.supervisor.stop(grace=grace)

    def reload(self) -> str:
        """Replace all workers."""
        self.supervisor.replace_all()
        return "replacing all workers, one after another; the log tells how that goes"

    def set_workers(self, change: str) -> int:
        """Add or remove workers."""
        count = len(self.supervisor.slots)
        if not re.fullmatch(r"[+-]?\d{1,6}", change):
            raise ControlError(f"workers takes +1, -1 or a number, not {change!r}")
        wanted = count + int(change) if change[0] in "+-" else int(change)
        if not 1 <= wanted <= MOST_WORKERS:
            raise ControlError(f"there must be 1 to {MOST_WORKERS} workers, not {wanted}; there are {count}")
        for _ in range(abs(wanted - count)):
            (self.supervisor.add_slot if wanted > count else self.supervisor.remove_slot)()
        return len(self.supervisor.slots)


def _gathered(answers: Answers) -> Gathered:
    return Gathered(
        {str(worker.number): parts for worker, parts in answers.parts.items()},
        {_name(worker): error for worker, error in answers.errors.items()},
        [_name(worker) for worker in answers.silent],
    )


def _name(worker: WorkerProcess) -> str:
    return f"worker {worker.number} (process {worker.process.pid})"  # the number that ids begin with
