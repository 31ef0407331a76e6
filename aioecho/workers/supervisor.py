"""The parent of worker processes: binds for them, starts, replaces, and ends them. It serves nothing itself.

Every worker has a slot, with the sockets that it serves on. Those stay open here while the slot lasts, whatever happens to
the worker: a client that waits in their queue is served by the next one. So a worker that is replaced leaves the queue
alone, and only at the end of all, when the supervisor has closed its own, do the workers take it in.
"""

import asyncio
import logging
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from aioecho.exceptions import AioechoError
from aioecho.net import systemd
from aioecho.net.binding import BoundSocket, bind_endpoint, bind_sibling
from aioecho.net.endpoints import Endpoint, HostEndpoint
from aioecho.stats import DrainReport
from aioecho.workers.processes import Slot, WorkerProcess, start_worker, tell_status
from aioecho.workers.worker import Order, make_order

__all__ = ["Supervisor"]

logger = logging.getLogger("aioecho.supervisor")

# Seconds before a worker that has died is replaced: none the first time, then twice as long each time, until one lives.
FIRST_DELAY = 0.05
LONGEST_DELAY = 1.6
LIVES_AFTER = 10.0

# Deaths in a row, of one slot's workers, that end the whole. Not those by SIGKILL: an administrator's or the kernel's
# doing, for want of memory, that says nothing of the worker.
TOO_OFTEN = 8

# Seconds for a worker to import what it serves and to accept. A program may load a lot; one that hangs there would hold up
# every restart to come.
START_PATIENCE = 120.0

# Seconds for a worker to end by itself over its grace, and when it is told to end at once.
PATIENCE = 2.0

# Seconds to wait for the stats of workers that do not answer.
STATS_PATIENCE = 1.0


class Supervisor:
    """Runs `workers` processes that serve on `endpoints`, until SIGTERM or SIGINT.

    SIGHUP replaces them one after another, SIGTTIN and SIGTTOU add and remove one, SIGUSR1 logs their stats.

    Args:
        endpoints: bound once, here.
        order: what each worker is to do.
        workers: how many.
        backlog, grace: as the workers' servers have them.
        reuse_port: bind TCP and UDP endpoints for each worker apart, so that the kernel divides the clients between them.
        when_serving: called with the endpoints' names once every worker accepts.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        order: Order,
        *,
        workers: int,
        backlog: int,
        grace: float,
        reuse_port: bool = False,
        when_serving: Callable[[Sequence[str]], object] = lambda names: None,
    ) -> None:
        self._endpoints = endpoints
        self._order = make_order(order)
        self._count = workers
        self._backlog = backlog
        self._grace = grace
        self._reuse_port = reuse_port
        self._when_serving = when_serving
        self._bound: list[
            tuple[bool, list[BoundSocket]]
        ] = []  # of each endpoint: whether each slot has its own, and the first's
        self._slots: list[Slot] = []
        self._workers: set[WorkerProcess] = set()
        self._to_roll: list[Slot] = []
        self._is_rolling = False
        self._is_serving = False
        self._is_stopping = self._is_ending = False
        self._began = 0.0
        self._failure: str | None = None
        self._drained = {"completed": 0, "cancelled": 0, "aborted": 0}
        self._ended: Counter[str] = Counter()  # the stats of workers that are gone
        self._asked: set[WorkerProcess] = set()
        self._watchdog: asyncio.TimerHandle | None = None

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
        actions = {
            signal.SIGTERM: self._stop,
            signal.SIGINT: self._stop,
            signal.SIGHUP: self._roll_all,
            signal.SIGTTIN: self._add,
            signal.SIGTTOU: self._remove,
            signal.SIGUSR1: self._ask_stats,
            signal.SIGCHLD: self._reap,
        }
        for number, action in actions.items():
            self._loop.add_signal_handler(number, action)
        try:
            with tempfile.TemporaryFile() as self._order_file:
                self._order_file.write(self._order)
                self._order_file.flush()
                await self._start()
                await self._done
        finally:
            if self._watchdog is not None:
                self._watchdog.cancel()
            for number in actions:
                self._loop.remove_signal_handler(number)
            for worker in self._workers:  # only if something here has failed
                worker.process.kill()
                worker.process.wait()
                worker.channel.sock.close()
            self._close_sockets()
        if self._failure is not None:
            raise AioechoError(self._failure)
        report = DrainReport(**self._drained, seconds=self._loop.time() - self._began)
        logger.info("all workers have ended, in %.3f s", report.seconds)
        return report

    async def _start(self) -> None:
        binding = self._loop.create_task(self._bind())
        await asyncio.wait({binding, self._done}, return_when=asyncio.FIRST_COMPLETED)
        if not binding.done():  # looking up a host's name, when it was told to stop
            binding.cancel()
            await asyncio.wait({binding})
            return
        binding.result()
        if (seconds := systemd.watchdog_seconds()) is not None:
            self._feed_watchdog(seconds)
        for _ in range(self._count):
            self._add()

    # Sockets and slots.

    async def _bind(self) -> None:
        for endpoint in self._endpoints:
            # A Unix socket can't be bound twice, nor an inherited one.
            is_divided = self._reuse_port and isinstance(endpoint, HostEndpoint)
            bound = await bind_endpoint(endpoint, backlog=self._backlog, reuse_port=is_divided)
            self._bound.append((is_divided, bound))

    def _close_sockets(self) -> None:
        for slot in self._slots:
            slot.close()
        for _, bound in self._bound:
            for each in bound:
                each.close()

    def _add(self) -> None:
        """Add a slot and its worker: the start, and SIGTTIN."""
        if self._is_stopping or len(self._bound) < len(self._endpoints):  # SIGTTIN while it binds
            return
        sockets: list[list[BoundSocket]] = []
        own: list[BoundSocket] = []
        try:
            for is_divided, bound in self._bound:
                if not (is_divided and self._slots):
                    sockets.append(bound)
                    continue
                sockets.append([])
                for each in bound:
                    own.append(bind_sibling(each))
                    sockets[-1].append(own[-1])
            slot = Slot(len(self._slots) + 1, sockets, own)
            slot.worker = self._spawn(slot)
        except OSError as error:
            for each in own:
                each.close()
            if self._is_serving:
                logger.error("cannot start another worker: %s", error)
            else:
                self._fail(f"cannot start a worker: {error}")
        else:
            self._slots.append(slot)

    def _remove(self) -> None:
        """Remove the last slot, unless it is the only one: SIGTTOU."""
        if self._is_stopping or len(self._slots) <= 1:
            return
        slot = self._slots.pop()
        slot.close()
        for worker in (slot.worker, slot.successor):
            if worker is not None:
                # Of sockets that are closed here nobody else takes in the queue.
                self._dismiss(worker, "drain" if slot.own else "retire")
        self._go_on()

    # Processes.

    def _spawn(self, slot: Slot) -> WorkerProcess:
        """Start a worker process; OSError if that can't be done."""
        worker = start_worker(slot, self._order_file.fileno(), self._grace)
        try:
            self._loop.add_reader(worker.channel.sock.fileno(), self._hear, worker)
        except OSError:  # of epoll, which has no room: nobody would hear of it
            worker.process.kill()
            worker.process.wait()
            worker.channel.sock.close()
            raise
        self._workers.add(worker)
        worker.give_up_after(START_PATIENCE, f"is not ready after {START_PATIENCE:g} s")
        logger.debug("started %s", worker)
        return worker

    def _dismiss(self, worker: WorkerProcess, how: str) -> None:
        """Tell a worker to go; at once, if it has not begun to accept."""
        worker.is_leaving = True
        if worker.may_serve:
            worker.channel.send(how)
            worker.give_up_after(self._grace + PATIENCE)
        else:
            worker.process.kill()

    def _reap(self) -> None:
        for worker in list(self._workers):
            status = worker.process.poll()
            if status is not None:
                self._hear(worker)  # its last words
                self._loop.remove_reader(worker.channel.sock.fileno())
                worker.channel.sock.close()
                self._workers.discard(worker)
                worker.give_up_after(None)
                self._bury(worker, status)
                self._note_stats(worker)
                self._go_on()

    def _hear(self, worker: WorkerProcess) -> None:
        for message in worker.channel.receive():
            match message[""]:
                case "loaded" if not (self._is_stopping or worker.is_leaving):
                    worker.may_serve = True
                    worker.channel.send("serve")
                case "failed":
                    worker.failure = f"could not start: {message['why']}"
                    worker.give_up_after(PATIENCE)  # what it has imported may keep it from its end
                    if message["traceback"] and not self._is_stopping:
                        logger.error("%s could not start:\n%s", worker, message["traceback"].rstrip())
                    if worker is worker.slot.worker and not worker.is_leaving:  # else another one serves, or none need
                        self._fail(f"{worker} {worker.failure}")
                case "ready":
                    self._welcome(worker)
                case "replace" if worker.slot.worker is worker and not worker.is_leaving:
                    self._replace(worker.slot)
                case "stats":
                    worker.stats = message["stats"]
                    self._note_stats(worker)
                case "pong":
                    worker.pinged_at = None
                case "ended":
                    worker.report, worker.stats = message["report"], message["stats"]
                    if not worker.is_leaving:  # its handler has shut it down: it is missed as soon as it is gone
                        worker.give_up_after(PATIENCE)
        if worker.channel.has_ended:  # its end comes by SIGCHLD
            self._loop.remove_reader(worker.channel.sock.fileno())

    def _welcome(self, worker: WorkerProcess) -> None:
        """A worker accepts: let the one go that it replaces."""
        worker.ready_at = self._loop.time()
        if worker.is_leaving:  # it was told so before it was ready, and will find that next
            return
        worker.give_up_after(None)
        slot = worker.slot
        if slot.successor is worker:
            old, slot.worker, slot.successor = slot.worker, worker, None
            if old is not None:
                self._dismiss(old, "retire")
        self._go_on()

    def _replace(self, slot: Slot) -> None:
        if slot.successor is None and not self._is_stopping:
            try:
                slot.successor = self._spawn(slot)
            except OSError as error:
                self._call_off(f"cannot start another worker: {error}")

    def _bury(self, worker: WorkerProcess, status: int) -> None:
        """Go on without a worker: what follows depends on whose time it was."""
        slot = worker.slot
        ended = worker.failure or tell_status(status) + (" before it was ready" if worker.ready_at is None else "")
        if worker.report is not None:
            self._ended.update(worker.stats)
        if self._is_stopping:
            if worker.report is not None:
                for name in self._drained:
                    self._drained[name] += worker.report[name]
            elif worker.may_serve:
                self._drained["aborted"] += 1
                logger.error("%s %s in the drain", worker, ended)
        elif worker.is_leaving:
            if worker.report is None and worker.may_serve:
                logger.error("%s %s in the drain", worker, ended)
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
        was_killed = status == -signal.SIGKILL and not worker.was_given_up
        if worker.ready_at is None:
            if not (was_killed and self._is_serving):
                self._fail(f"{worker} {ended}")
                return
        elif self._loop.time() - worker.ready_at >= LIVES_AFTER:
            slot.deaths = slot.crashes = 0
        if not was_killed:
            slot.crashes += 1
            if slot.crashes >= TOO_OFTEN:
                self._fail(f"{worker} {ended}, as {TOO_OFTEN - 1} in its place before it, soon after their start")
                return
        delay = min(FIRST_DELAY * 2 ** (slot.deaths - 1), LONGEST_DELAY) if slot.deaths else 0.0
        slot.deaths += 1
        logger.warning("%s %s; it is replaced in %g s", worker, ended, delay)
        slot.restart = self._loop.call_later(delay, self._start_again, slot)

    def _start_again(self, slot: Slot) -> None:
        try:
            slot.worker = self._spawn(slot)
        except OSError as error:
            logger.error("cannot start another worker, and try again in %g s: %s", LONGEST_DELAY, error)
            slot.restart = self._loop.call_later(LONGEST_DELAY, self._start_again, slot)

    # SIGHUP: one after another.

    def _roll_all(self) -> None:
        if self._is_stopping or not self._slots:  # it binds: workers that do not exist yet will be new
            return
        self._to_roll = list(self._slots)
        if not self._is_rolling:
            self._is_rolling = True
            logger.info("replacing all workers")
            systemd.notify_reloading()
        self._go_on()

    def _go_on(self) -> None:
        """Take the next step of what is under way, if it is time for it: the start, a rolling restart, or the end."""
        if self._is_stopping:
            if not self._workers and not self._done.done():
                self._done.set_result(None)
            return
        if not self._is_serving and all(slot.is_serving for slot in self._slots):
            self._is_serving = True
            names = list(dict.fromkeys(each.name for _, bound in self._bound for each in bound))
            logger.info("%d workers are listening on %s", len(self._slots), ", ".join(names))
            self._when_serving(names)
            systemd.notify("READY=1")
        if not (self._is_rolling and self._is_serving) or any(slot.successor for slot in self._slots):
            return
        while self._to_roll:
            slot = self._to_roll[0]
            if slot in self._slots and slot.worker is not None:
                # At most two for each slot: the one before the one that serves has to be gone.
                if not slot.is_serving or any(each.slot is slot and each.is_leaving for each in self._workers):
                    return
                del self._to_roll[0]
                self._replace(slot)
                return
            del self._to_roll[0]  # gone meanwhile, or soon to be new
        self._is_rolling = False
        logger.info("replaced all workers")
        systemd.notify("READY=1")

    def _call_off(self, why: str) -> None:
        """A successor did not come up: whoever serves goes on serving, and the rest is not even tried."""
        logger.error("%s: the old one serves on", why)
        self._to_roll.clear()
        if self._is_rolling:
            self._is_rolling = False
            systemd.notify("READY=1")

    # The end.

    def _stop(self) -> None:
        if not self._is_stopping:
            self._is_stopping = True
            self._began = self._loop.time()
            systemd.notify_stopping(self._grace + PATIENCE)
            # First: so whoever is the last of the workers to take in the queue has all of it.
            self._close_sockets()
            for worker in self._workers:
                if not worker.is_leaving:
                    self._dismiss(worker, "drain")
        elif not self._is_ending:  # once: whoever goes on asking does not put it off
            self._is_ending = True
            for worker in self._workers:
                worker.channel.send("end")
                worker.give_up_after(PATIENCE)
        self._go_on()

    def _fail(self, why: str) -> None:
        if not self._is_stopping:
            self._failure = why
            self._stop()

    # Stats and the watchdog.

    def _ask_stats(self) -> None:
        if self._asked:
            return
        self._asked = {worker for worker in self._workers if worker.may_serve}
        for worker in self._asked:
            worker.channel.send("stats")
        self._stats_timer = self._loop.call_later(STATS_PATIENCE, self._log_stats)

    def _note_stats(self, worker: WorkerProcess) -> None:
        if worker in self._asked:
            self._asked.discard(worker)
            if not self._asked:
                self._stats_timer.cancel()
                self._log_stats()

    def _log_stats(self) -> None:
        total = self._ended.copy()
        for worker in sorted(self._workers, key=lambda each: each.slot.number):
            total.update(worker.stats)
            old = " (old: it has not answered)" if worker in self._asked else ""
            logger.info("stats of %s: %s%s", worker, _tell_counts(worker.stats), old)
        self._asked.clear()
        logger.info("stats of all workers, and those before them: %s", _tell_counts(total))

    def _feed_watchdog(self, seconds: float) -> None:
        """Feed systemd's watchdog, and be one to the workers: one whose loop does not turn is replaced."""
        systemd.notify("WATCHDOG=1")
        now = self._loop.time()
        for worker in self._workers:
            if worker.ready_at is None or worker.is_leaving:
                continue
            if worker.pinged_at is None:
                worker.pinged_at = now
                worker.channel.send("ping")
            elif now - worker.pinged_at >= seconds and not worker.was_given_up:
                worker.give_up("hangs")
        self._watchdog = self._loop.call_later(seconds / 2, self._feed_watchdog, seconds)


def _tell_counts(stats: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in stats.items())
