"""The parent of worker processes: binds for them, starts, replaces, and ends them. It serves nothing itself.

Every worker has a slot, with the sockets that it serves on. They stay open here while the slot lasts, whatever happens to
the worker: a client that waits in their queue is served by the next one. So a worker that is replaced leaves the queue
alone. Only at the end of all, when the supervisor has closed its own, the workers accept what is queued.
"""

import asyncio
import enum
import functools
import logging
import signal
from collections.abc import Callable, Sequence

from aioecho.exceptions import AioechoError
from aioecho.net import systemd
from aioecho.net.bound import BoundSocket
from aioecho.net.endpoints import Endpoint
from aioecho.serving.drain import OVER_GRACE
from aioecho.stats import DrainReport
from aioecho.workers.asking import Asking
from aioecho.workers.control import SupervisorControl
from aioecho.workers.inherited import Inherited
from aioecho.workers.order import Order
from aioecho.workers.processes import describe_status, start_worker
from aioecho.workers.restarts import LONGEST_DELAY, count_death, was_killed
from aioecho.workers.rolling import RollingRestart
from aioecho.workers.signals import handling
from aioecho.workers.slots import WorkerProcess, WorkerSlot, WorkerState
from aioecho.workers.sockets import SupervisorSockets
from aioecho.workers.stopping import STOP_TIMEOUT, Stop
from aioecho.workers.watching import WorkerWatch
from aioecho.workers.worker import SIGNALS

__all__ = ["SUPERVISOR_SIGNALS", "Supervisor"]

logger = logging.getLogger("aioecho.supervisor")

SUPERVISOR_SIGNALS = (*SIGNALS, signal.SIGCHLD)
"""What :meth:`Supervisor.run` handles."""

# Seconds for a worker to import what it serves and to accept. One that hangs there would hold up every restart to come.
START_TIMEOUT = 120.0


class _State(enum.Enum):
    BINDING = enum.auto()
    STARTING = enum.auto()  # the first workers load
    SERVING = enum.auto()
    STOPPING = enum.auto()


class Supervisor:
    """Runs `workers` processes that serve on `endpoints`, until SIGTERM or SIGINT.

    SIGHUP replaces them one after another, SIGTTIN and SIGTTOU add and remove one, SIGUSR1 logs their stats.

    Args:
        endpoints: bound once, here.
        order: what a worker is to do.
        workers: how many.
        backlogs: of every endpoint's sockets.
        grace: as the workers' servers have it.
        reuse_port: bind TCP and UDP endpoints for every worker apart, so that the kernel divides the clients between them.
        healthcheck: seconds after which a worker that does not answer is killed; None is never.
        metrics: the address of the metrics' port; None for none.
        when_serving: called with the endpoints' names once all workers accept.
        when_reloading: called at SIGHUP, or when live control reloads, before the workers are replaced.
        control: what is set live, and the control socket.

    Raises:
        TypeError: `order` can't be sent to another process.
        ValueError: `metrics` is no address.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        order: Order,
        *,
        workers: int,
        backlogs: Sequence[int],
        grace: float,
        reuse_port: bool,
        healthcheck: float | None,
        metrics: str | None,
        when_serving: Callable[[Sequence[str]], object],
        when_reloading: Callable[[], object],
        control: SupervisorControl,
    ) -> None:
        self._sockets = SupervisorSockets(endpoints, backlogs=backlogs, reuse_port=reuse_port)
        self._inherited = Inherited(order.pack(), take_turns=not reuse_port)
        self._count = workers
        self._grace = grace
        self._when_serving, self._when_reloading = when_serving, when_reloading
        self._state = _State.BINDING
        self.slots: list[WorkerSlot] = []
        self.workers: set[WorkerProcess] = set()
        self._rolling = RollingRestart(self._replace, self._tell_ready)
        self.asking = Asking(self.workers)
        self._control = control
        control.supervisor = self
        self.watch = WorkerWatch(
            self.workers,
            self._sockets,
            self.asking,
            healthcheck=healthcheck,
            metrics=metrics,
            is_stopping=lambda: self._is_stopping,
        )
        self._stop = Stop(self.workers, grace)
        self._failure: str | None = None

    async def run(self) -> DrainReport:
        """Serve until told to stop, and return what became of all workers' connections then.

        A worker that had to be killed, or died in the drain, counts as one aborted: how many it had is not known.

        Raises:
            EndpointError: an endpoint can't be listened on.
            AioechoError: a worker ended before it was ready, or workers died too often.
            RuntimeError: this is not the main thread, which alone gets signals.
        """
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        with handling(self._loop, self._actions()):
            try:
                self._inherited.open()
                async with self.watch, self._control:
                    await self._start()
                    await self._done
            finally:
                for worker in self.workers:  # only if something here has failed
                    worker.abandon()
                self._close_sockets()
                self._inherited.close()
        if self._failure is not None:
            raise AioechoError(self._failure)
        report = self._stop.report()
        logger.info("all workers have ended, in %.3f s", report.seconds)
        return report

    def _actions(self) -> dict[signal.Signals, Callable[[], None]]:
        return {
            signal.SIGTERM: functools.partial(self.stop, signal.SIGTERM),
            signal.SIGINT: functools.partial(self.stop, signal.SIGINT),
            signal.SIGHUP: self.replace_all,
            signal.SIGTTIN: self.add_slot,
            signal.SIGTTOU: self.remove_slot,
            signal.SIGUSR1: self.watch.log_stats,
            signal.SIGCHLD: self._reap,
        }

    @property
    def _is_stopping(self) -> bool:
        return self._state is _State.STOPPING

    async def _start(self) -> None:
        binding = self._loop.create_task(self._sockets.bind())
        await asyncio.wait({binding, self._done}, return_when=asyncio.FIRST_COMPLETED)
        if not binding.done():  # it looks up a host's name, and was told to stop
            binding.cancel()
            await asyncio.wait({binding})
            return
        binding.result()
        self.watch.start()
        if not self._is_stopping:
            self._state = _State.STARTING
        for _ in range(self._count):
            self.add_slot()

    # Sockets and slots.

    def _close_sockets(self) -> None:
        for slot in self.slots:
            slot.close()
        self._sockets.close()

    def add_slot(self) -> None:
        """Add a slot and its worker: at the start, and on SIGTTIN."""
        if self._is_stopping or self._state is _State.BINDING:
            return
        own: list[BoundSocket] = []
        try:
            slot = WorkerSlot(len(self.slots) + 1, self._sockets.of_slot(own, is_first=not self.slots), own)
            slot.worker = self._start_worker(slot, "start" if self._state is _State.STARTING else "added")
        except OSError as error:
            for bound in own:
                bound.close()
            if self._state is _State.SERVING:
                logger.error("cannot start another worker: %s", error)
            else:
                self._fail(f"cannot start a worker: {error}")
        else:
            self.slots.append(slot)

    def remove_slot(self) -> None:
        """Remove the last slot, unless it is the only one: on SIGTTOU."""
        if self._is_stopping or len(self.slots) <= 1:
            return
        slot = self.slots.pop()
        slot.close()
        for worker in (slot.worker, slot.successor):
            if worker is not None:
                # Sockets of its own are closed here now: no other process would accept what is queued.
                worker.leave("remove" if slot.own else "retire", self._grace + OVER_GRACE)
        self._advance()

    # Processes.

    def _start_worker(self, slot: WorkerSlot, cause: str) -> WorkerProcess:
        """Start a worker process; OSError if that can't be done. `cause` is one of aioecho.workers.metrics."""
        worker = start_worker(slot, self._inherited, self._grace)
        try:
            self._loop.add_reader(worker.channel.sock.fileno(), self._read_channel, worker)
        except OSError:  # of epoll, which has no room: what the worker says would not be read
            worker.abandon()
            raise
        worker.channel.attach(self._loop)
        self._control.give_number(worker)
        self.workers.add(worker)
        self.watch.note_start(cause)
        worker.kill_after(START_TIMEOUT, f"is not ready after {START_TIMEOUT:g} s")
        logger.debug("started %s", worker)
        return worker

    def _read_channel(self, worker: WorkerProcess, is_last: bool = False) -> None:
        for message in worker.channel.receive(is_last=is_last):
            match message[""]:
                case "loaded" if worker.state is WorkerState.LOADING and not self._is_stopping:
                    worker.state = WorkerState.STARTING
                    worker.channel.send("serve", **self._control.orders(worker))
                case "failed":
                    worker.may_retry = "retry" in message and self._state is _State.SERVING
                    self._on_failed_start(worker, message["why"], message["traceback"])
                case "ready":
                    self._on_ready(worker)
                case "replace" if worker.slot.worker is worker and not worker.is_leaving:
                    self._replace(worker.slot, "replaced")
                case "draining":
                    self._stop.on_draining(worker, message)
                case "ended":
                    worker.report = message["report"]
                    if not worker.is_leaving:  # its handler has shut it down: it is replaced as soon as it has ended
                        worker.kill_after(STOP_TIMEOUT)
            self.watch.on_message(worker, message)
        if worker.channel.has_ended:  # SIGCHLD tells of its end
            self._loop.remove_reader(worker.channel.sock.fileno())

    def _on_failed_start(self, worker: WorkerProcess, why: str, traceback: str | None) -> None:
        worker.failure = f"could not start: {why}"
        worker.kill_after(STOP_TIMEOUT)  # what it has imported may keep it from its end
        if traceback and not self._is_stopping:
            logger.error("%s could not start:\n%s", worker, traceback.rstrip())
        # Else another one serves, or none is needed.
        if worker is worker.slot.worker and not worker.is_leaving and not worker.may_retry:
            self._fail(f"{worker} {worker.failure}")

    def _on_ready(self, worker: WorkerProcess) -> None:
        """A worker accepts: tell the one that it replaces to leave."""
        worker.serving_since = self._loop.time()
        if worker.state is not WorkerState.STARTING:  # it was told to leave before it was ready, or is killed
            return
        worker.state = WorkerState.SERVING
        worker.kill_after(None)
        slot = worker.slot
        if slot.successor is worker:
            old, slot.worker, slot.successor = slot.worker, worker, None
            if old is not None:
                old.leave("retire", self._grace + OVER_GRACE)
        self._advance()

    def _reap(self) -> None:
        for worker in list(self.workers):
            status = worker.process.poll()
            if status is not None:
                self._read_channel(worker, is_last=True)  # its last words
                self._loop.remove_reader(worker.channel.sock.fileno())
                worker.close()
                self.workers.discard(worker)
                worker.kill_after(None)
                self._on_end(worker, status)
                self.watch.on_end(worker)
                self._advance()

    def _on_end(self, worker: WorkerProcess, status: int) -> None:
        """A worker has ended: do what follows from where it was in its life."""
        slot = worker.slot
        is_early = worker.serving_since is None
        ended = worker.failure or describe_status(status) + (" before it was ready" if is_early else "")
        if self._is_stopping or worker.is_leaving:
            is_lost = worker.report is None and worker.may_have_clients
            if is_lost:
                logger.error("%s %s in the drain", worker, ended)
            if self._is_stopping:
                self._stop.on_end(worker, is_lost)
                if worker.report is not None and worker.report["failed"]:
                    self._failure = self._failure or f"the lifespan of {worker} failed: see the log"
        elif worker is slot.successor:
            slot.successor = None
            if slot.worker is not None:
                self._call_off(f"{worker} {ended}")
            else:
                self._restart(worker, status, ended)
        else:
            slot.worker = None
            if slot.successor is None:
                self._restart(worker, status, ended)
            else:
                logger.warning("%s %s; it was about to be replaced", worker, ended)

    def _restart(self, worker: WorkerProcess, status: int, ended: str) -> None:
        """Replace a worker that has died, later the more often that has happened."""
        slot = worker.slot
        if worker.serving_since is None and not (was_killed(worker, status) and self._state is _State.SERVING):
            self._fail(f"{worker} {ended}")
            return
        delay = count_death(slot, worker, status, self._loop.time())
        if isinstance(delay, str):
            self._fail(f"{worker} {ended}, {delay}")
            return
        cause = "killed" if was_killed(worker, status) else "hung" if worker.state is WorkerState.HUNG else "died"
        logger.warning("%s %s; it is replaced in %g s", worker, ended, delay)
        slot.restart = self._loop.call_later(delay, self._retry_start, slot, cause)

    def _retry_start(self, slot: WorkerSlot, cause: str) -> None:
        try:
            slot.worker = self._start_worker(slot, cause)
        except OSError as error:
            logger.error("cannot start another worker, and try again in %g s: %s", LONGEST_DELAY, error)
            slot.restart = self._loop.call_later(LONGEST_DELAY, self._retry_start, slot, cause)

    # Replacing workers that serve.

    def replace_all(self) -> None:
        """Replace all workers, one after another: on SIGHUP."""
        self._when_reloading()
        if self._is_stopping or not self.slots:  # it binds: workers that do not exist yet will be new
            return
        self._rolling.begin(self.slots)
        self._advance()

    def _replace(self, slot: WorkerSlot, cause: str = "reload") -> None:
        if slot.successor is None and not self._is_stopping:
            try:
                slot.successor = self._start_worker(slot, cause)
            except OSError as error:
                self._call_off(f"cannot start another worker: {error}")

    def _call_off(self, why: str) -> None:
        """A successor did not come up: the old workers serve on, and no other is replaced either."""
        logger.error("%s: the old one serves on", why)
        self._rolling.call_off()

    def _advance(self) -> None:
        """Take the next step of what is under way, if it is time for it: the start, a rolling restart, or the end."""
        if self._is_stopping:
            if not self.workers and not self._done.done():
                self._done.set_result(None)
            return
        if self._state is _State.STARTING and all(slot.is_serving for slot in self.slots):
            self._state, names = _State.SERVING, self._sockets.names
            logger.info("%d workers are listening on %s", len(self.slots), ", ".join(names))
            self._when_serving(names)
            self._tell_ready()
        if self._state is _State.SERVING:
            self._rolling.advance(self.slots, self.workers)

    def _tell_ready(self) -> None:
        systemd.notify_ready(self._sockets.names, len(self.slots))

    # The end.

    def stop(self, number: signal.Signals | None = None, grace: float | None = None) -> None:
        """Stop, because of a signal or not; a second signal ends all at once. `grace` takes the place of the usual one."""
        if self._is_stopping:
            self._stop.hasten(number, grace)
        else:
            self._state = _State.STOPPING
            # First: then the last worker that accepts what is queued gets all of it.
            self._close_sockets()
            self._stop.begin(number, grace)
        self._advance()

    def _fail(self, why: str) -> None:
        if not self._is_stopping:
            self._failure = why
            self.stop()
