"""One worker process: how it comes to its server, what it hears from its supervisor and tells it, and its end.

The supervisor starts a fresh interpreter that calls :func:`main`. Between the two is a channel. On it the supervisor sends
"serve" (once everything is loaded), "retire" (others serve on: leave them what is queued), "remove" (others serve on, and have
other sockets: accept what is queued), "drain" (no other serves on: accept what is queued), "end" (at once), "stats", "ping",
"ask" (see asking.py), "published" and "unpublished" (see publishing.py). The worker sends "loaded", "failed", "ready",
"replace" (start my successor), "draining" (and how many connections it waits for), "stats", "metrics", "answer", "publish",
"pong" and "ended". The end of the stream tells that the other side is gone.
"""

import asyncio
import dataclasses
import itertools
import logging
import os
import random
import select
import signal
import socket
import sys
import threading
import traceback
from typing import Any, NoReturn

from aioecho.datagrams.handover import Handover
from aioecho.datagrams.server import DatagramServer
from aioecho.exceptions import AioechoError, CertificateError
from aioecho.net.turns import AcceptCounts, AcceptTurns
from aioecho.ops.control_view import ServerView
from aioecho.parts import Composite
from aioecho.runtime.collector import collect_little, short_collections
from aioecho.runtime.loops import end_other_tasks, loop_factory
from aioecho.serving.base import BaseServer
from aioecho.several import servers_of
from aioecho.stats import DatagramStats, ServiceStats, Stats
from aioecho.workers.asking import Answering, Question
from aioecho.workers.channel import Channel
from aioecho.workers.guard import loading, remove_mark
from aioecho.workers.metrics import WorkerReports
from aioecho.workers.order import Order, read_order
from aioecho.workers.publishing import Publishing
from aioecho.workers.signals import keep_for_children

__all__ = ["SIGNALS", "main"]

logger = logging.getLogger("aioecho.workers")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN, signal.SIGTTOU)
"""What the supervisor is told by. A signal sent to the whole group, as Ctrl-C is, means the supervisor alone."""

# Seconds over its grace that a worker without a supervisor may hang.
ORPHAN_TIMEOUT = 1.0


def main(
    control: int,
    inherited: list[int],
    cell: int,
    sockets: list[list[int]],
    grace: float,
    predecessor: int,
    successor: int,
) -> NoReturn:
    """Be a worker.

    Args:
        control: a descriptor: one end of the channel.
        inherited: descriptors: the file that says what to do, and the memory for taking turns at accept(), if they do.
        cell: the number of this worker's cell there; 0 if it has none.
        sockets: the descriptors to serve on, a list for every endpoint.
        grace: the server's, in seconds.
        predecessor, successor: descriptors for the handing over of sessions, from the worker that it replaces, -1 if there is
            none, and to the one that replaces it.
    """
    remove_mark()
    keep_for_children(SIGNALS)
    for number in SIGNALS:
        # Not SIG_IGN, which the programs that a handler starts would inherit.
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # start_worker() has blocked them for the time until now
    before = [predecessor] if predecessor >= 0 else []
    for descriptor in (control, *inherited, successor, *before, *itertools.chain(*sockets)):
        os.set_inheritable(descriptor, False)
    channel = Channel(socket.socket(fileno=control))
    handover = Handover(socket.socket(fileno=before[0]) if before else None, socket.socket(fileno=successor))
    threading.Thread(target=_exit_after_supervisor, args=(control, grace + ORPHAN_TIMEOUT), daemon=True).start()
    try:
        with loading():
            what = read_order(inherited[0])
            server = what.make_server([[f"fd://{number}" for number in group] for group in sockets])
        for counts in inherited[1:]:
            _take_turns(server, counts, cell)
        runner = asyncio.Runner(loop_factory=loop_factory(what.loop))
    except BaseException as error:
        text = str(error) if isinstance(error, AioechoError | SystemExit) else f"{type(error).__name__}: {error}"
        is_plain = isinstance(error, AioechoError | SystemExit)
        channel.send("failed", why=text, traceback=None if is_plain else traceback.format_exc()[-(2**15) :])
        with channel.sock, handover:
            sys.exit(1)
    with channel.sock, handover, short_collections(), runner:
        runner.run(_Worker(server, channel, what, handover).run())
    sys.exit()


def _take_turns(server: BaseServer, descriptor: int, cell: int) -> None:
    """Have the server leave clients to other workers that have fewer connections. Close the descriptor."""
    if cell:
        parts = server.parts if isinstance(server, Composite) else [server]
        streams = [part for part in parts if not isinstance(part, DatagramServer)]
        turns = AcceptTurns(AcceptCounts(descriptor), cell, lambda: sum(part.live_stats.active for part in streams))
        for part in streams:
            part.accept_turns = turns
    os.close(descriptor)


def _exit_after_supervisor(control: int, seconds: float) -> None:
    """End the process if the supervisor is gone and the loop hangs: it would keep the port from the next server."""
    hangup = select.poll()
    hangup.register(control, 0)  # POLLHUP comes unasked
    hangup.poll()
    # A drain gets all of its time.
    threading.Event().wait(min(seconds, threading.TIMEOUT_MAX))
    os._exit(1)


class _Worker:
    """Obeys the supervisor, in the event loop."""

    def __init__(self, server: BaseServer, channel: Channel, what: Order, handover: Handover) -> None:
        self._server = server
        self._channel = channel
        self._stops: set[asyncio.Task[Any]] = set()
        self._serials = itertools.count(1)
        self._what = what
        # What the supervisor may ask for, by name: see aioecho.workers.asking.
        self._view = view = ServerView(server)
        self._questions: dict[str, Question] = {
            **view.questions,
            "control.status": lambda: {**view.status(), "counts": self._counts()},
            "paused": lambda: server.is_paused,
        }
        self._answering = Answering(channel, self._questions)
        self._reports: WorkerReports | None = None
        if what.is_measured:
            self._reports = WorkerReports(server, lambda report: channel.send("metrics", **self._told(report)))
            self._questions["metrics"] = self._answer_metrics
        self._publishing = Publishing(server, channel)
        self._handover = handover
        if isinstance(server, DatagramServer | Composite):
            server.handover = handover

    async def run(self) -> None:
        """Serve when told to, until told to stop."""
        loop = asyncio.get_running_loop()
        self._orders: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        if self._what.max_requests is not None:
            self._count(self._what.max_requests + random.randint(0, self._what.max_requests_jitter))
        self._channel.attach(loop)
        loop.add_reader(self._channel.sock.fileno(), self._read_channel)
        self._channel.send("loaded")
        try:
            order = await self._orders.get()
            if order[""] != "serve":
                return
            try:
                await self._server.start()
            except CertificateError as error:  # the files may be about to be renewed
                self._channel.send("failed", why=str(error), traceback=None, retry=True)
                return
            await self._handover.take_over()
            # `kill` of one worker: it goes when another is there.
            loop.add_signal_handler(signal.SIGTERM, self._channel.send, "replace")
            self._channel.send("ready")
            if self._reports is not None:
                self._reports.start()
            obeying = loop.create_task(self._obey())
            await self._server.serve_forever()
            obeying.cancel()
            report = await self._server.shutdown()
            last = None if self._reports is None else self._reports.last()
            ended = {**dataclasses.asdict(report), "failed": self._server.has_failed()}
            self._channel.send("ended", report=ended, **self._told(last))
            await self._answering.stop()
            await self._channel.drain(0)  # the supervisor kills one that does not end
        finally:
            if self._reports is not None:
                self._reports.stop()
            loop.remove_reader(self._channel.sock.fileno())
        await end_other_tasks()

    def _apply(self, order: dict[str, Any]) -> None:
        """Do what was set live before this process began."""
        self._server.ids.prefix = f"{order['number']}."
        # The program may be newer than its supervisor: with other servers, for which other limits make sense.
        for number, settings in enumerate(order["settings"][: len(servers_of(self._server))], 1):
            for kind, set_live in (("limits", self._view.set_limits), ("timeouts", self._view.set_timeouts)):
                try:
                    if settings[kind]:
                        set_live(settings[kind], number)
                except (ValueError, TypeError) as error:
                    logger.error("the %s that were set live are not those of this worker: %s", kind, error)
            if settings["paused"]:
                self._view.pause(number)

    def _read_channel(self) -> None:
        for message in self._channel.receive():
            match message[""]:
                case "stats":
                    self._channel.send("stats", **self._counts())
                case "ask":
                    self._answering.on_ask(message)
                case "published":
                    self._publishing.on_published(message)
                case "unpublished":
                    self._publishing.on_unpublished(message)
                case "serve":
                    self._apply(message)  # at once: what is asked for behind it is newer
                    self._orders.put_nowait(message)
                case "ping":
                    self._channel.send("pong", **self._counts())
                case _:
                    self._orders.put_nowait(message)
        if self._channel.has_ended:
            asyncio.get_running_loop().remove_reader(self._channel.sock.fileno())
            self._orders.put_nowait({"": "drain"})

    async def _obey(self) -> None:
        while True:
            order = await self._orders.get()
            if order[""] == "retire":
                self._server.keep_backlog = True
                self._handover.retire()
            elif order[""] == "remove":
                self._handover.serves_newcomers = True
            elif order[""] == "drain":
                self._channel.send("draining", count=len(self._server.connections), what=self._server.what_it_serves)
            collect_little()
            if order[""] == "end" and order["why"]:
                self._server.end_at_once(order["why"])
            else:
                grace = 0 if order[""] == "end" else order.get("grace")
                stop = asyncio.get_running_loop().create_task(self._server.shutdown(grace))
                self._stops.add(stop)

    async def _answer_metrics(self) -> dict[str, Any]:
        assert self._reports is not None
        return self._told(await self._reports.answer())

    def _told(self, report: Any) -> dict[str, Any]:
        """Return what goes along with a message that tells what was counted."""
        return {**self._counts(), "metrics": report}

    def _counts(self) -> dict[str, Any]:
        return {"told": next(self._serials), "stats": self._stats(), "reasons": dict(self._server.stats.reasons)}

    def _stats(self) -> dict[str, int]:
        stats = self._server.stats
        if isinstance(stats, ServiceStats):
            return {
                f"{kind}.{name}": count
                for kind, of_kind in (("streams", stats.streams), ("datagrams", stats.datagrams))
                for name, count in _counts_of(of_kind).items()
            }
        return _counts_of(stats)

    def _count(self, limit: int) -> None:
        """Ask to be replaced after `limit` connections, and again after as many if that has failed."""
        left = limit

        def count(accepted: int) -> None:
            nonlocal left
            left -= accepted
            if left <= 0:
                left = limit
                self._channel.send("replace")

        self._server.on_accept = count


def _counts_of(stats: Stats) -> dict[str, int]:
    counts = {name: value for name, value in vars(stats).items() if isinstance(value, int)}
    if isinstance(stats, DatagramStats):  # without its drops the counts would not add up
        counts["drops"] = sum(stats.drops.values())
    return counts
